"""The one training loop, on accelerate: one process, DDP, FSDP or DeepSpeed as `accelerate launch` says.

Nothing of a run's course lives outside its checkpoint: the batch, the learning rate and the seed of every step are pure
functions of the step, so a resumed run repeats an uninterrupted one. The loss is the mean over all targets of the
global batch, whatever its split into processes and micro-batches: each micro-batch contributes its sum, divided by the
number of targets of them all.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator, DistributedType
from safetensors import SafetensorError
from torch import Tensor, nn

from landmark_cli.console import info, progress
from landmark_cli.data.landmarks import IGNORED_TARGET
from landmark_cli.data.prefetch import prefetched
from landmark_cli.errors import LandmarkError
from landmark_cli.training.checkpoints import Checkpoints, first_line, flush_tree, plain_name
from landmark_cli.training.metrics import Meter, MetricsFile, flops_per_token, peak_flops, peak_memory, progress_fields
from landmark_cli.training.optimizer import Schedule, adamw, decayed_names, parameter_groups, set_learning_rate
from landmark_cli.training.setup import LossModel, quiet_transformers, seed_step

BATCHES_AHEAD = 3


class BatchSource(Protocol):
    """What the loop trains on: rows of any step, a pure function of the step and the rows asked for."""

    global_batch: int
    sequence_length: int

    def batch(self, step: int, start: int, stop: int) -> dict[str, Tensor]:
        """Rows start..stop of a step's global batch: "input_ids" and "labels" (targets, -100: none), (n, T) int64."""


@dataclass(frozen=True)
class LoopSettings:
    """How to train. Steps are optimizer steps; every N steps means never where N is 0.

    output: the run's directory. batch_size: rows a process takes at a time; accumulation: how often in a step.
    clip: largest gradient norm, 0 for none. evaluation_rows: rows of the validation source that count.
    keep: checkpoints kept. precision: "bf16", "fp16" or "fp32".
    """

    output: Path
    steps: int
    batch_size: int
    accumulation: int
    schedule: Schedule
    weight_decay: float
    betas: tuple[float, float]
    clip: float
    precision: str
    seed: int
    log_every: int
    evaluate_every: int
    evaluation_rows: int
    save_every: int
    keep: int


