"""The model as its loss: what it is trained in."""

import pytest
import torch

from landmark_cli.commands.finetune import FinetuneOptions
from landmark_cli.commands.run_loop import loop_settings
from landmark_cli.commands.train import TrainOptions
from landmark_cli.errors import UsageError
from landmark_cli.models import register
from landmark_cli.training import setup
from landmark_cli.training.setup import LossModel
from tests.models.families import FAMILIES, tiny_decoder
from tests.tiny import tiny_baseline, tiny_model

register()

OWN = {
    "landmark": tiny_model,
    "baseline": tiny_baseline,
    "xl": lambda: tiny_baseline(memory_length=8, segment_length=8),
    "context-miss": lambda: tiny_model(context_miss_token=True),
}


def residuals(model, autocast, **settings):
    """The dtypes of what a model's layers add to, in a forward pass as its loss."""
    seen = set()
    for name, module in model.named_modules():
        if name.rpartition(".")[0].endswith("layers") and name.rpartition(".")[2].isdigit():
            module.register_forward_hook(lambda module, inputs, output: seen.add(torch.as_tensor(output[0]).dtype))
    ids = torch.randint(30, (2, 24))
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        loss = LossModel(model.train(), **settings)(ids, ids)
    loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)
    return seen


# The routing weights of a mixture are fp32 and what they weigh is added in fp32, as what some norm before adding it is.
FP32 = {"mixtral", "qwen2-moe", "qwen3-moe", "glm4-moe", "glm4", "exaone4"}


@pytest.mark.parametrize("name", [*OWN, *sorted(FAMILIES.keys() - FP32)])
def test_the_residual_stream_is_bf16_in_a_bf16_run(name):
    assert residuals(OWN[name]() if name in OWN else tiny_decoder(name), torch.bfloat16) == {torch.bfloat16}


@pytest.mark.parametrize(
    ("autocast", "fp32_residual"), [(torch.bfloat16, True), (torch.float16, False), (None, False)], ids=str
)
def test_it_is_fp32_where_it_is_wanted_or_must_be(autocast, fp32_residual):
    assert residuals(tiny_model(), autocast, fp32_residual=fp32_residual) == {torch.float32}


@pytest.mark.parametrize(
    ("options", "expected"),
    [(TrainOptions(), False), (FinetuneOptions(model="any", data=["any"]), True)],
    ids=["train", "finetune"],
)
def test_only_training_from_scratch_has_it_in_bf16_unasked(options, expected, tmp_path):
    assert loop_settings(options, tmp_path, "bf16", 512).fp32_residual is expected


def test_a_gpu_of_several_becomes_the_current_one(monkeypatch):
    chosen = []
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(setup, "find_device", torch.device)
    monkeypatch.setattr(torch.accelerator, "set_device_index", chosen.append)
    for name in ("auto", "cpu", "cpu:0", "cuda", "cuda:1"):
        setup.use_device(name)
    assert chosen == [1]
    monkeypatch.setenv("LOCAL_RANK", "0")
    setup.use_device("cuda")
    with pytest.raises(UsageError, match="--device cuda:1: each process of a launch has a device of its own"):
        setup.use_device("cuda:1")


def test_the_cpu_is_known_by_both_its_names(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert [setup.uses_cpu(name) for name in ("auto", "cuda:1", "cpu", "cpu:0")] == [False, False, True, True]
