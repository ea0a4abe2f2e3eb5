"""The table of what was promised, how often it was tried, and how often it did not hold."""

from __future__ import annotations

import collections
import platform
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from tests.faults.harness import CATEGORIES, Result

BEGIN, END = "<!-- written by make test-faults: begin -->", "<!-- end -->"


def rows_of(results: Sequence[Result]) -> list[tuple[str, str, str, float]]:
    """(promise, trials, failures, seconds), kinds of one promise together, the last row the sum."""
    by_promise: dict[str, list[Result]] = collections.defaultdict(list)
    for result in results:
        by_promise[result.kind.promise].append(result)
    return [_row(*item) for item in [*by_promise.items(), ("all", results)] if sum(r.trials for r in item[1])]


def _row(promise: str, results: Sequence[Result]) -> tuple[str, str, str, float]:
    left_out = next((f" (partly not tried here: {r.not_here})" for r in results if r.not_here), "")
    failures = sum(len(result.failures) for result in results)
    trials = sum(result.trials for result in results)
    return promise, f"{trials:,}", f"{failures}{left_out}", sum(result.seconds for result in results)


def by_category(results: Sequence[Result]) -> str:
    counts = collections.Counter(category for result in results for _, category, _ in result.failures)
    return ", ".join(f"{counts[category]} {category}" for category in CATEGORIES)


def failures_of(results: Sequence[Result], seed: int) -> str:
    """What failed, alike failures together, each with the command that repeats its first one."""
    lines = []
    for result in results:
        alike: dict[tuple[str, str], list[tuple[int, str]]] = collections.defaultdict(list)
        for number, category, what in result.failures:
            alike[category, re.sub(r"'[^']*'|[\d.]+|/\S+", "*", what)[:80]].append((number, what))
        for (category, _), found in sorted(alike.items(), key=lambda item: -len(item[1])):
            number, what = found[0]
            lines.append(f"{len(found):>6} {category}: {what}")
            name = shlex.quote(result.kind.name)
            lines.append(f"       python -m tests.faults --only {name} --trial {number} --seed {seed}")
    return "\n".join(lines)


def as_text(results: Sequence[Result]) -> str:
    """The table for a terminal, with the time that each row took."""
    rows = [(*row[:3], f"{row[3]:.0f} s") for row in rows_of(results)]
    rows = [("promise", "trials", "failures", "took"), *rows]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join([row[0].ljust(widths[0]), *(row[c].rjust(widths[c]) for c in (1, 2, 3))]) for row in rows]
    return "\n".join([*lines, by_category(results)])


def write_page(page: Path, results: Sequence[Result], *, seed: int, seconds: float) -> None:
    """Put the table into a page between its two marks."""
    lines = ["| promise | trials | failures |", "|---|---:|---:|"]
    lines += [f"| {promise} | {trials} | {failures} |" for promise, trials, failures, _ in rows_of(results)]
    lines += [
        "",
        f"By kind of failure: {by_category(results)}. Seed {seed}, {seconds / 60:.0f} minutes on {machine()}.",
    ]
    text = page.read_text(encoding="utf-8")
    pattern = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.DOTALL)
    if not pattern.search(text):
        raise SystemExit(f"{page} has no place for the table: {BEGIN} ... {END}")
    page.write_text(pattern.sub(lambda _: "\n".join([BEGIN, *lines, END]), text), encoding="utf-8")


def machine() -> str:
    import os

    import psutil
    import torch
    import transformers

    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    cores = len(os.sched_getaffinity(0))
    memory = psutil.virtual_memory().total / 2**30
    return (
        f"{cores} cores of {model[1] if model else platform.machine()}, {memory:.0f} GB, "
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    )
