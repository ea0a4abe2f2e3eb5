"""Documents -> token files: the same files however the work is cut up, interrupted or shared."""

import errno
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest

from landmark_cli.commands.prepare import PrepareOptions
from landmark_cli.commands.prepare import run as run_command
from landmark_cli.data import prepare as prepare_module
from landmark_cli.data.assets import ASSETS
from landmark_cli.data.corpora import open_corpus
from landmark_cli.data.merge import Process
from landmark_cli.data.prepare import prepare
from landmark_cli.data.token_file import TokenFile
from landmark_cli.data.token_file_writer import TokenFileWriter
from landmark_cli.data.tokenizers import load_tokenizer
from landmark_cli.errors import LandmarkError
from landmark_cli.locks import sole_writer
from tests.data.texts import documents_in


@pytest.fixture(scope="module")
def books(tmp_path_factory):
    """PG19's layout: 40 short "books" out of Jane Austen, some of them empty."""
    root = tmp_path_factory.mktemp("books")
    with tarfile.open(ASSETS / "austen.tar.xz") as archive:
        text = archive.extractfile("emma.txt").read().decode()
    for number in range(40):
        split = {38: "validation", 39: "test"}.get(number, "train")
        (root / split).mkdir(exist_ok=True)
        size = 0 if number % 10 == 7 else 3000 + 97 * number
        (root / split / f"{number:02}.txt").write_text(text[number * 9000 :][:size], encoding="utf-8", newline="")
    return root


def run(root, output, tokenizer, **settings):
    return prepare(open_corpus("pg19", [str(root)]), tokenizer, output, **settings)


@pytest.fixture(scope="module")
def expected(books, gpt2, tmp_path_factory):
    """What comes of the books in one go."""
    return run(books, tmp_path_factory.mktemp("expected"), gpt2)


def same(written, expected):
    def hashes(files):
        return {split: (m.sha256, m.documents, m.text_bytes) for split, m in files.items()}

    assert hashes(written) == hashes(expected)


def test_every_document_is_there_with_its_end_of_text(books, gpt2, tmp_path):
    written = run(books, tmp_path, gpt2)
    assert list(written) == ["train", "validation", "test"]
    for split, metadata in written.items():
        opened = TokenFile.open(tmp_path / f"{split}.bin")
        texts = [file.read_bytes().decode() for file in sorted((books / split).iterdir())]
        texts = [text for text in texts if text]
        assert documents_in(opened) == [list(gpt2.encode(text)) for text in texts]
        assert metadata.documents == len(texts) and opened.tokens[-1] == metadata.eot_id == 50256
        assert metadata.text_bytes == sum(len(text.encode()) for text in texts)
        assert (metadata.tokenizer, metadata.vocab_size, metadata.dtype) == ("gpt2", 50257, "uint16")
    names = [f"{split}{ending}" for split in written for ending in (".bin", ".json")]
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(names)


class InPieces:
    """A tokenizer that takes little text at a time."""

    def __init__(self, tokenizer, piece_bytes, batch_bytes=None):
        self._tokenizer, self.piece_bytes = tokenizer, piece_bytes
        self.batch_bytes = batch_bytes or piece_bytes

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)


@pytest.mark.parametrize(("piece", "batch"), [(500, 500), (2500, 2500), (20_000, 20_000), (700, 5000)])
def test_the_size_of_batches_and_pieces_does_not_show(books, gpt2, expected, tmp_path, piece, batch):
    same(run(books, tmp_path, InPieces(gpt2, piece, batch)), expected)


@pytest.mark.parametrize("count", [2, 3])
def test_several_processes_write_the_same_files(books, gpt2, expected, tmp_path, count):
    for rank in range(1, count):
        assert run(books, tmp_path, gpt2, process=Process(rank, count)) == {}
    same(run(books, tmp_path, InPieces(gpt2, 2500), process=Process(0, count)), expected)
    assert not list(tmp_path.glob("*partial*"))
    assert run(books, tmp_path, gpt2, process=Process(1, count)) == {}


