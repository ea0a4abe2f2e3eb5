"""What a preparation left out because it is no text or cannot be read: by file, counted as far as anybody can."""

from __future__ import annotations

from dataclasses import dataclass, field

from landmark_cli.data.documents import BadText

FILES_KEPT = 1000
FILES_SHOWN = 20
OTHERS = "further files"


@dataclass
class FileLosses:
    """What was left out of one file.

    Attributes:
        first: the first loss, with its place and the reason.
        documents: how many documents, without those of a damaged rest of which nobody can tell how many they are.
        damaged: whether there is such a rest.
    """

    first: str
    documents: int = 0
    damaged: bool = False

    def add(self, documents: int, damaged: bool) -> None:
        self.documents += documents
        self.damaged |= damaged

    def __str__(self) -> str:
        counted = [str(self.documents)] if self.documents else []
        return " and ".join(counted + ["the rest of it"] * self.damaged)


@dataclass
class LeftOut:
    """What was left out of all files, by the file's name; files beyond the first 1000 are counted together."""

    files: dict[str, FileLosses] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.files)

    @property
    def documents(self) -> int:
        return sum(losses.documents for losses in self.files.values())

    def add(self, bad: BadText) -> bool:
        """Count one loss; returns whether to tell the user of it: the first one of a file, of not too many files."""
        return self._add(bad.file, FileLosses(str(bad), bad.documents or 0, bad.documents is None))

    def merge(self, other: LeftOut) -> list[str]:
        """Count what another process left out; returns what the user should be told of these losses."""
        return [losses.first for file, losses in other.files.items() if self._add(file, losses)]

    def summary(self) -> str:
        """How much was left out, and of which files."""
        documents, damaged = self.documents, sum(losses.damaged for losses in self.files.values())
        what = []
        if documents:
            were = "s were" if documents > 1 else " was"
            what.append(f"{documents} document{were} left out, being no text or damaged")
        if damaged:
            what.append(
                f"the rest of {damaged} damaged file{'s' * (damaged > 1)} is lost, how many documents is unknown"
            )
        shown = [f"{file}: {losses}" for file, losses in list(self.files.items())[:FILES_SHOWN]]
        more = f" and {len(self.files) - FILES_SHOWN} more" if len(self.files) > FILES_SHOWN else ""
        return f"{'; '.join(what)} ({', '.join(shown)}{more})"

    def _add(self, file: str, losses: FileLosses) -> bool:
        if file not in self.files and len(self.files) >= FILES_KEPT:
            file = OTHERS
        known = self.files.get(file)
        if known is None:
            self.files[file] = FileLosses(losses.first, losses.documents, losses.damaged)
        else:
            known.add(losses.documents, losses.damaged)
        return known is None and len(self.files) <= FILES_SHOWN
