"""How this process was started: by which command, and by a launcher as one of how many."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path

from landmark_cli.interrupts import LAUNCHER_GONE

PR_SET_PDEATHSIG = 1
# If the first process of a launch has something to say, it says so within this many seconds of the others.
FIRST_COMES_FIRST = 0.5
ANSWER_WITHIN = 5.0

_arguments: list[str] | None = None


@contextlib.contextmanager
def command(arguments: Sequence[str]) -> Iterator[None]:
    """What is done inside was asked for by a command line of these arguments, for `again`."""
    global _arguments
    _arguments = list(arguments)
    try:
        yield
    finally:
        _arguments = None


def again(*flags: str, **options: object) -> str:
    """The command that goes on with the work of this one: as it was given, the launcher included, with these flags and
    options added where they are missing. In words where it was not started from the command line.
    """
    if _arguments is None:
        added = [f"{name}=True" for name in flags] + [f"{name}={str(value)!r}" for name, value in options.items()]
        return f"the same call with {', '.join(added)}" if added else "the same call"
    given = {argument.partition("=")[0] for argument in _arguments}
    added = [flag for flag in (f"--{name}" for name in flags) if flag not in given]
    for name, value in options.items():
        if f"--{name}" not in given:
            added += [f"--{name}", str(value)]
    return shlex.join([*_program(), *_arguments, *added])


def is_launched() -> bool:
    """Whether a launcher started this process and others that work with it."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def fails_first() -> bool:
    """Whether this is the first process of its launch that fails, to be asked once by each process that fails.

    What makes one process fail makes them all fail, or leaves the others without it, and the user has to hear of it
    once. The processes agree through the store by which they found each other.
    """
    if not is_launched():
        return True
    import socket

    try:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # The store's own client would try again and again, and print that it does.
        socket.create_connection((host, port), ANSWER_WITHIN).close()
        from torch.distributed import TCPStore

        if os.environ.get("RANK", "0") != "0":
            time.sleep(FIRST_COMES_FIRST)
        store = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=ANSWER_WITHIN), wait_for_workers=False)
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return store.add(f"landmark/failures/{attempt}", 1) == 1
    except (KeyError, OSError, RuntimeError, ValueError):
        # There is no store before the first process made it, nor after that process has ended, having said why.
        return not _found_each_other()


def _found_each_other() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()


def hear_of_launchers_end() -> None:
    """Have this process sent `LAUNCHER_GONE` when `accelerate launch`, which started this process and no other, ends
    before this process does.

    That launcher hands no signal on: stopped by a scheduler, it would leave a run behind that nobody stops. torchrun,
    and `accelerate launch` of several processes, look after their processes themselves.
    """
    if LAUNCHER_GONE is not None and "LOCAL_RANK" not in os.environ and _launcher():
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, LAUNCHER_GONE)


def _program() -> list[str]:
    """What stands in front of the arguments in the command line that started this process."""
    name = Path(sys.argv[0]).name
    return _launcher() or [name if shutil.which(name) else "landmark"]


def _launcher() -> list[str]:
    """The launcher that started this process, with its own options; empty where there was none. The command line of
    the process above this one begins with them, and ends with the arguments of this one."""
    if "LOCAL_RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ:
        import psutil

        with contextlib.suppress(psutil.Error, AttributeError):
            above = psutil.Process().parent().cmdline()
            before = len(above) - len(_arguments)
            if before > 0 and above[before:] == _arguments:
                # A script that Python runs, as installed launchers are, is started by its own name.
                script = before > 1 and os.path.isfile(above[1])
                return [Path(above[1]).name, *above[2:before]] if script else above[:before]
    return []
