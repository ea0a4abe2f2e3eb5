"""Files -> documents: plain text, JSON lines (also .gz and .zst), parquet, and rows that `datasets` yields.

Documents come in a fixed order and are read only when their pieces are asked for, where the format allows it. What
cannot be read stands in that order too, as a document that raises BadText: one for a line or row that is no text, one
for all that is lost where a file is cut or damaged. Of a damaged parquet file that is the rest of a row group, and the
next group is read; of a compressed file all that follows, since nothing says where to go on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from landmark_cli.data.documents import (
    BYTE_ORDER_MARK,
    BadText,
    Document,
    Keep,
    bad_document,
    no_such_field,
    not_utf8,
    text_document,
    text_file,
)
from landmark_cli.data.lines import numbered_lines
from landmark_cli.data.parquet import parquet_rows
from landmark_cli.errors import LandmarkError
from landmark_cli.file_errors import reason

PLAIN_TEXT = (".txt", ".md", ".tex")
JSON_LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
PARQUET = (".parquet",)
ENDINGS = PLAIN_TEXT + JSON_LINES + PARQUET

# Objects and lists take many times the memory of their text; a document's fields beside its text are small.
DENSE_LINE_BYTES = 8 << 20
DENSE_LINE_NODES = 4 << 20


AsDocument = Callable[..., Document]
"""(name, row, file, size=0) -> the row as a document: see `_row_document`."""


def ending_of(name: str) -> str:
    """What a file's name ends with, in lower case: one of the endings above, or what follows its last dot."""
    name = name.lower()
    known = (ending for ending in ENDINGS if name.endswith(ending))
    return next(known, Path(name).suffix)


def read_documents(
    path: Path, text_field: str, keep: Keep | None, as_document: AsDocument | None = None
) -> Iterator[Document]:
    """The documents of one file, by its ending.

    text_field: the field or column that holds the text. keep: rows to take, by their fields; None takes all.
    as_document: what makes documents of JSON lines; None takes the text of the field.

    Raises:
        LandmarkError: the system cannot read the file.
    """
    ending = ending_of(path.name)
    if ending in PLAIN_TEXT:
        return iter([text_file(path)])
    if ending in JSON_LINES:
        return _json_lines(path, as_document or partial(_row_document, text_field), keep)
    return parquet_rows(path, text_field, keep)


def rows_as_documents(
    name: str,
    rows: Iterable[Mapping[str, Any]],
    text_field: str,
    keep: Keep | None,
    as_document: AsDocument | None = None,
) -> Iterator[Document]:
    """Rows that `datasets` yields as documents. Further arguments: see `read_documents`.

    Raises:
        LandmarkError: `datasets` cannot yield the next row, for whatever reason its loaders have.
    """
    as_document = as_document or partial(_row_document, text_field)
    rows, number = iter(rows), 0
    while True:
        number += 1
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:
            raise LandmarkError(f"{name} cannot be read on after row {number - 1}: {reason(error)}") from error
        if keep is None or keep(row):
            yield as_document(f"{name}, row {number}", row, name)


def _row_document(text_field: str, name: str, row: Mapping[str, Any], file: str | Path, size: int = 0) -> Document:
    if text_field not in row:
        return bad_document(BadText(no_such_field(name, text_field, row), file), size)
    text = row[text_field]
    if not isinstance(text, (str, bytes, type(None))):
        return bad_document(BadText(f"{name}: the field {text_field!r} holds no text", file), size)
    return text_document(name, text, size or None, file)


def _json_lines(path: Path, as_document: AsDocument, keep: Keep | None) -> Iterator[Document]:
    for number, line in numbered_lines(path):
        if isinstance(line, BadText):
            yield bad_document(line)
            continue
        if line.isspace():
            continue
        name = f"{path}:{number}"
        if number == 1:
            line = line.removeprefix(BYTE_ORDER_MARK)
        try:
            row = _parse(line)
        except (ValueError, RecursionError, MemoryError) as error:
            yield bad_document(BadText(f"{name}: {_why_no_json(error, line, number)}", path), len(line))
            continue
        if not isinstance(row, dict):
            why = "a JSON array" if isinstance(row, list) else f"a {type(row).__name__}"
            yield bad_document(BadText(f"{name}: {why}, where each line should hold a JSON object", path), len(line))
        elif keep is None or keep(row):
            yield as_document(name, row, path, len(line))


def _parse(line: bytes) -> Any:
    if len(line) > DENSE_LINE_BYTES and line.count(b"[") + line.count(b"{") > DENSE_LINE_NODES:
        raise ValueError(f"holds more than {DENSE_LINE_NODES} lists and objects")
    return json.loads(line.decode())


def _why_no_json(error: Exception, line: bytes, number: int) -> str:
    if isinstance(error, UnicodeError):
        return not_utf8(error)
    if 0 in line:
        return "not JSON but zero bytes: not UTF-8 but UTF-16 (iconv -f UTF-16 -t UTF-8 converts it), or damaged"
    if number == 1 and line.lstrip().startswith(b"["):
        return "the start of a JSON array, where each line should hold a JSON object (jq -c '.[]' makes such lines)"
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON ({error})"
    return f"not read as JSON: {reason(error)}"
