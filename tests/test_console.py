"""Messages, progress, tables and JSON: on a terminal, in a pipe, in the second process of two."""

from __future__ import annotations

import ast
import json
import math
import os
import pty
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from landmark_cli import commands, console


@pytest.fixture(autouse=True)
def fresh_console(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    console.console.cache_clear()
    yield
    console.console.cache_clear()


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves when told to."""

    class Clock:
        now = 100.0

        def monotonic(self) -> float:
            return self.now

    clock = Clock()
    monkeypatch.setattr(console, "time", clock)
    return clock


def test_messages_go_to_stderr(capsys):
    console.info("reading [a] file " + "x" * 200)
    console.warn("odd")
    console.error("broken")
    assert capsys.readouterr() == ("", "reading [a] file " + "x" * 200 + "\nwarning: odd\nerror: broken\n")


def test_only_the_first_process_talks(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    console.info("hello")
    console.warn("odd")
    console.table(["a"], [[1]])
    console.print_json({})
    with console.progress("read", 2) as progress:
        progress.advance(2)
    console.error("broken")
    assert capsys.readouterr() == ("", "[rank 1] error: broken\n")


def test_progress_in_a_pipe_is_sparse(capsys, clock):
    with console.progress("train", 1000) as progress:
        for step in range(1000):
            clock.now += 0.05
            progress.advance(1, loss=1.0 + step, grad_norm="0.5")
    assert capsys.readouterr().err.splitlines() == [
        f"train  {share:3}%  {share * 10}/1000 steps  20 steps/s  loss {share * 10}  grad norm 0.5  {time}"
        for share, time in zip(
            range(10, 101, 10),
            ["0:45 left", "0:40 left", "0:35 left", "0:30 left", "0:25 left", "0:20 left", "0:15 left", "0:10 left"]
            + ["0:05 left", "0:50"],
            strict=True,
        )
    ]


def test_progress_in_a_pipe_of_long_and_of_short_work(capsys, clock):
    with console.progress("long", 1000) as progress:
        for _ in range(3):
            clock.now += 10
            progress.advance()
    assert len(capsys.readouterr().err.splitlines()) == 3
    with console.progress("short", 10) as progress:
        for _ in range(10):
            clock.now += 0.1
            progress.advance()
    assert capsys.readouterr().err.splitlines() == ["short  100%  10/10 steps  10 steps/s  0:01"]


def test_progress_of_bytes_without_a_known_end(capsys, clock):
    with console.progress("write", unit="B") as progress:
        clock.now += 2
        progress.advance(5_000_000)
    assert capsys.readouterr().err == "write  5.0 MB  2.5 MB/s  0:02\n"


def test_resumed_progress_counts_the_rate_of_this_run(capsys, clock):
    with console.progress("train", 200, initial=100) as progress:
        clock.now += 10
        progress.advance(50)
    assert capsys.readouterr().err == "train   75%  150/200 steps  5 steps/s  0:10 left\n"


def test_interrupted_work_prints_no_last_line(capsys, clock):
    with pytest.raises(RuntimeError), console.progress("train", 10) as progress:
        progress.advance()
        raise RuntimeError
    assert capsys.readouterr().err == ""


def on_a_terminal(script: str, columns: int = 300) -> str:
    """What a Python script writes to stderr where that is a terminal so wide."""
    reader, writer = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": str(columns)}
    process = subprocess.Popen([sys.executable, "-c", script], stderr=writer, env=environment)
    os.close(writer)
    shown = b""
    while True:
        try:
            shown += os.read(reader, 4096)
        except OSError:
            break
    os.close(reader)
    assert process.wait(timeout=60) == 0
    return shown.decode()


# Markup, emoji codes, and what Python and matplotlib would read as theirs.
ODD_NAMES = ["tok[/b]", "x[red]y", "[v2]", "e.jsonl:100: not JSON", ":smile:", "a\\[b]\\", "[link x]", "{task}", "%s"]


@pytest.mark.parametrize("name", ODD_NAMES)
@pytest.mark.parametrize(
    ("show", "stream"),
    [
        (console.info, "err"),
        (console.warn, "err"),
        (console.error, "err"),
        (lambda name: console.table([name], [["cell"]]), "out"),
        (lambda name: console.table(["column"], [[name]]), "out"),
        (lambda name: console.table(["column"], [["cell"]], title=name), "out"),
        (lambda name: console.table(["column"], [[Path(name)]], stderr=True), "err"),
        (lambda name: console.results(["column"], [[name]], data={}, json_target=None), "out"),
        (lambda name: console.print_json(name), "out"),
    ],
    ids=["info", "warn", "error", "header", "cell", "title", "path", "results", "json"],
)
def test_names_are_shown_as_they_are(capsys, show, stream, name):
    show(name)
    shown = getattr(capsys.readouterr(), stream)
    assert name in shown or json.dumps(name) in shown


@pytest.mark.parametrize("name", ODD_NAMES)
def test_progress_shows_names_as_they_are(capsys, clock, name):
    with console.progress(name, 10, "steps") as progress:
        clock.now += 5
        progress.advance(10, file=name)
    line = capsys.readouterr().err
    assert line.startswith(f"{name}  100%")
    assert f"file {name}" in line


def test_bar_shows_names_as_they_are():
    script = (
        "from landmark_cli import console\n"
        f"for name in {ODD_NAMES}:\n"
        "    with console.progress(name, 10, 'files') as progress: progress.advance(10, file=f'{name} in it')\n"
    )
    text = on_a_terminal(script)
    for name in ODD_NAMES:
        assert f"{name} " in text
        assert f"file {name} in it" in text


def test_progress_on_a_terminal_is_a_bar():
    text = on_a_terminal(
        "from landmark_cli import console\n"
        "with console.progress('read', 10, 'files') as progress:\n"
        "    for _ in range(10): progress.advance(1, loss=2.5)\n"
        "    console.info('in between')\n"
    )
    assert "━" in text
    assert "100%  10/10 files" in text
    assert "loss 2.5" in text
    assert "in between" in text


TRAINING = {"loss": 6.8891, "lr": "1.24e-03", "grad": "0.50", "tok/s": 2242, "peak": "1.2 GB"}


@pytest.mark.parametrize(
    ("columns", "said", "bar"),
    [
        (140, "loss 6.889  lr 1.24e-03  grad 0.50  tok/s 2242  peak 1.2 GB  0:50", True),
        (85, "1.2 steps/s  loss 6.889  lr 1.24e-03  grad 0.50  0:50", False),
        (80, "1.2 steps/s  loss 6.889  lr 1.24e-03  0:50", True),
        (48, "60/60 steps  1.2 steps/s  0:50", False),
        (40, "60/60 steps  0:50", True),
    ],
)
def test_a_narrow_terminal_has_less_and_nothing_is_cut(columns, said, bar):
    """The name of the work, how much of it is done and the time stay."""
    script = (
        "from landmark_cli import console\n"
        "class Clock:\n"
        "    now = 0.0\n"
        "    def monotonic(self): return self.now\n"
        "console.time = Clock()\n"
        "with console.progress('training', 60) as progress:\n"
        "    console.time.now = 50.0\n"
        f"    progress.advance(60, **{TRAINING!r})\n"
    )
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", on_a_terminal(script, columns))
    last = [line for line in re.split(r"[\r\n]+", text) if line.strip()][-1].rstrip()
    assert last.startswith("training ") and last.endswith(said) and "…" not in last and len(last) <= columns
    assert ("━" in last) == bar and " 60/60 steps" in last and "100%" in last


def test_table_and_json(capsys, tmp_path):
    rows = [["landmark", 2, 16.23456], ["baseline", 0, None]]
    data = {"rows": rows, "path": Path("x"), "worst": math.inf, "odd": (math.nan, 1)}
    console.results(["model", "blocks", "perplexity"], rows, data=data, title="Held-out text")
    out, err = capsys.readouterr()
    assert err == ""
    lines = [line.rstrip() for line in out.splitlines() if line.strip()]
    assert lines[0] == "Held-out text"
    assert lines[1].split() == ["model", "blocks", "perplexity"]
    assert lines[3].split() == ["landmark", "2", "16.2346"]
    assert lines[3].index("2") == lines[1].index("blocks") + len("blocks") - 1
    assert lines[4].split() == ["baseline", "0", "-"]

    console.results(["model"], [["landmark"]], data=data, json_target="-")
    out, err = capsys.readouterr()
    expected = {"rows": rows, "path": "x", "worst": None, "odd": [None, 1]}
    assert json.loads(out) == expected
    assert "landmark" in err

    console.results(["model"], [["landmark"]], data=data, json_target=tmp_path / "new" / "results.json")
    out, err = capsys.readouterr()
    assert "landmark" in out
    assert err == f"wrote {tmp_path / 'new' / 'results.json'}\n"
    assert json.loads((tmp_path / "new" / "results.json").read_text()) == expected


def test_wide_tables_are_not_cut_in_a_pipe(capsys):
    console.table([f"column {number}" for number in range(30)], [["x" * 10] * 30])
    out = capsys.readouterr().out
    assert "column 29" in out
    assert out.count("x" * 10) == 30


def test_what_a_table_says_in_words_is_whole_on_a_narrow_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "50")
    said = "read in chunks of 16 tokens, each with 2 of the blocks before it"
    console.table(("dry run", "nothing is trained"), [("windows", said), ("disk", "1 MB")])
    out = " ".join(capsys.readouterr().out.split())
    assert said in out and "…" not in out


@pytest.mark.parametrize(
    ("amount", "unit", "expected"),
    [
        (0, "", "0"),
        (0.123456, "", "0.123"),
        (99_999, "", "99999"),
        (123_456, "", "123.5k"),
        (1_234_567, "", "1.235M"),
        (3e15, "", "3000T"),
        (0, "B", "0 B"),
        (999, "B", "999 B"),
        (1500, "B", "1.5 kB"),
        (2.5e9, "B", "2.5 GB"),
        (7e15, "B", "7000.0 TB"),
    ],
)
def test_quantity(amount, unit, expected):
    assert console.quantity(amount, unit) == expected


@pytest.mark.parametrize(("seconds", "expected"), [(0.4, "0:00"), (59.6, "1:00"), (7400, "2:03:20")])
def test_duration(seconds, expected):
    assert console.duration(seconds) == expected


@pytest.mark.parametrize(
    ("number", "noun", "shown"),
    [(0, "step", "0 steps"), (1, "text token", "1 text token"), (2, "process", "2 processes"), (-1, "row", "-1 rows")],
)
def test_counted(number, noun, shown):
    assert console.counted(number, noun) == shown


NOUNS = re.compile(
    r" (?:[a-z-]+ )?(answers|blocks|bytes|chunks|documents|files|keys|layers|lines|models|parts|processes|prompts|"
    r"questions|rows|samples|steps|tasks|tensors|texts|tokens|weights|windows)\b(?!/s)"
)
# What makes a count short, or writes its noun itself.
WRITTEN = {"quantity", "counted"}


@pytest.mark.parametrize("module", sorted(Path(commands.__file__).parent.glob("*.py")), ids=lambda path: path.stem)
def test_what_commands_say_counts_one_thing_as_one(module):
    for text in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        for number, after in pairwise(text.values) if isinstance(text, ast.JoinedStr) else []:
            if isinstance(number, ast.FormattedValue) and isinstance(after, ast.Constant) and NOUNS.match(after.value):
                name = getattr(getattr(number.value, "func", number.value), "id", "")
                # A constant is known not to be one.
                assert name in WRITTEN or name.isupper(), (
                    f"{module.name}:{number.lineno}: counted() knows whether it is one"
                )
