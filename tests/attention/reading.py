"""Read the same random chunks with the eager definition and with the Triton kernels."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from landmark_cli.attention.cache import BlockCache, Offload, RetrievalSettings, Trace
from landmark_cli.attention.dispatch import attend_chunk
from landmark_cli.attention.rotary import default_inverse_frequencies, rotate, rotation_table


@dataclass
class Case:
    """chunks: stream tokens of each chunk, one number for all rows or a number a row. rotary: rotated dimensions."""

    chunks: list
    batch: int = 1
    heads: int = 2
    key_heads: int = 1
    dim: int = 16
    rotary: int | None = None
    block_size: int = 5
    top_k: int = 2
    settings: dict = field(default_factory=dict)
    resident: int | None = None
    dtype: torch.dtype = torch.float32


def read(case: Case, device: str = "cpu", seed: int = 0) -> tuple[list[Tensor], list[Tensor], list[BlockCache]]:
    """(eager outputs, Triton outputs, caches) of every chunk; eager reads the same numbers in float32.

    Every second chunk is traced. resident: offload, keeping so many blocks on the device.
    """
    generator = torch.Generator().manual_seed(seed)
    inverse_frequencies = default_inverse_frequencies(case.rotary or case.dim)
    settings = RetrievalSettings(case.block_size, case.top_k, **case.settings)
    block_bytes = 2 * case.block_size * case.dim * case.dtype.itemsize
    offload = None if case.resident is None else Offload(1, case.resident * block_bytes)
    caches = [
        BlockCache(settings, inverse_frequencies, batch=case.batch, device=device, offload=o) for o in (None, offload)
    ]
    outputs = [], []
    for index, lengths in enumerate(case.chunks):
        lengths = [lengths] * case.batch if isinstance(lengths, int) else lengths
        q, k, v = (
            torch.randn(case.batch, max(lengths), n, case.dim, generator=generator).to(device, case.dtype)
            for n in (case.heads, case.key_heads, case.key_heads)
        )
        for which, backend in enumerate(("eager", "triton")):
            cache = caches[which]
            cache.trace = Trace() if index % 2 else None
            chunk = cache.begin_chunk(lengths)
            rotation = rotation_table(chunk.position_ids, inverse_frequencies.to(device))
            given = [_rotated(q, *rotation), _rotated(k, *rotation), v.transpose(1, 2)]
            given = [x.float() for x in given] if which == 0 else given
            outputs[which].append(attend_chunk(0, *given, cache, chunk, backend=backend).float())
            cache.end_chunk(chunk)
    return *outputs, caches


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(B, T, H, D) -> (B, H, T, D) rotated at the chunk's positions."""
    return rotate(x.transpose(1, 2), cos[:, None], sin[:, None])
