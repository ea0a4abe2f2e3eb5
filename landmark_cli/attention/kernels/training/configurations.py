"""How large the kernels' tiles are and how many warps and pipeline stages run them: measured, derived, or tuned.

A configuration depends on the GPU, the kernel, the bytes of a number, the head dim and the block size, and for Hopper
on whether the input is short; never on the batch or the number of heads. So a new length neither tunes nor compiles.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..common.choices import Choices
from ..common.configuration import Configuration, is_exact, padded
from ..common.fitting import candidates

# Queries up to which an input counts as short: smaller tiles then fill the GPU better.
SHORT = 2048

# The fastest of some ten candidates each on an H100 (triton 3.6), 16-bit numbers, by (kernel, head dim, short), for
# blocks of 33 to 64 tokens. An H200 has the same multiprocessors.
HOPPER = {
    ("forward", 128, True): Configuration(64, 64, 4, 3),
    ("forward", 128, False): Configuration(128, 64, 8, 3),
    ("query_gradient", 128, True): Configuration(64, 64, 4, 2),
    ("query_gradient", 128, False): Configuration(128, 64, 8, 3),
    ("key_gradient", 128, True): Configuration(32, 64, 4, 3),
    ("key_gradient", 128, False): Configuration(32, 64, 4, 3),
    ("forward", 64, True): Configuration(64, 64, 4, 3),
    ("forward", 64, False): Configuration(128, 64, 8, 3, 128),
    ("query_gradient", 64, True): Configuration(64, 64, 4, 3, 168),
    ("query_gradient", 64, False): Configuration(64, 64, 4, 3, 168),
    ("key_gradient", 64, True): Configuration(64, 64, 4, 3),
    ("key_gradient", 64, False): Configuration(64, 64, 4, 3),
}


def choices(kernel: str, q: Tensor, block_size: int) -> Choices:
    """The choices of a kernel ("forward", "query_gradient" or "key_gradient") for inputs like q, kept between calls."""
    dim, block = padded(q.shape[-1]), padded(block_size)
    if not q.is_cuda:
        return Choices([Configuration(min(128, padded(q.shape[2])), block)])
    return _choices(kernel, q.device.index, q.element_size(), is_exact(q.dtype), dim, block, q.shape[2] <= SHORT)


@functools.cache
def _choices(kernel: str, device: int, width: int, exact: bool, dim: int, block: int, short: bool) -> Choices:
    properties = torch.cuda.get_device_properties(device)
    found = list(candidates(kernel, properties.shared_memory_per_block_optin, width, exact, dim, block))
    if properties.major == 9 and width == 2 and block == 64 and (kernel, dim, short) in HOPPER:
        found.insert(0, HOPPER[kernel, dim, short])
    return Choices(found)
