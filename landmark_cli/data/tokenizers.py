"""Text <-> token ids: GPT-2's vocabulary, which is part of this package, or any tokenizer of transformers.

`load_tokenizer` gives either kind behind one small interface. tiktoken defines what GPT-2's ids are; many documents at
once go through gigatoken where it is installed, which gives the same ids an order of magnitude faster.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import os
import re
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from landmark_cli.console import info
from landmark_cli.data.pretrained_tokenizers import (
    LANDMARK_TOKEN,
    PROBE,
    add_tokens,
    begin_ids,
    check_read_back,
    decodes_by_backend,
    encoding_by,
    largest_id,
    open_tokenizer,
    pad_on_the_left,
    text_ids,
)
from landmark_cli.errors import LandmarkError

if TYPE_CHECKING:
    import tiktoken
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

ASSETS = Path(__file__).parent.parent / "assets"
END_OF_TEXT = "<|endoftext|>"
GPT2_EOT_ID = 50256
GPT2_LANDMARK_ID = 50260
GPT2_UNUSED = ("<unused0>", "<unused1>", "<unused2>")
"""Special tokens of a GPT-2 tokenizer directory that keep `<landmark>` at 50260, the id of the authors' checkpoints."""

# GPT-2 cuts text into these pieces before it merges bytes; the quantifiers of the published expression made possessive.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


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


def load_tokenizer(
    name: str = "gpt2", *, trust_remote_code: bool = False, reads_special: bool = False
) -> TextTokenizer:
    """Open a tokenizer: "gpt2" (needs no network), a transformers tokenizer directory, or a hub id.

    trust_remote_code: whether Python code that comes with it may run. reads_special: whether a special token that a
    text spells is read as such, as in what a chat template writes.

    Raises:
        LandmarkError: there is no such tokenizer, or it has no end-of-text token.
    """
    if name == "gpt2":
        return GPT2Tokenizer()
    return TransformersTokenizer(name, trust_remote_code=trust_remote_code, reads_special=reads_special)


def tokenizer_fingerprint(encode: Callable[[str], Sequence[int]]) -> str:
    """A short hash of the ids that `encode` gives to a fixed text of many kinds.

    Tokenizers that read text alike share this hash, whatever special tokens were added to one of them, so it shows
    whether a token file and a model belong together.
    """
    ids = np.asarray(encode(PROBE), dtype="<u4")
    return hashlib.sha256(ids.tobytes()).hexdigest()[:16]


class GPT2Tokenizer(TextTokenizer):
    """GPT-2's byte-pair encoding (50257 ids) from the files in this package."""

    name = "gpt2"
    vocab_size = 50257
    eot_id = GPT2_EOT_ID
    landmark_id = GPT2_LANDMARK_ID
    piece_bytes = batch_bytes = 8 << 20

    def __reduce__(self) -> tuple[type[GPT2Tokenizer], tuple[()]]:
        """Another process opens it anew."""
        return type(self), ()

    @functools.cached_property
    def encoding(self) -> tiktoken.Encoding:
        """tiktoken's encoding, which defines the ids."""
        import tiktoken

        return tiktoken.Encoding(
            "gpt2",
            pat_str=GPT2_PATTERN,
            mergeable_ranks=self._ranks,
            special_tokens={END_OF_TEXT: GPT2_EOT_ID},
            explicit_n_vocab=self.vocab_size,
        )

    @functools.cached_property
    def _ranks(self) -> dict[bytes, int]:
        byte_of = _gpt2_byte_of_character()
        return {bytes([byte_of[c] for c in token]): rank for token, rank in _gpt2_vocabulary().items()}

    @functools.cached_property
    def _bulk(self) -> BulkGPT2 | None:
        try:
            return BulkGPT2(self._ranks)
        except ImportError:
            info("encoding with tiktoken; the package gigatoken gives the same ids many times faster")
            return None

    def encode(self, text: str) -> list[int]:
        return self.encoding.encode_ordinary(text)

    def encode_documents(self, documents: Sequence[str | bytes]) -> list[np.ndarray]:
        if self._bulk is None:
            return self._encode_with_tiktoken(documents)
        data = [text.encode() if isinstance(text, str) else text for text in documents]
        encoded = self._bulk.encode(data)
        newer = [i for i, text in enumerate(data) if has_newer_characters(text)]
        for i, ids in zip(newer, self._encode_with_tiktoken([data[i] for i in newer]), strict=True):
            encoded[i] = ids
        return encoded

    def _encode_with_tiktoken(self, documents: Sequence[str | bytes]) -> list[np.ndarray]:
        def encode(text: str | bytes) -> np.ndarray:
            text = text.decode() if isinstance(text, bytes) else text
            return self.encoding.encode_to_numpy(text, disallowed_special=())

        if len(documents) < 2:
            return [encode(text) for text in documents]
        with ThreadPoolExecutor(available_cores()) as pool:
            return list(pool.map(encode, documents))

    def _encode_with_places(self, documents: Sequence[bytes]) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        for ids in self.encode_documents(documents):
            lengths = np.array(
                [len(token) for token in self.encoding.decode_tokens_bytes(ids.tolist())], dtype=np.int64
            )
            ends = lengths.cumsum()
            yield ids, ends - lengths, ends

    def decode(self, ids: Sequence[int]) -> str:
        ids = np.asarray(ids).tolist()
        names = {GPT2_LANDMARK_ID: LANDMARK_TOKEN, **{GPT2_EOT_ID + 1 + i: name for i, name in enumerate(GPT2_UNUSED)}}
        pieces, start = [], 0
        for i in [i for i, token in enumerate(ids) if token in names]:
            pieces += [self.encoding.decode(ids[start:i]), names[ids[i]]]
            start = i + 1
        return "".join([*pieces, self.encoding.decode(ids[start:])])

    def as_transformers(self, landmark: bool = True) -> PreTrainedTokenizerFast:
        from tokenizers import AddedToken
        from transformers import PreTrainedTokenizerFast

        tokenizer = gpt2_fast_tokenizer()
        names = [END_OF_TEXT, *GPT2_UNUSED, LANDMARK_TOKEN] if landmark else [END_OF_TEXT]
        tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            bos_token=END_OF_TEXT,
            eos_token=END_OF_TEXT,
            unk_token=END_OF_TEXT,
            pad_token=GPT2_UNUSED[0] if landmark else END_OF_TEXT,
            padding_side="left",
            additional_special_tokens=names[1:],
            clean_up_tokenization_spaces=False,
        )


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


