"""All chunks of a training window at once, against a block cache that reads them one after the other, and against
finite differences."""

import dataclasses
import itertools
from typing import get_args

import pytest
import torch

from landmark_cli.attention import dispatch, functional
from landmark_cli.attention.cache import Selection
from landmark_cli.attention.dropout import philox_uniform
from landmark_cli.attention.reference import (
    attention_logits,
    landmark_attention,
    masked_logsumexp,
    repeat_heads,
)
from landmark_cli.attention.retrieval_window import _explore, retrieve_window, select_in_window
from tests.attention.windows import CASES, Case
from tests.closeness import assert_close_norm


def attend(case: Case, q, k, v):
    window = case.window()
    return functional.attend_window(case.layer, *case.rotated(window, q, k), v, window, backend="eager")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_window_at_once_is_a_cache_chunk_by_chunk(case, dtype):
    q, k, v = case.tensors(dtype)
    assert_close_norm(attend(case, q, k, v), case.read(q, k, v))


@pytest.mark.parametrize("case", [Case(12), Case(14, batch=2, start=(0, 13)), Case(21, cu_seqlens=(0, 7, 21))], ids=str)
def test_all_blocks_and_one_chunk_are_dense_attention(case):
    whole = dataclasses.replace(case, chunk=24, top_k=100)
    q, k, v = case.tensors(torch.float64)
    window = whole.window()
    bounds = {name: getattr(case, name) and torch.tensor(getattr(case, name)) for name in ("start", "cu_seqlens")}
    q, k = case.rotated(window, q, k)
    expected = landmark_attention(q, k, v, block_size=3, **bounds)
    assert_close_norm(functional.attend_window(1, q, k, v, window), expected)


JOINT_CASES = [
    Case(26, top_k=3, heads=4, key_heads=2),
    Case(26, top_k=20, softcap=1.5),
    Case(26, batch=2, start=(0, 7), selection="max_over_heads"),
    Case(20, batch=2, cu_seqlens=(0, 1, 20, 26, 40), explore=0.5),
    Case(38, layer=0, equal_landmarks=True),
]


def text_read(window, ages):
    """Of each query, (B, H, N, N) bool each: which tokens are text of the blocks that are chosen, and which are text of
    its own chunk up to it."""
    chosen, own = torch.zeros(2, *ages.shape[:3], ages.shape[2], dtype=torch.bool)
    for row, begin, length, first, earlier in window.host_chunks:
        text = torch.arange(length) % window.block_size < window.block_size - 1
        own[row, :, begin : begin + length, begin : begin + length] = text & torch.ones(length, length).tril().bool()
        for head, token in itertools.product(range(ages.shape[1]), range(begin, begin + length)):
            for age in filter(None, ages[row, head, token].tolist()):
                at = int(window.blocks[first + earlier - age, 1])
                chosen[row, head, token, at : at + window.block_size - 1] = True
    return chosen, own


def ordinary_attention(q, k, v, seen, softcap, sinks=None):
    """(out, lse) of one softmax over the keys that are seen, (B, H, N, N) bool, and the sinks; lse is 0 of nothing."""
    logits = attention_logits(q, k, softcap=softcap).masked_fill(~seen, -torch.inf)
    if sinks is not None:
        logits = torch.cat([logits, sinks[:, None, None].expand(*logits.shape[:3], 1)], dim=-1)
        v = torch.nn.functional.pad(v, (0, 0, 0, 1))
    lse = masked_logsumexp(logits)
    lse = lse.masked_fill(lse == -torch.inf, 0.0)
    return torch.exp(logits - lse.unsqueeze(-1)) @ repeat_heads(v, q.shape[1]), lse


@pytest.mark.parametrize("case", JOINT_CASES, ids=str)
def test_joint_text_without_positions_shares_one_ordinary_softmax(case):
    case = dataclasses.replace(case, joint=True)
    window = case.window().unrotated
    q, k, v = leaves = case.tensors(torch.float64)
    sinks = torch.linspace(-1, 2, case.heads).double().requires_grad_()
    given = {"layer": case.layer, "softcap": case.softcap}
    chosen, own = text_read(window, select_in_window(q, k, window, **given).expand(*q.shape[:3], -1))

    out, lse = retrieve_window(q, k, v, window, **given)
    found = out, lse.masked_fill(lse == -torch.inf, 0.0)
    expected = ordinary_attention(q, k, v, chosen, case.softcap)
    assert_close_norm(found, expected)
    upstream = [torch.randn_like(x) for x in found]
    assert_close_norm(*(torch.autograd.grad(x, leaves, upstream) for x in (found, expected)))

    found = functional.attend_window(case.layer, q, k, v, window, softcap=case.softcap, sinks=sinks)
    expected, _ = ordinary_attention(q, k, v, chosen | own, case.softcap, sinks)
    assert_close_norm(found, expected)
    assert_close_norm(*(torch.autograd.grad(x, [*leaves, sinks], upstream[0]) for x in (found, expected)))


