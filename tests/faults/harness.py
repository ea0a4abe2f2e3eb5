"""What a kind of trial is, and running many of them on several processors."""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
import os
import random
import select
import shutil
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.faults.forks import LONGEST_WAIT, MOST_BYTES, MOST_SECONDS, Ended, Fork, die_with_parent, read_usage

UNCAUGHT, SILENT, UNCLEAR, TIME, MEMORY, LOST = "uncaught", "silent", "unclear", "time", "memory", "lost"
CATEGORIES = {
    UNCAUGHT: "an error that nobody caught, or a crash",
    SILENT: "a wrong result without a word",
    UNCLEAR: "an error that does not name the file, or another exit code than promised",
    TIME: f"more than {MOST_SECONDS:.0f} s of processor time for one command or input, or a hang",
    MEMORY: f"more than {MOST_BYTES / 1e9:.0f} GB of memory",
    LOST: "work lost: the command run again did not end in the same result",
}
# How many inputs a fork reads before a fresh one takes over.
BATCH = 400
# The kinds that run, for the workers, which are forks of this process: what a kind calls need not be importable.
KNOWN: dict[str, Kind] = {}


class Broken(Exception):
    """A promise that was not kept: in which way, and what was seen."""

    def __init__(self, category: str, what: str) -> None:
        super().__init__(f"{category}: {what}")
        self.category, self.what = category, what


class NotHere(Exception):
    """The machine does not let this be tried: why."""


@dataclass
class Trial:
    """One trial. base: what all trials read and none writes. work: an empty folder of its own."""

    number: int
    random: random.Random
    base: Path
    work: Path


@dataclass(frozen=True)
class Kind:
    """Trials of one kind.

    name: "kills.prepare". promise: what must hold, in a line of the table. full, quick: how many trials.
    run: does one, and raises Broken. inputs: None, or makes what `run` gets in place of a folder, once for many trials,
    which are then done one after another in the same fork. setup: makes what all of them read, before the first.
    """

    name: str
    promise: str
    full: int
    quick: int
    run: Callable[..., int | None]
    inputs: Callable[[Path, Path], Any] | None = None
    setup: Callable[[Path], None] | None = None

    def random(self, seed: int, number: int) -> random.Random:
        digest = hashlib.sha256(f"{seed}/{self.name}/{number}".encode()).digest()
        return random.Random(int.from_bytes(digest[:8], "little"))


@dataclass
class Result:
    """What came of trials of a kind. done: how often the promise was tried; failures: (number, category, what)."""

    kind: Kind
    trials: int = 0
    failures: list[tuple[int, str, str]] = field(default_factory=list)
    not_here: str = ""
    seconds: float = 0.0


