#!/usr/bin/env bash
# What landmark attention is for, in about a minute of a CPU: a small model that is part of the package reads a
# novel of 115 thousand tokens (GPT-2's) that it was not trained on, finds what is hidden in it, and shows where it read.
# `make demo` runs it. SEED=7 hides other facts; DEVICE=cuda reads on a GPU. `make demo-train` trains a model.
set -euo pipefail
cd "$(dirname "$0")/../.."
. recipes/demo/threads.sh
# What is done at a time is small: on two cores beside other programs one thread read 35 thousand tokens in 9.4 s, two in 12.6.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

python recipes/demo/ask.py --model landmark_cli/assets/demo --seed "${SEED:-0}" --device "${DEVICE:-cpu}" --pages runs/demo-asked "$@"
printf '\nOther facts: SEED=7 make demo. To train a model yourself: make demo-train\n'
