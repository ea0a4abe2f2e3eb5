#!/usr/bin/env bash
# The whole way on a small scale: text -> token files -> a trained model -> perplexity -> a passage. `make demo-train` runs it.
set -euo pipefail
cd "$(dirname "$0")/../.."
. recipes/demo/threads.sh

step() { printf '\n$ %s\n' "$*"; "$@"; }

step landmark prepare sample
step landmark train --recipe demo/tiny --data data/sample --output runs/demo --device cpu --resume
step landmark eval study demo --role landmark=runs/demo --data data/sample --output runs/demo/study \
    --sample-tokens 8192 --device cpu

# A prompt of about a thousand tokens, four times what the model was trained on: the start of the held-out novel.
prompt=$(mktemp)
trap 'rm -f "$prompt"' EXIT
python - data/sample/validation.bin > "$prompt" <<'PYTHON'
import sys

from landmark_cli.data.token_file import TokenFile
from landmark_cli.data.tokenizers import load_tokenizer

print(load_tokenizer("gpt2").decode(TokenFile.open(sys.argv[1]).tokens[:1000].tolist()), end="")
PYTHON
step landmark generate --model runs/demo --prompt-file "$prompt" --max-new-tokens 80 --device cpu
