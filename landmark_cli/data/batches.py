"""Token files -> batches with landmarks. The batch of a step is a pure function of the seed and the step.

Every epoch of a file cuts it into windows that do not overlap, at a shift drawn for that epoch, and takes them in a
shuffled order. Nothing is stored but the numbers of tokens: the order is a permutation that is computed where it is
needed, so billions of tokens cost no memory and any step can be asked for at once. Windows may cross documents.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from landmark_cli.data.landmarks import IGNORED_TARGET, insert_landmarks, next_token_targets, text_length
from landmark_cli.data.packing import Place, Streams, bounds_of, lay_out, whole_documents
from landmark_cli.data.prefetch import prefetched
from landmark_cli.data.token_file import TokenFile
from landmark_cli.errors import LandmarkError

WEIGHT_UNITS = 1 << 32

Pack = Literal["cut", "whole"]


@dataclass(frozen=True)
class AnswerWeights:
    """What the targets of token files that mark answers weigh in the loss: those of answers `answer`, the others 0
    where only answers count, else 1. Targets of token files without marks weigh 1."""

    answer: float = 1.0
    answers_only: bool = False


class Windows:
    """Cuts windows out of token files and puts landmarks in: what training batches and evaluation share.

    Args:
        sequence_length: positions of a window's stream, landmarks included.
        landmark_freq: text tokens between landmarks; None for plain text. Every window starts a block.
        landmark_token_id: required with `landmark_freq`.
        eot_id: positions that hold it predict nothing; None if there is no such token.
        include_landmarks: count landmarks as targets (see `landmarks.next_token_targets`).
        mask_documents: the documents of a window are not to see each other: landmarks count from the beginning of each,
            and batches say where they begin. What landmarks then leave over of a window is filled up at its end.
        pack: "cut" cuts text at the window's length, wherever that is; "whole" cuts no document that a window can hold
            (see `packing.whole_documents`).
    """

    def __init__(
        self,
        sequence_length: int,
        landmark_freq: int | None,
        landmark_token_id: int | None,
        eot_id: int | None,
        include_landmarks: bool = False,
        mask_documents: bool = False,
        pack: Pack = "cut",
    ) -> None:
        if landmark_freq is not None and sequence_length < landmark_freq + 1:
            raise LandmarkError(
                f"the sequence length {sequence_length} is shorter than one block of {landmark_freq} text tokens and "
                f"their landmark: make it at least {landmark_freq + 1}, or landmark_freq smaller"
            )
        if sequence_length < 1:
            raise LandmarkError(f"the sequence length must be at least 1, not {sequence_length}")
        if landmark_freq is not None and landmark_token_id is None:
            raise ValueError("landmark_token_id is needed where landmark_freq is given")
        if mask_documents and eot_id is None:
            raise ValueError("mask_documents needs eot_id, which says where documents end")
        self.sequence_length = sequence_length
        self.landmark_freq = landmark_freq
        self.landmark_token_id = None if landmark_freq is None else landmark_token_id
        self.eot_id = eot_id
        self.include_landmarks = include_landmarks
        self.mask_documents, self.pack = mask_documents, pack
        self.text_length = sequence_length if landmark_freq is None else text_length(sequence_length, landmark_freq)

    def cut(self, places: Sequence[Place]) -> dict[str, Tensor]:
        """The windows that hold these texts.

        Returns:
            input_ids and labels, both (n, sequence_length) int64; labels are the targets of their own position (already
            shifted), -100 where there is none. With mask_documents also cu_seqlens (see `packing.bounds_of`).
        """
        if self.mask_documents or self.pack == "whole":
            return self._cut_documents(places)
        text = torch.from_numpy(self._text(places, "tokens"))
        stream = following = text
        if self.landmark_freq is not None:
            stream = insert_landmarks(stream, self.landmark_freq, self.landmark_token_id)
            following = stream if self.include_landmarks else following
        # What comes after the window: the next position of the stream, or of the text where landmarks are no targets.
        following = following[:, self.sequence_length if following is stream else -1]
        input_ids = stream[:, : self.sequence_length].contiguous()
        return {"input_ids": input_ids, "labels": self._targets(input_ids, following)}

    def _cut_documents(self, places: Sequence[Place]) -> dict[str, Tensor]:
        """As `cut`, of texts of any length and landmarks that count from documents."""
        text, lengths = self._text(places, "tokens"), np.array([place.length for place in places])
        streams = self._streams(text)
        rows, last = np.arange(len(places)), lengths - 1
        ends = np.minimum(streams.column[rows, last] + 1 + streams.closes[rows, last], self.sequence_length)
        # One token after the text, which its last position predicts; it may stand behind a landmark that is cut off.
        width = self.sequence_length + 2
        stream = np.full((len(places), width), self.eot_id or 0)
        given = np.arange(text.shape[1]) <= lengths[:, None]
        row, token = np.nonzero(given)
        stream[row, streams.column[row, token]] = text[row, token]
        if self.landmark_freq is not None:
            row, token = np.nonzero(given & streams.closes)
            landmark = streams.column[row, token] + 1
            stream[row[landmark < width], landmark[landmark < width]] = self.landmark_token_id
        filled = torch.from_numpy(np.arange(self.sequence_length) < ends[:, None])
        stream = torch.from_numpy(stream)
        labels = self._targets(stream)[:, : self.sequence_length].masked_fill(~filled, IGNORED_TARGET)
        filling = self.eot_id or 0
        batch = {"input_ids": stream[:, : self.sequence_length].masked_fill(~filled, filling), "labels": labels}
        if self.mask_documents:
            batch["cu_seqlens"] = torch.from_numpy(bounds_of(streams, lengths, ends, self.sequence_length))
        return batch

    def _targets(self, stream: Tensor, following: Tensor | None = None) -> Tensor:
        return next_token_targets(
            stream,
            landmark_token_id=self.landmark_token_id,
            eot_id=self.eot_id,
            include_landmarks=self.include_landmarks,
            following=following,
        )

    def _text(self, places: Sequence[Place], name: str) -> np.ndarray:
        """What an array of each file, `tokens` or `answers`, has of the texts and of the token after them: (n, text
        length + 1) int64, filled up with ends of text, or with 0 where there is no such array."""
        found = np.full((len(places), self.text_length + 1), self.eot_id or 0 if name == "tokens" else 0)
        for row, place in zip(found, places, strict=True):
            values = getattr(place.file, name)
            if values is not None:
                values = values[place.start : place.start + place.length + 1]
                row[: len(values)] = values
        return found

    def _streams(self, text: np.ndarray) -> Streams:
        return lay_out(text, self.landmark_freq, self.eot_id if self.mask_documents else None)

    def answers(self, places: Sequence[Place]) -> Tensor:
        """Which positions of these windows have a token of an answer as their target: bool, of the shape of `cut`'s
        labels. Positions without a target may be marked too; of files without marks none is."""
        marks = self._text(places, "answers") > 0
        text = self._text(places, "tokens") if self.mask_documents else marks
        streams = self._streams(text)
        # The token before an answer's has it as its target, and so has a landmark between the two; where landmarks are
        # targets, that of the token is the landmark, which is of no answer.
        of_answer, closes = marks[:, 1:], streams.closes[:, :-1]
        target = np.zeros((len(places), self.sequence_length + 1), dtype=bool)
        rows = np.arange(len(places))[:, None]
        column = streams.column[:, :-1]
        target[rows, column] = of_answer & ~closes if self.include_landmarks else of_answer
        row, token = np.nonzero(of_answer & closes)
        target[row, column[row, token] + 1] = True
        return torch.from_numpy(target[:, : self.sequence_length])

    def weights(self, places: Sequence[Place], labels: Tensor, answer_weights: AnswerWeights) -> Tensor:
        """What each target of these windows weighs: float32, of the shape of `labels`, which `cut` gave; 0 where there
        is no target."""
        others = [0.0 if answer_weights.answers_only and place.file.answers is not None else 1.0 for place in places]
        weights = torch.where(self.answers(places), answer_weights.answer, torch.tensor(others)[:, None])
        return weights.masked_fill(labels == IGNORED_TARGET, 0.0)


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
    ) -> None:
        self.windows, self.global_batch, self.answer_weights = windows, global_batch, answer_weights
        self._orders = [_Order(file, windows, seed, i) for i, file in enumerate(token_files)]
        self._shares = _conditional_shares(weights, [order.windows for order in self._orders])

    def batch(self, step: int, start: int, stop: int) -> dict[str, Tensor]:
        """Rows `start` to `stop` of a step's global batch: see `Windows.cut`; with weights where targets do not all
        weigh alike: see `Windows.weights`.

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


