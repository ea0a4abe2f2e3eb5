"""One byte flipped in every file that a command reads again: it is noticed, or it makes no difference.

The byte is written as any program writes, so the file's time changes. Each trial flips one byte in one file that a
command has written and is about to read again, and runs that command: it refuses and names the file, or it ends in the
same bits.
"""

from __future__ import annotations

import random
import shutil
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.faults import jobs, workplace
from tests.faults.harness import SILENT, Broken, Kind, Trial, check_limits, check_refused
from tests.faults.jobs import OUTPUT, Job
from tests.faults.moments import Changes

# Of a checkpoint, what makes a difference whichever byte it is; between checksums there are spaces, too.
CHECKED = ("model.safetensors", "optimizer.bin", "random_states_0.pkl", "training.json")
CHECKPOINT = (f"{OUTPUT}/checkpoints/step-*[0-9]/*",)


@dataclass(frozen=True)
class Flip:
    """A job that is stopped half-way, has one of its files flipped, and is run again.

    at: before which share of its changes it is stopped; None where nothing is stopped and `reads` are flipped.
    files: which to flip, as patterns below the folder; of checkpoints, the newest one's. names: what an error may name
    in place of the file.
    """

    name: str
    job: Job
    files: Sequence[str]
    at: float | None = None
    names: Sequence[str] = ()
    full: int = 60
    quick: int = 2
    refuse: Sequence[int] = (1,)

    @property
    def folder(self) -> str:
        return f"half/{self.name}"

    def setup(self, base: Path) -> None:
        self.job.setup(base)
        half = base / self.folder
        if half.exists():
            return
        half.mkdir(parents=True)
        if self.at is None:
            workplace.copy(base, half, *self.job.reads)
            return
        workplace.link(base, half, *self.job.reads)
        stop_at = max(1, int(self.at * self.job.length(base).changes))
        ended = self.job.run(half, before=partial(Changes(half).watch, stop_at, signal.SIGKILL))
        assert ended.killed, ended

    def run(self, trial: Trial) -> None:
        folder = trial.work / "it"
        shutil.copytree(trial.base / self.folder, folder, symlinks=True)
        files = sorted({path for pattern in self.files for path in folder.glob(pattern)})
        if self.files == CHECKPOINT:
            files = [path for path in files if path.parent == files[-1].parent]
        file = trial.random.choice(files)
        flip(file, trial.random)
        again = self.job.again if self.at is not None else ()
        ended = self.job.run(folder, *again)
        check_limits(ended)
        if ended.code == 0:
            self.job.check_result(folder, trial.base, SILENT, f"with a byte of {file.relative_to(folder)} flipped")
            if self.files == CHECKPOINT and file.name in CHECKED and file.name not in ended.err:
                raise Broken(SILENT, f"{file.name} of the newest checkpoint is damaged, and nobody said so")
        else:
            check_refused(ended, file.name, *self.names, codes=self.refuse)


def flip(file: Path, chance: random.Random) -> None:
    """Flip some bits of one byte of a file."""
    data = bytearray(file.read_bytes())
    place = chance.randrange(len(data))
    data[place] ^= chance.choice((1, 2, 4, 8, 16, 32, 64, 128, 255))
    file.write_bytes(data)


# A corpus that is opened, and how far a run on it comes.
OPENED = ("tokens/*.bin", "tokens/*.json")
FLIPS = [
    Flip("an interrupted prepare", jobs.PREPARE, [f"{OUTPUT}/*.partial"], at=0.6),
    Flip("token files of a training run", jobs.TRAIN, OPENED, names=["tokens/"]),
    Flip("token files of a study", jobs.STUDY, ["tokens/validation.*"], names=["tokens/"], full=40),
    Flip("checkpoints of train", jobs.TRAIN, CHECKPOINT, at=0.75, names=["checkpoints/step-"], full=120),
    Flip("recipe of a run that is resumed", jobs.TRAIN, [f"{OUTPUT}/recipe.yaml"], at=0.75, refuse=[1, 2]),
    Flip("checkpoints of finetune", jobs.FINETUNE, CHECKPOINT, at=0.8, names=["checkpoints/step-"], quick=1),
    Flip("checkpoints of adapters", jobs.ADAPTERS, CHECKPOINT, at=0.8, names=["checkpoints/step-"], quick=1),
    Flip("token files of a finetuning", jobs.FINETUNE, [f"{OUTPUT}/data/*/*.*"], at=0.8, names=["data/"], full=40),
    Flip("finished rows of a study", jobs.STUDY, [f"{OUTPUT}/rows.jsonl"], at=0.8),
    Flip("a weight difference", jobs.RECOVER, ["diff/*.*", "diff/tuned/*"], names=["diff"], full=120),
    Flip("raw weights", jobs.RECOVER, ["raw/*.safetensors"], names=["raw"], full=40),
]

KINDS = [
    Kind(
        f"flips.{one.name}",
        f"one byte flipped: {one.name}",
        full=one.full,
        quick=one.quick,
        run=one.run,
        setup=one.setup,
    )
    for one in FLIPS
]
