"""Studies: a list of settings measured over models that play roles, such as the paper's tables.

A study file names the roles and the rows; whoever runs it says which model directory plays which role. Every finished
row is kept beside the tables, so a study that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from landmark_cli.console import counted, finite, info, warn
from landmark_cli.errors import UsageError, shown
from landmark_cli.file_errors import reading, writing
from landmark_cli.file_reading import read_json_lines, read_yaml
from landmark_cli.file_writing import append_line
from landmark_cli.inference.settings import ReadingSettings
from landmark_cli.interrupts import Interrupts, interrupts
from landmark_cli.launch import again
from landmark_cli.options import nearest, option, recipes_folder, settings_of
from landmark_cli.schema import check

Kind = Literal["perplexity", "longppl", "ruler", "passkey"]


@dataclass
class StudyFile:
    """What a study file holds. study: what rows measure that do not say it themselves."""

    study: Kind
    rows: list[dict[str, Any]]
    roles: dict[str, str]
    title: str | None = None
    evaluator: str | None = None


@dataclass
class AboutRow:
    """What a row holds besides its role and settings: what it measures, where that is not what the file says, and
    published figures by the corpus's name."""

    study: Kind | None = None
    paper: dict[str, float] | None = None


@dataclass
class PerplexityRow(ReadingSettings):
    """The settings that a row of perplexity may have: how the model reads, and in what windows."""

    eval_length: int | None = option(None, min=1, help="Text tokens of a window.")
    memory: bool = option(True, help="Remember earlier chunks.")


@dataclass
class LongPerplexityRow(ReadingSettings):
    """The settings that a row of LongPPL may have: how the model reads, and in what windows."""

    eval_length: int | None = option(None, min=2, help="Text tokens of a window.")
    short_context: int = option(4096, min=1, help="Tokens of the short context.")
    stride: int = option(1024, min=1, help="Tokens that share a short context.")


@dataclass
class RulerRow(ReadingSettings):
    """The settings that a row of RULER may have: what is asked, and how the model reads."""

    tasks: list[str] | None = option(None, help="Tasks, whose mean score is the row's; by default all.")
    length: int = option(4096, min=1, help="Tokens of prompt and answer.")
    full_attention: bool = option(False, help="Read with ordinary attention.")
    chat: bool = option(False, help="Ask in the tokenizer's chat template.")


@dataclass
class PassKeyRow(ReadingSettings):
    """The settings that a row of pass keys may have: what is asked, and how the model reads."""

    length: int = option(1024, min=1, help="Text tokens of a prompt.")
    prompts: int = option(10, min=1, help="Prompts; with depths, at each depth.")
    depths: int | None = option(None, min=1, help="Put keys at this many depths, evenly from 0 to 1.")
    full_attention: bool = option(False, help="Read with ordinary attention.")


# What a row measures -> the settings that it may have.
KINDS: dict[str, type[ReadingSettings]] = {
    "perplexity": PerplexityRow,
    "longppl": LongPerplexityRow,
    "ruler": RulerRow,
    "passkey": PassKeyRow,
}


@dataclass(frozen=True)
class Row:
    """One line of a study: which role is measured, with which settings, and the figures that were published for it.

    settings: option names ("eval-length", "top-k-blocks", ...) to values. paper: corpus name to figure. kind: what is
    measured, one of KINDS.
    """

    role: str
    settings: dict[str, Any]
    paper: dict[str, float] = field(default_factory=dict)
    kind: str = "perplexity"

    def asks(self) -> Any:
        """Its settings, with the defaults of what it measures: of the class that KINDS has for it."""
        return KINDS[self.kind](**self._named())

    def reading(self) -> ReadingSettings:
        """How the row's model reads."""
        named = self._named()
        return ReadingSettings(**{key: value for key, value in named.items() if key in settings_of(ReadingSettings)})

    def _named(self) -> dict[str, Any]:
        """The settings by the names of Python's fields."""
        return {key.replace("-", "_"): value for key, value in self.settings.items()}


