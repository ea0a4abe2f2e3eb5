"""Files and lines written whole or not at all, and places tried before hours of work are done for them."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO

from landmark_cli.file_errors import writing
from landmark_cli.sealed import sealed_content


def write_whole(path: Path, data: str | bytes) -> None:
    """Write a file so that it is there whole and on the disk, or not at all. OSErrors are left to `writing`.

    What is no ordinary file (/dev/stdout, a pipe) is written to as it is; where the path is a link, the file that it
    leads to is written.
    """
    data = data.encode() if isinstance(data, str) else data
    if is_device(path):
        path.write_bytes(data)
        return
    with unfinished(path) as partial, open(partial, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def unfinished(path: Path) -> Iterator[Path]:
    """Where to write a file that is to be there whole or not at all: it gets its name at the end of the block, and is
    removed where that fails. Where the path is a link, the file that it leads to is written. Raises what the system
    raises, and OSError for a device or a pipe, whose place a file would take."""
    target, partial = _target_and_partial(path)
    require_ordinary(target)
    try:
        yield partial
        os.replace(partial, target)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any) -> None:
    """`write_whole` with JSON, indented for people to read."""
    import json

    write_whole(path, json.dumps(content, indent=2) + "\n")


def write_sealed(path: Path, content: dict[str, Any]) -> None:
    """`write_json` with a checksum of the content beside it, which `read_sealed` checks."""
    write_json(path, sealed_content(content))


def append_line(path: Path, line: str) -> None:
    """Add a line to a file, whole or not at all. One that was cut short at the file's end, by a kill or a full disk,
    makes way for it. Raises what the system raises."""
    with open(path, "ab+", buffering=0) as file:
        end = _end_of_lines(file)
        file.truncate(end)
        left = f"{line}\n".encode()
        try:
            while left:
                left = left[file.write(left) :]
        except OSError:
            file.truncate(end)
            raise


def _end_of_lines(file: BinaryIO) -> int:
    """Where the last whole line of a file ends."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - 4096)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def check_writable(path: str | Path, what: str = "") -> None:
    """Try whether `write_whole` could write a file there, and make its folder, before hours of work are done for it.

    Raises LandmarkError, as `writing` does.
    """
    with writing(path, what):
        if os.path.isdir(path):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not is_device(Path(path)):
            target, partial = _target_and_partial(Path(path))
            target.parent.mkdir(parents=True, exist_ok=True)
            partial.touch()
            partial.unlink()


def check_folder(folder: Path, what: str = "") -> None:
    """Try whether files or folders could be made in a folder that is there. Raises LandmarkError, as `writing` does."""
    with writing(folder, what):
        if not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        with TemporaryFile(dir=folder):
            pass


def require_ordinary(path: Path) -> None:
    """Raise OSError for a device or a pipe."""
    if _is_special(path):
        raise OSError(errno.EINVAL, "it is no ordinary file")


def is_device(path: Path) -> bool:
    """Whether it is no file or folder of a disk."""
    return _is_special(path) or path.is_relative_to("/dev")


def _is_special(path: Path) -> bool:
    return path.exists() and not (path.is_file() or path.is_dir())


def _target_and_partial(path: Path) -> tuple[Path, Path]:
    """Where a file is, links followed, and where it is written before it is whole."""
    path = Path(os.path.realpath(path))
    return path, path.with_name(f"{path.name}.{os.getpid()}.partial")
