"""Documents -> batches of text to encode together, long documents in pieces."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from landmark_cli.data.corpora import Corpus
from landmark_cli.data.documents import BadText, Document
from landmark_cli.data.merge import Process
from landmark_cli.errors import LandmarkError

if TYPE_CHECKING:
    from landmark_cli.data.text_tokenizer import TextTokenizer


@dataclass
class Batch:
    """Text to encode together: pieces of documents in order.

    Attributes:
        pieces: UTF-8.
        places: for each piece its split, and whether a document ends with the piece.
        text_bytes: size of all pieces together.
        read: bytes that the documents of this batch take where they are stored.
        next_document: the number of the document behind the last one that ends in this batch.
        whole: whether no document goes on in the next batch.
        bad: what stood in the place of documents; in this batch each of these documents is empty.
    """

    pieces: list[bytes] = field(default_factory=list)
    places: list[tuple[str, bool]] = field(default_factory=list)
    text_bytes: int = 0
    read: int = 0
    next_document: int = 0
    whole: bool = True
    bad: list[BadText] = field(default_factory=list)

    def add(self, piece: bytes, split: str, ends: bool) -> None:
        self.pieces.append(piece)
        self.places.append((split, ends))
        self.text_bytes += len(piece)


Encoded = tuple[Batch, list[np.ndarray], list[np.ndarray | None]]
"""A batch, the ids of its pieces, and which of these are of answers (see `TextTokenizer.encode_marked`)."""


def taken(corpus: Corpus, process: Process, first: int) -> Iterator[tuple[int, str, Document]]:
    """The documents from number `first` on that are for this process: number, split and document."""
    for number, (split, document) in enumerate(corpus.documents()):
        if number >= first and process.takes(number):
            yield number, split, document


def encoded(batches: Iterable[Batch], tokenizer: TextTokenizer, *, marked: bool) -> Iterator[Encoded]:
    """Batches with the ids of their pieces. marked: whether documents say which of their text is answers."""
    for batch in batches:
        if marked:
            yield batch, *tokenizer.encode_marked(batch.pieces)
        else:
            yield batch, tokenizer.encode_documents(batch.pieces), [None] * len(batch.pieces)


def text_batches(
    documents: Iterable[tuple[int, str, Document]],
    *,
    piece_bytes: int,
    batch_bytes: int,
    batch_documents: int,
    skip_bad_text: bool,
) -> Iterator[Batch]:
    """Documents in batches.

    documents: number, split and document of each. piece_bytes: longer ones are cut. batch_bytes, batch_documents: a
    batch with this much text, or this many documents, is full.

    Raises:
        LandmarkError: a document is no text and is not to be skipped.
    """
    batch = Batch()
    for number, split, document in documents:
        last, counted = b"", 0
        try:
            for count, piece in enumerate(document.pieces(piece_bytes)):
                if count:
                    batch.add(last, split, ends=False)
                    batch.read += len(last)
                    counted += len(last)
                    batch.whole = False
                    if batch.text_bytes >= batch_bytes:
                        yield batch
                        batch = Batch()
                last = piece
        except BadText as bad:
            if not skip_bad_text:
                raise LandmarkError(or_skip(str(bad))) from None
            batch.bad.append(bad)
        batch.add(last, split, ends=True)
        batch.read += document.size - counted
        batch.next_document, batch.whole = number + 1, True
        if batch.text_bytes >= batch_bytes or len(batch.pieces) >= batch_documents:
            yield batch
            batch = Batch()
    yield batch


def or_skip(message: str) -> str:
    """What to tell somebody whose work stops at bad text: the message, and that --on-bad-text skips such text."""
    return f"{message}; `landmark prepare --on-bad-text skip` leaves out what is no text and keeps the rest"