def run_kinds(
    kinds: Sequence[Kind],
    counts: Callable[[Kind], Sequence[int]],
    *,
    seed: int,
    base: Path,
    scratch: Path,
    jobs: int,
    tell: Callable[[str], None] = lambda message: None,
) -> list[Result]:
    """Do the trials with these numbers of every kind, `jobs` at a time."""
    by_name = {kind.name: Result(kind) for kind in kinds}
    for kind in kinds:
        if kind.setup is not None and counts(kind):
            kind.setup(base)
    tasks = [
        (kind.name, numbers, seed, base, scratch)
        for kind in kinds
        for numbers in split(counts(kind), BATCH if kind.inputs else max(1, len(counts(kind)) // (4 * jobs)))
    ]
    KNOWN.update((kind.name, kind) for kind in kinds)
    workers = ProcessPoolExecutor(jobs, multiprocessing.get_context("fork"), initializer=die_with_parent)
    try:
        for one in as_completed([workers.submit(do, task) for task in tasks]):
            name, done, failures, not_here, seconds = one.result()
            result = by_name[name]
            result.trials += done
            result.failures += failures
            result.not_here = result.not_here or not_here
            result.seconds += seconds
            for number, category, what in failures:
                tell(f"{name}, trial {number}: {category}: {what}")
            tell(f"{name}: {result.trials} done, {len(result.failures)} failed")
    except KeyboardInterrupt:
        tell("stopped: the table is of what was done until now")
        for worker in multiprocessing.active_children():
            worker.kill()
    finally:
        workers.shutdown(wait=False, cancel_futures=True)
    for result in by_name.values():
        result.failures.sort()
    return list(by_name.values())


def split(numbers: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (numbers[start : start + size] for start in range(0, len(numbers), size))


def do(task: tuple[str, Sequence[int], int, Path, Path]) -> tuple[str, int, list[tuple[int, str, str]], str, float]:
    """Trials of one kind, one after another, in a worker process."""
    name, numbers, seed, base, scratch = task
    kind = KNOWN[name]
    started = time.monotonic()
    if kind.inputs is not None:
        done, failures, not_here = do_inputs(kind, numbers, seed, base, scratch)
    else:
        done, failures, not_here = do_trials(kind, numbers, seed, base, scratch)
    return kind.name, done, failures, not_here, time.monotonic() - started


def do_trials(kind: Kind, numbers: Iterable[int], seed: int, base: Path, scratch: Path):
    done, failures, not_here = 0, [], ""
    for number in numbers:
        work = scratch / f"{kind.name}-{number}"
        shutil.rmtree(work, ignore_errors=True)
        (work / "at").mkdir(parents=True)
        try:
            done += kind.run(Trial(number, kind.random(seed, number), base, work / "at")) or 1
        except Broken as broken:
            done += 1
            failures.append((number, broken.category, broken.what))
        except NotHere as error:
            not_here = str(error)
        except Exception:
            # The trial itself is at fault; that must not pass for a promise that held.
            failures.append((number, UNCAUGHT, f"the trial itself: {traceback.format_exc()}"))
        shutil.rmtree(work, ignore_errors=True)
    return done, failures, not_here


def do_inputs(kind: Kind, numbers: Sequence[int], seed: int, base: Path, scratch: Path):
    """Inputs that one fork reads after another; a new one goes on behind an input that ended or overcharged it."""
    failures: list[tuple[int, str, str]] = []
    left = list(numbers)
    while left:
        work = scratch / f"{kind.name}-{left[0]}-{os.getpid()}"
        shutil.rmtree(work, ignore_errors=True)
        (work / "at").mkdir(parents=True)
        told, failed = read_inputs(kind, left, seed, base, work)
        failures += failed
        left = left[told:]
        shutil.rmtree(work, ignore_errors=True)
    return len(numbers), failures, ""


def read_inputs(kind: Kind, numbers: Sequence[int], seed: int, base: Path, work: Path):
    """(how many inputs were dealt with, failures) of one fork."""
    reading, writing = os.pipe()

    def child() -> None:
        os.close(reading)
        with open(writing, "w", buffering=1) as pipe:

            def say(**what: Any) -> None:
                pipe.write(json.dumps(what) + "\n")

            made = kind.inputs(base, work / "at")
            for number in numbers:
                before = read_usage(os.getpid())[0]
                say(at=number)
                found = judge(kind, made, kind.random(seed, number))
                seconds, resident = read_usage(os.getpid())
                if found is None and seconds - before > MOST_SECONDS:
                    found = (TIME, f"{seconds - before:.1f} s")
                say(done=number, found=found)
                if resident > MOST_BYTES / 2:
                    # Libraries that keep what they opened must not charge it to the next input.
                    break

    fork = Fork(child, work / "at", most_seconds=float("inf")).start()
    os.close(writing)
    told, failures = follow(fork, reading, numbers)
    return told, failures


def judge(kind: Kind, made: Any, chance: random.Random) -> tuple[str, str] | None:
    try:
        kind.run(made, chance)
    except Broken as broken:
        return broken.category, broken.what
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        first = next(iter(str(error).splitlines()), "")[:200]
        return UNCAUGHT, f"{type(error).__name__}: {first} ({Path(where.filename).name}:{where.lineno})"
    return None


def follow(fork: Fork, reading: int, numbers: Sequence[int]):
    """Hear a fork through its inputs, and end it at one that takes too much."""
    told, failures, at = 0, [], None
    charged, since, over = 0.0, time.monotonic(), None
    waiting = b""
    while True:
        ready = select.select([reading], [], [], 0.1)[0]
        if ready:
            data = os.read(reading, 1 << 16)
            if not data:
                break
            *lines, waiting = (waiting + data).split(b"\n")
            for line in map(json.loads, lines):
                if "at" in line:
                    at = line["at"]
                    charged, since = (read_usage(fork.pid) or (charged, 0))[0], time.monotonic()
                else:
                    at, told = None, told + 1
                    if line["found"]:
                        failures.append((line["done"], *line["found"]))
            continue
        usage = read_usage(fork.pid)
        if usage and over is None and at is not None:
            if usage[1] > MOST_BYTES:
                over = MEMORY
            elif usage[0] - charged > MOST_SECONDS or time.monotonic() - since > LONGEST_WAIT * MOST_SECONDS:
                over = TIME
            if over:
                fork._end_all()
    os.close(reading)
    ended = fork.wait()
    if told < len(numbers) and at is None and ended.code not in (0,):
        raise RuntimeError(f"the inputs could not be made: {ended.err}")
    if at is not None:
        what = "stopped" if over else f"the process ended with {ended.code}: {last_line(ended.err)}"
        failures.append((at, over or UNCAUGHT, what))
        told += 1
    return told, failures


def last_line(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


# What the kinds ask of a command that has ended.


def check_limits(ended: Ended) -> None:
    """Broken where a command took too much or was ended by a signal nobody sent."""
    if ended.over:
        raise Broken(TIME if ended.over == "time" else MEMORY, f"{ended.seconds:.1f} s, {ended.peak / 1e9:.2f} GB")
    if "Traceback (most recent call last)" in ended.err:
        raise Broken(UNCAUGHT, last_line(ended.err))
    if ended.code < 0 or ended.code == 70:
        raise Broken(UNCAUGHT, f"ended with {ended.code}: {last_line(ended.err)}")
    if "run again with --debug for the traceback" in ended.err:
        # The command's last resort: nobody knew what to say of this error.
        raise Broken(UNCAUGHT, next(line for line in ended.err.splitlines() if line.startswith("error:"))[:300])


def check_refused(ended: Ended, *names: str, codes: Sequence[int] = (1,)) -> None:
    """Broken unless a command said in its last words what was wrong with one of these files, and failed."""
    check_limits(ended)
    if ended.code == 0:
        raise Broken(SILENT, "exit code 0")
    said = " ".join(line for line in ended.err.splitlines() if "error:" in line)
    if not said:
        raise Broken(UNCLEAR, f"exit code {ended.code} without an error line: {last_line(ended.err)}")
    if ended.code not in codes:
        raise Broken(UNCLEAR, f"exit code {ended.code}: {said[:300]}")
    if not any(name in said for name in names):
        raise Broken(UNCLEAR, f"names none of {', '.join(names)}: {said[:300]}")


def check_done(ended: Ended) -> None:
    """Broken unless a command succeeded."""
    check_limits(ended)
    if ended.code != 0:
        raise Broken(LOST, f"exit code {ended.code}: {last_line(ended.err)}")


def check_finished(ended: Ended) -> None:
    """Broken unless a job came to its end, or says that it had done so before it was killed."""
    if not (ended.code == 2 and "the directory is not empty" in ended.err):
        check_done(ended)


def digest(folder: Path, *patterns: str, leave_out: Sequence[str] = ()) -> dict[str, str]:
    """sha256 of the files under a folder that match, by relative path."""
    files = sorted(set(itertools.chain.from_iterable(folder.glob(pattern) for pattern in patterns or ("**/*",))))
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
        if file.is_file() and file.name not in leave_out
    }