@pytest.mark.parametrize("count", [1, 2])
def test_what_a_run_killed_at_its_very_end_left_is_removed(books, gpt2, expected, tmp_path, monkeypatch, count):
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "CHECKPOINT_SECONDS", 0.0)
        patch.setattr(prepare_module, "_remove_unfinished", lambda output: None)
        for rank in reversed(range(count)):
            run(books, tmp_path, gpt2, process=Process(rank, count))
    assert list(tmp_path.glob("*.partial"))
    with sole_writer(tmp_path):
        # Somebody is at work there.
        same(run(books, tmp_path, gpt2), expected)
    assert list(tmp_path.glob("*.partial"))
    same(run(books, tmp_path, gpt2), expected)
    assert not list(tmp_path.glob("*.partial"))


def test_processes_share_the_documents(books):
    taken = [[number for number in range(40) if Process(rank, 2).takes(number)] for rank in (0, 1)]
    assert taken == [[*range(16), *range(32, 40)], [*range(16, 32)]]


def test_prepared_once_it_is_not_done_again(books, gpt2, expected, tmp_path, monkeypatch, capsys):
    run(books, tmp_path, gpt2)
    with monkeypatch.context() as patch:
        patch.setattr(type(gpt2), "encode_documents", None)
        same(run(books, tmp_path, gpt2), expected)
    assert "already" in capsys.readouterr().err
    # A damaged file is no reason to leave it at that.
    with open(tmp_path / "train.bin", "ab") as file:
        file.write(b"xx")
    same(run(books, tmp_path, gpt2), expected)


def test_another_preparation_replaces_the_old_one_whole(books, gpt2, tmp_path):
    run(books, tmp_path, gpt2)
    (tmp_path / "text.txt").write_text("one line\nand another\n" * 50)
    prepare(open_corpus("text", [str(tmp_path / "text.txt")], validation_share=0), gpt2, tmp_path)
    assert [file.stem for file in tmp_path.glob("*.json")] == ["train"]
    assert TokenFile.open(tmp_path / "train.bin").metadata.documents == 1


class Interrupted(Exception):
    pass


def interrupt_after(tokenizer, batches):
    class Interrupting(InPieces):
        def encode_documents(self, documents):
            nonlocal batches
            batches -= 1
            if batches < 0:
                raise Interrupted
            return self._tokenizer.encode_documents(documents)

    return Interrupting(tokenizer, 2500)


@pytest.mark.parametrize("process", [Process(), Process(0, 2)], ids=["alone", "of two"])
def test_an_interrupted_run_goes_on_where_it_was(books, gpt2, expected, tmp_path, process, monkeypatch, capsys):
    monkeypatch.setattr(prepare_module, "CHECKPOINT_SECONDS", 0.0)
    for batches in (3, 9, 8):
        with pytest.raises(Interrupted):
            run(books, tmp_path, interrupt_after(gpt2, batches), process=process)
        assert not (tmp_path / "train.json").exists()
    assert "going on after the first" in capsys.readouterr().err
    if process.count > 1:
        run(books, tmp_path, gpt2, process=Process(1, 2))
    same(run(books, tmp_path, gpt2, process=process), expected)


def test_what_was_noted_but_is_gone_is_made_again(books, gpt2, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "CHECKPOINT_SECONDS", 0.0)
    with pytest.raises(Interrupted):
        run(books, tmp_path, interrupt_after(gpt2, 6))
    (tmp_path / "train.bin.partial").write_bytes(b"")
    same(run(books, tmp_path, gpt2), expected)


def test_a_changed_source_starts_anew(books, gpt2, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare_module, "CHECKPOINT_SECONDS", 0.0)
    with pytest.raises(Interrupted):
        run(books, tmp_path / "out", interrupt_after(gpt2, 6))
    corpus = open_corpus("pg19", [str(books)], max_documents=5)
    assert prepare(corpus, gpt2, tmp_path / "out")["train"].documents == 5
    assert "going on" not in capsys.readouterr().err


