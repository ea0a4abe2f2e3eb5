"""What the steps of a run take, measured on a few of them: how long they are, and how much memory they need."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from landmark_cli.data.landmarks import insert_landmarks, next_token_targets, text_length
from landmark_cli.training.loop import Loop
from landmark_cli.training.metrics import peak_memory

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


@dataclass(frozen=True)
class Rehearsal:
    """What was measured. seconds: of a step, the mean. steps: how many it is the mean of. memory: bytes of the device
    at most, optimizer and all; on a CPU of the whole process."""

    seconds: float
    steps: int
    memory: int


def rehearse(loop: Loop, *, compiled: bool = False) -> Rehearsal:
    """The steps of a run behind its first one; that one where it is long.

    loop: of few steps, which are taken; nothing is written. compiled: whether the first step waits for a compiler.
    """
    loop.module.train()
    device = loop.accelerator.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    parameters = list(loop.module.parameters())
    began, times = time.perf_counter(), []
    for micro_batches in loop.micro_batches():
        loop.train_step(micro_batches, parameters)
        loop.step += 1
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
        began = time.perf_counter()
        if times[0] > LONG_SECONDS and not compiled:
            break
    measured = times[1:] or times
    return Rehearsal(sum(measured) / len(measured), len(measured), peak_memory(device))
