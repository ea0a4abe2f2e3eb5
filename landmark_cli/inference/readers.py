"""What every reader can do, and which one a model gets.

A reader feeds a batch of texts of any length through a model and hands back logits; it keeps what the model remembers
of these texts. Generation and evaluation know readers only by what is said here. A new kind of reader is a class of
`BaseReader` in a module of its own, and a line in `reader_class`.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from landmark_cli.console import counted
from landmark_cli.errors import LandmarkError, UsageError
from landmark_cli.inference.settings import ReadingSettings
from landmark_cli.models.layers import key_heads, landmark_layers


@dataclass(frozen=True)
class ReadChunk:
    """What one chunk gave.

    logits: (B, W, vocabulary) at text positions. Where rows have fewer than W text tokens in the chunk, `row` finds
    the logits of one row; if only the last logits were asked for, those of every row that has any stand at the end.
    lengths: text tokens of each row in this chunk (0 once a row has ended).
    begins: where this chunk's text begins in each row, counted in what `read` was given.
    ends: columns of logits up to the last token of each row; None for W in every row, padding on the left.
    """

    logits: Tensor
    lengths: list[int]
    begins: list[int]
    ends: list[int] | None = None

    def row(self, row: int) -> Tensor:
        """(n, vocabulary): the logits at the text tokens that a row has in this chunk, where all were asked for."""
        end = self.logits.shape[1] if self.ends is None else self.ends[row]
        return self.logits[row, end - self.lengths[row] : end]


class BaseReader(ABC):
    """Reads a batch of rows through a model, each row on from where it was read to.

    model: the model to read through. batch: rows. chunk: the most text tokens of a row that one chunk takes.
    remembers: whether what was read in earlier chunks counts in later ones, however long the text.
    equal_lengths: whether all rows have to be of one length.
    retrievals, dropped_retrievals: of models with a context-miss token, how many blocks queries have chosen since the
    last reset, and how many of these were dropped for a share under the cutoff.
    """

    remembers: ClassVar[bool] = True
    equal_lengths: ClassVar[bool] = False
    retrievals: int = 0
    dropped_retrievals: int = 0
    model: PreTrainedModel
    batch: int
    chunk: int

    @classmethod
    def open(cls, model: PreTrainedModel, settings: ReadingSettings, batch: int) -> BaseReader:
        """A reader as the settings say, as far as they concern readers of this kind."""
        return cls(model, batch=batch)

    @abstractmethod
    def read(
        self, rows: Sequence[Tensor | Sequence[int]], *, last_only: bool = False, transient: bool = False
    ) -> Iterator[ReadChunk]:
        """Read each row's text tokens, (n,) int64, on from where it was read to, chunk by chunk; yields after every
        chunk.

        The first chunk begins with the rows' first tokens. last_only: logits of the last text token of a chunk only
        (W = 1). transient: the next chunk's logits may take the place of this chunk's, which saves a copy: use them
        before. Raises ValueError for another number of rows than `batch`.
        """

    @abstractmethod
    def step(self, tokens: Sequence[int | None]) -> Tensor:
        """Read one more text token of each row and return its logits, (B, vocabulary).

        A row of None rests, and its logits mean nothing. Raises ValueError for another number of rows than `batch`.
        """

    @abstractmethod
    def reset(self) -> None:
        """Forget everything read."""

    @abstractmethod
    def take(self, rows: Sequence[int]) -> None:
        """Row r becomes what row rows[r] is: beams take each other's place, rows come or go. `batch` is len(rows) from
        then on."""

    def __deepcopy__(self, memo: dict[int, Any]) -> BaseReader:
        """A reader of the same model that has read the same and reads on by itself."""
        memo[id(self.model)] = self.model
        other = copy.copy(self)
        other.__dict__ = {name: copy.deepcopy(value, memo) for name, value in vars(self).items()}
        return other

    def expect(self, tokens: int, steps: int = 0) -> None:  # noqa: B027 (most prepare nothing)
        """Say that the longest row goes on for `tokens` text tokens more, and that after what is read next so many
        `steps` follow, so that both can be prepared. Warns where what is read may mislead (`beyond_training`).

        Raises LandmarkError where it is known by now that there is no room for these tokens.
        """

    def beyond_training(self, tokens: int) -> str | None:
        """Why what is read of a row of so many text tokens may mislead, in words: it takes more positions than the
        model was trained at. None where it does not."""
        return None

    def sees(self, tokens: int) -> int:
        """How many of a row's newest tokens can count in the logits after the row, where `tokens` are read in one
        go."""
        return tokens

    def trace(self) -> Callable[[int], list[dict[str, int | float]]]:
        """Note from now on which blocks queries read. Returns a function that takes a row and tells which blocks its
        newest text token has read: a dict of layer, head, block and share for each.

        Raises UsageError where a reader reads no blocks.
        """
        raise UsageError(f"--trace: {called(self.model)} has no landmarks, so it reads no blocks")

    def save(self, path: str | Path, row: int = 0, what: str = "") -> None:
        """Write what a row has read to a file, from which `recall` goes on. what: the option that names the file.

        Raises UsageError where a reader keeps no blocks, LandmarkError where the file cannot be written.
        """
        raise self._no_memory(what or "save")

    def recall(self, *paths: str | Path, row: int = 0, what: str = "") -> None:
        """Go on, with a row, from what `save` wrote, instead of from what it has read itself; several files are a
        library, read in order. Asked for again, files that have not changed cost next to nothing. what: the option that
        names the files.

        Raises UsageError where a reader keeps no blocks or a file does not fit the reader, LandmarkError where it is
        damaged.
        """
        raise self._no_memory(what or "recall")

    def _no_memory(self, what: str) -> UsageError:
        return UsageError(f"{what}: {called(self.model)} has no landmarks, so what it reads leaves no memory to keep")

    def require_finite(self, finite: bool) -> None:
        """Raise LandmarkError unless the logits read, or what was summed up of them, were finite: from a model whose
        logits are not finite neither a text nor a figure may come."""
        if finite:
            return
        dtype = str(next(self.model.parameters()).dtype).removeprefix("torch.")
        wider = "" if dtype == "float32" else f", or {dtype} is too narrow for it (try --dtype float32)"
        raise LandmarkError(
            f"{called(self.model)} gives logits that are nan or infinite, so what it says means "
            f"nothing: its weights are not finite{wider}"
        )

    def _require_rows(self, count: int) -> None:
        """Raise ValueError for another number of rows than the reader reads."""
        if count != self.batch:
            raise ValueError(f"{counted(count, 'row')} given to a reader of {self.batch}")

    def _rows(self, rows: Sequence[Tensor | Sequence[int]]) -> list[Tensor]:
        """The rows as int64 tensors. Raises ValueError where there are more or fewer rows than the reader reads, or a
        token that the model does not have, which a GPU would stop all of the process for."""
        self._require_rows(len(rows))
        rows = [torch.as_tensor(row, dtype=torch.long) for row in rows]
        known = self.model.config.get_text_config().vocab_size
        for row in rows:
            if len(row) and not 0 <= int(row.min()) <= int(row.max()) < known:
                wrong = next(token for token in row.tolist() if not 0 <= token < known)
                raise ValueError(f"the text has the token {wrong}, and the model has tokens 0 to {known - 1}")
        return rows


def reader_class(model: PreTrainedModel) -> type[BaseReader]:
    """The class of reader for a model: by recurrence for a Transformer-XL, through the block cache where the model has
    landmarks, and in a window of the newest tokens where it has no memory of any kind."""
    if getattr(model.config, "memory_length", None) is not None:
        from landmark_cli.inference.recurrent import RecurrentReader

        return RecurrentReader
    if has_landmarks(model):
        from landmark_cli.inference.block_reader import BlockReader

        return BlockReader
    from landmark_cli.inference.window import WindowReader

    return WindowReader


def open_reader(
    model: PreTrainedModel,
    settings: ReadingSettings,
    batch: int = 1,
    *,
    memory: bool = True,
    window: int | None = None,
) -> BaseReader:
    """A reader of `batch` rows for a model.

    memory: False reads every chunk as if nothing came before the chunk, by default as long as the trained length holds.
    window: read without landmarks and retrieval, by the attention that the model has of itself, over this many of the
    newest tokens. Raises LandmarkError where the settings do not fit the model.
    """
    if window is None and memory:
        return reader_class(model).open(model, settings, batch)
    from landmark_cli.inference.window import SeparateChunkReader, WindowReader

    if window is None:
        return SeparateChunkReader.open(model, settings, batch)
    return WindowReader(model, window=window, batch=batch)


def are_finite(logits: Tensor) -> Tensor:
    """Whether none of the logits (..., vocabulary) is nan or infinite, (...). Nothing waits for the device."""
    # Half as much work as isfinite and all: a maximum is nan where anything is.
    return logits.abs().amax(-1) < torch.inf


def has_landmarks(model: PreTrainedModel) -> bool:
    """Whether the model was trained with landmarks."""
    return bool(getattr(model.config, "landmark_freq", None))


def called(model: PreTrainedModel) -> str:
    """What messages call a model."""
    return model.name_or_path or "the model"


def trained_text_length(model: PreTrainedModel) -> int:
    """Text tokens of the longest input that the model was trained on: a training window without its landmarks.

    A model of which nobody says what it was trained on is taken for its config's max_position_embeddings.
    """
    config = model.config
    length = getattr(config, "trained_length", None) or config.max_position_embeddings
    return length - length // (config.landmark_freq + 1) if has_landmarks(model) else length


def layer_token_bytes(model: PreTrainedModel) -> int:
    """Bytes that the keys and values of one token take in one layer, in one with landmarks if there are such."""
    heads, head_dim = key_heads(model.config, landmark_layers(model.config)[0])
    return 2 * heads * head_dim * next(model.parameters()).dtype.itemsize


def free_memory(device: torch.device, offloaded: bool = False) -> int:
    """Bytes that keys and values can still take on a GPU or, where they are offloaded, in host memory; what this
    process has reserved and not filled is free. 0 where the system does not say."""
    if offloaded:
        from landmark_cli.attention.cache.pages import available_host_memory

        return available_host_memory() or 0
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
