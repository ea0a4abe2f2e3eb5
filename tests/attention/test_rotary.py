"""Rotations: the kernel is what the definition is, and a compiled model forms the angles once."""

import pytest
import torch

from landmark_cli.attention import rotary
from landmark_cli.attention.rotary import default_inverse_frequencies, rotation_table
from tests.closeness import assert_close_norm

kernel = pytest.importorskip("landmark_cli.attention.kernels.common.rotary")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("rotary_dim", [24, 16], ids=["whole", "partial"])
def test_the_kernel_rotates_and_rotates_gradients_back(rotary_dim, monkeypatch):
    torch.manual_seed(0)
    qkv = torch.randn(2, 5, 3, 4, 24, device=DEVICE)
    table = rotation_table(torch.arange(5, device=DEVICE)[None] + 7, default_inverse_frequencies(rotary_dim).to(DEVICE))
    cos, sin = (part[:, None] for part in table)
    weights = torch.randn(2, 4, 5, 24, device=DEVICE)
    found = []
    monkeypatch.setattr(rotary, "_kernel", lambda: None)
    for rotate in (kernel.rotate, rotary.rotate):
        x = qkv.clone().requires_grad_()
        out = rotate(x[:, :, 1].transpose(1, 2), cos, sin)
        (gradient,) = torch.autograd.grad((out * weights).sum(), x)
        found.append((out.detach(), gradient))
    assert_close_norm(*found)


@pytest.mark.parametrize("rotary_dim", [24, 16], ids=["whole", "partial"])
def test_the_kernel_joins_what_the_definition_joins(rotary_dim, monkeypatch):
    q, k, v = torch.randn(3, 2, 5, 4, 24, device=DEVICE).transpose(2, 3)
    table = rotation_table(torch.arange(5, device=DEVICE)[None] + 7, default_inverse_frequencies(rotary_dim).to(DEVICE))
    cos, sin = (part[:, None] for part in table)
    found = kernel.join_rotated(q, k, v, cos, sin)
    monkeypatch.setattr(rotary, "_kernel", lambda: None)
    torch.testing.assert_close(found, rotary.join_rotated(q, k, v, cos, sin), rtol=1e-5, atol=1e-5)
    torch.library.opcheck(rotary.join_rotated, (q, k, v, cos, sin))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_splitting_joins_the_gradients(compiled):
    def turned(split, qkv):
        q, k, v = split(qkv, cos, sin)
        return ((q @ k.transpose(2, 3)).softmax(-1) @ v * weights).sum()

    cos, sin = (part[:, None] for part in rotation_table(torch.arange(5)[None], default_inverse_frequencies(16)))
    weights, qkv = torch.randn(2, 4, 5, 24), torch.randn(2, 5, 3, 4, 24)
    found = []
    for split in (rotary.split_and_rotate, rotary.SplitAndRotate.apply):
        x = qkv.clone().requires_grad_()
        run = torch.compile(turned, backend="aot_eager", fullgraph=True) if compiled else turned
        loss = run(split, x)
        found.append((loss.detach(), *torch.autograd.grad(loss, x)))
    assert_close_norm(*found)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_on_a_gpu_splitting_joins_what_autograd_joins(compiled):
    table = rotation_table(torch.arange(300, device="cuda")[None], default_inverse_frequencies(64).cuda())
    cos, sin = (part[:, None] for part in table)
    weight = torch.randn(3 * 4 * 64, 128, device="cuda", requires_grad=True)
    x, *targets = torch.randn(2, 300, 128, device="cuda"), *torch.randn(3, 2, 4, 300, 64, device="cuda")

    def loss_of(split):
        parts = split((x @ weight.T).view(2, 300, 3, 4, 64), cos, sin)
        return sum((part * target).sum() for part, target in zip(parts, targets, strict=True))

    split = torch.compile(loss_of, fullgraph=True) if compiled else loss_of
    (found,) = torch.autograd.grad(split(rotary.split_and_rotate), weight)
    (expected,) = torch.autograd.grad(loss_of(rotary._split_and_rotate), weight)
    assert_close_norm(found, expected)


def test_the_angles_are_one_operator_to_the_compiler():
    positions, frequencies = torch.tensor([[0, 3, 10**6]]), default_inverse_frequencies(8)
    seen = []

    def backend(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    compiled = torch.compile(rotation_table, backend=backend, fullgraph=True)(positions, frequencies)
    torch.testing.assert_close(compiled, rotation_table(positions, frequencies), rtol=0, atol=0)
    assert any("rotation_table" in name for name in seen) and not any("cos" in name for name in seen)
