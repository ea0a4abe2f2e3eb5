"""Working ahead in a background thread."""

import subprocess
import sys
import threading
import time

import pytest

from landmark_cli.data.prefetch import prefetched


def test_items_come_in_order():
    assert list(prefetched(range(100), 3)) == list(range(100))
    assert list(prefetched([])) == []


def test_the_source_runs_ahead_but_not_away():
    made = []
    items = prefetched((made.append(i) or i for i in range(100)), 2)
    assert next(items) == 0
    deadline = time.monotonic() + 5
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    # One delivered, two waiting, one in the hand.
    assert made == [0, 1, 2, 3]
    items.close()


def test_errors_arrive_in_their_place():
    def source():
        yield 1
        raise ZeroDivisionError("in the source")

    items = prefetched(source())
    assert next(items) == 1
    with pytest.raises(ZeroDivisionError, match="in the source"):
        next(items)


def test_closing_stops_the_thread_and_closes_the_source():
    closed = threading.Event()

    def source():
        try:
            while True:
                yield 1
        finally:
            closed.set()

    items = prefetched(source(), 1)
    next(items)
    items.close()
    assert closed.is_set()
    assert not any(thread.name == "landmark-prefetch" and thread.is_alive() for thread in threading.enumerate())


def test_a_program_that_ends_first_stops_the_thread():
    """Without closing anything: the source's own end is reached before the interpreter's."""
    program = (
        "from landmark_cli.data.prefetch import prefetched\n"
        "def source():\n"
        "    try:\n"
        "        while True:\n"
        "            yield 1\n"
        "    finally:\n"
        "        print('closed')\n"
        "items = prefetched(source())\n"
        "next(items)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "closed\n"
