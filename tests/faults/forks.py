"""Commands run in forks of a process that has imported everything once, so that a trial costs its own work only.

A fork is watched: the processor time and the memory it may take are bounded, it can be killed or signalled at a moment
that a seed chooses, and what it printed, how it ended and what it took are told.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import psutil

MOST_SECONDS = 10.0
"""Of processor time, for one command or one input."""
MOST_BYTES = 2_000_000_000
# A machine that is busy with other things lets a process wait; one that waits for nothing is told by taking so many
# times the processor time it may take.
LONGEST_WAIT = 9.0
# Shared pages of the parent count as the child's, as they would if it had imported the libraries itself.
POLL_SECONDS = 0.02
PAGE = os.sysconf("SC_PAGE_SIZE")
TICK = os.sysconf("SC_CLK_TCK")
PR_SET_PDEATHSIG = 1
SIGNALS = signal.SIGINT, signal.SIGTERM


@dataclass(frozen=True)
class Ended:
    """How a fork ended.

    code: its exit status, or minus the signal that ended it. seconds: of processor time. peak: bytes of memory.
    over: "time" or "memory" where it was stopped for taking too much.
    """

    code: int
    out: str
    err: str
    seconds: float
    wall: float
    peak: int
    over: str | None = None

    @property
    def killed(self) -> bool:
        return self.code == -signal.SIGKILL and self.over is None


@dataclass
class Fork:
    """A child process doing `call` in `folder`, its output in two files beside it. stdout: another file for it.

    hears: whether it hears signals from the first; else `call` says when.
    """

    call: Callable[[], int | None]
    folder: Path
    stdin: bytes = b""
    environment: Mapping[str, str] = field(default_factory=dict)
    log: Path | None = None
    stdout: str | None = None
    most_seconds: float = MOST_SECONDS
    most_bytes: int = MOST_BYTES
    hears: bool = True

    def start(self) -> Fork:
        self._log = self.log or self.folder.with_name(self.folder.name + ".log")
        self._out, self._err = self._log.with_suffix(".out"), self._log.with_suffix(".err")
        sys.stdout.flush()
        sys.stderr.flush()
        self._started = time.monotonic()
        # A signal that came before the child is as a shell starts it would be heard by what the trials had set up.
        heard = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        self.pid = os.fork()
        if self.pid == 0:
            self._be_child()
        signal.pthread_sigmask(signal.SIG_SETMASK, heard)
        self._descriptor = os.pidfd_open(self.pid)
        return self

    def signal(self, number: int) -> None:
        """Send it a signal, if it still runs."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._descriptor, number)

    def alive(self, seconds: float = 0.0) -> bool:
        """Whether it still runs after so many seconds of waiting."""
        return not select.select([self._descriptor], [], [], max(seconds, 0.0))[0]

    def wait(self, signals: Iterable[tuple[float, int]] = ()) -> Ended:
        """Until its end. signals: (seconds after the start, signal) to send on the way."""
        waiting, over = sorted(signals), None
        while True:
            now = time.monotonic() - self._started
            while waiting and waiting[0][0] <= now:
                self.signal(waiting.pop(0)[1])
            pause = min(POLL_SECONDS, waiting[0][0] - now) if waiting else POLL_SECONDS
            if not self.alive(pause):
                break
            over = over or self._over()
            if over:
                self._end_all()
        _, status, usage = os.wait4(self.pid, 0)
        os.close(self._descriptor)
        seconds, peak = usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024
        if over is None and peak > self.most_bytes:
            over = "memory"
        if over is None and seconds > self.most_seconds:
            over = "time"
        return Ended(
            code=os.waitstatus_to_exitcode(status),
            out="" if self.stdout else _text_of(self._out),
            err=_text_of(self._err),
            seconds=seconds,
            wall=time.monotonic() - self._started,
            peak=peak,
            over=over,
        )

    def _over(self) -> str | None:
        usage = read_usage(self.pid)
        if usage is None:
            return None
        seconds, resident = usage
        if resident > self.most_bytes:
            return "memory"
        if seconds > self.most_seconds or time.monotonic() - self._started > LONGEST_WAIT * self.most_seconds:
            return "time"
        return None

    def _end_all(self) -> None:
        with contextlib.suppress(psutil.Error):
            for process in psutil.Process(self.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    process.kill()
        self.signal(signal.SIGKILL)

    def _be_child(self) -> None:
        code = 70
        try:
            die_with_parent()
            os.setsid()
            # As a shell starts a command, whatever started the trials.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            if self.hears:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            source = os.memfd_create("stdin")
            os.write(source, self.stdin)
            os.lseek(source, 0, os.SEEK_SET)
            os.dup2(source, 0)
            for number, file in ((1, self.stdout or self._out), (2, self._err)):
                os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), number)
            # A fork of a fork lets go of its parent's files, which must not close the descriptors.
            sys.stdin, sys.stdout, sys.stderr = (open(n, "w" if n else "r", closefd=False) for n in range(3))
            os.chdir(self.folder)
            os.environ.update(self.environment)
            code = self.call() or 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        except BaseException:
            traceback.print_exc()
            code = 70
        finally:
            _end(code)


def _end(code: int) -> NoReturn:
    """End a fork, whatever signal comes meanwhile: one that got away would go on as the process that forked it."""
    while True:
        try:
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
            with contextlib.suppress(BaseException):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
        except KeyboardInterrupt:
            code = 128 + signal.SIGINT


def _text_of(file: Path) -> str:
    """What a child printed; nothing where it was killed before it could."""
    return file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""


def read_usage(pid: int) -> tuple[float, int] | None:
    """(seconds of processor time, bytes of memory) of a running process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE
    except (OSError, IndexError, ValueError):
        return None
    return (int(stat[11]) + int(stat[12])) / TICK, resident


def die_with_parent() -> None:
    """Have the kernel kill this process when the one that forked it ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def landmark(*arguments: object) -> Callable[[], int | None]:
    """What a fork does to be `landmark ARGUMENTS`."""

    def call() -> None:
        from landmark_cli import cli, console

        console.console.cache_clear()
        cli.end_on_signals = _heard_inside(cli.end_on_signals)
        cli.main([str(argument) for argument in arguments])

    return call


def _heard_inside(block: Callable) -> Callable:
    """A context that lets signals in once it is entered: what comes earlier finds Python still at its start."""

    @contextlib.contextmanager
    def inside():
        with block() as asked:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            yield asked

    return inside


def begin(arguments: Sequence[object], folder: Path, *, before: Callable[[], None] | None = None, **settings) -> Fork:
    """Start `landmark ARGUMENTS` in a folder. before: done in the fork first. settings: of the Fork."""
    run = landmark(*arguments)

    def call() -> int | None:
        if before is not None:
            before()
        return run()

    return Fork(call, folder, hears=False, **settings).start()


def command(arguments: Sequence[object], folder: Path, **settings) -> Ended:
    """Run `landmark ARGUMENTS` in a folder to its end."""
    return begin(arguments, folder, **settings).wait()