class SequentialWindows:
    """A token file read front to back in windows that do not overlap: what evaluation during training runs over.

    Args:
        token_file: an opened token file.
        windows: what cuts windows out of the file.
        limit: the most windows to take, spread evenly over the file; None takes all.

    Raises:
        LandmarkError: the file holds less than one window.
    """

    def __init__(self, token_file: TokenFile, windows: Windows, limit: int | None = None) -> None:
        self.token_file, self.windows, self._whole = token_file, windows, None
        if windows.pack == "whole":
            self._whole = whole_documents(token_file, windows.text_length)
            self._available = len(self._whole)
        else:
            self._available = _window_count(token_file, windows.text_length)
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
            f"a global batch of {batches.global_batch} cannot be split evenly over {world_size} processes and "
            f"{accumulation} accumulation steps"
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

    def __init__(self, token_file: TokenFile, windows: Windows, seed: int, index: int) -> None:
        self.token_file, self.length = token_file, windows.text_length
        self._key = _mix(_mix(seed) ^ index)
        self._whole = whole_documents(token_file, self.length) if windows.pack == "whole" else None
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


def _window_count(token_file: TokenFile, length: int) -> int:
    """Windows of `length` tokens in a file, each window with a token after it."""
    tokens = len(token_file.tokens)
    if tokens < length + 1:
        raise LandmarkError(
            f"{token_file.path} holds {tokens} tokens, less than one window of {length} and the token after it: "
            f"take a shorter sequence length or more text"
        )
    return (tokens - 1) // length


def _conditional_shares(weights: Sequence[float] | None, sizes: Sequence[int]) -> list[int]:
    """For each file, the share it takes of what the files before it leave, in `WEIGHT_UNITS`; the last takes all."""
    if not sizes:
        raise LandmarkError("no token file to draw batches from")
    weights = list(sizes if weights is None else weights)
    if len(weights) != len(sizes):
        raise LandmarkError(f"{len(sizes)} token files need {len(sizes)} mixing weights, not {len(weights)}")
    if not all(np.isfinite(weight) and weight > 0 for weight in weights):
        raise LandmarkError(f"mixing weights must be above 0, not {', '.join(map(str, weights))}")
    left = [sum(weights[i:]) for i in range(len(weights))]
    return [round(weight / rest * WEIGHT_UNITS) for weight, rest in zip(weights, left, strict=True)]
