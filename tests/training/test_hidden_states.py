"""The hidden states' loss: against whole hidden states, compiled and computed again, and that it changes nothing where
it is off."""

import pytest
import torch

from landmark_cli.errors import LandmarkError
from landmark_cli.training.compiled import compile_layers, decoder_layers
from landmark_cli.training.distillation import DistillationLoss
from landmark_cli.training.hidden_states import MOST, check_found, collected, hidden_states_loss
from landmark_cli.training.setup import checkpoint_activations
from tests.closeness import assert_close_norm
from tests.training.test_distillation import batch_of, pair, some_texts, step


def asked_of(batch, how):
    return (batch["input_ids"] != how.landmark_token_id) & (batch["labels"] != -100)


def states_of(model, tokens):
    """What each layer gives, by a hook on each, and what the first is given."""
    found = []
    hooks = [layer.register_forward_hook(lambda _, inputs, out: found.append(out)) for layer in decoder_layers(model)]
    first = decoder_layers(model)[0].register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    model(input_ids=tokens)
    for hook in [*hooks, first]:
        hook.remove()
    return [states[0] if isinstance(states, tuple) else states for states in found]


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3", "gpt-oss"])
def test_it_is_what_whole_hidden_states_give(family):
    loss, teacher, how = pair(family, hidden_weight=0.5)
    texts = some_texts()
    batch = batch_of(texts, how.landmark_token_id)
    found, parts = step(loss, [batch], how)
    with torch.no_grad():
        theirs = states_of(teacher, texts[:, :-1])
    ours = states_of(loss.wrapped, batch["input_ids"])
    is_text = batch["input_ids"][0] != how.landmark_token_id
    layers = []
    for given, wanted, state in zip(theirs, theirs[1:], ours[1:], strict=False):
        distance = (state[:, is_text] - wanted).square().sum(-1)
        layers.append(
            (distance / (wanted - given).square().sum(-1)).clamp(max=MOST)[:, : asked_of(batch, how).sum(1).max()]
        )
    wanted = torch.stack(layers).mean()
    assert len(layers) == teacher.config.num_hidden_layers and wanted > 0.01
    assert_close_norm(parts[5], wanted.detach())
    assert_close_norm(found.detach(), (parts[0] + 0.5 * wanted).detach())
    trained = [parameter for parameter in loss.parameters() if parameter.requires_grad]
    off, _, how_off = pair(family)
    divergence, _ = step(off, [batch], how_off)
    plain = torch.autograd.grad(divergence, [p for p in off.parameters() if p.requires_grad], allow_unused=True)
    beside = torch.autograd.grad(0.5 * wanted, trained, allow_unused=True)
    sums = [a if b is None else b if a is None else a + b for a, b in zip(plain, beside, strict=True)]
    assert_close_norm(torch.autograd.grad(found, trained, allow_unused=True), sums)


def test_off_it_is_nothing_and_the_split_does_not_matter():
    (off, _, how_off), (on, _, how_on) = pair(), pair(hidden_weight=0.7)
    texts = some_texts(4)
    whole = batch_of(texts, how_on.landmark_token_id)
    without, parts = step(off, [whole], how_off)
    found, on_parts = step(on, [whole], how_on)
    assert torch.equal(parts[:5], on_parts[:5]) and parts[5] == 0 and on_parts[5] > 0
    torch.testing.assert_close(found, without + 0.7 * on_parts[5])
    rows = [batch_of(texts[row : row + 1], how_on.landmark_token_id) for row in range(4)]
    assert_close_norm(step(on, rows, how_on), (found, on_parts))
    # An evaluation has no use for it.
    on.eval()
    off.eval()
    assert torch.equal(on(**whole), off(**whole))


@pytest.mark.parametrize("how", ["compiled", "computed again", "both"])
def test_compiled_and_computed_again_it_is_the_same(how):
    batch = batch_of(some_texts(), pair()[2].landmark_token_id)
    found = []
    for change in (False, True):
        loss, teacher, distilled = pair(hidden_weight=0.5)
        if change and how != "compiled":
            checkpoint_activations(loss.wrapped)
        if change and how != "computed again":
            for model in (loss.wrapped, teacher):
                compile_layers(model, backend="aot_eager")
        value, parts = step(loss, [batch], distilled)
        value.backward()
        found.append([value.detach(), parts.detach(), *(p.grad for p in loss.parameters() if p.grad is not None)])
        # The layers are again as they were.
        assert not any(layer._forward_hooks for layer in decoder_layers(teacher))
    assert_close_norm(*found)


def test_compiled_layers_share_what_is_compiled():
    """No layer is compiled anew for being told of."""
    frames = []
    for weight in (0.0, 0.5):
        torch._dynamo.reset()
        counted = torch._dynamo.testing.CompileCounter()
        loss, _, how = pair(hidden_weight=weight)
        compile_layers(loss.wrapped, backend=counted)
        for seed in range(2):
            step(loss, [batch_of(some_texts(seed=seed), how.landmark_token_id)], how)
        frames.append(counted.frame_count)
    assert frames[1] == frames[0] > 0


def test_what_a_position_counts_is_bounded_and_what_is_not_asked_may_be_anything():
    """A layer that adds nothing to some position, and values that are not asked for."""
    states = torch.randn(1, 6, 4)
    still = states.clone()
    still[0, 2] = states[0, 2]
    theirs = [states, still, still + torch.randn(1, 6, 4)]
    ours = [torch.randn(1, 6, 4), *(state + 100 for state in theirs[1:])]
    ours[1][0, 5], theirs[1][0, 5] = torch.nan, torch.inf
    asked = torch.tensor([[True] * 5 + [False]])
    found = [state.requires_grad_() for state in ours]
    loss = hidden_states_loss(found, theirs, asked, lambda values: values)
    assert loss == 5 * MOST
    for gradient in torch.autograd.grad(loss, found[1:]):
        assert gradient.isfinite().all()


def test_a_later_call_adds_nothing():
    layers = torch.nn.ModuleList([torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)])

    def run(x):
        for layer in layers:
            x = layer(x)
        return x

    with collected(layers) as found:
        last = run(torch.ones(1, 2, 3))
        run(torch.zeros(1, 2, 3))
    assert len(found) == 3 and torch.equal(found[0], torch.ones(1, 2, 3)) and found[2] is last
    run(torch.ones(1, 2, 3))
    assert len(found) == 3


def test_layers_that_are_not_found_are_no_loss_of_zero(monkeypatch):
    loss, teacher, how = pair(hidden_weight=0.5)
    batch = batch_of(some_texts(), how.landmark_token_id)
    for model in (loss.wrapped, teacher):
        check_found(model, "base")
        monkeypatch.setattr(model, "_no_split_modules", None)
        with pytest.raises(LandmarkError, match=r"one by one, and of the 2 of base \(Llama.*\) its .* names 0: leave"):
            check_found(model, "base")
        # Where nobody has asked, nothing is compared that does not belong together.
        with pytest.raises(ValueError, match="zip"):
            step(DistillationLoss(loss.wrapped, how, 0.0, True).train(), [batch], how)
        monkeypatch.undo()
