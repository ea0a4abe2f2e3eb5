"""Checkpoints of a run: whole or not there at all, the newest few kept, usable on another number of processes.

A checkpoint is a directory `step-00001000` with what `Accelerator.save_state` writes (weights, optimizer, scaler),
`training.json` (the step, what makes this run this run, and how weights lie in the files) and the checksums of all
these files. It is written under another name, flushed to the disk and then renamed, so a run that is killed or finds
the disk full leaves its last good checkpoint as it was. What was damaged since is found by the checksums, and the
checkpoint before it is taken.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from landmark_cli.console import warn
from landmark_cli.errors import LandmarkError
from landmark_cli.file_errors import reading, reason
from landmark_cli.file_reading import read_record
from landmark_cli.file_writing import write_json
from landmark_cli.models.pretrained import CHECKPOINT as RECORD
from landmark_cli.on_disk import flush, flush_tree
from landmark_cli.training.checksums import damage_of, write_checksums
from landmark_cli.training.finite import not_finite
from landmark_cli.training.setup import by_main_process

NAME = re.compile(r"step-(\d+)")
PARTIAL = ".partial"
WEIGHTS = "model.safetensors"
WHOLE = "whole weights"
DAMAGED = ".damaged"
# CheckpointException is what sharded checkpoints raise; it is no Exception.
UNWRITABLE = (OSError, RuntimeError, SafetensorError, CheckpointException)
WRAPPERS = re.compile(r"(^|\.)(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.)")


def plain_name(name: str) -> str:
    """A parameter's name without what DDP, FSDP and torch.compile put into it."""
    return WRAPPERS.sub("", name).removeprefix(".")


def own_name(name: str) -> str:
    """The name that a model itself has for a parameter of the loss that is made of it."""
    return plain_name(name).removeprefix("wrapped.")


@dataclass(frozen=True)
class Record:
    """What a checkpoint says of itself. step: steps done when it was saved. identity, layout: see Checkpoints. skipped:
    see `SkippedSteps.read`; empty where no step was skipped."""

    step: int
    identity: dict[str, Any]
    layout: str | None = None
    skipped: dict[str, int] = field(default_factory=dict)


