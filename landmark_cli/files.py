"""The one place through which files are read and written: whatever a parser or the disk throws becomes a line with the
path, what is wrong with it and what to do.

`reading` and `writing` stand around other libraries' calls; `read_json`, `read_json_lines` and `read_yaml` read our own
kinds of files, none larger than its bound, none nested without end, none that goes on for ever. Every command's options
import this module, so the libraries that parse and hash are imported by the functions that use them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO, TypeVar

from landmark_cli.errors import LandmarkError
from landmark_cli.memory import asked_for, is_out_of_memory
from landmark_cli.schema import check
from landmark_cli.sealed import CHECKSUM, sealed_content, unsealed_content

T = TypeVar("T")

# Far above any file of ours; a reader of larger files gives its own bound.
MAX_BYTES = 16 << 20
MAX_LINE_BYTES = 1 << 20
# PyYAML reads about 100 kB a second.
MAX_YAML_BYTES = 256 << 10
MAX_DEPTH = 64
READ_BYTES = 16 << 20
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
        number = error.errno if isinstance(error, OSError) else None
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
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if any(sign in str(error) for sign in TORCH_WRITER_SIGNS):
        return "a file could not be written to its end, as on a full disk or beyond a quota or a limit on a file's size"
    return _short(lines[0]) if lines else type(error).__name__


def read_bytes(path: str | Path, what: str = "", *, max_bytes: int = MAX_BYTES, **more: Any) -> bytes:
    """A whole file of at most `max_bytes`. more: as `reading` takes them.

    Raises LandmarkError where it is missing, larger, or no ordinary file (a pipe could go on for ever).
    """
    with reading(path, what, **more):
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError("it is no ordinary file")
        with open(path, "rb") as file:
            data = file.read(max_bytes + 1)
        if len(data) > max_bytes:
            raise ValueError(f"it is larger than the {max_bytes} bytes that such a file may have")
        return data


def read_text(path: str | Path, what: str = "", *, max_bytes: int = MAX_BYTES, **more: Any) -> str:
    """A whole UTF-8 file. Arguments and errors as those of `read_bytes`."""
    data = read_bytes(path, what, max_bytes=max_bytes, **more)
    with reading(path, what, **more):
        return data.decode("utf-8")


def read_json(path: str | Path, what: str = "", *, max_bytes: int = MAX_BYTES, **more: Any) -> dict[str, Any]:
    """The JSON object that a file holds. Arguments and errors as those of `read_bytes`."""
    data = read_bytes(path, what, max_bytes=max_bytes, **more)
    with reading(path, what, **more):
        return parse_json(data)


def read_record(schema: type[T], path: str | Path, what: str = "", *, max_bytes: int = MAX_BYTES, **more: Any) -> T:
    """The JSON object that a file holds as an object of the dataclass `schema` (see `landmark_cli.schema`).

    Arguments and errors as those of `read_bytes`; a field that is missing or of another type raises LandmarkError too.
    """
    content = read_json(path, what, max_bytes=max_bytes, **more)
    with reading(path, what, **more):
        return check(schema, content)


def read_sealed(
    schema: type[T],
    path: str | Path,
    what: str = "",
    *,
    unsealed: Mapping[str, Any] | None = None,
    max_bytes: int = MAX_BYTES,
    **more: Any,
) -> T:
    """What `write_sealed` wrote, as an object of the dataclass `schema`.

    unsealed: the fields, with their values, by which a file of an earlier version, which had no checksum, is known.
    Further arguments and errors as those of `read_record`; a file whose content is not what was written raises
    LandmarkError.
    """
    content = read_json(path, what, max_bytes=max_bytes, **more)
    with reading(path, what, **more):
        earlier = unsealed is not None and unsealed.items() <= content.items() and CHECKSUM not in content
        return check(schema, content if earlier else unsealed_content(content))


def parse_json(data: bytes) -> dict[str, Any]:
    """The object in UTF-8 JSON text. Raises ValueError or RecursionError for anything else."""
    import json

    content = json.loads(data.decode("utf-8"))
    if not isinstance(content, dict):
        raise ValueError("it holds no JSON object")
    _check_depth(content)
    return content


def read_json_lines(
    path: str | Path, what: str = "", *, damaged: Callable[[int, str], None] | None = None, **more: Any
) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file with one on each line, empty lines aside; a file of any size, line by line.

    damaged: called with the number of a line that holds no object, and why, after which reading goes on; without
    `damaged` such a line raises LandmarkError. Further arguments and errors as those of `read_bytes`.
    """
    with reading(path, what, **more):
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError("it is no ordinary file")
        file = open(path, "rb")
    with file:
        for number, line in enumerate(_lines(path, what, file, more), 1):
            if not line.strip():
                continue
            try:
                if len(line) > MAX_LINE_BYTES:
                    raise ValueError(f"longer than {MAX_LINE_BYTES} bytes")
                content = parse_json(line)
            except (ValueError, RecursionError, MemoryError) as error:
                if damaged is None:
                    with reading(path, what, **more):
                        raise ValueError(f"line {number}: {reason(error)}") from None
                damaged(number, reason(error))
                continue
            yield content


