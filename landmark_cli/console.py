"""What the user sees: messages and progress on stderr, results on stdout, quiet where nobody watches.

In a run of several processes only the first one talks; errors come from whichever has one. Importing this module costs
nothing: what draws and writes is imported by the functions that need it.
"""

from __future__ import annotations

import functools
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

# A pipe or a log file gets lines of progress this many seconds or this share of the work apart, and LINE_MOMENT at
# least.
LINE_SECONDS = 10.0
LINE_SHARE = 0.1
LINE_MOMENT = 2.0
# In a pipe or a log file a table takes the width it needs.
PLAIN_WIDTH = 4096
LONGEST_FIGURE = 1e9
# Columns that a bar of progress takes.
LEAST_BAR, WIDEST_BAR = 6, 24
_quiet = False
_warned: set[str] = set()


@functools.cache
def console(*, stderr: bool = True) -> Console:
    """The rich console of stderr, for people, or of stdout, for results.

    Text is printed as it is: the brackets and colons of paths and messages are no markup and no emoji codes.
    """
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    plain = not stream.isatty() and "COLUMNS" not in os.environ
    width = PLAIN_WIDTH if plain else None
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False, soft_wrap=True, width=width)


def is_main_process() -> bool:
    """Whether this is the process that talks: the first one under torchrun or `accelerate launch`, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def is_first_on_machine() -> bool:
    """Whether this is the first process of its machine, or the only one."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


@contextmanager
def of_one_command(quiet: bool) -> Iterator[None]:
    """What is said inside the block is said by one command, which warns of one thing once. quiet: say nothing but
    results, warnings, errors and how work ends: no messages, no progress."""
    global _quiet
    before, _quiet = _quiet, quiet
    _warned.clear()
    try:
        yield
    finally:
        _quiet = before


def info(message: str) -> None:
    """Tell the user something, on stderr."""
    if not _quiet:
        tell(message)


def tell(message: str) -> None:
    """Tell the user what must be known even where everything is to be quiet: why and where work ends."""
    if is_main_process():
        console().print(message)


def warn(message: str) -> None:
    """Tell the user about something that goes on but may surprise."""
    if is_main_process():
        console().print(f"warning: {message}", style="yellow")


def warn_once(message: str, where: str = "") -> None:
    """Warn of something that may come up again and again. where: stands in front of it, and does not make it another
    thing."""
    if message not in _warned:
        _warned.add(message)
        warn(f"{where}{message}")


def error(message: str) -> None:
    """Tell the user why the work stops."""
    rank = "" if is_main_process() else f"[rank {os.environ['RANK']}] "
    console().print(f"{rank}error: {message}", style="red")


def write_out(text: str) -> None:
    """Write text to stdout at once. Raises LandmarkError where that cannot be written to, as on a full disk."""
    with _writing_out():
        sys.stdout.write(text)
        sys.stdout.flush()


@contextmanager
def _writing_out() -> Iterator[None]:
    """Errors of stdout as such; where its reader has gone away, as in `landmark generate | head`, a silent end."""
    try:
        yield
    except BrokenPipeError:
        # What Python still holds for stdout goes nowhere, or it would try to write that again when it ends.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        raise SystemExit(1) from None
    except (OSError, RuntimeError):
        from landmark_cli.file_errors import writing

        with writing("standard output"):
            raise


