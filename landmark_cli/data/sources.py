"""Local files and folders -> the files to read, the split of each, and what is left out, counted and named.

A folder has splits where every file of it lies in a folder train/, validation/ or test/, or has exactly the name that
a copy of a data set has on the hub (`train-00000-of-00002.parquet`, `train.jsonl`). Any other name that begins like one
(`train-robbery.txt`, `dev-notes.md`) says nothing about splits.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from stat import S_ISREG

from landmark_cli.console import counted, quantity
from landmark_cli.data.readers import ENDINGS, ending_of
from landmark_cli.errors import LandmarkError
from landmark_cli.file_errors import reading

SPLITS = ("train", "validation", "test")
SPLIT_NAMES = {split: split for split in SPLITS} | dict.fromkeys(("valid", "val", "dev"), "validation")
# A shard's number, how many shards there are, and the hash that `datasets` once put behind these.
_SHARD = re.compile(r"-\d+-of-\d+(-[0-9a-f]{16})?$")
# What may stand beside the splits of a data set and is no part of the text.
ABOUT = ("readme", "license", "licence", "copying", "notice", "citation", "changelog")
NAMES_SHOWN = 5


@dataclass(frozen=True)
class SourceFile:
    """A file to read.

    Attributes:
        path: where it is.
        size: in bytes.
        modified_ns: when it was last written, in the file system's nanoseconds.
        split: "train", "validation" or "test"; None where its source has no splits.
    """

    path: Path
    size: int
    modified_ns: int
    split: str | None = None

    @property
    def ending(self) -> str:
        return ending_of(self.path.name)


@dataclass
class Sources:
    """What local sources hold.

    Attributes:
        files: in the order they are read.
        left_out: names of what is not read, by the reason.
        notes: what may surprise about the files, in words.
    """

    files: list[SourceFile] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def has_splits(self) -> bool:
        return any(file.split for file in self.files)

    def leave_out(self, why: str, *names: str) -> None:
        if names:
            self.left_out.setdefault(why, []).extend(names)

    def found(self) -> str:
        """The files by kind, and by split where there are any."""
        if not self.has_splits:
            return _by_kind(self.files)
        by_split = {split: [file for file in self.files if (file.split or "train") == split] for split in SPLITS}
        return "; ".join(f"{split}: {_by_kind(files)}" for split, files in by_split.items() if files)

    def not_read(self) -> str:
        """What is left out, and why; empty where nothing is."""
        return "; ".join(f"{len(names)} {why} ({named(names)})" for why, names in self.left_out.items())


def find_sources(sources: list[Path], endings: tuple[str, ...], *, keeps_splits: bool = False) -> Sources:
    """The files of all sources with one of these endings, in upper or lower case.

    keeps_splits: whether the sources are copies of a corpus that has splits, so that a file outside of them is left
    out; otherwise such a file means that there are no splits.

    Raises:
        LandmarkError: there is no such source, it cannot be read, or it holds no file of these kinds.
    """
    found = Sources()
    own = [_split_named(source) for source in sources]
    # Sources that are a split each: --source corpus/train --source corpus/validation.
    splits_each = len(sources) > 1 and None not in own and "train" in own
    for source, split in zip(sources, own, strict=True):
        files = _files_of(source, endings, found)
        if splits_each:
            found.files += [_with_split(file, split) for file in files]
        elif source.is_dir():
            found.files += _divided(source, files, keeps_splits, found)
        else:
            found.files += files
    found.files.sort(key=lambda file: SPLITS.index(file.split or "train"))
    return found


def named(names: Iterable[str]) -> str:
    """The first of some names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more


def _files_of(source: Path, endings: tuple[str, ...], found: Sources) -> list[SourceFile]:
    if not source.exists():
        raise LandmarkError(f"there is no file or folder {source}")
    if not source.is_dir():
        if ending_of(source.name) not in endings:
            raise LandmarkError(f"{source} is not of a kind that this corpus is read from ({', '.join(endings)})")
        file = _stat(source)
        if file is None:
            raise LandmarkError(f"{source} is neither a file nor a folder")
        return [file]
    nothing = Sources()
    files = list(_walk(source, endings, nothing))
    for why, names in nothing.left_out.items():
        found.leave_out(why, *names)
    if not files:
        left_out = f" (left out: {nothing.not_read()})" if nothing.left_out else ""
        raise LandmarkError(
            f"no documents in {source}: it holds no file with one of the endings {', '.join(endings)}{left_out}"
        )
    return sorted(files, key=lambda file: file.path.relative_to(source).parts)


