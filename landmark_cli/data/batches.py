"""Token files -> batches with landmarks. The batch of a step is a pure function of the seed and the step.

Every epoch of a file cuts it into windows that do not overlap, at a shift drawn for that epoch, and takes them in a
shuffled order. Nothing is stored but the numbers of tokens: the order is a permutation that is computed where it is
needed, so billions of tokens cost no memory and any step can be asked for at once. Windows may cross documents. Windows
of whole documents are found once, and taken in such an order too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import closing

import torch
from torch import Tensor

from landmark_cli.console import counted
from landmark_cli.data.packing import Place, whole_documents
from landmark_cli.data.prefetch import prefetched
from landmark_cli.data.token_file import TokenFile
from landmark_cli.data.windows import AnswerWeights, Pack, Windows
from landmark_cli.errors import LandmarkError

WEIGHT_UNITS = 1 << 32


class Batches:
    """The training batches of one or several token files.

    Row r of step s is row `s * global_batch + r` of an endless sequence that depends on the files, the lengths and the
    seed alone. However a step's rows are split over processes and accumulation, the global batch is the same.

    Args:
        token_files: opened token files.
        weights: how often each file is drawn from, relative to the others; None takes them by their size.
        windows: what cuts windows out of them.
        global_batch: windows in a step, over all processes and accumulation.
        seed: of the order of the windows.
        answer_weights: what targets weigh; None where all weigh alike, and batches say nothing of it.
        mark_answers: have batches say which targets are of answers (see `Windows.answers`).
        packs: what windows of each file hold (see `Windows`); by default what `windows` says, for all.

    Raises:
        LandmarkError: a file holds less than one window, or the weights do not fit the files.
    """

    def __init__(
        self,
        token_files: Sequence[TokenFile],
        weights: Sequence[float] | None,
        windows: Windows,
        global_batch: int,
        seed: int,
        answer_weights: AnswerWeights | None = None,
        mark_answers: bool = False,
        packs: Sequence[Pack] | None = None,
    ) -> None:
        self.windows, self.global_batch, self.answer_weights = windows, global_batch, answer_weights
        self.mark_answers = mark_answers
        packs = packs or [windows.pack] * len(token_files)
        files = enumerate(zip(token_files, packs, strict=True))
        self._orders = [_Order(file, windows, seed, i, pack) for i, (file, pack) in files]
        self._shares = _conditional_shares(weights, [order.windows for order in self._orders])

    @property
    def filled(self) -> float:
        """How much of all windows is text, as a share; 1 but for windows of whole documents."""
        tokens = sum(len(order.token_file.tokens) for order in self._orders)
        room = sum(order.windows for order in self._orders) * self.windows.text_length
        return tokens / room if self.windows.pack == "whole" else 1.0

    def batch(self, step: int, start: int, stop: int) -> dict[str, Tensor]:
        """Rows `start` to `stop` of a step's global batch: see `Windows.cut`; with weights where targets do not all
        weigh alike: see `Windows.weights`; with answers where they are to be marked: see `Windows.answers`.

        Raises:
            ValueError: the rows are not in the global batch, or the step is negative.
        """
        if not 0 <= start <= stop <= self.global_batch or step < 0:
            raise ValueError(f"step {step} has rows 0 to {self.global_batch}, not {start} to {stop}")
        first = step * self.global_batch
        places = [self._place(first + row) for row in range(start, stop)]
        batch = self.windows.cut(places)
        if self.answer_weights is not None:
            batch["weights"] = self.windows.weights(places, batch["labels"], self.answer_weights)
        if self.mark_answers:
            batch["answers"] = self.windows.answers(places)
        return batch

    def _place(self, row: int) -> Place:
        """Where the text of a row of the endless sequence stands."""
        for order, share in zip(self._orders, self._shares, strict=True):
            # The first `row` rows held `drawn` windows of this file; the other rows belong to the files after it.
            drawn = row * share // WEIGHT_UNITS
            if (row + 1) * share // WEIGHT_UNITS > drawn:
                return order.place(drawn)
            row -= drawn
        raise AssertionError("the last file takes every row that is left")


# Of text that a run prepares itself little is held out.
MORE_HELD_OUT = ", or hold more of it out (--validation-share)"


class SequentialWindows:
    """A token file read front to back in windows that do not overlap: what evaluation during training runs over.

    Args:
        token_file: an opened token file.
        windows: what cuts windows out of the file.
        limit: the most windows to take, spread evenly over the file; None takes all.
        pack: what windows hold (see `Windows`); by default what `windows` says.

    Raises:
        LandmarkError: the file holds less than one window.
    """

    def __init__(
        self, token_file: TokenFile, windows: Windows, limit: int | None = None, pack: Pack | None = None
    ) -> None:
        self.token_file, self.windows, self._whole = token_file, windows, None
        if (pack or windows.pack) == "whole":
            self._whole = whole_documents(token_file, windows.text_length)
            self._available = len(self._whole)
        else:
            self._available = _window_count(token_file, windows.text_length, MORE_HELD_OUT)
        self._count = self._available if limit is None else min(limit, self._available)

    def __len__(self) -> int:
        return self._count

    def batch(self, start: int, stop: int) -> dict[str, Tensor]:
        """Windows `start` to `stop` (at most as many as there are): see `Windows.cut`; with answers where the file
        marks some: see `Windows.answers`."""
        chosen = [i * self._available // self._count for i in range(start, min(stop, self._count))]
        length = self.windows.text_length
        if self._whole is None:
            places = [Place(self.token_file, i * length, length) for i in chosen]
        else:
            places = [Place(self.token_file, *map(int, self._whole[i])) for i in chosen]
        batch = self.windows.cut(places)
        if self.token_file.answers is not None:
            batch["answers"] = self.windows.answers(places)
        return batch


def iterate(
    batches: Batches,
    first_step: int,
    last_step: int | None = None,
    *,
    rank: int = 0,
    world_size: int = 1,
    accumulation: int = 1,
    device: torch.device | str = "cpu",
    prefetch: int = 4,
) -> Iterator[list[dict[str, Tensor]]]:
    """One process's share of every step from `first_step` on (to before `last_step`), made ahead in the background.

    Each step gives `accumulation` micro-batches of equal size, together the rows `rank * n` to `(rank + 1) * n` of the
    global batch, n = global_batch / world_size. For a GPU they are copied from pinned memory without waiting.

    Raises:
        LandmarkError: the global batch cannot be split into such micro-batches.
    """
    rows, rest = divmod(batches.global_batch, world_size * accumulation)
    if rest:
        raise LandmarkError(
            f"a global batch of {batches.global_batch} cannot be split evenly over {counted(world_size, 'process')} "
            f"and {counted(accumulation, 'accumulation step')}"
        )
    device = torch.device(device)
    pinned = device.type == "cuda"

    def make() -> Iterator[list[dict[str, Tensor]]]:
        work_alone()
        step = first_step
        while last_step is None or step < last_step:
            first = rank * accumulation
            micro = [batches.batch(step, i * rows, (i + 1) * rows) for i in range(first, first + accumulation)]
            yield [{name: t.pin_memory() if pinned else t for name, t in batch.items()} for batch in micro]
            step += 1

    with closing(prefetched(make(), prefetch)) as steps:
        for micro in steps:
            yield [{name: t.to(device, non_blocking=True) for name, t in batch.items()} for batch in micro]


def work_alone() -> None:
    """Have torch use no team of threads in this thread: a team takes longer for a few thousand numbers, and
    holds every processor. Other threads keep theirs, those that are started later too, which torch.set_num_threads
    would reach.
    """
    from threadpoolctl import ThreadpoolController

    # Torch sets the number of a thread when the thread first asks for it: after that it stays as it is set here.
    torch.get_num_threads()
    ThreadpoolController().select(user_api="openmp").limit(limits=1)


class _Order:
    """The order in which one file's windows are drawn: window number n of the endless sequence -> where its text is.

    Windows that hold whole documents are the same in every epoch; others are cut at another shift each time.
    """

    def __init__(self, token_file: TokenFile, windows: Windows, seed: int, index: int, pack: Pack) -> None:
        self.token_file, self.length = token_file, windows.text_length
        self._key = _mix(_mix(seed) ^ index)
        self._whole = whole_documents(token_file, self.length) if pack == "whole" else None
        if self._whole is not None:
            self.windows = len(self._whole)
            return
        # One window less than fits, so that every epoch has the same number of windows and a shift that reaches both
        # ends.
        self.windows = max(1, _window_count(token_file, self.length) - 1)
        self._shifts = len(token_file.tokens) - self.windows * self.length

    def place(self, number: int) -> Place:
        epoch, position = divmod(number, self.windows)
        key = _mix(self._key ^ _mix(epoch))
        chosen = permuted(position, self.windows, key)
        if self._whole is not None:
            return Place(self.token_file, *map(int, self._whole[chosen]))
        return Place(self.token_file, key % self._shifts + chosen * self.length, self.length)


def permuted(position: int, size: int, key: int) -> int:
    """Where `position` goes in the permutation of 0..size-1 that belongs to `key`, computed without storing it.

    A Feistel network permutes the numbers of the next even number of bits; those outside the range are sent through
    again until they fall inside.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = position >> half, position & mask
        for turn in range(4):
            left, right = right, left ^ (_mix(key ^ (turn << 60) ^ right) & mask)
        position = left << half | right
        if position < size:
            return position


