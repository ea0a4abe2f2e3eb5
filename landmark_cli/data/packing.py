"""What a window of training holds of documents: whole ones, and where each of them stands in the window's stream."""

from __future__ import annotations

from bisect import bisect_right
from typing import NamedTuple

import numpy as np

from landmark_cli.data.token_file import TokenFile

# Tokens looked through at a time for ends of documents.
PIECE = 1 << 24


class Place(NamedTuple):
    """Where a window's text stands: from token `start` of `file` on, `length` tokens."""

    file: TokenFile
    start: int
    length: int


def whole_documents(file: TokenFile, length: int) -> np.ndarray:
    """Windows of at most `length` text tokens that cut no document which one of them can hold: (windows, 2) int64, the
    first token and the number of tokens of each.

    A window takes as many whole documents as it has room for, in the order of the file. A longer document is cut into
    windows that are full; what is left of it begins the next one.
    """
    ends, tokens = document_ends(file), len(file.tokens)
    windows, start, document = [], 0, 0
    while start < tokens:
        # Documents that end within reach of this window.
        following = bisect_right(ends, start + length, lo=document)
        end = int(ends[following - 1]) if following > document else start + length
        windows.append((start, end - start))
        start, document = end, following
    return np.array(windows, dtype=np.int64).reshape(-1, 2)


def document_ends(file: TokenFile) -> np.ndarray:
    """Where each document of a token file ends, in rising order: (documents,) int64, behind its end-of-text token. What
    follows the last of these is a document too."""
    ends = [
        np.flatnonzero(file.tokens[first : first + PIECE] == file.metadata.eot_id) + (first + 1)
        for first in range(0, len(file.tokens), PIECE)
    ]
    ends = np.concatenate([np.zeros(0, dtype=np.int64), *ends])
    tokens = len(file.tokens)
    return ends if not tokens or (len(ends) and ends[-1] == tokens) else np.append(ends, tokens)


class Streams(NamedTuple):
    """Where the text of rows stands in their streams; all (rows, tokens), a column for each text token.

    column: its position. closes: whether a landmark stands behind it. begins: whether a document begins with it, of
    which landmarks count from there.
    """

    column: np.ndarray
    closes: np.ndarray
    begins: np.ndarray


def lay_out(text: np.ndarray, landmark_freq: int | None, eot_id: int | None) -> Streams:
    """Where the text tokens of rows (rows, tokens) stand, with a landmark after every `landmark_freq` of a document's.

    eot_id: of the token that ends a document; None has a row count as one document.
    """
    index = np.broadcast_to(np.arange(text.shape[1]), text.shape)
    begins = index == 0
    if eot_id is not None:
        begins = begins.copy()
        begins[:, 1:] |= text[:, :-1] == eot_id
    number = index - np.maximum.accumulate(np.where(begins, index, 0), axis=1)
    closes = np.zeros(text.shape, dtype=bool)
    if landmark_freq is not None:
        closes = number % landmark_freq == landmark_freq - 1
    return Streams(index + closes.cumsum(axis=1) - closes, closes, begins)


def bounds_of(streams: Streams, lengths: np.ndarray, ends: np.ndarray, width: int) -> np.ndarray:
    """cu_seqlens of the documents of all rows one after the other, int32, in rows of `width` positions.

    lengths: text tokens of each row; ends: where their streams end, (rows,): what follows is as a document. Their
    number is a power of two and one more, so that it is rarely another: what is too many stands at the end.
    """
    rows = len(lengths)
    real = streams.begins & (np.arange(streams.begins.shape[1]) < lengths[:, None])
    first = np.arange(rows)[:, None] * width
    bounds = np.unique(np.concatenate([(first + streams.column)[real], first[:, 0], (first[:, 0] + ends)]))
    bounds = bounds[bounds < rows * width]
    room = max(16, 1 << (len(bounds) - 1).bit_length()) + 1
    return np.append(bounds, np.full(room - len(bounds), rows * width)).astype(np.int32)
