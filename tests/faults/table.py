"""The table of what was promised, how often it was tried, and how often it did not hold."""

from __future__ import annotations

import collections
import platform
import re
from collections.abc import Sequence
from pathlib import Path

from tests.faults.harness import CATEGORIES, Result

BEGIN, END = "<!-- written by make test-faults: begin -->", "<!-- end -->"


def rows_of(results: Sequence[Result]) -> list[tuple[str, str, str]]:
    """(promise, trials, failures), the last row the sum."""
    rows = []
    for result in results:
        found = f"not tried here: {result.not_here}" if result.not_here else str(len(result.failures))
        rows.append((result.kind.promise, f"{result.trials:,}", found))
    total = sum(result.trials for result in results), sum(len(result.failures) for result in results)
    return [*rows, ("all", f"{total[0]:,}", str(total[1]))]


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
            lines.append(f"       python -m tests.faults --only '{result.kind.name}' --trial {number} --seed {seed}")
    return "\n".join(lines)


def as_text(results: Sequence[Result]) -> str:
    """The table for a terminal, with the time that each row took."""
    rows = [("promise", "trials", "failures"), *rows_of(results)]
    seconds = ["processor s", *(f"{result.seconds:.0f}" for result in results), ""]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [
        f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}  {spent:>11}"
        for row, spent in zip(rows, seconds, strict=True)
    ]
    return "\n".join([*lines, by_category(results)])


def write_page(page: Path, results: Sequence[Result], *, seed: int, seconds: float) -> None:
    """Put the table into a page between its two marks."""
    lines = ["| promise | trials | failures |", "|---|---:|---:|"]
    lines += [f"| {promise} | {trials} | {failures} |" for promise, trials, failures in rows_of(results)]
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