class Progress:
    """How far some work is: what it has done, the share, the rate, the fields the work reports, the time left.

    Made by `progress`; the work calls `advance`.
    """

    def __init__(self, description: str, total: float | None, unit: str, initial: float) -> None:
        self.description = description
        self.total = total
        self.unit = unit
        self.done = initial
        self.fields: dict[str, Any] = {}
        self._initial = initial
        self._started = time.monotonic()

    def advance(self, amount: float = 1, **fields: Any) -> None:
        """Count `amount` more units as done and show these fields ("loss 3.21") from now on."""
        self.done += amount
        self.fields.update(fields)
        self._show(final=False)

    def status(self, width: int | None = None) -> str:
        """The whole state in one line, without the description. width: columns that there are for it; where they are
        too few, fields are left out, the last ones first, and then the rate."""
        elapsed = time.monotonic() - self._started
        rate = (self.done - self._initial) / elapsed if elapsed > 0 else 0.0
        amount = quantity(self.done, self.unit)
        parts = [f"{amount} {self.unit}" if self.unit != "B" else amount]
        if self.total:
            share = min(self.done / self.total, 1.0)
            of = quantity(self.total, self.unit)
            parts = [f"{share:4.0%}", f"{amount}/{of} {self.unit}" if self.unit != "B" else f"{amount}/{of}"]
        more = []
        if rate > 0:
            more.append(f"{quantity(rate, self.unit)}/s" if self.unit == "B" else f"{quantity(rate)} {self.unit}/s")
        more += [f"{name.replace('_', ' ')} {_cell(value)}" for name, value in self.fields.items()]
        if self.total and rate > 0 and self.done < self.total:
            when = f"{duration((self.total - self.done) / rate)} left"
        else:
            when = duration(elapsed)
        while more and width is not None and len("  ".join([*parts, *more, when])) > width:
            more.pop()
        return "  ".join([*parts, *more, when])

    def _show(self, *, final: bool) -> None:
        """Draw nothing: what a process does that does not talk."""


class _BarProgress(Progress):
    """A bar with the status beside it, redrawn a few times a second. The bar has the columns of the terminal that the
    words leave, or none."""

    def __init__(self, description: str, total: float | None, unit: str, initial: float) -> None:
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as RichProgress

        super().__init__(description, total, unit, initial)
        # A text column reads markup whatever its console does.
        self._words = [TextColumn(f"{{task.{what}}}", markup=False) for what in ("description", "fields[status]")]
        self._drawn = BarColumn(bar_width=WIDEST_BAR)
        self.bar = RichProgress(self._words[0], self._drawn, self._words[1], console=console())
        self._task = self.bar.add_task(description, total=total, completed=initial, status="")
        self._shown = 0.0

    def _show(self, *, final: bool) -> None:
        now = time.monotonic()
        if final or now - self._shown > 0.1:
            self._shown = now
            # A column of the terminal stands between a column of the line and the next.
            room = console().width - len(self.description) - 1
            status = self.status(room)
            self._drawn.bar_width = min(WIDEST_BAR, room - len(status) - 1)
            name, words = self._words
            self.bar.columns = (name, self._drawn, words) if self._drawn.bar_width >= LEAST_BAR else (name, words)
            self.bar.update(self._task, completed=self.done, status=status)


class _LineProgress(Progress):
    """A line now and then, for a pipe or a log file."""

    def __init__(self, description: str, total: float | None, unit: str, initial: float) -> None:
        super().__init__(description, total, unit, initial)
        self._shown_at = time.monotonic()
        self._shown_done = initial

    def _show(self, *, final: bool) -> None:
        waited = time.monotonic() - self._shown_at
        enough = self.total is not None and self.done - self._shown_done >= LINE_SHARE * self.total
        if waited >= LINE_SECONDS or (enough and waited >= LINE_MOMENT) or (final and self.done > self._shown_done):
            self._shown_at, self._shown_done = time.monotonic(), self.done
            info(f"{self.description}  {self.status()}")


@contextmanager
def progress(
    description: str, total: float | None = None, unit: str = "steps", *, initial: float = 0
) -> Iterator[Progress]:
    """Show the progress of work on stderr: a bar on a terminal, else a line every ten seconds or tenth of the work.

    total: how much work there is; None where nobody knows. unit: "B" is shown as MB and MB/s. initial: what an earlier
    run had done.
    """
    if _quiet or not is_main_process():
        yield Progress(description, total, unit, initial)
    elif console().is_terminal:
        shown = _BarProgress(description, total, unit, initial)
        with shown.bar:
            yield shown
            shown._show(final=True)
    else:
        shown = _LineProgress(description, total, unit, initial)
        yield shown
        shown._show(final=True)


