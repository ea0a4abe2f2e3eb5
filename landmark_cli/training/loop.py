"""The one training loop, on accelerate: one process, DDP, FSDP or DeepSpeed as `accelerate launch` says.

Nothing of a run's course lives outside its checkpoint: the batch, the learning rate and the seed of every step are pure
functions of the step, so a resumed run repeats an uninterrupted one. The loss is the mean over all targets of the
global batch, whatever its split into processes and micro-batches: each micro-batch contributes its sum, divided by the
number of targets of all micro-batches. Where targets have weights, it is the weighted mean: sums of weighted losses,
divided by the sum of all weights. Beside a teacher it is several means, see distillation.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor, nn

from landmark_cli.attention.window import WindowSettings
from landmark_cli.console import counted, info, progress, warn
from landmark_cli.data.batches import Batches, iterate
from landmark_cli.data.landmarks import IGNORED_TARGET
from landmark_cli.errors import LandmarkError
from landmark_cli.interrupts import Interrupts, interrupts
from landmark_cli.training.checkpoints import Checkpoints, plain_name, warn_if_full
from landmark_cli.training.compiled import compile_layers
from landmark_cli.training.distillation import PARTS, Distillation, DistillationLoss
from landmark_cli.training.estimate import CHECKPOINT_BYTES
from landmark_cli.training.finite import spoiled_by
from landmark_cli.training.metrics import Meter, flops_per_token, peak_flops, peak_memory, progress_fields
from landmark_cli.training.metrics_file import METRICS, MetricsFile
from landmark_cli.training.optimizer import Schedule, adamw, decayed_names, parameter_groups
from landmark_cli.training.setup import LossModel, seed_step, without_adapters
from landmark_cli.training.stopping import Vote
from landmark_cli.training.update import Update
from landmark_cli.training.validation import Validation, ValidationWindows, validate

# What a run does between a signal and its end.
FINISHING = "finishing the step, then saving a checkpoint"
# Larger than any signal's number, so that in a vote a fault of the run goes before a signal.
TOO_MANY_SKIPPED = 1000


@dataclass(frozen=True)
class LoopSettings:
    """How to train. Steps are optimizer steps; every N steps means never where N is 0.

    output: the run's directory. batch_size: rows of a process's micro-batch; accumulation: micro-batches of a process
    in a step. sequence_length: of a row, landmarks included. clip: largest gradient norm, 0 for none. keep: checkpoints
    kept. precision: "bf16", "fp16" or "fp32". group_dropout: probability that attention leaves an earlier block out.
    fused_loss: work the loss out without holding all logits. Sharded models hold them all the same: their head is in
    shards while the loss is computed. fp32_residual: keep the residual stream of a bf16 run in float32. bad_steps: this
    many steps in a row whose loss or gradient is not finite end the run. read: have rows read chunk by chunk, in
    training and evaluation (see LossModel). compile_layers: compile the model's and the teacher's layers (see
    compiled.py). examine_every: steps between two calls of `Loop.examine`. go_on: the
    command that resumes it, for messages.
    """

    output: Path
    steps: int
    batch_size: int
    accumulation: int
    sequence_length: int
    schedule: Schedule
    weight_decay: float
    betas: tuple[float, float]
    clip: float
    precision: str
    seed: int
    log_every: int
    evaluate_every: int
    save_every: int
    keep: int
    group_dropout: float = 0.0
    fused_loss: bool = True
    fp32_residual: bool = False
    bad_steps: int = 10
    read: WindowSettings | None = None
    compile_layers: bool = False
    examine_every: int = 0
    go_on: str = "the same call, and resume"


class Loop:
    """A run: a model, its batches and settings, made ready on construction.

    batches: what to train on. identity: what must stay the same when the run is resumed, by name (see Checkpoints).
    validation: what evaluation reads, all of it together. distillation: how it learns from a teacher, if it does; the
    teacher is prepared (see `Teacher.prepare`), and DeepSpeed is not in use.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        batches: Batches,
        settings: LoopSettings,
        identity: dict[str, Any],
        validation: Sequence[ValidationWindows] = (),
        distillation: Distillation | None = None,
    ) -> None:
        self.accelerator, self.batches, self.validation, self.settings = accelerator, batches, validation, settings
        rows = settings.batch_size * settings.accumulation * accelerator.num_processes
        if batches.global_batch != rows:
            raise ValueError(
                f"batches: {batches.global_batch} rows a step, but {accelerator.num_processes} processes x "
                f"{settings.accumulation} x {settings.batch_size} take {rows}"
            )
        peak = peak_flops(accelerator.device, settings.precision)
        self.peak_flops = peak and peak * accelerator.num_processes
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        self.flops_per_token = flops_per_token(model, settings.sequence_length, settings.read)
        self.metrics = MetricsFile(settings.output / METRICS)
        self.checkpoints = Checkpoints(settings.output / "checkpoints", identity, settings.keep)
        self.distillation = distillation
        self._prepare(model)
        self.checkpoints.attach(accelerator, self.module, self.optimizer)
        self.vote = Vote()
        self.step = 0
        # Looks at the model as it is in the middle of the run. Every process calls it. Returns the signal that came
        # meanwhile, if one did.
        self.examine: Callable[[], int | None] = lambda: None
        # Beside a teacher: of each of its parts, this process's sums, and over how many positions of all processes.
        self._parts = torch.zeros(2, len(PARTS), device=accelerator.device)

    def _prepare(self, model: nn.Module) -> None:
        accelerator, settings = self.accelerator, self.settings
        sharded = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
        fused_loss = settings.fused_loss and not sharded
        how = (settings.group_dropout, fused_loss, settings.fp32_residual, settings.read)
        if settings.compile_layers:
            compile_layers(without_adapters(model))
            if self.distillation is not None:
                self.distillation.teacher.compile_layers()
        if self.distillation is None:
            model = LossModel(model, *how)
        else:
            model = DistillationLoss(model, self.distillation, *how)
        decayed = decayed_names(model)
        # FSDP 1 makes new parameters, so the optimizer is made after it; FSDP 2 wants to see model and optimizer at
        # once.
        wrap_first = accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2
        if wrap_first:
            if not accelerator.state.fsdp_plugin.use_orig_params:
                raise LandmarkError("FSDP hides which weights may decay: set fsdp_use_orig_params: true for accelerate")
            model = accelerator.prepare(model)
        named = ((plain_name(name), parameter) for name, parameter in model.named_parameters())
        groups = parameter_groups(named, decayed, settings.weight_decay)
        optimizer = adamw(groups, settings.betas, accelerator.device)
        if wrap_first:
            self.module, self.optimizer = model, accelerator.prepare(optimizer)
        else:
            self.module, self.optimizer = accelerator.prepare(model, optimizer)
        self.update = Update(accelerator, optimizer, self.optimizer, settings.schedule, settings.clip)

    def release(self) -> None:
        """Let go of gradients and of the optimizer, and of their memory. No step can be taken after that."""
        for parameter in self.module.parameters():
            parameter.grad = None
        self.optimizer = self.update = self.checkpoints.optimizer = None
        self.accelerator.free_memory()

    def resume(self) -> bool:
        """Go on from the newest whole checkpoint, if there is one."""
        saved = self.checkpoints.load_newest()
        if saved is None:
            return False
        self.step = saved.step
        self.update.skipped.restore(saved.skipped)
        return True

    def run(self) -> None:
        """Train from the current step to the last, with evaluation, checkpoints and metrics on the way."""
        settings, accelerator = self.settings, self.accelerator
        if accelerator.is_main_process:
            self.metrics.rewind(self.step)
            if settings.save_every:
                warn_if_full(settings.output, (settings.keep + 1) * CHECKPOINT_BYTES * self.trained)
        self.module.train()
        parameters = list(self.module.parameters())
        loss_since, self._skipped = torch.zeros((), device=accelerator.device), self.update.skipped.read()["total"]
        tokens = self.batches.global_batch * settings.sequence_length
        meter = Meter(self.step, settings.steps, tokens, self.flops_per_token, self.peak_flops)
        with interrupts(FINISHING) as asked, progress("training", settings.steps, "steps", initial=self.step) as shown:
            for micro_batches in self.micro_batches():
                self.vote.begin(self._wanted(asked))
                loss, norm = self.train_step(micro_batches, parameters)
                loss_since += loss
                self.step += 1
                stopping = self.vote.end(self._wanted(asked))
                fields = {}
                if self._due(settings.log_every) or self.step == 1 or stopping:
                    fields = progress_fields(self._record(meter, loss_since, norm))
                    loss_since.zero_()
                if stopping == TOO_MANY_SKIPPED:
                    self._refuse_many_skipped()
                with meter.pause():
                    if self.validation and self._due(settings.evaluate_every):
                        self._report_evaluation()
                    if settings.examine_every and self.step % settings.examine_every == 0 and not stopping:
                        if self.step < settings.steps and (signal := self.examine()):
                            asked.note(signal)
                    if self._due(settings.save_every) or stopping:
                        saved = self.save()
                shown.advance(1, **fields)
                if stopping:
                    asked.note(stopping)
                    raise asked.stopped(
                        f"stopped after step {self.step} of {settings.steps}, saved as {saved}; go on with\n"
                        f"{settings.go_on}"
                    )
        self._refuse_many_skipped()

    def _wanted(self, asked: Interrupts) -> int:
        """What this process votes for: to stop for a signal, or for steps that do not count, or to go on."""
        if self.update.skipped.reached(self.settings.bad_steps):
            return TOO_MANY_SKIPPED
        return asked.signal or 0

    def save(self) -> Path:
        """Save a checkpoint of the step that is reached. Every process calls it.

        Raises LandmarkError where too many steps in a row were skipped, or the checkpoint cannot be written.
        """
        self._refuse_many_skipped()
        return self.checkpoints.save(self.step, self.update.skipped.read())

    def _due(self, every: int) -> bool:
        return every > 0 and (self.step % every == 0 or self.step == self.settings.steps)

    def micro_batches(self) -> Iterator[list[dict[str, Tensor]]]:
        """This process's micro-batches of every step that is left."""
        accelerator = self.accelerator
        return iterate(
            self.batches,
            self.step,
            self.settings.steps,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            accumulation=self.settings.accumulation,
            device=accelerator.device,
        )

    def train_step(
        self, micro_batches: list[dict[str, Tensor]], parameters: list[nn.Parameter]
    ) -> tuple[Tensor, Tensor]:
        """One optimizer step on this process's rows -> this process's share of the loss, 0 where the step was skipped
        because it is not finite (see `Update`), and the gradient's norm.

        Nothing here waits for the device.
        """
        settings, accelerator = self.settings, self.accelerator
        seed_step(settings.seed, self.step, accelerator.process_index)
        self.update.begin(self.step)
        parts = None
        if self.distillation is None:
            targets = self._targets(micro_batches)
        else:
            micro_batches, targets, counts = self._beside_teacher(micro_batches)
            parts = torch.zeros(len(PARTS), device=accelerator.device)
        # The gradient becomes a mean over processes, and by accelerate one over micro-batches; this turns means into
        # the sum.
        scale = accelerator.num_processes * settings.accumulation / targets
        loss = torch.zeros((), device=accelerator.device)
        for batch in micro_batches:
            with accelerator.accumulate(self.module):
                part = self.module(**batch)
                if parts is not None:
                    parts += part[1:].detach()
                    part = part[0]
                accelerator.backward(part * spoiled_by(part, scale))
                loss += part.detach() / targets
                if accelerator.sync_gradients:
                    norm, skip = self.update.judge(parameters)
                self.optimizer.step()
                self.optimizer.zero_grad()
        if parts is not None:
            self._parts += torch.where(skip > 0, 0.0, torch.stack([parts, counts]))
        return torch.where(skip > 0, 0.0, loss), norm

    def _targets(self, micro_batches: list[dict[str, Tensor]]) -> Tensor:
        """What the summed loss of all processes' micro-batches is divided by."""
        counts = [
            batch["weights"].sum() if "weights" in batch else (batch["labels"] != IGNORED_TARGET).sum()
            for batch in micro_batches
        ]
        targets = self.accelerator.reduce(torch.stack(counts).sum(), "sum")
        # Without targets the loss is 0. Weights may well sum to less than 1.
        return torch.where(targets > 0, targets, 1)

    def _beside_teacher(self, micro_batches: list[dict[str, Tensor]]) -> tuple[list[dict[str, Any]], Tensor, Tensor]:
        """(micro-batches with what the model is told besides, what the summed loss is divided by, over how many
        positions of all processes the parts of the loss go)."""
        of = self.distillation
        asked = [of.asked(**batch) for batch in micro_batches]
        counts = self.accelerator.reduce(torch.stack([of.counts(one) for one in asked]).sum(0), "sum")
        targets, ratios = of.ratios(counts)
        told = [batch | {"asked": one, "ratios": ratios} for batch, one in zip(micro_batches, asked, strict=True)]
        return told, targets, counts

    def _record(self, meter: Meter, loss: Tensor, norm: Tensor) -> dict[str, Any]:
        """Write a record of the steps since the last one; nothing else in the loop waits for the device.

        loss: the sum of this process's shares of the loss in these steps.
        """
        steps, before = self.step - meter.since, self._skipped
        counts = self.update.skipped.read()
        self._skipped = counts["total"]
        skipped = self._skipped - before
        if skipped:
            warn(
                f"{skipped} of the {counted(steps, 'step')} up to step {self.step} changed nothing: "
                "their loss or gradient was not finite"
            )
        loss = self.accelerator.reduce(loss, "sum").item()
        # The last step's learning rate, which goes by how many steps counted before it.
        effective = self.step - 1 - counts["total"] + (counts["in_a_row"] > 0)
        record = {
            "step": self.step,
            "loss": loss / (steps - skipped) if skipped < steps else math.nan,
            "learning_rate": self.settings.schedule(effective),
            "gradient_norm": float(norm),
            "skipped_steps": self._skipped,
            "tokens": self.step * meter.tokens,
            **meter.read(self.step),
            "peak_memory": peak_memory(self.accelerator.device),
        }
        if self.distillation is not None:
            record |= self._read_parts()
        self.write(record)
        return record

    def _read_parts(self) -> dict[str, float]:
        """The means of the loss's parts since the last record, of those that had any position."""
        sums, counts = self.accelerator.reduce(self._parts[0], "sum").tolist(), self._parts[1].tolist()
        self._parts.zero_()
        return {name: total / count for name, total, count in zip(PARTS, sums, counts, strict=True) if count}

    def write(self, record: dict[str, Any]) -> None:
        """Add a record to the run's metrics and its trackers. Every process calls it."""
        if self.accelerator.is_main_process:
            self.metrics.append(record)
        self.accelerator.log(record, step=record["step"])

    def _refuse_many_skipped(self) -> None:
        """LandmarkError where too many steps in a row were skipped, by what the device knows now."""
        counts, limit = self.update.skipped.read(), self.settings.bad_steps
        none_counted = self.step == self.settings.steps == counts["total"]
        if counts["longest"] >= limit or none_counted:
            what = (
                f"all {counted(self.step, 'step')}"
                if none_counted
                else f"{counted(counts['longest'], 'step')} in a row"
            )
            raise LandmarkError(
                f"the loss or gradient of {what} was not finite, up to step {self.step}; they changed nothing. "
                "Try a lower --lr, a longer --warmup or --clip 1. The last good checkpoint is "
                f"{self.checkpoints.newest() or 'none'}"
            )

    def _report_evaluation(self) -> None:
        found = self.evaluate()
        self.write({"step": self.step} | found.record)
        info(f"step {self.step}: {found}")

    def evaluate(self) -> Validation:
        """What the model makes of all validation windows, the same for any number of processes."""
        rows, teacher = self.settings.batch_size, self.distillation is not None
        return validate(self.accelerator, self.module, self.validation, rows, teacher)
