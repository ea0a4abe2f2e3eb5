"""Files -> documents: plain text, JSON lines (also .gz and .zst), parquet, and rows that `datasets` yields.

Documents come in a fixed order and are read only when their pieces are asked for, where the format allows it.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from landmark_cli.errors import LandmarkError

PLAIN_TEXT = (".txt", ".md", ".tex")
JSON_LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
PARQUET = (".parquet",)
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
CUT_WINDOW = 1 << 16


class BadText(Exception):
    """A document that is no text: which one, and what is wrong with it."""


@dataclass(frozen=True)
class Document:
    """One document of a corpus.

    Attributes:
        name: the file, or the file and its line or row, for messages.
        size: bytes it takes where it is stored.
        pieces: called with a limit, yields its text as UTF-8 in order, in pieces of at most that many bytes. Raises
            BadText before the first piece if it is no text.
    """

    name: str
    size: int
    pieces: Callable[[int], Iterator[bytes]]


def read_documents(path: Path, text_field: str, keep: Callable[[Mapping[str, Any]], bool] | None) -> Iterator[Document]:
    """The documents of one file, by its ending.

    text_field: the field or column that holds the text. keep: rows to take, by their fields; None takes all.

    Raises:
        LandmarkError: rows have no such field.
    """
    if path.name.endswith(PLAIN_TEXT):
        return iter([text_file(path)])
    if path.name.endswith(JSON_LINES):
        return _json_lines(path, text_field, keep)
    return _parquet_rows(path, text_field, keep)


def text_file(path: Path, start: int = 0, end: int | None = None) -> Document:
    """A text file, or the bytes from `start` to `end` of one, as a document. A byte order mark is no part of it."""
    size = (path.stat().st_size if end is None else end) - start
    return Document(str(path), size, partial(_file_pieces, path, start, size))


def text_document(name: str, text: str | bytes | None, size: int | None = None) -> Document:
    """A text that is in memory as a document; None is an empty one."""
    size = len(text or "") if size is None else size
    return Document(name, size, partial(_memory_pieces, name, text or b""))


def cut_text_file(path: Path, share: float) -> int:
    """The place in a text file that leaves about `share` of it behind, at the end of a line where there is one near."""
    size = path.stat().st_size
    place = round(size * (1 - share))
    with open(path, "rb") as file:
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


def _memory_pieces(name: str, text: str | bytes, limit: int) -> Iterator[bytes]:
    try:
        if isinstance(text, str):
            text = text.encode()
        else:
            text.decode()
    except UnicodeError as error:
        raise BadText(f"{name}: {_what(error)}") from None
    while len(text) > limit:
        place = cut_before(text, limit)
        yield text[:place]
        text = text[place:]
    yield text


def _file_pieces(path: Path, start: int, size: int, limit: int) -> Iterator[bytes]:
    with open(path, "rb") as file:
        if start == 0 and file.read(len(BYTE_ORDER_MARK)) == BYTE_ORDER_MARK:
            start, size = len(BYTE_ORDER_MARK), size - len(BYTE_ORDER_MARK)
        file.seek(start)
        if size > limit:
            _check_large_file(path, file, size)
            file.seek(start)
        waiting = b""
        while size or waiting:
            data = file.read(min(size, limit + 2 - len(waiting)))
            if size and not data:
                raise BadText(f"{path}: became shorter while it was read")
            waiting, size = waiting + data, size - len(data)
            place = cut_before(waiting, limit) if len(waiting) > limit else len(waiting)
            yield from _memory_pieces(str(path), waiting[:place], limit)
            waiting = waiting[place:]


def _check_large_file(path: Path, file: io.BufferedReader, size: int) -> None:
    """Read a file that does not come in one piece once before, so that no half of a bad one is used."""
    rest = b""
    while size and (data := file.read(min(size, 1 << 20))):
        size -= len(data)
        # What may be the start of a character that goes on in the next read.
        end = len(data) - next((i for i in range(1, min(4, len(data))) if data[-i] >= 0xC0), 0) if size else len(data)
        try:
            (rest + data[:end]).decode()
        except UnicodeError as error:
            raise BadText(f"{path}: {_what(error, file.tell() - len(data) - len(rest))}") from None
        rest = data[end:]


def _what(error: UnicodeError, offset: int = 0) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 at byte {offset + error.start} ({error.reason})"
    return "has half of a surrogate pair, which UTF-8 cannot hold"


def _json_lines(path: Path, text_field: str, keep: Callable[[Mapping[str, Any]], bool] | None) -> Iterator[Document]:
    with _open_maybe_compressed(path) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            name = f"{path}:{number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                why = _what(error) if isinstance(error, UnicodeError) else f"not JSON ({error})"
                yield Document(name, len(line), partial(_bad, f"{name}: {why}"))
                continue
            if not isinstance(row, dict) or text_field not in row:
                found = f"the fields {', '.join(row)}" if isinstance(row, dict) else f"a {type(row).__name__}"
                raise no_such_field(name, text_field, found)
            if not isinstance(row[text_field], (str, type(None))):
                yield Document(name, len(line), partial(_bad, f"{name}: the field {text_field!r} holds no text"))
            elif keep is None or keep(row):
                yield text_document(name, row[text_field], len(line))


def _parquet_rows(path: Path, text_field: str, keep: Callable[[Mapping[str, Any]], bool] | None) -> Iterator[Document]:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    try:
        file = parquet.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise LandmarkError(f"{path} is not a parquet file, or not a whole one: {error}") from error
    columns = file.schema_arrow.names
    if text_field not in columns:
        raise no_such_field(str(path), text_field, f"the columns {', '.join(columns)}")
    wanted = [text_field, *(c for c in columns if c == "meta" and keep is not None)]
    number = 0
    with file:
        for rows in file.iter_batches(batch_size=16, columns=wanted):
            # As bytes, so that text which is not UTF-8 is found by whoever reads that document.
            texts = rows.column(text_field).cast(pa.large_binary()).to_pylist()
            meta = rows.column("meta").to_pylist() if "meta" in wanted else [None] * len(texts)
            for text, of_text in zip(texts, meta, strict=True):
                number += 1
                if keep is None or keep({"meta": of_text}):
                    yield text_document(f"{path}, row {number}", text)


def rows_as_documents(
    name: str, rows: Iterable[Mapping[str, Any]], text_field: str, keep: Callable[[Mapping[str, Any]], bool] | None
) -> Iterator[Document]:
    """Rows that `datasets` yields as documents."""
    for number, row in enumerate(rows, 1):
        if keep is None or keep(row):
            yield text_document(f"{name}, row {number}", row[text_field])


def _open_maybe_compressed(path: Path) -> Any:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    if path.suffix != ".zst":
        return open(path, "rb")
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    return io.BufferedReader(decompressor.stream_reader(open(path, "rb"), read_across_frames=True), 1 << 20)


def no_such_field(name: str, field: str, found: str) -> LandmarkError:
    """The error for rows without the text field that was asked for."""
    return LandmarkError(f"{name} has no text field {field!r}, only {found}: name the right one with --text-field")


def _bad(message: str, limit: int) -> Iterator[bytes]:
    raise BadText(message)
    yield b""


def find_files(root: Path, endings: tuple[str, ...]) -> list[Path]:
    """The files under a directory with one of these endings, sorted by their path; hidden ones are left out."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(folder, name) for name in names if name.endswith(endings) and not name.startswith(".")]
    return sorted(found, key=lambda file: file.relative_to(root).parts)