def _walk(root: Path, endings: tuple[str, ...], found: Sources) -> Iterator[SourceFile]:
    def stop(error: OSError) -> None:
        with reading(error.filename or root):
            raise error

    for folder, folders, names in os.walk(root, onerror=stop):
        place = Path(folder)
        linked = sorted(name for name in folders if os.path.islink(place / name))
        found.leave_out("linked folders", *(str((place / name).relative_to(root)) for name in linked))
        hidden = sorted(name for name in [*folders, *names] if name.startswith("."))
        found.leave_out("hidden", *(str((place / name).relative_to(root)) for name in hidden))
        folders[:] = sorted(set(folders) - set(linked) - set(hidden))
        for name in sorted(set(names) - set(hidden)):
            path = place / name
            if ending_of(name) not in endings:
                found.leave_out("of another kind", str(path.relative_to(root)))
            elif (file := _stat(path)) is None:
                found.leave_out("no ordinary files", str(path.relative_to(root)))
            else:
                yield file


def _stat(path: Path) -> SourceFile | None:
    """A file, or None where it is something else, such as a pipe, which could go on for ever."""
    with reading(path):
        about = path.stat()
    return SourceFile(path, about.st_size, about.st_mtime_ns) if S_ISREG(about.st_mode) else None


def _divided(source: Path, files: list[SourceFile], keeps_splits: bool, found: Sources) -> list[SourceFile]:
    """The files of a folder, each with its split if there are splits."""
    files = [_with_split(file, _split_of(file.path.relative_to(source))) for file in files]
    splits = {file.split for file in files} - {None}
    outside = [file for file in files if file.split is None]
    if "train" in splits:
        about = [file for file in outside if file.path.stem.lower() in ABOUT]
        if keeps_splits or len(about) == len(outside):
            found.leave_out("about the data set", *(str(file.path.relative_to(source)) for file in about))
            names = [str(file.path.relative_to(source)) for file in outside if file.path.stem.lower() not in ABOUT]
            if names:
                found.notes.append(
                    f"left out: {counted(len(names), 'file')} of {source} outside of its splits ({named(names)})"
                )
            return [file for file in files if file.split]
    elif splits and not outside:
        split = min(splits, key=SPLITS.index)
        raise LandmarkError(
            f"{source} has a {split} split but no training documents; to train on them, name the folder itself"
        )
    if splits:
        inside = [str(file.path.relative_to(source)) for file in files if file.split]
        others = [str(file.path.relative_to(source)) for file in outside]
        found.notes.append(
            f"{source} is taken without splits: by folder or name {counted(len(inside), 'file')} would be in one "
            f"({named(inside)}), but {len(others)} would not ({named(others)})"
        )
    return [_with_split(file, None) for file in files]


def _with_split(file: SourceFile, split: str | None) -> SourceFile:
    return SourceFile(file.path, file.size, file.modified_ns, split)


def _split_of(path: Path) -> str | None:
    for folder in path.parts[:-1]:
        if folder.lower() in SPLIT_NAMES:
            return SPLIT_NAMES[folder.lower()]
    return _split_named(path)


def _split_named(path: Path) -> str | None:
    """The split whose exact name is the name of this folder or file."""
    name, ending = path.name.lower(), ending_of(path.name)
    return SPLIT_NAMES.get(_SHARD.sub("", name.removesuffix(ending) if ending in ENDINGS else name))


def _by_kind(files: list[SourceFile]) -> str:
    counts = Counter(file.ending for file in files)
    kinds = ", ".join(f"{count} {ending}" for ending, count in counts.items())
    empty = sum(file.size == 0 for file in files)
    size = quantity(sum(file.size for file in files), "B")
    return f"{kinds} file{'s' * (len(files) > 1)}, {size}" + (f", {empty} of them empty" if empty else "")
