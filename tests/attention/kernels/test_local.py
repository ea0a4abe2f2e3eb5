"""The Triton kernels of layers with a sliding window, interpreted on the CPU, give what the definition gives: outputs
and gradients, chunk after chunk, and as operators of PyTorch."""

import itertools

import pytest
import torch

from landmark_cli.attention import backends, local, local_operators
from landmark_cli.attention.backends import Problem, choose
from landmark_cli.attention.cache import BlockCache, RetrievalSettings
from landmark_cli.attention.kernels.common.configuration import Configuration
from landmark_cli.attention.kernels.hopper import support
from landmark_cli.attention.kernels.local import configurations, launch
from landmark_cli.attention.kernels.local.configurations import Choices
from landmark_cli.attention.kernels.local.places import places_of
from landmark_cli.attention.local_operators import local_attention, local_attention_backward
from landmark_cli.attention.rotary import default_inverse_frequencies
from tests.attention.sliding import CASES, READINGS, Case, agreement
from tests.closeness import assert_close_norm

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore:divide by zero encountered in log2"),
]


@pytest.fixture
def tiles(monkeypatch):
    """Sets the tiles' rows and keys: the interpreter's own are large, for it needs the same time for any size."""
    return lambda rows, cols: monkeypatch.setattr(launch, "choices", lambda *_: Choices([Configuration(rows, cols)]))


@pytest.fixture
def forwards(forwards_of):
    return forwards_of(launch)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_and_gradients(case, tiles, forwards):
    tiles(32, 32)
    for a, b in agreement(case).values():
        assert_close_norm(a, b)
    assert len(forwards) == 1


