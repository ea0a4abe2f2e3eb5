"""A schema with fields of every kind, and content that fits it."""

from dataclasses import dataclass
from typing import Literal


@dataclass
class Inner:
    shape: list[int]


@dataclass
class Schema:
    name: str
    number: float
    kind: Literal["a", "b"]
    inner: dict[str, Inner]
    maybe: int | None = None


GOOD = {"name": "n", "number": 1, "kind": "a", "inner": {"x": {"shape": [1, 2]}}, "maybe": 3}
