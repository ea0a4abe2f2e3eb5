"""Documents made by workers: the same token files whatever their number, however the work is stopped."""

import hashlib
import os
import pickle
import re
import signal
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from landmark_cli.data import prepare as prepare_module
from landmark_cli.data import workers
from landmark_cli.data.corpora import Corpus
from landmark_cli.data.merge import Process
from landmark_cli.data.prepare import prepare
from landmark_cli.data.tasks.corpus import Haystack, hidden_in, tasks_corpus
from landmark_cli.data.tasks.kinds import KINDS
from landmark_cli.data.tasks.mixing import TokenHaystack
from landmark_cli.data.token_file import TokenFile
from landmark_cli.data.token_file_writer import TokenFileWriter
from landmark_cli.data.tokenizers import load_tokenizer
from landmark_cli.errors import LandmarkError, Stopped
from tests.awkward_tokenizers import byte_tokenizer
from tests.data.made import with_a_fault, with_bad_text

GPT2 = load_tokenizer("gpt2")
PROSE = " ".join(f"The barge of day {n} came down the river, and “nobody” saw it." for n in range(400))
KIND_NAMES = [kind.__name__ for kind, _ in KINDS]


def tasks(tokenizer=GPT2, documents=90, shortest=300, longest=500, **changes):
    """A corpus of tasks hidden in a text, which takes workers whatever its size; see `use`."""
    stacks = {split: Haystack(PROSE, tokenizer) for split in ("train", "validation")}
    settings = {"identity": 0, "absent": 0.1, "validation_share": 0.1, "seed": 3}
    given = settings | {"documents": documents, "shortest": shortest, "longest": longest} | changes
    return hidden_in(stacks, tokenizer, "prose", **given)


def use(monkeypatch, number):
    """Have so many workers make what is made."""
    monkeypatch.setattr(workers, "LEAST_BYTES", 1)
    monkeypatch.setattr(workers, "available_cores", lambda: number)
    started, plain = [], workers._Worker.begin

    def begin(worker, share, data):
        started.append(share)
        plain(worker, share, data)

    monkeypatch.setattr(workers._Worker, "begin", begin)
    return started


def contents(directory):
    names = [f"{split}{of}.bin" for split in ("train", "validation") for of in ("", ".loss")]
    return [(directory / name).read_bytes() for name in names]


def ended(before):
    """Whether all child processes are gone but those that were there before."""
    return set(psutil.Process().children()) <= set(before)


