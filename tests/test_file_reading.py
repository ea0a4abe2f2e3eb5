"""Whatever stands in a file, reading it gives what it holds or one line that names it; soon, and in little memory."""

import json
import os
import random
import time
from typing import Any

import pytest

from landmark_cli import file_reading
from landmark_cli.errors import LandmarkError, UsageError
from landmark_cli.file_writing import write_whole
from landmark_cli.schema import check
from tests.schemas import GOOD, Schema

SECONDS = 5

READERS = {
    "record": lambda path: file_reading.read_record(Schema, path),
    "json": file_reading.read_json,
    "json lines": lambda path: list(file_reading.read_json_lines(path)),
    "yaml": file_reading.read_yaml,
    "text": file_reading.read_text,
}


@pytest.mark.parametrize("reader", READERS)
def test_what_was_written_is_read(tmp_path, reader):
    path = tmp_path / "file"
    write_whole(path, json.dumps(GOOD))
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
        file.truncate(file_reading.MAX_BYTES + 1)
    with pytest.raises(LandmarkError, match="larger than"):
        READERS[reader](tmp_path / "file")


def test_a_line_without_end_is_bounded(tmp_path):
    with open(tmp_path / "file", "wb") as file:
        file.write(b'{"a": 1}\n')
        file.truncate(50 << 20)
        file.seek(0, os.SEEK_END)
        file.write(b'\n{"b": 2}')
    bad = []
    lines = list(file_reading.read_json_lines(tmp_path / "file", damaged=lambda *what: bad.append(what)))
    assert lines == [{"a": 1}, {"b": 2}] and [number for number, _ in bad] == [2]


def test_damaged_lines_are_told_and_the_others_read(tmp_path):
    (tmp_path / "file").write_bytes(b'{"a": 1}\n{"b"\n[]\n\n\xff\n{"c": 3}\n{"d":')
    bad = []
    lines = list(file_reading.read_json_lines(tmp_path / "file", damaged=lambda number, why: bad.append(number)))
    assert lines == [{"a": 1}, {"c": 3}] and bad == [2, 3, 5, 7]
    with pytest.raises(LandmarkError, match="line 2"):
        list(file_reading.read_json_lines(tmp_path / "file"))


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
        file_reading.read_yaml(tmp_path / "file.yaml", "recipe", kind=UsageError)
    assert time.monotonic() - started < SECONDS


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
