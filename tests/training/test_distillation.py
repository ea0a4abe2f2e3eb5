"""Learning from a teacher: what it reads, where it is asked, what the loss is a mean of; that it stays as it was."""

import dataclasses

import pytest
import torch
from torch import nn

from landmark_cli.attention.window import WindowSettings
from landmark_cli.data.landmarks import IGNORED_TARGET, insert_landmarks, next_token_targets
from landmark_cli.errors import LandmarkError
from landmark_cli.models.decoders import add_landmarks
from landmark_cli.models.lora import LoraSettings, add_adapters
from landmark_cli.training.distillation import Distillation, DistillationLoss
from landmark_cli.training.setup import LossModel
from landmark_cli.training.teachers import Teacher, UntouchedRows, WithoutAdapters, check_layers
from tests.closeness import assert_close_norm
from tests.models.families import tiny_decoder, tiny_tokenizer

FREQ = 4
FAMILIES = ["llama", "llama-tied", "qwen3", "gpt-neox", "gemma", "gemma3", "granite"]


def pair(family="llama", length=512, dtype=torch.float32, **weights):
    """(student's loss, teacher's model as it is opened, how the student learns from it)."""
    student, untouched = tiny_decoder(family), tiny_decoder(family)
    untouched.load_state_dict(student.state_dict())
    add_landmarks(student, tiny_tokenizer(), landmark_freq=FREQ, trained_length=60)
    teacher = Teacher(untouched.to(dtype))
    teacher.length = length
    how = Distillation(teacher, "self", student.config.landmark_token_id, **weights)
    return DistillationLoss(student, how, 0.0, True).train(), teacher.model, how


def batch_of(texts, landmark, answers=()):
    """The batch of texts of one length, each with the token after it, and marks of answers at some of its targets."""
    stream = insert_landmarks(texts[:, :-1], FREQ, landmark)
    labels = next_token_targets(stream, landmark_token_id=landmark, eot_id=None, following=texts[:, -1])
    marks = torch.zeros_like(labels, dtype=torch.bool)
    for row, column in answers:
        marks[row, column] = True
    return {"input_ids": stream, "labels": labels, "answers": marks}


def some_texts(rows=2, length=31, seed=0):
    return torch.randint(1, 250, (rows, length), generator=torch.Generator().manual_seed(seed))


