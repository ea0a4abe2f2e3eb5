"""How long a step of a run takes, measured on a few steps with random tokens."""

from __future__ import annotations

import dataclasses
import time

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedConfig

from landmark_cli.data.landmarks import insert_landmarks, next_token_targets, text_length
from landmark_cli.training.distillation import Distillation
from landmark_cli.training.loop import Loop, LoopSettings

# A first step that takes so many seconds is measure enough.
LONG_SECONDS = 30


class RandomBatches:
    """Windows of random text, with landmarks, as a loop takes them.

    config: of a model with landmarks. sequence_length: tokens of a window.
    """

    def __init__(self, config: PreTrainedConfig, sequence_length: int, global_batch: int) -> None:
        self.config, self.sequence_length, self.global_batch = config, sequence_length, global_batch

    def batch(self, step: int, start: int, stop: int) -> dict[str, Tensor]:
        config, length = self.config, self.sequence_length
        text = torch.randint(config.landmark_token_id, (stop - start, text_length(length, config.landmark_freq) + 1))
        stream = insert_landmarks(text, config.landmark_freq, config.landmark_token_id)[:, :length]
        labels = next_token_targets(
            stream, landmark_token_id=config.landmark_token_id, eot_id=None, following=text[:, -1]
        )
        return {"input_ids": stream.contiguous(), "labels": labels}


def seconds_per_step(
    accelerator: Accelerator,
    model: nn.Module,
    config: PreTrainedConfig,
    settings: LoopSettings,
    distillation: Distillation | None,
    steps: int,
) -> tuple[float, int]:
    """The mean time of some steps behind a first one, and how many they were; that of the first one where it is long.

    model: with landmarks, adapters perhaps; it is changed. config: its. settings: of the loop, of which nothing is
    written. steps: how many, behind the first.
    """
    batches = RandomBatches(config, settings.sequence_length, settings.batch_size * settings.accumulation)
    settings = dataclasses.replace(settings, steps=steps + 1)
    loop = Loop(accelerator, model, batches, settings, {}, distillation=distillation)
    loop.module.train()
    parameters = list(loop.module.parameters())
    began, times = time.perf_counter(), []
    for micro_batches in loop.micro_batches():
        loop.train_step(micro_batches, parameters)
        loop.step += 1
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
        began = time.perf_counter()
        # What is compiled takes long once.
        if times[0] > LONG_SECONDS and not settings.compile_layers:
            return times[0], 1
    return sum(times[1:]) / steps, steps