def write_files(root, **files):
    root.mkdir(exist_ok=True)
    for name, content in files.items():
        (root / f"{name}.txt").write_bytes(content)
    return root


def test_bad_text_stops_or_is_left_out(gpt2, tmp_path, capsys):
    root = write_files(tmp_path / "in", a=b"good", b=b"caf\xe9", c=b"fine " * 2000, d=b"fine " * 2000 + b"\xe9")
    corpus = open_corpus("text", [str(root)], validation_share=0)
    pieces = InPieces(gpt2, 1000)
    with pytest.raises(LandmarkError, match=r"b\.txt: not UTF-8 at byte 3 .*--on-bad-text skip"):
        prepare(corpus, pieces, tmp_path / "out")
    written = prepare(corpus, pieces, tmp_path / "out", skip_bad_text=True)
    assert written["train"].documents == 2 and written["train"].text_bytes == 4 + 10_000
    said = capsys.readouterr().err
    assert "b.txt" in said and "d.txt" in said and "2 documents were left out" in said


def test_what_other_processes_left_out_is_said_too(gpt2, tmp_path, capsys):
    root = write_files(tmp_path / "in", **{f"{n:02}": b"\xff" if n == 17 else b"x" for n in range(20)})
    corpus = open_corpus("text", [str(root)], validation_share=0)
    prepare(corpus, gpt2, tmp_path / "out", skip_bad_text=True, process=Process(1, 2))
    capsys.readouterr()
    written = prepare(corpus, gpt2, tmp_path / "out", skip_bad_text=True, process=Process(0, 2))
    assert written["train"].documents == 19 and "17.txt" in capsys.readouterr().err


@pytest.mark.parametrize(("share", "message"), [(0.0, "it holds no documents"), (0.5, "--validation-share")])
def test_a_corpus_without_text_is_refused(gpt2, tmp_path, share, message):
    (tmp_path / "rows.jsonl").write_text('{"text": "x"}\n' if share else "")
    corpus = open_corpus("text", [str(tmp_path / "rows.jsonl")], validation_share=share)
    with pytest.raises(LandmarkError, match=message):
        prepare(corpus, gpt2, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("number", "message"), [(errno.ENOSPC, "a disk that is full"), (errno.EIO, "cannot be written: no")]
)
def test_a_full_disk_is_named_and_what_was_written_is_gone_on_from(
    books, gpt2, expected, tmp_path, monkeypatch, number, message
):
    monkeypatch.setattr(prepare_module, "CHECKPOINT_SECONDS", 0.0)
    append = TokenFileWriter.append

    def full(self, ids, text_bytes=0, marks=None):
        if self.tokens > 5000:
            raise OSError(number, "no")
        append(self, ids, text_bytes, marks)

    with monkeypatch.context() as patch:
        patch.setattr(TokenFileWriter, "append", full)
        with pytest.raises(LandmarkError, match=message):
            run(books, tmp_path, InPieces(gpt2, 2500))
    same(run(books, tmp_path, gpt2), expected)


def test_a_large_vocabulary_takes_four_bytes_an_id(books, gpt2, tmp_path):
    large = InPieces(gpt2, 1 << 20)
    large.vocab_size, large.eot_id = 70_000, 69_999
    run(books, tmp_path, large)
    opened = TokenFile.open(tmp_path / "train.bin")
    assert opened.tokens.dtype == np.uint32 and opened.tokens[-1] == 69_999


def landmark(*arguments, cwd, **settings):
    command = [sys.executable, "-m", "landmark_cli", "prepare", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, **settings)