def table(
    columns: Sequence[str], rows: Iterable[Sequence[Any]], *, title: str | None = None, stderr: bool = False
) -> None:
    """Print a table on stdout (or stderr). Columns of numbers stand to the right; floats get four decimals."""
    from rich import box
    from rich.table import Table

    rows = [list(row) for row in rows]
    drawn = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        numbers = all(isinstance(row[index], (int, float)) or row[index] is None for row in rows)
        # What is said in words goes on in the next line where a terminal is narrow, for else its end would be cut off.
        words = not numbers and index == len(columns) - 1
        drawn.add_column(column, justify="right" if numbers else "left", no_wrap=not words)
    for row in rows:
        drawn.add_row(*(_cell(value, ".4f") for value in row))
    show(drawn, stderr=stderr)


def show(drawn: Any, *, stderr: bool = False) -> None:
    """Print what rich can draw on stdout, or stderr, where it is a message."""
    if is_main_process() and not (stderr and _quiet):
        with _writing_out():
            console(stderr=stderr).print(drawn)


def results(
    columns: Sequence[str],
    rows: Iterable[Sequence[Any]],
    *,
    data: Any,
    json_target: str | Path | None = None,
    title: str | None = None,
) -> None:
    """Print a command's result as a table on stdout and, where `--json` asks, `data` as JSON.

    json_target: a file, or "-" for stdout, which then gets nothing but the JSON (the table goes to stderr).
    """
    to_stdout = json_target is not None and str(json_target) == "-"
    table(columns, rows, title=title, stderr=to_stdout)
    if to_stdout:
        print_json(data)
    elif json_target is not None:
        write_json(data, json_target)


def print_json(data: Any) -> None:
    """Print data as JSON on stdout; numbers JSON has no word for (nan, inf) become null, paths become text."""
    if is_main_process():
        write_out(_json(data) + "\n")


def write_json(data: Any, path: str | Path) -> None:
    """Write data to a file as `print_json` prints it, and tell the user that it is written."""
    from landmark_cli.file_errors import writing
    from landmark_cli.file_writing import write_whole

    if is_main_process():
        with writing(path, "--json"):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            write_whole(Path(path), _json(data) + "\n")
        info(f"wrote {path}")


def quantity(amount: float, unit: str = "") -> str:
    """A count or, with the unit "B", a number of bytes, short enough for a progress line: "12.3k", "45.0 MB"."""
    if unit == "B":
        for prefix in ("", "k", "M", "G"):
            if amount < 1000:
                return f"{amount:.0f} B" if prefix == "" else f"{amount:.1f} {prefix}B"
            amount /= 1000
        return f"{amount:.1f} TB"
    if amount != int(amount) and amount < 100:
        return f"{amount:.3g}"
    if amount < 100_000:
        return f"{amount:.0f}"
    power = min(int(math.log10(amount)) // 3, 4)
    return f"{amount / 1000**power:.4g}{' kMGT'[power]}"


def counted(number: int, noun: str, spec: str = "") -> str:
    """So many of what the noun, in the singular, names: "1 window", "12 text tokens". spec: the number's format."""
    plural = f"{noun}es" if noun.endswith(("s", "ch")) else f"{noun}s"
    return f"{number:{spec}} {noun if number == 1 else plural}"


def duration(seconds: float) -> str:
    """Seconds as "0:07" or "2:03:20"."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def figure(value: float, spec: str) -> str:
    """A number by a format such as ".2f"; a number that would be a long row of digits by its power of ten:
    "1.3e+250"."""
    return format(value, ".4g" if abs(value) >= LONGEST_FIGURE else spec)


def _cell(value: Any, floats: str = ".4g") -> str:
    if value is None:
        return "-"
    return figure(value, floats) if isinstance(value, float) else str(value)


def _json(data: Any) -> str:
    import json

    return json.dumps(finite(data), indent=2, allow_nan=False, default=str)


def finite(data: Any) -> Any:
    """Data as JSON can hold it: numbers it has no word for (nan, inf) become None."""
    if isinstance(data, dict):
        return {key: finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
