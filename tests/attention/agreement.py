"""Cases on which the Triton kernels are held against the definition, on the CPU and on a GPU."""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from landmark_cli.attention import functional
from landmark_cli.attention.reference import landmark_attention as eager
from tests.closeness import whole_error

triton_attention = functools.partial(functional.landmark_attention, backend="triton")

# Largest relative error of float32 kernels.
EXACT = 1e-5


@dataclass(frozen=True)
class Case:
    """Sizes as in landmark_attention; keys None: as many as queries; start and cu_seqlens as tuples; sinks: whether
    every head has one; joint: one softmax over all text."""

    block_size: int
    queries: int
    keys: int | None = None
    dim: int = 16
    batch: int = 1
    heads: int = 1
    key_heads: int = 1
    start: tuple[int, ...] | None = None
    cu_seqlens: tuple[int, ...] | None = None
    dropout_p: float = 0.0
    dropout_seed: int | None = None
    scale: float | None = None
    softcap: float | None = None
    sinks: bool = False
    joint: bool = False

    def __str__(self) -> str:
        said = f"block{self.block_size}-T{self.queries}"
        said += f"of{self.keys}" if self.keys else ""
        said += f"-D{self.dim}-B{self.batch}-H{self.heads}on{self.key_heads}"
        for name in ("start", "cu_seqlens"):
            said += f"-{name}{'_'.join(map(str, getattr(self, name)))}" if getattr(self, name) else ""
        said += f"-dropout{self.dropout_p}" if self.dropout_p else ""
        said += (f"-softcap{self.softcap}" if self.softcap else "") + ("-sinks" if self.sinks else "")
        return said + ("-joint" if self.joint else "")

    def tensors(self, dtype: torch.dtype, device: str) -> list[Tensor]:
        """Fresh q, k, v as a model has them: (B, T, H, D) in memory."""
        keys = self.keys or self.queries
        sizes = (self.queries, self.heads), (keys, self.key_heads), (keys, self.key_heads)
        return [
            torch.randn(self.batch, tokens, heads, self.dim, dtype=dtype, device=device)
            .transpose(1, 2)
            .requires_grad_()
            for tokens, heads in sizes
        ]

    def arguments(self, device: str) -> dict:
        bounds = {
            name: None if getattr(self, name) is None else torch.tensor(getattr(self, name), device=device)
            for name in ("start", "cu_seqlens")
        }
        names = "block_size", "dropout_p", "dropout_seed", "scale", "softcap", "joint"
        more = {name: getattr(self, name) for name in names}
        # In any precision the same numbers.
        sinks = torch.linspace(-1, 2, self.heads, device=device).bfloat16().float() if self.sinks else None
        return {**bounds, **more, "sinks": sinks, "return_lse": True}


# Every feature once, small enough for Triton's interpreter.
CASES = [
    Case(2, 21),
    Case(7, 40),
    Case(16, 70, heads=4, key_heads=2, batch=2),
    Case(51, 115, dim=40),
    Case(64, 130, dim=64),
    Case(64, 20, dim=24),
    Case(128, 140, dim=128),
    Case(256, 300),
    Case(16, 33, dim=256, heads=3, key_heads=1),
    Case(16, 1),
    Case(16, 1, keys=33),
    Case(16, 33, keys=97, heads=2),
    Case(51, 40, keys=75),
    Case(16, 45, batch=3, start=(0, 7, 45)),
    Case(7, 30, keys=50, batch=3, start=(0, 27, 49)),
    Case(16, 90, cu_seqlens=(0, 1, 35, 35, 80, 90), heads=2, key_heads=1),
    Case(7, 30, keys=80, cu_seqlens=(0, 33, 61, 80)),
    Case(16, 70, dropout_p=0.5, dropout_seed=2**40 + 3, heads=2),
    Case(7, 40, dropout_p=0.2, dropout_seed=-5, cu_seqlens=(0, 13, 40)),
    Case(16, 40, scale=0.7),
    Case(16, 70, heads=4, key_heads=2, batch=2, softcap=1.5),
    Case(7, 40, batch=2, heads=4, key_heads=2, sinks=True),
    # So far out that a tangent is 1, and so far in that it is hardly bent.
    Case(7, 40, scale=5.0, softcap=5.0),
    Case(7, 40, softcap=50.0, heads=2, sinks=True),
    Case(64, 20, dim=24, softcap=2.0, sinks=True),
    Case(16, 33, keys=97, heads=2, softcap=2.0, sinks=True),
    Case(7, 30, keys=50, batch=3, heads=2, start=(0, 27, 49), softcap=2.0, sinks=True),
    Case(16, 90, cu_seqlens=(0, 1, 35, 35, 80, 90), heads=2, key_heads=1, softcap=2.0, sinks=True),
    Case(7, 40, dropout_p=0.2, dropout_seed=-5, heads=2, softcap=2.0, sinks=True),
    Case(2, 21, joint=True),
    Case(16, 70, heads=4, key_heads=2, batch=2, joint=True),
    Case(64, 130, dim=64, joint=True),
    Case(64, 20, dim=24, joint=True),
    Case(16, 1, keys=33, joint=True),
    Case(51, 40, keys=75, scale=0.7, joint=True),
    Case(7, 30, keys=50, batch=3, start=(0, 27, 49), joint=True),
    Case(16, 90, cu_seqlens=(0, 1, 35, 35, 80, 90), heads=2, key_heads=1, joint=True),
    Case(16, 33, keys=97, heads=2, softcap=2.0, sinks=True, joint=True),
    Case(7, 30, keys=50, batch=3, heads=2, start=(0, 27, 49), softcap=2.0, sinks=True, joint=True),
    Case(7, 30, keys=80, cu_seqlens=(0, 33, 61, 80), heads=2, softcap=2.0, sinks=True, joint=True),
]


def outputs_and_gradients(function, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, dlse: Tensor, **arguments):
    """[out, lse, dq, dk, dv] of one implementation, and dsinks, if there are any; rows that see nothing have lse 0."""
    out, lse = function(q, k, v, **arguments)
    lse = torch.where(lse == -math.inf, 0.0, lse)
    leaves = [x for x in (q, k, v, arguments.get("sinks")) if x is not None]
    return [out, lse, *torch.autograd.grad([out, lse], leaves, [dout.to(out.dtype), dlse])]


def errors(case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, float]:
    """Relative norm of the difference to the float32 definition, of outputs and of gradients of both outputs."""
    q, k, v = case.tensors(dtype, device)
    dout, dlse = torch.randn_like(q), torch.randn(q.shape[:3], device=device)
    given, exact = case.arguments(device), case.arguments(device)
    if case.sinks:
        given["sinks"], exact["sinks"] = given["sinks"].to(dtype).requires_grad_(), exact["sinks"].requires_grad_()
    found = outputs_and_gradients(triton_attention, q, k, v, dout, dlse, **given)
    q, k, v = (x.detach().float().requires_grad_() for x in (q, k, v))
    expected = outputs_and_gradients(eager, q, k, v, dout.float(), dlse, **exact)
    assert all(x.dtype == dtype for x in found[:1] + found[2:])
    return {
        name: whole_error(a, b)
        for name, a, b in zip(("out", "lse", "dq", "dk", "dv", "dsinks")[: len(found)], found, expected, strict=True)
    }


def assert_agrees(case: Case, tolerance: float, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
    found = errors(case, dtype, device)
    assert all(error <= tolerance for error in found.values()), f"{case}: {found}"  # a NaN fails too
