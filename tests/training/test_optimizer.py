"""Schedules against torch's own and closed forms; what weight decay touches."""

import math
import warnings

import pytest
import torch
from torch import nn

from landmark_cli.models.gpt import GPTConfig, GPTForCausalLM
from landmark_cli.training.optimizer import (
    SCHEDULES,
    Schedule,
    adamw,
    decayed_names,
    parameter_groups,
    set_learning_rate,
)


def torch_one_cycle(peak, steps, warmup):
    """The authors' scheduler: OneCycleLR with div_factor 100 and final_div_factor 0.05."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, peak, steps, pct_start=warmup, cycle_momentum=False, div_factor=100, final_div_factor=0.05
    )
    rates = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for step in range(steps):
            rates.append(optimizer.param_groups[0]["lr"])
            if step < steps - 1:
                scheduler.step()
    return rates


@pytest.mark.parametrize(("steps", "warmup"), [(1000, 0.02), (240, 0.1), (57, 0.3)])
def test_one_cycle_is_the_authors_schedule(steps, warmup):
    schedule = Schedule("one-cycle", 2e-3, steps, warmup, final=0.2)
    assert [schedule(step) for step in range(steps)] == pytest.approx(torch_one_cycle(2e-3, steps, warmup), rel=1e-12)


def test_one_cycle_has_the_papers_numbers():
    schedule = Schedule("one-cycle", 2e-3, 240_000)
    assert schedule(0) == pytest.approx(2e-5)
    assert max(schedule(step) for step in range(4_000, 6_000)) == pytest.approx(2e-3)
    assert schedule(239_999) == pytest.approx(4e-4)


def test_cosine_linear_and_constant_follow_their_formulas():
    steps, climb = 101, 10
    for step in range(climb):
        for kind in ("cosine", "linear", "constant"):
            assert Schedule(kind, 3.0, steps, 0.09, 0.1)(step) == pytest.approx(3.0 * (step + 1) / climb)
    for step in range(climb, steps):
        done = (step - climb) / (steps - 1 - climb)
        cosine = 0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2
        assert Schedule("cosine", 3.0, steps, 0.09, 0.1)(step) == pytest.approx(3.0 * cosine)
        assert Schedule("linear", 3.0, steps, 0.09, 0.1)(step) == pytest.approx(3.0 * (1 - 0.9 * done))
        assert Schedule("constant", 3.0, steps, 0.09, 0.1)(step) == 3.0


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 3, 10])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5, 1.0])
def test_no_length_of_run_or_warmup_breaks_a_schedule(kind, steps, warmup):
    rates = [Schedule(kind, 1.0, steps, warmup, 0.1)(step) for step in range(steps + 3)]
    assert all(0 < rate <= 1 for rate in rates)


def test_an_unknown_schedule_is_named():
    with pytest.raises(ValueError, match="'step'"):
        Schedule("step", 1.0, 10)


def gpt(**changes):
    return GPTForCausalLM(GPTConfig(**{"vocab_size": 64, "n_layer": 2, "n_head": 2, "n_embd": 16} | changes))


def test_decay_is_on_matrices_of_linear_layers_only():
    decayed = decayed_names(gpt(bias=True))
    inside = {"attention.qkv_proj", "attention.o_proj", "mlp.up_proj", "mlp.down_proj"}
    assert decayed == {f"model.layers.{layer}.{name}.weight" for layer in (0, 1) for name in inside}


def test_a_head_of_its_own_decays_but_a_tied_one_is_an_embedding():
    assert "lm_head.weight" in decayed_names(gpt(tie_word_embeddings=False))
    assert not any("embed" in name or "head" in name for name in decayed_names(gpt()))


def test_groups_hold_every_trained_parameter_once():
    model = gpt(bias=True)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    groups = parameter_groups(model.named_parameters(), decayed_names(model), 0.5)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]
    assert all(parameter.dim() == 2 for parameter in groups[0]["params"])


def test_the_optimizer_takes_the_rate_it_is_given():
    model = gpt()
    optimizer = adamw(
        parameter_groups(model.named_parameters(), decayed_names(model), 0.1), (0.9, 0.95), torch.device("cpu")
    )
    set_learning_rate(optimizer, 0.25)
    assert {group["lr"] for group in optimizer.param_groups} == {0.25}
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.95)}