@pytest.fixture
def children():
    return psutil.Process().children()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What one process makes."""
    output = tmp_path_factory.mktemp("whole")
    prepare(tasks(), GPT2, output)
    return contents(output)


# Of versions before there were workers, and of the kinds that they had. Whoever changes what documents hold counts
# `CONTENTS` of data/tasks/corpus.py up, and records these anew.
DOCUMENTS = {0: "db38b5950771ea95", 5: "b116f8c5bb8d84b0"}


@pytest.mark.parametrize("seed", DOCUMENTS)
def test_documents_are_those_of_earlier_versions(seed):
    corpus = tasks_corpus(
        GPT2, documents=60, shortest=300, longest=3000, kinds=KIND_NAMES[:9], validation_share=0.1, seed=seed
    )
    found = hashlib.sha256()
    for split, document in corpus.documents():
        (piece,) = document.pieces(1 << 20)
        found.update(f"{split} {piece.answers} ".encode() + piece)
    assert found.hexdigest()[:16] == DOCUMENTS[seed]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_the_same_files_by_any_number_of_workers(whole, tmp_path, monkeypatch, number, children):
    shares = use(monkeypatch, number)
    prepare(tasks(), GPT2, tmp_path)
    assert contents(tmp_path) == whole
    assert [share.process for share in shares] == [Process(n, number) for n in range(number) if number > 1]
    assert ended(children) and not list(tmp_path.glob("*.partial"))


def test_processes_of_a_launch_have_workers_of_their_own(whole, tmp_path, monkeypatch):
    shares = use(monkeypatch, 2)
    for rank in (2, 1, 0):
        prepare(tasks(), GPT2, tmp_path, process=Process(rank, 3))
    assert contents(tmp_path) == whole
    assert sorted(share.process.rank for share in shares) == list(range(6))


def test_the_cores_are_shared_among_the_processes_of_a_machine(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(32)), raising=False)
    much = 1 << 40
    assert workers.how_many(tasks(), much) == 8
    given = workers._environment(8)
    assert given["LOCAL_WORLD_SIZE"] == "32" and given["TOKENIZERS_PARALLELISM"] == "false"


def test_tokenizers_of_transformers_work_in_workers(tmp_path, monkeypatch):
    byte_tokenizer(adds="<s> $A </s>", dropout=0.5, cut=7).save_pretrained(tmp_path / "bytes")
    tokenizer = load_tokenizer(str(tmp_path / "bytes"))
    made = {"shortest": 2000, "longest": 3000, "documents": 40}
    prepare(tasks(tokenizer, **made), tokenizer, tmp_path / "here")
    shares = use(monkeypatch, 2)
    prepare(tasks(tokenizer, **made), tokenizer, tmp_path / "workers")
    assert len(shares) == 2 and contents(tmp_path / "workers") == contents(tmp_path / "here")


def test_a_tokenizer_with_python_in_it_works_here(whole, tmp_path, monkeypatch):
    class Own(type(GPT2)):
        def __reduce__(self):
            raise TypeError("holds what cannot be handed on")

    shares = use(monkeypatch, 2)
    prepare(tasks(Own()), Own(), tmp_path)
    assert not shares and contents(tmp_path) == whole


class OfTheMainScript(type(GPT2)):
    """A worker knows nothing of who defined it, as of what stands in a script or a notebook."""

    def __reduce__(self):
        return OfTheMainScript, ()


OfTheMainScript.__module__ = "__main__"


@pytest.mark.parametrize(
    ("executable", "why"),
    [
        ("/not/there/python", r"none could be started beside it \(No such file"),
        ("/bin/true", r"one beside it ended at once \(exit code 0\)"),
        (None, r"cannot read what it is handed \(AttributeError: .*OfTheMainScript"),
    ],
)
def test_where_workers_cannot_begin_documents_are_made_here(
    whole, tmp_path, monkeypatch, capsys, children, executable, why
):
    tokenizer = GPT2
    if executable is None:
        tokenizer = OfTheMainScript()
        monkeypatch.setattr(sys.modules["__main__"], "OfTheMainScript", OfTheMainScript, raising=False)
    else:
        monkeypatch.setattr(sys, "executable", executable)
    use(monkeypatch, 2)
    prepare(tasks(tokenizer), tokenizer, tmp_path)
    said = " ".join(capsys.readouterr().err.split())
    assert contents(tmp_path) == whole and ended(children)
    assert re.search(f"this process alone makes the documents, one after the other: .*{why}", said)


def test_a_tokenizer_that_reads_otherwise_in_a_worker_works_here(tmp_path, monkeypatch, capsys, children):
    byte_tokenizer().save_pretrained(tmp_path / "bytes")
    tokenizer = load_tokenizer(str(tmp_path / "bytes"))
    prepare(tasks(tokenizer), tokenizer, tmp_path / "here")
    plain = pickle.dumps
    shares = use(monkeypatch, 2)
    # What a worker is handed has another tokenizer in it.
    monkeypatch.setattr(
        workers.pickle, "dumps", lambda value: plain((value[0], GPT2) if isinstance(value, tuple) else value)
    )
    prepare(tasks(tokenizer), tokenizer, tmp_path / "workers")
    assert len(shares) == 2 and contents(tmp_path / "workers") == contents(tmp_path / "here") and ended(children)
    assert "gives other ids in one beside it" in " ".join(capsys.readouterr().err.split())


def test_little_work_takes_no_workers(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "available_cores", lambda: 64)
    monkeypatch.setattr(workers, "_Worker", None)
    prepare(tasks(), GPT2, tmp_path)
    assert contents(tmp_path) == whole
    each = workers.LEAST_BYTES
    counts = [workers.how_many(tasks(), left) for left in (0, 2 * each - 1, 2 * each, 5 * each, 1000 * each)]
    assert counts == [0, 0, 2, 5, workers.MOST]
    monkeypatch.setattr(workers, "available_cores", lambda: 1)
    assert workers.how_many(tasks(), 1000 * each) == 0
    read = Corpus("text", "files", lambda: iter(()), None, 0)
    monkeypatch.setattr(workers, "available_cores", lambda: 64)
    assert workers.how_many(read, 1000 * each) == 0


def test_what_many_workers_would_hold_is_bounded(monkeypatch):
    corpus = tasks()
    data, number = workers.handed(corpus, GPT2, 8)
    assert number == 8
    monkeypatch.setattr(workers, "MOST_HANDED", 3 * len(data))
    assert workers.handed(corpus, GPT2, 8)[1] == 3
    monkeypatch.setattr(workers, "MOST_HANDED", len(data))
    assert workers.handed(corpus, GPT2, 8)[1] == 0


def during(monkeypatch, batches, act):
    """Do something once so many batches are written, each of whose places is noted."""
    monkeypatch.setattr(prepare_module, "CHECKPOINT_SECONDS", 0.0)
    plain, written = prepare_module._Part._write, []

    def write(part, *batch):
        plain(part, *batch)
        written.append(batch)
        if len(written) == batches:
            act()

    monkeypatch.setattr(prepare_module._Part, "_write", write)


def signal_all(before, number):
    """As who stops a job stops it: this process and its workers."""
    for child in set(psutil.Process().children()) - set(before):
        child.send_signal(number)
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_keeps_the_place(whole, tmp_path, monkeypatch, capsys, number, children):
    with monkeypatch.context() as patch:
        use(patch, 2)
        during(patch, 3, lambda: signal_all(children, number))
        with pytest.raises(Stopped, match="run the same command again to go on") as stopped:
            prepare(tasks(), GPT2, tmp_path)
    assert stopped.value.exit_code == 128 + number
    assert ended(children) and not (tmp_path / "train.json").exists()
    use(monkeypatch, 3)
    prepare(tasks(), GPT2, tmp_path)
    assert "going on after the first" in capsys.readouterr().err
    assert contents(tmp_path) == whole


def test_going_on_in_the_middle_of_a_turn(whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "BATCH_DOCUMENTS", 7)
        during(patch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Stopped):
            prepare(tasks(), GPT2, tmp_path)
    shares = use(monkeypatch, 2)
    prepare(tasks(), GPT2, tmp_path)
    assert {share.first for share in shares} == {21} and contents(tmp_path) == whole


def test_a_worker_that_is_killed(whole, tmp_path, monkeypatch, children):
    def kill():
        for child in set(psutil.Process().children()) - set(children):
            child.kill()

    with monkeypatch.context() as patch:
        use(patch, 2)
        during(patch, 2, kill)
        with pytest.raises(LandmarkError, match=r"(?s)ended in the middle of it \(signal SIGKILL\).*go on"):
            # More than the pipes hold.
            prepare(tasks(documents=2000), GPT2, tmp_path)
    assert ended(children)
    prepare(tasks(), GPT2, tmp_path / "again")
    assert contents(tmp_path / "again") == whole


def test_an_error_is_the_same_as_without_workers(tmp_path, monkeypatch, children):
    said = []
    for number in (1, 2):
        use(monkeypatch, number)
        with pytest.raises(LandmarkError, match="no task fits into a document of .*: make --shortest larger") as error:
            prepare(tasks(shortest=40, longest=60), GPT2, tmp_path / str(number))
        said.append(str(error.value))
    assert said[0] == said[1] and ended(children)


def test_a_fault_of_the_program_shows_where_it_is(tmp_path, monkeypatch, children):
    use(monkeypatch, 2)
    with pytest.raises(RuntimeError, match=r"(?s)in a process that makes documents:.*with_a_fault.*ZeroDivisionError"):
        prepare(Corpus("mine", "mine", with_a_fault, 100, 0, is_made=True), GPT2, tmp_path)
    assert ended(children)


def test_bad_text_is_left_out_as_without_workers(tmp_path, monkeypatch):
    corpus = Corpus("mine", "mine", with_bad_text, 100, 0, is_made=True)
    found = {}
    for number in (1, 2):
        shares = use(monkeypatch, number)
        made = prepare(corpus, GPT2, tmp_path / str(number), skip_bad_text=True)["train"]
        found[number] = made.sha256, made.documents, made.left_out
        with pytest.raises(LandmarkError, match="5: no text; `landmark prepare --on-bad-text skip`"):
            prepare(corpus, GPT2, tmp_path / f"not{number}")
    assert len(shares) == 4 and found[1] == found[2] and found[1][1] == 38


def test_a_haystack_of_token_files_is_handed_on_by_name(tmp_path):
    with TokenFileWriter(tmp_path / "train.bin", GPT2, source="prose", answers=True) as writer:
        ids = np.array(GPT2.encode(PROSE))
        writer.add_document(ids, len(PROSE), np.arange(len(ids), dtype=np.uint8) % 2)
    file = TokenFile.open(tmp_path / "train.bin")
    data, _ = workers.handed(tasks(), GPT2, 2)
    stack = TokenHaystack([file], GPT2)
    given = workers.pickle.dumps(stack)
    assert len(given) < 4000 < len(file.tokens) and len(data) > len(PROSE)
    again = workers.pickle.loads(given)
    assert again.slice(0.3, 500) == stack.slice(0.3, 500)
    mapped = again._files[0]
    assert isinstance(mapped.tokens, np.memmap) and mapped.path == Path(tmp_path / "train.bin")
    assert (mapped.answers == file.answers).all() and mapped.metadata == file.metadata
