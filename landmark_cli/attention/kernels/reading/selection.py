"""Launching the kernels that choose blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from ..common.configuration import Configuration, padded
from .call import PASS, TILE, Call, strides
from .candidates import NO_NUMBER, candidates_kernel, pick_kernel
from .configurations import select_configuration, step_configuration
from .shared import normalizer_kernel, number_kernel, shared_scores_kernel, top_kernel
from .top_k import select_kernel

# In a decoding step: programs that share one key head's landmarks, and programs of all key heads, at most.
MAX_SPLITS, MAX_PROGRAMS = 256, 4096
# A chunk's queries should make so many programs; fewer share out the landmarks, so many tiles to each of them at least.
ENOUGH_PROGRAMS, LEAST_TILES, MOST_SHARES = 512, 4, 32
# Memory for the scores of few queries that propose many blocks.
NUMBERS_BYTES = 16 << 20
# Memory for the scores of a selection that heads share.
SHARED_BYTES = 64 << 20


def select(call: Call) -> Tensor:
    """Ages of the selected blocks, (B, H or 1, T or 1, k) int32, 0 where there are fewer; in no particular order.
    Where blocks are re-ranked, those that landmarks propose."""
    return SELECTIONS[call.settings.selection](call)


def per_token_and_head(call: Call) -> Tensor:
    """Each query of each head its own blocks, (B, H, T, k)."""
    if call.is_step:
        return pick(call, step_candidates(call))
    choice = select_configuration(call)
    if (shares := shares_of_landmarks(call, choice)) > 1:
        return pick(call, candidates(call, choice, shares))
    count = call.proposed
    if count > max(PASS, call.top_k) and 8 * call.batch * call.heads * call.tokens * call.capacity <= NUMBERS_BYTES:
        return propose(call, choice)
    ages = call.empty(*call.q.shape[:3], count)
    scores = torch.empty_like(ages, dtype=torch.float32) if count > PASS else None
    for first in range(0, count, PASS):
        select_kernel[(triton.cdiv(call.query_rows, choice.rows), call.key_rows)](
            call.q, call.blocks.landmark_keys, call.chunk.counters, call.rotations, call.stream_rotation, ages, scores,
            strides(call.q), call.tokens, *call.ring, *call.scoring, first, call.score_scaling, **call.heads_and_parts,
            K=min(PASS, count - first), WIDTH=count, ROWS=choice.rows, COLS=TILE, LATER=first > 0,
            ABSOLUTE=call.absolute, EXACT=call.exact, PRECISION=call.precision, **choice.launch_options(),
        )  # fmt: skip
    return ages


def propose(call: Call, choice: Configuration) -> Tensor:
    """Many blocks of few queries: a pass over all landmarks for every so many would keep a few programs busy for long.
    (B, H, T, n) int32."""
    numbers = call.empty(*call.q.shape[:3], call.capacity, dtype=torch.int64)
    grid = triton.cdiv(call.capacity, TILE), triton.cdiv(call.query_rows, choice.rows), call.key_rows
    number_kernel[grid](
        call.q, call.blocks.landmark_keys, call.chunk.counters, call.rotations, call.stream_rotation, numbers,
        strides(call.q), call.tokens, *call.ring, *call.scoring, call.score_scaling, **call.heads_and_parts,
        ROWS=choice.rows, COLS=TILE, ABSOLUTE=call.absolute, PRECISION=call.precision, **choice.launch_options(),
    )  # fmt: skip
    best = numbers.topk(min(call.proposed, call.capacity), dim=-1).values
    return (2147483647 - (best & 0xFFFFFFFF)).masked_fill(best == NO_NUMBER.value, 0).int()


def max_over_query_heads(call: Call) -> Tensor:
    """All query heads of a key head the same blocks, (B, H, T, k)."""
    return shared_by_heads(call, call.key_heads).repeat_interleave(call.heads_per_key, dim=1)


def max_over_heads(call: Call) -> Tensor:
    """All heads of a query the same blocks, (B, 1, T, k)."""
    return shared_by_heads(call, 1)


def max_over_tokens(call: Call) -> Tensor:
    """All queries of a head the same blocks, (B, H, 1, k)."""
    return shared(call, normalizer(call), 0, call.tokens)


# The rules of attention/cache/settings.py that the kernels know.
SELECTIONS = {
    choose.__name__: choose for choose in (per_token_and_head, max_over_query_heads, max_over_heads, max_over_tokens)
}


@dataclass(frozen=True)
class Candidates:
    """What the kernels that pick a query's blocks of those that several programs found have to know.

    ages, scores: (B, H, T, splits, k), what candidates_kernel leaves. constants: how these came about.
    """

    ages: Tensor
    scores: Tensor
    constants: dict[str, int]


def step_candidates(call: Call, stores: bool = False) -> Candidates:
    """A decoding step's candidates; their shapes are the same whatever has been read. stores: put the step's keys and
    values into their blocks beside."""
    return candidates(call, step_configuration(call), max(1, min(MAX_SPLITS, MAX_PROGRAMS // call.key_rows)), stores)


def shares_of_landmarks(call: Call, choice: Configuration) -> int:
    """Among how many programs the landmarks of a tile of queries are shared out, a power of 2; 1: they are not."""
    programs = triton.cdiv(call.query_rows, choice.rows) * call.key_rows
    tiles = triton.cdiv(call.capacity, choice.cols)
    wanted = min(ENOUGH_PROGRAMS // programs, tiles // LEAST_TILES, MOST_SHARES)
    return 1 << max(0, wanted.bit_length() - 1) if call.proposed <= PASS else 1


def candidates(call: Call, choice: Configuration, most: int, stores: bool = False) -> Candidates:
    """The newest blocks, and the best that each of `most` programs (fewer of few landmarks) finds among the others.
    stores: as in `step_candidates`."""
    count = call.proposed
    splits = 1 + min(triton.cdiv(call.capacity, choice.cols), most)
    shape = *call.q.shape[:3], splits, count
    ages, scores = call.empty(*shape), call.empty(*shape, dtype=torch.float32)
    stored = call.k, call.v, call.blocks.blocks, call.page_table
    candidates_kernel[(triton.cdiv(call.query_rows, choice.rows), splits + stores, call.key_rows)](
        call.q, call.blocks.landmark_keys, call.chunk.counters, call.rotations, call.stream_rotation, ages, scores,
        *(stored if stores else (None,) * 4), *map(strides, (call.q, call.k, call.v)), call.tokens, *call.ring,
        *call.scoring, call.score_scaling, **call.heads_and_parts,
        K=count, NEAR=padded(count), ROWS=choice.rows, COLS=choice.cols, SPLITS=splits,
        ABSOLUTE=call.absolute, EXACT=call.exact, PRECISION=call.precision, D_PAD=call.dim_pad,
        BLOCK=call.settings.block_size, TOKENS=triton.next_power_of_2(call.tokens) if stores else 1,
        **choice.launch_options(),
    )  # fmt: skip
    constants = {"K": count, "K_PAD": triton.next_power_of_2(count), "SPLITS": splits, "COLS": choice.cols}
    return Candidates(ages, scores, constants | {"CANDIDATES": triton.next_power_of_2(splits * count)})


def pick(call: Call, found: Candidates) -> Tensor:
    """The best of the candidates: ages (B, H, T, k)."""
    best = call.empty(*call.q.shape[:3], found.constants["K"])
    pick_kernel[(call.batch * call.heads * call.tokens,)](
        found.ages, found.scores, call.chunk.counters, best, call.heads * call.tokens, call.batch, *call.reach,
        **found.constants, num_warps=1 if found.constants["CANDIDATES"] <= 256 else 4,
    )  # fmt: skip
    return best


def normalizer(call: Call) -> Tensor:
    """Log-sum-exp of each query's scores over all its blocks, (B, H, T)."""
    lse = call.empty(*call.q.shape[:3], dtype=torch.float32)
    choice = select_configuration(call)
    normalizer_kernel[(triton.cdiv(call.query_rows, choice.rows), call.key_rows)](
        call.q, call.blocks.landmark_keys, call.chunk.counters, call.rotations, call.stream_rotation, lse,
        strides(call.q), call.tokens, *call.ring, *call.scoring, call.score_scaling, **call.heads_and_parts,
        ROWS=choice.rows, COLS=TILE, ABSOLUTE=call.absolute, PRECISION=call.precision, **choice.launch_options(),
    )  # fmt: skip
    return lse


