"""The commands that write a directory, and how one tells that it holds the same as if nothing had happened."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults import workplace
from tests.faults.forks import Ended, Fork, begin
from tests.faults.harness import SILENT, Broken, check_done, digest
from tests.faults.moments import Changes, Length

OUTPUT = "out"
# Figures of a run that are the same whenever it is run.
REPEATED = ("step", "loss", "learning_rate", "gradient_norm", "tokens", "validation_loss")


def small_pieces() -> None:
    """Have prepare note its place after every few documents, so that it has many places to go on from."""
    from landmark_cli.data import prepare

    assert prepare.CHECKPOINT_SECONDS and prepare.BATCH_DOCUMENTS
    prepare.CHECKPOINT_SECONDS, prepare.BATCH_DOCUMENTS = 0.0, 3


def token_files(output: Path) -> dict[str, Any]:
    """What a prepared corpus is: every byte of it but the time of writing."""
    found: dict[str, Any] = digest(output, "*.bin")
    for file in output.glob("*.json"):
        # Its checksum is over the times too; that it is right shows when the file is opened.
        found[file.name] = {**json.loads(file.read_text()), "modified_ns": None, "checksum": None}
    found["left"] = sorted(file.name for file in output.glob("*.partial"))
    return found


def run_files(output: Path) -> dict[str, Any]:
    """What a finished run is: its model, its newest checkpoint's weights, and its curve."""
    found: dict[str, Any] = digest(output, "*.safetensors", "*.json", "*.yaml", "*.jinja")
    # One that was damaged is put aside and left to the user.
    checkpoints = sorted(path for path in output.glob("checkpoints/*") if path.suffix != ".damaged")
    found["newest"] = digest(checkpoints[-1], "model.safetensors") if checkpoints else None
    found["kept"] = {path.name: sorted(file.name for file in path.iterdir()) for path in checkpoints}
    lines = (output / "metrics.jsonl").read_text().splitlines()
    found["curve"] = [{key: record[key] for key in REPEATED if key in record} for record in map(json.loads, lines)]
    found["left"] = sorted(file.name for file in output.glob("**/*.partial"))
    return found


def directory(output: Path) -> dict[str, Any]:
    """Every byte of a directory, and what is left beside it."""
    return {**digest(output), "left": sorted(path.name for path in output.parent.glob(f"{output.name}.*"))}


def tables(output: Path) -> dict[str, Any]:
    """A study's tables."""
    return digest(output, "*.md", "*.csv", "*.json")


