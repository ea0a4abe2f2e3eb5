"""Runs of several processes, on one machine and on two: the curve of one process, also across checkpoints."""

import shutil
import socket
import subprocess

import pytest
from safetensors.torch import load_file

from landmark_cli.errors import LandmarkError
from landmark_cli.locks import sole_writer
from tests.closeness import assert_close_norm
from tests.forked import run_ranks
from tests.training.command import CHECKOUT, arguments, environment, records, train
from tests.training.tiny import byte_tokenizer, write_corpus, write_questions

STEPS, HALF = 6, 3
OPTIONS = {"steps": STEPS, "save_every": HALF, "eval_every": HALF, "batch_size": 2}
CURVES = ("loss", "gradient_norm", "validation_loss")
LANDMARK = str(CHECKOUT / "landmark")
FSDP_ON_CPU = CHECKOUT / "tests/training/fsdp_on_cpu.py"
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus")
    return write_corpus(root / "cats", byte_tokenizer(root / "bytes"))


@pytest.fixture(scope="module")
def one(corpus, tmp_path_factory):
    """What one process trains without interruption."""
    return train(corpus, tmp_path_factory.mktemp("one") / "run", accumulation=2, **OPTIONS)


@pytest.fixture(scope="module")
def two_machines(corpus, tmp_path_factory):
    """What two launches of one process each train, which find each other over the loopback."""
    output = tmp_path_factory.mktemp("two") / "run"
    nodes = ["torchrun", "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", "--rdzv_id=cats"]
    nodes += [f"--rdzv_endpoint=127.0.0.1:{free_port()}", LANDMARK, *split(corpus, output)]
    launched = [subprocess.Popen(nodes, env=on_cpus()) for _ in range(2)]
    assert [process.wait(timeout=240) for process in launched] == [0, 0]
    return output


@pytest.fixture(scope="module")
def two_shards(corpus, tmp_path_factory):
    """What two processes train that hold half of the weights each."""
    root = tmp_path_factory.mktemp("shards")
    sharded(2, split(corpus, root / "run"), root / "said.txt")
    return root / "run"


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def on_cpus(**changes):
    return environment(ACCELERATE_USE_CPU="true", **changes)


