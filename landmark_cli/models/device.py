"""Which device a model runs on, by the name that a user gives, and getting tensors there."""

from __future__ import annotations

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