def expected(loss, teacher, batch, how, texts):
    """The two mean divergences and the two mean cross entropies, from whole logits and nothing else."""
    landmark = how.landmark_token_id
    student = loss.wrapped(input_ids=batch["input_ids"]).logits.float()
    is_text, labels = batch["input_ids"] != landmark, batch["labels"]
    with torch.no_grad():
        wanted = teacher(input_ids=texts[:, :-1]).logits.float()
    ours = student[is_text].view(*wanted.shape[:2], -1)
    tempered, t = [(x / how.temperature).log_softmax(-1) for x in (ours, wanted)], how.temperature
    tempered[0] = tempered[0][..., : wanted.shape[-1]]
    divergence = nn.functional.kl_div(*tempered, log_target=True, reduction="none").sum(-1) * t**2
    divergence, length = divergence[:, : how.teacher.length], how.teacher.length
    marked = (batch["answers"] & (labels != IGNORED_TARGET))[is_text].view(*wanted.shape[:2])[:, :length]
    of_answers = (divergence * marked).sum() / marked.sum().clamp(min=1)
    divergence = divergence.mean()
    losses = nn.functional.cross_entropy(student.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    known = labels != IGNORED_TARGET
    answers = batch["answers"] & known
    return divergence, of_answers, losses[answers].mean(), losses[known].mean()


def step(loss, batches, how):
    """The loss that a step of these micro-batches has, and its parts, as the loop makes them."""
    asked = [how.asked(**batch) for batch in batches]
    counts = torch.stack([how.counts(one) for one in asked]).sum(0)
    targets, ratios = how.ratios(counts)
    found = [loss(**batch, ratios=ratios, asked=one) for batch, one in zip(batches, asked, strict=True)]
    found = torch.stack(found).sum(0)
    return found[0] / targets, found[1:] / counts.clamp(min=1)


@pytest.mark.parametrize("fused", [True, False], ids=["hidden states", "logits"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_and_its_gradient_are_those_of_whole_logits(family, fused):
    loss, teacher, how = pair(family, answer_weight=3.0, answer_divergence_weight=2.0, text_weight=0.5, temperature=1.5)
    loss.fused_loss &= fused
    texts = some_texts()
    batch = batch_of(texts, how.landmark_token_id, [(0, 3), (1, 20), (1, 24)])
    ours, parts = step(loss, [batch], how)
    wanted = expected(loss, teacher, batch, how, texts)
    theirs = wanted[0] + 2 * wanted[1] + 3 * wanted[2] + 0.5 * wanted[3]
    assert_close_norm(parts[:4], torch.stack(wanted).detach())
    assert_close_norm(ours.detach(), theirs.detach())
    trained = [parameter for parameter in loss.parameters() if parameter.requires_grad]
    assert trained and not any(parameter.grad is not None for parameter in teacher.parameters())
    gradients = [torch.autograd.grad(x, trained, allow_unused=True) for x in (ours, theirs)]
    assert_close_norm(*gradients)


def test_the_split_into_micro_batches_does_not_matter():
    loss, _, how = pair(answer_weight=2.0, answer_divergence_weight=1.5, text_weight=0.1)
    texts = some_texts(4)
    # All answers are in one row, and one row has fewer targets than others.
    whole = batch_of(texts, how.landmark_token_id, [(2, 3), (2, 4), (2, 7)])
    whole["labels"][1, :9] = IGNORED_TARGET
    rows = [{name: values[row : row + 1] for name, values in whole.items()} for row in range(4)]
    assert_close_norm(step(loss, [whole], how), step(loss, rows, how))


def test_beyond_the_teachers_positions_only_answers_and_text_count():
    loss, teacher, how = pair(length=11, answer_divergence_weight=2.0, text_weight=0.5)
    texts = some_texts()
    batch = batch_of(texts, how.landmark_token_id, [(0, 30)])
    assert how.counts(how.asked(**batch)).tolist() == [2 * 11, 0, 1, 2 * 30, 0, 0]
    text = how.read(batch["input_ids"])
    assert torch.equal(text.tokens, texts[:, :11])
    ours, parts = step(loss, [batch], how)
    wanted = expected(loss, teacher, batch, how, texts)
    assert_close_norm(parts[:4], torch.stack(wanted).detach())
    assert_close_norm(ours.detach(), (wanted[0] + wanted[2] + 0.5 * wanted[3]).detach())


def test_positions_without_a_target_are_not_asked_about():
    loss, teacher, how = pair(answer_weight=0.0)
    texts = some_texts()
    batch = batch_of(texts, how.landmark_token_id)
    batch["labels"][:, 10:] = IGNORED_TARGET
    given = {name: values[:, :10] for name, values in batch.items()}
    assert how.counts(how.asked(**batch)).tolist() == [16, 0, 0, 16, 0, 0]
    assert_close_norm(step(loss, [batch], how), step(loss, [given], how))
    batch["labels"][:] = IGNORED_TARGET
    assert not step(loss, [batch], how)[0]


def test_a_student_read_chunk_by_chunk_learns_from_a_teacher_that_reads_whole():
    loss, teacher, how = pair(answer_weight=0.0)
    texts = some_texts(length=50)
    batch = batch_of(texts, how.landmark_token_id)
    plain = step(loss, [batch], how)[0]
    read = DistillationLoss(loss.wrapped, how, 0.0, True, False, WindowSettings(10, FREQ + 1, 1)).train()
    assert torch.isfinite(step(read, [batch], how)[0]) and step(read, [batch], how)[0] != plain
    # With so many blocks nothing is left out.
    most = DistillationLoss(loss.wrapped, how, 0.0, True, False, WindowSettings(20, FREQ + 1, 50)).train()
    assert_close_norm(step(most, [batch], how)[0].detach(), plain.detach())


def test_documents_are_read_as_texts_of_their_own():
    loss, teacher, how = pair(answer_weight=0.0)
    texts = [some_texts(1, 13, seed=1), some_texts(1, 18, seed=2)]
    alone = [batch_of(text, how.landmark_token_id) for text in texts]
    together = {name: torch.cat([batch[name] for batch in alone], 1) for name in alone[0]}
    ends = torch.tensor([batch["input_ids"].shape[1] for batch in alone])
    together["cu_seqlens"] = torch.nn.functional.pad(ends.cumsum(0), (1, 0)).int()
    assert_close_norm(step(loss, [together], how), step(loss, alone, how))


def assert_compiled_it_is_the_same(loss, how):
    """Values and gradients of a step."""
    batch = batch_of(some_texts(), how.landmark_token_id, [(0, 3)])
    compiled = torch.compile(loss, backend="aot_eager", dynamic=False)
    losses = [step(which, [batch], how)[0] for which in (loss, compiled)]
    assert_close_norm(*(x.detach() for x in losses))
    trained = list(loss.parameters())
    assert_close_norm(*(torch.autograd.grad(x, trained, allow_unused=True) for x in losses))


@pytest.mark.slow
def test_compiled_it_is_the_same():
    loss, _, how = pair(text_weight=0.5)
    assert_compiled_it_is_the_same(loss, how)


@pytest.mark.parametrize("fused", [True, False], ids=["hidden states", "logits"])
@pytest.mark.parametrize("length", [512, 11], ids=["", "beyond the teacher's positions"])
def test_in_evaluation_the_loss_is_the_texts_and_the_divergence_beside_it(fused, length):
    """At temperature 1, whatever the run's; answers are counted as without a teacher."""
    loss, teacher, how = pair(length=length, temperature=1.5, answer_weight=3.0)
    loss.fused_loss &= fused
    texts = some_texts()
    batch = batch_of(texts, how.landmark_token_id, [(0, 3), (1, 20)])
    with torch.no_grad():
        marked = loss.eval()(**batch)
        plain = loss(batch["input_ids"], batch["labels"])
        without_teacher = LossModel(loss.wrapped, 0.0, fused).eval()(**batch)
        divergence, *_, text = expected(loss, teacher, batch, dataclasses.replace(how, temperature=1.0), texts)
    positions = 2 * min(length, 30)
    assert_close_norm(
        plain,
        torch.stack(
            [text * batch["labels"].ne(IGNORED_TARGET).sum(), divergence * positions, torch.tensor(float(positions))]
        ),
    )
    assert_close_norm(marked, torch.cat([without_teacher, plain[1:]]))


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("targets", [None, ("q_proj", "embed_tokens", "lm_head")], ids=["all layers", "head too"])
@pytest.mark.parametrize("tied", [False, True])
def test_without_its_adapters_a_model_is_what_it_was_to_the_bit(tied, targets, dtype):
    base = tiny_decoder("llama", tie_word_embeddings=tied, attention_dropout=0.5).to(dtype)
    untouched = tiny_decoder("llama", tie_word_embeddings=tied, attn_implementation="sdpa").to(dtype).eval()
    untouched.load_state_dict(base.state_dict())
    rows = UntouchedRows(base)
    assert (rows.head is rows.embedding) == tied
    add_landmarks(base, tiny_tokenizer(), landmark_freq=FREQ, trained_length=60)
    adapted = add_adapters(base, LoraSettings(4, 8.0, 0.1, targets)).train()
    student = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter in student:
            parameter += 0.3
    teacher = WithoutAdapters(adapted, rows)
    texts, before = some_texts(), [parameter.clone() for parameter in adapted.parameters()]
    streams = insert_landmarks(texts, FREQ, base.config.landmark_token_id)

    def learned():
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            return adapted(input_ids=streams).logits

    student_before = learned()
    with torch.autocast("cpu", torch.bfloat16):
        states, logits = teacher.states(texts), teacher.logits(texts)
    with torch.no_grad():
        assert torch.equal(states, untouched.model(texts).last_hidden_state)
        assert torch.equal(logits, untouched(texts).logits)
        assert torch.equal(teacher.head, untouched.lm_head.weight)
    assert states.dtype == dtype and not states.requires_grad and not logits.requires_grad
    # And the student is the same as before it was asked.
    assert [parameter for parameter in adapted.parameters() if parameter.requires_grad] == student
    assert all(torch.equal(a, b) for a, b in zip(adapted.parameters(), before, strict=True))
    assert adapted.training and base.training and base.config._attn_implementation == "landmark"
    assert torch.equal(learned(), student_before)
    assert not torch.equal(student_before[:, : texts.shape[1], : logits.shape[-1]], logits)


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "gpt-oss", "cohere2", "smollm3"])
def test_a_teacher_reads_as_its_layers_do(family):
    untouched, base = tiny_decoder(family), tiny_decoder(family)
    rows = UntouchedRows(base)
    add_landmarks(base, tiny_tokenizer(), landmark_freq=FREQ, trained_length=60)
    teacher = WithoutAdapters(add_adapters(base, LoraSettings(4, 8.0)), rows)
    texts = some_texts()
    for each in (teacher, Teacher(tiny_decoder(family))):
        with torch.no_grad():
            assert torch.equal(each.logits(texts), untouched(texts).logits)


@pytest.mark.parametrize("family", ["gemma2", "gpt-oss"])
def test_the_gate_is_of_plain_dot_products(family):
    config = tiny_decoder(family).config
    with pytest.raises(LandmarkError, match="soft-caps its logits or has attention sinks: leave it out"):
        check_layers(config, config, "self", heads=True)
    # Their layers' outputs can be compared all the same.
    check_layers(config, config, "self", heads=False)
    plain = tiny_decoder("gemma3").config
    check_layers(plain, plain, "self", heads=True)
