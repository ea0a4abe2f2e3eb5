"""GPT-2's tokenizer, from the files of its vocabulary that are part of this package.

tiktoken defines what GPT-2's ids are; many documents at once go through gigatoken where it is installed.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from landmark_cli.console import info
from landmark_cli.cores import available_cores
from landmark_cli.data.assets import ASSETS
from landmark_cli.data.gpt2_bulk import BulkGPT2, has_newer_characters
from landmark_cli.data.pretrained_tokenizers import LANDMARK_TOKEN
from landmark_cli.data.text_tokenizer import TextTokenizer

if TYPE_CHECKING:
    import tiktoken
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
GPT2_EOT_ID = 50256
GPT2_LANDMARK_ID = 50260
GPT2_UNUSED = ("<unused0>", "<unused1>", "<unused2>")
"""Special tokens of a GPT-2 tokenizer directory that keep `<landmark>` at 50260, the id of the authors' checkpoints."""

# GPT-2 cuts text into these pieces before it merges bytes; the quantifiers of the published expression made possessive.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


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
