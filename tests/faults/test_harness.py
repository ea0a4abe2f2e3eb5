"""The trials themselves: what a fork takes is seen, a broken promise is counted, and a seed repeats it."""

import os
import random
import signal
import time
from functools import partial

import pytest

from tests.faults import harness, mutate
from tests.faults.forks import Fork, read_usage
from tests.faults.harness import CATEGORIES, LOST, MEMORY, SILENT, TIME, UNCAUGHT, UNCLEAR, Broken, Kind, NotHere
from tests.faults.moments import Changes
from tests.faults.table import as_text, failures_of, rows_of, write_page


@pytest.fixture
def run(tmp_path):
    """Run trials of one kind in two processes: their Result."""

    def run(call, count=6, **more):
        kind = Kind("made up", "a promise", count, 1, call, **more)
        place = {"base": tmp_path / "base", "scratch": tmp_path / "scratch"}
        return harness.run_kinds([kind], lambda kind: range(kind.full), seed=0, jobs=2, **place)[0]

    return run


def ended(call, folder, **limits):
    folder.mkdir(exist_ok=True)
    return Fork(call, folder, **limits).start().wait()


def room_for(more, folder):
    """What a fork of this process holds from its start, and so many bytes more: it maps fewer pages than its parent."""
    return int(ended(lambda: print(read_usage(os.getpid())[1]), folder).out) + more


def test_a_fork_tells_what_it_printed_and_how_it_ended(tmp_path):
    def call():
        print("out", os.getcwd(), input())
        os.write(2, b"err")
        return 3

    one = ended(call, tmp_path / "at", stdin=b"typed\n")
    assert (one.code, one.out, one.err, one.over) == (3, f"out {tmp_path / 'at'} typed\n", "err", None)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_fork_is_signalled_when_it_is_time(tmp_path, number):
    (tmp_path / "at").mkdir()
    one = Fork(partial(time.sleep, 60), tmp_path / "at").start().wait([(0.1, number)])
    assert one.code == -number and one.killed == (number == signal.SIGKILL) and one.wall < 30


def test_too_much_time_and_memory_are_seen(tmp_path):
    def spin():
        while True:
            pass

    def grow():
        kept = [bytearray(b"x" * (1 << 20)) for _ in range(500)]
        time.sleep(30 if kept else 0)

    assert ended(spin, tmp_path / "at", most_seconds=0.2).over == "time"
    limit = room_for(100 << 20, tmp_path / "at")
    assert ended(grow, tmp_path / "at", most_bytes=limit).over == "memory"


def test_a_change_of_a_file_is_counted_and_can_be_the_last(tmp_path):
    def change():
        for name in "abc":
            (tmp_path / "at" / name).write_text(name)
            os.rename(tmp_path / "at" / name, tmp_path / "at" / f"{name}.done")

    changes = Changes(tmp_path / "at")
    assert ended(lambda: (changes.watch(), change()) and 0, tmp_path / "at").code == 0 and changes.count == 6
    for file in (tmp_path / "at").iterdir():
        file.unlink()
    changes = Changes(tmp_path / "at")
    assert ended(lambda: (changes.watch(4), change()), tmp_path / "at").killed
    assert changes.last == "os.rename b"
    assert sorted(file.name for file in (tmp_path / "at").iterdir()) == ["a.done", "b"]


@pytest.mark.parametrize("category", CATEGORIES)
def test_broken_promises_are_counted_by_category(run, category):
    def call(trial):
        if trial.number % 3 == 1:
            raise Broken(category, "seen")

    assert run(call).failures == [(1, category, "seen"), (4, category, "seen")]


def test_what_fails_in_the_trial_itself_counts_too(run):
    result = run(lambda trial: 1 / (trial.number - 2))
    assert [(number, category) for number, category, _ in result.failures] == [(2, UNCAUGHT)]


def test_what_cannot_be_tried_is_no_success(run):
    def call(trial):
        raise NotHere("no right to")

    result = run(call)
    assert result.trials == 0 and result.not_here == "no right to" and not result.failures


