"""What a command that fails says at its end: one or two lines on stderr, once in a launch of several processes.

Help needs none of what the functions here import, and a command's options have imported all of it: what is told of an
error must not need a file to be opened when no more can be.
"""

from __future__ import annotations

import os
import signal
import traceback
from typing import Any

from landmark_cli import console, launch
from landmark_cli.errors import LandmarkError, Stopped


def tell(error: BaseException, options: Any = None, *, debug: bool = False) -> int:
    """Tell the user why the work stops, and return the exit code.

    options: of the command, where its work had begun; they say what it could be given to need less memory.
    debug: show the traceback too.
    """
    if isinstance(error, KeyboardInterrupt):
        number = getattr(error, "signal", signal.SIGINT)
        console.tell(f"stopped by {number.name}")
        return 128 + number
    if isinstance(error, Stopped):
        console.tell(str(error))
        return error.exit_code
    if not launch.fails_first():
        return error.exit_code if isinstance(error, LandmarkError) else 1
    if debug:
        traceback.print_exception(error)
    if isinstance(error, LandmarkError):
        console.error(str(error))
        return error.exit_code
    console.error(describe(error, options))
    if not debug and not _is_plain(error):
        console.tell("run again with --debug for the traceback")
    return 1


def describe(error: BaseException, options: Any = None) -> str:
    """One line about an error that nobody foresaw, with the file where it is about one."""
    from landmark_cli.file_errors import WHAT_TO_DO
    from landmark_cli.memory import asked_for, is_out_of_memory

    if is_out_of_memory(error):
        ways = memory_savers(options) if options is not None else []
        advice = f"what takes less: {', '.join(ways)}" if ways else "use a machine that has more"
        return f"out of {asked_for(error)}; {advice}"
    if isinstance(error, OSError) and _is_plain(error):
        files = [os.fsdecode(name) for name in (error.filename, error.filename2) if name is not None]
        to_do = WHAT_TO_DO.get(error.errno)
        return f"{' -> '.join(files)}: {error.strerror}" + (f"; {to_do}" if to_do else "")
    first_line = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first_line}".removesuffix(": ")


def _is_plain(error: BaseException) -> bool:
    """Whether one line says all there is to an error: the system's about a file, and memory that ran out."""
    from landmark_cli.memory import is_out_of_memory

    of_a_file = isinstance(error, OSError) and error.filename is not None and bool(error.strerror)
    return of_a_file or is_out_of_memory(error)


def memory_savers(options: Any) -> list[str]:
    """The options that would save memory if they were given, or given smaller than they are."""
    from landmark_cli.options import settings_of

    ways = []
    for name, setting in settings_of(type(options)).items():
        value, about = getattr(options, name), setting.metadata
        if not about["saves_memory"]:
            continue
        if setting.kind in (int, float) and value is not None:
            # Of several numbers the largest needs the most.
            saves = max(value if setting.many else [value]) > about["min"]
        else:
            saves = value == setting.default and not about["adapts"]
        if saves:
            ways.append(about["saves_memory"])
    return ways