def split(corpus, output, processes=2, **changes):
    """The run's command line for each of so many processes: the same global batch for any number."""
    options = OPTIONS | {"accumulation": 2 // processes, "device": None} | changes
    return arguments(corpus, output, **options)


def sharded(processes, command, said):
    """A run that shards weights over so many processes."""
    assert not any(run_ranks(processes, command, said, on_cpus(**FSDP), FSDP_ON_CPU)), said.read_text()


def cut_in_half(run, output):
    """A copy of a run that was stopped at half of its steps."""
    shutil.copytree(run / "checkpoints" / f"step-{HALF:08d}", output / "checkpoints" / f"step-{HALF:08d}")
    shutil.copy(run / "metrics.jsonl", output)
    return output


def assert_same_run(ours, theirs, curves=CURVES):
    for key in curves:
        assert records(theirs, key)
        assert_close_norm(records(ours, key), records(theirs, key))
    mine, other = (load_file(run / "model.safetensors") for run in (ours, theirs))
    assert mine.keys() == other.keys()
    for name in mine:
        assert_close_norm(mine[name], other[name])


def test_two_machines_train_together(one, two_machines):
    assert_same_run(two_machines, one)


def test_what_two_machines_saved_one_process_goes_on_from(corpus, one, two_machines, tmp_path):
    resumed = cut_in_half(two_machines, tmp_path)
    train(corpus, resumed, accumulation=2, resume=True, **OPTIONS)
    assert_same_run(resumed, one)


def test_what_one_process_saved_two_go_on_from(corpus, one, tmp_path):
    resumed, said = cut_in_half(one, tmp_path / "run"), tmp_path / "said.txt"
    assert run_ranks(2, [*split(corpus, resumed), "--resume"], said, on_cpus()) == [0, 0], said.read_text()
    assert_same_run(resumed, one)


@pytest.mark.slow
def test_accelerate_launches_the_two_that_go_on(corpus, one, tmp_path):
    resumed = cut_in_half(one, tmp_path)
    command = ["accelerate", "launch", "--main_process_port=0", "--multi_gpu", "--num_processes=2"]
    command += [LANDMARK, *split(corpus, resumed)]
    subprocess.run([*command, "--resume"], env=on_cpus(), check=True, timeout=240)
    assert_same_run(resumed, one)


def test_two_processes_leave_a_held_directory_alone(corpus, tmp_path):
    said = tmp_path / "said.txt"
    with sole_writer(tmp_path / "run"):
        ended = run_ranks(2, split(corpus, tmp_path / "run"), said, on_cpus())
    assert ended == [1, 1] and f"another landmark command is writing to {tmp_path / 'run'}" in said.read_text()
    assert not list((tmp_path / "run").iterdir())


def test_sharded_weights_have_the_curve_of_whole_ones(one, two_shards):
    assert_same_run(two_shards, one)


def test_what_two_shards_saved_one_process_goes_on_from(corpus, one, two_shards, tmp_path):
    resumed = cut_in_half(two_shards, tmp_path / "run")
    sharded(1, [*split(corpus, resumed, processes=1), "--resume"], tmp_path / "said.txt")
    assert_same_run(resumed, one)


@pytest.mark.slow
def test_what_one_shard_saved_two_go_on_from(corpus, one, tmp_path):
    whole = tmp_path / "whole"
    sharded(1, split(corpus, whole, processes=1), tmp_path / "said.txt")
    resumed = cut_in_half(whole, tmp_path / "resumed")
    sharded(2, [*split(corpus, resumed), "--resume"], tmp_path / "said.txt")
    assert_same_run(resumed, one)


def test_shards_are_not_taken_for_whole_weights(corpus, two_shards, tmp_path):
    resumed = cut_in_half(two_shards, tmp_path)
    with pytest.raises(LandmarkError, match="saved as FSDP 2 SHARDED_STATE_DICT, and this run reads whole weights"):
        train(corpus, resumed, accumulation=2, resume=True, **OPTIONS)


def test_a_damaged_shard_is_named(corpus, two_shards, tmp_path):
    resumed, said = cut_in_half(two_shards, tmp_path / "run"), tmp_path / "said.txt"
    shard = next(resumed.rglob("pytorch_model_fsdp_0/*.distcp"))
    shard.write_bytes(b"damaged")
    ended = run_ranks(1, [*split(corpus, resumed, processes=1), "--resume"], said, on_cpus(**FSDP), FSDP_ON_CPU)
    assert ended == [1] and f"step-00000003: pytorch_model_fsdp_0/{shard.name} is not as it was" in said.read_text()


# Rows of a batch have other numbers of answers than other rows, so the processes' weights have other sums.
WEIGHED = {"answer_weight": 5.0, "steps": 4}
OF_ANSWERS = ("validation_answers_loss", "validation_answers_right", "validation_answers_tokens")


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    root = tmp_path_factory.mktemp("questions")
    return write_questions(root / "cats", byte_tokenizer(root / "bytes"))


@pytest.fixture(scope="module")
def one_weighed(questions, tmp_path_factory):
    """What one process trains on weighed answers."""
    output = tmp_path_factory.mktemp("weighed") / "one"
    return train(questions, output, **(OPTIONS | WEIGHED | {"accumulation": 2}))


@pytest.mark.slow
def test_weighed_answers_are_the_same_in_two_processes(questions, one_weighed, tmp_path):
    launch = ["torchrun", "--nproc_per_node=2", LANDMARK, *split(questions, tmp_path / "run", **WEIGHED)]
    subprocess.run(launch, env=on_cpus(), check=True, timeout=240)
    assert_same_run(tmp_path / "run", one_weighed, CURVES + OF_ANSWERS)


@pytest.mark.slow
def test_weighed_answers_are_the_same_in_two_shards(questions, one_weighed, tmp_path):
    sharded(2, split(questions, tmp_path / "run", **WEIGHED), tmp_path / "said.txt")
    assert_same_run(tmp_path / "run", one_weighed, CURVES + OF_ANSWERS)


# Windows that are read chunk by chunk, activations computed again, of documents that do not see each other.
READ = {"read_chunk": 16, "top_k_blocks": 2, "sequence_length": 100, "mask_documents": None, "steps": 4}


@pytest.fixture(scope="module")
def one_read(corpus, tmp_path_factory):
    """What one process trains on windows that it reads."""
    options = OPTIONS | READ | {"mask_documents": True, "accumulation": 2}
    return train(corpus, tmp_path_factory.mktemp("read") / "one", **options)


@pytest.mark.slow
@pytest.mark.parametrize("launch", ["processes", "shards"])
def test_windows_are_read_the_same_in_two(launch, corpus, one_read, tmp_path):
    command = [*split(corpus, tmp_path / "run", **READ), "--mask-documents"]
    if launch == "shards":
        sharded(2, command, tmp_path / "said.txt")
    else:
        subprocess.run(["torchrun", "--nproc_per_node=2", LANDMARK, *command], env=on_cpus(), check=True, timeout=240)
    assert_same_run(tmp_path / "run", one_read)
