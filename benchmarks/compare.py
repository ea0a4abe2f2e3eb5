"""Two commits timed side by side: attention, the training step, reading and preparing.

    python benchmarks/compare.py main HEAD
    python benchmarks/compare.py v1.2 . --parts attention reading --rounds 16 --json compared.json

BASE and HEAD are commits, checked out into a temporary folder, or directories with the code. For each part a process of
each imports its own tree, makes its cases and warms them up; then both time the same case one right after the other,
round by round in the order A B B A, so that whatever drifts (clocks, heat, other people's work) meets both alike. What
counts is the ratio of neighbours, head / base: its median over the rounds, and an interval that holds the true median
with at least 95% confidence whatever the noise looks like (order statistics; fewer than 6 rounds cannot say so much,
and their interval is their range).

"slower" and "faster" are said where the whole interval lies beyond --threshold, "unsure" where only the median does:
try more rounds. Exit code 1 where something is slower, or a part could not be timed, which is told with the reason. A
case that one of the trees does not have is left out.

--size small is for machines without a GPU, and their default. On a CPU one thread works, unless OMP_NUM_THREADS says
otherwise. Cases: compare_cases.py.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PARTS = "attention", "step", "reading", "preparing"
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Compared:
    """A case in both trees. base, head: milliseconds, round by round. ratio: median of head / base; low, high: its
    interval. verdict: "slower", "faster", "unsure" or "same"."""

    case: str
    base: list[float]
    head: list[float]
    ratio: float
    low: float
    high: float
    verdict: str


def compared(case: str, base: Sequence[float], head: Sequence[float], threshold: float) -> Compared:
    """What two series, measured in pairs, say."""
    ratios = [after / before for before, after in zip(base, head, strict=True)]
    ratio, (low, high) = statistics.median(ratios), interval(ratios)
    verdict = "same" if 1 - threshold <= ratio <= 1 + threshold else "unsure"
    if low > 1 + threshold:
        verdict = "slower"
    elif high < 1 - threshold:
        verdict = "faster"
    # With too few rounds their range has not the confidence that a verdict takes.
    if coverage(len(ratios), 0) < CONFIDENCE and verdict in ("slower", "faster"):
        verdict = "unsure"
    return Compared(case, list(base), list(head), ratio, low, high, verdict)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The narrowest pair of order statistics that holds the true median with CONFIDENCE, or the whole range."""
    values, left_out = sorted(values), 0
    while 2 * (left_out + 1) < len(values) and coverage(len(values), left_out + 1) >= CONFIDENCE:
        left_out += 1
    return values[left_out], values[len(values) - 1 - left_out]


def coverage(count: int, left_out: int) -> float:
    """How likely the true median lies between `count` values, so many of the smallest and of the largest left out."""
    return 1 - 2 * sum(math.comb(count, n) for n in range(left_out + 1)) / 2**count


class Worker:
    """A process that times the cases of one part in one tree."""

    def __init__(self, tree: Path, part: str, size: str) -> None:
        command = [sys.executable, str(HERE / "compare_cases.py"), str(tree), part, size]
        self.errors = tempfile.TemporaryFile("w+")
        # Threads that wait for each other measure what else the machine does.
        environment = {"OMP_NUM_THREADS": "1"} | os.environ
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors}
        self.process = subprocess.Popen(command, env=environment, text=True, **pipes)

    def hear(self, what: str) -> Any:
        """What the process says next. Raises RuntimeError with its last words where it has ended."""
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)[what]
        self.errors.seek(0)
        words = [line for line in self.errors.read().splitlines() if line.strip()]
        raise RuntimeError(words[-1] if words else f"ended with {self.process.wait()}")

    def time(self, case: str) -> float:
        """Milliseconds of one measurement."""
        self.process.stdin.write(json.dumps(case) + "\n")
        self.process.stdin.flush()
        return self.hear("value")

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.errors.close()


