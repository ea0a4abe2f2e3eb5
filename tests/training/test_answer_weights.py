"""Targets with weights: the weighted mean, with and without logits, whatever the split; answers reported apart."""

import json
import math

import pytest
import torch
from torch import nn

from landmark_cli.commands.train import TrainOptions, check
from landmark_cli.data.batches import SequentialWindows
from landmark_cli.data.token_file import TokenFile
from landmark_cli.data.windows import Windows
from landmark_cli.errors import LandmarkError, UsageError
from landmark_cli.training import linear_cross_entropy as module
from landmark_cli.training.linear_cross_entropy import linear_cross_entropy, piece_rows
from landmark_cli.training.setup import LossModel
from tests.closeness import assert_close_norm
from tests.models.families import tiny_decoder
from tests.training.command import records, train
from tests.training.test_linear_cross_entropy import ROWS, VOCABULARY, inputs, loss_and_gradients, plain, rows_apart
from tests.training.tiny import LENGTH, RandomBatches, byte_tokenizer, tiny_loop, tiny_model, write_questions


def some_weights(shape):
    """0, 1 and others."""
    count = torch.Size(shape).numel()
    return (torch.arange(count) * 7 // 3 % 4 * 0.75).view(shape)


def weighted(hidden, weight, targets):
    logits = nn.functional.linear(hidden, weight).float()
    losses = nn.functional.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none")
    return (losses * some_weights(targets.shape).flatten()).sum()


def ours(hidden, weight, targets):
    return linear_cross_entropy(hidden, weight, targets, some_weights(targets.shape))


@pytest.mark.parametrize("piece", [1 << 29, 128 * VOCABULARY], ids=["whole", "pieces"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_weighted_loss_and_gradients_are_those_of_the_logits(monkeypatch, piece, compiled):
    monkeypatch.setattr(module, "PIECE", piece)
    assert piece_rows(ROWS, VOCABULARY) == (ROWS if piece == 1 << 29 else 128)
    loss_of = torch.compile(ours, backend="aot_eager", fullgraph=True) if compiled else ours
    found, expected = (loss_and_gradients(f, *inputs()) for f in (loss_of, weighted))
    assert_close_norm(found, expected)
    assert not torch.allclose(found[0], plain(*inputs()))


def test_weights_of_one_are_none_to_the_bit():
    def of_one(hidden, weight, targets):
        return linear_cross_entropy(hidden, weight, targets, torch.ones(targets.shape))

    for found, expected in zip(
        loss_and_gradients(of_one, *inputs()), loss_and_gradients(linear_cross_entropy, *inputs()), strict=True
    ):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("vocabulary", [7, 130, 9001])
def test_the_kernel_weighs_as_the_definition_does(vocabulary):
    fused_cross_entropy = pytest.importorskip("landmark_cli.training.fused_cross_entropy")

    room, logits, targets = rows_apart(vocabulary)
    weights = some_weights((20,)).to(logits.device)
    # What weighs nothing adds nothing, whatever its logits are.
    logits[int((weights == 0).nonzero()[0])] = torch.inf
    expected = logits.clone()
    losses, wanted = torch.full((2, 20), torch.nan, device=logits.device)
    fused_cross_entropy.score_and_differentiate(logits, targets, losses, weights)
    module.score_and_differentiate(expected, targets, wanted, weights)
    assert not logits[(weights == 0) | (targets == -100)].any() and losses.count_nonzero() > 5
    assert_close_norm((logits, losses), (expected, wanted))
    assert room[:, vocabulary:].isnan().all()


@pytest.mark.parametrize("family", ["llama", "gpt-neox", "granite"])
def test_a_decoders_weighted_loss_is_the_same_with_and_without_logits(family):
    model = tiny_decoder(family).train()
    ids, labels = torch.randint(300, (2, 2, 20))
    labels[:, 5:9] = -100
    losses, gradients = [], []
    for fused in (False, True):
        loss = LossModel(model, fused_loss=fused)(ids, labels, weights=some_weights(ids.shape))
        losses.append(loss.detach())
        gradients.append(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))
    assert_close_norm(*losses)
    assert_close_norm(*gradients)


@pytest.mark.parametrize("fused", [False, True], ids=["logits", "without logits"])
def test_answers_are_scored_apart(fused, monkeypatch):
    monkeypatch.setattr("landmark_cli.training.setup.SCORED_ROWS", 7)
    model = tiny_decoder("llama").eval()
    ids, labels = torch.randint(300, (2, 3, 20))
    labels[:, 5:9] = -100
    answers = torch.rand(3, 20) < 0.5
    with torch.no_grad():
        logits = model(input_ids=ids).logits.float()
        # Some are right.
        labels[:, 10:] = logits.argmax(-1)[:, 10:]
        found = LossModel(model, fused_loss=fused)(ids, labels, answers=answers)
        total = LossModel(model, fused_loss=fused)(ids, labels)
    wanted = answers & (labels != -100)
    expected = nn.functional.cross_entropy(logits[wanted], labels[wanted], reduction="sum")
    right = (logits.argmax(-1) == labels)[wanted].sum()
    assert found[0] == total and found[1] == wanted.sum() and found[3] == right > 5
    assert_close_norm(found[2].float(), expected)


class WeighedBatches(RandomBatches):
    """Rows whose targets weigh 0, 1 or 4, other numbers of each in every row."""

    def batch(self, step, start, stop):
        batch = super().batch(step, start, stop)
        weights = torch.tensor([0.0, 1.0, 4.0])[(batch["input_ids"] + batch["input_ids"][:, :1]) % 3]
        return batch | {"weights": weights.masked_fill(batch["labels"] == -100, 0.0)}


def run_weighed(output, batches=WeighedBatches, **settings):
    loop = tiny_loop(output, **settings)
    loop.batches = batches(8)
    loop.run()
    return records(output) + records(output, "gradient_norm")


def test_the_first_loss_is_the_weighted_mean_of_the_whole_batch(tmp_path):
    model, batch = tiny_model(), WeighedBatches(8).batch(0, 0, 8)
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"]).logits
    losses = nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none")
    expected = (losses * batch["weights"].flatten()).sum() / batch["weights"].sum()
    for fused in (True, False):
        found = run_weighed(tmp_path / str(fused), steps=1, batch_size=2, accumulation=4, fused_loss=fused)
        assert_close_norm(found[0], expected)


def test_the_split_into_micro_batches_does_not_change_a_weighed_run(tmp_path):
    curves = [run_weighed(tmp_path / str(size), batch_size=size, accumulation=8 // size) for size in (8, 4, 1)]
    assert_close_norm(curves[1], curves[0])
    assert_close_norm(curves[2], curves[0])


def test_how_heavy_all_weights_are_is_no_matter(tmp_path):
    class Light(WeighedBatches):
        def batch(self, step, start, stop):
            batch = super().batch(step, start, stop)
            return batch | {"weights": batch["weights"] / 1024}

    assert_close_norm(run_weighed(tmp_path / "light", batches=Light), run_weighed(tmp_path / "heavy"))


def test_batches_without_answers_change_nothing_and_harm_nothing(tmp_path):
    class Weightless(RandomBatches):
        def batch(self, step, start, stop):
            batch = super().batch(step, start, stop)
            return batch | {"weights": torch.zeros(batch["labels"].shape)}

    found = run_weighed(tmp_path, Weightless, steps=2, batch_size=4, accumulation=2)
    assert found == [0.0, 0.0, 0.0, 0.0]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """`cats`: documents with answers, which a letter tells; `plain`: without."""
    root = tmp_path_factory.mktemp("corpora")
    tokenizer = byte_tokenizer(root / "bytes")
    for name in ("cats", "plain"):
        write_questions(root / name, tokenizer, answers=name == "cats")
    return root


def test_a_run_on_answers_alone(corpora, tmp_path, capsys):
    output = train(corpora / "cats", tmp_path / "run", answers_only=True, steps=30, lr=3e-2, eval_every=15)
    losses, right = records(output, "validation_answers_loss"), records(output, "validation_answers_right")
    assert len(losses) == len(right) == 2 and losses[1] < losses[0] and 0 < right[1] < 1
    (tokens,) = {*records(output, "validation_answers_tokens")}
    assert tokens > 0 and right[1] * tokens == pytest.approx(round(right[1] * tokens))
    assert "; of answers, loss " in capsys.readouterr().err
    # The answers are learned, and nothing else is.
    whole = records(output, "validation_loss")
    assert losses[1] < 0.8 * whole[1]
    usual = train(corpora / "cats", tmp_path / "usual", steps=30, lr=3e-2, eval_every=30)
    heavy = train(corpora / "cats", tmp_path / "heavy", steps=30, lr=3e-2, eval_every=30, answer_weight=20.0)
    assert records(usual, "validation_loss")[0] < whole[1]
    assert records(heavy, "validation_answers_loss")[0] < records(usual, "validation_answers_loss")[0]
    assert records(usual)[0] != records(heavy)[0]


def test_marks_alone_change_nothing(corpora, tmp_path):
    """Without weights, a run on a corpus that marks answers is the run on the same corpus without marks, to the bit."""
    marked, plain = (train(corpora / name, tmp_path / name) for name in ("cats", "plain"))
    for key in ("loss", "gradient_norm", "validation_loss"):
        assert records(marked, key) == records(plain, key)
    assert records(marked, "validation_answers_loss") and not records(plain, "validation_answers_loss")


def test_evaluation_of_answers_is_the_same_for_any_batch(corpora, tmp_path):
    file = TokenFile.open(corpora / "cats/validation.bin")
    found = []
    for size in (1, 3, 4):
        model = tiny_model(vocab_size=320, landmark_token_id=257, eos_token_id=256)
        windows = SequentialWindows(file, Windows(LENGTH, 7, 257, 256), limit=11)
        loop = tiny_loop(tmp_path / str(size), batch_size=size, accumulation=1, model=model, validation=[windows])
        held_out = loop.evaluate()
        answers = held_out.answers
        found.append((held_out.whole.loss, answers.loss, answers.accuracy, answers.tokens))
    assert_close_norm(found[1], found[0])
    assert_close_norm(found[2], found[0])
    assert found[0][3] > 10 and math.isfinite(found[0][1])


def test_evaluation_tells_prose_from_corpora_with_answers(corpora, tmp_path):
    cats, plain = (TokenFile.open(corpora / name / "validation.bin") for name in ("cats", "plain"))

    def evaluate(*files):
        windows = [SequentialWindows(file, Windows(LENGTH, 7, 257, 256), limit=5) for file in files]
        model = tiny_model(vocab_size=320, landmark_token_id=257, eos_token_id=256)
        return tiny_loop(tmp_path, batch_size=2, accumulation=1, model=model, validation=windows).evaluate()

    both, prose, questions = evaluate(cats, plain), evaluate(plain), evaluate(cats)
    assert both.prose == prose.whole and both.answers == questions.answers
    assert prose.prose is questions.prose is None and "prose" not in str(questions)
    assert both.record["validation_prose_loss"] == prose.record["validation_loss"]
    assert f"; of prose, loss {prose.whole.loss:.4f}, perplexity " in str(both)


def test_what_does_not_go_together(corpora, tmp_path):
    for dry_run in (False, True):
        with pytest.raises(LandmarkError, match="no corpus says which of its text is answers .*plain/train.bin"):
            train(corpora / "plain", tmp_path / f"run-{dry_run}", answers_only=True, dry_run=dry_run)
    with pytest.raises(LandmarkError, match="leave --answer-weight, --answer-divergence-weight and --answers-only out"):
        train(corpora / "plain", tmp_path / "other", answer_weight=2.0)
    with pytest.raises(UsageError, match="--answer-weight weighs answers against other tokens"):
        check(TrainOptions(answers_only=True, answer_weight=2.0))


def test_a_run_goes_on_with_the_same_weights_only(corpora, tmp_path):
    output = train(corpora / "cats", tmp_path / "run", answer_weight=3.0, save_every=2)
    with pytest.raises(LandmarkError, match="answer"):
        train(corpora / "cats", output, answer_weight=4.0, steps=6, resume=True)
    with pytest.raises(LandmarkError, match="answer"):
        train(corpora / "cats", output, steps=6, resume=True)
    assert json.loads((output / "metrics.jsonl").read_text().splitlines()[0])["step"] == 1