class Loop:
    """A run: a model, its batches and settings, made ready on construction.

    identity: what must stay the same when the run is resumed, by name (see Checkpoints).
    validation: rows for evaluation, those of its step 0.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        batches: BatchSource,
        settings: LoopSettings,
        identity: dict[str, Any],
        validation: BatchSource | None = None,
    ) -> None:
        self.accelerator, self.batches, self.validation, self.settings = accelerator, batches, validation, settings
        self.rows = settings.batch_size * settings.accumulation
        if batches.global_batch != self.rows * accelerator.num_processes:
            raise ValueError(
                f"batches: {batches.global_batch} rows a step, but {accelerator.num_processes} processes x "
                f"{settings.accumulation} x {settings.batch_size} take {self.rows * accelerator.num_processes}"
            )
        peak = peak_flops(accelerator.device, settings.precision)
        self.peak_flops = peak and peak * accelerator.num_processes
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.flops_per_token = flops_per_token(model, batches.sequence_length)
        self.metrics = MetricsFile(settings.output / "metrics.jsonl")
        self.checkpoints = Checkpoints(settings.output / "checkpoints", identity, settings.keep)
        self._prepare(model)
        self.checkpoints.attach(accelerator, self.module)
        self.step = 0

    def _prepare(self, model: nn.Module) -> None:
        accelerator, settings = self.accelerator, self.settings
        model = LossModel(model)
        decayed = decayed_names(model)
        # FSDP 1 makes new parameters, so its optimizer comes after it; FSDP 2 wants to see both at once.
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

    def resume(self) -> bool:
        """Go on from the newest checkpoint, if there is one."""
        newest = self.checkpoints.newest()
        if newest is not None:
            self.step = self.checkpoints.load(newest)
        return newest is not None

    def run(self) -> None:
        """Train from the current step to the last, with evaluation, checkpoints and metrics on the way."""
        settings, accelerator = self.settings, self.accelerator
        if accelerator.is_main_process:
            self.metrics.rewind(self.step)
        self.module.train()
        parameters = list(self.module.parameters())
        loss_since, logged = torch.zeros((), device=accelerator.device), self.step
        tokens = self.batches.global_batch * self.batches.sequence_length
        meter = Meter(self.step, settings.steps, tokens, self.flops_per_token, self.peak_flops)
        with progress("training", settings.steps, "steps", initial=self.step) as shown:
            for batch in self._prepared_batches():
                loss, norm = self._train_step(batch, parameters)
                loss_since += loss
                self.step += 1
                fields = {}
                if self._due(settings.log_every) or self.step == 1:
                    record = self._record(meter, loss_since / (self.step - logged), norm)
                    fields, logged = progress_fields(record), self.step
                    loss_since.zero_()
                with meter.pause():
                    if self.validation is not None and self._due(settings.evaluate_every):
                        self._report_evaluation()
                    if self._due(settings.save_every):
                        self.checkpoints.save(self.step)
                shown.advance(1, **fields)

    def _due(self, every: int) -> bool:
        return every > 0 and (self.step % every == 0 or self.step == self.settings.steps)

    def _prepared_batches(self) -> Iterator[dict[str, Tensor]]:
        """This process's rows of every step that is left, made ahead in a thread and on their way to the device."""
        device, start = self.accelerator.device, self.accelerator.process_index * self.rows

        def make() -> Iterator[dict[str, Tensor]]:
            for step in range(self.step, self.settings.steps):
                batch = self.batches.batch(step, start, start + self.rows)
                yield {name: t.pin_memory() for name, t in batch.items()} if device.type == "cuda" else batch

        for batch in prefetched(make(), depth=BATCHES_AHEAD):
            yield {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}

    def _train_step(self, batch: dict[str, Tensor], parameters: list[nn.Parameter]) -> tuple[Tensor, Tensor]:
        """One optimizer step on this process's rows -> this process's share of the loss, and the gradient's norm.

        Nothing here waits for the device.
        """
        settings, accelerator = self.settings, self.accelerator
        seed_step(settings.seed, self.step, accelerator.process_index)
        set_learning_rate(self.optimizer, settings.schedule(self.step))
        targets = accelerator.reduce((batch["labels"] != IGNORED_TARGET).sum(), "sum").clamp(min=1)
        # The gradient is averaged over processes, and over micro-batches by accelerate; this turns means into the sum.
        scale = accelerator.num_processes * settings.accumulation / targets
        loss, norm = torch.zeros((), device=accelerator.device), None
        micro_batches = (batch[name].split(settings.batch_size) for name in ("input_ids", "labels"))
        for ids, labels in zip(*micro_batches, strict=True):
            with accelerator.accumulate(self.module):
                part = self.module(ids, labels)
                accelerator.backward(part * scale)
                loss += part.detach() / targets
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(parameters, settings.clip or math.inf)
                self.optimizer.step()
                self.optimizer.zero_grad()
        return loss, norm

    def _record(self, meter: Meter, loss: Tensor, norm: Tensor) -> dict[str, Any]:
        """Write what the steps since the last record did; the only place that waits for the device."""
        loss = self.accelerator.reduce(loss, "sum").item()
        if not math.isfinite(loss):
            last = self.checkpoints.newest()
            raise LandmarkError(
                f"the loss became {loss} at step {self.step}: try a lower --lr, a longer --warmup or --clip 1. "
                f"The last checkpoint is {last or 'none'}"
            )
        record = {
            "step": self.step,
            "loss": loss,
            "learning_rate": self.settings.schedule(self.step - 1),
            "gradient_norm": float(norm),
            "tokens": self.step * meter.tokens,
            **meter.read(self.step),
            "peak_memory": peak_memory(self.accelerator.device),
        }
        self._write(record)
        return record

    def _write(self, record: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            self.metrics.append(record)
        self.accelerator.log(record, step=record["step"])

    def _report_evaluation(self) -> None:
        loss = self.evaluate()
        perplexity = math.exp(min(loss, 700.0))
        self._write({"step": self.step, "validation_loss": loss, "validation_perplexity": perplexity})
        info(f"step {self.step}: validation loss {loss:.4f}, perplexity {perplexity:.2f}")

    @torch.no_grad()
    def evaluate(self) -> float:
        """The mean loss over the validation rows (at least one micro-batch), whatever the number of processes."""
        accelerator, size = self.accelerator, self.settings.batch_size
        rows = max(self.settings.evaluation_rows, size)
        stride = size * accelerator.num_processes
        sums = torch.zeros(2, device=accelerator.device)
        self.module.eval()
        for begin in range(0, rows, stride):
            start = begin + accelerator.process_index * size
            # The last window moves back to have its full shape; what was counted before has no targets then.
            first = min(start, rows - size)
            batch = self.validation.batch(0, first, first + size)
            batch["labels"][: start - first] = IGNORED_TARGET
            ids, labels = batch["input_ids"].to(accelerator.device), batch["labels"].to(accelerator.device)
            sums += torch.stack([self.module(ids, labels), (labels != IGNORED_TARGET).sum()])
        self.module.train()
        total, count = accelerator.reduce(sums, "sum").tolist()
        return total / max(count, 1.0)

    def write_model(self, save_rest: Callable[[Path], None]) -> None:
        """Write the trained model into the run's directory in the form that `from_pretrained` opens.

        save_rest(directory) adds what belongs beside it (tokenizer, recipe). config.json comes last, so a directory
        that has one is finished.
        """
        output = self.settings.output
        state = self.accelerator.get_state_dict(self.module)
        if self.accelerator.is_main_process:
            model = self.accelerator.unwrap_model(self.module, keep_torch_compile=False).model
            weights = {plain_name(name).removeprefix("model."): tensor for name, tensor in state.items()}
            partial = output / "model.partial"
            try:
                shutil.rmtree(partial, ignore_errors=True)
                with quiet_transformers():
                    model.save_pretrained(partial, state_dict=weights)
                save_rest(partial)
                flush_tree(partial)
                for file in sorted(partial.iterdir(), key=lambda file: file.name == "config.json"):
                    os.replace(file, output / file.name)
                partial.rmdir()
            except (OSError, RuntimeError, SafetensorError) as error:
                raise LandmarkError(f"the model could not be written to {output}: {first_line(error)}") from error
        self.accelerator.wait_for_everyone()
