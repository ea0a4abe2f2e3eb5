"""Which device a model runs on, by the name that a user gives, in which dtype, and getting tensors there."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from landmark_cli.errors import UsageError


def find_device(name: str | torch.device | None = None) -> torch.device:
    """The device of a name such as "cpu", "cuda" or "cuda:1"; for None and "auto" a GPU where there is one.

    Raises UsageError for a device that this machine has not, what does not compute (meta), and what is no device at
    all.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name is None or name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    here = {"cpu": 1} if accelerator is None else {"cpu": 1, accelerator.type: torch.accelerator.device_count()}
    if device is None or (device.index or 0) >= here.get(device.type, 0):
        raise UsageError(f"--device {name}: there is no such device here; there is {_listed(here)}{_why_not(device)}")
    return device


def fast_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which a device computes fast with weights that are stored in another: float32 for 16 bits on a CPU
    without products of them, which takes several times as long over these; else the stored one."""
    native = NATIVE_PRODUCTS.get(stored)
    if device.type != "cpu" or native is None or any(map(_capabilities().get, native)):
        return stored
    return torch.float32


# What makes a CPU fast with numbers of 16 bits, as torch.cpu.get_capabilities calls it. AVX-512 has products of float16
# too (avx512_fp16), which are no faster than those of float32.
NATIVE_PRODUCTS = {torch.bfloat16: ("avx512_bf16", "amx_bf16"), torch.float16: ("amx_fp16",)}


@functools.cache
def _capabilities() -> Mapping[str, bool]:
    if hasattr(torch.cpu, "get_capabilities"):
        return torch.cpu.get_capabilities()
    return {"avx512_bf16": torch.cpu._is_avx512_bf16_supported(), "amx_fp16": torch.cpu._is_amx_fp16_supported()}


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; if it comes from the host, without making the host wait for it."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" and not x.is_cuda else x.to(device)


def _listed(here: dict[str, int]) -> str:
    names = [f"{kind}:{index}" if count > 1 else kind for kind, count in here.items() for index in range(count)]
    return " or ".join(names)


def _why_not(device: torch.device | None) -> str:
    """The reason that CUDA gives where it cannot be used, in brackets."""
    if device is None or device.type != "cuda" or torch.cuda.is_available():
        return ""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return f" ({next(iter(str(error).splitlines()), '')})"
    return ""
