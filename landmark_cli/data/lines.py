"""The lines of a file, plain or compressed: none longer than memory bears, and a cut or damaged file is never taken for
a whole one."""

from __future__ import annotations

import contextlib
import gzip
import io
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from landmark_cli.data.documents import BadText
from landmark_cli.file_errors import reading, reason

# A line is one document with all its fields, and parsing takes several times its size. The largest books have 10 MB.
LINE_BYTES = 64 << 20
# A longer line is passed over, to its end; a line without an end within this many bytes is taken for damage.
PASSED_OVER_BYTES = 448 << 20
BUFFER_BYTES = 128 << 10
UNPACKED_AT_ONCE = 128 << 10
# Four bytes of zstandard can stand for 128 KiB: this much input becomes 256 MB at most. Input that does become many
# times its size is taken in smaller portions.
ZSTANDARD_INPUT_BYTES = 8 << 10
DENSE_INPUT_BYTES = 512
DENSE_FACTOR = 100


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes | BadText]]:
    """The lines of a file with their numbers, from 1; by its ending, gzip and zstandard are unpacked.

    In place of a line stands a BadText where the line is too long, or where the file is cut or damaged, which ends the
    lines.

    Raises LandmarkError where the system cannot read the file.
    """
    number = 0
    with contextlib.ExitStack() as opened:
        # Errors of whoever takes the lines do not come in here.
        try:
            stream = _open(path, opened)
            while True:
                number += 1
                line: bytes | BadText = stream.readline(LINE_BYTES + 1)
                if len(line) > LINE_BYTES:
                    length = len(line) + _pass_over(stream, line)
                    line = BadText(f"{path}:{number}: a line of {length} bytes, more than {LINE_BYTES}", path)
                if not line:
                    return
                yield number, line
        except Exception as error:
            if isinstance(error, OSError) and error.errno is not None:
                # An error of the system's, which no damage causes.
                with reading(path):
                    raise
            place = f"after line {number - 1}" if number > 1 else "from its beginning"
            why = "its compressed data end too early" if isinstance(error, EOFError) else reason(error)
            yield number, BadText(f"{path}: cut or damaged {place}: {why}", path, documents=None)


def _open(path: Path, opened: contextlib.ExitStack) -> Any:
    ending = path.suffix.lower()
    if ending not in (".gz", ".zst"):
        return opened.enter_context(open(path, "rb", BUFFER_BYTES))
    file = opened.enter_context(open(path, "rb"))
    chunks = _gzip_chunks(file) if ending == ".gz" else _zstandard_chunks(file)
    return io.BufferedReader(_Chunks(chunks), BUFFER_BYTES)


def _gzip_chunks(file: io.BufferedReader) -> Iterator[bytes]:
    if not file.peek(1):
        raise EOFError
    # read1 hands over what it has before it raises, so that nothing in front of the damage is lost.
    yield from iter(partial(gzip.GzipFile(fileobj=file).read1, UNPACKED_AT_ONCE), b"")


def _zstandard_chunks(file: io.BufferedReader) -> Iterator[bytes]:
    """What one frame after the other holds. EOFError where the last one is cut, which zstandard's own reader of whole
    streams takes for the end."""
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    frame, data, portion = decompressor.decompressobj(UNPACKED_AT_ONCE), b"", ZSTANDARD_INPUT_BYTES
    while data or (data := file.read(portion)):
        if frame is None:
            frame = decompressor.decompressobj(UNPACKED_AT_ONCE)
        unpacked = frame.decompress(data)
        portion = DENSE_INPUT_BYTES if len(unpacked) > DENSE_FACTOR * len(data) else ZSTANDARD_INPUT_BYTES
        yield unpacked
        data = b""
        if frame.eof:
            frame, data = None, frame.unused_data
    if frame is not None:
        raise EOFError


class _Chunks(io.RawIOBase):
    """An iterator of bytes as a file."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._left = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._left = memoryview(chunk)
        size = min(len(buffer), len(self._left))
        buffer[:size] = self._left[:size]
        self._left = self._left[size:]
        return size


def _pass_over(stream: Any, line: bytes) -> int:
    """Read on to the end of a line that is too long, and return how many bytes that were."""
    passed = 0
    while line and not line.endswith(b"\n"):
        line = stream.readline(BUFFER_BYTES)
        passed += len(line)
        if passed > PASSED_OVER_BYTES:
            raise ValueError(f"a line of more than {LINE_BYTES + PASSED_OVER_BYTES} bytes")
    return passed