@dataclass(frozen=True)
class Study:
    """A study file: its title, its roles (name to a description of the model to play it) and its rows. evaluator: of
    LongPPL, the role whose model finds the key tokens."""

    name: str
    title: str
    roles: dict[str, str]
    rows: list[Row]
    evaluator: str | None = None

    @property
    def kinds(self) -> list[str]:
        """What its rows measure, in the order of their first appearance."""
        return list(dict.fromkeys(row.kind for row in self.rows))

    @property
    def columns(self) -> list[str]:
        """The settings that any row gives, in the order of their first appearance."""
        return list(dict.fromkeys(key for row in self.rows for key in row.settings))


def load_study(name: str | Path) -> Study:
    """Read a shipped study ("table1") or a file. Raises UsageError naming what is wrong in it."""
    folder = recipes_folder() / "eval"
    shipped = folder / f"{name}.yaml"
    path = shipped if shipped.is_file() else Path(name)
    if not path.is_file():
        raise UsageError(
            f'no study is called "{name}"{nearest(str(name), (file.stem for file in folder.glob("*.yaml")))}'
        )
    with reading(path, "study", kind=UsageError):
        file = check(StudyFile, read_yaml(path, "study", kind=UsageError))
        if not file.rows:
            raise ValueError("it should have at least one row")
    rows = [_row(path, number, entry, file) for number, entry in enumerate(file.rows, 1)]
    study = Study(path.stem, file.title or path.stem, file.roles, rows, file.evaluator)
    with reading(path, "study", kind=UsageError):
        if file.evaluator is None and "longppl" in study.kinds:
            raise ValueError('rows of longppl need a line "evaluator: ROLE" in the file: who finds the key tokens')
        if file.evaluator is not None and "longppl" not in study.kinds:
            raise ValueError("it names an evaluator, who finds the key tokens of longppl, but has no row of that")
        if file.evaluator is not None and file.evaluator not in file.roles:
            raise ValueError(f"evaluator {shown(file.evaluator)} is none of the roles")
    return study


def _row(path: Path, number: int, entry: dict[str, Any], file: StudyFile) -> Row:
    roles = file.roles
    where = f"study {path}, row {number}"
    role = entry.get("role")
    if not isinstance(role, str) or role not in roles:
        raise UsageError(f"{where}: role {shown(role)} is none of the study's roles{nearest(str(role), roles)}")
    with reading(path, "study", kind=UsageError):
        about = check(AboutRow, entry, f"row {number}")
    kind = about.study or file.study
    known = {name.replace("_", "-"): one for name, one in settings_of(KINDS[kind]).items()}
    settings = {}
    for key, value in entry.items():
        if key in ("role", "study", "paper"):
            continue
        if key not in known:
            raise UsageError(f'{where}: unknown key "{str(key)[:60]}"{nearest(key, known)}')
        try:
            settings[key] = known[key].convert(value)
        except ValueError as error:
            raise UsageError(f"{where}: {key}: {error}") from None
    return Row(role, settings, about.paper or {}, kind)


def model_identity(path: str | Path) -> dict[str, Any]:
    """What tells one state of a model directory from another: the directory's path and its files' sizes and times."""
    directory = Path(path)
    files = sorted(file for file in directory.glob("*") if file.suffix in (".safetensors", ".bin", ".pt", ".json"))
    return {
        "path": str(directory.resolve() if files else path),
        "files": [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files],
    }


@dataclass
class FinishedRow:
    """A line of the file of finished rows. sha256: of the rest of the line, see `FinishedRows.add`."""

    key: str
    result: dict[str, Any]
    sha256: str


