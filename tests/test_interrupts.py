"""Signals: the first lets work finish, the second stops it at once, wherever the main thread is."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from landmark_cli.errors import Stopped
from landmark_cli.interrupts import Interrupted, end_on_signals, interrupts

BOTH = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
# Native code that holds no lock of Python's and returns for no signal, for minutes.
NATIVE = "__import__('hashlib').pbkdf2_hmac('sha512', b'', b'', 400_000_000)"


def ended(code, number, *, times=1, after=(), **changes):
    """Run code in a process, signal it once it has written "ready", again after each of these lines of its stderr."""
    program = [sys.executable, "-c", textwrap.dedent(code)]
    environment = {name: value for name, value in os.environ.items() if name != "LOCAL_RANK"} | changes
    process = subprocess.Popen(program, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout.readline() == "ready\n"
    lines = []
    for _ in range(times):
        process.send_signal(number)
    for awaited in after:
        lines.append(process.stderr.readline())
        assert awaited in lines[-1]
        process.send_signal(number)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, "".join(lines) + err


WORK = """
    import time
    from landmark_cli import cli
    from landmark_cli.interrupts import interrupts
    from tests.greet import GreetOptions, greet_command

    def run(options):
        with interrupts("finishing the greeting") as asked:
            print("ready", flush=True)
            {wait}
            print("finished", flush=True)
            raise asked.stopped("greeted; go on with: landmark greet")

    cli.COMMANDS[:] = [greet_command(run)]
    cli.main(["greet"])
"""
UNTIL_ASKED = "while not asked: time.sleep(0.01)"


@BOTH
def test_the_first_lets_work_finish_and_says_how_to_go_on(number):
    code, out, err = ended(WORK.format(wait=UNTIL_ASKED), number)
    assert (code, out) == (128 + number, "finished\n")
    assert (
        err == f"{number.name}: finishing the greeting; once more stops at once\ngreeted; go on with: landmark greet\n"
    )


@BOTH
@pytest.mark.parametrize("place", ["time.sleep(600)", NATIVE], ids=["python", "native code"])
def test_the_second_stops_at_once(number, place):
    code, out, err = ended(WORK.format(wait=place), number, after=["finishing the greeting"])
    assert (code, out) == (128 + number, "")
    assert len(err.splitlines()) == 1


@BOTH
def test_what_a_launcher_hands_on_is_not_a_second_one(number):
    code, out, _ = ended(WORK.format(wait="time.sleep(0.5)"), number, times=3, LOCAL_RANK="0")
    assert (code, out) == (128 + number, "finished\n")


def test_another_process_is_told_nothing_twice():
    code, out, err = ended(WORK.format(wait=UNTIL_ASKED), signal.SIGTERM, RANK="1")
    assert (code, out, err) == (143, "finished\n", "")


@BOTH
def test_elsewhere_it_ends_what_runs_and_tidies_up(number):
    code = WORK.replace('with interrupts("finishing the greeting") as asked:', "try:").replace(
        'raise asked.stopped("greeted; go on with: landmark greet")', "\n        finally: print('tidied', flush=True)"
    )
    assert ended(code.format(wait="time.sleep(600)"), number) == (
        128 + number,
        "tidied\n",
        f"stopped by {number.name}\n",
    )


@BOTH
def test_while_options_are_read_it_is_no_other(number):
    code = """
    import time
    from landmark_cli import cli
    from tests.greet import greet_command

    def load():
        print("ready", flush=True)
        time.sleep(600)

    cli.COMMANDS[:] = [greet_command(print)._replace(load=load)]
    cli.main(["greet"])
    """
    code, out, err = ended(code, number)
    assert (code, out) == (128 + number, "") and err.endswith(f"stopped by {number.name}\n")


@BOTH
def test_elsewhere_too_a_second_one_stops_native_code(number):
    code = f"""
    from landmark_cli.interrupts import end_on_signals
    with end_on_signals():
        print("ready", flush=True)
        {NATIVE}
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE)
    process.stdout.readline()
    # Then it is inside; two signals that arrive before either is handled would be one.
    time.sleep(0.3)
    while process.poll() is None:
        process.send_signal(number)
        try:
            process.wait(0.05)
        except subprocess.TimeoutExpired:
            continue
    assert process.returncode == 128 + number


@BOTH
@pytest.mark.parametrize("launcher", [{}, {"LOCAL_RANK": "0"}], ids=["alone", "launched"])
def test_elsewhere_one_that_native_code_does_not_let_in_stops_it_soon(number, launcher):
    code = f"""
    import threading
    from landmark_cli import interrupts
    interrupts.HEARD_WITHIN = 0.5
    with interrupts.end_on_signals():
        # Told once the main thread is inside.
        threading.Timer(0.3, print, ["ready"], dict(flush=True)).start()
        {NATIVE}
    """
    assert ended(code, number, **launcher) == (128 + number, "", "")


@BOTH
def test_what_was_there_before_is_put_back(number):
    heard = []
    before = signal.signal(number, lambda number, frame: heard.append(number))
    try:
        with end_on_signals():
            with interrupts("working") as asked:
                os.kill(os.getpid(), number)
                assert asked and asked.signal == number
            with pytest.raises(Interrupted, match=number.name):
                os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        assert heard == [number]
        assert signal.set_wakeup_fd(-1) == -1
    finally:
        signal.signal(number, before)


def test_the_error_has_the_exit_code_of_its_signal():
    with interrupts("working") as asked:
        assert not asked
        asked.note(signal.SIGTERM)
        asked.note(signal.SIGINT)
        error = asked.stopped("kept")
    assert isinstance(error, Stopped) and str(error) == "kept" and error.exit_code == 143


def test_a_forked_process_has_its_own_signals():
    """A pool that ends its workers by SIGTERM does not stop the work that made it."""
    reading, writing = os.pipe()
    with interrupts("working") as asked:
        child = os.fork()
        if child == 0:
            os.write(writing, b"ready")
            signal.pause()
            os._exit(0)
        os.read(reading, 5)
        os.kill(child, signal.SIGTERM)
        assert os.waitpid(child, 0)[1] == signal.SIGTERM
        assert not asked


def test_what_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupts("working") as asked:
            os.kill(os.getpid(), signal.SIGINT)
            assert not asked
            os.kill(os.getpid(), signal.SIGTERM)
            assert asked.signal == signal.SIGTERM
    finally:
        signal.signal(signal.SIGINT, before)
