"""Disks that are full, become full, or cannot be written to: exit code 1, the path named, nothing half-published.

With room again, the same command ends in the result it would have had.
"""

from __future__ import annotations

from functools import partial

from tests.faults import jobs, workplace
from tests.faults.forks import command
from tests.faults.harness import LOST, Kind, Trial, check_done, check_limits, check_refused
from tests.faults.jobs import JOBS, OUTPUT, Job
from tests.faults.moments import Changes
from tests.faults.small_disk import SmallDisk, with_small_disk

GENERATE = ["generate", "--model", "gpt", "--prompt", "the 3 cats", "--max-new-tokens", 4, "--temperature", 0]
PERPLEXITY = ["eval", "perplexity", "--model", "gpt", "--data", "tokens", "--sample-tokens", 200]
PASSKEY = ["eval", "passkey", "--model", "gpt", "--lengths", 500, "--prompts", 1]
CPU = ["--device", "cpu"]
DATA, PICTURE, BESIDE = f"{OUTPUT}/data.json", f"{OUTPUT}/picture.png", f"{OUTPUT}.json"

# What writes single files where it is told to, besides the jobs that write a directory.
SINKS = (
    Job("generate --json", ("gpt",), [*GENERATE, *CPU, "--json", DATA], jobs.directory),
    Job("generate --trace", ("gpt",), [*GENERATE, *CPU, "--trace", DATA], jobs.directory),
    Job("eval perplexity --json", ("gpt", "tokens"), [*PERPLEXITY, *CPU, "--json", DATA], jobs.directory),
    Job("eval passkey --json", ("gpt",), [*PASSKEY, *CPU, "--json", DATA], jobs.directory),
    Job("eval passkey --plot", ("gpt",), [*PASSKEY, *CPU, "--plot", PICTURE], jobs.directory),
    Job("prepare --json", jobs.PREPARE.reads, [*jobs.PREPARE.arguments, "--json", BESIDE], jobs.token_files),
    Job("eval study --json", jobs.STUDY.reads, [*jobs.STUDY.arguments, "--json", DATA], jobs.directory),
)


def full(job: Job, trial: Trial) -> int:
    """A disk with too little room from the start, or one that becomes full at a seeded change."""

    def on(disk: SmallDisk) -> None:
        workplace.link(trial.base, disk.path, *job.reads)
        if trial.random.random() < 0.4:
            disk.leave(int(trial.random.uniform(0, 1) * job.size(trial.base)))
            ended = job.run(disk.path)
        else:
            changes = Changes(disk.path)
            at = trial.random.randint(1, job.length(trial.base).changes)
            ended = job.run(disk.path, before=partial(changes.watch, at, then=disk.fill))
        check_limits(ended)
        if ended.code == 0:
            # There was room enough, or nothing more to write.
            job.check_result(disk.path, trial.base, LOST, "on a small disk")
            return
        check_refused(ended, OUTPUT, str(disk.path))
        job.check_published(disk.path, trial.base, "on a full disk")
        disk.give_room()
        finish(job, disk, trial)

    return with_small_disk(trial.work, on)


def read_only(job: Job, trial: Trial) -> int:
    """A target on a disk that nobody may write to."""

    def on(disk: SmallDisk) -> None:
        workplace.link(trial.base, disk.path, *job.reads)
        disk.make_read_only()
        check_refused(job.run(disk.path), OUTPUT, str(disk.path))
        disk.make_writable()
        finish(job, disk, trial)

    return with_small_disk(trial.work, on)


def in_the_way(job: Job, trial: Trial) -> None:
    """A file where the command needs a folder, and a folder above it that is a file."""
    workplace.link(trial.base, trial.work, *job.reads)
    (trial.work / OUTPUT).write_text("a file of the user's\n")
    check_refused(job.run(trial.work), OUTPUT, codes=(1, 2))
    assert (trial.work / OUTPUT).read_text() == "a file of the user's\n"


def full_output(arguments: list, trial: Trial) -> None:
    """Results that standard output does not take."""
    workplace.link(trial.base, trial.work)
    check_refused(command(arguments, trial.work, stdout="/dev/full"), "standard output")


def finish(job: Job, disk: SmallDisk, trial: Trial) -> None:
    # An output directory that was never made is as good as one that is gone on with.
    check_done(job.run(disk.path, *job.again))
    job.check_result(disk.path, trial.base, LOST, "when there was room again")


AGAIN = "with room again, the same command ends in the same bits"
FULL = f"a disk that is full, or becomes full at any moment: refused by name, nothing half-published; {AGAIN}"
READ_ONLY = f"a target that nobody may write to: refused by name; {AGAIN}"
OUTPUT_FULL = "standard output that takes nothing: said, and exit code 1"
FILE = "a file of the user's where a folder is needed: refused by name and left alone"


def kinds_of(job: Job, many: int) -> list[Kind]:
    return [
        Kind(f"disks.full, {job.name}", FULL, many, 1, partial(full, job), setup=job.setup),
        Kind(f"disks.read-only, {job.name}", READ_ONLY, 1, 1, partial(read_only, job), setup=job.setup),
        Kind(f"disks.file, {job.name}", FILE, 1, 0, partial(in_the_way, job)),
    ]


PRINTING = {
    "help": ["--help"],
    "help of a command": ["train", "--help"],
    "version": ["--version"],
    "prepare": jobs.PREPARE.arguments,
    "generate": [*GENERATE, *CPU],
    "generate --json -": [*GENERATE, *CPU, "--json", "-"],
    "eval perplexity": [*PERPLEXITY, *CPU],
    "eval passkey": [*PASSKEY, *CPU],
    "study": jobs.STUDY.arguments,
    "train --dry-run": [*workplace.TRAIN, "--dry-run"],
}
KINDS = [
    *(kind for job in JOBS for kind in kinds_of(job, 24)),
    *(kind for job in SINKS for kind in kinds_of(job, 4)),
    *(
        Kind(f"disks.standard output, {name}", OUTPUT_FULL, 1, int(name == "generate"), partial(full_output, arguments))
        for name, arguments in PRINTING.items()
    ),
]
