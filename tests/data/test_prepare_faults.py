"""What may go wrong on the way to token files: text that is bad, bytes that flip between two runs, options without a
meaning, signals."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from landmark_cli import cli
from landmark_cli.commands.prepare import PrepareOptions, find_corpus
from landmark_cli.commands.prepare import run as run_command
from landmark_cli.data import prepare as prepare_module
from landmark_cli.data.corpora import open_corpus
from landmark_cli.data.merge import Process
from landmark_cli.data.prepare import prepare
from landmark_cli.data.token_file import TokenFile
from landmark_cli.data.tokenizers import load_tokenizer
from landmark_cli.errors import LandmarkError, Stopped, UsageError
from landmark_cli.file_writing import write_sealed
from tests.data.texts import documents_in, json_lines, packed, write, write_parquet

DAMAGED = Path(__file__).parent / "damaged"


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare_module, "CHECKPOINT_SECONDS", 0.0)
    return tmp_path


def corpus(*sources, **settings):
    return open_corpus("text", [str(source) for source in sources], **{"validation_share": 0.0} | settings)


class Slowly:
    """A tokenizer that takes little text at a time and, after some batches, fails."""

    piece_bytes = batch_bytes = 2000

    def __init__(self, tokenizer, batches=10**9):
        self._tokenizer, self.left = tokenizer, batches

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def encode_documents(self, documents):
        self.left -= 1
        if self.left < 0:
            raise ZeroDivisionError
        return self._tokenizer.encode_documents(documents)


def documents(split="out/train"):
    opened = TokenFile.open(split)
    tokenizer = load_tokenizer("gpt2")
    return [tokenizer.decode(document) for document in documents_in(opened)]


@pytest.fixture
def mixed(tmp_path):
    """A folder of ten files: 400 good documents, 8 that are bad, a file that is cut and one that is damaged."""
    rows = [{"text": f"row {i}"} for i in range(100)]
    root = tmp_path / "mixed"
    for i in range(4):
        write_parquet(root / f"a{i}.parquet", rows)
    write_parquet(root / "b.parquet", [{"text": ["no", "text"]}] * 5)
    write(root / "c.jsonl", json_lines([rows[0], {"text": 5}, ["x"]]) + b"{\n" + json_lines([rows[1]]))
    write(root / "d.jsonl.zst", packed(".zst", json_lines(rows))[:-20])
    write(root / "e.jsonl.gz", (DAMAGED / "bad.jsonl.gz").read_bytes())
    return root


def test_skipping_keeps_all_that_is_good_and_counts_what_is_lost(gpt2, mixed, capsys):
    with pytest.raises(LandmarkError, match=r"b\.parquet: the column 'text' holds no text .*--on-bad-text skip"):
        prepare(corpus(mixed), gpt2, Path("out"))
    metadata = prepare(corpus(mixed), gpt2, Path("out"), skip_bad_text=True)["train"]
    expected = [f"row {i}" for i in range(100)]
    assert documents() == [*expected * 4, "row 0", "row 1", *expected[:50]]
    lost = {Path(file).name: (losses.documents, losses.damaged) for file, losses in metadata.left_out.files.items()}
    assert lost == {"b.parquet": (5, False), "c.jsonl": (3, False), "d.jsonl.zst": (0, True), "e.jsonl.gz": (0, True)}
    said = capsys.readouterr().err
    assert "warning: 8 documents were left out" in said and "the rest of 2 damaged files is lost" in said
    for name, place in (("c.jsonl", ":2: "), ("d.jsonl.zst", ": cut or damaged after line 50")):
        assert f"left out {mixed / name}{place}" in said
    assert said.count("left out ") == len(lost)


def test_losses_are_told_again_and_no_run_that_would_stop_takes_them(gpt2, mixed, capsys):
    first = prepare(corpus(mixed), gpt2, Path("out"), skip_bad_text=True)
    capsys.readouterr()
    assert prepare(corpus(mixed), gpt2, Path("out"), skip_bad_text=True)["train"].sha256 == first["train"].sha256
    assert "8 documents were left out" in capsys.readouterr().err
    with pytest.raises(LandmarkError, match=r"b\.parquet: the column"):
        prepare(corpus(mixed), gpt2, Path("out"))


def test_losses_before_an_interruption_stop_a_run_that_would_stop(gpt2, mixed):
    for path in mixed.glob("a*"):
        path.unlink()
    with pytest.raises(ZeroDivisionError):
        one_each = Slowly(gpt2, 3)
        one_each.batch_bytes = 1
        prepare(corpus(mixed), one_each, Path("out"), skip_bad_text=True)
    assert json.loads(Path("out/prepare.json.partial").read_text())["left_out"]["files"]
    with pytest.raises(LandmarkError, match=r"b\.parquet: the column .*--on-bad-text skip"):
        prepare(corpus(mixed), gpt2, Path("out"))
    metadata = prepare(corpus(mixed), gpt2, Path("out"), skip_bad_text=True)["train"]
    assert metadata.documents == 52 and metadata.left_out.documents == 8


@pytest.mark.parametrize("count", [2, 3])
def test_losses_of_several_processes_are_those_of_one(gpt2, mixed, count, capsys):
    alone = prepare(corpus(mixed), gpt2, Path("alone"), skip_bad_text=True)
    for rank in range(1, count):
        prepare(corpus(mixed), gpt2, Path("out"), skip_bad_text=True, process=Process(rank, count))
    capsys.readouterr()
    together = prepare(corpus(mixed), gpt2, Path("out"), skip_bad_text=True, process=Process(0, count))
    for metadata in (alone, together):
        assert metadata["train"].left_out.documents == 8
        assert sum(losses.damaged for losses in metadata["train"].left_out.files.values()) == 2
    assert together["train"].sha256 == alone["train"].sha256
    assert "8 documents were left out" in capsys.readouterr().err


NOTHING = {
    "a json array": ({"a.jsonl": json.dumps([{"text": "x"}] * 40, indent=1)}, "none of it is good; .*JSON array"),
    "empty files": ({"a.txt": "", "b.txt": "", "sub/c.md": ""}, "all of its documents are empty"),
    "an empty file": ({"a.txt": ""}, "empty"),
    "no lines": ({"a.jsonl": ""}, "it holds no documents"),
    "one row": ({"a.jsonl": '{"text": "x"}'}, "all of it became validation text .*--validation-share"),
    "one good row": (
        {"a.jsonl": '{"text": "x"}\n{'},
        "what is good of it became text of other splits .*jsonl:2: not JSON",
    ),
    "a cut archive": ({"a.jsonl.gz": packed(".gz", b'{"text": "x"}\n')[:20]}, "none of it is good; .*a.jsonl.gz"),
}


@pytest.mark.parametrize("name", NOTHING)
def test_why_there_is_nothing_to_train_on(gpt2, tmp_path, name, capsys):
    files, why = NOTHING[name]
    for file, content in files.items():
        write(tmp_path / "in" / file, content)
    with pytest.raises(LandmarkError, match=f"no text to train on in .*: .*{why}"):
        prepare(corpus("in", validation_share=0.01), gpt2, Path("out"), skip_bad_text=True)
    assert list(Path("out").iterdir()) == []
    # However many there are, the first of a file is told, and their number.
    assert capsys.readouterr().err.count("left out in/") <= 1


@pytest.fixture
def books(tmp_path):
    """39 books to train on, one for validation, six for testing."""
    for i in range(46):
        split = "validation" if i == 39 else "test" if i > 39 else "train"
        write(tmp_path / f"books/{split}/{i:02}.txt", f"Book {i}. " + "And so on. " * (60 + i))
    return tmp_path / "books"


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at * len(data) // 4 if at < 4 else -1] ^= 1
    path.write_bytes(bytes(data))


FLIPPED = ["train.bin", "validation.bin", "prepare.json"]


@pytest.mark.parametrize("at", [0, 2, 4])
@pytest.mark.parametrize("file", [*FLIPPED, "turns"])
def test_bytes_that_flip_between_a_kill_and_the_next_run_are_noticed(gpt2, books, file, at, capsys):
    """Of every file that a run goes on with, at its beginning, its end and between: what comes of it is as it was."""
    process = Process(0, 2) if file == "turns" else Process()
    expected = prepare(corpus(books), gpt2, Path("expected"))
    with pytest.raises(ZeroDivisionError):
        prepare(corpus(books), Slowly(gpt2, 16 if file == "validation.bin" else 8), Path("out"), process=process)
    # As far as the place that was noted; what lies behind it is written again anyway.
    noted = json.loads((process.state_file(Path("out"))).read_text())
    sizes = {"turns": noted["turns"]}
    for split, written in noted["splits"].items():
        sizes[f"{split}.bin"] = written["tokens"] * 2
    path = Path("out") / (file + process.suffix)
    if file in sizes:
        os.truncate(path, sizes[file])
    flip(path, at)
    if process.count > 1:
        prepare(corpus(books), gpt2, Path("out"), process=Process(1, 2))
    capsys.readouterr()
    written = prepare(corpus(books), gpt2, Path("out"), process=process)
    said = capsys.readouterr().err
    assert f"{path} " in said and "preparing from the first document on" in said
    assert {split: m.sha256 for split, m in written.items()} == {split: m.sha256 for split, m in expected.items()}


@pytest.mark.parametrize("count", [1, 2])
def test_a_preparation_that_an_earlier_version_began_goes_on(gpt2, books, count, capsys):
    """It kept the places of the documents in files of their own, whose hash it noted too."""
    expected = prepare(corpus(books), gpt2, Path("expected"))
    first = Process(0, count)
    with pytest.raises(ZeroDivisionError):
        prepare(corpus(books), Slowly(gpt2, 8), Path("out"), process=first)
    noted = json.loads(first.state_file(Path("out")).read_text())
    del noted["checksum"]
    for split, written in noted["splits"].items():
        ids = np.fromfile(f"out/{split}.bin{first.suffix}", dtype="<u2", count=written["tokens"])
        offsets = np.array([0, *np.flatnonzero(ids == gpt2.eot_id) + 1], dtype="<i8").tobytes()
        Path(f"out/{split}.offsets{first.suffix}").write_bytes(offsets)
        written["offsets_sha256"] = hashlib.sha256(offsets).hexdigest()
    write_sealed(first.state_file(Path("out")), noted)
    if count > 1:
        prepare(corpus(books), gpt2, Path("out"), process=Process(1, count))
    capsys.readouterr()
    written = prepare(corpus(books), gpt2, Path("out"), process=first)
    assert f"going on after the first {noted['next_document']} documents" in capsys.readouterr().err
    assert {split: m.sha256 for split, m in written.items()} == {split: m.sha256 for split, m in expected.items()}
    assert {file.name for file in Path("out").iterdir()} == {file.name for file in Path("expected").iterdir()}


@pytest.mark.parametrize("file", ["train.bin", "turns", "prepare.json"])
def test_bytes_that_flip_in_the_part_of_another_process_are_noticed(gpt2, books, file, monkeypatch):
    prepare(corpus(books), gpt2, Path("out"), process=Process(1, 2))
    path = Path("out") / (file + Process(1, 2).suffix)
    before = path.read_bytes()
    flip(path, 2)
    if file == "prepare.json":
        # It is as good as none: the first process would wait for a better one.
        monkeypatch.setattr("landmark_cli.data.merge.time.sleep", lambda seconds: path.write_bytes(before))
        assert prepare(corpus(books), gpt2, Path("out"), process=Process(0, 2))
        return
    with pytest.raises(LandmarkError, match=f"{path} is not what had been written to it"):
        prepare(corpus(books), gpt2, Path("out"), process=Process(0, 2))


def test_a_finished_file_that_changed_is_made_again(gpt2, books, capsys, monkeypatch):
    expected = prepare(corpus(books), gpt2, Path("out"))["train"]
    # Even where nothing shows it: the time of writing is as it was, and the file counts as a large one.
    monkeypatch.setattr("landmark_cli.data.token_file.ALWAYS_CHECKED_BYTES", 0)
    before = Path("out/train.bin").stat().st_mtime_ns
    flip(Path("out/train.bin"), 2)
    os.utime("out/train.bin", ns=(before, before))
    assert prepare(corpus(books), gpt2, Path("out"))["train"].sha256 == expected.sha256
    assert "making the token files again: out/train.bin was truncated or changed" in capsys.readouterr().err
    TokenFile.open("out/train", verify=True)


def test_the_sample_obeys_options():
    def titles(**options):
        found = {"train": [], "validation": []}
        for split, document in find_corpus(PrepareOptions("sample", **options), None).documents():
            found[split].append(document.name)
        return found

    others = ["emma", "mansfieldpark", "northangerabbey", "prideprejudice", "sensesensibility"]
    assert titles() == {"train": others, "validation": ["persuasion"]}
    assert titles(max_documents=2) == {"train": others[:2], "validation": ["persuasion"]}
    assert titles(validation_share=0.0) == {"train": sorted([*others, "persuasion"]), "validation": []}
    assert titles(validation_share=0.3) == {"train": others[1:], "validation": ["persuasion", others[0]]}
    assert titles(validation_share=0.3, max_documents=1) == {"train": others[1:2], "validation": ["persuasion"]}


IDLE = [
    ("sample", {"source": ["x"]}, "--source means nothing for sample: .*landmark prepare text"),
    ("sample", {"revision": "x"}, "--revision means nothing for sample"),
    ("sample", {"subset": "x"}, "--subset means nothing for sample"),
    ("sample", {"text_field": "x"}, "--text-field means nothing for sample"),
    ("sample", {"longest": 5000}, "--longest means nothing for sample: it is for passkey"),
    ("text", {"shortest": 300}, "--shortest means nothing for text: it is for passkey"),
    ("text", {"seed": 1}, "--seed means nothing for text: it is for passkey"),
    ("passkey", {"source": ["x"]}, "--source means nothing for passkey: passkey makes its documents itself"),
    ("passkey", {"text_field": "x"}, "--text-field means nothing for passkey"),
    ("passkey", {"revision": "x"}, "--revision means nothing for passkey"),
    ("passkey", {"subset": "x"}, "--subset means nothing for passkey"),
    ("passkey", {"haystack": ["x"]}, "--haystack means nothing for passkey: it is for tasks"),
    ("text", {"absent": 0.2}, "--absent means nothing for text: it is for tasks"),
    ("tasks", {"source": ["x"]}, "--source means nothing for tasks: tasks makes its documents itself, of --haystack"),
    ("tasks", {"revision": "x"}, "--revision means nothing for tasks"),
    ("tasks", {"text_field": "x"}, "--text-field means nothing for tasks: it is for --haystack"),
    ("text", {"source": ["books"], "text_field": "x"}, "--text-field is for .jsonl and .parquet, and books is plain"),
    ("text", {"source": ["books"], "validation_share": 0.1}, "books has a validation split of its own"),
    ("text", {"source": ["books"], "subset": "x"}, "--revision and --subset are for copies on the hub"),
]


@pytest.mark.parametrize(
    ("name", "options", "message"), IDLE, ids=lambda value: value if isinstance(value, str) else ""
)
def test_options_that_would_change_nothing_are_refused(books, name, options, message):
    with pytest.raises(UsageError, match=message):
        run_command(PrepareOptions(name, output=Path("out"), **options))
    assert not Path("out").exists()


def test_a_cut_file_on_the_command_line(capsys):
    """Typer's own way with an EOFError would be one word, "Aborted."."""

    def landmark(*arguments):
        with pytest.raises(SystemExit) as ended:
            cli.main(["prepare", "text", "--source", str(DAMAGED / "trunc.jsonl.gz"), "--output", "out", *arguments])
        return ended.value.code, capsys.readouterr()

    for debug in ([], ["--debug"]):
        code, said = landmark(*debug)
        assert code == 1 and "error: " in said.err
        assert "trunc.jsonl.gz: cut or damaged after line 17: its compressed data end too early" in said.err
        assert ("Traceback" in said.err) == bool(debug)
    code, said = landmark("--on-bad-text", "skip", "--json", "-")
    data = json.loads(said.out)
    assert code == 0 and data["train"]["documents"] + data["validation"]["documents"] == 17
    [losses] = data["train"]["left_out"]["files"].values()
    assert losses["damaged"] and losses["documents"] == 0


