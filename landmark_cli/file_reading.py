"""Our own kinds of files read and parsed: none larger than its bound, none nested without end, none that goes on for
ever.

Every command's options import this module, so the libraries that parse and hash are imported by the functions that use
them.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from landmark_cli.errors import LandmarkError
from landmark_cli.file_errors import reading, reason
from landmark_cli.schema import check
from landmark_cli.sealed import CHECKSUM, unsealed_content

T = TypeVar("T")

# Far above any file of ours; a reader of larger files gives its own bound.
MAX_BYTES = 16 << 20
MAX_LINE_BYTES = 1 << 20
# PyYAML reads about 100 kB a second.
MAX_YAML_BYTES = 256 << 10
MAX_DEPTH = 64
READ_BYTES = 16 << 20


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


def read_record(schema: type[T], path: str | Path, what: str = "", **more: Any) -> T:
    """The JSON object that a file holds as an object of the dataclass `schema` (see `landmark_cli.schema`).

    Arguments and errors as those of `read_bytes`; a field that is missing or of another type raises LandmarkError too.
    """
    content = read_json(path, what, **more)
    with reading(path, what, **more):
        return check(schema, content)


def read_sealed(
    schema: type[T],
    path: str | Path,
    what: str = "",
    *,
    unsealed: Mapping[str, Any] | None = None,
    **more: Any,
) -> T:
    """What `write_sealed` wrote, as an object of the dataclass `schema`.

    unsealed: the fields, with their values, by which a file of an earlier version, which had no checksum, is known.
    Further arguments and errors as those of `read_record`; a file whose content is not what was written raises
    LandmarkError.
    """
    content = read_json(path, what, **more)
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
            raise ValueError(f"not YAML: {' '.join(str(error).split())}") from None
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
