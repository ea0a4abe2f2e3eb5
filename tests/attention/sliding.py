"""Layers with a sliding window: cases on which the Triton kernels are held against the definition, on the CPU and on a
GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from landmark_cli.attention import local
from landmark_cli.attention.cache import BlockCache, RetrievalSettings
from landmark_cli.attention.rotary import default_inverse_frequencies
from landmark_cli.attention.window import ReadingWindow, WindowSettings


@dataclass(frozen=True)
class Case:
    """Sizes as in local.attend_input. start, cu_seqlens: as tuples. every: instead of even blocks, landmarks at a
    seeded random share of tokens, one of so many. chunk: it is a window read in chunks of so many tokens. sinks:
    whether every head has one. rotary: rotated dimensions, 0 in a layer without positions."""

    window: int
    tokens: int
    block_size: int = 5
    dim: int = 16
    batch: int = 1
    heads: int = 2
    key_heads: int = 1
    start: tuple[int, ...] | None = None
    cu_seqlens: tuple[int, ...] | None = None
    every: int | None = None
    chunk: int | None = None
    softcap: float | None = None
    sinks: bool = False
    scale: float | None = None
    rotary: int = 8

    def __str__(self) -> str:
        said = f"W{self.window}-T{self.tokens}-block{self.block_size}-D{self.dim}-B{self.batch}"
        said += f"-H{self.heads}on{self.key_heads}"
        for name in ("start", "cu_seqlens", "every", "chunk", "softcap", "sinks", "scale"):
            said += f"-{name}" if getattr(self, name) else ""
        return said + ("" if self.rotary else "-NoPE")

    def leaves(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Tensor]:
        """Fresh q, k, v as a model has them, (B, T, H, D) in memory, and the heads' sinks, if there are any."""
        made = [
            torch.randn(self.batch, self.tokens, heads, self.dim, device=device).to(dtype).transpose(1, 2)
            for heads in (self.heads, self.key_heads, self.key_heads)
        ]
        if self.sinks:
            made.append(torch.linspace(-1, 2, self.heads, device=device).to(dtype))
        return [x.requires_grad_() for x in made]

    @property
    def frequencies(self) -> Tensor | None:
        return default_inverse_frequencies(self.rotary) if self.rotary else None

    def bounds(self, device: str) -> dict[str, Tensor]:
        given = {name: getattr(self, name) for name in ("start", "cu_seqlens")}
        return {name: torch.tensor(value, device=device) for name, value in given.items() if value is not None}

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *sinks: Tensor, backend: str) -> Tensor:
        """(B, H, T, D) of such tensors in a backend; padding gives zeros."""
        device = str(q.device)
        frequencies = None if self.frequencies is None else self.frequencies.to(device)
        logits = {"scale": self.scale, "softcap": self.softcap, "sinks": sinks[0] if sinks else None}
        if self.chunk is not None:
            settings = WindowSettings(self.chunk, self.block_size, 2)
            angles = default_inverse_frequencies(self.rotary or 8).to(device)
            read = ReadingWindow.make(settings, self.batch, self.tokens, angles, **self.bounds(device))
            out = local.attend_window(q, k, v, read, self.window, frequencies, backend=backend, **logits)
            return out.masked_fill((read.chunk_of < 0)[:, None, :, None], 0.0)
        mask = None
        if self.every is not None:
            generator = torch.Generator().manual_seed(7)
            mask = (torch.rand(self.batch, self.tokens, generator=generator) < 1 / self.every).to(device)
        given = {"block_size": None if self.every else self.block_size, "landmark_mask": mask}
        given |= {"frequencies": frequencies, "backend": backend} | self.bounds(device) | logits
        out = local.attend_input(q, k, v, self.window, **given)
        if self.start is None:
            return out
        index = torch.arange(self.tokens, device=device)
        return out.masked_fill((index < torch.tensor(self.start, device=device)[:, None])[:, None, :, None], 0.0)


