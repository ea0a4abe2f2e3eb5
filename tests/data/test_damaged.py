"""Files that are cut, damaged, of another kind, or without end: named with the place and the reason, counted as far as
anybody can, and passed over without anything good."""

import errno
import gzip
import json
import os
import random
import resource
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import zstandard

from landmark_cli.data import lines as lines_module
from landmark_cli.data import parquet as parquet_module
from landmark_cli.data import readers
from landmark_cli.data.corpora import is_arxiv
from landmark_cli.data.documents import text_file
from landmark_cli.data.left_out import LeftOut
from landmark_cli.data.lines import numbered_lines
from landmark_cli.data.readers import read_documents, rows_as_documents
from landmark_cli.errors import LandmarkError
from tests.data.texts import json_lines, packed, taken, write, write_parquet

DAMAGED = Path(__file__).parent / "damaged"
COMPRESSED = [".jsonl.gz", ".jsonl.zst"]
ROWS = [{"text": f"row {i} " + random.Random(i).randbytes(200).hex()} for i in range(400)]
TEXTS = [row["text"] for row in ROWS]


def read(path, field="text", keep=None):
    return taken(read_documents(path, field, keep))


def number(i):
    return f"Document number {i}. " + "It was a fine day in spring and nobody knew why. " * 5


# Of each file how many good texts it has, where the bad begins, why, and how many documents are lost (None: unknown).
FOUND = {
    "trunc.jsonl.gz": (17, "trunc.jsonl.gz: cut or damaged after line 17: its compressed data end too early", None),
    "bad.jsonl.gz": (0, "bad.jsonl.gz: cut or damaged from its beginning: Not a gzipped file", None),
    "bad.jsonl.zst": (0, "bad.jsonl.zst: cut or damaged from its beginning: .*Unknown frame descriptor", None),
    "corrupt.parquet": (0, "corrupt.parquet: damaged in rows 1 to 5: Corrupt snappy compressed data", 5),
    "list.parquet": (0, r"list.parquet: the column 'text' holds no text but list<element: string>", 2),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found_in_files_that_are_damaged(name):
    count, message, lost = FOUND[name]
    texts, [bad] = read(DAMAGED / name)
    assert texts == [number(i) for i in range(count)]
    assert bad.file == str(DAMAGED / name) and bad.documents == lost
    assert pytest.raises(type(bad), lambda: (_ for _ in ()).throw(bad)).match(message)


def test_json_that_is_nested_without_end(tmp_path):
    deep = b'{"text": "x", "meta": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n"
    path = write(tmp_path / "deep.jsonl", json_lines(ROWS[:1]) + deep + json_lines(ROWS[1:2]))
    texts, [bad] = read(path)
    assert texts == TEXTS[:2] and str(bad) == f"{path}:2: not read as JSON: nested too deep"
    assert not is_arxiv({"meta": "[" * 50_000}) and not is_arxiv({"meta": "(" * 1000})


@pytest.mark.parametrize("ending", COMPRESSED)
def test_a_file_cut_anywhere_keeps_the_lines_in_front_of_the_cut(tmp_path, ending):
    data = packed(ending, json_lines(ROWS))
    whole = write(tmp_path / f"whole{ending}", data)
    assert read(whole) == (TEXTS, [])
    for size in [0, 3, 10, *range(100, len(data), len(data) // 12), len(data) - 5, len(data) - 1]:
        path = write(tmp_path / f"cut{ending}", data[:size])
        texts, [bad] = read(path)
        assert texts == TEXTS[: len(texts)] and bad.documents is None
        place = f"after line {len(texts)}" if texts else "from its beginning"
        assert str(bad) == f"{path}: cut or damaged {place}: its compressed data end too early"
    # zstandard unpacks blocks of 128 KiB, which is all of the second part here.
    assert len(texts) >= (350 if ending.endswith(".gz") else 200)


@pytest.mark.parametrize("ending", COMPRESSED)
def test_flipped_bytes_and_what_is_behind_the_end(tmp_path, ending):
    data = packed(ending, json_lines(ROWS))
    for place in random.Random(0).sample(range(len(data)), 60):
        flipped = data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :]
        texts, bad = read(write(tmp_path / f"flipped{ending}", flipped))
        assert bad or texts == TEXTS
    texts, [bad] = read(write(tmp_path / f"behind{ending}", data + b"and more"))
    assert texts == TEXTS and "cut or damaged after line 400" in str(bad)


def test_frames_of_zstandard_that_hold_nothing_or_much(tmp_path):
    skippable = (0x184D2A50).to_bytes(4, "little") + (3).to_bytes(4, "little") + b"abc"
    wide = zstandard.ZstdCompressor(
        compression_params=zstandard.ZstdCompressionParameters(window_log=27, enable_ldm=True)
    ).compress(json_lines(ROWS))
    data = skippable + zstandard.compress(b"") + wide + skippable + zstandard.compress(json_lines(ROWS[:1]))
    assert read(write(tmp_path / "rows.jsonl.zst", data)) == ([*TEXTS, TEXTS[0]], [])


def test_a_compressed_file_of_nothing_is_cut(tmp_path):
    for ending in COMPRESSED:
        assert read(write(tmp_path / f"nothing{ending}", packed(ending, b""))) == ([], [])


@pytest.mark.parametrize("group", [400, 100, 7, 1])
def test_of_a_parquet_file_only_the_damaged_row_group_is_lost(tmp_path, group):
    path = write_parquet(tmp_path / "rows.parquet", ROWS, row_group_size=group, compression="snappy")
    assert read(path) == (TEXTS, [])
    about = parquet.ParquetFile(path).metadata
    hit = about.num_row_groups // 2
    column = about.row_group(hit).column(0)
    data = bytearray(path.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    data[start + 20 : start + column.total_compressed_size - 4] = bytes(column.total_compressed_size - 24)
    texts, [bad] = read(write(tmp_path / "damaged.parquet", bytes(data)))
    first, end = hit * group, min((hit + 1) * group, 400)
    assert texts == TEXTS[:first] + TEXTS[end:]
    assert bad.documents == end - first
    rows = f"rows {first + 1} to {end}" if group > 1 else f"row {end}"
    assert f"damaged.parquet: damaged in {rows}: " in str(bad)


def test_rows_that_are_silently_missing_are_no_others(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "rows.parquet", ROWS, row_group_size=100)
    iter_batches = parquet.ParquetFile.iter_batches

    def without_the_first_group(file, size, row_groups, **more):
        # As pyarrow reads a row group whose pages say that they hold no values.
        return iter_batches(file, size, row_groups=[group for group in row_groups if group], **more)

    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", without_the_first_group)
    texts, [bad] = read(path)
    assert texts == TEXTS[100:] and bad.documents == 100
    assert "rows.parquet: damaged in rows 1 to 100: they are missing" in str(bad)


def test_a_parquet_file_that_is_cut_or_none(tmp_path):
    data = write_parquet(tmp_path / "rows.parquet", ROWS).read_bytes()
    for size in (0, 3, 4, 8, len(data) // 2, len(data) - 1):
        texts, [bad] = read(write(tmp_path / "cut.parquet", data[:size]))
        assert texts == [] and bad.documents is None and "cut.parquet is not a parquet file" in str(bad)


@pytest.mark.parametrize(
    ("column", "shown"),
    [
        (pa.array([1, 2]), "int64"),
        (pa.array([["a"], ["b"]]), "list"),
        (pa.array([{"a": "x"}, {"a": "y"}]), "struct"),
        (pa.array([True, False]), "bool"),
    ],
    ids=["int", "list", "struct", "bool"],
)
def test_columns_that_hold_no_text(tmp_path, column, shown):
    parquet.write_table(pa.table({"text": column}), tmp_path / "rows.parquet")
    texts, [bad] = read(tmp_path / "rows.parquet")
    assert texts == [] and bad.documents == 2 and f"holds no text but {shown}" in str(bad)


@pytest.mark.parametrize("kind", ["string", "large_string", "binary", "large_binary", "dictionary", "null"])
def test_columns_that_hold_text(tmp_path, kind):
    column = pa.array(["a", None, "ü"])
    if kind == "dictionary":
        column = column.dictionary_encode()
    elif kind == "null":
        column = pa.nulls(3)
    else:
        column = column.cast(getattr(pa, kind)())
    parquet.write_table(pa.table({"text": column}), tmp_path / "rows.parquet")
    expected = ["", "", ""] if kind == "null" else ["a", "", "ü"]
    assert read(tmp_path / "rows.parquet") == (expected, [])


def test_rows_that_lack_the_field_are_passed_over_one_by_one(tmp_path):
    lines = [{"about": "this file"}, {"text": "good"}, ["text"], "text", {"text": ["x"]}, {"text": "better"}]
    path = write(tmp_path / "rows.jsonl", json_lines(lines))
    texts, bad = read(path)
    assert texts == ["good", "better"]
    reasons = ["no text field 'text', only the fields about", "a JSON array", "a str", "holds no text"]
    places = [1, 3, 4, 5]
    for error, place, why in zip(bad, places, reasons, strict=True):
        assert str(error).startswith(f"{path}:{place}") and why in str(error)
    write_parquet(tmp_path / "rows.parquet", [{"body": "x"}] * 3)
    texts, [bad] = read(tmp_path / "rows.parquet")
    assert texts == [] and bad.documents == 3 and "no text field 'text', only the columns body" in str(bad)


def test_no_message_is_longer_than_people_read(tmp_path):
    many = {f"field {i} " + "x" * 1000: i for i in range(500)}
    _, [bad] = read(write(tmp_path / "rows.jsonl", json_lines([many])))
    assert len(str(bad)) < 1000 and "and 490 more" in str(bad)
    parquet.write_table(pa.table({"text": pa.array([many])}), tmp_path / "rows.parquet")
    _, [bad] = read(tmp_path / "rows.parquet")
    assert len(str(bad)) < 1000


def test_a_json_array_says_what_it_is(tmp_path):
    pretty = json.dumps([{"text": "a", "n": 1}, {"text": "b", "n": 2}], indent=1)
    texts, bad = read(write(tmp_path / "rows.jsonl", pretty))
    assert texts == [] and "rows.jsonl:1: the start of a JSON array" in str(bad[0]) and "jq -c '.[]'" in str(bad[0])
    texts, [bad] = read(write(tmp_path / "rows.jsonl", '[{"text": "a"}]'))
    assert "rows.jsonl:1: a JSON array, where each line should hold a JSON object" in str(bad)


TEXT = "Call me Ishmael.\nSome years ago, never mind how long precisely. " * 40


@pytest.mark.parametrize("limit", [100, 1 << 20])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-16", "utf-32-le"])
@pytest.mark.parametrize("text", [TEXT, "Зовите меня Измаил. " * 40], ids=["english", "russian"])
def test_utf_16_is_no_text_full_of_zero_bytes(tmp_path, encoding, text, limit):
    _, [bad] = taken([text_file(write(tmp_path / "a.txt", text.encode(encoding)))], limit)
    assert "a.txt: " in str(bad) and "UTF-16" in str(bad)
    if limit > 100:
        texts, bad = read(write(tmp_path / "a.jsonl", (json.dumps({"text": "a"}) + "\n").encode(encoding)))
        assert texts == [] and all("a.jsonl:" in str(error) for error in bad) and "UTF-16" in str(bad[0])


def test_a_stray_zero_byte_is_let_in(tmp_path):
    assert read(write(tmp_path / "a.txt", b"a line\0\n" + b"x" * 1000))[1] == []
    assert read(write(tmp_path / "a.jsonl", json_lines([{"text": "a\0b"}]))) == (["a\0b"], [])
    assert len(read(write(tmp_path / "b.txt", bytes(1000)))[1]) == 1


@pytest.mark.parametrize("ending", [".jsonl", *COMPRESSED])
def test_lines_that_are_too_long(tmp_path, monkeypatch, ending):
    monkeypatch.setattr(lines_module, "LINE_BYTES", 10_000)
    data = json_lines([ROWS[0], {"text": "a" * 500_000}, ROWS[1]])
    path = write(tmp_path / f"rows{ending}", packed(ending, data))
    texts, [bad] = read(path)
    assert texts == TEXTS[:2] and bad.documents == 1
    assert str(bad) == f"{path}:2: a line of 500013 bytes, more than 10000"
    monkeypatch.setattr(lines_module, "PASSED_OVER_BYTES", 300_000)
    texts, [bad] = read(path)
    assert texts == TEXTS[:1] and bad.documents is None and "after line 1: a line of more than 310000" in str(bad)


def test_more_lists_and_objects_than_a_document_has(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "DENSE_LINE_BYTES", 1000)
    monkeypatch.setattr(readers, "DENSE_LINE_NODES", 100)
    rows = [{"text": "x", "meta": [[]] * 400}, {"text": "y " * 1000}, {"text": "z", "meta": [[]] * 90}]
    texts, [bad] = read(write(tmp_path / "rows.jsonl", json_lines(rows)))
    assert texts == ["y " * 1000, "z"] and "rows.jsonl:1: not read as JSON: holds more than 100 lists" in str(bad)


def test_a_row_group_that_unpacks_to_more_than_text_does(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_module, "PARQUET_BOMB_BYTES", 100_000)
    rows = [{"text": "good"}, {"text": "a" * 5_000_000}, {"text": "better"}]
    path = write_parquet(
        tmp_path / "rows.parquet",
        rows,
        row_group_size=1,
        compression="zstd",
        use_dictionary=False,
        write_statistics=False,
    )
    texts, [bad] = read(path)
    assert texts == ["good", "better"] and "rows.parquet: damaged in row 2: they unpack to 50000" in str(bad)


@pytest.mark.parametrize("ending", [".txt", ".jsonl", *COMPRESSED, ".parquet"])
def test_what_the_system_does_not_let_us_read_is_no_damage(tmp_path, ending):
    """To pass over a file that somebody forgot to mount or to share would pass over what is good."""
    (tmp_path / f"a{ending}").symlink_to(tmp_path / "gone")
    with pytest.raises(LandmarkError, match=rf"a{ending} cannot be read: No such file"):
        read(tmp_path / f"a{ending}")


def test_an_error_of_the_disk_ends_the_work(tmp_path, monkeypatch):
    path = write(tmp_path / "rows.jsonl.gz", packed(".gz", json_lines(ROWS)))

    def broken(self, size=-1):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(gzip.GzipFile, "read1", broken)
    with pytest.raises(LandmarkError, match=r"rows\.jsonl\.gz cannot be read: Input/output error"):
        list(numbered_lines(path))


def test_rows_of_a_data_set_that_end_in_an_error():
    def rows():
        yield {"text": "a"}
        yield {"text": 5}
        yield {}
        raise EOFError

    documents = rows_as_documents("some/set train", rows(), "text", None)
    first = [next(documents) for _ in range(3)]
    texts, bad = taken(first)
    assert texts == ["a"] and "row 2: the field 'text' holds no text" in str(bad[0])
    assert "some/set train, row 3 has no text field 'text', none at all" in str(bad[1])
    with pytest.raises(LandmarkError, match="some/set train cannot be read on after row 3: it ends too early"):
        next(documents)


def test_losses_are_counted_by_file_and_never_without_end():
    _, [rest] = read(DAMAGED / "trunc.jsonl.gz")
    _, [rows] = read(DAMAGED / "corrupt.parquet")
    left_out = LeftOut()
    assert [left_out.add(bad) for bad in (rest, rows, rows)] == [True, True, False]
    assert left_out.documents == 10
    assert "10 documents were left out" in left_out.summary() and "rest of 1 damaged file" in left_out.summary()
    assert f"{DAMAGED / 'trunc.jsonl.gz'}: the rest of it, {DAMAGED / 'corrupt.parquet'}: 10" in left_out.summary()
    told = 0
    for i in range(5000):
        rows.file = f"{i}.parquet"
        told += left_out.add(rows)
    assert len(left_out.files) <= 1001 and left_out.documents == 10 + 5 * 5000 and told <= 20
    other = LeftOut()
    other.add(rest)
    assert left_out.merge(other) == []
    assert left_out.documents == 10 + 5 * 5000


@pytest.mark.slow
@pytest.mark.parametrize("ending", COMPRESSED)
def test_a_small_file_that_unpacks_to_gigabytes(tmp_path, ending):
    path = tmp_path / f"bomb{ending}"
    opened = gzip.open(path, "wb", 1) if ending.endswith(".gz") else zstandard.open(path, "wb")
    with opened as file:
        file.write(json_lines(ROWS[:3]) + b'{"text": "')
        for _ in range(4096):
            file.write(b"a" * (1 << 20))
        file.write(b'"}\n')
    command = [sys.executable, "-m", "landmark_cli", "prepare", "text", "--source", str(path), "--output", "out"]
    limit = 2 << 30
    done = subprocess.run(
        command,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
    )
    assert done.returncode == 1 and "after line 3: a line of more than 536870912 bytes" in done.stderr
