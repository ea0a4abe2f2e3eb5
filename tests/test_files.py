"""Whatever stands in a file, reading it gives what it holds or one line that names it; soon, and in little memory."""

import errno
import json
import os
import random
import resource
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import save_file

from landmark_cli import files, on_disk
from landmark_cli.errors import LandmarkError, UsageError
from landmark_cli.schema import check

SECONDS = 5


@dataclass
class Inner:
    shape: list[int]


@dataclass
class Schema:
    name: str
    number: float
    kind: Literal["a", "b"]
    inner: dict[str, Inner]
    maybe: int | None = None


GOOD = {"name": "n", "number": 1, "kind": "a", "inner": {"x": {"shape": [1, 2]}}, "maybe": 3}

READERS = {
    "record": lambda path: files.read_record(Schema, path),
    "json": files.read_json,
    "json lines": lambda path: list(files.read_json_lines(path)),
    "yaml": files.read_yaml,
    "text": files.read_text,
}


class PanicException(BaseException):
    """As pyo3's, which is no Exception."""


@pytest.mark.parametrize("reader", READERS)
def test_what_was_written_is_read(tmp_path, reader):
    path = tmp_path / "file"
    files.write_whole(path, json.dumps(GOOD))
    expected = {"record": check(Schema, GOOD), "json lines": [GOOD], "text": json.dumps(GOOD)}.get(reader, GOOD)
    assert READERS[reader](path) == expected


BAD = {
    "not UTF-8": b'{"name": "\xff"}',
    "nested 100,000 deep": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "nested 100 deep": b'{"a":' + b"[" * 100 + b"]" * 100 + b"}",
    "cut": b'{"name": "n", "numb',
    "another kind": b"[1, 2]",
    "a number of a million digits": b'{"name": ' + b"9" * 1_000_000 + b"}",
}


@pytest.mark.parametrize("reader", [name for name in READERS if name != "text"])
@pytest.mark.parametrize("content", BAD.values(), ids=BAD)
def test_bad_content_is_one_line(tmp_path, reader, content):
    (tmp_path / "file").write_bytes(content)
    started = time.monotonic()
    with pytest.raises(LandmarkError) as error:
        READERS[reader](tmp_path / "file")
    assert str(tmp_path / "file") in str(error.value) and len(str(error.value).splitlines()) == 1
    assert time.monotonic() - started < SECONDS


@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_ordinary_file_is_refused(tmp_path, reader):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "missing", tmp_path / "folder", tmp_path / "pipe", tmp_path / ("x" * 300), "/dev/zero"):
        with pytest.raises(LandmarkError, match="cannot be read"):
            READERS[reader](path)


@pytest.mark.parametrize("reader", [name for name in READERS if name != "json lines"])
def test_size_is_bounded(tmp_path, reader):
    with open(tmp_path / "file", "wb") as file:
        file.truncate(files.MAX_BYTES + 1)
    with pytest.raises(LandmarkError, match="larger than"):
        READERS[reader](tmp_path / "file")


def test_a_line_without_end_is_bounded(tmp_path):
    with open(tmp_path / "file", "wb") as file:
        file.write(b'{"a": 1}\n')
        file.truncate(50 << 20)
        file.seek(0, os.SEEK_END)
        file.write(b'\n{"b": 2}')
    bad = []
    lines = list(files.read_json_lines(tmp_path / "file", damaged=lambda *what: bad.append(what)))
    assert lines == [{"a": 1}, {"b": 2}] and [number for number, _ in bad] == [2]


def test_damaged_lines_are_told_and_the_others_read(tmp_path):
    (tmp_path / "file").write_bytes(b'{"a": 1}\n{"b"\n[]\n\n\xff\n{"c": 3}\n{"d":')
    bad = []
    lines = list(files.read_json_lines(tmp_path / "file", damaged=lambda number, why: bad.append(number)))
    assert lines == [{"a": 1}, {"c": 3}] and bad == [2, 3, 5, 7]
    with pytest.raises(LandmarkError, match="line 2"):
        list(files.read_json_lines(tmp_path / "file"))


