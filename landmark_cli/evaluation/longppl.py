"""LongPPL: the perplexity of key tokens, those that a model predicts well because of what stands far in front of them.

Plain perplexity is a mean over all tokens, of which hardly one in a hundred needs more than the last page. A token is a
key token of a text where the evaluator, a model, gives it a loss that is lower by more than GAIN nats with the whole
window in front of it than with the last tokens of it alone, and that is below MOST_LOSS with the window. Source: Fang
et al., "What is Wrong with Perplexity for Long-context Language Modeling?" (arXiv 2410.23771), section 3.

Windows and targets are those of `perplexity`. The short context of the tokens from `context` + s on, `stride` of them,
begins at token s, for s = 0, `stride`, 2 `stride` and so on: it has `context` tokens to `context + stride - 1`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from landmark_cli.console import finite, info, progress
from landmark_cli.data.landmarks import IGNORED_TARGET, next_token_targets
from landmark_cli.errors import UsageError
from landmark_cli.evaluation.perplexity import begun, cut_windows, default_batch, window_starts
from landmark_cli.evaluation.prompts import PromptReaders
from landmark_cli.evaluation.score import Score, token_scores
from landmark_cli.evaluation.studies import FinishedRows
from landmark_cli.evaluation.ways import Way, check_ways, ways_of
from landmark_cli.inference.readers import reader_class
from landmark_cli.inference.settings import ReadingSettings
from landmark_cli.interrupts import Interrupts
from landmark_cli.launch import again

CONTEXT, STRIDE = 4096, 1024
GAIN = MOST_LOSS = 2.0
EVAL_LENGTH = 32768


@dataclass(frozen=True)
class LongText:
    """A text in windows.

    tokens: (n,) ids without landmarks. starts: where each window begins. eval_length: tokens of a window, after which
    at least one more stands. eot_id: the end-of-text token, which predicts nothing. identity: what has to be the same
    for the text to be the same (JSON). begin: what the reading model's tokenizer puts in front of every text; see
    `evaluate_perplexity`.
    """

    tokens: np.ndarray
    starts: np.ndarray
    eval_length: int
    eot_id: int | None
    identity: Any = None
    begin: tuple[int, ...] = ()

    def batch(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Windows by number: tokens (B, eval_length) and what each of them predicts, the same shape."""
        rows = cut_windows(self.tokens, self.starts[list(numbers)], self.eval_length)
        targets = next_token_targets(rows[:, :-1], landmark_token_id=None, eot_id=self.eot_id, following=rows[:, -1])
        return rows[:, :-1], targets


def long_text(
    tokens: np.ndarray,
    eot_id: int | None,
    identity: Any = None,
    *,
    eval_length: int | None = None,
    sample_tokens: int | None = None,
    seed: int = 0,
) -> LongText:
    """A text in windows of `eval_length` tokens, by default EVAL_LENGTH or the whole text. sample_tokens, seed: as in
    `evaluate_perplexity`. Raises LandmarkError where the text is shorter than a window."""
    eval_length = eval_length or max(1, min(EVAL_LENGTH, len(tokens) - 1))
    return LongText(tokens, window_starts(len(tokens), eval_length, sample_tokens, seed), eval_length, eot_id, identity)


@dataclass(frozen=True)
class LongPerplexity:
    """What was measured in one way of reading: over key tokens, and over all."""

    way: Way
    key: Score
    overall: Score


def ways_of_long(model: PreTrainedModel, top_k_blocks: Sequence[int] | None) -> list[Way]:
    """The ways in which a model reads a window whole: through the block cache with each of these numbers of blocks,
    by recurrence, or by ordinary attention where it has no memory of any kind."""
    return ways_of(model, top_k_blocks, full_attention=not reader_class(model).remembers)


def check_window(model: PreTrainedModel, way: Way, eval_length: int) -> None:
    """Raise UsageError where a way of reading cannot read a window whole."""
    known = getattr(model.config, "max_position_embeddings", None)
    if way.full and known is not None and known < eval_length:
        raise UsageError(
            f"--eval-length {eval_length}: {model.config.name_or_path or 'the model'} has no landmarks and knows "
            f"{known} positions; give {known} or less"
        )


def check_reading(model: PreTrainedModel, ways: Sequence[Way], reading: ReadingSettings, eval_length: int) -> None:
    """Raise LandmarkError where a model, which may have no weights, cannot read windows in one of these ways:
    `check_window` and `check_ways`."""
    for way in ways:
        check_window(model, way, eval_length)
    check_ways(model, ways, reading)