def test_inputs_that_end_the_process_or_take_too_much_are_told_apart(run, tmp_path, monkeypatch):
    # Memory is taken in far less processor time than this, on a slow machine too.
    monkeypatch.setattr(harness, "MOST_SECONDS", 1.5)
    monkeypatch.setattr(harness, "MOST_BYTES", room_for(100 << 20, tmp_path / "at"))

    def call(made, chance):
        number = chance.number
        if number == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if number == 3:
            raise ValueError("nobody caught this")
        if number == 4:
            while True:
                pass
        if number == 5:
            raise Broken(SILENT, "a wrong result")
        if number == 6:
            made.append(bytearray(b"x" * (180 << 20)))
            time.sleep(5)

    monkeypatch.setattr(Kind, "random", lambda kind, seed, number: Numbered(number))
    result = run(call, count=8, inputs=lambda base, work: [])
    assert [(number, category) for number, category, _ in result.failures] == [
        (1, UNCAUGHT),
        (3, UNCAUGHT),
        (4, TIME),
        (5, SILENT),
        (6, MEMORY),
    ]
    assert result.trials == 8 and "ValueError: nobody caught this" in result.failures[1][2]


class Numbered(random.Random):
    """Random numbers that know which trial they are for."""

    def __new__(cls, number):
        return super().__new__(cls)

    def __init__(self, number):
        super().__init__(number)
        self.number = number


ERROR = "error: out/a.json cannot be read"


@pytest.mark.parametrize(
    ("code", "err", "category"),
    [
        (1, ERROR, None),
        (0, "", SILENT),
        (1, "error: a file cannot be read", UNCLEAR),
        (3, ERROR, UNCLEAR),
        (1, "out/a.json", UNCLEAR),
        (1, f"Traceback (most recent call last):\n{ERROR}", UNCAUGHT),
        (-11, ERROR, UNCAUGHT),
    ],
)
def test_a_refusal_has_to_name_the_file_and_fail(tmp_path, code, err, category):
    one = harness.Ended(code, "", err, 0.1, 0.1, 1)
    if category is None:
        return harness.check_refused(one, "a.json")
    with pytest.raises(Broken) as broken:
        harness.check_refused(one, "a.json")
    assert broken.value.category == category


DAMAGES = [name for name in dir(mutate) if name.startswith("damaged")]


@pytest.mark.parametrize("name", DAMAGES)
def test_a_seed_repeats_its_damage_and_another_makes_another(name):
    whole = {"damaged_yaml": b"steps: 3\nrows: [{a: 1}]\n", "damaged_lines": b'{"a": 1}\n{"a": 2}\n'}
    data = whole.get(name, b'{"steps": 3, "rows": [{"a": "text"}, null]}')
    if name in ("damaged_inside_gzip", "damaged_inside_zstandard"):
        import gzip

        import zstandard

        pack = gzip.compress if name.endswith("gzip") else zstandard.ZstdCompressor().compress
        data = pack(b'{"a": 1}\n' * 9)
    damage = getattr(mutate, name)
    first = [damage(random.Random(seed), data) for seed in range(40)]
    if not name.endswith(("gzip", "parquet")):
        # What these write holds the time.
        assert first == [damage(random.Random(seed), data) for seed in range(40)]
    assert len(set(first)) > 15


def test_the_table_puts_kinds_of_one_promise_together(tmp_path):
    kinds = [Kind(name, promise, 5, 1, print) for name, promise in (("a", "x"), ("b", "x"), ("c", "y"), ("d", "z"))]
    results = [harness.Result(kind, trials=5) for kind in kinds[:3]] + [harness.Result(kinds[3])]
    results[1].failures.append((3, LOST, "file 17 is gone"))
    results[1].failures.append((4, LOST, "file 18 is gone"))
    assert [row[:3] for row in rows_of(results)] == [("x", "10", "2"), ("y", "5", "0"), ("all", "15", "2")]
    assert "2 lost" in as_text(results)
    told = failures_of(results, 7)
    assert "2 lost: file 17 is gone" in told and "--only b --trial 3 --seed 7" in told
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- written by make test-faults: begin -->\nold\n<!-- end -->\nafter\n")
    write_page(page, results, seed=7, seconds=90)
    text = page.read_text()
    assert "| x | 10 | 2 |" in text and "old" not in text and text.startswith("before") and text.endswith("after\n")
