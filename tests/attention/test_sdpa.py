"""The joint softmax by PyTorch's own attention gives what the definition gives: outputs and gradients."""

import math
import random
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from landmark_cli.attention import backends, sdpa
from landmark_cli.attention.backends import BACKENDS, Problem, choose
from landmark_cli.attention.dispatch import LandmarkLayout, landmark_attention_forward
from landmark_cli.attention.functional import landmark_attention
from landmark_cli.attention.kernels.hopper import support
from landmark_cli.attention.kernels.landmarks import launch
from landmark_cli.attention.operators import attention, attention_backward
from landmark_cli.attention.reference import landmark_attention as eager
from tests.attention.agreement import Case
from tests.closeness import assert_close_norm, tolerance

pytestmark = pytest.mark.usefixtures("poisoned")

CASES = [
    Case(2, 21),
    Case(16, 70, heads=4, key_heads=2, batch=2),
    Case(64, 130, dim=64, heads=3, scale=0.7),
    # One block, a landmark at its end; no landmark at all; an incomplete block that lacks nothing but its landmark.
    Case(16, 16, dim=8, heads=2),
    Case(64, 20, dim=24),
    Case(16, 47, heads=2, key_heads=2, batch=2),
    Case(51, 2),
]

PACKED = [
    # A document of one token, one of none, and an end without a landmark.
    Case(16, 90, heads=4, key_heads=2, cu_seqlens=(0, 1, 35, 35, 80, 90)),
    # All end with a landmark; the first with the only one that it has.
    Case(16, 80, heads=2, scale=0.7, cu_seqlens=(0, 16, 48, 80)),
    # Shorter than a block, one of them by no more than its landmark; boundaries that fill up their number.
    Case(64, 140, dim=64, heads=3, cu_seqlens=(0, 3, 66, 130, 131, 140, 140, 140)),
    # One document.
    Case(7, 40, dim=8, heads=2, key_heads=2, cu_seqlens=(0, 40)),
    Case(2, 9, cu_seqlens=(0, 1, 2, 3, 9)),
]


@pytest.fixture(params=["definition", "kernels"])
def landmarks(request, monkeypatch):
    """Who attends for landmarks: on a CPU the definition does, unless it is the kernels' turn."""
    if request.param == "kernels":
        monkeypatch.setattr(sdpa, "_landmarks", lambda q: launch)
    return request.param


def both(case, dtype=torch.float32, leaves=None, dout=None):
    """[out, dq, dk, dv] of PyTorch's attention, and of the definition in float32."""
    leaves = leaves or case.tensors(dtype, "cpu")
    dout = torch.randn_like(leaves[0]) if dout is None else dout
    given = {"block_size": case.block_size, "scale": case.scale, "joint": True}
    if case.cu_seqlens is not None:
        given["cu_seqlens"] = torch.tensor(case.cu_seqlens)
    out = landmark_attention(*leaves, **given, backend="sdpa")
    assert out.dtype == dtype and out.transpose(1, 2).is_contiguous()
    exact = [x.detach().float().requires_grad_() for x in leaves]
    expected = eager(*exact, **given)
    found = [out, *torch.autograd.grad(out, leaves, dout)]
    return found, [expected, *torch.autograd.grad(expected, exact, dout.float())]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_and_gradients(case, landmarks):
    assert_close_norm(*both(case))


@pytest.mark.parametrize("seed", range(6))
def test_any_shape(seed, landmarks):
    chance = random.Random(seed)
    torch.manual_seed(seed)
    key_heads = chance.choice([1, 2, 3])
    sizes = {"batch": chance.choice([1, 2]), "key_heads": key_heads, "heads": key_heads * chance.choice([1, 2, 3])}
    case = Case(chance.randint(2, 40), chance.randint(2, 180), dim=8 * chance.randint(1, 5), **sizes)
    assert_close_norm(*both(case))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", PACKED, ids=str)
