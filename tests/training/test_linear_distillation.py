"""The loss beside a teacher: without logits the same loss and gradients as with them, by the kernel too."""

import pytest
import torch
from torch import nn

from landmark_cli.training import linear_cross_entropy
from landmark_cli.training import linear_distillation as module
from landmark_cli.training.linear_cross_entropy import piece_rows
from landmark_cli.training.linear_distillation import distillation, linear_distillation
from tests.closeness import assert_close_norm

ROWS, WIDTH, TEACHER_WIDTH = 300, 24, 17
# The student's and the teacher's.
VOCABULARIES = [(131, 127), (127, 131), (130, 130), (3, 2)]
PIECES = pytest.mark.parametrize("pieces", [1, 3], ids=["whole", "pieces"])


def some_weights(count, shift=0):
    """0, 1 and others."""
    return (torch.arange(count) * 7 // 3 + shift) % 4 * 0.75


def inputs(vocabulary, teacher_vocabulary, dtype=torch.float32):
    """What linear_distillation takes, temperature aside, in (3, ROWS / 3) positions."""
    torch.manual_seed(vocabulary)
    shape = (3, ROWS // 3)
    hidden = torch.randn(*shape, WIDTH, dtype=dtype).requires_grad_()
    weight = torch.randn(vocabulary, WIDTH, dtype=dtype).requires_grad_()
    teacher = (
        torch.randn(*shape, TEACHER_WIDTH, dtype=dtype),
        torch.randn(teacher_vocabulary, TEACHER_WIDTH, dtype=dtype),
    )
    targets = torch.randint(vocabulary, shape)
    targets[:, ::7] = -100
    return hidden, weight, *teacher, targets, some_weights(ROWS).view(shape), some_weights(ROWS, 1).view(shape)


def by_logits(hidden, weight, teacher_hidden, teacher_weight, *rest):
    return distillation(
        nn.functional.linear(hidden, weight), nn.functional.linear(teacher_hidden, teacher_weight), *rest
    )


def spelled_out(hidden, weight, teacher_hidden, teacher_weight, targets, weights, target_weights, temperature):
    """Position by position, by torch's own divergence and cross entropy."""
    loss, divergences, losses = 0.0, [], []
    for at in range(targets.numel()):
        student = hidden.flatten(0, 1)[at] @ weight.T
        teacher = ((teacher_hidden.flatten(0, 1)[at] @ teacher_weight.T)[: len(weight)] / temperature).log_softmax(-1)
        tempered = (student / temperature).log_softmax(-1)[: len(teacher)]
        divergence = nn.functional.kl_div(tempered, teacher, log_target=True, reduction="sum") * temperature**2
        target, w, u = targets.flatten()[at], weights.flatten()[at], target_weights.flatten()[at]
        nll = -student.log_softmax(-1)[target] if target >= 0 else torch.zeros(())
        loss = loss + w * divergence + u * nll
        divergences.append(divergence.detach() * (w != 0))
        losses.append(nll.detach())
    return loss, torch.stack(divergences).view(targets.shape), torch.stack(losses).view(targets.shape)


def test_few_rows_at_a_time_change_no_bit(monkeypatch):
    whole = found(linear_distillation, *inputs(131, 127))
    for logits in (1, 7 * 131, 100 * 131):
        monkeypatch.setattr(module, "AT_A_TIME", logits)
        assert all(map(torch.equal, found(linear_distillation, *inputs(131, 127)), whole))


def found(loss_of, hidden, weight, *rest, scale=0.37):
    loss, divergences, losses = loss_of(hidden, weight, *rest)
    assert loss.requires_grad and not divergences.requires_grad and not losses.requires_grad
    return loss.detach(), divergences, losses, *torch.autograd.grad(loss * scale, (hidden, weight))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("vocabularies", VOCABULARIES)
def test_the_definition_is_torchs_divergence_and_cross_entropy(vocabularies, temperature):
    given = (*inputs(*vocabularies), temperature)
    assert_close_norm(found(by_logits, *given), found(spelled_out, *given))


@PIECES
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("vocabularies", VOCABULARIES)
def test_loss_and_gradients_are_those_of_the_logits(monkeypatch, vocabularies, temperature, pieces):
    monkeypatch.setattr(linear_cross_entropy, "PIECE", ROWS * sum(vocabularies) // pieces)
    assert piece_rows(ROWS, sum(vocabularies)) == (ROWS if pieces == 1 else 128)
    given = (*inputs(*vocabularies), temperature)
    assert_close_norm(found(linear_distillation, *given), found(by_logits, *given))


def test_compiled_it_is_the_same():
    compiled = torch.compile(linear_distillation, backend="aot_eager", fullgraph=True)
    given = (*inputs(131, 127), 2.0)
    assert_close_norm(found(compiled, *given), found(linear_distillation, *given))


@PIECES
def test_under_autocast_the_gradients_are_as_exact_as_those_of_the_logits(monkeypatch, pieces):
    monkeypatch.setattr(linear_cross_entropy, "PIECE", ROWS * 258 // pieces)
    exact = found(by_logits, *inputs(131, 127))
    hidden, weight, teacher_hidden, teacher_weight, *rest = inputs(131, 127)
    given = hidden, weight, teacher_hidden.bfloat16(), teacher_weight.bfloat16(), *rest
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (found(f, *given) for f in (linear_distillation, by_logits))
    for x, usual, wanted in zip(ours, theirs, exact, strict=True):
        assert x.dtype == torch.float32
        assert (x - wanted).norm() <= 1.2 * (usual - wanted).norm() + 1e-3 * wanted.norm()


def test_only_gradients_that_are_wanted_are_formed():
    hidden, weight, *rest = inputs(131, 127)
    expected = found(by_logits, hidden, weight, *rest, scale=1.0)
    loss = linear_distillation(hidden, weight.detach(), *rest)[0]
    assert_close_norm(torch.autograd.grad(loss, hidden)[0], expected[3])
    with torch.no_grad():
        assert not linear_distillation(hidden, weight, *rest)[0].requires_grad
    assert_close_norm(loss.detach(), expected[0])


@pytest.mark.parametrize("loss_of", [linear_distillation, by_logits])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(loss_of):
    hidden, weight, _, _, targets, weights, _ = inputs(131, 127)
    given = hidden, weight, hidden.detach(), weight.detach(), targets, weights, torch.zeros_like(weights)
    loss, divergences, losses, *gradients = found(loss_of, *given, 2.0)
    assert abs(loss) < 1e-3 and divergences.abs().max() < 1e-5 and losses.count_nonzero() > 200
    assert all(gradient.norm() < 1e-4 for gradient in gradients)


def rows_apart(vocabulary, teacher_vocabulary, dtype=torch.float32):
    """(room, teacher's room, what distil_and_differentiate takes up to the temperature) of 20 rows: they are further
    apart than they are long, and what lies between is to stay nan. The second row has no target and no weights, its
    logits are nan; the third's divergence weighs nothing, and its teacher is nan."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(vocabulary)
    room = torch.full((20, vocabulary + 3), torch.nan, device=device, dtype=dtype)
    teacher_room = torch.full((20, teacher_vocabulary + 5), torch.nan, device=device, dtype=dtype)
    logits, teacher = room[:, :vocabulary], teacher_room[:, :teacher_vocabulary]
    logits.copy_(3 * torch.randn(20, vocabulary))
    teacher.copy_(3 * torch.randn(20, teacher_vocabulary))
    targets = torch.randint(vocabulary, (20,), device=device)
    targets[1::7] = -100
    weights, target_weights = some_weights(20).to(device), some_weights(20, 1).to(device)
    weights[1] = target_weights[1] = weights[2] = 0
    logits[1], teacher[1:3] = torch.nan, torch.nan
    return room, teacher_room, (logits, teacher, targets, weights, target_weights)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("vocabularies", [*VOCABULARIES, (9001, 8999), (20_000, 19_937)])
def test_the_kernel_does_what_the_definition_does(vocabularies, temperature):
    fused_distillation = pytest.importorskip("landmark_cli.training.fused_distillation")

    room, teacher_room, (logits, teacher, *given) = rows_apart(*vocabularies)
    room_before, teacher_before = logits.clone(), teacher.clone()
    found = torch.full((2, 20), torch.nan, device=logits.device)
    fused_distillation.distil_and_differentiate(logits, teacher, *given, temperature, *found)
    wanted, expected = torch.full_like(found, torch.nan), room_before.clone()
    module.distil_and_differentiate(expected, teacher, *given, temperature, *wanted)
    assert found[0].count_nonzero() > 10 and found[1].count_nonzero() > 10 and not logits[1].any()
    assert not found[:, 1].any() and not found[0, 2] and logits[2].any()
    assert_close_norm((logits, *found), (expected, *wanted))
    # Nothing else was written.
    assert room[:, vocabularies[0] :].isnan().all() and teacher_room[:, vocabularies[1] :].isnan().all()
    assert torch.equal(teacher.nan_to_num(5.0), teacher_before.nan_to_num(5.0))


@pytest.mark.parametrize("seed", range(6))
def test_the_kernel_at_shapes_drawn_at_random(seed):
    fused_distillation = pytest.importorskip("landmark_cli.training.fused_distillation")

    torch.manual_seed(seed)
    vocabulary, more, dtype = int(torch.randint(2, 3000, ())), int(torch.randint(-1, 130, ())), torch.bfloat16
    temperature = 0.5 + float(torch.rand(()))
    _, _, (logits, teacher, *given) = rows_apart(vocabulary + max(more, 0), vocabulary - min(more, 0), dtype)
    exact = logits.float()
    found, wanted = torch.full((2, 2, 20), torch.nan, device=logits.device)
    fused_distillation.distil_and_differentiate(logits, teacher, *given, temperature, *found)
    module.distil_and_differentiate(exact, teacher, *given, temperature, *wanted)
    assert_close_norm(logits, exact.to(dtype))
    assert_close_norm(found, wanted)
