"""Documents: a text with a name, as UTF-8 in pieces, checked to be text before any of it is used."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from landmark_cli.file_errors import reading

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
UTF_16_MARKS = (b"\xff\xfe", b"\xfe\xff")
CUT_WINDOW = 1 << 16
CHECKED_AT_ONCE = 1 << 20
# Text has no zero bytes; a document of the web may hold one or two by mistake, UTF-16 is half or a tenth of them.
ZEROS_ALLOWED = 3
ZEROS_SHARE = 0.02
FIELDS_SHOWN = 10
LONGEST_FIELD = 40

Keep = Callable[[Mapping[str, Any]], bool]
"""Which rows are documents, by their fields."""


class BadText(Exception):
    """Something that is no text or cannot be read: the message says where it stands, and what is wrong.

    file: the file that it stands in. documents: how many documents are lost with it; None where all that follows in the
    file is lost and nobody can tell how many documents that would be.
    """

    def __init__(self, message: str, file: str | Path, documents: int | None = 1) -> None:
        super().__init__(message)
        self.file, self.documents = str(file), documents

    def __reduce__(self) -> tuple[type[BadText], tuple[str, str, int | None]]:
        return type(self), (str(self), self.file, self.documents)


class Marked(bytes):
    """A piece of text as UTF-8 that says which of it is answers.

    answers: (first byte, byte behind the last) of each, in order.
    """

    answers: tuple[tuple[int, int], ...] = ()


def marked_pieces(name: str, parts: Iterable[tuple[str, bool]], limit: int) -> Iterator[Marked]:
    """The pieces of a document that is given in parts, each with whether it is an answer. limit: most bytes of one."""
    encoded = [(part.encode(), answer) for part, answer in parts]
    ends = list(itertools.accumulate(len(part) for part, _ in encoded))
    spans = [(end - len(part), end) for (part, answer), end in zip(encoded, ends, strict=True) if answer]
    start = 0
    for text in _memory_pieces(name, name, b"".join(part for part, _ in encoded), limit):
        piece, end = Marked(text), start + len(text)
        piece.answers = tuple((max(a, start) - start, min(b, end) - start) for a, b in spans if a < end and b > start)
        yield piece
        start = end


@dataclass(frozen=True)
class Document:
    """One document of a corpus.

    Attributes:
        name: the file, or the file and its line or row, for messages.
        size: bytes that the document takes where it is stored.
        pieces: called with a limit, yields the text as UTF-8 in order, in pieces of at most that many bytes. Raises
            BadText before the first piece where the document is no text, LandmarkError where the system cannot read it.
    """

    name: str
    size: int
    pieces: Callable[[int], Iterator[bytes]]


def text_file(path: Path, start: int = 0, end: int | None = None) -> Document:
    """A text file, or the bytes from `start` to `end` of one, as a document. A byte order mark is no part of the
    text."""
    if end is None:
        with reading(path):
            end = path.stat().st_size
    return Document(str(path), end - start, partial(_file_pieces, path, start, end - start))


def text_document(name: str, text: str | bytes | None, size: int | None = None, file: str | Path = "") -> Document:
    """A text that is in memory as a document; None is an empty text. file: where the text stands, if not in `name`."""
    size = len(text or "") if size is None else size
    return Document(name, size, partial(_memory_pieces, name, file or name, text or b""))


def bad_document(bad: BadText, size: int = 0) -> Document:
    """What stands where a document should: `bad` is raised when its text is asked for."""
    return Document(str(bad), size, partial(_raise, bad))


def cut_text_file(path: Path, share: float) -> int:
    """The place in a text file that leaves about `share` of it behind, at the end of a line where there is one near."""
    with reading(path), open(path, "rb") as file:
        place = round(path.stat().st_size * (1 - share))
        start = max(0, place - CUT_WINDOW)
        file.seek(start)
        return start + cut_before(file.read(place - start + 2), place - start)


# Places where a tokenizer that first splits text into words starts a new one in any case: after a line feed, or before
# a space, with visible ASCII characters on both sides.
_AFTER_LINE = re.compile(rb"[!-~]\n(?=[!-~])")
_BEFORE_SPACE = re.compile(rb"[!-~](?= [!-~])")


def cut_before(text: bytes, limit: int) -> int:
    """Where to cut UTF-8 text in two at `limit` bytes at most so that its words, and with them its ids, stay the same.

    A line end within the last 64 KiB, or else a space, or else any character (which no tokenizer can be right about).
    """
    start = max(0, limit - CUT_WINDOW)
    for place in (_AFTER_LINE, _BEFORE_SPACE):
        matches = [match.end() for match in place.finditer(text, start, limit + 2) if match.end() <= limit]
        if matches:
            return matches[-1]
    # A byte 10xxxxxx continues a character.
    while limit > 1 and limit < len(text) and text[limit] & 0xC0 == 0x80:
        limit -= 1
    return limit


def no_such_field(name: str, field: str, found: Iterable[str], kind: str = "fields") -> str:
    """What is wrong with rows that have the fields `found`, but not the text field that was asked for.

    kind: what the fields are called, "fields" or "columns".
    """
    found = list(found)
    more = f" and {len(found) - FIELDS_SHOWN} more" if len(found) > FIELDS_SHOWN else ""
    names = ", ".join(name[:LONGEST_FIELD] for name in found[:FIELDS_SHOWN])
    shown = f"only the {kind} {names}{more}" if found else "none at all"
    return f"{name} has no text field {field!r}, {shown}: name the right one with --text-field"


def not_utf8(error: UnicodeError, offset: int = 0) -> str:
    """Why something is not UTF-8. offset: of the bytes that were decoded, where they are not the beginning."""
    if not isinstance(error, UnicodeDecodeError):
        return "has half of a surrogate pair, which UTF-8 cannot hold"
    place = offset + error.start
    if place == 0 and error.object[:2] in UTF_16_MARKS:
        return "not UTF-8 at byte 0: it begins as UTF-16 does (iconv -f UTF-16 -t UTF-8 converts it)"
    return f"not UTF-8 at byte {place} ({error.reason})"


def _raise(bad: BadText, limit: int) -> Iterator[bytes]:
    raise bad
    yield b""


def _memory_pieces(name: str, file: str | Path, text: str | bytes, limit: int) -> Iterator[bytes]:
    text = _as_utf8(name, file, text)
    _check_zeros(name, file, _zeros(text), len(text))
    start = 0
    while len(text) - start > limit:
        # All that `cut_before` looks at: 64 KiB before the limit and two bytes behind it.
        window = start + max(0, limit - CUT_WINDOW)
        place = window + cut_before(text[window : start + limit + 2], start + limit - window)
        yield text[start:place]
        start = place
    yield text[start:] if start else text


def _as_utf8(name: str, file: str | Path, text: str | bytes) -> bytes:
    try:
        if isinstance(text, str):
            return text.encode()
        text.decode()
    except UnicodeError as error:
        raise BadText(f"{name}: {not_utf8(error)}", file) from None
    return text


def _zeros(data: bytes) -> int:
    return data.count(0) if 0 in data else 0


def _check_zeros(name: str, file: str | Path, zeros: int, size: int) -> None:
    if zeros > ZEROS_ALLOWED and zeros > ZEROS_SHARE * size:
        raise BadText(
            f"{name}: {zeros} of its {size} bytes are zero: not UTF-8 but UTF-16 (iconv -f UTF-16LE -t UTF-8 converts "
            f"it) or no text at all",
            file,
        )


def _file_pieces(path: Path, start: int, size: int, limit: int) -> Iterator[bytes]:
    with reading(path):
        file = open(path, "rb")
    with file:
        with reading(path):
            if start == 0 and file.read(len(BYTE_ORDER_MARK)) == BYTE_ORDER_MARK:
                start, size = len(BYTE_ORDER_MARK), size - len(BYTE_ORDER_MARK)
            file.seek(start)
        if size <= limit:
            yield from _memory_pieces(str(path), path, _read(path, file, size), limit)
            return
        _check_large_file(path, file, size)
        file.seek(start)
        waiting = b""
        while size or waiting:
            data = _read(path, file, min(size, limit + 2 - len(waiting)))
            waiting, size = waiting + data, size - len(data)
            place = cut_before(waiting, limit) if len(waiting) > limit else len(waiting)
            yield _as_utf8(str(path), path, waiting[:place])
            waiting = waiting[place:]


def _read(path: Path, file: io.BufferedReader, size: int) -> bytes:
    with reading(path):
        data = file.read(size)
    if len(data) < size:
        raise BadText(f"{path}: became shorter while it was read", path)
    return data


def _check_large_file(path: Path, file: io.BufferedReader, size: int) -> None:
    """Read a file that does not come in one piece once before, so that no half of a bad file is used."""
    rest, zeros, left = b"", 0, size
    while left:
        data = _read(path, file, min(left, CHECKED_AT_ONCE))
        left -= len(data)
        zeros += _zeros(data)
        # A character that may go on in the next read is left to that read.
        end = len(data) - next((i for i in range(1, min(4, len(data))) if data[-i] >= 0xC0), 0) if left else len(data)
        try:
            (rest + data[:end]).decode()
        except UnicodeError as error:
            raise BadText(f"{path}: {not_utf8(error, file.tell() - len(data) - len(rest))}", path) from None
        rest = data[end:]
    _check_zeros(str(path), path, zeros, size)
