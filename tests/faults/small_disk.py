"""A small disk of one's own to fill, in a mount namespace that ends with the process that entered it."""

from __future__ import annotations

import ctypes
import ctypes.util
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from tests.faults.forks import Fork
from tests.faults.harness import Broken, NotHere

CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000
MS_RDONLY, MS_REMOUNT, MS_REC, MS_PRIVATE = 1, 32, 16384, 1 << 18
BLOCK = 4096
# Larger than the room that a command asks for before it begins.
DISK_BYTES = 96 << 20
FILLER = ".filler"
NO_MOUNTS = 71


class SmallDisk:
    """A file system in memory at `path`: made full, given room, made read-only."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(exist_ok=True)
        _mount(b"tmpfs", path, b"tmpfs", 0, f"size={DISK_BYTES},mode=777".encode())

    def leave(self, room: int) -> None:
        """Leave so many bytes free, in whole blocks."""
        free = shutil.disk_usage(self.path).free
        self.fill(max(free - room // BLOCK * BLOCK, 0))

    def fill(self, nbytes: int | None = None) -> None:
        """Take so many bytes, or all there are."""
        nbytes = shutil.disk_usage(self.path).free if nbytes is None else nbytes
        if nbytes:
            filler = os.open(self.path / FILLER, os.O_WRONLY | os.O_CREAT, 0o600)
            try:
                os.posix_fallocate(filler, os.fstat(filler).st_size, nbytes)
            finally:
                os.close(filler)

    def give_room(self) -> None:
        (self.path / FILLER).unlink(missing_ok=True)

    def make_read_only(self) -> None:
        _mount(None, self.path, None, MS_REMOUNT | MS_RDONLY, None)

    def make_writable(self) -> None:
        _mount(None, self.path, None, MS_REMOUNT, f"size={DISK_BYTES}".encode())


def with_small_disk(work: Path, call: Callable[[SmallDisk], int | None]) -> int:
    """Do call(disk) in a fork that has a small disk at work/disk. Raises what it raises; NotHere without the right."""
    told = work / "told.json"

    def child() -> int | None:
        try:
            _enter_namespace()
            disk = SmallDisk(work / "disk")
        except OSError as error:
            told.write_text(json.dumps(str(error)))
            return NO_MOUNTS
        try:
            done = call(disk)
        except Broken as broken:
            told.write_text(json.dumps([broken.category, broken.what]))
            return 1
        told.write_text(json.dumps(done))
        return 0

    ended = Fork(child, work, log=work / "log", most_seconds=120).start().wait()
    if ended.code not in (0, 1, NO_MOUNTS) or not told.exists():
        raise RuntimeError(f"ended with {ended.code}: {ended.err}")
    what = json.loads(told.read_text())
    if ended.code == NO_MOUNTS:
        raise NotHere(f"no right to mount a small disk ({what})")
    if ended.code == 1:
        raise Broken(*what)
    return what or 1


def _enter_namespace() -> None:
    """Mounts from here on are this process's and its children's only. Users other than root become it in there."""
    user, group = os.getuid(), os.getgid()
    if _libc().unshare(CLONE_NEWNS | (CLONE_NEWUSER if user else 0)):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    _mount(None, Path("/"), None, MS_REC | MS_PRIVATE, None)


def _mount(source: bytes | None, target: Path, kind: bytes | None, flags: int, data: bytes | None) -> None:
    if _libc().mount(source, os.fsencode(target), kind, flags, data):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(target))


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
