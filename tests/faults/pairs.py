"""Two runs of one command at the same time: one of them does the work, the other says so and touches nothing."""

from __future__ import annotations

import time
from functools import partial

from tests.faults import workplace
from tests.faults.forks import Ended, begin
from tests.faults.harness import LOST, SILENT, UNCLEAR, Broken, Kind, Trial, check_done, check_limits, check_refused
from tests.faults.jobs import JOBS, OUTPUT, PREPARE, TRAIN, Job, run_files

# What a command that finds the work already done may end with: token files are kept, other directories not replaced.
REFUSALS = (1, 2)


def at_once(job: Job, trial: Trial) -> None:
    """The same command twice, the second one begun at a seeded moment of the first."""
    workplace.link(trial.base, trial.work, *job.reads)
    first = job.start(trial.work, log=trial.work / "first")
    pause(first, trial, job)
    second = job.start(trial.work, log=trial.work / "second")
    check_one_did_it([first.wait(), second.wait()], job, trial)


def resumed_beside(job: Job, trial: Trial) -> None:
    """A run resumed while it is running."""
    workplace.link(trial.base, trial.work, *job.reads)
    first = job.start(trial.work, log=trial.work / "first")
    pause(first, trial, job)
    second = job.start(trial.work, *job.again, log=trial.work / "second")
    check_one_did_it([first.wait(), second.wait()], job, trial)


def pause(first, trial: Trial, job: Job) -> None:
    """Wait for some part of the time that the first one takes."""
    first.alive(trial.random.uniform(0, job.length(trial.base).seconds))


def check_one_did_it(ended: list[Ended], job: Job, trial: Trial) -> None:
    for one in ended:
        check_limits(one)
    done = [one for one in ended if one.code == 0]
    if not done:
        raise Broken(LOST, f"neither did it: {ended[0].err[-200:]} / {ended[1].err[-200:]}")
    for one in ended:
        if one.code != 0:
            check_refused(one, OUTPUT, codes=REFUSALS)
    job.check_result(trial.work, trial.base, SILENT, f"of two at once (exit codes {[one.code for one in ended]})")


def without_output(trial: Trial) -> None:
    """Two launches without --output: each gets a directory of its own."""
    workplace.link(trial.base, trial.work, *TRAIN.reads)
    arguments = workplace.TRAIN
    first = begin(arguments, trial.work, log=trial.work / "first")
    time.sleep(trial.random.choice((0.0, 0.0, trial.random.uniform(0, 0.2))))
    second = begin(arguments, trial.work, log=trial.work / "second")
    for one in (first.wait(), second.wait()):
        check_done(one)
    found = [run_files(path) for path in sorted((trial.work / "runs").iterdir())]
    if len(found) != 2:
        raise Broken(SILENT, f"two runs made {len(found)} directories")
    if found[0] != found[1]:
        raise Broken(SILENT, "two equal runs ended in different files")


def two_prepared(trial: Trial) -> None:
    """Two corpora prepared into one directory at once: never a mixture."""
    workplace.link(trial.base, trial.work, *PREPARE.reads)
    first = PREPARE.start(trial.work, log=trial.work / "first")
    pause(first, trial, PREPARE)
    second = PREPARE.start(trial.work, "--max-documents", 20, log=trial.work / "second")
    ended = [first.wait(), second.wait()]
    for one in ended:
        check_limits(one)
        if one.code != 0:
            check_refused(one, OUTPUT)
    if ended[1].code != 0:
        PREPARE.check_result(trial.work, trial.base, SILENT, "of two corpora at once")
    elif ended[0].code != 0 and PREPARE.result(trial.work / OUTPUT)["train.json"]["documents"] >= 20:
        raise Broken(UNCLEAR, "the second one's result is not its own")


SAME = "the same command twice at once: one does it, the other is refused by name"
RESUMED = "a run resumed while it is running: refused by name, the run goes on undisturbed"
KINDS = [
    *(Kind(f"pairs.{job.name}", SAME, 12, 1, partial(at_once, job), setup=job.setup) for job in JOBS),
    *(
        Kind(f"pairs.resumed {job.name}", RESUMED, 12, 1, partial(resumed_beside, job), setup=job.setup)
        for job in JOBS
        if job.again
    ),
    Kind(
        "pairs.without --output",
        "two launches without --output at once: two directories, two whole runs",
        20,
        2,
        without_output,
    ),
    Kind(
        "pairs.two corpora",
        "two corpora prepared into one directory at once: one is refused, never a mixture",
        20,
        1,
        two_prepared,
        setup=PREPARE.setup,
    ),
]
