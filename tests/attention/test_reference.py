"""The definition against a loop over queries that follows the paper's words."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from landmark_cli.attention.dropout import group_dropout_scale, philox_uniform
from landmark_cli.attention.reference import landmark_attention
from tests.closeness import assert_close_norm, relative_error


def tensors(batch, heads, key_heads, queries, keys, dim, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, heads, queries, dim), (batch, key_heads, keys, dim), (batch, key_heads, keys, dim)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def by_the_words(q, k, v, landmarks, first=0, miss_key=None, controlled=()):
    """One head: q (Tq, D), k, v (T, D); landmarks: their indices; first: the first real key. Returns (out, lse)."""
    scale, offset = q.shape[-1] ** -0.5, len(k) - len(q)
    out, lse = torch.zeros_like(q), torch.full((len(q),), -math.inf, dtype=q.dtype)
    for row in range(len(q)):
        i = row + offset
        if i < first:
            continue
        blocks, begin = [], first
        for end in [x for x in landmarks if first <= x < i]:
            blocks.append((begin, end))
            begin = end + 1
        own = [j for j in range(begin, i + 1) if j not in landmarks]

        def logit(j, row=row):
            return math.exp(q[row] @ k[j] * scale)

        free = [block for block in blocks if block[1] not in controlled]
        held = [block for block in blocks if block[1] in controlled]
        miss = math.exp(q[row] @ miss_key * scale) if miss_key is not None else 0.0
        total = sum(logit(j) for j in own) + sum(logit(end) for _, end in free) + miss
        if total == 0:
            continue
        lse[row] = math.log(total)
        shares = [(block, logit(block[1]) / total) for block in free]
        held_total = sum(logit(end) for _, end in held)
        shares += [(block, miss / total * logit(block[1]) / held_total) for block in held]
        for j in own:
            out[row] += logit(j) / total * v[j]
        for (start, end), share in shares:
            inner = sum(logit(j) for j in range(start, end))
            for j in range(start, end):
                out[row] += share * logit(j) / inner * v[j]
    return out, lse


@given(st.integers(1, 30), st.integers(2, 9), st.integers(0, 12), st.integers(1, 2), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_even_blocks_padding_and_query_offset(length, block_size, padding, group, seed):
    queries = 1 + seed % length
    padding = min(padding, length - 1)
    q, k, v = tensors(2, 2, 2 // group, queries, length, 4, seed)
    start = torch.tensor([0, padding])
    out, lse = landmark_attention(q, k, v, block_size=block_size, start=start, return_lse=True)
    for b in range(2):
        landmarks = [j for j in range(int(start[b]), length) if (j - int(start[b])) % block_size == block_size - 1]
        for h in range(2):
            expected, expected_lse = by_the_words(q[b, h], k[b, h // group], v[b, h // group], landmarks, int(start[b]))
            assert_close_norm(out[b, h], expected)
            # Of logits whose sum is as good as 1 the logarithm is nothing but rounding.
            assert_close_norm(lse[b, h].exp(), expected_lse.exp())


@given(st.integers(1, 25), st.floats(0.1, 0.6), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_uneven_landmarks(length, density, seed):
    q, k, v = tensors(1, 1, 1, length, length, 4, seed)
    mask = torch.rand(length, generator=torch.Generator().manual_seed(seed)) < density
    # A landmark needs a text token to close: none first, no two in a row.
    mask[0] = False
    for i in range(1, length):
        mask[i] &= not mask[i - 1]
    out = landmark_attention(q, k, v, landmark_mask=mask[None])
    expected, _ = by_the_words(q[0, 0], k[0, 0], v[0, 0], mask.nonzero().flatten().tolist())
    assert_close_norm(out[0, 0], expected)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=4), st.integers(2, 6))
@settings(max_examples=30, deadline=None)
def test_packed_documents_do_not_see_each_other(lengths, block_size):
    q, k, v = tensors(1, 2, 1, sum(lengths), sum(lengths), 4)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    packed = landmark_attention(q, k, v, block_size=block_size, cu_seqlens=bounds)
    alone = [
        landmark_attention(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], block_size=block_size)
        for a, b in zip(bounds[:-1], bounds[1:], strict=True)
    ]
    assert_close_norm(packed, torch.cat(alone, dim=2))


@given(st.integers(1, 25), st.integers(2, 6), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_context_miss_token_and_controlled_landmarks(length, block_size, seed):
    q, k, v = tensors(1, 1, 1, length, length, 4, seed)
    generator = torch.Generator().manual_seed(seed)
    miss = torch.randn(1, 1, 1, 4, generator=generator, dtype=torch.float64)
    controlled = torch.rand(1, length, generator=generator) < 0.5
    landmarks = [j for j in range(length) if j % block_size == block_size - 1]
    out, lse = landmark_attention(
        q, k, v, block_size=block_size, context_miss_key=miss, controlled=controlled, return_lse=True
    )
    held = [j for j in landmarks if controlled[0, j]]
    expected, expected_lse = by_the_words(q[0, 0], k[0, 0], v[0, 0], landmarks, 0, miss[0, 0, 0], held)
    assert_close_norm(out[0, 0], expected)
    assert_close_norm(lse[0, 0].exp(), expected_lse.exp())


@pytest.mark.parametrize(
    "options",
    [
        {"block_size": 3},
        {"block_size": 3, "start": torch.tensor([0, 4])},
        {"block_size": 3, "dropout_p": 0.4, "dropout_seed": 7},
        {"landmark_mask": torch.tensor([[0, 1, 0, 0, 0, 1, 0], [0, 0, 0, 1, 0, 1, 0]], dtype=torch.bool)},
    ],
    ids=["even", "padded", "dropout", "uneven"],
)
def test_gradients(options):
    inputs = [x.requires_grad_() for x in tensors(2, 2, 1, 7, 7, 3)]
    assert torch.autograd.gradcheck(lambda *x: landmark_attention(*x, return_lse=False, **options), inputs)


def over_text_alone(q, k, v, landmark, document, softcap=None, sinks=None):
    """(out, lse) of causal attention over text, row by row and head by head, by torch's own: no landmark is a key.

    q: (B, H, Tq, D); k, v: (B, G, T, D); landmark, (B, T), bool, and document, (B, T), -1 on padding. A bound of the
    logits becomes a bias, a sink a key without a value.
    """
    offset, scale, group = k.shape[2] - q.shape[2], q.shape[-1] ** -0.5, q.shape[1] // k.shape[1]
    index = torch.arange(k.shape[2])
    rows, row_lse = [], []
    for b in range(len(q)):
        text = index[~landmark[b]]
        seen = (text <= index[offset:, None]) & (document[b, text] == document[b, offset:, None])
        seen &= document[b, text] >= 0
        heads, head_lse = [], []
        for h in range(q.shape[1]):
            keys, values = k[b, h // group, text], v[b, h // group, text]
            bias = torch.zeros(seen.shape, dtype=q.dtype)
            if softcap is not None:
                logits = q[b, h] @ keys.T * scale
                bias = softcap * torch.tanh(logits / softcap) - logits
            bias = bias.masked_fill(~seen, -math.inf)
            if sinks is not None:
                keys, values = (torch.cat([x, torch.zeros_like(x[:1])]) for x in (keys, values))
                bias = torch.cat([bias, sinks[h].expand(len(bias), 1)], dim=1)
            # Rows that see nothing attend to everything, and are left out of what comes of it.
            blind = (bias == -math.inf).all(1)
            bias = bias.masked_fill(blind[:, None], 0.0)
            found = scaled_dot_product_attention(q[b, h][None], keys[None], values[None], bias[None], scale=scale)[0]
            heads.append(found.masked_fill(blind[:, None], 0.0))
            lse = torch.logsumexp(q[b, h] @ keys.T * scale + bias, dim=1)
            head_lse.append(lse.masked_fill(blind, -math.inf))
        rows.append(torch.stack(heads))
        row_lse.append(torch.stack(head_lse))
    return torch.stack(rows), torch.stack(row_lse)


def assert_is_over_text_alone(inputs, sinks, options, landmark, document):
    """Outputs, log-sum-exps and gradients of both."""
    leaves = [x.clone().requires_grad_() for x in inputs if x is not None]
    sinks = None if sinks is None else sinks.clone().requires_grad_()
    found = landmark_attention(*leaves, sinks=sinks, joint=True, return_lse=True, **options)
    expected = over_text_alone(*leaves, landmark, document, options.get("softcap"), sinks)
    sees = expected[1] > -math.inf
    weights = [torch.randn_like(x) for x in expected]
    leaves += [] if sinks is None else [sinks]
    gradients = [
        torch.autograd.grad((out * weights[0]).sum() + (lse[sees] * weights[1][sees]).sum(), leaves)
        for out, lse in (found, expected)
    ]
    assert_close_norm(found, expected)
    assert_close_norm(*gradients)
    for gradient in gradients[0][1:3]:
        assert (gradient.transpose(1, 2)[landmark] == 0).all()


@given(
    st.integers(1, 30),
    st.integers(2, 9),
    st.integers(0, 12),
    st.integers(1, 2),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**31),
)
@settings(max_examples=40, deadline=None)
def test_joint_is_plain_attention_over_text(length, block_size, padding, group, capped, sunk, seed):
    """Blocks are even, rows padded or not, and the queries the last so many: text and landmarks."""
    padding = min(padding, length - 1)
    torch.manual_seed(seed)
    inputs = tensors(2, 2, 2 // group, 1 + seed % length, length, 4, seed)
    start = torch.tensor([0, padding])
    index = torch.arange(length) - start[:, None]
    options = {"block_size": block_size, "start": start, "softcap": 0.7 if capped else None}
    sinks = torch.randn(2, dtype=torch.float64) if sunk else None
    document = torch.where(index >= 0, 0, -1)
    assert_is_over_text_alone(inputs, sinks, options, (index >= 0) & (index % block_size == block_size - 1), document)


@given(st.integers(1, 25), st.floats(0.1, 0.6), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_joint_with_uneven_landmarks(length, density, seed):
    torch.manual_seed(seed)
    landmark = torch.rand(2, length) < density
    landmark[:, 0] = False
    inputs = tensors(2, 2, 1, 1 + seed % length, length, 4, seed)
    options = {"landmark_mask": landmark}
    assert_is_over_text_alone(inputs, None, options, landmark, torch.zeros(2, length, dtype=torch.long))


@given(st.lists(st.integers(1, 12), min_size=1, max_size=4), st.integers(2, 6), st.booleans())
@settings(max_examples=30, deadline=None)
def test_joint_in_packed_documents(lengths, block_size, sunk):
    inputs = tensors(1, 2, 1, sum(lengths), sum(lengths), 4)
    landmark = torch.cat([torch.arange(n) % block_size == block_size - 1 for n in lengths])[None]
    document = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None]
    options = {"block_size": block_size, "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0)}
    sinks = torch.tensor([-1.0, 2.0], dtype=torch.float64) if sunk else None
    assert_is_over_text_alone(inputs, sinks, options, landmark, document)


def test_joint_is_not_the_grouped_softmax():
    inputs = tensors(1, 2, 2, 40, 40, 8)
    grouped, joint = (landmark_attention(*inputs, block_size=7, joint=joint) for joint in (False, True))
    assert_close_norm(joint[:, :, :7], grouped[:, :, :7])
    assert relative_error(joint, grouped) > 0.1


def test_weights_sum_to_one():
    q, k, v = tensors(1, 2, 2, 40, 40, 8)
    out = landmark_attention(q, k, torch.ones_like(v), block_size=7)
    assert_close_norm(out, torch.ones_like(out))


def test_group_dropout_drops_whole_blocks_and_keeps_the_mean():
    q, k, v = tensors(1, 4, 4, 64, 64, 8)
    plain = landmark_attention(q, k, v, block_size=8)
    dropped = [landmark_attention(q, k, v, block_size=8, dropout_p=0.5, dropout_seed=seed) for seed in range(400)]
    assert_close_norm(dropped[3], landmark_attention(q, k, v, block_size=8, dropout_p=0.5, dropout_seed=3))
    assert relative_error(dropped[0], dropped[1]) > 0.1
    mean = torch.stack(dropped).mean(0)
    assert (mean - plain).abs().max() < 0.35
    assert_close_norm(mean[:, :, :8], plain[:, :, :8])


def test_philox_is_the_published_generator():
    # Known answer of Philox 4x32-10 for an all-zero counter and key: first word 0x6627e8d5.
    assert philox_uniform(0, torch.tensor(0), torch.tensor(0)).item() == (0x6627E8D5 >> 8) / 2**24
    uniform = philox_uniform(5, torch.arange(1000)[:, None], torch.arange(50))
    assert abs(uniform.mean() - 0.5) < 0.01 and uniform.min() >= 0 and uniform.max() < 1
    scale = group_dropout_scale(5, 0.3, (1, 1, 1000), torch.arange(50)[None])
    assert abs((scale == 0).float().mean() - 0.3) < 0.01
    assert abs(scale.mean() - 1) < 0.02


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_size": 1}, "block_size is 1"),
        ({"block_size": None}, "either block_size or landmark_mask"),
        ({"k": torch.zeros(1, 3, 6, 4), "v": torch.zeros(1, 3, 6, 4)}, "not a multiple of the 3 key heads"),
        ({"v": torch.zeros(1, 2, 5, 4)}, "k and v differ in shape"),
        ({"k": torch.zeros(1, 2, 5, 4), "v": torch.zeros(1, 2, 5, 4)}, "at most k's 5"),
        ({"q": torch.zeros(1, 2, 0, 4)}, "at least one"),
        ({"q": torch.zeros(1, 2, 6, 4, dtype=torch.float16)}, "differ in dtype"),
        ({"q": torch.zeros(2, 2, 6, 4)}, "differ in batch"),
        ({"dropout_p": 1.0}, "dropout_p is 1.0"),
        ({"dropout_p": 0.5}, "needs dropout_seed"),
        ({"joint": True, "dropout_p": 0.5, "dropout_seed": 1}, "joint and dropout_p exclude each other"),
        ({"joint": True, "context_miss_key": torch.zeros(1, 2, 1, 4)}, "joint and context_miss_key exclude each other"),
        ({"cu_seqlens": torch.tensor([0, 4])}, "must rise from 0 to the 6 keys"),
        ({"cu_seqlens": torch.tensor([0, 6]), "start": torch.tensor([0])}, "exclude each other"),
    ],
)
def test_errors_name_the_argument(change, message):
    arguments = {name: torch.zeros(1, 2, 6, 4) for name in "qkv"} | {"block_size": 3} | change
    with pytest.raises(ValueError, match=message):
        landmark_attention(**arguments)
