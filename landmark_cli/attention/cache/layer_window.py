"""What a layer with a sliding window holds: the newest text that its next token can see, rolling on."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class HeldText(NamedTuple):
    """Of one row of such a layer: keys, rotated by their offset in their block, and values, (G, n, D) each, the oldest
    first."""

    keys: Tensor
    values: Tensor


def rolled(text: Tensor, length: int) -> Tensor:
    """Of `length` tokens that are held and the tokens of a chunk behind them, the last `length` that are held or text:
    (n, length) their numbers, in order. text: (n, T) bool."""
    count = text.sum(-1, keepdim=True)
    # Where each token of the text goes; what goes nowhere goes behind all that is asked for. No sort: that takes longer
    # than a layer's attention.
    slot = text.cumsum(-1) - 1 + length - count
    slot = torch.where(text & (slot >= 0), slot, length)
    source = torch.arange(length + 1, device=text.device) + count
    fresh = torch.arange(length, length + text.shape[1], device=text.device)
    return source.scatter_(1, slot, fresh.expand_as(slot))[:, :length].contiguous()


class LayerWindow:
    """The newest window - 1 text tokens of every row. Landmarks are not among them.

    keys, values: (B, G, window - 1, D), the newest last. A key is rotated by its offset among the text of its block, so
    that however far the window rolls on, each was rounded once. real: (B, window - 1) bool, there is such a token.
    """

    def __init__(self, window: int, block_size: int, like: Tensor):
        """window: text tokens that a token sees, itself included. like: the layer's keys, (B, G, T, D)."""
        batch, heads, _, head_dim = like.shape
        self.block_size = block_size
        self.keys = like.new_zeros(batch, heads, window - 1, head_dim)
        self.values = torch.zeros_like(self.keys)
        self.real = torch.zeros(batch, window - 1, dtype=torch.bool, device=like.device)

    @property
    def length(self) -> int:
        return self.keys.shape[2]

    def of(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """keys, values and real of some rows, (n,), in rising order."""
        held = self.keys, self.values, self.real
        return held if len(rows) == len(self.keys) else tuple(x.index_select(0, rows) for x in held)

    def append(self, keys: Tensor, values: Tensor, text: Tensor, rows: Tensor, source: Tensor) -> None:
        """Take up a chunk's text, (n, G, T, D) each; text: (n, T) bool, which of its tokens are that; rows: (n,), of
        which rows, in rising order. source: what `rolled` gives of text, the same for all layers that hold as much. In
        place, for recorded steps go on with the same tensors."""
        old_keys, old_values, old_real = self.of(rows)
        index = source[:, None, :, None].expand(old_keys.shape)
        for to, new in (
            (self.keys, torch.cat([old_keys, keys.to(old_keys.dtype)], dim=2).gather(2, index)),
            (self.values, torch.cat([old_values, values.to(old_values.dtype)], dim=2).gather(2, index)),
            (self.real, torch.cat([old_real, text], dim=1).gather(1, source)),
        ):
            if len(new) == len(to):
                to.copy_(new)
            else:
                to.index_copy_(0, rows.long(), new)

    def forget(self, row: int | None = None) -> None:
        """Forget what a row has read, or all of them. Nothing is left of it: what is not real has the weight 0, and
        times nan, of a text that overflowed, that would be nan."""
        for part in (self.keys, self.values, self.real):
            part[slice(None) if row is None else row] = 0

    def take(self, rows: Sequence[int]) -> None:
        """Row r becomes what row rows[r] is. With as many rows as before the tensors stay where they are."""
        for name in ("keys", "values", "real"):
            old = getattr(self, name)
            new = old[torch.tensor(rows, device=old.device)]
            if len(rows) == len(old):
                old.copy_(new)
            else:
                setattr(self, name, new)

    def copy_of(self, row: int) -> HeldText:
        """A copy of what a row holds."""
        count = int(self.real[row].sum())
        first = self.length - count
        return HeldText(self.keys[row, :, first:].clone(), self.values[row, :, first:].clone())

    def put(self, row: int, held: HeldText) -> None:
        """Have a row hold what `copy_of` gave, on any device."""
        first = self.length - held.keys.shape[1]
        self.keys[row, :, first:] = held.keys.to(self.keys.device)
        self.values[row, :, first:] = held.values.to(self.values.device)
        self.real[row] = torch.arange(self.length, device=self.real.device) >= first

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerWindow:
        other = copy.copy(self)
        other.keys, other.values, other.real = self.keys.clone(), self.values.clone(), self.real.clone()
        return other
