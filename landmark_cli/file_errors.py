"""Whatever a parser or the disk throws becomes a line with the path, what is wrong with it and what to do.

`reading` and `writing` stand around the calls of libraries. Every command's options import this module, so it imports
no library itself.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from landmark_cli.errors import LandmarkError
from landmark_cli.memory import asked_for, is_out_of_memory

LONGEST_REASON = 300

# torch's writer does not say what the system told it.
TORCH_WRITER_SIGNS = ("PytorchStreamWriter failed", "] . unexpected pos ")

# Errors that are no Exception: a panic in a library written in Rust, and a failure of torch's sharded checkpoints.
FOREIGN_FAILURES = ("PanicException", "CheckpointException")

WHAT_TO_DO = {
    errno.ENOSPC: "make room on the disk",
    errno.EDQUOT: "make room within your quota",
    errno.EROFS: "choose a place that can be written to",
    errno.EACCES: "change its permissions",
    errno.EPERM: "change its permissions",
    errno.ENOENT: "make its folder first",
    errno.EISDIR: "name a file",
    errno.ENOTDIR: "a file stands where a folder is needed",
    errno.EEXIST: "a file stands where a folder is needed",
    errno.ENAMETOOLONG: "choose a shorter name",
}


@contextmanager
def reading(
    path: str | Path, what: str = "", *, to_do: str = "", kind: type[LandmarkError] = LandmarkError
) -> Iterator[None]:
    """Turn whatever reading or parsing a file raises into one line that names it.

    what: how the user knows the file, such as "recipe" or "--path-raw"; it stands in front of the path. to_do: what
    puts it right. kind: UsageError where naming the file was the mistake.

    Raises LandmarkError for everything but an interruption. Only the library's own call belongs into the block:
    a mistake of ours in it would be reported as the file's.
    """
    try:
        yield
    except LandmarkError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ not in FOREIGN_FAILURES:
            raise
        raise kind(_line(path, what, "read", reason(error), to_do)) from error


@contextmanager
def writing(path: str | Path, what: str = "", *, to_do: str = "") -> Iterator[None]:
    """Turn what a file system raises while a file or folder is written into one line that names it and the way out.

    what, to_do: as `reading` takes them; without to_do, what helps against the system's error. Libraries that write by
    themselves (torch, safetensors) report a full disk as errors of their own, which count as well.

    Raises LandmarkError.
    """
    try:
        yield
    except LandmarkError:
        raise
    except BaseException as error:
        foreign = type(error).__name__ in (*FOREIGN_FAILURES, "SafetensorError")
        if not isinstance(error, (OSError, RuntimeError)) and not foreign:
            raise
        number = error.errno if isinstance(error, OSError) else _number_told(error)
        raise LandmarkError(_line(path, what, "written", reason(error), to_do or WHAT_TO_DO.get(number, ""))) from error


def reason(error: BaseException) -> str:
    """Why something failed, in a few words of one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 text (byte {error.start})"
    # By its name, as json is imported where it is used.
    if isinstance(error, ValueError) and type(error).__name__ == "JSONDecodeError":
        return f"not JSON (line {error.lineno}, column {error.colno}: {error.msg})"
    if isinstance(error, RecursionError):
        return "nested too deep"
    if is_out_of_memory(error):
        return f"out of {asked_for(error)}"
    if isinstance(error, KeyError):
        return f"it lacks {_short(str(error))}"
    if isinstance(error, EOFError):
        return "it ends too early"
    failures = getattr(error, "failures", None)
    if isinstance(failures, dict) and failures:
        # What went wrong in each process of a sharded checkpoint; the error's own text is their tracebacks.
        return reason(next(iter(failures.values()))[0])
    if number := _number_told(error):
        return os.strerror(number)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if any(sign in str(error) for sign in TORCH_WRITER_SIGNS):
        return "a file could not be written to its end, as on a full disk or beyond a quota or a limit on a file's size"
    if not lines:
        return type(error).__name__
    # A line that ends with a colon says nothing without those that it announces.
    return _short(" ".join(lines) if lines[0].endswith(":") else lines[0])


def _number_told(error: BaseException) -> int | None:
    """The system's error number where the text of a library written in Rust ends in it, as safetensors' does."""
    told = re.search(r"\(os error (\d+)\)", str(error))
    return int(told[1]) if told else None


def _line(path: str | Path, what: str, done: str, why: str, to_do: str) -> str:
    return f"{what} {path} cannot be {done}: {why}".lstrip() + (f"; {to_do}" if to_do else "")


def _short(text: str) -> str:
    return text if len(text) <= LONGEST_REASON else text[: LONGEST_REASON - 3] + "..."