def shared_by_heads(call: Call, groups: int) -> Tensor:
    """The selections that heads share, in so many groups of them: (B, groups, T, k)."""
    lse = normalizer(call)
    step = max(1, SHARED_BYTES // (4 * call.batch * groups * call.capacity))
    parts = [shared(call, lse, first, min(step, call.tokens - first), groups) for first in range(0, call.tokens, step)]
    return torch.cat(parts, dim=2)


def shared(call: Call, lse: Tensor, first_token: int, tokens: int, groups: int = 0) -> Tensor:
    """The selection that the heads of a group share, 1 group or one for each key head, for some tokens, (B, groups,
    tokens, k); or, without groups, that all tokens share, (B, H, 1, k)."""
    rows = min(select_configuration(call).rows, padded(tokens))
    sharing = (call.batch, groups, tokens) if groups else (call.batch, call.heads, 1)
    scores = call.empty(*sharing, call.capacity, dtype=torch.float32)
    row_grid = (triton.cdiv(tokens, rows), call.batch * groups) if groups else (1, call.batch * call.heads)
    shared_scores_kernel[(triton.cdiv(call.capacity, TILE), *row_grid)](
        call.q, call.blocks.landmark_keys, call.chunk.counters, call.rotations, call.stream_rotation, lse, scores,
        strides(call.q), call.tokens, first_token, tokens, *call.ring, *call.scoring, call.score_scaling,
        **call.heads_and_parts,
        ROWS=rows, COLS=TILE, OVER_HEADS=groups > 0, OF_KEY_HEAD=groups > 1, ABSOLUTE=call.absolute,
        PRECISION=call.precision,
    )  # fmt: skip
    ages, best = call.empty(*sharing, call.top_k), call.empty(*sharing, call.top_k, dtype=torch.float32)
    count = ages[..., 0].numel()
    for first in range(0, call.top_k, PASS):
        top_kernel[(triton.cdiv(count, 16),)](
            scores, call.chunk.counters, ages, best, count, count // call.batch, call.batch, call.capacity,
            call.settings.retrievable, first, K=min(PASS, call.top_k - first), WIDTH=call.top_k, ROWS=16, COLS=TILE,
            LATER=first > 0,
        )  # fmt: skip
    return ages
