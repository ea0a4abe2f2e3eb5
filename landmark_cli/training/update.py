"""The update that ends a step: its learning rate, the clipping, and whether it counts."""

from __future__ import annotations

import math

import torch
from accelerate import Accelerator, DistributedType
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from landmark_cli.errors import LandmarkError
from landmark_cli.training.finite import SkippedSteps
from landmark_cli.training.optimizer import AdamW, Rates, Schedule, set_learning_rate


class Update:
    """What happens to the weights once a step's gradients are there.

    A step whose loss or gradient norm is not finite changes nothing: not the weights, not the optimizer's state, and
    not the schedule, whose next rate is that of the number of steps that counted. This is decided and done on the
    device. DeepSpeed, which makes the update itself, waits for the device in every step and decides on the host.

    optimizer: what accelerate made of `adamw`. clip: largest gradient norm, 0 for none.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        adamw: AdamW,
        optimizer: AcceleratedOptimizer,
        schedule: Schedule,
        clip: float,
    ) -> None:
        self.accelerator, self.adamw, self.optimizer, self.clip = accelerator, adamw, optimizer, clip
        self.skipped = SkippedSteps(accelerator.device)
        self.schedule, self.rates = schedule, Rates(schedule, accelerator.device)
        self.deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
        if self.deepspeed:
            if not hasattr(optimizer.optimizer, "overflow"):
                raise LandmarkError(
                    "DeepSpeed looks for gradients that are not finite only where it partitions the optimizer: "
                    "set zero_stage 1, 2 or 3 for accelerate"
                )
            # Stages 1 and 2 look for gradients that are not finite in fp16 only, unless they are told to look always.
            optimizer.optimizer.check_grad_overflow = True

    def begin(self, step: int) -> None:
        """Before the gradients of the step after `step` are computed."""
        if self.deepspeed:
            set_learning_rate(self.optimizer, self.schedule(step - self.skipped.read()["total"]))
        else:
            self._rate = self.rates.at(step, self.skipped.total)

    def judge(self, parameters: list[nn.Parameter]) -> tuple[Tensor, Tensor]:
        """Clip the gradients and decide whether the step counts, for the optimizer's step that follows.

        Returns two scalars on the device: the gradient's norm before it was clipped, and 1 for a step that is skipped,
        else 0.
        """
        norm = self.accelerator.clip_grad_norm_(parameters, self.clip or math.inf)
        if self.deepspeed:
            # DeepSpeed has made the update by now, or skipped it.
            norm = math.inf if self.optimizer.step_was_skipped else norm
            norm = torch.tensor(norm or 0.0, device=self.accelerator.device)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        skip = self.skipped.judge(norm)
        if not self.deepspeed:
            self.adamw.prepare_step(self._rate, skip)
        return norm, skip