def test_the_command_without_options_prepares_the_sample(tmp_path):
    done = landmark("--json", "-", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "persuasion" in done.stderr and "MB/s" in done.stderr
    data = json.loads(done.stdout)
    assert {split: (m["documents"], m["tokens"]) for split, m in data.items()} == {
        "train": (5, 878254),
        "validation": (1, 115080),
    }
    opened = TokenFile.open(tmp_path / "data" / "sample" / "validation.bin")
    assert opened.tokens[:12].tolist() == GOLDEN_START
    assert load_tokenizer("gpt2").decode(documents_in(opened)[0]).count("Anne") > 400


GOLDEN_START = [30946, 84, 4247, 628, 198, 1525, 198, 198, 41083, 2517, 268, 198]


def test_a_tokenizer_of_transformers(books, expected, gpt2, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    gpt2.save_pretrained("tokenizer")
    run_command(PrepareOptions("pg19", [str(books)], tokenizer="tokenizer"))
    metadata = TokenFile.open("data/pg19/train.bin").metadata
    assert metadata.sha256 == expected["train"].sha256
    assert (metadata.tokenizer, metadata.vocab_size) == ("tokenizer", 50261)
    assert "validation.bin" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["text", "--source", "missing"], 1, "there is no file or folder missing"),
        (["pg19", "--source", "empty"], 1, "no documents in empty"),
        (["text"], 2, "--source"),
        (["novels"], 2, "novels"),
        (["text", "--source", "bad.txt"], 1, "bad.txt: not UTF-8 at byte 0"),
    ],
)
def test_mistakes_on_the_command_line(tmp_path, arguments, code, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    done = landmark(*arguments, cwd=tmp_path)
    assert done.returncode == code and message in done.stderr
    assert "Traceback" not in done.stderr


def test_killed_and_run_again_it_ends_in_the_same_files(books, gpt2, tmp_path):
    """SIGKILL at several places of a run that notes its place after every batch; then it is left to end."""
    (tmp_path / "slow.py").write_text(SLOW)
    command = [sys.executable, str(tmp_path / "slow.py"), str(books), str(tmp_path / "out")]
    reached = []
    for _ in range(3):
        process = subprocess.Popen(command)
        wait_for_progress(process, tmp_path / "out" / "prepare.json.partial", sum(reached[-1:]))
        process.send_signal(signal.SIGKILL)
        process.wait()
        reached.append(json.loads((tmp_path / "out" / "prepare.json.partial").read_text())["next_document"])
        with pytest.raises(LandmarkError, match="there is no token file"):
            TokenFile.open(tmp_path / "out" / "train.bin")
    assert reached == sorted(set(reached)) and reached[0] > 0
    written = run(books, tmp_path / "out", gpt2)
    same(written, run(books, tmp_path / "whole", gpt2))


SLOW = """
import sys, time
from pathlib import Path
from landmark_cli.data import prepare as module
from landmark_cli.data.corpora import open_corpus
from landmark_cli.data.gpt2_tokenizer import GPT2Tokenizer

class Slow(GPT2Tokenizer):
    piece_bytes = batch_bytes = 2500
    def encode_documents(self, documents):
        time.sleep(0.05)
        return super().encode_documents(documents)

module.CHECKPOINT_SECONDS = 0.0
module.prepare(open_corpus("pg19", [sys.argv[1]]), Slow(), Path(sys.argv[2]))
"""


def wait_for_progress(process: subprocess.Popen, state: Path, beyond: int) -> None:
    """Until the run has noted more documents than `beyond`."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if state.exists() and json.loads(state.read_text())["next_document"] > beyond:
            return
        time.sleep(0.02)
    raise AssertionError(f"ended ({process.poll()}) before it was killed")


def test_processes_of_a_launcher_write_the_same_files(books, expected, tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"]
    command += ["--main_process_port=0", "-m"]
    command += ["landmark_cli", "prepare", "pg19", "--source", str(books), "--output", "out"]
    settings = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(Path(prepare_module.__file__).parents[2])}
    done = subprocess.run(command, cwd=tmp_path, env=settings, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "putting the parts of 2 processes together" in done.stderr
    same({split: TokenFile.open(tmp_path / "out" / split).metadata for split in expected}, expected)