class Checkpoints:
    """The checkpoints of one run.

    directory: where the checkpoints are. identity: what must be the same for a run to go on from them, by name: the
    model's shape, the data, the batch, the seed. keep: how many of the newest stay. `attach` comes after
    accelerator.prepare.
    """

    def __init__(self, directory: Path, identity: dict[str, Any], keep: int) -> None:
        self.directory, self.keep = directory, keep
        self.identity = json.loads(json.dumps(identity))

    def attach(self, accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Save and load the state of `accelerator`, whose prepared model and optimizer these are."""
        self.accelerator, self.model, self.optimizer = accelerator, model, optimizer
        self.layout = layout(accelerator)
        accelerator.register_save_state_pre_hook(self._replace_weights)
        accelerator.register_load_state_pre_hook(self._load_weights)

    def newest(self) -> Path | None:
        """The newest whole checkpoint, or None."""
        return next(reversed(self._whole()), None)

    def _whole(self) -> list[Path]:
        found = self.directory.iterdir() if self.directory.is_dir() else ()
        return sorted((path for path in found if NAME.fullmatch(path.name)), key=step_of)

    def identity_there(self) -> dict[str, Any] | None:
        """The identity of the run that the newest checkpoint is of, whose record can be read; None without one."""
        for path in reversed(self._whole()):
            with contextlib.suppress(LandmarkError):
                return read_record(Record, path / RECORD).identity
        return None

    def newest_whole(self) -> Path | None:
        """The newest checkpoint with no damage, the same for all processes, or None where there is none at all. The
        user is told of damaged ones, which are put aside.

        Raises LandmarkError where all of them are damaged.
        """
        found, damaged = by_main_process(self._look_for_damage)
        for path, what in damaged.items():
            warn(f"{path} is damaged ({what}): going on from {found.name}; it is kept as {path.name}{DAMAGED}")
        return found

    def _look_for_damage(self) -> tuple[Path | None, dict[Path, str]]:
        """The newest checkpoint without damage, and what is wrong with those that are newer, which are put aside."""
        self._remove_left_over()
        found, damaged = None, {}
        for path in reversed(self._whole()):
            what = damage_of(path)
            if what is None:
                found = path
                break
            damaged[path] = what
        if found is None and damaged:
            each = "; ".join(f"{path.name}: {what}" for path, what in damaged.items())
            raise LandmarkError(
                f"all checkpoints in {self.directory} are damaged ({each}): remove them to start anew, "
                "or give another --output"
            )
        for path in damaged:
            aside = path.with_name(path.name + DAMAGED)
            shutil.rmtree(aside, ignore_errors=True)
            with contextlib.suppress(OSError):
                path.rename(aside)
        if found is not None:
            # A kill may have come between the newest one's writing and the removal of the oldest.
            self._drop_oldest()
        return found, damaged

    def check(self, path: Path) -> Record:
        """What a checkpoint says of itself that this run may go on from; LandmarkError where it belongs to another run,
        or was saved by a run whose launch stores weights in a way that this launch cannot read."""
        saved = read_record(Record, path / RECORD, to_do="remove the checkpoint to go on from the one before it")
        ours, theirs = self.identity, saved.identity
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
        if saved.layout not in (None, self.layout):
            raise LandmarkError(
                f"{path} was saved as {saved.layout}, and this run reads {self.layout}: launch it as it was launched "
                "then, or give another --output"
            )
        return saved

    def load_newest(self) -> Record | None:
        """Load the newest checkpoint with no damage; None where there is none. Errors as `newest_whole` and `load`."""
        path = self.newest_whole()
        return None if path is None else self._restore(path)

    def load(self, path: Path) -> Record:
        """Put the state of a checkpoint into the attached model and optimizer; returns what it says of itself.

        Raises LandmarkError where the checkpoint is damaged, and what `check` raises.
        """
        what = damage_of(path)
        if what is not None:
            raise LandmarkError(f"{path} is damaged ({what}): remove it to go on from the one before it")
        return self._restore(path)

    def _restore(self, path: Path) -> Record:
        saved = self.check(path)
        with reading(path, to_do="remove it to go on from the one before it"):
            self.accelerator.load_state(str(path))
        # accelerate counts micro-batches; a whole step is done, and a step may have another number of them now.
        self.accelerator.step = 0
        return saved

    def save(self, step: int, skipped: dict[str, int] | None = None) -> Path:
        """Write the checkpoint of `step` and drop the oldest beyond `keep`. Every process calls it.

        skipped: what `SkippedSteps.read` says. Raises LandmarkError where the checkpoint cannot be written, or
        a number in it is not finite; earlier checkpoints are untouched then.
        """
        self.refuse_not_finite(f"the checkpoint of step {step} is not saved")
        path = self.directory / f"step-{step:08d}"
        partial = path.with_name(path.name + PARTIAL)
        record = Record(step, self.identity, self.layout, skipped or {})
        try:
            _written_by_main_process(lambda: self._begin(partial))
            self.accelerator.save_state(str(partial))
            self.accelerator.wait_for_everyone()
            _written_by_main_process(lambda: self._publish(partial, path, record))
        except (*UNWRITABLE, LandmarkError) as error:
            last = self.newest()
            if self.accelerator.is_main_process:
                # Only one process removes it, so that the others meet no errors that would hide this one.
                shutil.rmtree(partial, ignore_errors=True)
            raise LandmarkError(
                f"the checkpoint of step {step} could not be saved in {self.directory}: {reason(error)}. "
                f"The last good one is {last or 'none'}; make room and run again with --resume"
            ) from error
        return path

    def _begin(self, partial: Path) -> None:
        self._remove_left_over()
        partial.mkdir(parents=True)

    def _publish(self, partial: Path, path: Path, record: Record) -> None:
        write_json(partial / RECORD, dataclasses.asdict(record))
        write_checksums(partial)
        flush_tree(partial)
        if path.exists():
            self._remove(path)
        os.replace(partial, path)
        flush(self.directory)
        self._drop_oldest()

    def _drop_oldest(self) -> None:
        """Remove the oldest checkpoints beyond `keep`."""
        for old in self._whole()[: -self.keep]:
            with contextlib.suppress(OSError):
                self._remove(old)

    def _remove(self, path: Path) -> None:
        """Remove a checkpoint, under another name first: one that is half removed must not look like a damaged one."""
        old = path.with_name(f"{path.name}.old{PARTIAL}")
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
        shutil.rmtree(old, ignore_errors=True)

    def _remove_left_over(self) -> None:
        """Remove what a kill left half written or half removed."""
        for left_over in self.directory.glob(f"*{PARTIAL}"):
            shutil.rmtree(left_over, ignore_errors=True)

    def refuse_not_finite(self, what: str) -> None:
        """LandmarkError in all processes where a weight, or what the optimizer keeps of it, is not finite in one."""
        named = [(plain_name(name), parameter) for name, parameter in self.model.named_parameters()]
        for number, state in enumerate(self.optimizer.state.values()):
            named += [(f"the optimizer's {key} of parameter {number}", value) for key, value in state.items()]
        bad = [name for name in gather_object([not_finite(named)]) if name is not None]
        if bad:
            raise LandmarkError(
                f"{what}, for {bad[0]} is not finite: try a lower --lr or another --precision. "
                f"The last good checkpoint is {self.newest() or 'none'}"
            )

    def _replace_weights(self, models: list[nn.Module], weights: list[dict[str, Any]], directory: str) -> None:
        """accelerate's hook before it writes whole weights: trained ones only, under their plain names, each once."""
        if weights:
            weights[0] = {name: tensor.contiguous() for name, tensor in self._stored().items()}

    def _load_weights(self, models: list[nn.Module], directory: str) -> None:
        """accelerate's hook before it loads whole weights: the reverse of `_replace_weights`."""
        if not models:
            return
        models.clear()
        put(load_file(Path(directory) / WEIGHTS), self._stored(), directory)

    def _stored(self) -> dict[str, torch.Tensor]:
        """The attached model's. Frozen weights come from where the model came from, and are not among them."""
        return stored_of(self.accelerator.unwrap_model(self.model, keep_torch_compile=False))


def stored_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """What a checkpoint holds of a model: its trained parameters and its persistent buffers, by plain name."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    state = model.state_dict()
    return {plain_name(name): state[name] for name in state if name in trained or name not in every}


@torch.no_grad()
def put(loaded: dict[str, torch.Tensor], stored: dict[str, torch.Tensor], what: str | Path) -> None:
    """Put a checkpoint's tensors into a model. stored: the model's own, from `stored_of`. what: the checkpoint, for
    messages. Raises LandmarkError where they are another model's."""
    if loaded.keys() != stored.keys():
        name = min(loaded.keys() ^ stored.keys())
        place = "only there" if name in loaded else "missing there"
        raise LandmarkError(f"{what} holds the weights of another model: {name} is {place}")
    for name, tensor in loaded.items():
        if tensor.shape != stored[name].shape:
            shapes = f"{tuple(tensor.shape)} there and {tuple(stored[name].shape)} here"
            raise LandmarkError(f"{what} holds the weights of another model: {name} is {shapes}")
        stored[name].copy_(tensor)


def _written_by_main_process(work: Callable[[], None]) -> None:
    """Have the main process write something; LandmarkError in every process where it cannot."""

    def told() -> None:
        try:
            work()
        except UNWRITABLE as error:
            raise LandmarkError(reason(error)) from error

    by_main_process(told)


def layout(accelerator: Accelerator) -> str:
    """How weights and optimizer lie in a checkpoint's files. What was stored in one of these ways can be read in the
    same way by any number of processes, except DeepSpeed's."""
    kind = accelerator.distributed_type
    if kind == DistributedType.FSDP:
        plugin = accelerator.state.fsdp_plugin
        return f"FSDP {plugin.fsdp_version} {plugin.state_dict_type.name}"
    if kind == DistributedType.DEEPSPEED:
        return f"DeepSpeed on {accelerator.num_processes} processes"
    return WHOLE


def step_of(path: Path) -> int:
    """The step that a checkpoint's directory is named for."""
    return int(NAME.fullmatch(path.name).group(1))


def warn_if_full(directory: Path, needed: int) -> None:
    """Warn before a long run when the disk has fewer than `needed` bytes left for its checkpoints."""
    free = shutil.disk_usage(directory).free
    if free < needed:
        warn(f"{directory} has {free / 1e9:.1f} GB left; the checkpoints of this run need about {needed / 1e9:.1f} GB")