# Every feature once, small enough for Triton's interpreter: windows of 1, of 2 and of more than there is, and edges of
# tiles.
CASES = [
    # Without a sink, the one key that is seen has all of the weight, and logits have no gradient.
    Case(1, 40, sinks=True),
    Case(1, 70, batch=2, chunk=20, softcap=2.0, sinks=True),
    Case(2, 40),
    Case(7, 40),
    Case(500, 40),
    Case(16, 70, heads=4, key_heads=2, batch=2),
    Case(70, 150, block_size=64, dim=24),
    Case(20, 2),
    Case(33, 70, dim=40, heads=3, key_heads=3, rotary=0),
    Case(20, 70, dim=256, heads=2),
    Case(9, 60, batch=3, start=(0, 7, 59)),
    Case(12, 90, cu_seqlens=(0, 1, 35, 35, 80, 90)),
    Case(12, 45, batch=2, cu_seqlens=(0, 20, 45, 90)),
    Case(9, 80, batch=2, every=4),
    Case(9, 80, batch=2, every=4, start=(0, 33)),
    Case(12, 70, batch=2, chunk=20),
    Case(12, 70, batch=2, chunk=10, start=(3, 50)),
    Case(12, 70, chunk=15, cu_seqlens=(0, 31, 70)),
    Case(16, 70, heads=4, key_heads=2, softcap=1.5),
    Case(16, 50, heads=4, key_heads=2, batch=2, sinks=True),
    Case(16, 70, heads=2, scale=3.0, softcap=5.0, sinks=True),
    Case(9, 60, batch=3, start=(0, 7, 59), softcap=2.0, sinks=True),
]


def outputs_and_gradients(case: Case, leaves: list[Tensor], dout: Tensor, backend: str) -> list[Tensor]:
    """[out, dq, dk, dv] of one backend, and dsinks, if there are any."""
    out = case.attend(*leaves, backend=backend)
    return [out, *torch.autograd.grad(out, leaves, dout.to(out.dtype))]


def agreement(case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, tuple[Tensor, Tensor]]:
    """What the kernels give in a dtype, and the definition in float32, by name."""
    leaves = case.leaves(dtype, device)
    dout = torch.randn_like(leaves[0])
    found = outputs_and_gradients(case, leaves, dout, "triton")
    assert all(x.dtype == dtype for x in found)
    exact = [x.detach().float().requires_grad_() for x in leaves]
    expected = outputs_and_gradients(case, exact, dout.float(), "eager")
    names = ("out", "dq", "dk", "dv", "dsinks")[: len(found)]
    return {name: (a.float(), b) for name, a, b in zip(names, found, expected, strict=True)}


@dataclass(frozen=True)
class Reading:
    """Chunks that are read one after the other: of each the lengths of all rows."""

    window: int
    chunks: tuple[tuple[int, ...], ...]
    block_size: int = 5
    dim: int = 16
    heads: int = 2
    key_heads: int = 1
    softcap: float | None = None
    sinks: bool = False
    rotary: int = 8

    def __str__(self) -> str:
        said = f"W{self.window}-{'-'.join('_'.join(map(str, lengths)) for lengths in self.chunks)}-D{self.dim}"
        said += f"-block{self.block_size}-H{self.heads}on{self.key_heads}"
        return said + ("-softcap" if self.softcap else "") + ("-sinks" if self.sinks else "")

    def read(self, backend: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Tensor]:
        """What each chunk gives, padding as zeros, and what is held in the end."""
        batch = len(self.chunks[0])
        frequencies = default_inverse_frequencies(self.rotary or 8).to(device)
        cache = BlockCache(RetrievalSettings(self.block_size, 2), frequencies, batch=batch, device=device)
        generator, found = torch.Generator().manual_seed(3), []
        sinks = torch.linspace(-1, 2, self.heads, device=device).to(dtype) if self.sinks else None
        for lengths in self.chunks:
            rows = [row for row in range(batch) if lengths[row]]
            chunk = cache.begin_chunk(lengths, rows=rows)
            q, k, v = (
                torch.randn(len(rows), chunk.width, heads, self.dim, generator=generator)
                .to(device, dtype)
                .transpose(1, 2)
                for heads in (self.heads, self.key_heads, self.key_heads)
            )
            held = cache.window(0, k, self.window)
            given = {"softcap": self.softcap, "sinks": sinks, "backend": backend}
            out = local.attend_chunk(q, k, v, held, chunk, frequencies if self.rotary else None, **given)
            found.append(out.masked_fill(~chunk.real[:, None, :, None], 0.0))
            cache.end_chunk(chunk)
        return [*found, held.keys.clone(), held.values.clone(), held.real.clone()]


READINGS = [
    Reading(7, ((12,), (3,), (1,), (1,), (20,))),
    Reading(1, ((12,), (1,))),
    Reading(40, ((12,), (30,), (1,), (70,), (1,))),
    # Rows of unlike lengths, one that rests, and one that begins late.
    Reading(9, ((12, 4, 0), (1, 9, 0), (1, 0, 1), (1, 1, 1), (17, 2, 30)), heads=4, key_heads=2),
    Reading(9, ((12, 4), (1, 9), (30, 1)), softcap=1.5, sinks=True),
    Reading(70, ((70,), (100,), (1,)), block_size=64, dim=40, heads=3, key_heads=3, rotary=0),
]
