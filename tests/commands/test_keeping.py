"""A signal that ends a command outside of its work, whose place is kept: the user is told how to go on, always."""

import os
import shutil
import signal

import pytest

import landmark_cli.commands.finetune
import landmark_cli.commands.longppl
import landmark_cli.commands.ruler
import landmark_cli.commands.study
import landmark_cli.commands.train
import landmark_cli.data.prepare
from landmark_cli.evaluation import studies
from landmark_cli.evaluation.studies import FinishedRows

TINY = ["--sequence-length", "36", "--steps", "1", "--batch-size", "1", "--accumulation", "1", "--device", "cpu"]
DATA = ["--data", "data/mine"]


def checkpoint(output):
    (output / "checkpoints" / "step-00000001").mkdir(parents=True)


def row(name):
    return lambda output: FinishedRows(output / name).add("key", {"loss": 1.0})


def noted(output):
    output.mkdir(parents=True)
    (output / "prepare.json.partial").write_text("")


# The command, what it is stopped before or in, what it keeps, and the words for that.
PLACES = {
    "prepare": (["prepare", "passkey"], landmark_cli.data.prepare, "prepare", noted, "run the same command again"),
    "train": (
        ["train", *TINY, *DATA, "--landmark-freq", "5", "--n-layer", "1", "--n-head", "1", "--n-embd", "8"],
        landmark_cli.commands.train,
        "carry_out",
        checkpoint,
        "--resume",
    ),
    "finetune": (
        [
            "finetune",
            *TINY,
            *DATA,
            "--model",
            "runs/landmark",
            "--landmark-freq",
            "5",
            "--teacher",
            "none",
            "--eval-ruler",
            "none",
        ],
        landmark_cli.commands.finetune,
        "carry_out",
        checkpoint,
        "--resume",
    ),
    "study": (
        ["eval", "study", "STUDY", "--role", "a=runs/landmark", *DATA],
        studies,
        "run_study",
        row("rows.jsonl"),
        "go on with\n",
    ),
    "ruler": (["eval", "ruler"], landmark_cli.commands.ruler, "_measure", row("answers.jsonl"), "go on with\n"),
    "longppl": (
        ["eval", "longppl", "--data", "data/mine/validation.bin"],
        landmark_cli.commands.longppl,
        "_measure",
        row("windows.jsonl"),
        "go on with\n",
    ),
}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
@pytest.mark.parametrize("name", PLACES)
def test_a_signal_at_another_moment_tells_how_to_go_on(
    name, number, landmark, tmp_path, monkeypatch, fresh_accelerator
):
    arguments, module, function, keep, words = PLACES[name]
    output = tmp_path / "out"

    study = tmp_path / "study.yaml"
    study.write_text("study: perplexity\nroles: {a: any}\nrows: [{role: a, eval-length: 20}]")
    arguments = [study if argument == "STUDY" else argument for argument in arguments]

    def end(kept):
        if kept and keep is checkpoint:
            keep(output)
        os.kill(os.getpid(), number)
        raise AssertionError("the signal is not heard")

    for kept in (True, False):
        if kept and keep is not checkpoint:
            keep(output)
        monkeypatch.setattr(module, function, lambda *given, kept=kept, **more: end(kept))
        result = landmark(*arguments, "--output", output)
        assert result.code == 128 + number, result.err
        assert (words in result.err) == kept, result.err
        assert ("stopped by" in result.err) != kept
        shutil.rmtree(output, ignore_errors=True)
