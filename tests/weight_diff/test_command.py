"""`landmark weight-diff` as a user runs it, kills it and runs it again."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from landmark_cli.weight_diff.output import FINISHED, MARKER
from tests.forked import Forked
from tests.weight_diff.weights import GOLDENS, assert_same_bits, golden, landmark, load, make, recover, save

RECOVER = ["recover", "--path-raw", GOLDENS / "raw", "--path-diff"]

DYING = Path(__file__).with_name("dying.py")


def test_make_and_recover_from_the_command_line(tmp_path):
    made = landmark(
        *("make", "--path-raw", GOLDENS / "raw", "--path-tuned", GOLDENS / "tuned", "--path-diff", tmp_path / "diff")
    )
    assert made.returncode == 0 and "23 tensors" in made.stderr
    done = landmark(*RECOVER, tmp_path / "diff", "--path-tuned", tmp_path / "out")
    assert done.returncode == 0 and "the sha256 of every tensor and file is right" in done.stderr
    assert_same_bits(load(tmp_path / "out"), golden("tuned"))
    again = landmark(*RECOVER, tmp_path / "diff", "--path-tuned", tmp_path / "out")
    assert again.returncode == 2 and again.stderr.count("\n") == 1 and "--overwrite" in again.stderr


def test_a_failed_check_is_an_exit_code_of_1(tmp_path):
    diff = shutil.copytree(GOLDENS / "diff", tmp_path / "diff")
    (diff / "checksum_psum.txt").write_text("0")
    done = landmark(*RECOVER, diff, "--path-tuned", tmp_path / "out")
    assert done.returncode == 1 and "error: the sum of the recovered tensors is 321.7077" in done.stderr
    assert "Traceback" not in done.stderr and [path.name for path in tmp_path.iterdir()] == ["diff"]


def test_hub_ids(tmp_path):
    """From a hub's cache, as nothing can be fetched here: the safetensors files, or else the .bin ones."""
    hub = {}
    for name, kind in (("raw", "bin"), ("diff", "safetensors")):
        snapshot = tmp_path / f"models--org--{name}" / "snapshots" / "0123"
        hub[name] = save(snapshot, golden(name), kind=kind)
        (tmp_path / f"models--org--{name}" / "refs").mkdir()
        (tmp_path / f"models--org--{name}" / "refs" / "main").write_text("0123")
    shutil.copy(GOLDENS / "diff" / "checksum_psum.txt", hub["diff"])
    env = os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}

    def recovering(diff, out):
        command = [sys.executable, "-m", "landmark_cli", "weight-diff", "recover", "--path-raw", "org/raw"]
        command += ["--path-diff", diff, "--path-tuned", out]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, env=env, cwd=tmp_path)

    done = recovering("org/diff", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert_same_bits(load(tmp_path / "out"), golden("tuned"))
    done = recovering("org/nothing", tmp_path / "out2")
    assert done.returncode == 1
    assert "--path-diff org/nothing cannot be read: " in done.stderr


def state_of(folder: Path) -> str:
    """Which model the directory is: "old", "new", or "none" if it does not exist. Anything else fails."""
    if not folder.exists():
        return "none"
    name = "raw" if json.loads((folder / "config.json").read_text())["vocab_size"] == 300 else "tuned"
    assert_same_bits(load(folder), golden(name))
    return {"raw": "old", "tuned": "new"}[name]


def test_killed_at_every_change_of_a_file(tmp_path):
    """The directory is the old model, the new one or not there; and a second run ends well."""
    old = save(tmp_path / "old", golden("raw"))
    diff = make(old, GOLDENS / "tuned", tmp_path / "diff")
    seen = []
    for change in range(1, 100):
        out = tmp_path / f"out{change}"
        shutil.copytree(old, out)
        command = ["recover", "--path-raw", old, "--path-diff", diff, "--path-tuned", out, "--overwrite"]
        run = Forked([change, out, "weight-diff", *command], tmp_path / "said.txt", program=DYING)
        code = run.wait()
        seen.append(state_of(out))
        recover(old, diff, out, overwrite=True)
        assert state_of(out) == "new" and not list(tmp_path.glob(f"out{change}.*"))
        if code == 0:
            break
        assert code == -signal.SIGKILL, run.said.read_text()
    assert change > 10 and set(seen) == {"old", "none", "new"}
    assert seen == sorted(seen, key=["old", "none", "new"].index)


def test_killed_right_before_the_marker_of_unfinished_work_goes(tmp_path):
    """The directory has its name and is whole; the next command sees that, and takes the marker away."""
    diff = make(GOLDENS / "raw", GOLDENS / "tuned", tmp_path / "diff")
    whole = sorted(path.name for path in diff.iterdir())
    (diff / MARKER).write_bytes(FINISHED)
    again = landmark("make", "--path-raw", GOLDENS / "raw", "--path-tuned", GOLDENS / "tuned", "--path-diff", diff)
    assert again.returncode == 2 and "the directory is not empty" in again.stderr
    assert sorted(path.name for path in diff.iterdir()) == whole


@pytest.mark.parametrize("progress", [0.0, 0.4, 0.8])
def test_killed_while_it_writes_weights(tmp_path, progress):
    torch.manual_seed(0)
    names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(24)]
    raw = {name: torch.randint(-(2**15), 2**15, (1024, 2048), dtype=torch.int16).view(torch.bfloat16) for name in names}
    tuned = {name: (tensor.view(torch.int16) + 3).view(torch.bfloat16) for name, tensor in raw.items()}
    for name, tensors in (("raw", raw), ("tuned", tuned)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"model_type": "llama"}')
        save_file(tensors, tmp_path / name / "model.safetensors")
    diff, out = make(tmp_path / "raw", tmp_path / "tuned", tmp_path / "diff"), tmp_path / "out"
    arguments = ["recover", "--path-raw", tmp_path / "raw", "--path-diff", diff, "--path-tuned", out, "--threads", "1"]
    run = Forked(["weight-diff", *arguments], tmp_path / "said.txt")
    weights = out.with_name("out.unfinished") / "model.safetensors"
    while run.running() and not (weights.exists() and weights.stat().st_size >= progress * 100_000_000):
        time.sleep(0.001)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL and not out.exists()
    assert landmark(*arguments).returncode == 0
    assert_same_bits(load(out), tuned)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["diff", "out", "raw", "said.txt", "tuned"]