@pytest.mark.parametrize(("rows", "cols"), [(64, 16), (16, 64)])
def test_tiles_of_other_sizes(rows, cols, tiles):
    tiles(rows, cols)
    for a, b in agreement(Case(21, 90, batch=2, cu_seqlens=(0, 40, 90, 180))).values():
        assert_close_norm(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit(dtype):
    for a, b in agreement(Case(16, 70, dim=32, softcap=2.0, sinks=True, rotary=0), dtype).values():
        assert_close_norm(a, b, dtype)


@pytest.mark.parametrize("case", READINGS, ids=str)
def test_chunk_after_chunk(case, forwards):
    found, expected = case.read("triton"), case.read("eager")
    for a, b in zip(found[:-3], expected[:-3], strict=True):
        assert_close_norm(a, b)
    assert all(torch.equal(a, b) for a, b in zip(found[-3:], expected[-3:], strict=True))
    assert len(forwards) == len(case.chunks)


@pytest.mark.parametrize("block_size", [2, 5, 64])
@pytest.mark.parametrize("window", [1, 6, 40])
def test_places_are_those_of_the_definition(window, block_size):
    """Rows in different phases, padded, resting, and longer than what is held."""
    frequencies = default_inverse_frequencies(8)
    cache = BlockCache(RetrievalSettings(block_size, 2), frequencies, batch=3)
    for lengths in ((12, 4, 0), (1, 9, 3), (1, 0, 1), (70, 2, 30)):
        chunk = cache.begin_chunk(lengths)
        found = places_of(chunk, window - 1, block_size, frequencies)
        expected = local._ChunkPlaces(chunk, window - 1, block_size)
        for name in ("text", "first", "source"):
            assert torch.equal(getattr(found, name), getattr(expected, name).to(getattr(found, name).dtype)), name
        for ours, theirs in zip(found[3:], expected.tables(frequencies), strict=True):
            assert all(torch.equal(a, b.squeeze(1)) for a, b in zip(ours, theirs, strict=True))
        cache.end_chunk(chunk)


def test_what_is_not_seen_is_not_touched(tiles):
    """Keys before the window, and landmarks, may be anything at all; walking over them would show as NaN."""
    tiles(16, 16)
    case = Case(6, 100, heads=1, rotary=0)
    q, k, v = (x.detach() for x in case.leaves())
    expected = case.attend(q, k, v, backend="triton")
    k[:, :, 4::5], v[:, :, 4::5] = 1e4, 1e4
    k[:, :, :64], v[:, :, :64] = torch.nan, torch.nan
    text = torch.arange(100) % 5 < 4
    found = case.attend(q, k, v, backend="triton")[:, :, 80:]
    assert_close_norm(found[:, :, text[80:]], expected[:, :, 80:][:, :, text[80:]])


@pytest.mark.parametrize("offset", [0, 17])
def test_a_query_sees_itself_in_any_case(offset, tiles):
    """Outputs and all gradients of queries whose first key would come behind them: each sees itself and the sink."""
    tiles(16, 16)
    q, k, v, sinks = Case(1, 40, sinks=True).leaves()
    q = q.detach()[:, :, offset:].requires_grad_()
    first = torch.full((1, 40 - offset), 40, dtype=torch.int32)
    found = local_operators.attend(q, k, v, first, torch.ones(1, 40, dtype=torch.bool), backend="triton", sinks=sinks)
    own_k, own_v = k[:, :, offset:], v[:, :, offset:]
    logit = (q * own_k).sum(-1, keepdim=True) * q.shape[-1] ** -0.5
    expected = torch.sigmoid(logit - sinks[:, None, None]) * own_v
    assert_close_norm(found, expected)
    dout, leaves = torch.randn_like(expected), (q, k, v, sinks)
    for a, b in zip(*(torch.autograd.grad(x, leaves, dout) for x in (found, expected)), strict=True):
        assert_close_norm(a, b)


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("forget", ["reset", "forget", "put"])
def test_nothing_of_a_text_that_overflowed_is_left(forget, backend):
    """What a row held does not reach the text that takes its place, not even as 0 times nan."""
    frequencies, generator = default_inverse_frequencies(8), torch.Generator().manual_seed(0)
    long, short, later = ([torch.randn(2, n, t, 16, generator=generator) for n in (2, 1, 1)] for t in (15, 6, 6))

    def attend(cache, made):
        chunk = cache.begin_chunk([made[0].shape[2]] * 2)
        out = local.attend_chunk(*made, cache.window(0, made[1], 9), chunk, frequencies, backend=backend)
        cache.end_chunk(chunk)
        return out

    def make():
        return BlockCache(RetrievalSettings(5, 2), frequencies, batch=2)

    fresh, cache = make(), make()
    attend(cache, [x.index_fill(0, torch.tensor(1), torch.nan) for x in long])
    if forget == "put":
        attend(fresh, short)
        cache.put(1, fresh.copy_of(1), fresh.host_blocks[1], fresh.host_tail[1])
    elif forget == "forget":
        for row in range(2):
            cache.forget(row)
    else:
        cache.reset()
    assert_close_norm(attend(cache, later)[1], attend(fresh, later)[1])


def test_the_same_bits_every_time():
    case = Case(16, 40, heads=4, key_heads=2, softcap=2.0, sinks=True)
    leaves = case.leaves()
    runs = [torch.autograd.grad(case.attend(*leaves, backend="triton").sum(), leaves) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_the_output_lies_as_the_next_layer_wants_it():
    leaves = Case(7, 40).leaves()
    out = Case(7, 40).attend(*leaves, backend="triton")
    assert out.transpose(1, 2).is_contiguous()


def operands(case: Case) -> tuple:
    q, k, v, *sinks = case.leaves()
    places = local.text_places(case.tokens, q.device, block_size=case.block_size)
    seen = local.first_seen(places, case.window), places.text
    return q, k, v, (sinks or [None])[0], *seen


@pytest.mark.parametrize("more", [{}, {"softcap": 2.0, "sinks": True}], ids=["", "softcap and sinks"])
def test_opcheck(more):
    case = Case(7, 20, **more)
    *leaves, first, text = operands(case)
    settings = first, text, 0.25, case.softcap, "triton"
    torch.library.opcheck(local_attention, (*leaves, *settings))
    leaves = [None if x is None else x.detach() for x in leaves]
    out, lse = local_attention(*leaves, *settings)
    torch.library.opcheck(local_attention_backward, (torch.randn_like(out), *leaves, out, lse, *settings))


def test_compiles_in_one_graph():
    case = Case(7, 30, softcap=2.0, sinks=True)
    leaves = case.leaves()

    def attend(q, k, v, sinks, backend):
        given = {"block_size": 5, "frequencies": case.frequencies, "softcap": 2.0, "sinks": sinks, "backend": backend}
        return local.attend_input(q * 2, k, v, 7, **given) + 1

    found = torch.compile(attend, fullgraph=True, backend="aot_eager")(*leaves, "triton")
    expected = attend(*leaves, "eager")
    assert_close_norm(found, expected)
    for a, b in zip(*(torch.autograd.grad(x.sum(), leaves) for x in (found, expected)), strict=True):
        assert_close_norm(a, b)


def test_second_derivatives_are_refused():
    case = Case(7, 20)
    leaves = case.leaves()
    (dq, *_) = torch.autograd.grad(case.attend(*leaves, backend="triton").square().sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="landmark"):
        dq.sum().backward()


@pytest.mark.parametrize(
    ("words", "given"),
    [
        ("scale is -1", {"scale": -1.0}),
        ("softcap is 0.0; .* positive", {"softcap": 0.0}),
        ("sinks is .* one logit for each head", {"sinks": torch.ones(3)}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_named(words, given):
    q, k, v, _, *seen = operands(Case(7, 20))
    with pytest.raises(ValueError, match=words):
        local_operators.attend(q, k, v, *seen, backend="triton", **given)


GPU = Problem("cuda", torch.bfloat16, 256, None, local=True)


def test_who_serves(monkeypatch, capsys):
    """Blocks and their limits are none of these layers' concern; nothing is said of them."""
    monkeypatch.delenv("LANDMARK_ATTENTION", raising=False)
    monkeypatch.setattr(support, "is_hopper", lambda device: device.startswith("cuda"))
    backends._announce.cache_clear()
    assert choose(GPU) == choose(GPU, "hopper") == choose(GPU._replace(block_size=1000, reading=True)) == "triton"
    assert choose(GPU, "eager") == choose(GPU._replace(dtype=torch.float64)) == "eager"
    assert choose(GPU._replace(reading=True, differentiated=True)) == "eager"
    for name in (choose(GPU._replace(device="cpu")), choose(GPU._replace(device="cpu", reading=True), "blockwise")):
        assert backends.BACKENDS[name].local_forward is None
    with pytest.raises(ValueError, match="head dim 288"):
        choose(GPU._replace(head_dim=288), "triton")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("kernel", ["forward", "query_gradient", "key_gradient"])
def test_there_are_tiles_for_every_head(kernel):
    numbers = ((2, False), (4, False), (4, True))
    rows = configurations.STEP, 64, 128
    for dim, (width, exact), most, shared in itertools.product(
        (16, 64, 128, 256), numbers, rows, (99 << 10, 227 << 10)
    ):
        found = configurations.fitting(kernel, shared, width, exact, dim, most)
        assert found and all(choice.rows <= most and choice.cols <= configurations.COLS for choice in found)
