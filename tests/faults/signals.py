"""SIGTERM and SIGINT at seeded moments: the place is kept, the way on is told, the exit code is 143 or 130.

The same command again ends in the bits of a run that nobody stopped. A second signal stops at once.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

from tests.faults import workplace
from tests.faults.forks import Ended, Fork, begin
from tests.faults.harness import LOST, UNCAUGHT, UNCLEAR, Broken, Kind, Trial, check_finished, check_limits, last_line
from tests.faults.jobs import FINETUNE, JOBS, OUTPUT, PREPARE, STUDY, TRAIN, Job, differences, run_files
from tests.faults.moments import Changes, Moment

NUMBERS = (signal.SIGTERM, signal.SIGINT)
# From the second signal to the end of the process, on a machine that is busy.
AT_ONCE = 5.0
# Those that keep a place to go on from.
PLACES = (PREPARE, TRAIN, FINETUNE, STUDY)
# A run that was stopped has one checkpoint more, which may be one of those that are kept in the end.
EXTRA = ("kept",)


def stopped(job: Job, trial: Trial) -> None:
    """One signal at a seeded moment, then the same command again."""
    workplace.link(trial.base, trial.work, *job.reads)
    number = trial.random.choice(NUMBERS)
    moment = Moment.choose(trial.random, job.length(trial.base))
    changes = Changes(trial.work)
    ended = job.run(
        trial.work,
        before=partial(changes.watch, moment.change, number),
        signals=[(moment.seconds, number)] if moment.seconds else [],
    )
    when = f"{number.name} {moment} ({changes.last})"
    if ended.code != 0:
        check_stopped(ended, number, when, job.is_begun(trial.work, trial.base))
        job.check_published(trial.work, trial.base, when)
        check_finished(job.run(trial.work, *job.again))
    job.check_result(trial.work, trial.base, LOST, f"after {when}", but=EXTRA)


def check_stopped(ended: Ended, number: signal.Signals, when: str, says_how: bool) -> None:
    check_limits(ended)
    # At a command's very end, when it hears no signals any more, one does what it does to any program, which a shell
    # knows by the same number.
    if ended.code not in {128 + number, -number}:
        raise Broken(UNCLEAR, f"exit code {ended.code} after {when}: {last_line(ended.err)}")
    if not ended.err.strip():
        raise Broken(UNCLEAR, f"not a word after {when}")
    if says_how and "go on" not in ended.err and "again" not in ended.err:
        raise Broken(UNCLEAR, f"does not say how to go on, after {when}: {last_line(ended.err)}")


def twice(job: Job, trial: Trial) -> None:
    """A second signal right behind the first: the command ends at once, and goes on as after a kill."""
    workplace.link(trial.base, trial.work, *job.reads)
    first, second = trial.random.choice(NUMBERS), trial.random.choice(NUMBERS)
    changes = Changes(trial.work)
    moment = Moment(change=trial.random.randint(1, job.length(trial.base).changes))
    fork = job.start(trial.work, before=partial(changes.watch, moment.change, first))
    while fork.alive(0.002) and changes.count < moment.change:
        pass
    fork.alive(trial.random.choice((0.0, 0.02, 0.1)))
    sent = time.monotonic()
    fork.signal(second)
    ended = fork.wait()
    if time.monotonic() - sent > AT_ONCE:
        raise Broken(UNCLEAR, f"ended {time.monotonic() - sent:.1f} s after the second signal")
    when = f"{first.name} {moment}, then {second.name} ({changes.last})"
    if ended.code != 0:
        # While the command says its last words the second signal does what it does to any program: it ends it, which a
        # shell knows by the same number.
        if ended.code not in {128 + first, 128 + second, -second}:
            check_limits(ended)
            raise Broken(UNCLEAR, f"exit code {ended.code} after {when}: {last_line(ended.err)}")
        check_finished(job.run(trial.work, *job.again))
    job.check_result(trial.work, trial.base, LOST, f"after {when}", but=EXTRA)


GENERATE = ["generate", "--model", "gpt", "--prompt", "the 3 cats", "--max-new-tokens", 100_000, "--device", "cpu"]


def generating(trial: Trial) -> None:
    """A command that keeps nothing ends by the same exit codes."""
    workplace.link(trial.base, trial.work, "gpt")
    number = trial.random.choice(NUMBERS)
    ended = begin(GENERATE, trial.work).wait([(trial.random.uniform(0.3, 1.5), number)])
    check_limits(ended)
    if ended.code != 128 + number:
        raise Broken(UNCLEAR, f"exit code {ended.code} after {number.name}: {last_line(ended.err)}")


# Enough steps that a signal can come in their midst.
LAUNCHED = [*TRAIN.arguments, "--steps", 40, "--save-every", 0, "--eval-every", 0]
LAUNCH_SECONDS = 120.0


def torchrun(folder: Path, *more: str) -> Fork:
    """Begin a run of two processes under torchrun."""
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m", "landmark_cli"]
    arguments = [*run, *map(str, LAUNCHED), *more]
    paths = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    call = partial(os.execv, sys.executable, arguments)
    return Fork(call, folder, environment=paths, most_seconds=LAUNCH_SECONDS).start()


def launch_whole(base: Path) -> None:
    """Once: what a launched run ends in that nobody stops."""
    folder = base / "whole" / "launched"
    folder.mkdir(parents=True, exist_ok=True)
    workplace.link(base, folder, *TRAIN.reads)
    ended = torchrun(folder).wait()
    assert ended.code == 0, ended.err


def launched(trial: Trial) -> None:
    """torchrun stopped in the midst of a run of two processes, which then goes on."""
    workplace.link(trial.base, trial.work, *TRAIN.reads)
    number, wanted = trial.random.choice(NUMBERS), trial.random.randint(1, 30)
    fork = torchrun(trial.work)
    metrics = trial.work / OUTPUT / "metrics.jsonl"
    while fork.alive(0.01) and (not metrics.exists() or metrics.read_text().count("\n") < wanted):
        pass
    fork.signal(number)
    ended = fork.wait()
    when = f"{number.name} at step {wanted}"
    # torchrun shows how it ends itself; our processes must not.
    if ended.over or "landmark_cli/" in ended.err and "Traceback" in ended.err:
        raise Broken(UNCAUGHT, f"{ended.over or 'a traceback of ours'} after {when}: {last_line(ended.err)}")
    if ended.err.count("--resume") != 1:
        raise Broken(
            UNCLEAR, f"told {ended.err.count('--resume')} times how to go on, after {when}: {ended.err[-300:]}"
        )
    if ended.code == 0 or not list((trial.work / OUTPUT / "checkpoints").glob("step-*[0-9]")):
        raise Broken(LOST, f"exit code {ended.code}, and no checkpoint after {when}: {last_line(ended.err)}")
    ended = torchrun(trial.work, "--resume").wait()
    if ended.code != 0:
        raise Broken(LOST, f"exit code {ended.code} of --resume after {when}: {ended.err[-3000:]}")
    found, whole = (run_files(place / OUTPUT) for place in (trial.work, trial.base / "whole" / "launched"))
    for name in (*EXTRA, "newest"):
        del found[name], whole[name]
    if found != whole:
        raise Broken(LOST, f"another result after {when}: {', '.join(differences(found, whole))}")


STOPPED = "SIGTERM or SIGINT at any moment: exit code 143 or 130, the way on told; run again, the same bits"
LAUNCHED_PROMISE = "SIGTERM or SIGINT saves one checkpoint, told once; --resume ends in the same bits"
TWICE = "a second signal stops at once; run again, the same bits"
KINDS = [
    *(Kind(f"signals.{job.name}", STOPPED, 20, 1, partial(stopped, job), setup=job.setup) for job in JOBS),
    *(Kind(f"signals.twice, {job.name}", TWICE, 8, 1, partial(twice, job), setup=job.setup) for job in PLACES),
    Kind("signals.generate", "SIGTERM or SIGINT to generate: exit code 143 or 130", 10, 1, generating),
    Kind("signals.torchrun", f"two processes under torchrun: {LAUNCHED_PROMISE}", 6, 0, launched, setup=launch_whole),
]
