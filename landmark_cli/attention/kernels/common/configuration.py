"""How large a kernel's tiles are and how it runs, and how exact its products have to be."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton

# Whether Triton interprets kernels on the CPU: TRITON_INTERPRET=1 when triton was imported.
INTERPRETED = bool(triton.knobs.runtime.interpret)


@dataclass(frozen=True)
class Configuration:
    """rows: queries a tile; cols: keys a tile (a wider block is split); registers: at most so many a thread, if set."""

    rows: int
    cols: int
    warps: int = 4
    stages: int = 2
    registers: int | None = None

    def launch_options(self) -> dict[str, int]:
        options = {"num_warps": self.warps, "num_stages": self.stages}
        return options if self.registers is None else options | {"maxnreg": self.registers}


def is_exact(dtype: torch.dtype) -> bool:
    """Whether products of this dtype are to be exact to float32, made of three of tf32, or of one product."""
    return dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32"


def product_precision(dtype: torch.dtype) -> str:
    """What Triton is to make products of this dtype of; of 16-bit numbers it makes them exactly, whatever is said."""
    return "tf32x3" if is_exact(dtype) else "tf32"


def padded(size: int) -> int:
    """The rows or columns of a tile that holds `size`: a power of two, and at least what a matrix unit works on."""
    return max(16, triton.next_power_of_2(size))


@functools.cache
def has_warp_groups(device: torch.device) -> bool:
    """Whether a GPU multiplies by groups of warps, whose factors stay in shared memory, of which such GPUs have 227
    KiB: its registers are for sums."""
    return device.type == "cuda" and _shared_memory(device) >= 227 << 10


def _shared_memory(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin
