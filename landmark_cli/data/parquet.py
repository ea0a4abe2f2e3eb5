"""The rows of a parquet file as documents: what is damaged is left out by row groups, and the next group is read."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from landmark_cli.data.documents import BadText, Document, Keep, bad_document, no_such_field, text_document
from landmark_cli.file_errors import reading, reason

# Most rows that are read at once, most rows of small groups that are opened together, and the bytes that rows read at
# once may take if they are more than one.
PARQUET_ROWS = 16
PARQUET_SPAN_ROWS = 1000
PARQUET_BYTES = 64 << 20
# Text in a parquet file takes a third to a tenth of its size; what unpacks to this much and by this factor is no text.
PARQUET_BOMB_BYTES = 256 << 20
PARQUET_BOMB_FACTOR = 200
LONGEST_TYPE = 80


def parquet_rows(path: Path, text_field: str, keep: Keep | None) -> Iterator[Document]:
    """The rows of a file as documents. text_field: the column of the text. keep: rows to take, by their column `meta`.

    Raises LandmarkError where the system cannot read the file.
    """
    import pyarrow.parquet as parquet

    with contextlib.ExitStack() as files:
        try:
            opened = files.enter_context(parquet.ParquetFile(path, page_checksum_verification=True))
            columns = opened.schema_arrow.names
            text_type = opened.schema_arrow.field(text_field).type if columns.count(text_field) == 1 else None
            groups = [opened.metadata.row_group(index) for index in range(opened.num_row_groups)]
        except Exception as error:
            _raise_system_error(path, error)
            why = f"not a parquet file, or not a whole one ({reason(error)})"
            yield bad_document(BadText(f"{path} is {why}", path, documents=None))
            return
        rows = sum(group.num_rows for group in groups)
        if text_type is None:
            yield bad_document(BadText(no_such_field(str(path), text_field, columns, "columns"), path, rows))
            return
        if not _holds_text(text_type):
            why = f"the column {text_field!r} holds no text but {str(text_type)[:LONGEST_TYPE]}"
            yield bad_document(BadText(f"{path}: {why}", path, rows))
            return
        wanted = [text_field, *(c for c in columns if c == "meta" and keep is not None)]
        for span in _spans(groups):
            yield from _span_rows(path, opened, span, wanted, keep, span[0].first)


@dataclass(frozen=True)
class _RowGroup:
    """A row group of a parquet file: its place, its metadata, its first row's number in the file."""

    index: int
    metadata: Any
    first: int

    @property
    def end(self) -> int:
        return self.first + self.metadata.num_rows


def _spans(groups: list[Any]) -> Iterator[list[_RowGroup]]:
    """Row groups that follow each other, together where they are small, since each read has a price of its own."""
    span: list[_RowGroup] = []
    first, unpacked = 1, 0
    for index, metadata in enumerate(groups):
        unpacked += metadata.total_byte_size
        if span and (first + metadata.num_rows - span[0].first > PARQUET_SPAN_ROWS or unpacked > PARQUET_BYTES):
            yield span
            span, unpacked = [], metadata.total_byte_size
        span.append(_RowGroup(index, metadata, first))
        first = span[-1].end
    if span:
        yield span


def _span_rows(
    path: Path, opened: Any, span: list[_RowGroup], wanted: list[str], keep: Keep | None, number: int
) -> Iterator[Document]:
    """The rows of a span from row `number` on; what cannot be read of a row group is one bad document."""
    import pyarrow as pa

    text_field, place, end = wanted[0], span[0].first, span[-1].end
    try:
        file_bytes = path.stat().st_size
        batch_size = min(_rows_at_once(group.metadata, file_bytes) for group in span)
        batches = opened.iter_batches(batch_size, row_groups=[group.index for group in span], columns=wanted)
        if len(span) > 1:
            # Once rows are given, nobody can tell of which group others are missing.
            batches = list(batches)
            if sum(map(len, batches)) != end - place:
                raise ValueError("rows are missing")
        for rows in batches:
            # As bytes, so that text which is not UTF-8 is found by whoever reads that document.
            texts = rows.column(text_field).cast(pa.large_binary()).to_pylist()
            metas = rows.column("meta").to_pylist() if "meta" in wanted[1:] else [None] * len(texts)
            for text, meta in zip(texts, metas, strict=True):
                if place == number:
                    number += 1
                    if keep is None or keep({"meta": meta}):
                        yield text_document(f"{path}, row {place}", text, file=path)
                place += 1
        if place < end:
            raise ValueError("they are missing")
    except Exception as error:
        _raise_system_error(path, error)
        if len(span) > 1:
            for group in span:
                if number < group.end:
                    yield from _span_rows(path, opened, [group], wanted, keep, max(number, group.first))
            return
        if number == end:
            return
        rows = f"row {number}" if number == end - 1 else f"rows {number} to {end - 1}"
        yield bad_document(BadText(f"{path}: damaged in {rows}: {reason(error)}", path, end - number))


def _rows_at_once(group: Any, file_bytes: int) -> int:
    """How many rows of a row group to read at once. ValueError where it would unpack to more than any text does.

    Goes by the group's sizes, not its columns': pyarrow ends the process where the columns' sizes are damaged.
    """
    rows, unpacked = max(group.num_rows, 1), group.total_byte_size
    if unpacked > PARQUET_BOMB_BYTES * rows or unpacked > max(PARQUET_BOMB_BYTES, PARQUET_BOMB_FACTOR * file_bytes):
        raise ValueError(f"they unpack to {unpacked} bytes, from a file of {file_bytes}")
    return max(1, min(PARQUET_ROWS, PARQUET_BYTES * rows // max(unpacked, 1)))


def _holds_text(kind: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    tests = (types.is_string, types.is_large_string, types.is_string_view)
    tests += (types.is_binary, types.is_large_binary, types.is_binary_view, types.is_null)
    return any(test(kind) for test in tests)


def _raise_system_error(path: Path, error: Exception) -> None:
    """Raise an error that is the system's, which no damage causes; errors of parquet's own have no number."""
    if isinstance(error, OSError) and error.errno is not None:
        with reading(path):
            raise OSError(error.errno, os.strerror(error.errno)) from error
