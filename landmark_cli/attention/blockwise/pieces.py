"""How large a piece is that is worked on at a time."""

from __future__ import annotations

from collections.abc import Iterator

# Numbers in the largest tensor of a piece, in float32: half of what the second-level cache of a core of today's server
# processors holds, so that what one operation leaves there the next one finds. Half and twice as many are as fast.
PIECE = 1 << 18


def pieces(count: int, each: int) -> Iterator[slice]:
    """Slices that go through `count` items of `each` numbers, as many at a time as make a piece, and one at least."""
    step = max(1, PIECE // max(1, each))
    for begin in range(0, count, step):
        yield slice(begin, min(begin + step, count))
