"""What reads earlier blocks of a window is an operator like any: for torch.compile, checkpointing, autocast and DDP."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from landmark_cli.attention import functional
from landmark_cli.attention.kernels.reading import window as kernels
from landmark_cli.attention.retrieval_window import select_in_window
from landmark_cli.attention.window_operators import keep_retrieved, retrieve, retrieved, retrieved_backward
from tests.attention.windows import Case
from tests.closeness import assert_close_norm

# numpy, which the interpreter calculates with, says so where a row sees nothing.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero encountered in log2")
CASE = Case(16, chunk=8, block_size=4, dim=8)
SLOW = pytest.param(True, marks=pytest.mark.slow)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def leaves_of(case, device="cpu"):
    torch.manual_seed(0)
    q, k, v = case.tensors(device=device)
    q, k = case.rotated(case.window(device), q, k)
    return [x.detach().requires_grad_() for x in (q, k, v)]


def layer_of(window, backend="triton"):
    """A layer that has work of its own before and after attention."""
    return lambda q, k, v: functional.attend_window(1, q * 2, k, v, window, backend=backend).sin()


def checkpointed(layer, **options):
    return lambda *leaves: checkpoint(layer, *leaves, use_reentrant=False, **options)


def with_gradients(layer, leaves):
    out = layer(*leaves)
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), leaves)]


@pytest.fixture
def forwards(forwards_of):
    return forwards_of(kernels)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("given", ["plain", "own part", "explore", "softcap and joint"])
def test_opcheck(given, device):
    case = dataclasses.replace(CASE, explore=0.5 if given == "explore" else 0.0)
    leaves, window = leaves_of(case, device), case.window(device)
    own = [torch.randn_like(leaves[0]), torch.randn(leaves[0].shape[:3], device=device)]
    own = [x.requires_grad_() for x in own] if given == "own part" else [None, None]
    ages = select_in_window(*leaves[:2], window, layer=1) if given == "own part" else None
    seed = torch.tensor(5, device=device) if given == "explore" else None
    places = window.chunks, window.blocks, window.chunk_of, window.cos, window.sin
    numbers = 8, 4, 2, window.most_earlier, case.explore, False, 0.3
    numbers = *numbers, *((1.5, True) if given == "softcap and joint" else (None, False)), "triton"
    torch.library.opcheck(retrieved, (*leaves, *own, *places, ages, seed, *numbers))
    leaves, own = ([None if x is None else x.detach() for x in tensors] for tensors in (leaves, own))
    out, lse, *routes = retrieved(*leaves, *own, *places, ages, seed, *numbers)
    arguments = torch.randn_like(out), None, *leaves, out, lse, *own, *routes, *places, ages, seed, *numbers
    torch.library.opcheck(retrieved_backward, arguments)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dynamic", [False, SLOW], ids=["static", "dynamic"])
def test_compiles_in_one_graph(dynamic, device):
    def layer(q, k, v, window):
        return layer_of(window)(q, k, v)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for tokens in (16, 21) if dynamic else (16,):
        case = dataclasses.replace(CASE, tokens=tokens)
        leaves, window = leaves_of(case, device), case.window(device)
        found, expected = (with_gradients(lambda *x: f(*x, window), leaves) for f in (compiled, layer))  # noqa: B023
        assert_close_norm(found, expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("compiled", [False, SLOW], ids=["eager mode", "compiled"])
def test_a_checkpointed_layer_keeps_what_was_retrieved(compiled, device, forwards):
    leaves, layer = leaves_of(CASE, device), layer_of(CASE.window(device))
    expected = with_gradients(layer, leaves)
    assert len(forwards) == 1
    for options, times in (({}, 2), ({"context_fn": keep_retrieved}, 1)):
        forwards.clear()
        again = checkpointed(layer, **options)
        again = torch.compile(again, fullgraph=True, backend="aot_eager", dynamic=False) if compiled else again
        found = with_gradients(again, leaves)
        assert len(forwards) == times
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_checkpointed_layer_without_kernels_does_all_again():
    leaves, layer = leaves_of(CASE), layer_of(CASE.window(), "eager")
    found = with_gradients(checkpointed(layer, context_fn=keep_retrieved), leaves)
    assert all(torch.equal(a, b) for a, b in zip(found, with_gradients(layer, leaves), strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_gives_its_dtype(device):
    leaves, layer = leaves_of(CASE, device), layer_of(CASE.window(device))
    expected = with_gradients(layer_of(CASE.window(device), "eager"), leaves)
    for each in (layer, checkpointed(layer, context_fn=keep_retrieved)):
        with torch.autocast(device, torch.bfloat16):
            found = with_gradients(each, leaves)
        assert [x.dtype for x in found] == [torch.bfloat16, *[torch.float32] * 3]
        for a, b in zip(found, expected, strict=True):
            assert (a - b).norm() <= 0.1 * b.norm()


@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp"])
def test_torch_func_is_refused(transform):
    q, k, v = leaves_of(CASE)
    window = CASE.window()

    def function(q):
        return retrieve(q, k, v, window, backend="triton")[0].sum()

    transformed = {
        "vmap": lambda: torch.func.vmap(function)(torch.stack([q, q])),
        "grad": lambda: torch.func.grad(function)(q),
        "jvp": lambda: torch.func.jvp(function, (q,), (q,)),
    }
    with pytest.raises(NotImplementedError, match=r"torch\.func"):
        transformed[transform]()


def test_second_derivatives_are_refused():
    q, k, v = leaves_of(CASE)
    out, _ = retrieve(q, k, v, CASE.window(), backend="triton")
    (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivatives"):
        dq.sum().backward()


class Layer(nn.Module):
    """Attention with its projections, checkpointed: (B, N, width) -> (B, N, width)."""

    def __init__(self, case: Case):
        super().__init__()
        torch.manual_seed(1)
        self.case = case
        self.heads = case.heads, case.key_heads, case.key_heads
        self.project = nn.Linear(16, sum(self.heads) * case.dim)
        self.out = nn.Linear(case.heads * case.dim, 16)

    def forward(self, x, window):
        return checkpoint(self.attend, x, window, use_reentrant=False, context_fn=keep_retrieved)

    def attend(self, x, window):
        q, k, v = self.project(x).unflatten(-1, (-1, self.case.dim)).transpose(1, 2).split(self.heads, dim=1)
        q, k = self.case.rotated(window, q, k)
        return self.out(functional.attend_window(1, q, k, v, window, backend="triton").transpose(1, 2).flatten(2))


def step(layer, case, rows):
    """The gradients of a step on some of the rows of a batch."""
    x = torch.randn(2, case.tokens, 16, generator=torch.Generator().manual_seed(3))[rows]
    layer(x, case.window()).square().sum().backward()
    return {name.removeprefix("module."): parameter.grad for name, parameter in layer.named_parameters()}


def train(rank, meeting_point, case, path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=2)
    layer = DistributedDataParallel(Layer(case))
    for _ in range(2):
        layer.zero_grad()
        gradients = step(layer, case, [rank])
    if rank == 0:
        torch.save(gradients, path)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one(tmp_path):
    given = tmp_path / "meeting", CASE, tmp_path / "gradients"
    torch.multiprocessing.spawn(train, given, nprocs=2)
    found = torch.load(tmp_path / "gradients")
    both = dataclasses.replace(CASE, batch=2)
    expected = step(Layer(both), both, [0, 1])
    assert_close_norm({name: 2 * gradient for name, gradient in found.items()}, expected)
