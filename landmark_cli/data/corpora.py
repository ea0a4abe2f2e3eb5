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

from landmark_cli.console import info, warn
from landmark_cli.data.assets import ASSETS, SAMPLE
from landmark_cli.data.chats import Chats
from landmark_cli.data.documents import Document, Keep, cut_text_file, no_such_field, text_document, text_file
from landmark_cli.data.readers import (
    ENDINGS,
    JSON_LINES,
    PARQUET,
    PLAIN_TEXT,
    AsDocument,
    ending_of,
    read_documents,
    rows_as_documents,
)
from landmark_cli.data.sources import SPLIT_NAMES, SPLITS, SourceFile, find_sources
from landmark_cli.errors import LandmarkError, UsageError
from landmark_cli.file_errors import reason

SAMPLE_HELD_OUT = "persuasion"
LONGEST_META = 1 << 16
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Corpus:
    """Documents to prepare, in a fixed order.

    Attributes:
        name: "sample", "pg19", ...
        source: where the documents come from, in words.
        documents: called, yields every document with the split that the document belongs to.
        total_bytes: what all documents take where they are stored; None where nobody knows.
        identity: what has to be the same for the documents to be the same (JSON).
        has_fields: whether documents are rows with a field of text.
        has_validation: whether the corpus comes with a validation split of its own.
        has_answers: whether documents say which of their text is answers (see `documents.Marked`).
        is_made: whether documents are made, which is more work than to read them: the corpus can be pickled, and
            processes beside this one make them.
    """

    name: str
    source: str
    documents: Callable[[], Iterator[tuple[str, Document]]]
    total_bytes: int | None
    identity: Any
    has_fields: bool = False
    has_validation: bool = False
    has_answers: bool = False
    is_made: bool = False


@dataclass(frozen=True)
class HubCopy:
    """A data set of the hub: its id, and files to read in place of what `datasets` would find by itself."""

    id: str
    revision: str | None = None
    subset: str | None = None
    data_files: dict[str, str] | None = None


@dataclass(frozen=True)
class Kind:
    """A corpus that this program knows: the files a local copy has, its copy on the hub, the rows to take.

    has_splits: copies of the corpus have splits, and a file outside of the splits is none of its documents.
    """

    endings: tuple[str, ...] = ENDINGS
    hub: HubCopy | None = None
    has_splits: bool = False
    keep: Keep | None = field(default=None, repr=False)


def is_arxiv(row: Mapping[str, Any]) -> bool:
    """Whether a row of the proof-pile is an arXiv paper, by its field `meta`; rows without one are taken."""
    meta = row.get("meta")
    if isinstance(meta, str):
        if len(meta) > LONGEST_META:
            return False
        try:
            meta = json.loads(meta)
        except (ValueError, RecursionError):
            try:
                meta = ast.literal_eval(meta)
            except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
                return False
    return meta is None or (isinstance(meta, Mapping) and meta.get("config") == "arxiv")