def check_context(text: LongText, context: int) -> None:
    """Raise UsageError where windows are no longer than the short context."""
    if text.eval_length <= context:
        raise UsageError(
            f"--eval-length {text.eval_length}: key tokens are looked for behind the first {context} of a window "
            "(--short-context); give a longer --eval-length or a shorter --short-context"
        )


def find_key_tokens(
    model: PreTrainedModel,
    way: Way,
    text: LongText,
    finished: FinishedRows,
    asked: Interrupts,
    *,
    context: int = CONTEXT,
    stride: int = STRIDE,
    depends_on: dict[str, Any],
    reading: ReadingSettings | None = None,
    batch_size: int | None = None,
) -> list[list[int]]:
    """The key tokens of every window as the evaluator, a model, finds them: positions in the window that predict one.

    finished: where what was found is kept. asked: whether to stop. depends_on: what it depends on beside the text and
    how it is read (JSON). reading: how blocks are read, but for their number. batch_size: windows read at a time.

    Raises UsageError where windows are no longer than the short context, Stopped after the windows under way where a
    signal came, LandmarkError where the model's logits are not finite.
    """
    check_context(text, context)
    check_window(model, way, text.eval_length)
    losses_of = _Losses(model, way, reading or ReadingSettings(), text.begin)
    about = {"benchmark": "longppl, key tokens", "context": context, "stride": stride, **depends_on}
    starts = range(0, text.eval_length + 1 - context, stride)

    def work(numbers: list[int]) -> Iterator[dict[str, Any]]:
        rows, targets = text.batch(numbers)
        whole = losses_of.of(rows, targets)[0]
        short = torch.zeros_like(whole)
        # Every short context is a row of its own; all but a window's last one have the same length.
        for group in _by_length(text.eval_length, starts, context, stride):
            parts = [(window, begin) for window in range(len(rows)) for begin in group]
            size = batch_size or losses_of.at_a_time(min(context + stride, text.eval_length))
            for some in (parts[first : first + size] for first in range(0, len(parts), size)):
                ends = [min(begin + context + stride - 1, text.eval_length) for _, begin in some]
                cut = [slice(begin, end) for (_, begin), end in zip(some, ends, strict=True)]
                given = torch.stack([rows[window, one] for (window, _), one in zip(some, cut, strict=True)])
                wanted = torch.stack([targets[window, one] for (window, _), one in zip(some, cut, strict=True)])
                losses = losses_of.of(given, wanted)[0]
                for loss, (window, begin), end in zip(losses, some, ends, strict=True):
                    short[window, begin + context - 1 : end] = loss[context - 1 :]
        key = (short - whole > GAIN) & (whole < MOST_LOSS)
        # The first tokens of a window have no more context than the short one; a token without a target has no loss.
        key[:, : context - 1] = False
        for one in key & (targets != IGNORED_TARGET):
            yield {"positions": one.nonzero()[:, 0].tolist()}

    cost = text.eval_length + sum(min(begin + context + stride - 1, text.eval_length) - begin for begin in starts)
    found = _each_window("key tokens", work, cost, losses_of, text, finished, asked, about, batch_size)
    return [one["positions"] for one in found]


def measure_long_perplexity(
    model: PreTrainedModel,
    way: Way,
    text: LongText,
    key_tokens: Sequence[Sequence[int]],
    finished: FinishedRows,
    asked: Interrupts,
    *,
    depends_on: dict[str, Any],
    reading: ReadingSettings | None = None,
    batch_size: int | None = None,
) -> LongPerplexity:
    """How well a model that reads every window whole predicts the key tokens, and all tokens. The arguments, and what
    is raised, are those of `find_key_tokens`; key_tokens: what that found."""
    check_window(model, way, text.eval_length)
    losses_of = _Losses(model, way, reading or ReadingSettings(), text.begin)

    def work(numbers: list[int]) -> Iterator[dict[str, Any]]:
        rows, targets = text.batch(numbers)
        losses, correct = losses_of.of(rows, targets)
        for number, *of_window in zip(numbers, losses, correct, targets, strict=True):
            yield {
                "key": asdict(_score(*(one[key_tokens[number]] for one in of_window))),
                "overall": asdict(_score(*of_window)),
            }

    about = {"benchmark": "longppl", "key_tokens": FinishedRows.key({"positions": list(key_tokens)}), **depends_on}
    found = _each_window("longppl", work, text.eval_length, losses_of, text, finished, asked, about, batch_size)
    return LongPerplexity(way, *(_sum([Score(**one[name]) for one in found]) for name in ("key", "overall")))