@dataclass(frozen=True)
class Job:
    """A command that writes OUTPUT.

    reads: what it needs of the workplace. again: what is added when it is run once more. result: what of its output
    has to be the same. published: the file that says that the output is whole, and what is whole then. place: what is
    there, as a pattern, once there is something to go on from.
    """

    name: str
    reads: Sequence[str]
    arguments: Sequence[object]
    result: Callable[[Path], dict[str, Any]]
    again: Sequence[str] = ()
    published: str = ""
    place: str = ""
    before: Callable[[], None] | None = None

    def run(self, folder: Path, *more: object, signals: Iterable[tuple[float, int]] = (), **settings) -> Ended:
        """Run it in a folder to its end. more, settings: as `start` takes them; signals: as `Fork.wait` does."""
        return self.start(folder, *more, **settings).wait(signals)

    def start(self, folder: Path, *more: object, before: Callable[[], None] | None = None, **settings) -> Fork:
        """Begin it. more: further arguments. before: what the fork does first. settings: of the Fork."""

        def first() -> None:
            if self.before is not None:
                self.before()
            if before is not None:
                before()

        return begin([*self.arguments, *more], folder, before=first, **settings)

    def setup(self, base: Path) -> None:
        """Run it once without any fault: base/whole/NAME holds what came of it, and how long it was."""
        folder = base / "whole" / self.name
        if folder.exists():
            return
        folder.mkdir(parents=True)
        workplace.link(base, folder, *self.reads)
        changes = Changes(folder)
        ended = self.run(folder, before=changes.watch)
        check_done(ended)
        size = sum(path.stat().st_size for path in (folder / OUTPUT).rglob("*") if path.is_file())
        result = self.result(folder / OUTPUT)
        note = {"changes": changes.count, "seconds": ended.wall, "size": size, "result": result}
        (folder / "note.json").write_text(json.dumps(note))

    def whole(self, base: Path) -> dict[str, Any]:
        """What its result has to be."""
        return self._note(base)["result"]

    def length(self, base: Path) -> Length:
        note = self._note(base)
        return Length(note["changes"], note["seconds"])

    def size(self, base: Path) -> int:
        """Bytes that its output takes."""
        return self._note(base)["size"]

    def _note(self, base: Path) -> dict[str, Any]:
        return json.loads((base / "whole" / self.name / "note.json").read_text())

    def is_begun(self, folder: Path, base: Path) -> bool:
        """Whether there is something to go on from, and something left to do."""
        begun = self.place and list((folder / OUTPUT).glob(self.place))
        return bool(begun) and json.loads(json.dumps(self.result(folder / OUTPUT))) != self.whole(base)

    def check_result(self, folder: Path, base: Path, category: str, when: str, but: Iterable[str] = ()) -> None:
        """Broken unless the output, but for such parts of it, is what it would be without any fault."""
        found, expected = json.loads(json.dumps(self.result(folder / OUTPUT))), self.whole(base)
        found, expected = ({k: v for k, v in part.items() if k not in but} for part in (found, expected))
        if found != expected:
            raise Broken(category, f"another result {when}: {', '.join(differences(found, expected))}")

    def check_published(self, folder: Path, base: Path, when: str) -> None:
        """Broken where an interrupted output passes for a whole one, and is none."""
        if self.published and (folder / OUTPUT / self.published).exists():
            found, expected = self.result(folder / OUTPUT), self.whole(base)
            # What is written after the file that says so may be missing, but never be another.
            for name in digest(folder / OUTPUT, self.published, "*.safetensors", "*.bin"):
                if name in found and found[name] != expected.get(name):
                    raise Broken(SILENT, f"{when}: {name} stands there as if it were whole")


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    def same(a: Any, b: Any) -> bool:
        return a == b or (isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b))

    names = sorted(found.keys() | expected.keys())
    different = [name for name in names if not same(found.get(name), expected.get(name))]
    return [f"{name} is {str(found.get(name))[:80]}, not {str(expected.get(name))[:80]}" for name in different[:3]]


OUT = ["--output", OUTPUT]
CHECKPOINTS = "checkpoints/step-*[0-9]"
PREPARE_ARGUMENTS = ["prepare", "text", "--source", "novels", "--tokenizer", "bytes", "--validation-share", 0.2, *OUT]

PREPARE = Job(
    "prepare",
    ("novels", "bytes"),
    PREPARE_ARGUMENTS,
    token_files,
    published="train.json",
    place="prepare.json.partial",
    before=small_pieces,
)
TRAIN = Job(
    "train",
    ("tokens", "bytes"),
    [*workplace.TRAIN, *OUT],
    run_files,
    again=["--resume"],
    published="config.json",
    place=CHECKPOINTS,
)
FINETUNE = Job(
    "finetune",
    ("novels", "llama"),
    [*workplace.FINETUNE, *OUT],
    run_files,
    again=["--resume"],
    published="config.json",
    place=CHECKPOINTS,
    before=small_pieces,
)
ADAPTERS = Job(
    "finetune, adapters",
    ("novels", "llama"),
    [*workplace.FINETUNE, *workplace.ADAPTERS, *OUT],
    run_files,
    again=["--resume"],
    before=small_pieces,
)
MERGED = Job(
    "finetune, merged",
    ("novels", "llama"),
    [*workplace.FINETUNE, *workplace.ADAPTERS, "--merge", *OUT],
    run_files,
    again=["--resume"],
    before=small_pieces,
)
MAKE = Job(
    "weight-diff make", ("raw", "tuned"), [*workplace.MAKE, "--path-diff", OUTPUT], directory, published="config.json"
)
RECOVER = Job(
    "weight-diff recover",
    ("raw", "diff"),
    [*workplace.RECOVER, "--path-tuned", OUTPUT],
    directory,
    published="config.json",
)
STUDY = Job(
    "study", ("gpt", "gpt-baseline", "tokens", "study.yaml"), [*workplace.STUDY, *OUT], tables, place="rows.jsonl"
)

JOBS = (PREPARE, TRAIN, FINETUNE, ADAPTERS, MERGED, MAKE, RECOVER, STUDY)