def append_line(path: Path, line: str) -> None:
    """Add a line to a file, whole or not at all. One that was cut short at the file's end, by a kill or a full disk,
    makes way for it. Raises what the system raises."""
    with open(path, "ab+", buffering=0) as file:
        end = _end_of_lines(file)
        file.truncate(end)
        left = f"{line}\n".encode()
        try:
            while left:
                left = left[file.write(left) :]
        except OSError:
            file.truncate(end)
            raise


def _end_of_lines(file: BinaryIO) -> int:
    """Where the last whole line of a file ends."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - 4096)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def read_yaml(path: str | Path, what: str = "", **more: Any) -> dict[str, Any]:
    """The mapping that a YAML file holds, without aliases, which can stand for more than any memory holds.

    Arguments and errors as those of `read_bytes`.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                event = self.peek_event()
                raise ValueError(
                    f"line {event.start_mark.line + 1} repeats a value by the alias *{event.anchor}: write it out"
                )
            return super().compose_node(parent, index)

    text = read_text(path, what, max_bytes=MAX_YAML_BYTES, **more)
    with reading(path, what, **more):
        try:
            content = yaml.load(text, Loader)
        except yaml.YAMLError as error:
            raise ValueError(f"not YAML: {_short(' '.join(str(error).split()))}") from None
        if not isinstance(content, dict):
            raise ValueError("expected lines of `key: value`")
        _check_depth(content)
        return content


def hash_file(path: str | Path, size: int | None = None) -> Any:
    """hashlib's sha256 over the first `size` bytes of a file, or all of it, to ask for its digest or to go on with.

    Raises LandmarkError where the file has fewer bytes, or cannot be read.
    """
    import hashlib

    digest = hashlib.sha256()
    with reading(path):
        left = os.stat(path).st_size if size is None else size
        with open(path, "rb") as file:
            while left and (data := file.read(min(left, READ_BYTES))):
                digest.update(data)
                left -= len(data)
    if left:
        raise LandmarkError(f"{path} is {left} bytes shorter than what had been written to it")
    return digest


def write_whole(path: Path, data: str | bytes) -> None:
    """Write a file so that it is there whole and on the disk, or not at all. OSErrors are left to `writing`.

    What is no ordinary file (/dev/stdout, a pipe) is written to as it is; where the path is a link, the file that it
    leads to is written.
    """
    data = data.encode() if isinstance(data, str) else data
    if _is_device(path):
        path.write_bytes(data)
        return
    path, partial = target_and_partial(path)
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def check_writable(path: str | Path, what: str = "") -> None:
    """Try whether `write_whole` could write a file there, and make its folder, before hours of work are done for it.

    Raises LandmarkError, as `writing` does.
    """
    with writing(path, what):
        if os.path.isdir(path):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not _is_device(Path(path)):
            target, partial = target_and_partial(Path(path))
            target.parent.mkdir(parents=True, exist_ok=True)
            partial.touch()
            partial.unlink()


def check_folder(folder: Path, what: str = "") -> None:
    """Try whether files or folders could be made in a folder that is there. Raises LandmarkError, as `writing` does."""
    with writing(folder, what):
        if not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        with TemporaryFile(dir=folder):
            pass


def _is_device(path: Path) -> bool:
    return (path.exists() and not (path.is_file() or path.is_dir())) or path.is_relative_to("/dev")


def target_and_partial(path: Path) -> tuple[Path, Path]:
    """Where a file is, links followed, and where it is written before it is whole."""
    path = Path(os.path.realpath(path))
    return path, path.with_name(f"{path.name}.{os.getpid()}.partial")


def write_json(path: Path, content: Any) -> None:
    """`write_whole` with JSON, indented for people to read."""
    import json

    write_whole(path, json.dumps(content, indent=2) + "\n")


def write_sealed(path: Path, content: dict[str, Any]) -> None:
    """`write_json` with a checksum of the content beside it, which `read_sealed` checks."""
    write_json(path, sealed_content(content))


def _lines(path: str | Path, what: str, file: Any, more: dict[str, Any]) -> Iterator[bytes]:
    """The lines of a file; of one that is too long, its beginning."""
    while True:
        with reading(path, what, **more):
            line = file.readline(MAX_LINE_BYTES + 1)
            rest = line
            while len(rest) > MAX_LINE_BYTES and not rest.endswith(b"\n"):
                rest = file.readline(MAX_LINE_BYTES + 1)
        if not line:
            return
        yield line


def _check_depth(content: Any) -> None:
    """ValueError where lists and objects stand in each other more than MAX_DEPTH deep: what handles them recurses."""
    level = [content]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for node in level
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, (dict, list))
        ]
        if not level:
            return
    raise ValueError(f"nested more than {MAX_DEPTH} deep")


def _line(path: str | Path, what: str, done: str, why: str, to_do: str) -> str:
    return f"{what} {path} cannot be {done}: {why}".lstrip() + (f"; {to_do}" if to_do else "")


def _short(text: str) -> str:
    return text if len(text) <= LONGEST_REASON else text[: LONGEST_REASON - 3] + "..."
