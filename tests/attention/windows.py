"""Training windows that are read chunk by chunk: cases on which the ways to do so are held against each other."""

from dataclasses import dataclass

import torch
from torch import Tensor

from landmark_cli.attention.cache import BlockCache, RetrievalSettings
from landmark_cli.attention.functional import attend_chunk
from landmark_cli.attention.rotary import default_inverse_frequencies, rotate, rotation_table
from landmark_cli.attention.window import ReadingWindow, WindowSettings


@dataclass(frozen=True)
class Case:
    """Sizes as in ReadingWindow.make. rotary: rotated dimensions, of dim. layer: in the first one, 0, landmarks share
    a key. equal_landmarks: all landmark keys are one vector before rotation."""

    tokens: int
    chunk: int = 6
    block_size: int = 3
    top_k: int = 2
    batch: int = 1
    heads: int = 2
    key_heads: int = 1
    dim: int = 8
    rotary: int | None = None
    selection: str = "per_token_and_head"
    explore: float = 0.0
    start: tuple[int, ...] | None = None
    cu_seqlens: tuple[int, ...] | None = None
    layer: int = 1
    equal_landmarks: bool = False
    softcap: float | None = None
    joint: bool = False

    def __str__(self) -> str:
        said = f"N{self.tokens}-C{self.chunk}-S{self.block_size}-k{self.top_k}-B{self.batch}"
        said += f"-{self.heads}on{self.key_heads}-D{self.dim}" + (
            f"-{self.selection}" if self.selection != "per_token_and_head" else ""
        )
        for name in ("start", "cu_seqlens", "rotary", "explore", "equal_landmarks", "softcap", "joint"):
            said += f"-{name}" if getattr(self, name) else ""
        return said + ("-first_layer" if self.layer == 0 else "")

    def window(self, device: str = "cpu") -> ReadingWindow:
        bounds = {
            name: None if getattr(self, name) is None else torch.tensor(getattr(self, name), device=device)
            for name in ("start", "cu_seqlens")
        }
        settings = WindowSettings(self.chunk, self.block_size, self.top_k, self.selection, self.explore, self.joint)
        return ReadingWindow.make(
            settings, self.batch, self.tokens, self.frequencies.to(device), explore_seed=2**40 + 7, **bounds
        )

    @property
    def frequencies(self) -> Tensor:
        return default_inverse_frequencies(self.rotary or self.dim)

    def tensors(self, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> list[Tensor]:
        """Fresh q, k and v, not rotated, as a model has them: (B, N, H, D) in memory."""
        generator = torch.Generator().manual_seed(seed)
        q, k, v = (
            torch.randn(self.batch, self.tokens, heads, self.dim, generator=generator, dtype=torch.float64)
            for heads in (self.heads, self.key_heads, self.key_heads)
        )
        if self.equal_landmarks:
            blocks = self.window().blocks.long()
            row, last = blocks[:, 0], blocks[:, 1] + self.block_size - 1
            k[row[row >= 0], last[row >= 0]] = k[0, 0].clone()
        return [x.to(device, dtype).transpose(1, 2).requires_grad_() for x in (q, k, v)]

    def rotated(self, window: ReadingWindow, q: Tensor, k: Tensor) -> list[Tensor]:
        """q and k at the window's positions."""
        cos, sin = rotation_table(window.position_ids, self.frequencies.to(q.device))
        return [rotate(x, cos[:, None], sin[:, None]) for x in (q, k)]

    def documents(self) -> list[tuple[int, int, int]]:
        """(row, first token, tokens) of every document."""
        if self.start is not None:
            return [(row, first, self.tokens - first) for row, first in enumerate(self.start)]
        edges = self.cu_seqlens or range(0, self.batch * self.tokens + 1, self.tokens)
        return [(a // self.tokens, a % self.tokens, b - a) for a, b in zip(edges, edges[1:], strict=False)]

    @torch.no_grad()
    def read(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What a block cache gives, document by document and chunk by chunk, of q, k and v that are not rotated:
        (B, H, N, D), zeros on padding."""
        out = torch.zeros_like(q)
        for row, begin, length in self.documents():
            settings = RetrievalSettings(self.block_size, self.top_k, self.selection, joint=self.joint)
            cache = BlockCache(settings, self.frequencies, one_landmark=True)
            for first in range(begin, begin + length, self.chunk):
                tokens = slice(first, min(first + self.chunk, begin + length))
                chunk = cache.begin_chunk([tokens.stop - first])
                cos, sin = rotation_table(chunk.position_ids, self.frequencies)
                part = [x[row : row + 1, :, tokens] for x in (q, k, v)]
                part[:2] = [rotate(x, cos[:, None], sin[:, None]) for x in part[:2]]
                out[row, :, tokens] = attend_chunk(self.layer, *part, cache, chunk, backend="eager")[0]
                cache.end_chunk(chunk)
        return out


# Every feature once, small.
CASES = [
    Case(6),
    Case(12),
    Case(38),
    Case(120, dim=4),
    Case(36, batch=2, heads=4, key_heads=2),
    Case(36, rotary=4),
    Case(36, top_k=0),
    Case(36, top_k=1),
    Case(36, top_k=20),
    Case(36, chunk=3),
    Case(41, chunk=10, block_size=5, top_k=3),
    Case(38, layer=0, equal_landmarks=True),
    Case(38, layer=0, equal_landmarks=True, selection="max_over_heads"),
    Case(38, selection="max_over_heads", heads=3, key_heads=3),
    Case(38, selection="max_over_query_heads", heads=4, key_heads=2),
    Case(38, selection="max_over_tokens", heads=3, key_heads=1),
    Case(38, batch=4, start=(0, 7, 38, 36)),
    Case(38, batch=3, start=(0, 7, 37), selection="max_over_tokens"),
    Case(40, batch=2, cu_seqlens=(0, 1, 1, 40, 63, 80)),
    Case(50, cu_seqlens=(0, 17, 50), layer=0, equal_landmarks=True),
    Case(26, joint=True),
    Case(26, top_k=20, heads=4, key_heads=2, joint=True),
    Case(26, batch=3, start=(0, 7, 25), selection="max_over_tokens", joint=True),
    Case(20, batch=2, cu_seqlens=(0, 1, 1, 20, 27, 40), layer=0, equal_landmarks=True, joint=True),
]