def _each_window(
    name: str,
    work: Callable[[list[int]], Iterator[dict[str, Any]]],
    cost: int,
    losses_of: _Losses,
    text: LongText,
    finished: FinishedRows,
    asked: Interrupts,
    about: dict[str, Any],
    batch_size: int | None,
) -> list[dict[str, Any]]:
    """work(numbers of windows) yields a result for each; what `finished` has is not worked on again. cost: tokens read
    for one window."""
    common = {"text": text.identity, "eval_length": text.eval_length, "reading": losses_of.identity, **about}
    keys = [finished.key({"window": int(start), **common}) for start in text.starts]
    waiting = [number for number, key in enumerate(keys) if finished.get(key) is None]
    title = f"{name}, {losses_of.way.name}"
    if len(waiting) < len(keys):
        info(f"{title}: {len(keys) - len(waiting)} of {len(keys)} windows are kept from an earlier run")
    size = batch_size or (losses_of.at_a_time(text.eval_length) if waiting else 1)
    with progress(title, len(waiting) * cost, "tokens") as shown:
        for first in range(0, len(waiting), size):
            if asked:
                raise asked.stopped(f"what was measured is kept; go on with\n{again()}")
            numbers = waiting[first : first + size]
            for number, result in zip(numbers, work(numbers), strict=True):
                finished.add(keys[number], finite(result))
            shown.advance(cost * len(numbers))
    return [finished.get(key) for key in keys]


class _Losses:
    """Reads rows of one length from their beginning, each with a reader that serves all rows of that length."""

    def __init__(self, model: PreTrainedModel, way: Way, reading: ReadingSettings, begin: Sequence[int] = ()):
        self._model, self.way, self._begin = model, way, begin
        self._reading = replace(reading, top_k_blocks=way.top_k_blocks)
        self._readers: dict[int, PromptReaders] = {}

    @property
    def identity(self) -> dict[str, Any]:
        """What has to be the same for rows to be read the same (JSON)."""
        how = {"full": True} if self.way.full else asdict(self._reading)
        return how | ({"begin": list(self._begin)} if self._begin else {})

    def of(self, rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """rows, targets (B, n) -> each target's loss in nats, (B, n) float32, and whether it was the likeliest token,
        (B, n) int32; both on the host. Raises LandmarkError where the logits are not finite."""
        length = rows.shape[1]
        rows = begun(rows.clone(), self._begin, length)
        reader = self._of_length(length).of(len(rows), length)
        reader.expect(length)
        losses, correct, begin = [], [], 0
        for part in reader.read(list(rows), transient=True):
            end = begin + part.logits.shape[1]
            for all_of, some in zip((losses, correct), token_scores(part.logits, targets[:, begin:end]), strict=True):
                all_of.append(some)
            begin = end
        losses = torch.cat(losses, dim=1).cpu()
        reader.require_finite(bool(losses.isfinite().all()))
        return losses, torch.cat(correct, dim=1).cpu()

    def at_a_time(self, length: int) -> int:
        """How many rows of so many tokens are read at a time by default."""
        chunk = min(length, self._of_length(length).of(1, length).chunk)
        return default_batch(self._model.device.type, chunk, length)

    def _of_length(self, length: int) -> PromptReaders:
        new = PromptReaders(self._model, self._reading, self.way.full)
        return self._readers.setdefault(length, new)


def _by_length(eval_length: int, starts: range, context: int, stride: int) -> Iterator[list[int]]:
    """Where short contexts begin, those together that have the same length."""
    whole = [begin for begin in starts if begin + context + stride - 1 <= eval_length]
    if whole:
        yield whole
    yield from ([begin] for begin in starts[len(whole) :])


def _score(losses: Tensor, correct: Tensor, targets: Tensor) -> Score:
    """What (n,) of each are in sum."""
    return Score(int((targets != IGNORED_TARGET).sum()), float(losses.double().sum()), int(correct.sum()))


def _sum(scores: Sequence[Score]) -> Score:
    return Score(*(sum(getattr(one, name) for one in scores) for name in Score.__dataclass_fields__))
