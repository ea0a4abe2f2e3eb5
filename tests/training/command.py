"""`landmark train` on a small corpus, from Python and from the command line."""

import json
import os
import sys
from pathlib import Path

import torch

import landmark_cli
from landmark_cli.commands.train import TrainOptions, run
from landmark_cli.training.checksums import write_checksums
from landmark_cli.training.loop import Loop

CHECKOUT = Path(landmark_cli.__file__).parent.parent
SMALL = {
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 16,
    "sequence_length": 34,
    "landmark_freq": 7,
    "lr": 1e-2,
    "device": "cpu",
}
SHORT = SMALL | {"steps": 4, "batch_size": 2, "accumulation": 2, "log_every": 1, "eval_every": 2, "eval_windows": 5}


def train(corpus, output, **changes):
    run(TrainOptions(**(SHORT | {"data": [corpus], "output": output} | changes)))
    return output


def arguments(corpus, output, **changes):
    """The same run for the command line; a change to None leaves the option out."""
    options = SHORT | {"data": corpus, "output": output} | changes
    given = {name.replace("_", "-"): value for name, value in options.items() if value is not None}
    return ["train", *(f"--{name}={value}" for name, value in given.items())]


def stop_behind(monkeypatch, step):
    """Have runs of this process end as a crash ends them, once `step` steps are done and what is due then is saved."""
    train_step = Loop.train_step

    def crashing(loop, *arguments):
        if loop.step == step:
            raise RuntimeError("the power is gone")
        return train_step(loop, *arguments)

    monkeypatch.setattr(Loop, "train_step", crashing)


def as_an_earlier_version_saved(checkpoint, *lacking):
    """Make a checkpoint say of its run what one of a version would that did not know these names."""
    record = Path(checkpoint) / "training.json"
    content = json.loads(record.read_text())
    for name in lacking:
        del content["identity"][name]
    record.write_text(json.dumps(content))
    write_checksums(record.parent)


def environment(**changes):
    threads = str(torch.get_num_threads())
    return os.environ | {"OMP_NUM_THREADS": threads, "PYTHONPATH": str(CHECKOUT), "PATH": scripts_path()} | changes


def scripts_path():
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def records(output, key="loss"):
    lines = (Path(output) / "metrics.jsonl").read_text().splitlines()
    return [record[key] for record in map(json.loads, lines) if key in record]
