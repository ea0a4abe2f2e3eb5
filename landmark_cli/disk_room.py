"""Whether a disk has room for what is to be written, before hours of work are done for it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from landmark_cli.console import quantity
from landmark_cli.errors import LandmarkError
from landmark_cli.file_writing import is_device

# What a file system needs besides the bytes of several files.
SPARE_BYTES = 16 << 20


def check_room(path: Path, needed: int, what: str) -> None:
    """Raise LandmarkError where a file of so many bytes, written beside the one that it replaces, has no room. what:
    the option that names it."""
    if not is_device(path):
        check_space(Path(os.path.realpath(path)).parent, needed, f"{what} {path}", spare=0)


def check_space(folder: Path, needed: int, role: str, spare: int = SPARE_BYTES) -> None:
    """Raise LandmarkError if the file system of `folder`, or of its nearest parent, has less room than needed. spare:
    bytes of it that are to be left."""
    folder = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(folder).free
    if free < needed + spare:
        raise LandmarkError(
            f"{role}: the result takes {quantity(needed, 'B')}, but only {quantity(free, 'B')} are free at {folder}; "
            "make room or choose another disk"
        )
