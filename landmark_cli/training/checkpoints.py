"""Checkpoints of a run: whole or not there at all, the newest few kept, usable on another number of processes.

A checkpoint is a directory `step-00001000` with what `Accelerator.save_state` writes (weights, optimizer, scaler) and
`training.json` (the step, what makes this run this run, and how weights lie in the files). It is written under another
name, flushed to the disk and then renamed, so a run that is killed or finds the disk full leaves its last good
checkpoint as it was.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from landmark_cli.console import warn
from landmark_cli.errors import LandmarkError
from landmark_cli.files import flush, flush_tree

NAME = re.compile(r"step-(\d+)")
PARTIAL = ".partial"
WEIGHTS = "model.safetensors"
# CheckpointException is what sharded checkpoints raise; it is no Exception.
UNREADABLE = (
    OSError,
    RuntimeError,
    ValueError,
    EOFError,
    pickle.UnpicklingError,
    SafetensorError,
    CheckpointException,
)
UNWRITABLE = (OSError, RuntimeError, SafetensorError, CheckpointException)
WRAPPERS = re.compile(r"(^|\.)(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.)")


def plain_name(name: str) -> str:
    """A parameter's name without what DDP, FSDP and torch.compile put into it."""
    return WRAPPERS.sub("", name).removeprefix(".")


