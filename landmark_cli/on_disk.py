"""When other libraries' files are whole: waiting until the disk holds them, and letting others read them."""

from __future__ import annotations

import contextlib
import functools
import os
import stat
from pathlib import Path

OWNER_ALONE = stat.S_IRUSR | stat.S_IWUSR


def flush(path: Path) -> None:
    """Wait until the disk holds what was written to a file, or the names in a directory. OSErrors are left to
    `file_errors.writing`."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_tree(directory: Path) -> None:
    """`settle` everything in a directory, and it itself."""
    for path in directory.rglob("*"):
        settle(path)
    flush(directory)


def settle(path: Path) -> None:
    """`flush` a file that is whole, and have it as open to others as the umask says: safetensors leaves its files to
    their owner alone, also those of a model that a group works with. A file system may know no such modes."""
    with contextlib.suppress(OSError):
        if stat.S_IMODE(path.lstat().st_mode) == OWNER_ALONE:
            path.chmod(_mode_of_new_files())
    flush(path)


@functools.cache
def _mode_of_new_files() -> int:
    """By the umask, which a process is told when it sets another one."""
    mask = os.umask(0o077)
    os.umask(mask)
    return 0o666 & ~mask
