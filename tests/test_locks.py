"""Nobody writes a directory that another command is writing, and a killed command stands in nobody's way."""

import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from landmark_cli.commands import finetune, prepare, study
from landmark_cli.data.corpora import open_corpus
from landmark_cli.data.merge import Process
from landmark_cli.data.prepare import prepare as write_token_files
from landmark_cli.data.token_file_writer import TokenFileWriter
from landmark_cli.data.tokenizers import load_tokenizer
from landmark_cli.errors import LandmarkError
from landmark_cli.locks import LOCK, sole_writer
from landmark_cli.models.gpt import GPTConfig, GPTForCausalLM
from landmark_cli.training.runs import _last_or_new
from landmark_cli.weight_diff import output as directories
from landmark_cli.weight_diff.output import MARKER
from tests.models.families import tiny_decoder, tiny_tokenizer
from tests.training import command
from tests.training.tiny import byte_tokenizer, write_corpus
from tests.weight_diff.weights import GOLDENS, make, recover

HOLDER = "import sys, pathlib; from landmark_cli.locks import sole_writer\n"
HOLDER += "with sole_writer(pathlib.Path(sys.argv[1]), sys.argv[2]): print('held', flush=True); sys.stdin.read()"
BUSY = "another landmark command is writing to .*: wait for it to end, or name another directory"


@contextmanager
def held_by_another_process(directory: Path, name: str = LOCK):
    """Held while the block runs, and then killed."""
    holder = [sys.executable, "-c", HOLDER, str(directory), name]
    process = subprocess.Popen(holder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=command.environment())
    assert process.stdout.readline() == b"held\n"
    yield
    process.kill()
    process.communicate()
    assert (directory / name).exists()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Text, a token file, and models to train, to measure and to take the difference of."""
    root = tmp_path_factory.mktemp("locks")
    write_corpus(root / "corpus", byte_tokenizer(root / "bytes"))
    (root / "cats.txt").write_text("the cats sat on the mats. " * 60)
    tiny_decoder("llama").save_pretrained(root / "base")
    tiny_tokenizer().save_pretrained(root / "base")
    gpt2 = load_tokenizer("gpt2")
    with TokenFileWriter(root / "validation.bin", gpt2, source="random ids") as writer:
        writer.add_document(np.random.default_rng(0).integers(0, 50000, 60))
    GPTForCausalLM(GPTConfig(n_layer=1, n_head=2, n_embd=8, landmark_freq=4, trained_length=40)).save_pretrained(
        root / "model"
    )
    gpt2.save_pretrained(root / "model")
    rows = "rows: [{role: model, eval-length: 40}]"
    (root / "small.yaml").write_text(f"study: perplexity\nroles: {{model: any}}\n{rows}\n")
    return root


def run_prepare(place, output):
    prepare.run(prepare.PrepareOptions("text", [str(place / "cats.txt")], output, validation_share=0))


def run_train(place, output, **changes):
    command.train(place / "corpus", output, **{"steps": 1, "eval_every": 0, **changes})


def run_finetune(place, output, **changes):
    options = {"model": str(place / "base"), "data": [str(place / "cats.txt")], "steps": 1, "batch_size": 1}
    shape = {"landmark_freq": 7, "sequence_length": 32, "accumulation": 1, "eval_every": 0, "device": "cpu"}
    shape |= {"eval_ruler": "none"}
    finetune.run(finetune.FinetuneOptions(output=output, **options, **shape, **changes))


def run_study(place, output):
    settings = {"study": str(place / "small.yaml"), "role": [f"model={place / 'model'}"], "device": "cpu"}
    study.run(study.StudyOptions(**settings, data=place / "validation.bin", output=output))


def run_make(place, output, **options):
    make(GOLDENS / "raw", GOLDENS / "tuned", output, **options)


def run_recover(place, output):
    recover(GOLDENS / "raw", GOLDENS / "diff", output)


# How a command is run, and what it holds, seen from the directory that it writes.
PLACES = {
    "prepare": (run_prepare, ".", LOCK),
    "train": (run_train, ".", LOCK),
    "finetune": (run_finetune, ".", LOCK),
    "eval study": (run_study, ".", LOCK),
    "weight-diff make": (run_make, "../out.unfinished", MARKER),
    "weight-diff recover": (run_recover, "../out.unfinished", MARKER),
}


@pytest.mark.parametrize("name", PLACES)
def test_a_directory_has_one_writer(place, tmp_path, name):
    run, held, file = PLACES[name]
    output = tmp_path / "out"
    with held_by_another_process((output / held).resolve(), file):
        with pytest.raises(LandmarkError, match=BUSY):
            run(place, output)
    run(place, output)
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert not {LOCK, MARKER} & {path.name for path in output.iterdir()}


@pytest.mark.parametrize("run", [run_train, run_finetune])
def test_a_run_is_not_resumed_beside_itself(place, tmp_path, run):
    run(place, tmp_path)
    with held_by_another_process(tmp_path), pytest.raises(LandmarkError, match=BUSY):
        run(place, tmp_path, resume=True)
    run(place, tmp_path, resume=True)


def test_a_directory_being_written_is_not_replaced(place, tmp_path):
    run_make(place, tmp_path / "out")
    with held_by_another_process(tmp_path / "out"), pytest.raises(LandmarkError, match=BUSY):
        run_make(place, tmp_path / "out", overwrite=True)
    run_make(place, tmp_path / "out", overwrite=True)


def test_a_difference_written_meanwhile_is_not_replaced(place, tmp_path, monkeypatch):
    claim = directories._claim

    def late(staging, *arguments):
        monkeypatch.setattr(directories, "_claim", claim)
        run_make(place, tmp_path / "out")
        claim(staging, *arguments)

    monkeypatch.setattr(directories, "_claim", late)
    with pytest.raises(LandmarkError, match="the directory is not empty; --overwrite replaces it"):
        run_make(place, tmp_path / "out")


@pytest.mark.parametrize("process", [Process(0, 2), Process(1, 2), Process()], ids=str)
def test_launches_of_prepare_do_not_mix(place, tmp_path, process):
    corpus = open_corpus("text", [str(place / "cats.txt")], validation_share=0)
    # What the first process of a launch of two holds, and what the second one does.
    with sole_writer(tmp_path), sole_writer(tmp_path, f"{LOCK}{Process(1, 2).suffix}"):
        with pytest.raises(LandmarkError, match=BUSY):
            write_token_files(corpus, load_tokenizer("gpt2"), tmp_path, process=process)


def test_runs_that_start_at_the_same_moment_have_names_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for trial in range(20):
        names, start = [], threading.Barrier(8)

        def launch(names=names, start=start, trial=trial):
            start.wait()
            names.append(_last_or_new(f"cats{trial}", resume=False))

        launches = [threading.Thread(target=launch) for _ in range(8)]
        for one in launches:
            one.start()
        for one in launches:
            one.join()
        assert len(set(names)) == 8
        assert _last_or_new(f"cats{trial}", resume=True) == Path(f"runs/cats{trial}-8")


def test_a_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(LandmarkError, match="file/run cannot be written: Not a directory"),
        sole_writer(tmp_path / "file/run"),
    ):
        pass
