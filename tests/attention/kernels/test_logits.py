"""What a soft cap makes of products in the kernels: a tangent that loses no digits, near 0 and far from it."""

import pytest
import torch
import triton
import triton.language as tl

from landmark_cli.attention.kernels.common.logits import before_cap, capped, logits_of, scaling_of
from landmark_cli.attention.reference import capped as capped_by_definition


@triton.jit
def kernel(X, T, LOGITS, SLOPE, scaling, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    x = tl.load(X + at)
    t = capped(x, scaling)
    tl.store(T + at, t)
    tl.store(LOGITS + at, logits_of(x, scaling))
    tl.store(SLOPE + at, before_cap(tl.full([SIZE], 1.0, tl.float32), t, scaling))


def run(x: torch.Tensor, scale: float, softcap: float | None) -> list[torch.Tensor]:
    """Of products x: what they are inside of the cap, their logits, and the slope of these by scaled products."""
    found = [torch.empty_like(x) for _ in range(3)]
    kernel[(len(x) // 256,)](x, *found, scaling_of(scale, softcap), SIZE=256)
    return found


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("softcap", [0.5, 50.0])
def test_a_capped_logit_is_exact_to_some_units_in_the_last_place(softcap, device):
    # Many sizes, both signs, and closely where the series ends, at a quarter.
    sizes = torch.cat([torch.logspace(-8, 3, 1024), torch.linspace(0.249, 0.251, 1024)]).double() * softcap
    logits = torch.cat([sizes, -sizes])
    x = (logits / 0.125).float().to(device)
    _, found, slope = (y.cpu().double() for y in run(x, 0.125, softcap))
    logits = x.cpu().double() * 0.125
    expected = capped_by_definition(logits, softcap)
    assert ((found - expected) / expected).abs().max() < 1e-6
    assert (slope - (1 - (expected / softcap) ** 2)).abs().max() < 1e-6
    assert (found[logits.abs() > 20 * softcap].abs() == softcap).all()


def test_without_a_cap_products_stay_as_they_are():
    x = torch.randn(256)
    found, logits, slope = run(x, 0.125, None)
    assert torch.equal(found, x) and torch.equal(logits, x * 0.125) and (slope == 1).all()
