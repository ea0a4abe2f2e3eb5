"""A run that is asked to stop finishes its step, saves it and says how to go on; its processes do so together."""

import os
import shlex
import signal
import subprocess
import time

import psutil
import pytest
from safetensors.torch import load_file

from landmark_cli.errors import Stopped
from tests.forked import Forked
from tests.training.command import CHECKOUT, arguments, environment, records, train
from tests.training.tiny import RandomWindows, byte_tokenizer, tiny_loop, tiny_model, write_corpus


def signalled(loop, step, number):
    """Run a loop that gets a signal while it is at `step`."""
    train_step = loop.train_step

    def with_signal(*arguments):
        if loop.step == step:
            os.kill(os.getpid(), number)
        return train_step(*arguments)

    loop.train_step = with_signal
    with pytest.raises(Stopped) as raised:
        loop.run()
    return raised.value


@pytest.mark.parametrize(
    ("number", "save_every"), [(signal.SIGINT, 0), (signal.SIGTERM, 2)], ids=["no checkpoints", "between two"]
)
def test_the_step_is_finished_and_the_run_ends_with_the_same_bits(tmp_path, number, save_every, capsys):
    through, cut = tmp_path / "through", tmp_path / "cut"
    options = {"steps": 6, "validation": [RandomWindows(3)], "evaluate_every": 3}
    tiny_loop(through, model=tiny_model(dropout=0.3), save_every=6, **options).run()

    loop = tiny_loop(cut, model=tiny_model(dropout=0.3), save_every=save_every, go_on="landmark train", **options)
    stopped = signalled(loop, 2, number)
    checkpoint = cut / "checkpoints/step-00000003"
    assert stopped.exit_code == 128 + number
    assert str(stopped) == f"stopped after step 3 of 6, saved as {checkpoint}; go on with\nlandmark train"
    assert f"{number.name}: finishing the step, then saving a checkpoint; once more" in capsys.readouterr().err

    second = tiny_loop(cut, model=tiny_model(seed=9, dropout=0.3), save_every=6, **options)
    assert second.resume() and second.step == 3
    second.run()
    name = "checkpoints/step-00000006/model.safetensors"
    ours, theirs = load_file(cut / name), load_file(through / name)
    assert all((ours[key] == theirs[key]).all() for key in theirs)
    for key in ("step", "loss", "gradient_norm", "validation_loss"):
        assert records(cut, key) == records(through, key)


def test_what_was_done_since_the_last_record_is_recorded(tmp_path):
    signalled(tiny_loop(tmp_path, steps=9, log_every=4), 5, signal.SIGTERM)
    assert records(tmp_path, "step") == [1, 4, 6]


def test_a_signal_in_the_last_step_leaves_the_model_to_the_resumed_run(tmp_path):
    signalled(tiny_loop(tmp_path, steps=3), 2, signal.SIGTERM)
    second = tiny_loop(tmp_path, steps=3)
    assert second.resume() and second.step == 3
    second.run()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus")
    return write_corpus(root / "cats", byte_tokenizer(root / "bytes"))


OPTIONS = {"steps": 100_000, "save_every": 0, "eval_every": 0, "log_every": 5}


def wait_for_steps(output, running):
    """Until a run in the background has done its first steps."""
    deadline = time.monotonic() + 120
    while not (output / "metrics.jsonl").exists() or len(records(output)) < 2:
        assert running() and time.monotonic() < deadline
        time.sleep(0.05)


def of_the_stop(lines):
    return [line for line in lines if "finishing the step" in line or "stopped after" in line]


def saved_step(output):
    (checkpoint,) = (output / "checkpoints").iterdir()
    return int(checkpoint.name.removeprefix("step-"))


def test_the_command_says_what_to_enter_to_go_on(corpus, tmp_path):
    output = tmp_path / "a run"
    given = arguments(corpus, output, **OPTIONS)
    process = Forked(given, tmp_path / "said.txt", environment())
    wait_for_steps(output, process.running)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 143
    lines = process.said.read_text().splitlines()
    assert len(of_the_stop(lines)) == 2 and lines[-1] == shlex.join(["landmark", *given, "--resume"])
    step = saved_step(output)
    train(corpus, output, **OPTIONS | {"steps": step + 2, "resume": True})
    assert records(output, "step")[-1] == step + 2


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["one process", "the launcher"])
def test_all_processes_stop_after_the_same_step(corpus, tmp_path, whom):
    output = tmp_path / "run"
    given = arguments(corpus, output, **OPTIONS | {"device": None})
    command = ["torchrun", "--nproc_per_node=2", str(CHECKOUT / "landmark"), *given]
    changed = environment(ACCELERATE_USE_CPU="true")
    process = subprocess.Popen(command, env=changed, stderr=subprocess.PIPE, text=True)
    wait_for_steps(output, lambda: process.poll() is None)
    workers = psutil.Process(process.pid).children()
    assert len(workers) == 2
    if whom == "one process":
        second = next(worker for worker in workers if worker.environ()["RANK"] == "1")
        second.send_signal(signal.SIGTERM)
    else:
        process.send_signal(signal.SIGINT)
    lines = process.communicate(timeout=60)[1].splitlines()
    said = of_the_stop(lines)
    assert len(said) == 2 and "error:" not in "".join(lines)
    resumed = shlex.join(["torchrun", "--nproc_per_node=2", str(CHECKOUT / "landmark"), *given, "--resume"])
    assert resumed in lines
    assert f"stopped after step {saved_step(output)} of" in said[1]
