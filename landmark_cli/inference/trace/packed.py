"""Which blocks were read, packed for a page: of a prompt of any length a few bytes for each block that a head read.

Three rows of little-endian numbers in base64. Slots go by token, then layer, then head: `counts` says how many blocks
each slot read, and `blocks` and `shares` have their numbers and their shares of the head's attention, slot after slot.
A share is a 16-bit fraction of 65535.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np

WHOLE = 65535
TYPES = ("u1", "u2", "u4")


def packed_reads(reads: Sequence[list[dict[str, Any]]]) -> dict[str, Any]:
    """What Generation.reads has, by the names `layers` (the layers that read blocks), `heads` (of each), `counts`,
    `blocks` and `shares`."""
    entries = [entry for of_token in reads for entry in of_token]
    layer, head, block = (np.array([entry[name] for entry in entries], np.int64) for name in ("layer", "head", "block"))
    share = np.array([entry["share"] for entry in entries], np.float64)
    token = np.repeat(np.arange(len(reads)), [len(of_token) for of_token in reads])
    layers, layer_at = np.unique(layer, return_inverse=True)
    heads = int(head.max()) + 1 if len(head) else 0
    slot = (token * len(layers) + layer_at) * heads + head
    order = np.argsort(slot, kind="stable")
    counts = np.bincount(slot, minlength=len(reads) * len(layers) * heads)
    shares = np.rint(np.clip(share, 0, 1) * WHOLE)
    rows = {"counts": counts, "blocks": block[order], "shares": shares[order].astype(np.int64)}
    return {"layers": layers.tolist(), "heads": heads} | {name: encoded(row) for name, row in rows.items()}


def encoded(row: np.ndarray) -> dict[str, str]:
    """Numbers from 0 on as base64 of the narrowest type that holds them all."""
    most = int(row.max()) if len(row) else 0
    kind = next(kind for kind in TYPES if most <= np.iinfo(kind).max)
    return {"type": kind, "data": base64.b64encode(row.astype(f"<{kind}").tobytes()).decode()}