class Checkpoints:
    """The checkpoints of one run.

    directory: where they are. identity: what must be the same for a run to go on from them, by name: the model's shape,
    the data, the batch, the seed. keep: how many of the newest stay. `attach` comes after accelerator.prepare.
    """

    def __init__(self, directory: Path, identity: dict[str, Any], keep: int) -> None:
        self.directory, self.keep = directory, keep
        self.identity = json.loads(json.dumps(identity))

    def attach(self, accelerator: Accelerator, model: nn.Module) -> None:
        """Save and load the state of `accelerator`, whose prepared model is `model`."""
        self.accelerator, self.model, self.layout = accelerator, model, layout(accelerator)
        accelerator.register_save_state_pre_hook(self._replace_weights)
        accelerator.register_load_state_pre_hook(self._load_weights)

    def newest(self) -> Path | None:
        """The newest whole checkpoint, or None."""
        return next(reversed(self._whole()), None)

    def _whole(self) -> list[Path]:
        found = self.directory.iterdir() if self.directory.is_dir() else ()
        return sorted((path for path in found if NAME.fullmatch(path.name)), key=step_of)

    def check(self, path: Path) -> int:
        """The step of a checkpoint that this run may go on from; LandmarkError where it belongs to another run, or was
        saved by one that was launched in a way this one cannot read."""
        try:
            saved = json.loads((path / "training.json").read_text(encoding="utf-8"))
            step, identity, saved_as = saved["step"], saved["identity"], saved.get("layout")
        except (OSError, ValueError, KeyError) as error:
            raise LandmarkError(f"{path} is no checkpoint of a training run: {error}; remove it to go on") from error
        ours, theirs = self.identity, identity
        differences = [
            f"{name} is {theirs.get(name)} there and {ours.get(name)} here"
            for name in sorted(ours.keys() | theirs.keys())
            if ours.get(name) != theirs.get(name)
        ]
        if differences:
            shown = "; ".join(differences[:4]) + (f"; {len(differences) - 4} more" if len(differences) > 4 else "")
            raise LandmarkError(
                f"{path} belongs to another run: {shown}. Give the options it was trained with, or another --output"
            )
        if saved_as not in (None, self.layout):
            raise LandmarkError(
                f"{path} was saved as {saved_as}, and this run reads {self.layout}: launch it as it was launched then, "
                "or give another --output"
            )
        return step

    def load(self, path: Path) -> int:
        """Put the state of a checkpoint into the attached model and optimizer; returns its step."""
        step = self.check(path)
        try:
            self.accelerator.load_state(str(path))
        except UNREADABLE as error:
            raise LandmarkError(
                f"{path} cannot be read: {first_line(error)}. Remove it to go on from the one before it"
            ) from error
        # accelerate counts micro-batches; a whole step is done, and another number of them may make one now.
        self.accelerator.step = 0
        return step

    def save(self, step: int) -> Path:
        """Write the checkpoint of `step` and drop the oldest beyond `keep`. Every process calls it.

        Raises LandmarkError where it cannot be written; the earlier ones are untouched then.
        """
        main, everyone = self.accelerator.is_main_process, self.accelerator.wait_for_everyone
        path = self.directory / f"step-{step:08d}"
        partial = path.with_name(path.name + PARTIAL)
        try:
            if main:
                self._remove_partial()
                partial.mkdir(parents=True)
            everyone()
            self.accelerator.save_state(str(partial))
            everyone()
            if main:
                self._publish(partial, path, step)
        except UNWRITABLE as error:
            last = self.newest()
            if main:
                # Not from under the other processes, whose own errors would hide this one.
                shutil.rmtree(partial, ignore_errors=True)
            raise LandmarkError(
                f"the checkpoint of step {step} could not be saved in {self.directory}: {first_line(error)}. "
                f"The last good one is {last or 'none'}; make room and run again with --resume"
            ) from error
        everyone()
        return path

    def _publish(self, partial: Path, path: Path, step: int) -> None:
        record = {"step": step, "identity": self.identity, "layout": self.layout}
        (partial / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        flush_tree(partial)
        if path.exists():
            shutil.rmtree(path)
        os.replace(partial, path)
        flush(self.directory)
        for old in self._whole()[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)

    def _remove_partial(self) -> None:
        for left_over in self.directory.glob(f"*{PARTIAL}"):
            shutil.rmtree(left_over, ignore_errors=True)

    def _replace_weights(self, models: list[nn.Module], weights: list[dict[str, Any]], directory: str) -> None:
        """accelerate's hook before it writes whole weights: trained ones only, under their plain names, each once."""
        if weights:
            weights[0] = {name: tensor.contiguous() for name, tensor in self._stored().items()}

    def _load_weights(self, models: list[nn.Module], directory: str) -> None:
        """accelerate's hook before it loads whole weights: the reverse of `_replace_weights`."""
        if not models:
            return
        models.clear()
        loaded, stored = load_file(Path(directory) / WEIGHTS), self._stored()
        if loaded.keys() != stored.keys():
            name = min(loaded.keys() ^ stored.keys())
            place = "only there" if name in loaded else "missing there"
            raise LandmarkError(f"{directory} holds the weights of another model: {name} is {place}")
        with torch.no_grad():
            for name, tensor in loaded.items():
                stored[name].copy_(tensor)

    def _stored(self) -> dict[str, torch.Tensor]:
        """The attached model's trained parameters and its persistent buffers, by plain name. Frozen weights come from
        where the model came from, so they are not among them."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        state = model.state_dict()
        return {plain_name(name): state[name] for name in state if name in trained or name not in every}


def layout(accelerator: Accelerator) -> str:
    """How weights and optimizer lie in a checkpoint's files. Each way is read by any number of processes of its own
    kind, except DeepSpeed's."""
    kind = accelerator.distributed_type
    if kind == DistributedType.FSDP:
        plugin = accelerator.state.fsdp_plugin
        return f"FSDP {plugin.fsdp_version} {plugin.state_dict_type.name}"
    if kind == DistributedType.DEEPSPEED:
        return f"DeepSpeed on {accelerator.num_processes} processes"
    return "whole weights"


def step_of(path: Path) -> int:
    """The step that a checkpoint's directory is named for."""
    return int(NAME.fullmatch(path.name).group(1))


def warn_if_full(directory: Path, needed: int) -> None:
    """Warn before a long run when the disk has fewer than `needed` bytes left for its checkpoints."""
    free = shutil.disk_usage(directory).free
    if free < needed:
        warn(f"{directory} has {free / 1e9:.1f} GB left; the checkpoints of this run need about {needed / 1e9:.1f} GB")


def first_line(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        # What went wrong in the processes; its own text is their tracebacks.
        error = next(iter(error.failures.values()))[0]
    return (getattr(error, "strerror", None) or str(error)).strip().splitlines()[0]
