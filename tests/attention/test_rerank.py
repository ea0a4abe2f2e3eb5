"""Landmarks propose blocks, and the text of these blocks decides which are read, and a temperature how much of each."""

from dataclasses import replace

import pytest
import torch

from landmark_cli.attention.cache import BlockCache, RetrievalSettings, Trace
from landmark_cli.attention.rerank import sharpened
from landmark_cli.attention.rotary import rotate, rotation_table
from tests.attention.test_joint_reading import DIM, FREQUENCIES, HEADS, KEY_HEADS, SIZE, read, stream
from tests.closeness import assert_close_norm

# Absolute positions, so that every block is where the stream has it.
SETTINGS = RetrievalSettings(SIZE, 2, positions="absolute", joint=True)
CHUNKS = [44, 9]


def traced(settings, chunks=CHUNKS):
    """What the definition gives for the last chunk of a stream, with the ages and the shares of what it retrieved."""
    cache = BlockCache(settings, FREQUENCIES)
    cache.trace = Trace()
    out = read(cache, *stream(sum(chunks), seed=1), chunks)[:, :, -chunks[-1] :]
    ages, shares, _ = cache.trace.layers[0]
    return out, ages, shares


def text_logits():
    """Of the last chunk's queries: (1, HEADS, 9, 11, SIZE - 1) logits of the text of the blocks before it."""
    q, k, _ = stream(sum(CHUNKS), seed=1)
    q, k = (rotate(x, *rotation_table(torch.arange(sum(CHUNKS)), FREQUENCIES)) for x in (q, k))
    k = k.repeat_interleave(HEADS // KEY_HEADS, dim=1)[:, :, : CHUNKS[0]]
    logits = q[:, :, CHUNKS[0] :] @ k.transpose(-1, -2) * DIM**-0.5
    return logits.unflatten(-1, (-1, SIZE))[..., :-1]


@pytest.mark.parametrize("proposed", [11, 30])
def test_of_all_blocks_those_are_read_whose_text_has_most_of_the_attention(proposed):
    _, ages, _ = traced(replace(SETTINGS, rerank_blocks=proposed))
    best = text_logits().logsumexp(-1).topk(2).indices
    assert torch.equal(ages.sort(-1).values, (11 - best).sort(-1).values)
    _, by_landmark, _ = traced(SETTINGS)
    assert not torch.equal(ages, by_landmark)


def test_landmarks_propose():
    """Of five that they propose, which would be read if so many were."""
    _, ages, _ = traced(replace(SETTINGS, rerank_blocks=5))
    _, proposed, _ = traced(replace(SETTINGS, top_k=5))
    text = text_logits().logsumexp(-1)
    best = text.gather(-1, 11 - proposed).topk(2).indices
    assert torch.equal(ages.sort(-1).values, proposed.gather(-1, best).sort(-1).values)


@pytest.mark.parametrize("positions", ["absolute", "bounded"])
def test_as_many_as_are_read_change_nothing(positions):
    settings = replace(SETTINGS, positions=positions)
    expected = traced(settings)
    for found in (traced(replace(settings, rerank_blocks=count)) for count in (1, 2)):
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_near_and_far_blocks_are_compared_where_landmarks_are():
    """With bounded positions the newest two stand in their places, and all older ones directly before these."""
    settings = replace(SETTINGS, positions="bounded", rerank_blocks=11)
    _, ages, _ = traced(settings)
    (q, k, _), tokens = stream(sum(CHUNKS), seed=1), torch.arange(CHUNKS[1])
    k = k.repeat_interleave(HEADS // KEY_HEADS, dim=1)[:, :, : CHUNKS[0]].unflatten(2, (-1, SIZE))
    k = rotate(k, *rotation_table(torch.arange(SIZE), FREQUENCIES))[..., :-1, :]
    counts = []
    for age in range(1, 12):
        turned = rotate(q[:, :, CHUNKS[0] :], *rotation_table(min(age, 3) * SIZE + tokens, FREQUENCIES))
        counts.append((turned @ k[:, :, 11 - age].transpose(-1, -2) * DIM**-0.5).logsumexp(-1))
    best = torch.stack(counts, dim=-1).topk(2).indices + 1
    assert torch.equal(ages.sort(-1).values, best.sort(-1).values)


@pytest.mark.parametrize("temperature", [0.3, 0.8, 1.0, 2.5])
def test_the_best_block_keeps_its_logit_and_the_others_are_sharpened(temperature):
    settings = replace(SETTINGS, top_k=4)
    plain, ages, shares = traced(settings)
    _, same, found = traced(replace(settings, block_temperature=temperature))
    assert torch.equal(ages, same)
    # Beside what is read besides: 1 - sum.
    own = (1 - shares.sum(-1, keepdim=True)).log()
    logits = shares.log()
    best = logits.amax(-1, keepdim=True)
    expected = torch.softmax(torch.cat([own, best + (logits - best) / temperature], -1), -1)[..., 1:]
    assert_close_norm(found, expected, torch.float32)


def test_the_smallest_temperature_leaves_the_best_block_alone():
    out, ages, shares = traced(replace(SETTINGS, top_k=4, block_temperature=0.01))
    assert ((shares.amax(-1) / shares.sum(-1)) > 0.99).float().mean() > 0.9
    best = text_logits().logsumexp(-1).gather(-1, 11 - ages).argmax(-1)
    assert torch.equal(shares.argmax(-1), best)
    assert out.isfinite().all()


def test_where_there_is_no_block_there_is_none_sharpened():
    logits = torch.tensor([[1.0, -torch.inf, 3.0], [-torch.inf] * 3])
    assert torch.equal(sharpened(logits, 0.5), torch.tensor([[-1.0, -torch.inf, 3.0], [-torch.inf] * 3]))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rerank_blocks": 0}, "rerank_blocks is 0; it must be 1 or more"),
        ({"rerank_blocks": 9, "joint": False}, "rerank_blocks is for models whose landmarks only choose blocks"),
        ({"rerank_blocks": 9, "selection": "max_over_heads"}, "goes with selection per_token_and_head"),
        ({"block_temperature": 1e-50}, "block_temperature is 1e-50; it is between 0.01 and 100"),
        ({"block_temperature": float("nan")}, "block_temperature is nan; it is between"),
        ({"block_temperature": float("inf")}, "block_temperature is inf; it is between"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SETTINGS, **changes)
