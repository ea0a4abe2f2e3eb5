"""`landmark finetune --train landmarks`: what changes, and that nothing else does."""

import shutil
from pathlib import Path

import pytest
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from landmark_cli.commands.finetune import FinetuneOptions, check_launch, run
from landmark_cli.errors import LandmarkError, UsageError
from landmark_cli.models.decoders import add_landmarks
from tests.models.families import tiny_decoder, tiny_tokenizer

EMBEDDING = "model.embed_tokens.weight"
SHORT = {"landmark_freq": 7, "sequence_length": 64, "steps": 4, "batch_size": 2, "accumulation": 2, "lr": 1e-2}
SHORT |= {
    "log_every": 1,
    "eval_every": 0,
    "device": "cpu",
    "train": "landmarks",
    "weight_decay": 0.5,
    "eval_ruler": "none",
}


@pytest.fixture(autouse=True)
def in_a_place(tmp_path, fresh_accelerator, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cats.txt").write_text(" ".join(f"the {n} cats of {n * 7 % 31} houses." for n in range(300)))


def base(family, **changes):
    tiny_decoder(family, initializer_range=0.1, **changes).save_pretrained("base")
    tiny_tokenizer().save_pretrained("base")


def finetune(output, **changes):
    run(FinetuneOptions(**(SHORT | {"model": "base", "data": ["cats.txt"], "output": Path(output)} | changes)))
    return load_file(Path(output) / "model.safetensors")


@pytest.mark.parametrize("teacher", ["self", "none"])
@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen3"])
def test_only_the_landmarks_row_queries_and_keys_change(family, teacher):
    base(family)
    after = finetune("run", teacher=teacher)
    model, tokenizer = AutoModelForCausalLM.from_pretrained("base"), AutoTokenizer.from_pretrained("base")
    add_landmarks(model, tokenizer, landmark_freq=7, trained_length=64)
    before, landmark = model.state_dict(), model.config.landmark_token_id
    changed = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    parts = ("q_proj", "k_proj", "q_norm", "k_norm")
    assert changed == {EMBEDDING} | {name for name in after if any(part in name for part in parts)}
    rows = (after[EMBEDDING] != before[EMBEDDING]).any(1)
    assert rows.nonzero().tolist() == [[landmark]]


def test_layers_that_keep_a_window_stay_as_they_are():
    base("gemma3")
    after = finetune("run")
    before = load_file("base/model.safetensors")
    changed = {name for name, weight in after.items() if name in before and not torch.equal(weight, before[name])}
    parts = ("q_proj", "k_proj", "q_norm", "k_norm")
    assert changed == {EMBEDDING} | {name for name in after if ".layers.1." in name and any(p in name for p in parts)}


def test_resumed_it_is_the_same_run():
    base("llama")
    whole = finetune("whole", save_every=2)
    shutil.copytree("whole/checkpoints/step-00000002", "part/checkpoints/step-00000002")
    part = finetune("part", save_every=2, resume=True)
    assert all(torch.equal(part[name], weight) for name, weight in whole.items())
    with pytest.raises(LandmarkError, match="train is landmarks there and None here"):
        finetune("part", save_every=2, resume=True, train="all")


def test_what_does_not_go_together():
    with pytest.raises(UsageError, match="--train landmarks and --lora-rank"):
        finetune("run", lora_rank=2)
    base("gpt-neox")
    with pytest.raises(
        LandmarkError, match="--train landmarks needs .*base .gpt_neox. has other ones: take --train all"
    ):
        finetune("run")

    class Launched:
        distributed_type = DistributedType.FSDP

    options = FinetuneOptions(model="base", data=["cats.txt"], teacher="none", train="landmarks")
    with pytest.raises(UsageError, match="--train landmarks does not go with FSDP"):
        check_launch(options, Launched())
