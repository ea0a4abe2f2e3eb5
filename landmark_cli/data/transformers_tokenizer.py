"""Tokenizers of the transformers library as this project uses one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from landmark_cli.cores import available_cores
from landmark_cli.data.pretrained_tokenizers import (
    LANDMARK_TOKEN,
    add_tokens,
    begin_ids,
    decodes_by_backend,
    encoding_by,
    largest_id,
    open_tokenizer,
    pad_on_the_left,
    text_ids,
)
from landmark_cli.data.text_tokenizer import TextTokenizer
from landmark_cli.errors import LandmarkError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TransformersTokenizer(TextTokenizer):
    """Any tokenizer that `transformers.AutoTokenizer` opens."""

    # An encoding of the tokenizers library takes a few hundred bytes a token, so batches are small: about a book for
    # each core, which encodes one piece at a time.
    piece_bytes = 2 << 20

    def __init__(self, name: str, *, trust_remote_code: bool = False, reads_special: bool = False) -> None:
        self.name, self.trust_remote_code, self._reads_special = name, trust_remote_code, reads_special
        self.batch_bytes = min(max(available_cores(), 2), 16) << 20
        self._tokenizer = self._open()
        if self._tokenizer.eos_token_id is None:
            raise LandmarkError(f"the tokenizer {name} has no end-of-text token (eos_token), which ends every document")
        self.eot_id = self._tokenizer.eos_token_id
        self.begin = tuple(begin_ids(self._tokenizer))
        self.vocab_size = largest_id(self._tokenizer) + 1
        self.landmark_id = self._tokenizer.get_vocab().get(LANDMARK_TOKEN, self.vocab_size)
        self._fast = getattr(self._tokenizer, "backend_tokenizer", None)
        self._decodes_alone = self._fast is not None and decodes_by_backend(self._tokenizer)
        self._read_special()

    def _read_special(self) -> None:
        if self._fast is not None:
            # A document that spells a special token must not end it.
            self._fast.encode_special_tokens = not self._reads_special

    def __getstate__(self) -> dict[str, Any]:
        """For another process, which needs no transformers to encode and decode as this one does. Raises TypeError for
        a tokenizer that has Python in it."""
        if not self._decodes_alone:
            raise TypeError(f"the tokenizer {self.name} cannot be handed to another process: it has Python in it")
        return self.__dict__ | {"_tokenizer": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._read_special()

    def _open(self) -> PreTrainedTokenizerBase:
        return open_tokenizer(self.name, trust_remote_code=self.trust_remote_code)

    def encode(self, text: str) -> list[int]:
        return self.encode_documents([text])[0].tolist()

    def encode_documents(self, documents: Sequence[str | bytes]) -> list[np.ndarray]:
        texts = [text.decode() if isinstance(text, bytes) else text for text in documents]
        if self._fast is None:
            ids = [text_ids(self._tokenizer, text, self._reads_special) for text in texts]
        else:
            with encoding_by(self.name):
                ids = [e.ids for e in self._fast.encode_batch_fast(texts, add_special_tokens=False)]
        return [np.asarray(row, dtype=np.uint32) for row in ids]

    def _encode_with_places(self, documents: Sequence[bytes]) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        texts = [text.decode() for text in documents]
        with encoding_by(self.name):
            encodings = self._fast.encode_batch(texts, add_special_tokens=False)
        for text, encoding in zip(texts, encodings, strict=True):
            numbers = chain.from_iterable(encoding.offsets)
            offsets = np.fromiter(numbers, dtype=np.int64, count=2 * len(encoding)).reshape(-1, 2)
            # A tokenizer may give a token of white space, or one without text, a place of no width anywhere near it.
            starts, ends = np.maximum.accumulate(byte_places(text)[offsets], axis=0).T
            yield np.asarray(encoding.ids, dtype=np.uint32), starts, ends

    def encode_marked(self, documents: Sequence[bytes]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        if self._fast is not None:
            return super().encode_marked(documents)
        # A tokenizer in Python says nothing of places: the beginning of a text tells how many ids that beginning has.
        encoded = self.encode_documents(documents)
        marks = [np.zeros(len(ids), dtype=np.uint8) for ids in encoded]
        for text, marked in zip(documents, marks, strict=True):
            for span in getattr(text, "answers", ()):
                first, last = (len(self.encode(text[:place].decode())) for place in span)
                marked[first:last] = 1
        return encoded, marks

    def decode(self, ids: Sequence[int]) -> str:
        ids = np.asarray(ids).tolist()
        if self._decodes_alone:
            # As transformers does, which looks at the type of each id before.
            return self._fast.decode(ids, skip_special_tokens=False)
        return self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    def as_transformers(self, landmark: bool = True) -> PreTrainedTokenizerBase:
        # A second copy, so that the tokenizer here keeps encoding as before.
        tokenizer = self._open()
        if landmark:
            add_tokens(tokenizer, [LANDMARK_TOKEN])
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        pad_on_the_left(tokenizer)
        return tokenizer


def byte_places(text: str) -> np.ndarray:
    """Where the UTF-8 bytes of each character of a text begin, and behind the last one its end: (characters + 1,)
    int64."""
    if text.isascii():
        return np.arange(len(text) + 1)
    codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    places = np.zeros(len(codes) + 1, dtype=np.int64)
    (1 + (codes > 0x7F) + (codes > 0x7FF) + (codes > 0xFFFF)).cumsum(out=places[1:])
    return places
