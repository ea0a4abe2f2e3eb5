"""SIGTERM and SIGINT at seeded moments: the place is kept, the way on is told, the exit code is 143 or 130.

The same command again ends in the bits of a run that nobody stopped. A second signal stops at once.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from functools import partial

from tests.faults import workplace
from tests.faults.forks import Ended, Fork, command
from tests.faults.harness import LOST, UNCLEAR, Broken, Kind, Trial, check_done, check_limits, last_line
from tests.faults.jobs import FINETUNE, JOBS, OUTPUT, PREPARE, STUDY, TRAIN, Job
from tests.faults.moments import Changes, Moment

NUMBERS = (signal.SIGTERM, signal.SIGINT)
# From the second signal to the end of the process, on a machine that is busy.
AT_ONCE = 5.0
# Those that keep a place to go on from say so.
PLACES = (PREPARE, TRAIN, FINETUNE, STUDY)


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
        check_stopped(ended, number, changes, when, job in PLACES)
        job.check_published(trial.work, trial.base, when)
        check_done(job.run(trial.work, *job.again))
    job.check_result(trial.work, trial.base, LOST, f"after {when}")


def check_stopped(ended: Ended, number: signal.Signals, changes: Changes, when: str, says_how: bool) -> None:
    if ended.code == -number and not changes.count:
        # Before the command itself had begun.
        return
    check_limits(ended)
    if ended.code != 128 + number:
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
        if ended.code not in {128 + first, 128 + second}:
            check_limits(ended)
            raise Broken(UNCLEAR, f"exit code {ended.code} after {when}: {last_line(ended.err)}")
        check_done(job.run(trial.work, *job.again))
    job.check_result(trial.work, trial.base, LOST, f"after {when}")


GENERATE = ["generate", "--model", "gpt", "--prompt", "the 3 cats", "--max-new-tokens", 100_000, "--device", "cpu"]


def generating(trial: Trial) -> None:
    """A command that keeps nothing ends by the same exit codes."""
    workplace.link(trial.base, trial.work, "gpt")
    number = trial.random.choice(NUMBERS)
    ended = Fork(_generate, trial.work).start().wait([(trial.random.uniform(0.3, 1.5), number)])
    check_limits(ended)
    if ended.code != 128 + number:
        raise Broken(UNCLEAR, f"exit code {ended.code} after {number.name}: {last_line(ended.err)}")


def _generate() -> None:
    from tests.faults.forks import landmark

    landmark(*GENERATE)()


def launched(trial: Trial) -> None:
    """Two processes of torchrun: all of them finish the step, one checkpoint is saved, and the run goes on exactly."""
    workplace.link(trial.base, trial.work, *TRAIN.reads)
    number = trial.random.choice(NUMBERS)
    # Enough steps that a signal can come in their midst.
    more = ["--steps", 60, "--save-every", 0, "--eval-every", 0]
    arguments = [*TRAIN.arguments, *more]
    fork = Fork(partial(_torchrun, arguments), trial.work, most_seconds=120).start()
    metrics = trial.work / OUTPUT / "metrics.jsonl"
    wanted = trial.random.randint(1, 20)
    while fork.alive(0.05) and (not metrics.exists() or metrics.read_text().count("\n") < wanted):
        pass
    fork.signal(number)
    ended = fork.wait()
    if ended.err.count("Traceback") or ended.over:
        raise Broken(UNCLEAR, f"{ended.over or 'a traceback'} after {number.name}: {last_line(ended.err)}")
    if ended.code == 0:
        raise Broken(UNCLEAR, f"exit code 0 after {number.name}")
    if not list((trial.work / OUTPUT / "checkpoints").glob("step-*[0-9]")):
        raise Broken(LOST, f"no checkpoint after {number.name}: {last_line(ended.err)}")
    check_done(Fork(partial(_torchrun, [*arguments, "--resume"]), trial.work, most_seconds=120).start().wait())
    # One process reads what two wrote, and a run of two processes is one of one with twice the rows.
    alone = command(
        [*workplace.TRAIN, *more, "--batch-size", 4, "--output", "alone", "--dropout", 0], trial.work, most_seconds=60
    )
    check_done(alone)


def _torchrun(arguments: list[object]) -> None:
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "-m", "landmark_cli"]
    os.execv(sys.executable, [*run, *map(str, arguments)])


STOPPED = "SIGTERM or SIGINT at any moment: exit code 143 or 130, the way on told; run again, the same bits"
TWICE = "a second signal stops at once; run again, the same bits"
KINDS = [
    *(Kind(f"signals.{job.name}", STOPPED, 20, 1, partial(stopped, job), setup=job.setup) for job in JOBS),
    *(Kind(f"signals.twice, {job.name}", TWICE, 8, 1, partial(twice, job), setup=job.setup) for job in PLACES),
    Kind("signals.generate", "SIGTERM or SIGINT to generate: exit code 143 or 130", 10, 1, generating),
]
