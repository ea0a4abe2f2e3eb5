"""How long a step of a run takes, measured on a few steps."""

from __future__ import annotations

import time

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from landmark_cli.data.landmarks import insert_landmarks, next_token_targets, text_length
from landmark_cli.training.loop import Loop

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


def seconds_per_step(loop: Loop, *, compiled: bool = False) -> tuple[float, int]:
    """The mean time of the steps of a run behind its first one, and how many they were; that of the first one where it
    is long.

    loop: of few steps, which are taken; nothing is written. compiled: whether the first step waits for a compiler.
    """
    loop.module.train()
    parameters = list(loop.module.parameters())
    began, times = time.perf_counter(), []
    for micro_batches in loop.micro_batches():
        loop.train_step(micro_batches, parameters)
        loop.step += 1
        if loop.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
        began = time.perf_counter()
        if times[0] > LONG_SECONDS and not compiled:
            return times[0], 1
    return sum(times[1:]) / len(times[1:]), len(times[1:])
