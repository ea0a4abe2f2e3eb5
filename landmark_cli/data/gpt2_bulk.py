"""GPT-2's ids of many documents by gigatoken: those of tiktoken, an order of magnitude faster."""

from __future__ import annotations

import base64
import re
import tempfile

import numpy as np


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
