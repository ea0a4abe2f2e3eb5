"""Launches that are made once and repeated: calls that differ from an earlier one only in addresses launch what it did.

At the paper's size the GPU is done before the host has worked out a call's grids, workspace and arguments and Triton
has looked at each of them. All this depends on shapes and strides alone and is kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Query heads to work on at a time, so that their keys and values stay in the L2 cache.
HEADS_IN_FLIGHT = 8

# So many kinds of calls are kept, and so many sets of addresses of each; then all are forgotten.
KEPT = 1024

# Triton compiles a kernel anew for an address that is no multiple of this, a power of two.
ALIGNMENT = 16


class Address(NamedTuple):
    """The beginning of a tensor, for who asks a tensor for no more than that."""

    address: int

    def data_ptr(self) -> int:
        return self.address


class Operand(NamedTuple):
    """What a kernel works on: a tensor of a call, by its place among the call's tensors, or a piece of one.

    piece: None where the call has no such tensor. describe: makes what the kernel takes of what begins there, a tensor
    or an Address, if it takes no pointer.
    """

    place: int
    piece: Tensor | None
    describe: Callable[[Tensor | Address], Any] | None = None


class Kept(dict):
    """A dictionary that forgets all where it would grow too large."""

    def keep(self, key: tuple, value):
        if len(self) >= KEPT:
            self.clear()
        self[key] = value
        return value


@dataclass(frozen=True)
class Launch:
    """A launch that was made, of a kernel on a call's tensors.

    operands: (place, bytes behind that tensor's beginning, describe) of each of its first arguments; arguments: the
    others, and what of memory these need. given: all of them, by the addresses of a call's tensors, where operands take
    work to put together; training comes back to the same ones.
    """

    run: Callable
    operands: list[tuple[int, int, Callable | None]]
    arguments: tuple
    memory: tuple[Tensor, ...] = ()
    given: Kept = field(default_factory=Kept)

    def again(self, at: tuple[int | None, ...]) -> None:
        """Launch it on the tensors of another call, given by their addresses."""
        if self.on_whole_tensors:
            self.run(*[at[place] for place, _, _ in self.operands], *self.arguments)
        else:
            self.run(*(self.given.get(at) or self.given.keep(at, self._arguments_at(at))))

    @functools.cached_property
    def on_whole_tensors(self) -> bool:
        """Whether all operands are addresses of tensors as they are."""
        return all(start == 0 and describe is None for _, start, describe in self.operands)

    def _arguments_at(self, at: tuple[int | None, ...]) -> tuple:
        operands = []
        for place, start, describe in self.operands:
            address = None if at[place] is None else at[place] + start
            operands.append(address if describe is None else describe(Address(address)))
        return *operands, *self.arguments


def launch(
    kernel,
    programs: int | tuple[int, ...],
    tensors: Sequence[Tensor | None],
    operands: Iterable[Operand | int],
    arguments: tuple,
    constants: dict[str, Any],
    options: dict[str, int],
) -> Launch | None:
    """Launch a kernel, whose parameters are operands, arguments and, in any order, constants.

    programs: how many, along the grid's first axis or its first ones. tensors: the call's. operands: of these; a number
    stands for the whole tensor at that place. arguments: numbers, tuples of them, and tensors that every call of this
    kind shares. options: how Triton is to run it (num_warps, ...).

    None in Triton's interpreter, where there is nothing compiled to launch again.
    """
    operands = [Operand(x, tensors[x]) if isinstance(x, int) else x for x in operands]
    given = [piece if describe is None else describe(piece) for _, piece, describe in operands]
    grid = (programs, 1, 1) if isinstance(programs, int) else (*programs, 1, 1)[:3]
    compiled = kernel[grid](*given, *arguments, **constants, **options)
    if compiled is None:
        return None
    places = [
        (place, 0 if piece is None else piece.data_ptr() - tensors[place].data_ptr(), describe)
        for place, piece, describe in operands
    ]
    memory = tuple(x for x in arguments if isinstance(x, Tensor))
    arguments = [x.data_ptr() if isinstance(x, Tensor) else x for x in arguments]
    rest = [constants[name] for name in kernel.arg_names if name in constants]
    return Launch(compiled[grid], places, (*arguments, *rest), memory)


class LaunchCache:
    """The launches of calls, by kind of call: all that launches depend on beside addresses."""

    def __init__(self) -> None:
        self.launches: Kept = Kept()

    def repeat(self, kind: tuple, tensors: Sequence[Tensor | None]) -> bool:
        """Repeat the launches of an earlier call of this kind on these tensors. False, and nothing is done, where none
        was kept or where one of the tensors begins where tensors rarely do."""
        launches = self.launches.get(kind)
        at = None if launches is None else addresses(tensors)
        if at is None:
            return False
        with on_device(tensors[0]):
            for launched in launches:
                launched.again(at)
        return True

    def make(
        self, kind: tuple, tensors: Sequence[Tensor | None], launches: Callable[[], Iterable[Launch | None]]
    ) -> None:
        """Make the launches of a call that `repeat` could not repeat, and keep them for the next calls of its kind if
        they can be launched again and every tensor begins where tensors commonly do."""
        with on_device(tensors[0]):
            made = list(launches())
        if None not in made and addresses(tensors) is not None:
            self.launches.keep(kind, made)

    def clear(self) -> None:
        """After a change of configurations."""
        self.launches.clear()


def addresses(tensors: Iterable[Tensor | None]) -> tuple[int | None, ...] | None:
    """Where the tensors begin; None if one of them begins at an uncommon place."""
    found, bits = [], 0
    for x in tensors:
        at = None if x is None else x.data_ptr()
        bits |= at or 0
        found.append(at)
    return None if bits % ALIGNMENT else tuple(found)


def on_device(x: Tensor) -> AbstractContextManager:
    """Kernels are launched on the current device: x's, inside."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(x.device)


_HERE = nullcontext()
