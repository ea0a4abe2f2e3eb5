"""SIGTERM and SIGINT: the first one lets work come to a good place, a second one stops it at once.

    with interrupts("finishing the step, then saving a checkpoint") as asked:
        for batch in batches:
            train(batch)
            if asked:
                save()
                raise asked.stopped(f"a checkpoint is saved; go on with: {command}")

A signal is noticed by a thread of its own, so that it is answered while the main thread waits inside native code: for
a GPU, for other processes, for a long multiplication. Outside of such a block `landmark` ends by what `end_on_signals`
raises, and every `with` and `finally` that is left on the way tidies up.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from landmark_cli.console import tell
from landmark_cli.errors import Stopped

# What Linux sends to a process whose launcher ended before it, where the process asked for it (see launch.py). It means
# what SIGTERM means, but never that SIGTERM came a second time: whoever stops the launcher may have stopped this
# process as well.
LAUNCHER_GONE = signal.SIGRTMIN + 5 if sys.platform == "linux" else None
SIGNALS = (signal.SIGINT, signal.SIGTERM) if LAUNCHER_GONE is None else (signal.SIGINT, signal.SIGTERM, LAUNCHER_GONE)
# Under a launcher one request can come twice, from the job's scheduler and handed on by the launcher.
LAUNCHER_REPEATS_WITHIN = 2.0
# How long the main thread may stay in native code (connecting to other processes, reading from a hub) before a first
# signal, which would end it there, ends the process.
HEARD_WITHIN = 5.0
SHOW_CURSOR = b"\x1b[?25h\n"


class Interrupted(KeyboardInterrupt):
    """Ends work that has no place to keep, as a KeyboardInterrupt does, for SIGTERM too."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.signal = signal.Signals(number)


class Interrupts:
    """Whether somebody asked the work to stop; true from the first signal on.

    doing: what happens until it stops, told to the user when the signal comes. signal: the first one, or None.
    """

    def __init__(self, doing: str) -> None:
        self.doing = doing
        self.signal: signal.Signals | None = None
        self._untold = threading.Lock()
        self._arrived_at: float | None = None
        self._repeats = False

    def __bool__(self) -> bool:
        return self.signal is not None

    def note(self, number: int) -> None:
        """Take a stop as asked for by a signal that came to this process or to another one of this run."""
        if self.signal is None:
            self.signal = meaning(number)
        if self._untold.acquire(blocking=False):
            tell(f"{self.signal.name}: {self.doing}; once more stops at once")

    def stopped(self, message: str) -> Stopped:
        """The error to raise once the place is kept. message: what is kept, and how to go on."""
        return Stopped(message, self.signal)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # In the main thread, between any two of its instructions: all else is for the watching thread.
        if self.signal is None:
            self.signal = meaning(number)

    def _arrived(self, number: int) -> None:
        now = time.monotonic()
        if self._arrived_at is None:
            self._arrived_at = now
            self._repeats = "LOCAL_RANK" in os.environ or number == LAUNCHER_GONE
            self.note(number)
        elif number != LAUNCHER_GONE and now - self._arrived_at > self._repeats * LAUNCHER_REPEATS_WITHIN:
            stop_at_once(number)


class _Ending(Interrupts):
    """Raises Interrupted in the main thread instead of noting the signal."""

    def note(self, number: int) -> None:
        waiting = threading.Timer(HEARD_WITHIN, self._end_unheard, [number])
        waiting.daemon = True
        waiting.start()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # Of two signals, one of which came from the launcher's end, the second leaves the first to its work.
        if self.signal is None:
            self.signal = meaning(number)
            raise Interrupted(self.signal)

    def _end_unheard(self, number: int) -> None:
        if self.signal is None:
            stop_at_once(number)


@contextlib.contextmanager
def interrupts(doing: str) -> Iterator[Interrupts]:
    """Note signals while the block runs. doing: what is done until it stops ("finishing the document")."""
    with _watching(Interrupts(doing)) as asked:
        yield asked


@contextlib.contextmanager
def end_on_signals() -> Iterator[Interrupts]:
    """Have the first signal raise Interrupted in the block, and a second one end the process."""
    with _watching(_Ending("ending")) as asked:
        yield asked


@contextlib.contextmanager
def keeping(place: Callable[[], str | None]) -> Iterator[None]:
    """Tell how to go on where a signal ends the block, which it does outside of `interrupts` (while a model is loaded,
    say, or between two parts of the work). place(): what is kept and how to go on; None where nothing is kept yet.

    Raises Stopped with these words in place of the signal's KeyboardInterrupt.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        words = place()
        if words is None:
            raise
        raise Stopped(words, getattr(error, "signal", signal.SIGINT)) from None


def meaning(number: int) -> signal.Signals:
    """The signal that this one stands for."""
    return signal.SIGTERM if number == LAUNCHER_GONE else signal.Signals(number)


def stop_at_once(number: int) -> None:
    """End this process without another word, with the exit code of one that the signal ended."""
    if os.isatty(2):
        os.write(2, SHOW_CURSOR)
    os._exit(128 + meaning(number))


# What was there before each block that is running now: the handlers by signal, and the descriptor to wake up.
_before: list[tuple[dict[int, Any], int]] = []


@contextlib.contextmanager
def _watching(asked: Interrupts) -> Iterator[Interrupts]:
    if threading.current_thread() is not threading.main_thread():
        # Python lets only the main thread say what a signal does.
        yield asked
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    thread = threading.Thread(target=_watch, args=(reading, asked), daemon=True, name="landmark-signals")
    thread.start()
    waking = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    # A signal that is ignored stays ignored: a shell's background work does not hear its Ctrl-C.
    heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    _before.append(({number: signal.signal(number, asked._handle) for number in heard}, waking))
    try:
        yield asked
    finally:
        _put_back(*_before.pop())
        os.close(writing)
        thread.join()
        os.close(reading)


def _watch(pipe: int, asked: Interrupts) -> None:
    while received := os.read(pipe, 1):
        if received[0] in SIGNALS:
            asked._arrived(received[0])


def _put_back(handlers: dict[int, Any], waking: int) -> None:
    signal.set_wakeup_fd(waking, warn_on_full_buffer=False)
    for number, handler in handlers.items():
        # None is a handler that was not set from Python.
        signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _forget_in_child() -> None:
    """A forked process has its parent's pipe but not its watching thread: signals mean there what they meant before."""
    if _before:
        _put_back(*_before[0])
        _before.clear()


os.register_at_fork(after_in_child=_forget_in_child)
