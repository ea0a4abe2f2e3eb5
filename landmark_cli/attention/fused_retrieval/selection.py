"""Launching the kernels that choose blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from ..retrieval import TIE
from .call import PASS, TILE, Call, padded, strides
from .configurations import select_configuration, step_configuration
from .select import select_kernel
from .shared import normalizer_kernel, shared_scores_kernel, top_kernel
from .step import candidates_kernel, pick_kernel

# In a decoding step: programs that share one key head's landmarks, and programs of all key heads, at most.
MAX_SPLITS, MAX_PROGRAMS = 256, 4096
# Memory for the scores of a selection that heads share.
SHARED_BYTES = 64 << 20


def select(call: Call) -> Tensor:
    """Ages of the selected blocks, (B, H or 1, T or 1, k) int32, 0 where there are fewer; in no particular order."""
    if call.settings.selection == "max_over_heads":
        lse = normalizer(call)
        step = max(1, SHARED_BYTES // (4 * call.batch * call.capacity))
        parts = [shared(call, lse, first, min(step, call.tokens - first)) for first in range(0, call.tokens, step)]
        return torch.cat(parts, dim=2)
    if call.settings.selection == "max_over_tokens":
        return shared(call, normalizer(call), 0, call.tokens)
    if call.is_step:
        found = candidates(call)
        best = call.empty(*call.q.shape[:3], call.top_k)
        pick_kernel[(call.batch * call.heads * call.tokens,)](
            found.ages, found.scores, call.chunk.counters, best, call.heads * call.tokens, call.batch, *call.reach,
            TIE=call.tie, **found.constants,
        )  # fmt: skip
        return best
    ages = call.empty(*call.q.shape[:3], call.top_k)
    scores = torch.empty_like(ages, dtype=torch.float32) if call.top_k > PASS else None
    choice = select_configuration(call)
    for first in range(0, call.top_k, PASS):
        select_kernel[(triton.cdiv(call.group_rows, choice.rows), call.key_rows)](
            call.q, call.blocks.landmark_keys, call.chunk.counters, *call.turns, *call.stream_turn, ages, scores,
            strides(call.q), call.tokens, *call.ring, *call.reach, first, call.scale, GROUP=call.group, **call.parts,
            K=min(PASS, call.top_k - first), WIDTH=call.top_k, ROWS=choice.rows, COLS=TILE, LATER=first > 0,
            ABSOLUTE=call.absolute, EXACT=call.exact, TIE=call.tie, PRECISION=call.precision,
            **choice.launch_options(),
        )  # fmt: skip
    return ages


@dataclass(frozen=True)
class Candidates:
    """What the kernels that pick a step's blocks have to know.

    ages, scores: (B, H, T, splits, k), what candidates_kernel leaves. constants: how these came about.
    """

    ages: Tensor
    scores: Tensor
    constants: dict[str, int]


def candidates(call: Call) -> Candidates:
    """A step's candidates; their shapes are the same whatever has been read."""
    choice, k_pad = step_configuration(call), triton.next_power_of_2(call.top_k)
    most = max(1, min(MAX_SPLITS, MAX_PROGRAMS // call.key_rows))
    splits = 1 + min(triton.cdiv(call.capacity, choice.cols), most)
    shape = *call.q.shape[:3], splits, call.top_k
    ages, scores = call.empty(*shape), call.empty(*shape, dtype=torch.float32)
    candidates_kernel[(triton.cdiv(call.group_rows, choice.rows), splits, call.key_rows)](
        call.q, call.blocks.landmark_keys, call.chunk.counters, *call.turns, *call.stream_turn, ages, scores,
        strides(call.q), call.tokens, *call.ring, *call.reach, call.scale, GROUP=call.group, **call.parts,
        K=call.top_k, NEAR=padded(call.top_k), ROWS=choice.rows, COLS=choice.cols, SPLITS=splits,
        ABSOLUTE=call.absolute, EXACT=call.exact, TIE=call.tie, PRECISION=call.precision, **choice.launch_options(),
    )  # fmt: skip
    constants = {"K": call.top_k, "K_PAD": k_pad, "SPLITS": splits, "COLS": choice.cols}
    return Candidates(ages, scores, constants | {"CANDIDATES": triton.next_power_of_2(splits * call.top_k)})


def normalizer(call: Call) -> Tensor:
    """Log-sum-exp of each query's scores over all its blocks, (B, H, T)."""
    lse = call.empty(*call.q.shape[:3], dtype=torch.float32)
    choice = select_configuration(call)
    normalizer_kernel[(triton.cdiv(call.group_rows, choice.rows), call.key_rows)](
        call.q, call.blocks.landmark_keys, call.chunk.counters, *call.turns, *call.stream_turn, lse, strides(call.q),
        call.tokens, *call.ring, *call.reach, call.scale, GROUP=call.group, **call.parts, ROWS=choice.rows, COLS=TILE,
        ABSOLUTE=call.absolute, PRECISION=call.precision, **choice.launch_options(),
    )  # fmt: skip
    return lse


def shared(call: Call, lse: Tensor, first_token: int, tokens: int) -> Tensor:
    """The selection that heads share, for some tokens, (B, 1, tokens, k), or that all tokens share, (B, H, 1, k)."""
    over_heads = call.settings.selection == "max_over_heads"
    rows = min(select_configuration(call).rows, padded(tokens))
    sharing = (call.batch, 1, tokens) if over_heads else (call.batch, call.heads, 1)
    scores = call.empty(*sharing, call.capacity, dtype=torch.float32)
    row_grid = (triton.cdiv(tokens, rows), call.batch) if over_heads else (1, call.batch * call.heads)
    shared_scores_kernel[(triton.cdiv(call.capacity, TILE), *row_grid)](
        call.q, call.blocks.landmark_keys, call.chunk.counters, *call.turns, *call.stream_turn, lse, scores,
        strides(call.q), call.tokens, first_token, tokens, *call.ring, *call.reach, call.scale, GROUP=call.group,
        **call.parts, ROWS=rows, COLS=TILE, OVER_HEADS=over_heads, ABSOLUTE=call.absolute, PRECISION=call.precision,
    )  # fmt: skip
    ages, best = call.empty(*sharing, call.top_k), call.empty(*sharing, call.top_k, dtype=torch.float32)
    count, tie = ages[..., 0].numel(), TIE if call.top_k <= PASS else 0.0
    for first in range(0, call.top_k, PASS):
        top_kernel[(triton.cdiv(count, 16),)](
            scores, call.chunk.counters, ages, best, count, count // call.batch, call.batch, call.capacity,
            call.settings.retrievable, first, K=min(PASS, call.top_k - first), WIDTH=call.top_k, ROWS=16, COLS=TILE,
            LATER=first > 0, TIE=tie,
        )  # fmt: skip
    return ages
