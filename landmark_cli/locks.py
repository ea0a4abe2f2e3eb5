"""One writer for each directory: the lock that every command takes which writes one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from landmark_cli.errors import LandmarkError
from landmark_cli.file_errors import writing

LOCK = ".landmark.lock"


@contextmanager
def sole_writer(directory: Path, name: str = LOCK) -> Iterator[None]:
    """Hold a directory while the block runs, made if it is not there: no other command writes it meanwhile, on any
    machine that shares the disk and its locks. In a launch of several processes the first one takes it.

    The kernel lets go of the lock when the process ends, however that happens, so a killed one leaves nothing in the
    way. name: the lock's file, for what is held besides the directory.

    Raises LandmarkError where another process holds it, or the directory cannot be made or written.
    """
    from filelock import FileLock, Timeout

    file = directory / name
    lock = FileLock(file)
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise LandmarkError(
                f"another landmark command is writing to {directory}: wait for it to end, or name another directory"
            ) from None
        held = file.stat()
    try:
        yield
    finally:
        # The lock's file is removed before the lock is let go: whoever has opened the file by then finds that it has no
        # name any more. Where the directory was replaced meanwhile, a lock's file at this path is another command's.
        with suppress(OSError):
            if os.path.samestat(held, file.stat()):
                file.unlink()
        lock.release()