def in_turns(
    workers: Sequence[Worker], cases: Sequence[str], rounds: int, until: float
) -> dict[str, list[list[float]]]:
    """Milliseconds of every case in both trees, round by round; no round begins after `until`."""
    found: dict[str, list[list[float]]] = {case: [[], []] for case in cases}
    for number in range(rounds):
        if number and time.monotonic() > until:
            break
        for case in cases:
            for which in (0, 1) if number % 2 == 0 else (1, 0):
                found[case][which].append(workers[which].time(case))
    return found


def compare_part(trees: Sequence[Path], part: str, options: argparse.Namespace) -> tuple[list[Compared], list[str]]:
    """The cases of a part, and what could not be timed in one of the trees."""
    workers = [Worker(tree, part, options.size) for tree in trees]
    try:
        cases, failed = [], []
        for name, worker in zip(("base", "head"), workers, strict=True):
            try:
                cases.append(worker.hear("cases"))
            except RuntimeError as error:
                failed.append(f"{part}, {name}: {error}")
        if failed:
            return [], failed
        both = [case for case in cases[1] if case in cases[0]]
        found = in_turns(workers, both, options.rounds, time.monotonic() + options.seconds)
        return [compared(case, *series, options.threshold) for case, series in found.items()], []
    except (RuntimeError, BrokenPipeError) as error:
        return [], [f"{part}: {error}"]
    finally:
        for worker in workers:
            worker.close()


@contextmanager
def checked_out(commit: str, folder: Path) -> Iterator[Path]:
    """A commit's tree, in a worktree below the folder that is taken away in the end; a directory as it is."""
    if Path(commit).is_dir():
        yield Path(commit).resolve()
        return
    git = ["git", "-C", str(HERE)]
    subprocess.run([*git, "worktree", "add", "--quiet", "--detach", str(folder), commit], check=True)
    try:
        yield folder
    finally:
        subprocess.run([*git, "worktree", "remove", "--force", str(folder)], check=True)


def machine() -> str:
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} processors"
    return f"{device}, Python {platform.python_version()}, torch {torch.__version__}"


def table(results: Sequence[Compared]) -> str:
    """As Markdown."""
    lines = ["| case | base ms | head ms | head / base | 95% interval | |", "|---|---:|---:|---:|---:|---|"]
    for one in results:
        middle = [f"{statistics.median(series):.4g}" for series in (one.base, one.head)]
        mark = "" if one.verdict == "same" else f"**{one.verdict}**"
        lines.append(f"| {one.case} | {' | '.join(middle)} | {one.ratio:.3f} | {one.low:.3f}-{one.high:.3f} | {mark} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="a commit, or a directory")
    parser.add_argument("head", help="a commit, or a directory")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--size", choices=["full", "small"], help="by default full where there is a GPU")
    parser.add_argument("--rounds", type=int, default=10, help="pairs of measurements of each case")
    parser.add_argument("--seconds", type=float, default=600.0, help="after which a part begins no further round")
    parser.add_argument("--threshold", type=float, default=0.03, help="the difference that is flagged, as a share")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    options = parser.parse_args(arguments)
    if options.size is None:
        import torch

        options.size = "full" if torch.cuda.is_available() else "small"
    results: list[Compared] = []
    failed: list[str] = []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        names = zip(("base", "head"), (options.base, options.head), strict=True)
        trees = [stack.enter_context(checked_out(commit, Path(folder) / name)) for name, commit in names]
        for part in options.parts:
            found, missing = compare_part(trees, part, options)
            results += found
            failed += missing
            print(f"{part}: {len(found)} cases", *missing, sep="\n", file=sys.stderr, flush=True)
    about = f"`{options.base}` and `{options.head}`, {options.size} sizes, on {machine()}"
    print(f"{about}\n\n{table(results)}" + "".join(f"\n\nnot timed: {one}" for one in failed))
    if options.json:
        data = {"base": options.base, "head": options.head, "size": options.size, "machine": machine()}
        data |= {"threshold": options.threshold, "cases": [asdict(one) for one in results], "failed": failed}
        options.json.write_text(json.dumps(data, indent=1) + "\n")
    return int(bool(failed) or any(one.verdict == "slower" for one in results))


if __name__ == "__main__":
    sys.exit(main())
