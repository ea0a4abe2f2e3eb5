"""Where a run lives and what it needs to know before it starts; train and finetune share it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from landmark_cli.data.token_file import TokenFile
from landmark_cli.errors import LandmarkError
from landmark_cli.training.checkpoints import Checkpoints
from landmark_cli.training.setup import uses_cpu

# Entries of a model's config that say nothing about which model it is.
NOT_IDENTITY = {"transformers_version", "dtype", "_name_or_path", "architectures", "use_cache"}


def resolve_precision(precision: str, device: str) -> str:
    """ "auto" -> what accelerate was launched with, else bf16 on a GPU that computes in it, else fp32."""
    if precision != "auto":
        return precision
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched in ("bf16", "fp16"):
        return launched
    return "bf16" if not uses_cpu(device) and torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "fp32"


def run_directory(output: Path | None, name: str, resume: bool, state: PartialState) -> Path:
    """The directory of a run, the same for all processes; made if it is not there.

    output: the one the user named. Without it: a new runs/<name>, runs/<name>-2, ...; with resume the last of these.
    Raises LandmarkError where there is a run already that would be overwritten.
    """
    chosen = [output or (_last_or_next(name, resume) if state.is_main_process else None)]
    output = broadcast_object_list(chosen)[0]
    checkpoint = Checkpoints(output / "checkpoints", {}, keep=1).newest()
    if not resume and (checkpoint is not None or (output / "config.json").exists()):
        raise LandmarkError(
            f"{output} already holds a {'run' if checkpoint else 'model'}: add --resume to go on with a run, "
            "or give another --output"
        )
    state.wait_for_everyone()
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LandmarkError(f"--output {output} cannot be made: {error.strerror}") from error
    return output


def _last_or_next(name: str, resume: bool) -> Path:
    taken, path, number = None, Path("runs") / name, 2
    while path.exists():
        taken, path, number = path, Path("runs") / f"{name}-{number}", number + 1
    return taken if resume and taken is not None else path


def attention_name(config: Any) -> str:
    """Which attention a model has. What computes landmark attention is said when it first runs."""
    if getattr(config, "landmark_freq", None):
        return f"landmark attention, blocks of {config.landmark_freq} + 1 tokens"
    return f"ordinary attention ({config._attn_implementation})"


def device_name(device: torch.device) -> str:
    """The chip's name, or "CPU"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()


def model_identity(config: Any) -> dict[str, Any]:
    """What a model's config says about which model it is, for `Checkpoints`: everything that changes its weights or
    what they compute."""
    return {name: value for name, value in config.to_dict().items() if name not in NOT_IDENTITY}


def run_identity(
    config: Any, files: Sequence[TokenFile], weights: Sequence[float] | None, global_batch: int, seed: int
) -> dict[str, Any]:
    """What must stay the same for a run to be resumed exactly: the model, the tokens and how they make batches."""
    return model_identity(config) | {
        "tokenizer": files[0].metadata.tokenizer,
        "data": [file.metadata.sha256 for file in files],
        "data_weights": weights,
        "global_batch": global_batch,
        "seed": seed,
    }