SIGNALLED = """
    import os, sys, time
    from landmark_cli import cli
    from landmark_cli.data import prepare
    from landmark_cli.data.gpt2_tokenizer import GPT2Tokenizer

    plain, GPT2Tokenizer.piece_bytes, GPT2Tokenizer.batch_bytes = GPT2Tokenizer.encode_documents, 2000, 2000
    prepare.CHECKPOINT_SECONDS = {seconds}
    batches = 0

    def encode_documents(self, documents):
        global batches
        batches += 1
        if batches == 6:
            print("ready", flush=True)
        time.sleep(0.05)
        return plain(self, documents)

    GPT2Tokenizer.encode_documents = encode_documents
    cli.main(["prepare", "text", "--source", "books", "--output", "out"])
"""


@pytest.mark.parametrize(
    ("number", "seconds"), [(signal.SIGINT, 0.0), (signal.SIGTERM, 1e9)], ids=["noting often", "noting at the end only"]
)
def test_a_signal_keeps_the_place(gpt2, books, number, seconds, capsys):
    expected = prepare(corpus(books, validation_share=0.01), gpt2, Path("expected"))
    program = [sys.executable, "-c", textwrap.dedent(SIGNALLED.format(seconds=seconds))]
    environment = os.environ | {"PYTHONPATH": str(Path(prepare_module.__file__).parents[2])}
    process = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert f"{number.name}: noting the place; once more stops at once" in said
    assert "run the same command again to go on" in said and "error" not in said
    done = json.loads(Path("out/prepare.json.partial").read_text())["next_document"]
    assert 1 <= done < 40
    capsys.readouterr()
    written = prepare(corpus("books", validation_share=0.01), gpt2, Path("out"))
    assert f"going on after the first {done} documents" in capsys.readouterr().err
    assert {split: m.sha256 for split, m in written.items()} == {split: m.sha256 for split, m in expected.items()}


def test_a_second_signal_stops_at_once(books):
    code = SIGNALLED.format(seconds=0.0).replace("time.sleep(0.05)", "time.sleep(0.05 if batches < 6 else 600)")
    environment = os.environ | {"PYTHONPATH": str(Path(prepare_module.__file__).parents[2])}
    environment.pop("LOCAL_RANK", None)
    program = [sys.executable, "-c", textwrap.dedent(code)]
    process = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    while "SIGTERM: noting the place" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 143
    assert not Path("out/train.json").exists()


def test_the_first_process_stops_while_it_waits_for_the_others(gpt2, books, monkeypatch):
    def kill(seconds):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("landmark_cli.data.merge.time.sleep", kill)
    with pytest.raises(Stopped, match="run the same command again") as stopped:
        prepare(corpus(books), gpt2, Path("out"), process=Process(0, 2))
    assert stopped.value.exit_code == 143
    prepare(corpus(books), gpt2, Path("out"), process=Process(1, 2))
    assert prepare(corpus(books), gpt2, Path("out"), process=Process(0, 2))["train"].documents == 39
