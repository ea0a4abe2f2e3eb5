"""Rotations: the kernel is what the definition is, and a compiled model forms the angles once."""

import pytest
import torch

from landmark_cli.attention import rotary
from landmark_cli.attention.rotary import default_inverse_frequencies, rotation_table

fused_rotary = pytest.importorskip("landmark_cli.attention.fused_rotary")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("rotary_dim", [24, 16], ids=["whole", "partial"])
def test_the_kernel_turns_and_turns_gradients_back(rotary_dim, monkeypatch):
    torch.manual_seed(0)
    qkv = torch.randn(2, 5, 3, 4, 24, device=DEVICE)
    table = rotation_table(torch.arange(5, device=DEVICE)[None] + 7, default_inverse_frequencies(rotary_dim).to(DEVICE))
    cos, sin = (part[:, None] for part in table)
    weights = torch.randn(2, 4, 5, 24, device=DEVICE)
    found = []
    monkeypatch.setattr(rotary, "_fused", lambda: None)
    for turn in (fused_rotary.rotate, rotary.rotate):
        x = qkv.clone().requires_grad_()
        out = turn(x[:, :, 1].transpose(1, 2), cos, sin)
        (gradient,) = torch.autograd.grad((out * weights).sum(), x)
        found.append((out.detach(), gradient))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def test_the_angles_are_one_operator_to_the_compiler():
    positions, frequencies = torch.tensor([[0, 3, 10**6]]), default_inverse_frequencies(8)
    seen = []

    def backend(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    compiled = torch.compile(rotation_table, backend=backend, fullgraph=True)(positions, frequencies)
    torch.testing.assert_close(compiled, rotation_table(positions, frequencies), rtol=0, atol=0)
    assert any("rotation_table" in name for name in seen) and not any("cos" in name for name in seen)