def test_packed_documents(case, dtype):
    # The library forms queries' gradients of logits' gradients that it has rounded, whether rows are packed or not.
    within = 2 * tolerance(dtype) if dtype == torch.bfloat16 else None
    assert_close_norm(*both(case, dtype), within=within)


@pytest.mark.parametrize("seed", range(6))
def test_any_documents(seed):
    chance = random.Random(seed)
    torch.manual_seed(seed)
    tokens, key_heads = chance.randint(20, 180), chance.choice([1, 2, 3])
    ends = sorted(chance.randint(0, tokens) for _ in range(chance.randint(1, 12)))
    sizes = {"key_heads": key_heads, "heads": key_heads * chance.choice([1, 2, 3]), "dim": 8 * chance.randint(1, 5)}
    assert_close_norm(*both(Case(chance.randint(2, 40), tokens, cu_seqlens=(0, *ends, tokens), **sizes)))


def test_documents_of_several_rows():
    """Boundaries count over all rows, of which each begins a document."""
    module = SimpleNamespace(
        layer_idx=0, training=True, config=SimpleNamespace(landmark_freq=6, landmark_softmax="joint")
    )
    leaves = Case(7, 40, batch=3, heads=4, key_heads=2).tensors(torch.float32, "cpu")
    bounds = 0, 13, 40, 47, 61, 80, 120
    layout = LandmarkLayout(cu_seqlens=torch.tensor(bounds, dtype=torch.int32), backend="sdpa")
    out = landmark_attention_forward(module, *leaves, None, landmark_layout=layout)[0].transpose(1, 2)
    expected = torch.zeros_like(out)
    for first, end in pairwise(bounds):
        of_document = first // 40, slice(None), slice(first % 40, (end - 1) % 40 + 1)
        expected[of_document] = eager(*(x[of_document][None] for x in leaves), block_size=7, joint=True)[0]
    dout = torch.randn_like(out)
    assert_close_norm(
        [out, *torch.autograd.grad(out, leaves, dout)], [expected, *torch.autograd.grad(expected, leaves, dout)]
    )


@pytest.mark.parametrize("bounds", [(1, 40), (0, 39), (0, 30, 20, 40)], ids=str)
def test_documents_that_are_none_are_refused(bounds):
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to the 40 keys"):
        both(Case(7, 40, cu_seqlens=bounds))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit(dtype, landmarks):
    found, expected = both(Case(16, 70, dim=32, heads=4, key_heads=2), dtype)
    assert_close_norm(found, expected, dtype)


@pytest.mark.parametrize("rows, cols", [(16, 16), (16, 64), (32, 16)])
def test_tiles_of_other_sizes(rows, cols, monkeypatch):
    monkeypatch.setattr(launch, "ROWS", rows)
    monkeypatch.setattr(launch, "COLS", cols)
    monkeypatch.setattr(sdpa, "_landmarks", lambda q: launch)
    assert_close_norm(*both(Case(5, 207, heads=2, key_heads=1)))


@pytest.mark.parametrize("view", ["heads first", "expanded keys", "expanded gradient"])
def test_strides(view, landmarks):
    case, dout = Case(7, 40, heads=2, key_heads=2), None
    leaves = [x.detach() for x in case.tensors(torch.float32, "cpu")]
    if view == "heads first":
        leaves = [x.contiguous() for x in leaves]
    if view == "expanded keys":
        leaves[1] = leaves[1][:, :1].expand(-1, 2, -1, -1)
    if view == "expanded gradient":
        dout = torch.ones(()).expand_as(leaves[0])
    assert_close_norm(*both(case, leaves=[x.requires_grad_() for x in leaves], dout=dout))


def test_landmarks_are_never_keys(landmarks):
    """Whatever their keys and values are, nothing sees them, and they have no gradient."""
    q, k, v = (x.detach() for x in Case(16, 70, heads=4, key_heads=2).tensors(torch.float32, "cpu"))
    dout, found = torch.randn_like(q), []
    for value in (1.0, math.nan):
        given = [x.clone().requires_grad_() for x in (q, k, v)]
        with torch.no_grad():
            for x in given[1:]:
                x[:, :, 15::16] = value
        out = landmark_attention(*given, 16, joint=True, backend="sdpa")
        found.append([out, *torch.autograd.grad(out, given, dout)])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
    assert all((x[:, :, 15::16] == 0).all() and (x != 0).any() for x in found[0][2:])


