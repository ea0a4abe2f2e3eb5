"""Transformer-XL: a whole input at once gives what its segments give one after the other."""

import pytest
import torch

from landmark_cli.attention.recurrent import RecurrentMemory, segmented_attention
from landmark_cli.models import register
from tests.closeness import assert_close_norm
from tests.tiny import tiny_baseline

register()

LENGTHS = [(8, 8, 40), (8, 8, 37), (8, 5, 43), (4, 9, 30), (8, 8, 8), (8, 8, 3), (8, 20, 17), (1, 3, 6)]


@pytest.mark.parametrize(("segment", "memory", "tokens"), LENGTHS, ids=str)
def test_attention_sees_the_segment_and_the_memory_before_it(segment, memory, tokens):
    """Against one softmax over the whole input under a mask; no gradient through the memory."""
    q, k, v = (torch.randn(2, heads, tokens, 16, requires_grad=True) for heads in (4, 2, 2))
    out = segmented_attention(q, k, v, segment, memory, 0.3)
    i, j = torch.arange(tokens)[:, None], torch.arange(tokens)[None]
    begin = i // segment * segment
    own, past = (j >= begin) & (j <= i), (j < begin) & (j >= begin - memory)
    keys, values = (x.repeat_interleave(2, 1) for x in (k, v))

    def scores(keys):
        return torch.einsum("bhqd,bhkd->bhqk", q, keys) * 0.3

    logits = torch.where(own, scores(keys), torch.where(past, scores(keys.detach()), -torch.inf))
    weights = logits.softmax(-1)
    expected = torch.where(own, weights, 0) @ values + torch.where(past, weights, 0) @ values.detach()
    assert_close_norm(out, expected)
    dout = torch.randn_like(out)
    for a, b in zip(*(torch.autograd.grad(x, [q, k, v], dout) for x in (out, expected)), strict=True):
        assert_close_norm(a, b)


@pytest.mark.parametrize(("segment", "memory", "tokens"), LENGTHS[:5], ids=str)
def test_a_model_reads_all_at_once_what_it_reads_in_segments(segment, memory, tokens):
    model = tiny_baseline(memory_length=memory, segment_length=segment)
    ids = torch.randint(0, 39, (2, tokens))
    at_once = model(ids).logits
    in_turn = model(ids, recurrent_memory=RecurrentMemory(memory)).logits
    assert_close_norm(at_once, in_turn)
    weights = list(model.parameters())
    for a, b in zip(*(torch.autograd.grad(x.square().sum(), weights) for x in (at_once, in_turn)), strict=True):
        assert_close_norm(a, b)


def test_it_compiles_in_one_graph():
    model = tiny_baseline(memory_length=8, segment_length=8)
    ids = torch.randint(0, 39, (2, 27))
    compiled = torch.compile(lambda ids: model(ids).logits, fullgraph=True, backend="aot_eager")
    assert_close_norm(compiled(ids), model(ids).logits)
