"""Calls that differ from an earlier one only in addresses repeat its launches.

At the paper's size the GPU is done before the host has worked out a call's grids, workspace and arguments and Triton
has looked at each of them. All this depends on shapes and strides alone and is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from .configuration import Configuration

# So many kinds of calls are kept; then all are forgotten.
KEPT = 1024

# Triton compiles a kernel anew for an address that is no multiple of this.
ALIGNMENT = 16


@dataclass(frozen=True)
class Launch:
    """A launch that was made, of a kernel on the tensors at the places `which` of those of the call."""

    run: Callable
    which: Sequence[int]
    arguments: tuple

    def again(self, at: tuple[int | None, ...]) -> None:
        """Launch it on the tensors of another call, given by their addresses."""
        self.run(*[at[i] for i in self.which], *self.arguments)


def launch(
    kernel, programs: int, tensors: Sequence[Tensor | None], which: Sequence[int], arguments: tuple, constants: dict,
    choice: Configuration,
) -> Launch | None:  # fmt: skip
    """Launch a kernel, whose parameters are tensors, arguments and, in any order, constants.

    None in Triton's interpreter, where there is nothing compiled to launch again.
    """
    grid = programs, 1, 1
    compiled = kernel[grid](*[tensors[i] for i in which], *arguments, **constants, **choice.launch_options())
    if compiled is None:
        return None
    rest = [constants[name] for name in kernel.arg_names if name in constants]
    return Launch(compiled[grid], which, (*arguments, *rest))


def addresses(*tensors: Tensor | None) -> tuple[int | None, ...] | None:
    """Where the tensors begin; None if one of them begins at an uncommon place."""
    found = tuple([None if x is None else x.data_ptr() for x in tensors])
    return None if any(at is not None and at % ALIGNMENT for at in found) else found


class Kept(dict):
    """What is kept, by kind of call."""

    def keep(self, key: tuple, value):
        if len(self) >= KEPT:
            self.clear()
        self[key] = value
        return value


def on_device(x: Tensor) -> AbstractContextManager:
    """Kernels are launched on the current device: x's, inside."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)
