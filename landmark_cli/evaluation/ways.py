"""The ways of reading that an evaluation puts side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedModel

from landmark_cli.inference.readers import has_landmarks, open_reader, reader_class
from landmark_cli.inference.settings import ReadingSettings


@dataclass(frozen=True)
class Way:
    """How a model reads. top_k_blocks: through the block cache, with so many; None by the attention it has of itself.
    full: ordinary attention over all that is read, else its own window or, where the model remembers (recurrent), a
    memory of its own."""

    top_k_blocks: int | None
    full: bool = False
    recurrent: bool = False

    @property
    def name(self) -> str:
        if self.full:
            return "full attention"
        if self.recurrent:
            return "recurrence"
        return "own window" if self.top_k_blocks is None else f"top-k {self.top_k_blocks}"


def check_ways(model: PreTrainedModel, ways: Sequence[Way], reading: ReadingSettings) -> None:
    """Raise LandmarkError where a model, which may have no weights, cannot be read in one of these ways: what its
    reader refuses, before another way has been measured for hours. reading: all but the number of blocks."""
    for way in ways:
        if not way.full:
            open_reader(model, replace(reading, top_k_blocks=way.top_k_blocks))


def beyond_training(model: PreTrainedModel, way: Way, reading: ReadingSettings, length: int) -> str | None:
    """Why reading so many tokens in this way may mislead, or is not done: see `BaseReader.beyond_training`. None where
    nothing is known against it. reading: as of `check_ways`."""
    if not way.full:
        return open_reader(model, replace(reading, top_k_blocks=way.top_k_blocks)).beyond_training(length)
    return None if fits_positions(model, way, length) else not_asked(model, [length])


def fits_positions(model: PreTrainedModel, way: Way, length: int) -> bool:
    """Whether a way of reading knows as many positions."""
    return not way.full or length <= model.config.max_position_embeddings


def not_asked(model: PreTrainedModel, lengths: Sequence[int]) -> str:
    """What is said of lengths that full attention does not know."""
    beyond = ", ".join(map(str, lengths))
    return f"full attention is not asked at {beyond}: the model knows {model.config.max_position_embeddings} positions"


def ways_of(model: PreTrainedModel, top_k_blocks: Sequence[int] | None, full_attention: bool) -> list[Way]:
    """The ways in which a model is read: through the block cache with each of these numbers of blocks (by default its
    config's), by recurrence, or in its own window; and by full attention where that is asked for."""
    full = [Way(None, full=True)] if full_attention else []
    if has_landmarks(model):
        return [Way(k) for k in dict.fromkeys(top_k_blocks or [model.config.top_k_blocks])] + full
    return full or [Way(None, recurrent=reader_class(model).remembers)]
