"""What a tokenizer is to this project, whichever library encodes: plain text in, ids out."""

from __future__ import annotations

import functools
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from landmark_cli.data.pretrained_tokenizers import LANDMARK_TOKEN, PROBE, check_read_back

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TextTokenizer(ABC):
    """A tokenizer as this project uses one: plain text in, ids out, no special token read from the text.

    Attributes:
        name: "gpt2", a directory, or a hub id: what `load_tokenizer` was given.
        vocab_size: ids are below this: the largest id of any token, special tokens included, plus one.
        eot_id: the token that ends a document.
        landmark_id: the id of `<landmark>` in what `save_pretrained` writes.
        piece_bytes: longer documents are cut into pieces of at most this many bytes; the same on every machine.
        batch_bytes: how much text is worth handing to `encode_documents` at once.
        begin: what it puts in front of every text by itself, as one of the transformers library.
        trust_remote_code: whether Python code that comes with it may run.
    """

    name: str
    vocab_size: int
    eot_id: int
    landmark_id: int
    piece_bytes: int
    batch_bytes: int
    begin: tuple[int, ...] = ()
    trust_remote_code: bool = False

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of one text, without any token around it."""

    @abstractmethod
    def encode_documents(self, documents: Sequence[str | bytes]) -> list[np.ndarray]:
        """The ids of many texts (bytes are UTF-8), each a uint32 array (n,), using all cores."""

    def encode_marked(self, documents: Sequence[bytes]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """The ids of many texts, as `encode_documents` gives them, and for each text which of its ids are of answers:
        (n,) uint8, 1 where a token has some of an answer's text, else 0. A text without `answers` (see
        `documents.Marked`) has none."""
        ids, marks = [], []
        for text, (encoded, starts, ends) in zip(documents, self._encode_with_places(documents), strict=True):
            marked = np.zeros(len(encoded), dtype=np.uint8)
            for first, last in getattr(text, "answers", ()):
                # Tokens of one character's bytes may stand at the same place; places never go back.
                marked[np.searchsorted(ends, first, "right") : np.searchsorted(starts, last, "left")] = 1
            ids.append(encoded)
            marks.append(marked)
        return ids, marks

    @abstractmethod
    def _encode_with_places(self, documents: Sequence[bytes]) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """The ids of texts, and the byte at which the text of each begins, and the one behind its last."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; special tokens are written out."""

    @abstractmethod
    def as_transformers(self, landmark: bool = True) -> PreTrainedTokenizerBase:
        """This tokenizer as one of the transformers library. landmark: whether with the landmark token."""

    def save_pretrained(self, directory: str | Path, landmark: bool = True) -> None:
        """Write a tokenizer directory that `transformers.AutoTokenizer` opens, with `<landmark>` unless told not to."""
        self.as_transformers(landmark).save_pretrained(directory)

    def check_saved(self, landmark: bool = True) -> None:
        """Make sure, before a model is trained with it, that what `save_pretrained` writes is this tokenizer.

        Raises:
            LandmarkError: the directory cannot be written or read, or the tokenizer read from it gives other ids.
        """
        special = {"eos_token": self.eot_id} | ({LANDMARK_TOKEN: self.landmark_id} if landmark else {})
        check_read_back(
            functools.partial(self.save_pretrained, landmark=landmark),
            self.name,
            self.encode,
            special,
            trust_remote_code=self.trust_remote_code,
        )

    @functools.cached_property
    def fingerprint(self) -> str:
        """What tells this tokenizer from another one: see `tokenizer_fingerprint`."""
        return tokenizer_fingerprint(self.encode)


def tokenizer_fingerprint(encode: Callable[[str], Sequence[int]]) -> str:
    """A short hash of the ids that `encode` gives to a fixed text of many kinds.

    Tokenizers that read text alike share this hash, whatever special tokens were added to one of them, so it shows
    whether a token file and a model belong together.
    """
    ids = np.asarray(encode(PROBE), dtype="<u4")
    return hashlib.sha256(ids.tobytes()).hexdigest()[:16]