def _mix(value: int) -> int:
    """A 64-bit hash of an integer (the finalizer of splitmix64)."""
    value = (value + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    value = (value ^ value >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return value ^ value >> 31


def _window_count(token_file: TokenFile, length: int, or_else: str = "") -> int:
    """Windows of `length` tokens in a file, each window with a token after it. or_else: what helps where there are
    none, beside shorter windows and more text."""
    tokens = len(token_file.tokens)
    if tokens < length + 1:
        raise LandmarkError(
            f"{token_file.path} holds {counted(tokens, 'token')}, less than one window of {length} and the token after "
            f"it: take a shorter sequence length or more text{or_else}"
        )
    return (tokens - 1) // length


def _conditional_shares(weights: Sequence[float] | None, sizes: Sequence[int]) -> list[int]:
    """For each file, the share it takes of what the files before it leave, in `WEIGHT_UNITS`; the last takes all."""
    if not sizes:
        raise LandmarkError("no token file to draw batches from")
    weights = list(sizes if weights is None else weights)
    if len(weights) != len(sizes):
        raise LandmarkError(
            f"{counted(len(weights), 'mixing weight')} for {counted(len(sizes), 'token file')}: give each file one"
        )
    if not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise LandmarkError(f"mixing weights must be above 0, not {', '.join(map(str, weights))}")
    left = [sum(weights[i:]) for i in range(len(weights))]
    return [round(weight / rest * WEIGHT_UNITS) for weight, rest in zip(weights, left, strict=True)]