class BulkGPT2:
    """GPT-2 ids through gigatoken, from UTF-8 bytes.

    One core does several hundred MB a second, about what one thread reads and checks, so gigatoken is given one core.
    Its cache of words has no bound: the encoder is made anew when the process has grown by `limit` bytes.
    """

    def __init__(self, ranks: dict[bytes, int], limit: int = 384 << 20) -> None:
        import gigatoken
        import psutil

        self._limit = limit
        self._ranks = b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ranks.items())
        self._open = gigatoken.Tokenizer.from_tiktoken
        self._process = psutil.Process()
        self._renew()

    def _renew(self) -> None:
        with tempfile.NamedTemporaryFile(suffix=".tiktoken") as file:
            file.write(self._ranks)
            file.flush()
            self._tokenizer = self._open(file.name, "gpt2")
        self._size = self._process.memory_info().rss

    def encode(self, documents: list[bytes]) -> list[np.ndarray]:
        encoded = [self._tokenizer.encode(text) for text in documents]
        if self._process.memory_info().rss > self._size + self._limit:
            self._renew()
        return encoded


# Letters and digits that Unicode 17 added: gigatoken reads them as such, tiktoken does not know them yet.
_NEWER_RANGES = (
    (0x88F, 0x88F), (0xC5C, 0xC5C), (0xCDC, 0xCDC), (0xA7CE, 0xA7CF), (0xA7D2, 0xA7D2), (0xA7D4, 0xA7D4),
    (0xA7F1, 0xA7F1), (0x10940, 0x10959), (0x10EC5, 0x10EC7), (0x11DB0, 0x11DDB), (0x11DE0, 0x11DE9),
    (0x16EA0, 0x16EB8), (0x16EBB, 0x16ED3), (0x16FF2, 0x16FF6), (0x187F8, 0x187FF), (0x18D09, 0x18D1E),
    (0x18D80, 0x18DF2), (0x1E6C0, 0x1E6FF), (0x2B73A, 0x2B73F), (0x2CEA2, 0x2CEAD), (0x323B0, 0x33479),
)  # fmt: skip
_NEWER = re.compile("[" + "".join(f"{chr(a)}-{chr(b)}" for a, b in _NEWER_RANGES) + "]")
_NEWER_LEADS = tuple({chr(a).encode()[:1] for a, _ in _NEWER_RANGES})


def has_newer_characters(text: bytes) -> bool:
    """Whether UTF-8 text holds a character on which gigatoken and tiktoken may differ."""
    return any(lead in text for lead in _NEWER_LEADS) and _NEWER.search(text.decode()) is not None


def available_cores() -> int:
    """This process's share of the cores: all of them, or fewer when a launcher started several processes here."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def gpt2_fast_tokenizer() -> Any:
    """GPT-2 as a `tokenizers.Tokenizer` without any special token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    lines = (ASSETS / "vocab.bpe").read_text(encoding="utf-8").splitlines()
    merges = [tuple(line.split(" ")) for line in lines[1:] if line]
    tokenizer = Tokenizer(models.BPE(vocab=_gpt2_vocabulary(), merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _gpt2_vocabulary() -> dict[str, int]:
    """Tokens as the published file spells them, one character a byte, without the end of text."""
    vocabulary = json.loads((ASSETS / "encoder.json").read_text(encoding="utf-8"))
    del vocabulary[END_OF_TEXT]
    return vocabulary


def _gpt2_byte_of_character() -> dict[str, int]:
    """How the published file spells bytes: printable ones as themselves, the others from U+0100 on, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
