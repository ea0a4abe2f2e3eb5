"""The joint softmax by cuDNN on a Hopper GPU gives what the definition and the Triton kernels give."""

import pytest
import torch

from landmark_cli.attention import backends, sdpa
from landmark_cli.attention.functional import landmark_attention
from landmark_cli.attention.kernels.landmarks import launch
from landmark_cli.attention.reference import landmark_attention as eager
from tests.attention.agreement import Case
from tests.closeness import whole_error

DEVICE = "cuda"
ROUNDED = 1e-2
# SmolLM2-135M, as it is trained.
TRAINED = Case(64, 8192, dim=64, batch=4, heads=9, key_heads=3)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)), reason="needs a Hopper GPU"
    ),
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore:.*deterministic", "ignore:.*Deterministic"),
]


@pytest.fixture(autouse=True)
def by_the_library():
    """It is cuDNN that was asked, and it has answered."""
    backends.sdpa.LIBRARY.given_up = None
    yield
    assert backends.sdpa.LIBRARY.given_up is None


def step(case, backend, leaves, dout):
    out = landmark_attention(*leaves, case.block_size, joint=True, scale=case.scale, backend=backend)
    return [out, *torch.autograd.grad(out, leaves, dout)]


def within(found, expected, allowed=ROUNDED):
    errors = [whole_error(a, b) for a, b in zip(found, expected, strict=True)]
    assert all(error <= allowed for error in errors), errors  # a NaN fails too


@pytest.mark.parametrize(
    "case",
    [
        Case(64, 1024, dim=64, batch=2, heads=9, key_heads=3),
        Case(64, 1000, dim=128, heads=4, key_heads=1, scale=0.3),
        Case(51, 1299, dim=64, heads=2, key_heads=2),
        Case(16, 777, dim=96, heads=4, key_heads=2, batch=3),
        Case(256, 300, dim=64, heads=2),
        Case(64, 319, dim=64, heads=2),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_outputs_and_gradients(case, dtype):
    leaves = case.tensors(dtype, DEVICE)
    dout = torch.randn_like(leaves[0])
    exact = [x.detach().float().requires_grad_() for x in leaves]
    expected = eager(*exact, block_size=case.block_size, scale=case.scale, joint=True)
    within(step(case, "sdpa", leaves, dout), [expected, *torch.autograd.grad(expected, exact, dout.float())])


def test_as_the_triton_kernels_where_a_model_is_trained():
    leaves = TRAINED.tensors(torch.bfloat16, DEVICE)
    dout = torch.randn_like(leaves[0])
    found, expected = (step(TRAINED, backend, leaves, dout) for backend in ("sdpa", "triton"))
    within(found, expected)
    # The landmarks' rows, of which there are few, by themselves.
    within(*([x[:, :, 63::64] for x in ours[:2]] for ours in (found, expected)))
    assert all((x[:, :, 63::64] == 0).all() for x in found[2:])


@pytest.mark.parametrize("text", [63, 50, 1])
def test_kernels_of_landmarks(text):
    q, dout = (torch.randn(2, 6, 100, 64, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    k, v = (torch.randn(2, 2, 100 * text, 64, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    out, lse = launch.forward(q, k, v, text, 0.2)
    exact = [x.float() for x in (q, k, v)]
    expected = sdpa.attend_landmarks(*exact, text, 0.2)
    within((out, lse), expected)
    found = launch.backward(dout, q, k, v, out, lse, text, 0.2)
    within(found, sdpa.attend_landmarks_backward(dout.float(), *exact, *expected, text, 0.2))


def test_runs_unasked_where_gradients_are_asked_for(monkeypatch):
    monkeypatch.delenv("LANDMARK_ATTENTION", raising=False)
    called = []
    monkeypatch.setattr(sdpa, "forward", lambda *given, real=sdpa.forward: called.append(1) or real(*given))
    leaves = Case(64, 512, dim=64, heads=2).tensors(torch.bfloat16, DEVICE)
    out = landmark_attention(*leaves, 64, joint=True)
    with torch.no_grad():
        within([landmark_attention(*leaves, 64, joint=True)], [out])
    assert len(called) == 1


def test_where_it_is_asked_for_gradients_repeat_bit_by_bit():
    torch.use_deterministic_algorithms(True)
    case = Case(64, 2048, dim=64, batch=2, heads=9, key_heads=3)
    leaves = case.tensors(torch.bfloat16, DEVICE)
    dout = torch.randn_like(leaves[0])
    first = step(case, "sdpa", leaves, dout)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, step(case, "sdpa", leaves, dout), strict=True))


def test_compiles_in_one_graph():
    case = Case(64, 700, dim=64, heads=4, key_heads=2)

    def layer(q, k, v, backend):
        return landmark_attention(torch.tanh(q), k, v, 64, joint=True, backend=backend) * 2

    compiled = torch.compile(layer, fullgraph=True, dynamic=False)
    leaves = case.tensors(torch.bfloat16, DEVICE)
    found, expected = compiled(*leaves, "sdpa"), layer(*leaves, "triton")
    dout = torch.randn_like(expected)
    within([found, *torch.autograd.grad(found, leaves, dout)], [expected, *torch.autograd.grad(expected, leaves, dout)])


def test_autocast():
    leaves = Case(64, 300, dim=64, heads=2).tensors(torch.float32, DEVICE)
    with torch.autocast("cuda", torch.bfloat16):
        out = landmark_attention(*leaves, 64, joint=True, backend="sdpa")
    expected = eager(*leaves, block_size=64, joint=True)
    dout = torch.randn_like(expected)
    found = [out, *torch.autograd.grad(out, leaves, dout.to(out.dtype))]
    within(found, [expected, *torch.autograd.grad(expected, leaves, dout)])


def test_extra_memory_of_a_training_step():
    """Beside inputs, outputs and gradients, as docs of operators.attend say."""
    torch.use_deterministic_algorithms(False)
    q, k, v = TRAINED.tensors(torch.bfloat16, DEVICE)
    dout = torch.randn_like(q)
    step(TRAINED, "sdpa", (q, k, v), dout)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = step(TRAINED, "sdpa", (q, k, v), dout)
    needed = sum(x.numel() * x.element_size() for x in found)
    extra = torch.cuda.max_memory_allocated() - before - needed
    assert extra < 12 * q.numel() * q.element_size(), f"{extra / q.numel() / q.element_size():.2f} times q"
