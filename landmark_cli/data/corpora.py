"""Where documents come from: the shipped sample, PG19, arXiv math, RedPajama, any local files, the hub."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from landmark_cli.console import info
from landmark_cli.data.readers import (
    JSON_LINES,
    PARQUET,
    PLAIN_TEXT,
    Document,
    cut_text_file,
    find_files,
    no_such_field,
    read_documents,
    rows_as_documents,
    text_document,
    text_file,
)
from landmark_cli.data.tokenizers import ASSETS
from landmark_cli.errors import LandmarkError, UsageError

SAMPLE_HELD_OUT = "persuasion"
SPLITS = ("train", "validation", "test")
SPLIT_NAMES = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation"}
SPLIT_NAMES |= {"dev": "validation", "test": "test"}
_SPLIT_FILE = re.compile(rf"({'|'.join(SPLIT_NAMES)})[-_.]")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")

Keep = Callable[[Mapping[str, Any]], bool]


@dataclass(frozen=True)
class Corpus:
    """Documents to prepare, in a fixed order.

    Attributes:
        name: "sample", "pg19", ...
        source: where they come from, in words.
        documents: called, yields every document with the split it belongs to.
        total_bytes: what all documents take where they are stored; None where nobody knows.
        identity: what has to be the same for the documents to be the same (JSON).
    """

    name: str
    source: str
    documents: Callable[[], Iterator[tuple[str, Document]]]
    total_bytes: int | None
    identity: Any


@dataclass(frozen=True)
class HubCopy:
    """A data set of the hub: its id, and files to read in place of what `datasets` would find by itself."""

    id: str
    revision: str | None = None
    subset: str | None = None
    data_files: dict[str, str] | None = None


@dataclass(frozen=True)
class Kind:
    """A corpus that this program knows: the files a local copy has, its copy on the hub, the rows to take."""

    endings: tuple[str, ...] = PLAIN_TEXT + JSON_LINES + PARQUET
    hub: HubCopy | None = None
    keep: Keep | None = field(default=None, repr=False)


def is_arxiv(row: Mapping[str, Any]) -> bool:
    """Whether a row of the proof-pile is an arXiv paper, by its field `meta`; rows without one are taken."""
    meta = row.get("meta")
    if isinstance(meta, str):
        try:
            meta = json.loads(meta)
        except ValueError:
            try:
                meta = ast.literal_eval(meta)
            except (ValueError, SyntaxError):
                return False
    return meta is None or (isinstance(meta, Mapping) and meta.get("config") == "arxiv")


KINDS = {
    "pg19": Kind(PLAIN_TEXT + PARQUET, HubCopy("emozilla/pg19")),
    "arxiv-math": Kind(
        hub=HubCopy(
            "hoskinson-center/proof-pile",
            data_files={
                "train": "train/*.jsonl.gz",
                "validation": "dev/*.jsonl.gz",
                "test": "test/*.jsonl.gz",
            },
        ),
        keep=is_arxiv,
    ),
    "redpajama": Kind(
        JSON_LINES + PARQUET, HubCopy("togethercomputer/RedPajama-Data-1T-Sample", data_files={"train": "*.jsonl"})
    ),
    "text": Kind(),
}


def open_corpus(
    name: str,
    sources: list[str] | None = None,
    *,
    revision: str | None = None,
    subset: str | None = None,
    text_field: str = "text",
    validation_share: float = 0.01,
    max_documents: int | None = None,
) -> Corpus:
    """Find a corpus.

    Args:
        name: "sample" or one of `KINDS`.
        sources: local files and folders, or one hub id; None takes the corpus's own copy on the hub.
        revision, subset: of a hub copy.
        text_field: the field or column with the text, where documents are rows.
        validation_share: share of the documents that becomes the validation split where the corpus has none.
        max_documents: read only so many of each split that the corpus has; None reads all.

    Raises:
        LandmarkError: nothing is there, or it holds no documents.
        UsageError: options that do not go together.
    """
    if name == "sample":
        if sources:
            raise UsageError("the sample is part of the program: to prepare your own files, `landmark prepare text`")
        return sample()
    kind = KINDS[name]
    if not sources and kind.hub is None:
        raise UsageError("which text? name files or folders with --source")
    local = [Path(source).expanduser() for source in sources or []]
    selection = Selection(text_field, kind.keep, validation_share, max_documents)
    if local and (len(local) > 1 or local[0].exists() or not _may_be_on_the_hub(sources[0])):
        if revision or subset:
            raise UsageError(f"--revision and --subset are for copies on the hub, and {sources[0]} is a local one")
        return _local(name, kind, local, selection)
    hub = kind.hub
    if sources or revision or subset:
        hub = HubCopy(sources[0] if sources else kind.hub.id, revision, subset)
    not_here = f"there is no file or folder {sources[0]}; " if sources else ""
    info(f"{not_here}opening the data set {hub.id} on the Hugging Face hub")
    return on_the_hub(name, hub, selection)


def sample() -> Corpus:
    """Six novels of Jane Austen; the held-out one is the validation split."""
    with tarfile.open(ASSETS / "austen.tar.xz") as archive:
        novels = {
            member.name.removesuffix(".txt"): archive.extractfile(member).read()
            for member in sorted(archive.getmembers(), key=lambda member: member.name)
        }

    def documents() -> Iterator[tuple[str, Document]]:
        for title, text in novels.items():
            yield "validation" if title == SAMPLE_HELD_OUT else "train", text_document(title, text)

    total = sum(map(len, novels.values()))
    return Corpus("sample", "six novels of Jane Austen, part of this program", documents, total, [*novels, total])


@dataclass(frozen=True)
class Selection:
    """What to take of a corpus: its text field, the rows that `keep` wants, so many documents, a validation share."""

    text_field: str = "text"
    keep: Keep | None = None
    validation_share: float = 0.0
    max_documents: int | None = None

    def limited(self, documents: Iterable[Document]) -> Iterator[Document]:
        """The first `max_documents` of them."""
        return islice(documents, self.max_documents)

    def divided(self, documents: Iterable[Document], known: int | None = None) -> Iterator[tuple[str, Document]]:
        """The first `max_documents`, every so many of which one is for validation, at least one.

        known: how many documents there are, if somebody knows; else the very first one is for validation.
        """
        every = round(1 / self.validation_share) if self.validation_share else 0
        offset = 0
        if every and known is not None:
            every = min(every, known, self.max_documents or known)
            offset = every // 2
        for number, document in enumerate(self.limited(documents)):
            held_out = every and number % every == offset
            yield "validation" if held_out else "train", document


def on_the_hub(name: str, hub: HubCopy, selection: Selection) -> Corpus:
    """A data set that `datasets` opens, streamed: a hub id, or a local folder in one of the formats it knows.

    Raises:
        LandmarkError: it cannot be opened, or has no such text field or no split named train.
    """
    import datasets

    where = f"{hub.id}{f'@{hub.revision}' if hub.revision else ''}"
    try:
        if hub.data_files is None:
            opened = datasets.load_dataset(hub.id, hub.subset, revision=hub.revision, streaming=True)
        else:
            root = hub.id if Path(hub.id).is_dir() else f"hf://datasets/{where}"
            files = {split: f"{root}/{pattern}" for split, pattern in hub.data_files.items()}
            opened = datasets.load_dataset("json", data_files=files, streaming=True)
    except Exception as error:
        # Whatever hub, network and loaders raise; the reason is theirs, the way out is ours.
        scripted = " --revision refs/convert/parquet may be a copy that opens, and" if "script" in str(error) else ""
        raise LandmarkError(
            f"cannot open the data set {where}: {str(error).strip().splitlines()[0]};{scripted} "
            f"--source names another copy or a local folder"
        ) from error
    by_split = {SPLIT_NAMES[split]: rows for split, rows in opened.items() if split in SPLIT_NAMES}
    if "train" not in by_split:
        raise LandmarkError(f"the data set {where} has no split named train, only {', '.join(opened)}")
    columns = by_split["train"].column_names
    if columns is not None and selection.text_field not in columns:
        raise no_such_field(f"the data set {where}", selection.text_field, f"the columns {', '.join(columns)}")

    def documents() -> Iterator[tuple[str, Document]]:
        for split in (split for split in SPLITS if split in by_split):
            found = rows_as_documents(f"{where} {split}", by_split[split], selection.text_field, selection.keep)
            if len(by_split) == 1:
                yield from selection.divided(found)
            else:
                yield from ((split, document) for document in selection.limited(found))

    return Corpus(name, f"the data set {where}", documents, None, _identity(selection, dataclasses.asdict(hub)))


def _local(name: str, kind: Kind, sources: list[Path], selection: Selection) -> Corpus:
    files = [(split, path) for source in sources for split, path in _files_by_split(source, kind.endings)]
    has_splits = {split for split, _ in files} != {None}
    if has_splits:
        # Files outside of the folders of a corpus with splits (a README, say) belong to none.
        files = sorted(((s, p) for s, p in files if s is not None), key=lambda item: SPLITS.index(item[0]))
        if files[0][0] != "train":
            raise LandmarkError(f"{sources[0]} has a {files[0][0]} split but no training documents")
    plain = all(path.name.endswith(PLAIN_TEXT) for _, path in files)
    known = selection.max_documents is None and all(path.name.endswith((*PLAIN_TEXT, ".jsonl")) for _, path in files)

    def read(paths: Iterable[Path]) -> Iterator[Document]:
        return (document for path in paths for document in read_documents(path, selection.text_field, selection.keep))

    def documents() -> Iterator[tuple[str, Document]]:
        if has_splits:
            for split in SPLITS:
                found = read(path for of, path in files if of == split)
                yield from ((split, document) for document in selection.limited(found))
        elif plain and len(files) == 1 and selection.validation_share:
            place = cut_text_file(files[0][1], selection.validation_share)
            yield "train", text_file(files[0][1], 0, place)
            yield "validation", text_file(files[0][1], place)
        else:
            yield from selection.divided(read(path for _, path in files), len(files) if plain else None)

    total = sum(path.stat().st_size for _, path in files) if known else None
    stats = [[split, str(path), path.stat().st_size, path.stat().st_mtime_ns] for split, path in files]
    return Corpus(name, ", ".join(map(str, sources)), documents, total, _identity(selection, stats))


def _identity(selection: Selection, source: Any) -> Any:
    taken = [selection.text_field, selection.validation_share, selection.max_documents, selection.keep is not None]
    return [source, taken]


def _files_by_split(source: Path, endings: tuple[str, ...]) -> list[tuple[str | None, Path]]:
    """A source's files, each with the split that its folder (or, like `train-00000.parquet`, its own name) says."""
    if source.is_file():
        if not source.name.endswith(endings):
            raise LandmarkError(f"{source} is not of a kind that this corpus is read from ({', '.join(endings)})")
        return [(None, source)]
    if not source.exists():
        raise LandmarkError(f"there is no file or folder {source}")
    files = find_files(source, endings)
    if not files:
        raise LandmarkError(f"no documents in {source}: it holds no file with one of the endings {', '.join(endings)}")
    return [(_split_of(file.relative_to(source)), file) for file in files]


def _split_of(path: Path) -> str | None:
    for folder in path.parts[:-1]:
        if folder in SPLIT_NAMES:
            return SPLIT_NAMES[folder]
    named = _SPLIT_FILE.match(path.name)
    return SPLIT_NAMES[named.group(1)] if named else None


def _may_be_on_the_hub(source: str) -> bool:
    """Whether a source that is not there may be a hub id: not when its folder is there, or it ends like a file."""
    named_like_one = _HUB_ID.fullmatch(source) and not source.endswith(PLAIN_TEXT + JSON_LINES + PARQUET)
    return bool(named_like_one) and not Path(source).parent.is_dir()
