"""Schedules against torch's own and closed forms; what weight decay touches."""

import math
import warnings

import pytest
import torch
from torch import nn

from landmark_cli.models.gpt import GPTConfig, GPTForCausalLM
from landmark_cli.training.optimizer import (
    RATES_AT_A_TIME,
    SCHEDULES,
    Rates,
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


def one_weight(fused=True):
    weight = nn.Parameter(torch.ones(4))
    optimizer = adamw([{"params": [weight], "weight_decay": 0.1}], (0.9, 0.95), torch.device("cpu"))
    if not fused:
        optimizer.defaults["fused"] = optimizer.param_groups[0]["fused"] = False
    return weight, optimizer


def step(weight, optimizer, gradient, skip, rate=0.1):
    weight.grad = torch.full((4,), gradient)
    optimizer.prepare_step(torch.tensor(rate, dtype=torch.float64), torch.tensor(skip))
    optimizer.step()
    return weight.detach().clone(), {name: one.clone() for name, one in optimizer.state[weight].items()}


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "not fused"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1.0])
def test_a_step_that_is_skipped_changes_nothing(fused, bad):
    weight, optimizer = one_weight(fused)
    before, state = step(weight, optimizer, 1.0, 0.0)
    after, kept = step(weight, optimizer, bad, 1.0)
    assert torch.equal(after, before) and all(torch.equal(kept[name], state[name]) for name in state)
    # It is only this one that is skipped.
    plain, other = one_weight(fused)
    step(plain, other, 1.0, 0.0)
    ours, theirs = step(weight, optimizer, 2.0, 0.0, rate=0.2), step(plain, other, 2.0, 0.0, rate=0.2)
    assert torch.equal(ours[0], theirs[0]) and not torch.equal(ours[0], before)


@pytest.mark.parametrize(("gradient", "skip", "counts"), [(1.0, 0.0, True), (1.0, 1.0, False), (math.inf, 0.0, False)])
def test_either_it_or_the_scaler_of_fp16_gradients_skips_a_step(gradient, skip, counts):
    weight, optimizer = one_weight()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale((weight * gradient).sum()).backward()
    scaler.unscale_(optimizer)
    optimizer.prepare_step(torch.tensor(0.1), torch.tensor(skip))
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(weight.detach(), torch.ones(4)) is not counts
    assert not hasattr(optimizer, "found_inf")


def test_the_groups_rates_are_no_part_of_it():
    """What saves and loads an optimizer finds plain numbers, and may make a step of its own at the rate 0."""
    weight, optimizer = one_weight()
    before, _ = step(weight, optimizer, 1.0, 0.0)
    assert optimizer.state_dict()["param_groups"][0]["lr"] == 0.0
    weight.grad = torch.zeros(4)
    optimizer.step()
    assert torch.equal(weight.detach(), before)


def test_rates_go_by_the_steps_that_counted():
    schedule, skipped = Schedule("cosine", 1.0, 3 * RATES_AT_A_TIME), torch.tensor(0)
    rates = Rates(schedule, torch.device("cpu"))
    # From wherever a run is resumed, over the ends of the tables.
    for number in (5, 6, RATES_AT_A_TIME + 4, RATES_AT_A_TIME + 5, 2 * RATES_AT_A_TIME + 9, 2 * RATES_AT_A_TIME + 10):
        skipped += 1
        assert float(rates.at(number, skipped)) == schedule(number - int(skipped))
