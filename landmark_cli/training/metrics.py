"""What a run measures: throughput, model FLOPs utilisation, memory, time left."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from landmark_cli.attention.window import WindowSettings
from landmark_cli.console import quantity
from landmark_cli.models.layers import key_heads, landmark_layers

# Dense bf16 and fp16 tensor-core peaks from the vendors' data sheets, FLOP/s, by a part of the device's name.
# The first name that fits counts, so a chip's slower variants stand before its plain name.
PEAK_FLOPS = (
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H200", 989e12),
    ("GH200", 989e12),
    ("B200", 2250e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("A10G", 70e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
    ("RTX 4090", 165e12),
    ("RTX 3090", 71e12),
    ("V100", 125e12),
    ("T4", 65e12),
)


def peak_flops(device: torch.device, precision: str) -> float | None:
    """The chip's peak in FLOP/s at 16-bit precision ("bf16" or "fp16"), or None where it is not known."""
    if device.type != "cuda" or precision not in ("bf16", "fp16"):
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS if part in name), None)


def flops_per_token(model: nn.Module, sequence_length: int, read: WindowSettings | None = None) -> float:
    """Floating-point operations that training spends on one token of the stream, counted on the model's own work.

    6 for each weight of a linear layer, the head included (2 forward, 4 backward; 4 in all where the weight is frozen),
    and for attention 6 x heads x head_dim x sequence_length in each layer, which is half of the full square because
    queries see earlier keys only. Landmark attention and ordinary attention are counted alike. Where windows are read
    chunk by chunk (`read`), a query sees half a chunk and the blocks that it retrieves. A layer that keeps a sliding
    window sees that. Work done twice (gradient checkpointing) is not counted, nor is choosing blocks.
    """
    weights = {id(m.weight): m.weight for m in model.modules() if isinstance(m, nn.Linear)}
    head = model.get_output_embeddings()
    if head is not None:
        weights[id(head.weight)] = head.weight
    matrices = sum((6 if weight.requires_grad else 4) * weight.numel() for weight in weights.values())
    config = model.config
    with_landmarks = landmark_layers(config)
    local = min(sequence_length, 2 * (getattr(config, "sliding_window", None) or 0))
    if read is not None:
        sequence_length = min(sequence_length, read.chunk + 2 * read.top_k * read.block_size)
    seen = sum(
        key_heads(config, layer)[1] * (sequence_length if layer in with_landmarks else local)
        for layer in range(config.num_hidden_layers)
    )
    return matrices + 6 * config.num_attention_heads * seen


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors took on a GPU so far, or that this process took of a CPU machine's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Meter:
    """Throughput between two readings, without the pauses for evaluation and checkpoints.

    tokens: stream tokens (landmarks included) of one step over all processes. flops: FLOPs of one token. peak: FLOP/s
    of all chips together, or None.
    """

    def __init__(self, step: int, steps: int, tokens: int, flops: float, peak: float | None) -> None:
        self.steps, self.tokens, self.flops, self.peak = steps, tokens, flops, peak
        self.since, self.started, self.paused = step, time.perf_counter(), 0.0

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time spent inside does not count."""
        start = time.perf_counter()
        yield
        self.paused += time.perf_counter() - start

    def read(self, step: int) -> dict[str, float]:
        """Throughput since the last reading; starts the next interval. step: steps of the run that are done by now."""
        now = time.perf_counter()
        seconds = max(now - self.started - self.paused, 1e-9) / (step - self.since)
        speed = self.tokens / seconds
        self.since, self.started, self.paused = step, now, 0.0
        reading = {
            "seconds_per_step": seconds,
            "tokens_per_second": speed,
            "seconds_left": seconds * (self.steps - step),
        }
        if self.peak is not None:
            reading["mfu"] = speed * self.flops / self.peak
        return reading


def progress_fields(record: dict[str, Any]) -> dict[str, str]:
    """What the progress line shows of a record besides the step, the share done and the time left."""
    fields = {
        "loss": f"{record['loss']:.4f}",
        "lr": f"{record['learning_rate']:.2e}",
        "grad": f"{record['gradient_norm']:.2f}",
        "tok/s": quantity(record["tokens_per_second"]),
    }
    if "mfu" in record:
        fields["MFU"] = f"{record['mfu']:.1%}"
    return fields | {"peak": quantity(record["peak_memory"], "B")}
