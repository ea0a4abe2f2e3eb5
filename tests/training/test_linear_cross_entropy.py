"""The loss without logits: the same loss and gradients as with them."""

import pytest
import torch
from torch import nn

from landmark_cli import families
from landmark_cli.models.lora import LoraSettings, add_adapters
from landmark_cli.training import linear_cross_entropy as module
from landmark_cli.training.linear_cross_entropy import linear_cross_entropy, piece_rows
from landmark_cli.training.setup import LossModel
from tests.closeness import assert_close_norm
from tests.models.families import FAMILIES, tiny_decoder

ROWS, WIDTH, VOCABULARY = 300, 24, 130


def inputs(dtype=torch.float32):
    torch.manual_seed(0)
    hidden = torch.randn(3, ROWS // 3, WIDTH, dtype=dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, dtype=dtype).requires_grad_()
    targets = torch.randint(VOCABULARY, (3, ROWS // 3))
    targets[:, ::7] = -100
    return hidden, weight, targets


def plain(hidden, weight, targets):
    logits = nn.functional.linear(hidden, weight).float()
    return nn.functional.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="sum")


def loss_and_gradients(loss_of, hidden, weight, targets, scale=0.37):
    loss = loss_of(hidden, weight, targets)
    return loss.detach(), *torch.autograd.grad(loss * scale, (hidden, weight))


@pytest.mark.parametrize("piece", [1 << 29, 128 * VOCABULARY], ids=["whole", "pieces"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_loss_and_gradients_are_those_of_the_logits(monkeypatch, piece, compiled):
    monkeypatch.setattr(module, "PIECE", piece)
    assert piece_rows(ROWS, VOCABULARY) == (ROWS if piece == 1 << 29 else 128)
    loss_of = torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True) if compiled else (
        linear_cross_entropy
    )  # fmt: skip
    ours, expected = (loss_and_gradients(f, *inputs()) for f in (loss_of, plain))
    assert_close_norm(ours, expected)


@pytest.mark.parametrize("piece", [1 << 29, 128 * VOCABULARY], ids=["whole", "pieces"])
def test_under_autocast_the_gradients_are_as_exact_as_those_of_the_logits(monkeypatch, piece):
    monkeypatch.setattr(module, "PIECE", piece)
    exact = loss_and_gradients(plain, *inputs())
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (loss_and_gradients(f, *inputs()) for f in (linear_cross_entropy, plain))
    for found, usual, wanted in zip(ours, theirs, exact, strict=True):
        assert found.dtype == torch.float32
        assert (found - wanted).norm() <= 1.2 * (usual - wanted).norm() + 1e-3 * wanted.norm()


def test_no_targets_give_no_loss_and_no_gradients():
    hidden, weight, targets = inputs()
    for found in loss_and_gradients(linear_cross_entropy, hidden, weight, torch.full_like(targets, -100)):
        assert not found.any()


def test_only_gradients_that_are_wanted_are_formed():
    hidden, weight, targets = inputs()
    expected = loss_and_gradients(plain, hidden, weight, targets, scale=1.0)
    loss = linear_cross_entropy(hidden, weight.detach(), targets)
    assert_close_norm(torch.autograd.grad(loss, hidden)[0], expected[1])
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, targets).requires_grad
    assert_close_norm(loss.detach(), expected[0])


def rows_apart(vocabulary):
    """(room, logits in it, targets) of 20 rows: they are further apart than they are long, and what lies between is to
    stay nan."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(vocabulary)
    room = torch.full((20, vocabulary + 3), torch.nan, device=device)
    logits = room[:, :vocabulary].copy_(3 * torch.randn(20, vocabulary))
    targets = torch.randint(vocabulary, (20,), device=device)
    targets[::7] = -100
    return room, logits, targets


@pytest.mark.parametrize("vocabulary", [7, 130, 9001, 20_000])
def test_the_kernel_does_what_the_definition_does(vocabulary):
    fused_cross_entropy = pytest.importorskip("landmark_cli.training.fused_cross_entropy")

    room, logits, targets = rows_apart(vocabulary)
    expected = logits.clone()
    losses, wanted = torch.full((2, 20), torch.nan, device=logits.device)
    fused_cross_entropy.score_and_differentiate(logits, targets, losses)
    module.score_and_differentiate(expected, targets, wanted)
    assert_close_norm((logits, losses), (expected, wanted))
    assert room[:, vocabulary:].isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("piece", [1 << 29, 128 * VOCABULARY], ids=["whole", "pieces"])
def test_on_a_gpu_in_bf16_the_gradients_are_as_exact_as_those_of_the_logits(monkeypatch, piece):
    monkeypatch.setattr(module, "PIECE", piece)
    exact = loss_and_gradients(plain, *inputs())
    placed = [tensor.detach().cuda() for tensor in inputs()]
    with torch.autocast("cuda", torch.bfloat16):
        ours, theirs = (
            loss_and_gradients(f, placed[0].requires_grad_(), placed[1].requires_grad_(), placed[2])
            for f in (linear_cross_entropy, plain)
        )
    for found, usual, wanted in zip(ours, theirs, exact, strict=True):
        assert found.dtype == torch.float32
        assert (found.cpu() - wanted).norm() <= 1.2 * (usual.cpu() - wanted).norm() + 1e-3 * wanted.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_decoders_loss_is_the_same_with_and_without_logits(family):
    model = tiny_decoder(family).train()
    ids, labels = torch.randint(300, (2, 2, 20))
    labels[:, 5:9] = -100
    losses, gradients = [], []
    for fused in (False, True):
        loss_model = LossModel(model, fused_loss=fused)
        plain_head = not families.FAMILIES[model.config.model_type].beyond_head or family in ("gemma3", "gemma4")
        assert loss_model.fused_loss == (fused and plain_head)
        loss = loss_model(ids, labels)
        losses.append(loss.detach())
        gradients.append(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))
    assert_close_norm(*losses)
    assert_close_norm(*gradients)


@pytest.mark.parametrize("targets", [None, ("q_proj", "down_proj")], ids=["all layers", "some"])
@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen3", "gpt-neox", "granite"])
def test_a_loss_with_adapters_is_the_same_with_and_without_logits(family, targets):
    if targets and family == "gpt-neox":
        targets = ("query_key_value",)
    adapted = add_adapters(tiny_decoder(family), LoraSettings(4, 8.0, targets=targets)).train()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            # They begin at zero, where the matrices before them have no gradient.
            torch.nn.init.normal_(parameter, std=0.1)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    ids, labels = torch.randint(300, (2, 2, 20))
    labels[:, 5:9] = -100
    losses, gradients = [], []
    for fused in (False, True):
        loss_model = LossModel(adapted, fused_loss=fused)
        assert loss_model.fused_loss == (fused and family != "granite")
        loss = loss_model(ids, labels)
        losses.append(loss.detach())
        gradients.append(torch.autograd.grad(loss, trained))
    assert all(gradient.norm() > 0 for gradient in gradients[0])
    assert_close_norm(*losses)
    assert_close_norm(*gradients)


def test_a_head_with_an_adapter_of_its_own_is_no_plain_head():
    adapted = add_adapters(tiny_decoder("llama"), LoraSettings(4, 8.0, targets=("q_proj", "lm_head")))
    assert not LossModel(adapted, fused_loss=True).fused_loss
