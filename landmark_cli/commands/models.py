"""The options by which a command opens a trained model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from landmark_cli.console import info
from landmark_cli.options import Options, option

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MODEL = "Model"


@dataclass(kw_only=True)
class CodeOptions(Options):
    """Whether opening something may run code."""

    trust_remote_code: bool = option(
        False,
        panel=MODEL,
        saved=False,
        in_recipe=False,
        help="Run Python code that comes with a model or tokenizer, with all your rights; otherwise it is refused.",
    )


@dataclass
class MachineOptions(CodeOptions):
    """Where models run, and in which precision."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto",
        panel=MODEL,
        help="Type of the weights and the computation; auto: the type that the weights are stored in, or float32 on a "
        "CPU that is slow with that.",
        saves_memory="--dtype bfloat16",
    )
    device: str = option("auto", panel=MODEL, help="Where to run: cpu, cuda, cuda:1; auto: a GPU where there is one.")
    quantization: Literal["none", "int8", "int4"] = option(
        "none",
        panel=MODEL,
        help="Hold the weights of linear layers in 8 or 4 bits: they take half or a quarter of the memory, and "
        "decoding is faster. On a GPU it needs the extra quantization.",
        saves_memory="--quantization int8",
    )


@dataclass
class ModelOptions(MachineOptions):
    """Which model, and where it runs."""

    model: str | None = option(
        None,
        panel=MODEL,
        help="The model: a directory, a hub id or a checkpoint of the paper's authors. "
        "[default: the newest finished model under runs/]",
    )


def precision_of(options: MachineOptions) -> dict[str, str]:
    """What results depend on of how `open_model` opens a model, as they are kept: only what differs from the default
    where that was all that there was."""
    held = {} if options.quantization == "none" else {"quantization": options.quantization}
    return {"dtype": options.dtype, **held}


def name_model(options: ModelOptions) -> str:
    """The model that --model names, or the newest finished model under runs/, of which the user is then told."""
    if options.model is not None:
        return options.model
    from landmark_cli.models.store import newest_model

    newest = newest_model(Path("runs"))
    info(f"using {newest}, the newest finished model under runs/ (--model names another)")
    return str(newest)


def open_model(
    name: str, options: MachineOptions, attention: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Open a model by name as the options say. attention: its `attn_implementation`, in place of the one it was saved
    with.

    Raises LandmarkError where the model cannot be opened, UsageError where there is no such device.
    """
    from transformers.utils import logging

    from landmark_cli.models.store import load

    logging.disable_progress_bar()
    return load(
        name,
        attention=attention,
        dtype=options.dtype,
        trust_remote_code=options.trust_remote_code,
        device=options.device,
        quantization=options.quantization,
    )