def test_the_same_without_gradients():
    case = Case(16, 70, heads=4, key_heads=2)
    q, k, v = case.tensors(torch.float32, "cpu")
    out = landmark_attention(q, k, v, 16, joint=True, backend="sdpa")
    with torch.no_grad():
        assert torch.equal(landmark_attention(q, k, v, 16, joint=True, backend="sdpa"), out)
    assert out.requires_grad


def test_autocast():
    leaves = Case(16, 70, dim=32, heads=2).tensors(torch.float32, "cpu")
    with torch.autocast("cpu", torch.bfloat16):
        out = landmark_attention(*leaves, 16, joint=True, backend="sdpa")
    expected = eager(*leaves, block_size=16, joint=True)
    assert out.dtype == torch.bfloat16
    dout = torch.randn_like(expected)
    found = torch.autograd.grad(out, leaves, dout.bfloat16())
    assert {x.dtype for x in found} == {torch.float32}
    assert_close_norm([out, *found], [expected, *torch.autograd.grad(expected, leaves, dout)], torch.bfloat16)


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_in_one_graph(dynamic, packed):
    def layer(function, q, k, v, **given):
        return function(torch.tanh(q), k, v, block_size=16, joint=True, **given) * 2

    compiled = torch.compile(
        lambda *inputs, **given: layer(landmark_attention, *inputs, backend="sdpa", **given),
        fullgraph=True,
        backend="aot_eager",
        dynamic=dynamic,
    )
    for tokens in (70, 99) if dynamic else (70,):
        leaves = Case(16, tokens, heads=4, key_heads=2).tensors(torch.float32, "cpu")
        given = {"cu_seqlens": torch.tensor([0, 20, tokens - 5, tokens])} if packed else {}
        found, expected = compiled(*leaves, **given), layer(eager, *leaves, **given)
        dout = torch.randn_like(expected)
        assert_close_norm(
            [found, *torch.autograd.grad(found, leaves, dout)], [expected, *torch.autograd.grad(expected, leaves, dout)]
        )


@pytest.mark.parametrize("cu_seqlens", [None, (0, 1, 18, 18, 20)], ids=["whole", "packed"])
@pytest.mark.parametrize("tokens", [70, 20])
def test_opcheck(tokens, cu_seqlens):
    q, k, v = Case(16, tokens, heads=2, key_heads=1).tensors(torch.float32, "cpu")
    bounds = None if cu_seqlens is None else torch.tensor([*cu_seqlens, tokens], dtype=torch.int32)
    settings = 16, 0.25, None, bounds, 0.0, None, None, True, "sdpa"
    torch.library.opcheck(attention, (q, k, v, None, *settings))
    q, k, v = (x.detach() for x in (q, k, v))
    out, lse = attention(q, k, v, None, *settings)
    torch.library.opcheck(attention_backward, (torch.randn_like(out), None, q, k, v, None, out, lse, *settings))


def test_the_log_sum_exp_is_that_of_the_definition(landmarks):
    """Who goes backward in its place goes by it."""
    q, k, v = (x.detach() for x in Case(16, 70, heads=4, key_heads=2).tensors(torch.float32, "cpu"))
    _, lse = sdpa.forward(q, k, v, 16, 0.3)
    assert_close_norm(lse, eager(q, k, v, block_size=16, scale=0.3, joint=True, return_lse=True)[1])


# --- for whom it is

TRAINED = Problem("cuda", torch.bfloat16, 64, 64, joint=True, differentiated=True)


