"""SIGKILL at a seeded moment, then the same command again: the result is that of a run that nobody killed."""

from __future__ import annotations

import os
import signal
from functools import partial

from tests.faults import workplace
from tests.faults.forks import Fork, landmark
from tests.faults.harness import LOST, Kind, Trial, check_done, check_finished
from tests.faults.jobs import JOBS, OUTPUT, PREPARE, Job
from tests.faults.moments import Changes, Moment

# How often one trial kills before it lets the command end.
KILLS = (1, 1, 1, 1, 2, 2, 3)


def killed(job: Job, trial: Trial) -> int:
    """Kill a job up to three times and run it to its end; returns the number of kills."""
    workplace.link(trial.base, trial.work, *job.reads)
    length, moments = job.length(trial.base), []
    for _ in range(trial.random.choice(KILLS)):
        moment = Moment.choose(trial.random, length)
        changes = Changes(trial.work)
        ended = job.run(
            trial.work,
            *(job.again if moments else ()),
            before=partial(changes.watch, moment.change),
            signals=[(moment.seconds, signal.SIGKILL)] if moment.seconds else [],
        )
        if not ended.killed:
            # It came to its end before: then that is the result.
            check_finished(ended)
            break
        moments.append(f"{moment} ({changes.last})")
        job.check_published(trial.work, trial.base, f"killed {', then '.join(moments)}")
    else:
        check_finished(job.run(trial.work, *job.again))
    job.check_result(trial.work, trial.base, LOST, f"after kills {', then '.join(moments) or 'that came too late'}")
    return len(moments)


def killed_processes(trial: Trial) -> int:
    """The same for prepare in two processes, both killed as a launcher does."""
    job = PREPARE
    workplace.link(trial.base, trial.work, *job.reads)
    moment = Moment.choose(trial.random, job.length(trial.base))
    for last in (False, True):
        changes = Changes(trial.work)
        forks = []
        for rank in range(2):
            doomed_itself = not last and rank == moment.change % 2
            call = partial(_one_process, job, changes if doomed_itself else None, moment.change)
            environment = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
            forks.append(Fork(call, trial.work, environment=environment, log=trial.work / f"rank{rank}").start())
        if last:
            for ended in [fork.wait() for fork in forks]:
                check_done(ended)
            break
        doomed = forks[moment.change % 2]
        doomed.alive(moment.seconds or 5.0)
        for fork in forks:
            fork.signal(signal.SIGKILL)
        for fork in forks:
            fork.wait()
        job.check_published(trial.work, trial.base, f"killed {moment}")
    for file in (trial.work / OUTPUT).glob("lock*"):
        os.unlink(file)
    job.check_result(trial.work, trial.base, LOST, f"after a kill {moment} ({changes.last})")
    return 1


def _one_process(job: Job, changes: Changes | None, stop_at: int) -> None:
    job.before()
    if changes is not None:
        changes.watch(stop_at)
    landmark(*job.arguments)()


KINDS = [
    Kind(
        f"kills.{job.name}",
        f"{job.name}, killed at any moment and run again, ends in the same bits",
        full=full,
        quick=quick,
        run=partial(killed, job),
        setup=job.setup,
    )
    for job, full, quick in zip(JOBS, (40, 40, 30, 20, 30, 30, 30, 20), (2, 2, 1, 1, 1, 2, 2, 1), strict=True)
]
KINDS.append(
    Kind(
        "kills.prepare, two processes",
        "prepare in two processes, killed at any moment and run again, ends in the same bits",
        full=20,
        quick=1,
        run=killed_processes,
        setup=PREPARE.setup,
    )
)
