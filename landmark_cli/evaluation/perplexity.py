"""Perplexity over text of any length, read chunk by chunk through the block cache or in plain chunks without it.

Protocol: the text is cut into consecutive windows of `eval_length` text tokens. Every token of a window predicts the
text token after it, the last one the first of the next window; an end-of-text token predicts nothing. Landmarks
neither predict nor are predicted. Source: arXiv 2305.16300, section 4.1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from landmark_cli.console import counted, progress
from landmark_cli.data.landmarks import next_token_targets
from landmark_cli.errors import LandmarkError
from landmark_cli.evaluation.score import Score, score
from landmark_cli.inference.readers import BaseReader, open_reader, reader_class, trained_text_length
from landmark_cli.inference.settings import ReadingSettings

# By default so many text tokens are in one forward pass and in the cache, which bounds the memory of logits and of keys
# and values.
FORWARD_TOKENS = {"cpu": 2048, "cuda": 16384}
CACHE_TOKENS = {"cpu": 16384, "cuda": 32768}


@dataclass(frozen=True)
class PerplexityResult:
    """What `evaluate_perplexity` measured.

    overall: over all windows. chunks: over the i-th chunks of the windows. windows: how many windows were read.
    eval_length, chunk: text tokens of a window and of a chunk. memory: whether chunks were read through a block cache.
    dropped: of models with a context-miss token, the share of retrievals that the cutoff left out; else None.
    """

    overall: Score
    chunks: list[Score]
    windows: int
    eval_length: int
    chunk: int
    memory: bool
    dropped: float | None = None


def evaluate_perplexity(
    model: PreTrainedModel,
    tokens: np.ndarray | Tensor,
    *,
    eot_id: int | None,
    eval_length: int | None = None,
    memory: bool = True,
    reading: ReadingSettings | None = None,
    batch_size: int | None = None,
    sample_tokens: int | None = None,
    seed: int = 0,
    begin: Sequence[int] = (),
) -> PerplexityResult:
    """Measure how well a model predicts a text.

    tokens: (n,) ids of text without landmarks. eot_id: the end-of-text token, which predicts nothing. eval_length: text
    tokens of a window, by default 4 times the trained length (or the whole text, where that is shorter). memory: False
    reads every chunk by itself; a model without landmarks never has a memory. reading: how to read. Without memory only
    its `chunk` counts, by default what the trained length holds. batch_size: windows read at a time, by default as many
    as a moderate amount of memory allows. sample_tokens: measure on a random choice of windows, of about this many
    tokens in all, drawn with `seed`. begin: tokens that the tokenizer puts in front of every text by itself. What is
    read by itself, a window or a chunk without memory, begins with them in place of its first tokens, and predicts the
    same.

    Raises LandmarkError where the text is shorter than a window, and where the model's logits are not finite.
    """
    reading = reading or ReadingSettings()
    memory = memory and reader_class(model).remembers
    eval_length = eval_length or default_eval_length(model, len(tokens))
    starts = window_starts(len(tokens), eval_length, sample_tokens, seed)
    chunk = open_reader(model, reading, memory=memory).chunk
    chunk = chunk if memory else min(chunk, eval_length)
    batch_size = batch_size or default_batch(model.device.type, chunk, eval_length if memory else chunk)

    sums = torch.zeros(-(-eval_length // chunk), 3, dtype=torch.float64, device=model.device)
    retrievals = dropped = 0
    reader: BaseReader | None = None
    with progress("perplexity", len(starts) * eval_length, "tokens") as shown:
        for first in range(0, len(starts), batch_size):
            rows = cut_windows(tokens, starts[first : first + batch_size], eval_length)
            targets = next_token_targets(rows[:, :-1], landmark_token_id=None, eot_id=eot_id, following=rows[:, -1])
            begun(rows[:, :-1], begin, eval_length if memory else chunk)
            if reader is None or reader.batch != len(rows):
                reader = open_reader(model, reading, batch=len(rows), memory=memory)
                reader.expect(eval_length)
            else:
                reader.reset()
            for index, part in enumerate(reader.read(list(rows[:, :-1]), transient=True)):
                sums[index] += score(part.logits, targets[:, index * chunk : (index + 1) * chunk])
            retrievals += reader.retrievals
            dropped += reader.dropped_retrievals
            so_far = _score(sums.sum(0))
            reader.require_finite(math.isfinite(so_far.negative_log_likelihood))
            shown.advance(len(rows) * eval_length, perplexity=so_far.perplexity)
    return PerplexityResult(
        overall=_score(sums.sum(0)),
        chunks=[_score(part) for part in sums],
        windows=len(starts),
        eval_length=eval_length,
        chunk=chunk,
        memory=memory,
        dropped=dropped / retrievals if retrievals else None,
    )


def begun(rows: Tensor, begin: Sequence[int], length: int) -> Tensor:
    """rows (B, n) with the tokens that begin a text, in place, instead of the first of every `length` of theirs."""
    for offset, token in enumerate(begin):
        rows[:, offset::length] = token
    return rows


def default_eval_length(model: PreTrainedModel, tokens: int) -> int:
    """Text tokens of a window: 4 times the trained length, or a whole text of so many tokens where that is shorter."""
    return max(1, min(4 * trained_text_length(model), tokens - 1))


def default_batch(device: str, chunk: int, remembered: int) -> int:
    """Windows read at a time. remembered: text tokens of each window that stay in memory."""
    forward, cache = (limits.get(device, limits["cpu"]) for limits in (FORWARD_TOKENS, CACHE_TOKENS))
    return max(1, min(forward // chunk, cache // remembered))


def _score(sums: Tensor) -> Score:
    tokens, negative_log_likelihood, correct = sums.tolist()
    return Score(int(tokens), negative_log_likelihood, int(correct))


def window_starts(length: int, eval_length: int, sample_tokens: int | None, seed: int) -> np.ndarray:
    """Where the windows begin; each is followed by at least one more token."""
    windows = (length - 1) // eval_length
    if windows < 1:
        raise LandmarkError(
            f"the text has {counted(length, 'token')}, too few for one window of {eval_length} and the token after it; "
            f"take a shorter --eval-length"
        )
    chosen = np.arange(windows)
    if sample_tokens is not None and sample_tokens < windows * eval_length:
        count = max(1, round(sample_tokens / eval_length))
        chosen = np.sort(np.random.default_rng(seed).choice(windows, count, replace=False))
    return chosen * eval_length


def cut_windows(tokens: np.ndarray | Tensor, starts: np.ndarray, eval_length: int) -> Tensor:
    """The windows and the token after each: (n, eval_length + 1) int64."""
    rows = [np.asarray(tokens[start : start + eval_length + 1]).astype(np.int64) for start in starts.tolist()]
    return torch.from_numpy(np.stack(rows))