@pytest.fixture
def on_hopper(monkeypatch):
    monkeypatch.delenv("LANDMARK_ATTENTION", raising=False)
    monkeypatch.setattr(support, "is_hopper", lambda device: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    monkeypatch.setattr(backends.sdpa.LIBRARY, "given_up", None)
    backends._announce.cache_clear()


def test_training_on_a_hopper_gpu_runs_it_unasked(on_hopper, capsys):
    assert choose(TRAINED) == "sdpa"
    assert "landmark attention: sdpa (on cuda)" in capsys.readouterr().err
    # Lengths that are read once would each have the library begin anew.
    assert choose(TRAINED._replace(differentiated=False)) == "triton"
    assert choose(TRAINED._replace(joint=False)) == "hopper"


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"packed": True}, "packed documents"),
        ({"padded": True}, "padding"),
        ({"lse": True}, "return_lse"),
        ({"earlier_keys": True}, "more tokens than q"),
        ({"softcap": True}, "softcap"),
        ({"sinks": True}, "sinks"),
        ({"few_queries": True}, "fewer than 256"),
        ({"dtype": torch.float32}, "float32"),
        ({"head_dim": 192}, "head dim 192"),
        ({"block_size": 300}, "block_size is 300"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_it_cannot_serve_runs_triton_or_the_definition_and_says_why(given, reason, on_hopper, capsys):
    problem = TRAINED._replace(**given)
    assert choose(problem) == ("eager" if "block_size" in given else "triton")
    assert reason in capsys.readouterr().err
    with pytest.raises(ValueError, match=reason):
        choose(problem, "sdpa")


@pytest.mark.parametrize(
    ("given", "reason"),
    [({"joint": False}, "joint"), ({"dtype": torch.float64}, "float64"), ({"block_size": 1}, "block_size is 1")],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_it_cannot_serve_anywhere_is_named(given, reason):
    problem = TRAINED._replace(device="cpu")
    with pytest.raises(ValueError, match=reason):
        choose(problem._replace(**given), "sdpa")


@pytest.mark.parametrize("given", [{}, {"dtype": torch.float32}, {"differentiated": False}, {"few_queries": True}])
def test_on_a_cpu_it_runs_unasked(given):
    problem = TRAINED._replace(device="cpu", **given)
    assert choose(problem) == "sdpa"
    assert choose(problem._replace(packed=True)) == "sdpa"
    assert choose(problem._replace(joint=False)) == choose(problem._replace(padded=True)) == "eager"


@pytest.mark.parametrize("given", [{"reading": True, "differentiated": False}, {"local": True}, {"retrieving": 4}])
def test_asked_for_by_name_it_leaves_to_others_what_it_does_not_do(given):
    problem = TRAINED._replace(device="cpu", **given)
    assert choose(problem, "sdpa") == choose(problem) != "sdpa"


def test_an_old_library_is_not_taken(on_hopper, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    assert choose(TRAINED) == "triton"
    assert "cuDNN is 91002" in BACKENDS["sdpa"].why_not(TRAINED)


def test_a_library_that_fails_is_given_up(on_hopper, capsys):
    """What it does not raise for itself is raised."""
    asked = []

    def fail(error):
        def attend(q):
            asked.append(error)
            raise error

        return backends.sdpa._by_the_library(attend, SimpleNamespace(is_cuda=True))

    with pytest.raises(torch.OutOfMemoryError):
        fail(torch.OutOfMemoryError("no room"))
    with pytest.raises(ValueError, match="ours"):
        fail(ValueError("ours"))
    assert choose(TRAINED) == "sdpa"
    assert fail(RuntimeError("no plan\nhere")) is None and fail(RuntimeError("again")) is None
    assert len(asked) == 3 and "(no plan); the Triton kernels run instead" in capsys.readouterr().err
    assert choose(TRAINED) == "triton"


@pytest.mark.parametrize("whole", [False, True], ids=["forward too", "backward alone"])
def test_triton_goes_on_where_the_library_fails(whole, monkeypatch):
    def fail(function, *arguments):
        return function(*arguments) if whole and function is sdpa.forward else None

    monkeypatch.setattr(backends.sdpa, "_by_the_library", fail)
    assert_close_norm(*both(Case(16, 70, heads=4, key_heads=2)))
