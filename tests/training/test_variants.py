"""The paper's variants train: what each changes, that a resumed run repeats it, and which cannot go together."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from landmark_cli.commands.train import TrainOptions, run
from landmark_cli.errors import Stopped, UsageError
from landmark_cli.training.loop import Loop
from tests.training.tiny import byte_tokenizer, write_corpus

SMALL = {"n_layer": 2, "n_head": 2, "n_embd": 16, "sequence_length": 34, "landmark_freq": 7, "lr": 1e-2}
SHORT = SMALL | {"device": "cpu", "batch_size": 2, "accumulation": 2, "log_every": 1, "eval_every": 0, "save_every": 2}
VARIANTS = {
    "plain": {},
    "transformer-xl": {"baseline": True, "memory_length": 8, "segment_length": 16},
    "context-miss": {"context_miss_token": True, "controlled_landmarks": 0.5},
    "position-jump": {"position_jump": 20},
    "group-dropout": {"group_dropout": 0.5},
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus")
    return write_corpus(root / "data" / "cats", byte_tokenizer(root / "bytes"))


def train(corpus, output, **changes):
    run(TrainOptions(**(SHORT | {"data": [corpus], "output": output, "steps": 4} | changes)))
    return [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_every_variant_trains_another_model_and_says_so_in_its_config(corpus, tmp_path):
    losses = {name: train(corpus, tmp_path / name, **changes) for name, changes in VARIANTS.items()}
    # The same seed and data: what differs is the variant.
    assert len({loss[-1] for loss in losses.values()}) == len(VARIANTS)
    assert all(loss[-1] < loss[0] for loss in losses.values())
    configs = {name: AutoModelForCausalLM.from_pretrained(tmp_path / name).config for name in VARIANTS}
    assert (configs["transformer-xl"].memory_length, configs["transformer-xl"].segment_length) == (8, 16)
    assert configs["transformer-xl"]._attn_implementation == "transformer_xl"
    assert configs["context-miss"].context_miss_token and not configs["plain"].context_miss_token


@pytest.mark.parametrize("name", ["context-miss", "group-dropout"])
def test_a_resumed_variant_ends_with_the_same_bits(corpus, tmp_path, name):
    train(corpus, tmp_path / "whole", **VARIANTS[name])
    train_step = Loop.train_step

    def interrupted(loop, *arguments):
        if loop.step == 3:
            raise KeyboardInterrupt
        return train_step(loop, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "train_step", interrupted)
        with pytest.raises(Stopped):
            train(corpus, tmp_path / "parts", **VARIANTS[name])
    train(corpus, tmp_path / "parts", resume=True, **VARIANTS[name])
    whole, parts = (load_file(tmp_path / run / "model.safetensors") for run in ("whole", "parts"))
    assert all(torch.equal(tensor, parts[key]) for key, tensor in whole.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memory_length": 8}, "give --baseline too"),
        ({"baseline": True, "segment_length": 8}, "give --memory-length too"),
        ({"baseline": True, "context_miss_token": True}, "--context-miss-token is about landmarks"),
        ({"baseline": True, "position_jump": 9}, "--position-jump is about landmarks"),
        ({"baseline": True, "group_dropout": 0.1}, "--group-dropout is about landmarks"),
    ],
)
def test_variants_that_cannot_go_together_are_refused(corpus, tmp_path, changes, message):
    with pytest.raises(UsageError, match=message):
        train(corpus, tmp_path / "run", **changes)
