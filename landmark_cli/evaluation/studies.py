"""Studies: a list of settings measured over models that play roles, such as the paper's tables.

A study file names the roles and the rows; whoever runs it says which model directory plays which role. Every finished
row is kept beside the tables, so a study that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from landmark_cli.console import info
from landmark_cli.errors import UsageError
from landmark_cli.inference.settings import ReadingSettings
from landmark_cli.options import nearest, recipes_folder

# Settings of a row besides how to read; "top-k" is the option's name on the command line.
EVALUATION_KEYS = ("eval-length", "memory")
RENAMED = {"top-k": "top-k-blocks"}


@dataclass(frozen=True)
class Row:
    """One line of a study: which role is measured, with which settings, and the figures that were published for it.

    settings: option names ("eval-length", "top-k", ...) to values. paper: corpus name to figure.
    """

    role: str
    settings: dict[str, Any]
    paper: dict[str, float] = field(default_factory=dict)

    def reading(self) -> ReadingSettings:
        """How the row's model reads."""
        chosen = {RENAMED.get(key, key).replace("-", "_"): value for key, value in self.settings.items()}
        return ReadingSettings(**{key: value for key, value in chosen.items() if key in reading_fields()})


@dataclass(frozen=True)
class Study:
    """A study file: its title, its roles (name to what should play it) and its rows."""

    name: str
    title: str
    roles: dict[str, str]
    rows: list[Row]

    @property
    def columns(self) -> list[str]:
        """The settings that any row gives, in the order of their first appearance."""
        return list(dict.fromkeys(key for row in self.rows for key in row.settings))


def reading_fields() -> set[str]:
    return {one.name for one in fields(ReadingSettings)}


def load_study(name: str | Path) -> Study:
    """Read a shipped study ("table1") or a file. Raises UsageError naming what is wrong in it."""
    import yaml

    folder = recipes_folder() / "eval"
    shipped = folder / f"{name}.yaml"
    path = shipped if shipped.is_file() else Path(name)
    if not path.is_file():
        raise UsageError(
            f'no study is called "{name}"{nearest(str(name), (file.stem for file in folder.glob("*.yaml")))}'
        )
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"study {path}: not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or content.get("study") != "perplexity" or not content.get("rows"):
        raise UsageError(f'study {path}: expected "study: perplexity" and "rows:" with at least one row')
    roles = content.get("roles") or {}
    rows = [_row(path, number, entry, roles) for number, entry in enumerate(content["rows"], 1)]
    return Study(path.stem, content.get("title", path.stem), roles, rows)


def _row(path: Path, number: int, entry: Any, roles: dict[str, str]) -> Row:
    where = f"study {path}, row {number}"
    if not isinstance(entry, dict) or entry.get("role") not in roles:
        found = entry.get("role") if isinstance(entry, dict) else entry
        raise UsageError(f"{where}: role {found!r} is none of the study's roles{nearest(str(found), roles)}")
    settings = {key: value for key, value in entry.items() if key not in ("role", "paper")}
    known = {name.replace("_", "-") for name in reading_fields()} - set(RENAMED.values()) | {*EVALUATION_KEYS, *RENAMED}
    for key in settings:
        if key not in known:
            raise UsageError(f'{where}: unknown key "{key}"{nearest(key, known)}')
    return Row(entry["role"], settings, entry.get("paper") or {})


def model_identity(path: str | Path) -> dict[str, Any]:
    """What tells one state of a model directory from another: its place and its files' sizes and times."""
    directory = Path(path)
    files = sorted(file for file in directory.glob("*") if file.suffix in (".safetensors", ".bin", ".pt", ".json"))
    return {
        "path": str(directory.resolve() if files else path),
        "files": [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files],
    }


@dataclass
class FinishedRows:
    """The rows measured so far, one JSON object a line in `path`, found again by what they depended on."""

    path: Path

    def __post_init__(self) -> None:
        self.rows: dict[str, dict[str, Any]] = {}
        if self.path.is_file():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                # A line cut short by an interruption is measured again.
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:
                    continue
                self.rows[entry["key"]] = entry["result"]

    @staticmethod
    def key(depends_on: dict[str, Any]) -> str:
        return hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()

    def get(self, key: str) -> dict[str, Any] | None:
        return self.rows.get(key)

    def add(self, key: str, result: dict[str, Any]) -> None:
        self.rows[key] = result
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "result": result}) + "\n")


def check_roles(study: Study, models: dict[str, str]) -> None:
    """Raise UsageError for a role the study does not have, or where no role has a model; say what is left out."""
    for role in models:
        if role not in study.roles:
            raise UsageError(f'--role {role}=...: {study.name} has no role "{role}"{nearest(role, study.roles)}')
    missing = [role for role in study.roles if role not in models]
    if len(missing) == len(study.roles):
        roles = ", ".join(f"{role} ({what})" for role, what in study.roles.items())
        raise UsageError(f"{study.name} needs models: give --role {missing[0]}=DIRECTORY. Its roles: {roles}")
    if missing:
        info(f"no model for {', '.join(missing)}: their rows are left out")


Measure = Callable[[Row], dict[str, Any]]


def run_study(
    study: Study, models: dict[str, str | Path], common: dict[str, Any], finished: FinishedRows, measure: Measure
) -> list[dict[str, Any] | None]:
    """Measure the rows whose role has a model and that are not finished yet; None for rows without a model.

    models: role to model directory or hub id. common: what else a result depends on (data, sample, seed, dtype).
    """
    results: list[dict[str, Any] | None] = []
    for number, row in enumerate(study.rows, 1):
        if row.role not in models:
            results.append(None)
            continue
        depends_on = {"model": model_identity(models[row.role]), "settings": row.settings, **common}
        key = finished.key(depends_on)
        known = finished.get(key)
        label = f"row {number} of {len(study.rows)}, {row.role}"
        if known is None:
            info(f"{label}: {describe(row.settings)}")
            known = measure(row)
            finished.add(key, known)
        else:
            info(f"{label}: kept from an earlier run")
        results.append(known)
    return results


def describe(settings: dict[str, Any]) -> str:
    """{"eval-length": 512, "top-k": 2} -> "eval-length 512, top-k 2"."""
    return ", ".join(f"{key} {value}" for key, value in settings.items())
