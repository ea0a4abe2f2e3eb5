"""Where a run lives and what a run needs to know before it starts, for train and finetune."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from landmark_cli.console import info
from landmark_cli.data.training_data import TrainingData
from landmark_cli.data.windows import AnswerWeights
from landmark_cli.errors import LandmarkError
from landmark_cli.file_errors import writing
from landmark_cli.launch import again
from landmark_cli.locks import sole_writer
from landmark_cli.softmax import is_joint
from landmark_cli.training.checkpoints import Checkpoints
from landmark_cli.training.setup import by_main_process, uses_cpu

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


@contextmanager
def run_directory(output: Path | None, name: str, resume: bool) -> Iterator[Path]:
    """The directory of a run, the same for all processes; made if it is not there, and held while the block runs.

    output: the directory that the user named. Without it: a new runs/<name>, runs/<name>-2, ...; with resume the last
    of these.
    Raises LandmarkError, in every process, where a run that is there would be overwritten, or is going on.
    """
    with ExitStack() as held:
        found = by_main_process(lambda: _claim(output, name, resume, held))
        # Other machines may have disks of their own.
        found.mkdir(parents=True, exist_ok=True)
        yield found


def place_of(output: Path) -> str | None:
    """What a run in this directory keeps where it is stopped outside of its steps, and how to go on; None where it has
    no checkpoint."""
    checkpoint = newest_checkpoint(output)
    if checkpoint is None:
        return None
    if (output / "config.json").exists():
        return f"trained model: {output}; nothing is left to do"
    return f"stopped with {checkpoint} kept; go on with\n{again('resume', output=output)}"


def newest_checkpoint(output: Path) -> Path | None:
    """The newest checkpoint of the run in a directory, if it has some."""
    return Checkpoints(output / "checkpoints", {}, keep=1).newest()


def begin_of_windows(output: Path, resume: bool, begin: Sequence[int]) -> tuple[int, ...]:
    """What the windows of a run begin with: `begin`, the tokens that its tokenizer puts in front of a text by itself.
    Nothing where the run in the directory `output` is resumed, and was begun by a version whose windows began with
    nothing. Every process calls it."""
    if not resume or not begin:
        return tuple(begin)
    identity = by_main_process(Checkpoints(output / "checkpoints", {}, keep=1).identity_there)
    if identity is None or "begin" in identity:
        return tuple(begin)
    info("windows do not begin as the tokenizer begins a text: they did not when this run was begun")
    return ()


def _claim(output: Path | None, name: str, resume: bool, held: ExitStack) -> Path:
    """Find or make the directory and lock it until `held` ends."""
    if output is None:
        output = _last_or_new(name, resume)
    held.enter_context(sole_writer(output))
    checkpoint = newest_checkpoint(output)
    if not resume and (checkpoint is not None or (output / "config.json").exists()):
        raise LandmarkError(
            f"{output} already holds a {'run' if checkpoint else 'model'}: add --resume to go on with a run, "
            "or give another --output"
        )
    return output


def _last_or_new(name: str, resume: bool) -> Path:
    """Two runs never get the same directory, since making one fails where it exists already."""
    last = None
    for number in itertools.count(1):
        path = Path("runs") / (name if number == 1 else f"{name}-{number}")
        if resume and last is not None and not path.exists():
            return last
        with writing(path, to_do="--output names another place"):
            try:
                path.mkdir(parents=True)
            except FileExistsError:
                last = path
            else:
                return path


def attention_name(config: Any) -> str:
    """Which attention a model has. Which backend computes landmark attention is said when it first runs."""
    if getattr(config, "landmark_freq", None):
        joint = ", which landmarks only choose" if is_joint(config) else ""
        return f"landmark attention, blocks of {config.landmark_freq} + 1 tokens{joint}"
    return f"ordinary attention ({config._attn_implementation})"


def device_name(device: torch.device) -> str:
    """The chip's name, or "CPU"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()


def model_identity(config: Any) -> dict[str, Any]:
    """What a model's config says about which model it is, for `Checkpoints`: everything that changes the weights or
    what they compute."""
    return {name: value for name, value in config.to_dict().items() if name not in NOT_IDENTITY}


def run_identity(
    config: Any, data: TrainingData, global_batch: int, seed: int, answer_weights: AnswerWeights | None = None
) -> dict[str, Any]:
    """What must stay the same for a run to be resumed exactly: the model, the tokens, how they make batches and, where
    they do not all weigh alike, what they weigh."""
    weighed = {}
    if answer_weights is not None:
        weighed = {"answers": data.answers, **dataclasses.asdict(answer_weights)}
    return (
        model_identity(config)
        | weighed
        | {
            "tokenizer": data.train[0].metadata.tokenizer,
            "data": [file.metadata.sha256 for file in data.train],
            "data_weights": data.weights,
            "global_batch": global_batch,
            "seed": seed,
        }
    )