YAML_BOMBS = {
    "aliases": "a: &a [x, x, x, x, x, x, x, x, x]\n"
    + "".join(f"{b}: &{b} [{', '.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
    "merged": "a: &a {x: 1}\n"
    + "".join(f"{b}: &{b} {{<<: [{', '.join(['*' + a] * 9)}]}}\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
    "itself": "a: &a [*a]",
    "code": "a: !!python/object/apply:os.system [true]",
}


@pytest.mark.parametrize("bomb", YAML_BOMBS.values(), ids=YAML_BOMBS)
def test_yaml_bombs_do_not_go_off(tmp_path, bomb):
    (tmp_path / "file.yaml").write_text(bomb)
    started = time.monotonic()
    with pytest.raises(UsageError, match=r"recipe .*file\.yaml cannot be read"):
        files.read_yaml(tmp_path / "file.yaml", "recipe", kind=UsageError)
    assert time.monotonic() - started < SECONDS


WRONG = {
    "missing": ({"name": ...}, "lacks name"),
    "null": ({"name": None}, "name should be text"),
    "true is no number": ({"maybe": True}, "maybe should be a whole number"),
    "a float": ({"maybe": 1.0}, "maybe should be a whole number"),
    "too large": ({"maybe": 2**70}, "maybe should be a whole number"),
    "text": ({"number": "1"}, "number should be a number"),
    "a choice": ({"kind": "c"}, "kind should be 'a' or 'b'"),
    "a choice of another type": ({"kind": ["a"]}, "kind should be 'a' or 'b', found \\['a'\\]"),
    "inside": ({"inner": {"x": {"shape": [1, "2"]}}}, r"inner\.x\.shape\[1\] should be a whole number, found '2'"),
    "an object": ({"inner": [1]}, "inner should be an object, found \\[1\\]"),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_fields_of_another_type_are_named(change, message):
    content = {key: value for key, value in (GOOD | change).items() if value is not ...}
    with pytest.raises(ValueError, match=message):
        check(Schema, content)


def test_fields_of_a_later_version_are_left_out():
    assert check(Schema, GOOD | {"later": 1}) == check(Schema, GOOD)


def raised() -> list[BaseException]:
    return [
        KeyError("a"),
        TypeError("x\ny"),
        OverflowError(),
        RecursionError(),
        MemoryError(),
        EOFError(),
        RuntimeError("z" * 10_000),
        PanicException("index out of bounds"),
        OSError(errno.EIO, "Input/output error"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"),
    ]


@pytest.mark.parametrize("error", raised(), ids=lambda error: type(error).__name__)
def test_whatever_a_parser_throws_is_one_short_line(error):
    with pytest.raises(LandmarkError) as found, files.reading("model/config.json", "--model", to_do="get it again"):
        raise error
    message = str(found.value)
    assert message.startswith("--model model/config.json cannot be read: ") and message.endswith("; get it again")
    assert "\n" not in message and len(message) < 400


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, LandmarkError])
@pytest.mark.parametrize("around", [files.reading, files.writing])
def test_interruptions_and_our_own_errors_pass(around, error):
    with pytest.raises(error), around("file"):
        raise error


WRITE_FAILURES = {
    "full": (OSError(errno.ENOSPC, "No space left on device"), "No space left on device; make room"),
    "read-only": (OSError(errno.EROFS, "Read-only file system"), "Read-only file system; choose a place"),
    "no folder": (FileNotFoundError(errno.ENOENT, "No such file or directory"), "make its folder first"),
    "torch": (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos"), "inline_container"),
}


@pytest.mark.parametrize(("error", "message"), WRITE_FAILURES.values(), ids=WRITE_FAILURES)
def test_what_a_disk_refuses_is_one_line_with_the_path(error, message):
    with pytest.raises(LandmarkError, match=message) as found, files.writing("out/file"):
        raise error
    assert str(found.value).startswith("out/file cannot be written: ")


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    files.write_whole(tmp_path / "file", "before")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(OSError, match="full"):
        files.write_whole(tmp_path / "file", "after")
    assert (tmp_path / "file").read_text() == "before" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_what_stays_is_as_open_to_others_as_the_umask_says(tmp_path, monkeypatch, umask):
    """safetensors lets nobody else read its files; a file of another mode was given that by somebody."""
    on_disk._mode_of_new_files.cache_clear()
    before = os.umask(umask)
    try:
        (tmp_path / "folder").mkdir()
        save_file({"x": torch.zeros(1)}, tmp_path / "folder" / "model.safetensors")
        for name, mode in (("owner", 0o600), ("public", 0o644), ("readable", 0o400), ("program", 0o700)):
            (tmp_path / name).touch()
            (tmp_path / name).chmod(mode)
        on_disk.flush_tree(tmp_path)
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
        on_disk._mode_of_new_files.cache_clear()
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()}
    new = 0o666 & ~umask
    assert modes == {"model.safetensors": new, "owner": new, "public": 0o644, "readable": 0o400, "program": 0o700}
    monkeypatch.setattr(Path, "chmod", lambda *_: (_ for _ in ()).throw(PermissionError(errno.EPERM, "no modes here")))
    (tmp_path / "again").touch(mode=0o600)
    on_disk.flush_tree(tmp_path)


def test_links_pipes_and_devices_stay_what_they_are(tmp_path):
    (tmp_path / "file").write_text("before")
    (tmp_path / "link").symlink_to("file")
    files.write_whole(tmp_path / "link", "after")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "after"
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    files.write_whole(tmp_path / "pipe", "text")
    assert os.read(reader, 10) == b"text" and (tmp_path / "pipe").is_fifo()
    files.write_whole(Path("/dev/null"), "text")
    assert Path("/dev/null").is_char_device()
    with pytest.raises(OSError, match="No space left"):
        files.write_whole(Path("/dev/full"), "text")


def mutated(data: bytes, draw: random.Random) -> bytes:
    """Bytes a little changed: flipped, cut, doubled, filled with the other readers' syntax."""
    data = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(data) + 1)
        piece = draw.choice([b"[", b"{", b'"', b"null", b"-1", b"1e999", b"NaN", b"\x00", b"\xff", b"&a", b"*a", b": "])
        kind = draw.randrange(4)
        if kind == 0:
            data[at : at + len(piece)] = piece
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            data[at:at] = data[: draw.randrange(len(data) + 1)]
        elif at < len(data):
            data[at] ^= 1 << draw.randrange(8)
    return bytes(data)


@pytest.mark.parametrize("reader", READERS)
def test_damaged_files_never_raise_anything_else(tmp_path, reader):
    draw, path = random.Random(reader), tmp_path / "file"
    good: Any = json.dumps(GOOD).encode()
    refused = 0
    for _ in range(300):
        path.write_bytes(mutated(good, draw))
        try:
            READERS[reader](path)
        except LandmarkError as error:
            refused += 1
            assert str(path) in str(error) and "\n" not in str(error)
    assert refused > 50 or reader == "text"


@pytest.mark.parametrize("torn", ["", "{", "x" * 9000])
@pytest.mark.parametrize("whole", ["", "1\n", "1\n" * 5000])
def test_a_line_takes_the_place_of_one_that_was_cut_short(tmp_path, whole, torn):
    path = tmp_path / "lines"
    path.write_text(whole + torn)
    files.append_line(path, "2")
    assert path.read_text() == whole + "2\n"


def test_a_line_is_added_whole_or_not_at_all(tmp_path):
    path = tmp_path / "lines"
    files.append_line(path, "1")
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, old[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            files.append_line(path, "2" * 200)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_text() == "1\n"