KINDS = {
    "pg19": Kind((".txt", *PARQUET), HubCopy("emozilla/pg19"), has_splits=True),
    "arxiv-math": Kind(
        JSON_LINES + PARQUET,
        has_splits=True,
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
    chats: Chats | None = None,
) -> Corpus:
    """Find a corpus.

    Args:
        name: "sample" or one of `KINDS`.
        sources: local files and folders, or one hub id; None takes the corpus's own copy on the hub.
        revision, subset: of a hub copy.
        text_field: the field or column with the text, where documents are rows.
        validation_share: share of the documents that becomes the validation split where the corpus has none.
        max_documents: the most documents to read of each split that the corpus has; None reads all.
        chats: what makes documents of rows that hold chats; files are then JSON lines.

    Raises:
        LandmarkError: a source does not exist, or holds no documents.
        UsageError: options that do not go together.
    """
    if name == SAMPLE:
        if sources:
            raise UsageError("the sample is part of the program: to prepare your own files, `landmark prepare text`")
        return sample(validation_share, max_documents)
    kind = KINDS[name] if chats is None else dataclasses.replace(KINDS[name], endings=JSON_LINES)
    if not sources and kind.hub is None:
        raise UsageError("which text? name files or folders with --source")
    local = [Path(source).expanduser() for source in sources or []]
    selection = Selection(
        text_field if chats is None else chats.field, kind.keep, validation_share, max_documents, chats
    )
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


def novels() -> dict[str, bytes]:
    """The texts of the sample by their titles, in the order of these."""
    with tarfile.open(ASSETS / "austen.tar.xz") as archive:
        return {
            member.name.removesuffix(".txt"): archive.extractfile(member).read()
            for member in sorted(archive.getmembers(), key=lambda member: member.name)
        }


def sample(validation_share: float = 0.01, max_documents: int | None = None) -> Corpus:
    """Six novels of Jane Austen, of which a share, but no less than Persuasion, is the validation split.

    Arguments: as `open_corpus` takes them; a share of 0 holds no novel out.
    """
    texts = novels()
    count = max(1, round(validation_share * len(texts))) if validation_share else 0
    held_out = [SAMPLE_HELD_OUT, *(title for title in texts if title != SAMPLE_HELD_OUT)][:count]
    taken = {
        "train": [title for title in texts if title not in held_out][:max_documents],
        "validation": held_out[:max_documents],
    }
    for split, titles in taken.items():
        info(f"{split}: {', '.join(titles) or 'no novel'}")

    def documents() -> Iterator[tuple[str, Document]]:
        for split, titles in taken.items():
            yield from ((split, text_document(title, texts[title])) for title in titles)

    total = sum(len(texts[title]) for titles in taken.values() for title in titles)
    return Corpus(SAMPLE, "six novels of Jane Austen, part of this program", documents, total, [taken, total])


@dataclass(frozen=True)
class Selection:
    """What to take of a corpus: its text field, the rows that `keep` wants, how many documents, the validation
    share, and what makes documents of chats."""

    text_field: str = "text"
    keep: Keep | None = None
    validation_share: float = 0.0
    max_documents: int | None = None
    chats: Chats | None = None

    @property
    def as_document(self) -> AsDocument | None:
        """What makes documents of rows, where it is not their field of text."""
        return self.chats and self.chats.document

    def limited(self, documents: Iterable[Document]) -> Iterator[Document]:
        """The first `max_documents` of the documents."""
        return islice(documents, self.max_documents)

    def taken(
        self, splits: Mapping[str, Iterable[Document]], known: int | None = None
    ) -> Iterator[tuple[str, Document]]:
        """The first `max_documents` of each split; without a validation split, a share of the training documents is
        one.

        known: how many training documents there are, if somebody knows.
        """
        try:
            for split in SPLITS:
                if split == "train" and "validation" not in splits:
                    yield from self.divided(splits[split], known)
                elif split in splits:
                    yield from ((split, document) for document in self.limited(splits[split]))
        finally:
            if self.chats is not None:
                self.chats.close()

    def divided(self, documents: Iterable[Document], known: int | None = None) -> Iterator[tuple[str, Document]]:
        """The first `max_documents`: one of every 1 / validation_share of them is for validation, and at least one in
        all.

        known: how many documents there are, if somebody knows; else the very first document is for validation.
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
    """A data set that `datasets` opens, streamed: a hub id, or a local folder in a format that `datasets` knows.

    Raises:
        LandmarkError: the data set cannot be opened, or has no such text field or no split named train.
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
        by_split = {SPLIT_NAMES[split]: rows for split, rows in opened.items() if split in SPLIT_NAMES}
        columns = by_split["train"].column_names if "train" in by_split else None
    except Exception as error:
        # Whatever hub, network and loaders raise; the reason is theirs, the way out is ours.
        scripted = " --revision refs/convert/parquet may be a copy that opens, and" if "script" in str(error) else ""
        raise LandmarkError(
            f"cannot open the data set {where}: {reason(error)};{scripted} "
            f"--source names another copy or a local folder"
        ) from error
    if "train" not in by_split:
        raise LandmarkError(f"the data set {where} has no split named train, only {', '.join(opened)}")
    if columns is not None and selection.text_field not in columns:
        raise LandmarkError(no_such_field(f"the data set {where}", selection.text_field, columns, "columns"))
    info(f"found the splits {', '.join(by_split)}")
    if others := [name for name, rows in opened.items() if rows is not by_split.get(SPLIT_NAMES.get(name))]:
        info(f"left out: the splits {', '.join(others)}")

    def read(split: str) -> Iterator[Document]:
        rows = by_split[split]
        return rows_as_documents(f"{where} {split}", rows, selection.text_field, selection.keep, selection.as_document)

    def documents() -> Iterator[tuple[str, Document]]:
        return selection.taken({split: read(split) for split in by_split})

    return Corpus(
        name,
        f"the data set {where}",
        documents,
        total_bytes=None,
        identity=_identity(selection, dataclasses.asdict(hub)),
        has_fields=True,
        has_validation="validation" in by_split,
        has_answers=selection.chats is not None,
    )


def _local(name: str, kind: Kind, sources: list[Path], selection: Selection) -> Corpus:
    found = find_sources(sources, kind.endings, keeps_splits=kind.has_splits)
    where = ", ".join(map(str, sources))
    info(f"found {found.found()} in {where}")
    if found.left_out:
        info(f"left out: {found.not_read()}")
    for note in found.notes:
        warn(note)
    by_split: dict[str, list[SourceFile]] = {}
    for file in found.files:
        by_split.setdefault(file.split or "train", []).append(file)
    train, held_out = by_split["train"], "validation" in by_split
    plain = all(file.ending in PLAIN_TEXT for file in train)
    known = selection.max_documents is None and all(file.ending in (*PLAIN_TEXT, ".jsonl") for file in found.files)

    def read(files: list[SourceFile]) -> Iterator[Document]:
        taken = selection.text_field, selection.keep, selection.as_document
        return (document for file in files for document in read_documents(file.path, *taken))

    def documents() -> Iterator[tuple[str, Document]]:
        splits: dict[str, Iterable[Document]] = {split: read(files) for split, files in by_split.items()}
        if plain and len(train) == 1 and selection.validation_share and not held_out:
            path = train[0].path
            place = cut_text_file(path, selection.validation_share)
            splits["train"], splits["validation"] = [text_file(path, 0, place)], [text_file(path, place)]
        return selection.taken(splits, len(train) if plain else None)

    stats = [[file.split, str(file.path), file.size, file.modified_ns] for file in found.files]
    return Corpus(
        name,
        where,
        documents,
        total_bytes=sum(file.size for file in found.files) if known else None,
        identity=_identity(selection, stats),
        has_fields=any(file.ending not in PLAIN_TEXT for file in found.files),
        has_validation=held_out,
        has_answers=selection.chats is not None,
    )


def known_documents(name: str | Path) -> int | None:
    """How many training documents a prepared corpus or a source of text has, where that is known before it is read:
    where it is prepared, or holds files of plain text alone."""
    from landmark_cli.data.token_file_metadata import read_metadata

    path = Path(name).expanduser()
    if (path / "train.json").is_file():
        return read_metadata(path / "train.bin").documents
    if str(name) in (SAMPLE, *KINDS) or not path.exists():
        return None
    files = [file for file in find_sources([path], ENDINGS).files if file.split in (None, "train")]
    return len(files) if all(file.ending in PLAIN_TEXT for file in files) else None


def _identity(selection: Selection, source: Any) -> Any:
    taken = [selection.text_field, selection.validation_share, selection.max_documents, selection.keep is not None]
    return [source, taken, *(selection.chats.identity if selection.chats else ())]


def _may_be_on_the_hub(source: str) -> bool:
    """Whether a source that does not exist may be a hub id: not when its folder exists, or its name ends like a
    file's."""
    named_like_one = _HUB_ID.fullmatch(source) and ending_of(source) not in ENDINGS
    return bool(named_like_one) and not Path(source).parent.is_dir()
