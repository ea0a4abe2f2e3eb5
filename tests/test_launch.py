"""What a process knows of how it was started: the command to go on with, and which of many speaks for a failure."""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from landmark_cli import launch
from tests.forked import run_ranks
from tests.training.command import environment

PROGRAM = """
import os, sys, time
from landmark_cli import cli, launch
from landmark_cli.errors import LandmarkError
from landmark_cli.interrupts import interrupts
from tests.greet import GreetOptions, greet_command

def run(options):
    if options.note == "again":
        print(launch.again("resume", out="here"))
        return
    if options.note == "work":
        with interrupts("finishing the greeting") as asked:
            print(os.getpid(), flush=True)
            while not asked:
                time.sleep(0.01)
            time.sleep(0.5)
            print("finished", flush=True)
            raise asked.stopped("greeted")
    import torch
    if options.note == "alone":
        torch.distributed.init_process_group("gloo")
        if os.environ["RANK"] == "1":
            raise LandmarkError("the disk of one machine is full")
        torch.distributed.all_reduce(torch.ones(1))
    raise LandmarkError("the disk is full")

cli.COMMANDS[:] = [greet_command(run)]
cli.main()
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "greet.py"
    path.write_text(PROGRAM)
    return str(path)


def launched(*command):
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has ended")
@pytest.mark.parametrize(
    ("number", "both"),
    [(signal.SIGTERM, False), (signal.SIGTERM, True), (signal.SIGINT, True)],
    ids=["the launcher", "both", "Ctrl-C"],
)
def test_a_run_stops_well_with_the_launcher_that_started_it(script, number, both):
    command = ["accelerate", "launch", "--num_processes", "1", script, "greet", "--note", "work"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    launcher = subprocess.Popen(command, env=environment(), **pipes)
    process = int(launcher.stdout.readline())
    launcher.send_signal(number)
    if both:
        os.kill(process, number)
    out, err = launcher.communicate(timeout=60)
    assert out == "finished\n"
    # What the launcher says of its own end may come between.
    assert err.count(": finishing the greeting; once more stops at once\n") == 1 and err.count("greeted\n") == 1


@pytest.mark.parametrize(
    ("given", "added"),
    [
        ([], ["--resume", "--out", "my run"]),
        (["--resume"], ["--out", "my run"]),
        (["--out=elsewhere"], ["--resume"]),
        (["--out", "elsewhere", "--resume"], []),
    ],
)
def test_the_command_to_go_on_with_is_the_one_given_and_what_it_lacks(monkeypatch, given, added):
    monkeypatch.setattr(launch, "_arguments", ["train", *given])
    monkeypatch.setattr(sys, "argv", ["/elsewhere/landmark", "unrelated"])
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert launch.again("resume", out="my run") == shlex.join(["landmark", "train", *given, *added])


def test_a_call_from_python_goes_on_by_the_same_call(monkeypatch):
    monkeypatch.setattr(launch, "_arguments", None)
    assert launch.again("resume", output="runs/a") == "the same call with resume=True, output='runs/a'"


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ["torchrun", "--nproc_per_node=1"],
        ["accelerate", "launch", "--num_processes", "1"],
        [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1"],
    ],
    ids=["torchrun", "accelerate", "as a module"],
)
def test_the_launcher_belongs_to_the_command(script, launcher):
    out = launched(*launcher, script, "greet", "--note", "again").stdout
    assert out.strip() == shlex.join([*launcher, script, "greet", "--note", "again", "--resume", "--out", "here"])


def test_a_failure_of_all_is_said_once(script, tmp_path):
    said = tmp_path / "said.txt"
    assert run_ranks(3, ["greet", "--note", "all"], said, environment(), Path(script)) == [1, 1, 1]
    (error,) = [line for line in said.read_text().splitlines() if "error: " in line]
    assert error.endswith("error: the disk is full")


@pytest.mark.parametrize(
    ("note", "message"),
    [
        pytest.param("all", "the disk is full", marks=pytest.mark.slow),
        ("alone", "the disk of one machine is full"),
    ],
)
def test_a_failure_under_torchrun_is_said_once(script, note, message):
    """Which ends the others when one of them has failed."""
    ended = launched("torchrun", "--nproc_per_node=2", script, "greet", "--note", note)
    said = [line for line in ended.stderr.splitlines() if "error: " in line]
    assert ended.returncode == 1 and len(said) == 1 and said[0].endswith(f"error: {message}")


def test_processes_that_never_met_each_speak_for_themselves(monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setitem(os.environ, name, value)
    assert launch.fails_first()
