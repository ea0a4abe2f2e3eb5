"""Training on an NVIDIA GPU: precisions, torch.compile, FSDP."""

import re
import shutil
import subprocess

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM

from landmark_cli.training.compiled import compile_layers
from tests.closeness import assert_close_norm
from tests.training import test_compiled
from tests.training.command import CHECKOUT, arguments, environment, records, train
from tests.training.tiny import byte_tokenizer, write_corpus

pytestmark = pytest.mark.gpu
EXACT = {"device": "auto", "precision": "fp32", "tf32": False, "n_embd": 32}
FSDP = ["--use_fsdp", "--num_processes", "1", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP", "--fsdp_version"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus")
    return write_corpus(root / "cats", byte_tokenizer(root / "bytes"))


@pytest.mark.parametrize(
    "changes",
    [{"precision": "bf16"}, {"precision": "fp16"}, {"precision": "bf16", "compile": True}],
    ids=["bf16", "fp16", "bf16-compiled"],
)
def test_faster_ways_to_compute_keep_the_loss_curve(corpus, tmp_path, changes):
    exact = train(corpus, tmp_path / "exact", **EXACT)
    fast = train(corpus, tmp_path / "fast", **(EXACT | changes))
    assert records(fast) == pytest.approx(records(exact), rel=5e-3)
    assert records(fast, "mfu") and not records(exact, "mfu")


@pytest.mark.parametrize(
    "settings",
    [
        ["1", "--fsdp_use_orig_params", "true", "--fsdp_state_dict_type", "FULL_STATE_DICT"],
        ["2", "--fsdp_state_dict_type", "SHARDED_STATE_DICT"],
    ],
    ids=["fsdp1", "fsdp2"],
)
def test_fsdp_trains_saves_and_resumes_as_one_process_does(corpus, tmp_path, settings):
    plain = train(corpus, tmp_path / "plain", **EXACT)
    sharded = tmp_path / "sharded"
    options = EXACT | {"save_every": 2}
    options["tf32"] = None
    command = ["accelerate", "launch", "--main_process_port=0", *FSDP, *settings, str(CHECKOUT / "landmark")]
    command += [*arguments(corpus, sharded, **options), "--no-tf32"]
    subprocess.run(command, env=environment(), check=True, timeout=300)
    assert records(sharded) == pytest.approx(records(plain), rel=1e-4)
    shutil.rmtree(sharded / "checkpoints" / "step-00000004")
    subprocess.run([*command, "--resume"], env=environment(), check=True, timeout=300)
    assert records(sharded) == pytest.approx(records(plain), rel=1e-4)
    assert AutoModelForCausalLM.from_pretrained(sharded).config.n_embd == 32


def test_a_dry_run_says_how_much_memory_the_run_takes(corpus, tmp_path, capsys):
    options = {"precision": "bf16", "steps": 4, "device": "auto"}
    train(corpus, tmp_path / "run", **options)
    (record,) = records(tmp_path / "run", "peak_memory")[-1:]
    capsys.readouterr()
    train(corpus, tmp_path / "dry", dry_run=True, **options)
    said = re.search(r"of memory\s+([\d.]+) (\w)B at most in these steps", capsys.readouterr().out)
    assert float(said[1]) * {"k": 1e3, "M": 1e6, "G": 1e9}[said[2]] == pytest.approx(record, rel=0.05)


@pytest.mark.parametrize("way", [{}, {"read": True, "checkpointing": True}], ids=["as it is", "read, retrieved kept"])
def test_layers_compiled_one_by_one_learn_the_same(way):
    loss, how, models = test_compiled.pair(3, **way)
    for model in models:
        model.cuda()
    expected = [test_compiled.gradients(loss, how, seed) for seed in (0, 1)]
    torch._dynamo.reset()
    counters.clear()
    for model in models:
        compile_layers(model)
    with torch._dynamo.config.patch(suppress_errors=False):
        for seed in (0, 1):
            assert_close_norm(test_compiled.gradients(loss, how, seed), expected[seed], within=1e-3)
    # The teacher's layer, and the student's: where it reads chunk by chunk the first is another.
    assert counters["stats"]["unique_graphs"] == 2 + ("read" in way) and not counters["graph_break"]