@dataclass
class FinishedRows:
    """The rows measured so far, one JSON object a line in `path`, found again by what they depend on.

    The row of a line that was cut short or changed since it was written is measured again; the user is told how many
    such lines there are.
    """

    path: Path

    def __post_init__(self) -> None:
        self.rows: dict[str, dict[str, Any]] = {}
        damaged: list[int] = []
        for row in self._written(damaged) if self.path.exists() else ():
            if row is not None and row.sha256 == self.key({"key": row.key, "result": row.result}):
                self.rows[row.key] = row.result
            else:
                damaged.append(0)
        if damaged:
            warn(f"{self.path} has {counted(len(damaged), 'damaged line')}: what stood there is measured again")

    def _written(self, damaged: list[int]) -> Iterator[FinishedRow | None]:
        """The lines as they were written; None for a line of another kind. Numbers of lines that are no JSON go to
        `damaged`."""
        for entry in read_json_lines(self.path, damaged=lambda number, _: damaged.append(number)):
            try:
                yield check(FinishedRow, entry)
            except ValueError:
                yield None

    @staticmethod
    def key(depends_on: dict[str, Any]) -> str:
        return hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()

    def place(self) -> str | None:
        """What is kept where the work is stopped, and how to go on; None where no row is finished."""
        return f"what was measured is kept; go on with\n{again()}" if self.rows else None

    def get(self, key: str) -> dict[str, Any] | None:
        return self.rows.get(key)

    def add(self, key: str, result: dict[str, Any]) -> None:
        self.rows[key] = result
        entry = {"key": key, "result": result}
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            append_line(self.path, json.dumps(entry | {"sha256": self.key(entry)}))


def check_roles(study: Study, models: dict[str, str]) -> None:
    """Raise UsageError for a role that the study does not have, or where no role has a model; tell the user which roles
    are left out."""
    for role in models:
        if role not in study.roles:
            raise UsageError(f'--role {role}=...: {study.name} has no role "{role}"{nearest(role, study.roles)}')
    missing = [role for role in study.roles if role not in models]
    if len(missing) == len(study.roles):
        roles = ", ".join(f"{role} ({what})" for role, what in study.roles.items())
        raise UsageError(f"{study.name} needs models: give --role {missing[0]}=DIRECTORY. Its roles: {roles}")
    if missing:
        info(f"no model for {', '.join(missing)}: their rows are left out")


Measure = Callable[[Row, Interrupts], dict[str, Any]]
"""Measures a row; may raise Stopped where a signal came, if what is measured of the row is kept."""


def run_study(
    study: Study,
    models: dict[str, str | Path],
    finished: FinishedRows,
    measure: Measure,
    depends_on: Callable[[Row], dict[str, Any]],
) -> list[dict[str, Any] | None]:
    """Measure the rows whose role has a model and that are not finished yet; None for rows without a model.

    models: role to model directory or hub id. depends_on: what the result of a row depends on besides its model and
    settings, such as data, sample, seed and dtype (JSON).

    Raises Stopped after the row under way where SIGTERM or SIGINT came and rows are left.
    """
    results: list[dict[str, Any] | None] = []
    with interrupts("finishing the row") as asked:
        for number, row in enumerate(study.rows, 1):
            if row.role not in models:
                results.append(None)
                continue
            # The model as it is now, which may be another than when the study began.
            about = {"model": model_identity(models[row.role]), "settings": row.settings}
            key = finished.key(about | depends_on(row))
            label = f"row {number} of {len(study.rows)}, {row.role}"
            if finished.get(key) is not None:
                info(f"{label}: kept from an earlier run")
            elif asked:
                raise asked.stopped(f"what was measured is kept; {label}, comes next; go on with\n{again()}")
            else:
                info(f"{label}: {describe(row.settings)}")
                finished.add(key, finite(measure(row, asked)))
            results.append(finished.get(key))
    return results


def describe(settings: dict[str, Any]) -> str:
    """{"length": 512, "tasks": ["vt", "fwe"]} -> "length 512, tasks vt and fwe"."""
    shown = {
        key: " and ".join(map(str, value)) if isinstance(value, list) else value for key, value in settings.items()
    }
    return ", ".join(f"{key} {value}" for key, value in shown.items())
