"""Launching the kernels that choose blocks."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..retrieval import TIE
from .call import PASS, TILE, Call, padded, strides
from .configurations import select_configuration
from .select import pick_kernel, select_kernel
from .shared import normalizer_kernel, shared_scores_kernel, top_kernel

# Programs that share one key head's landmarks in a decoding step, at most.
MAX_SPLITS = 256
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
    splits = splits_of(call) if call.is_step else 1
    ages, scores = candidates(call, splits)
    if splits == 1:
        return ages[..., 0, :]
    found = call.empty(*ages.shape[:3], call.top_k)
    pick_kernel[(call.batch * call.heads * call.tokens,)](
        ages, scores, call.chunk.counters, found, call.heads * call.tokens, call.batch, call.settings.retrievable,
        TIE=call.tie, **candidate_constants(call, splits),
    )  # fmt: skip
    return found


def splits_of(call: Call) -> int:
    """How many programs share a key head's landmarks in a decoding step; the same whatever has been read."""
    return min(triton.cdiv(call.capacity, TILE), MAX_SPLITS)


def candidate_constants(call: Call, splits: int) -> dict[str, int]:
    """What the kernels that choose among candidates have to know about them."""
    found, k_pad = triton.next_power_of_2(splits * call.top_k), triton.next_power_of_2(call.top_k)
    return {"WIDTH": call.top_k, "SPLITS": splits, "CANDIDATES": found, "COLS": TILE, "K_PAD": k_pad}


def candidates(call: Call, splits: int) -> tuple[Tensor, Tensor | None]:
    """(ages, scores) of each split's best, (B, H, T, splits, k); no scores where nothing needs them."""
    shape = *call.q.shape[:3], splits, call.top_k
    ages = call.empty(*shape)
    scores = call.empty(*shape, dtype=torch.float32) if call.is_step or call.top_k > PASS else None
    choice = select_configuration(call)
    for first in range(0, call.top_k, PASS):
        select_kernel[(triton.cdiv(call.group_rows, choice.rows), splits, call.key_rows)](
            call.q, call.blocks.landmark_keys, call.chunk.counters, *call.turns, *call.stream_turn, ages, scores,
            strides(call.q), call.tokens, *call.ring, *call.reach, first, call.scale, GROUP=call.group, **call.parts,
            K=min(PASS, call.top_k - first), WIDTH=call.top_k, ROWS=choice.rows, COLS=TILE, SPLITS=splits,
            LATER=first > 0, ABSOLUTE=call.absolute, EXACT=call.exact, TIE=call.tie, PRECISION=call.precision,
            **choice.launch_options(),
        )  # fmt: skip
    return ages, scores


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
