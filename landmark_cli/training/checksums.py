"""What a directory held when it was written: the sha256 of every file, in a file that `sha256sum -c` reads too."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from landmark_cli.console import warn
from landmark_cli.errors import LandmarkError
from landmark_cli.file_errors import reason
from landmark_cli.file_reading import hash_file, read_text
from landmark_cli.file_writing import write_whole

NAME = "checksums.sha256"
# hashlib lets go of Python's global lock, so large files are hashed side by side.
THREADS = 8


def write_checksums(directory: Path) -> None:
    """Write down the checksums of all files below a directory. OSErrors are left to the caller."""
    files = _files(directory)
    with ThreadPoolExecutor(THREADS) as pool:
        digests = pool.map(lambda path: hash_file(path).hexdigest(), files)
        lines = [
            f"{digest}  {path.relative_to(directory).as_posix()}\n" for digest, path in zip(digests, files, strict=True)
        ]
    write_whole(directory / NAME, "".join(lines))


def damage_of(directory: Path) -> str | None:
    """What is wrong with a directory compared with its checksums, in a few words; None where all is right, or where it
    has no checksums."""
    if not (directory / NAME).exists():
        warn(f"{directory} has no {NAME}, so nothing can be said of damage to it: it is taken as it is")
        return None
    try:
        text = read_text(directory / NAME)
        digests = {name: digest for digest, _, name in (line.partition("  ") for line in text.splitlines())}
        if not text.endswith("\n") or "" in digests:
            return f"{NAME} was cut short or changed"
        unknown = {path.relative_to(directory).as_posix() for path in _files(directory)} - digests.keys()
        if unknown:
            return f"{NAME} does not name {min(unknown)}"
        with ThreadPoolExecutor(THREADS) as pool:
            found = pool.map(lambda name: _damage_of(directory, name, digests[name]), digests)
            return next((what for what in found if what is not None), None)
    except LandmarkError as error:
        return reason(error.__cause__ or error)


def _damage_of(directory: Path, name: str, digest: str) -> str | None:
    path = directory / name
    if ".." in Path(name).parts or path.is_symlink() or not path.is_file():
        return f"{NAME} names {name!r}, which is not there"
    try:
        return None if hash_file(path).hexdigest() == digest else f"{name} is not as it was written"
    except LandmarkError as error:
        return f"{name}: {reason(error.__cause__ or error)}"


def _files(directory: Path) -> list[Path]:
    """All files below a directory but hidden ones, which are other programs'."""
    return sorted(
        path for path in directory.rglob("*") if path.is_file() and path.name != NAME and not path.name.startswith(".")
    )