GRADIENT_CASES = [
    Case(15, dim=4),
    Case(14, dim=4, chunk=3, top_k=1, batch=2, heads=4, key_heads=2),
    Case(15, dim=4, layer=0, equal_landmarks=True, heads=1),
    Case(14, dim=4, batch=2, start=(5, 0), heads=1),
    Case(15, dim=4, cu_seqlens=(0, 4, 15), heads=1),
    Case(15, dim=4, selection="max_over_heads"),
    Case(14, dim=4, selection="max_over_query_heads", heads=4, key_heads=2),
    Case(15, dim=4, selection="max_over_tokens"),
    Case(18, dim=4, chunk=3, explore=0.5, heads=1),
    Case(15, dim=4, joint=True),
    Case(14, dim=4, batch=2, start=(5, 0), selection="max_over_heads", joint=True),
]


@pytest.mark.parametrize("case", GRADIENT_CASES, ids=str)
def test_gradients_are_those_of_finite_differences(case):
    window = case.window()
    q, k, v = case.tensors(torch.float64)
    q, k = (x.detach().requires_grad_() for x in case.rotated(window, q, k))

    def both(q, k, v):
        out, lse = retrieve_window(q, k, v, window, layer=case.layer)
        return out, lse[lse > -torch.inf], functional.attend_window(case.layer, q, k, v, window)

    assert torch.autograd.gradcheck(both, (q, k, v), fast_mode=True)


def test_nothing_to_retrieve_gives_zeros_and_no_gradient_that_is_not_a_number():
    case = Case(14, batch=2, start=(5, 14))
    window = case.window()
    q, k, v = case.tensors()
    out, lse = retrieve_window(q, k, v, window, layer=1)
    first = (window.chunk_of < 0) | (window.chunks[window.chunk_of.long(), 4] == 0)
    assert first.any() and not first.all()
    assert torch.equal(lse == -torch.inf, first[:, None].expand_as(lse))
    assert (out[first[:, None].expand_as(lse)] == 0).all()
    read = functional.attend_window(1, q, k, v, window)
    assert (read.transpose(1, 2)[window.chunk_of < 0] == 0).all()
    for gradient in torch.autograd.grad(read.sum(), (q, k, v)):
        assert gradient.isfinite().all()
        assert (gradient[1] == 0).all() and (gradient[0] != 0).any()


def test_what_is_not_selected_gets_no_gradient():
    case = Case(24, chunk=3, top_k=1, heads=1)
    window = case.window()
    q, k, v = case.tensors()
    k.data[:, :, 2] = 9 * q.data[:, :, -1] / q.data[:, :, -1].norm()
    out, lse = retrieve_window(q, k, v, window, layer=1)
    by_key, by_value = torch.autograd.grad(out[:, :, -1].sum() + lse[:, :, -1].sum(), (k, v))
    touched = by_key[0, 0].view(8, 3, -1).norm(dim=-1) > 0
    assert touched.any(-1).sum() == 1 and touched.all(-1).sum() == 1
    assert torch.equal(touched[:, :2], by_value[0, 0].view(8, 3, -1).norm(dim=-1)[:, :2] > 0)
    # A landmark's value is never used.
    assert (by_value[0, 0, 2::3] == 0).all()


