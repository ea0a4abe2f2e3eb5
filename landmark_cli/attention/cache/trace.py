"""Which blocks each query read, and what share of its attention each got."""

from __future__ import annotations

from torch import Tensor


class Trace:
    """Set as `BlockCache.trace`, holds what every layer's queries read in the chunk read last.

    layers: layer -> (ages, shares, block counts): (B, H, T, k) int, 0 where no block was read; (B, H, T, k) float, the
    block's share of the outer softmax; (B,) complete blocks before the chunk.
    """

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def record(self, layer: int, ages: Tensor, shares: Tensor, real: Tensor, blocks: Tensor) -> None:
        """Keep what a layer's queries read.

        ages may be shared by heads or tokens, (B, H or 1, T or 1, k); shares: (B, H, T, k); real: (B, T) bool, no
        padding; blocks: (B,) complete blocks before the chunk.
        """
        self.layers[layer] = ages.expand(shares.shape).masked_fill(~real[:, None, :, None], 0), shares, blocks

    def read_by(self, row: int, token: int) -> list[dict[str, int | float]]:
        """The blocks that one query of the last chunk read: a dict of layer, head, block and share for each.

        row: of the batch. token: of the chunk, landmarks counted; -1 is the last. Blocks are numbered from the start
        of the row's text, `landmark_freq` text tokens each. In order of layer, head and block.
        """
        found = []
        for layer, (ages, shares, blocks) in sorted(self.layers.items()):
            numbers = (blocks[row] - ages[row, :, token]).tolist()
            pairs = zip(ages[row, :, token].tolist(), numbers, shares[row, :, token].tolist(), strict=True)
            for head, (age, number, share) in enumerate(pairs):
                read = sorted((b, s) for a, b, s in zip(age, number, share, strict=True) if a > 0)
                found += [{"layer": layer, "head": head, "block": b, "share": s} for b, s in read]
        return found
