"""Damaged corpora: what a second reading of the same bytes, by plain means, says must come of preparing them."""

from __future__ import annotations

import functools
import io
import json
import os
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from tests.faults import workplace

if TYPE_CHECKING:
    from tests.faults.fuzz import Input

# The good documents, whether there are bad ones among them, and whether reading came to the file's end.
Seen = tuple[list[bytes], bool, bool]
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# How many zero bytes, and which share of them, a text may have.
ZEROS_ALLOWED, ZEROS_SHARE = 3, 0.02


def inputs(form: str, base: Path, work: Path) -> None:
    workplace.copy(base / "corpora", work, form)
    os.symlink(base / "bytes", work / "bytes")


def skips(file: Path) -> bool:
    """Whether a damaged file is prepared with --on-bad-text skip: half of them are."""
    return file.stat().st_size % 2 == 0


def prepare(form: str, folder: Path) -> list[bytes]:
    """Prepare the one file of a corpus with a tokenizer whose ids are bytes; returns the documents' bytes."""
    from landmark_cli.commands.prepare import PrepareOptions, run
    from landmark_cli.data.token_file import TokenFile
    from tests.data.texts import documents_in

    run(
        PrepareOptions(
            "text",
            source=[form],
            output=folder / "out",
            tokenizer="bytes",
            validation_share=0.0,
            on_bad_text="skip" if skips(folder / form / f"cats.{form}") else "stop",
        )
    )
    file = TokenFile.open(folder / "out" / "train.bin")
    byte_of = byte_of_id()
    return [bytes(byte_of[i] for i in document) for document in documents_in(file)]


def right(documents: list[bytes], made: Input) -> bool:
    """Whether these are the file's good documents: all of them, or of one that breaks off some, in order."""
    data, form = made.bytes, made.damaged.name.partition(".")[2]
    expected, bad, ended = SEEN[form](data)
    expected = [document for document in expected if document]
    if ended:
        return documents == expected and (not bad or skips(made.damaged))
    left = iter(expected)
    return skips(made.damaged) and all(document in left for document in documents)


def names(made: Input) -> list[str]:
    """What an error may say in place of the file's name: that nothing is left of a file that has no good document."""
    expected, _, ended = SEEN[made.damaged.name.partition(".")[2]](made.bytes)
    return ["no text to train on"] if ended and not any(expected) else []


def _seen_text(data: bytes) -> Seen:
    text = data.removeprefix(BYTE_ORDER_MARK)
    return ([text], False, True) if _is_text(text) else ([], True, True)


def _seen_lines(data: bytes, ended: bool = True) -> Seen:
    found, bad = [], False
    for line in data.removeprefix(BYTE_ORDER_MARK).split(b"\n"):
        if not line.strip():
            continue
        try:
            text = json.loads(line.decode("utf-8"))["text"]
            text = text.encode("utf-8") if text is not None else b""
            if _is_text(text):
                found.append(text)
            else:
                bad = True
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            bad = True
    return found, bad, ended


def _seen_gzip(data: bytes) -> Seen:
    text, rest, ended = b"", data, False
    while rest.strip(b"\0") or not text:
        # Bits of the header that are kept for later formats; zlib stops at them, Python's gzip does not, and the
        # member's checksum is right all the same.
        rest = rest[:3] + bytes(flags & 0x1F for flags in rest[3:4]) + rest[4:]
        member = zlib.decompressobj(31)
        try:
            # Byte by byte, so that nothing good is lost to a fault behind it.
            for place in range(len(rest)):
                text += member.decompress(rest[place : place + 1])
                if member.eof:
                    break
        except zlib.error:
            return _seen_lines(text, False)
        if not member.eof:
            return _seen_lines(text, False)
        rest, ended = rest[place + 1 :], True
    return _seen_lines(text, ended)


def _seen_zstandard(data: bytes) -> Seen:
    import zstandard

    text, rest, ended = b"", data, False
    while rest:
        frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
        try:
            text += frame.decompress(rest)
        except zstandard.ZstdError:
            return _seen_lines(text, False)
        if not frame.eof:
            return _seen_lines(text, False)
        rest, ended = frame.unused_data, True
    return _seen_lines(text, ended)


def _seen_parquet(data: bytes) -> Seen:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    faults = (pa.ArrowException, OSError, KeyError, ValueError)
    good, bad, ended = [], False, True
    try:
        file = parquet.ParquetFile(io.BytesIO(data))
        groups = file.num_row_groups
    except faults:
        return [], True, False
    for group in range(groups):
        try:
            texts = file.read_row_group(group, columns=["text"]).column("text").cast(pa.large_binary()).to_pylist()
        except faults:
            ended = False
            continue
        found = [text or b"" for text in texts]
        good += [text for text in found if _is_text(text)]
        bad = bad or not all(map(_is_text, found))
    return good, bad, ended


SEEN = {
    "txt": _seen_text,
    "tex": _seen_text,
    "jsonl": _seen_lines,
    "jsonl.gz": _seen_gzip,
    "jsonl.zst": _seen_zstandard,
    "parquet": _seen_parquet,
}


def _is_text(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    # UTF-16 that is read as UTF-8 has many zero bytes; text has none, or a few by mistake.
    zeros = data.count(b"\0")
    return zeros <= ZEROS_ALLOWED or zeros <= ZEROS_SHARE * len(data)


@functools.cache
def byte_of_id() -> list[int]:
    """What byte each id of the workplace's byte tokenizer stands for: its ids are sorted letters, one for a byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    return [letters[letter] for letter in sorted(letters)]