def chosen_blocks(case: Case, **changes) -> torch.Tensor:
    """(B, H, N, blocks) bool: which blocks reach each query, told by the gradients of their values."""
    case = dataclasses.replace(case, **changes)
    window = case.window()
    q, k, v = case.tensors(torch.float64)
    q, k = case.rotated(window, q, k)
    # Values that say which block they are of: its share of the output is then that block's share.
    v = torch.eye(case.tokens // case.block_size, dtype=torch.float64).repeat_interleave(case.block_size, 0)
    v = torch.nn.functional.pad(v, (0, 0, 0, case.tokens - len(v)))
    out = []
    for part in v.split(case.dim, dim=-1):
        part = torch.nn.functional.pad(part, (0, case.dim - part.shape[-1]))
        part = part.expand(case.batch, case.key_heads, -1, -1)
        out.append(retrieve_window(q, k, part, window, layer=case.layer)[0])
    return torch.cat(out, -1)[..., : case.tokens // case.block_size] > 0


@pytest.mark.parametrize("selection", get_args(Selection))
def test_exploring_replaces_the_last_choice_as_often_as_asked(selection):
    case = Case(120, top_k=2, selection=selection, dim=20)
    plain = chosen_blocks(case)
    assert torch.equal(chosen_blocks(case, explore=1e-9), plain)
    always, often = chosen_blocks(case, explore=1.0), chosen_blocks(case, explore=0.3)
    window = case.window()
    earlier = window.chunks[window.chunk_of.long(), 4][:, None].expand(plain.shape[:3])
    assert torch.equal(always.sum(-1), plain.sum(-1)) and torch.equal(often.sum(-1), plain.sum(-1))
    free = earlier > case.top_k
    assert torch.equal(always[~free], plain[~free])
    kept, new = plain & always, always & ~plain
    # One of two choices stays and the other is always new.
    assert (kept[free].sum(-1) == 1).all() and (new[free].sum(-1) == 1).all()
    changed = (often != plain).any(-1)[free].float().mean().item()
    assert 0.1 < changed < 0.5
    # A new block is any of the earlier ones: over many queries, all of them.
    last = always[:, :, case.tokens // 2 :].flatten(0, 2)
    assert last.any(0)[: int(earlier.max())].float().mean() > (0.8 if selection == "per_token_and_head" else 0.3)


@pytest.mark.parametrize("case", [case for case in CASES if case.top_k and case.tokens > case.chunk], ids=str)
def test_a_selection_that_is_given_is_read(case):
    q, k, v = case.tensors()
    window = case.window()
    q, k = case.rotated(window, q, k)
    ages = select_in_window(q, k, window, layer=case.layer)
    expected = retrieve_window(q, k, v, window, layer=case.layer)
    for found, wanted in zip(retrieve_window(q, k, v, window, layer=case.layer, ages=ages), expected, strict=True):
        assert torch.equal(found, wanted)
    # Another one, the newest block alone, gives something else.
    assert not torch.equal(retrieve_window(q, k, v, window, layer=case.layer, ages=ages.clamp(max=1))[1], expected[1])


@pytest.mark.parametrize("selection", get_args(Selection))
def test_choosing_in_even_windows_waits_for_no_device(selection):
    # A device without numbers, which cannot be asked for any.
    case = Case(20, selection=selection, batch=2, explore=0.5)
    window = case.window("meta")
    q, k, _ = case.tensors(device="meta")
    assert window.even and select_in_window(q, k, window).shape[1] == (1 if selection == "max_over_heads" else 2)


@pytest.mark.parametrize("explore", [0.0, 0.5])
def test_query_heads_of_a_key_head_share_their_blocks_and_other_heads_do_not(explore):
    case = Case(120, top_k=3, selection="max_over_query_heads", heads=6, key_heads=2, explore=explore)
    q, k, _ = case.tensors()
    window = case.window()
    ages = select_in_window(*case.rotated(window, q, k), window, layer=1).unflatten(1, (2, 3))
    assert torch.equal(ages, ages[:, :, :1].expand_as(ages)) and not torch.equal(ages[:, 0], ages[:, 1])
    # What they share is what all heads of a model of these alone would.
    alone = dataclasses.replace(case, selection="max_over_heads", heads=3, key_heads=1, explore=0.0)
    for group in range(2) if not explore else ():
        part = q[:, 3 * group : 3 * group + 3], k[:, group : group + 1]
        assert torch.equal(
            select_in_window(*alone.rotated(window, *part), alone.window(), layer=1)[:, 0], ages[:, group, 0]
        )


def test_exploring_replaces_the_worst_of_the_chosen():
    window = Case(120, top_k=3, explore=1.0).window()
    best = torch.tensor([5, 9, 2]).expand(1, 2, 40, 3)
    found = _explore(best, 11, window, 1, (0, 120, 0))
    assert torch.equal(found[..., :2], best[..., :2])
    assert set(found[..., 2].flatten().tolist()) == set(range(1, 12)) - {5, 9, 2}


def test_exploring_draws_the_numbers_that_are_documented():
    case = Case(36, top_k=2, explore=1.0, heads=3, key_heads=3, batch=2)
    plain, found = chosen_blocks(case, explore=0.0), chosen_blocks(case)
    window = case.window()
    for row, head, token in [(0, 0, 20), (1, 2, 35), (1, 1, 13)]:
        earlier = int(window.chunks[int(window.chunk_of[row, token]), 4])
        number = torch.tensor((row * 3 + head) * 36 + token)
        drawn = int(philox_uniform(window.seed_of(1), number, torch.tensor(1)) * 2**24)
        ids = range(earlier - 1, -1, -1)
        free = [block for block in ids if not plain[row, head, token, block]]
        assert found[row, head, token, free[drawn * (earlier - 2) >> 24]]


def test_what_does_not_go_with_a_window_is_refused():
    case = Case(14)
    model = torch.nn.Module()
    model.layer_idx, model.config = 1, None
    given = [*case.tensors(), None]
    window = case.window()
    attend = dispatch.landmark_attention_forward
    with pytest.raises(ValueError, match="with start"):
        attend(model, *given[:3], torch.ones(1, 14, dtype=torch.bool), landmark_window=window)
    with pytest.raises(ValueError, match="exclude each other"):
        attend(model, *given, landmark_window=window, landmark_layout=dispatch.LandmarkLayout())
    with pytest.raises(ValueError, match="context-miss"):
        attend(model, *given, landmark_window=window, context_miss_key=given[1][:, :, :1])
    with pytest.raises(ValueError, match="sliding_window is 14, shorter than the input of 15"):
        attend(model, *given, landmark_window=window, sliding_window=14)
    assert attend(model, *given, landmark_window=window, sliding_window=15)[0].shape == (1, 14, 2, 8)
