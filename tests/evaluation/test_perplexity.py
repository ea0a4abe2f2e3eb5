"""Perplexity: the same numbers as one forward pass, whatever the chunks and batches; clear errors."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from landmark_cli.data.landmarks import insert_landmarks, landmark_positions
from landmark_cli.errors import LandmarkError
from landmark_cli.evaluation.perplexity import begun, evaluate_perplexity
from landmark_cli.evaluation.score import Score, score
from landmark_cli.inference.settings import ReadingSettings
from tests.closeness import assert_close_norm
from tests.tiny import FREQ, LANDMARK, tiny_baseline, tiny_model, tiny_text

MODEL, BASELINE, EOT = tiny_model(), tiny_baseline(), 7


def log_likelihoods(model, row: torch.Tensor) -> torch.Tensor:
    """Log-probability of every token of a row but the first, by one forward pass over the whole row."""
    stream = row[:-1]
    if model.config.landmark_freq:
        stream = insert_landmarks(stream, FREQ, LANDMARK)
    with torch.no_grad():
        logits = model(stream[None]).logits[0]
    if model.config.landmark_freq:
        logits = logits[~landmark_positions(len(stream), FREQ + 1)]
    return logits.log_softmax(-1).gather(-1, row[1:, None])[:, 0]


@given(st.integers(2, 45), st.integers(1, 20), st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_reading_with_all_blocks_equals_one_forward_pass(eval_length, chunk, batch_size):
    text = tiny_text(2 * eval_length + 1)
    result = evaluate_perplexity(
        MODEL,
        text,
        eot_id=None,
        eval_length=eval_length,
        reading=ReadingSettings(top_k_blocks=64, chunk=chunk),
        batch_size=batch_size,
    )
    windows = [text[:-1].view(2, -1)[i] for i in range(2)]
    following = [windows[1][:1], text[-1:]]
    expected = -sum(log_likelihoods(MODEL, torch.cat(pair)).sum() for pair in zip(windows, following, strict=True))
    assert result.overall.tokens == 2 * eval_length
    assert math.isclose(result.overall.negative_log_likelihood, expected, rel_tol=1e-4)
    assert result.memory and result.windows == 2
    assert len(result.chunks) == -(-eval_length // chunk)
    assert math.isclose(sum(part.negative_log_likelihood for part in result.chunks), expected, rel_tol=1e-4)


@pytest.mark.parametrize("model", [MODEL, BASELINE], ids=["landmark", "baseline"])
def test_without_memory_chunks_know_nothing_of_each_other(model):
    text = tiny_text(61)
    result = evaluate_perplexity(
        model, text, eot_id=None, eval_length=30, memory=False, reading=ReadingSettings(chunk=12), batch_size=2
    )
    assert [part.tokens for part in result.chunks] == [24, 24, 12]
    for index, (begin, end) in enumerate([(0, 12), (12, 24), (24, 30)]):
        expected = -sum(log_likelihoods(model, text[w + begin : w + end + 1]).sum() for w in (0, 30))
        assert math.isclose(result.chunks[index].negative_log_likelihood, expected, rel_tol=1e-4)
    assert not result.memory


def test_memory_changes_all_but_the_first_chunk():
    text = tiny_text(121)
    settings = ReadingSettings(top_k_blocks=2, chunk=8)
    with_memory, without = (
        evaluate_perplexity(MODEL, text, eot_id=None, eval_length=40, memory=memory, reading=settings)
        for memory in (True, False)
    )
    same = [math.isclose(a.loss, b.loss, rel_tol=1e-5) for a, b in zip(with_memory.chunks, without.chunks, strict=True)]
    assert same == [True, False, False, False, False]


def test_end_of_text_predicts_nothing():
    text = tiny_text(41)
    text[text == EOT] = EOT + 1
    text[[3, 17]] = EOT
    result = evaluate_perplexity(MODEL, text, eot_id=EOT, eval_length=40)
    assert result.overall.tokens == 38


def test_batch_size_changes_nothing_and_a_sample_is_drawn_by_its_seed():
    text = tiny_text(401)
    whole = evaluate_perplexity(MODEL, text, eot_id=None, eval_length=40, batch_size=10)
    single = evaluate_perplexity(MODEL, text, eot_id=None, eval_length=40, batch_size=1)
    assert math.isclose(whole.overall.loss, single.overall.loss, rel_tol=1e-5)
    sample = {"eval_length": 40, "sample_tokens": 120, "eot_id": None}
    first = evaluate_perplexity(MODEL, text, **sample, seed=3)
    assert first.windows == 3 and first.overall.tokens == 120
    assert evaluate_perplexity(MODEL, text, **sample, seed=3) == first
    assert evaluate_perplexity(MODEL, text, **sample, seed=4) != first


def test_defaults_follow_the_trained_length():
    result = evaluate_perplexity(MODEL, tiny_text(1000), eot_id=None, sample_tokens=1)
    # Trained on 40 positions: 32 text tokens; the default chunk leaves room for 3 of the 8 blocks.
    assert (result.eval_length, result.chunk, result.windows) == (128, 20, 1)
    result = evaluate_perplexity(BASELINE, tiny_text(1000), eot_id=None, sample_tokens=1)
    assert (result.eval_length, result.chunk) == (160, 40)
    assert evaluate_perplexity(MODEL, tiny_text(100), eot_id=None).eval_length == 99


def test_a_text_shorter_than_a_window_is_an_error():
    with pytest.raises(LandmarkError, match="too few for one window of 50"):
        evaluate_perplexity(MODEL, tiny_text(50), eot_id=None, eval_length=50)


def test_score_in_pieces(monkeypatch):
    logits, targets = torch.randn(3, 5, 11, dtype=torch.bfloat16), torch.randint(0, 11, (3, 5))
    targets[0, :2] = -100
    monkeypatch.setattr("landmark_cli.evaluation.score.PIECE", 40)
    sums = score(logits, targets)
    flat = logits.float().flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(flat, targets.flatten(), reduction="sum")
    correct = (flat.argmax(-1) == targets.flatten()).sum()
    assert sums[::2].tolist() == [13, correct]
    assert_close_norm(sums[1], expected.double(), torch.float32)


def test_nothing_predicted_has_no_loss():
    empty = Score(0, 0.0, 0)
    assert all(math.isnan(x) for x in (empty.loss, empty.perplexity, empty.accuracy))


@pytest.mark.parametrize("loss", [0.0, 3.2, 700.5, 709.0, 710.0, 1e6, math.inf, math.nan])
def test_a_perplexity_is_never_made_up(loss):
    found = Score(2, 2 * loss, 0).perplexity
    if math.isnan(loss):
        assert math.isnan(found)
    elif loss < 709.5:
        assert found == math.exp(loss)
    else:
        assert found == math.inf


def test_windows_know_nothing_of_each_other():
    text = tiny_text(201)
    together = evaluate_perplexity(MODEL, text, eot_id=None, eval_length=40, batch_size=2)
    alone = [evaluate_perplexity(MODEL, text[at : at + 41], eot_id=None, eval_length=40) for at in range(0, 200, 40)]
    expected = sum(result.overall.negative_log_likelihood for result in alone)
    assert math.isclose(together.overall.negative_log_likelihood, expected, rel_tol=1e-5)


@pytest.mark.parametrize(("memory", "alone"), [(True, 30), (False, 12)], ids=["windows", "chunks without memory"])
def test_what_is_read_by_itself_begins_as_a_text_does(memory, alone):
    """And predicts what it predicted."""
    text = tiny_text(61)
    settings = {"eot_id": None, "memory": memory, "reading": ReadingSettings(top_k_blocks=64, chunk=12)}
    expected = 0.0
    for window in (0, 30):
        for begin in range(0, 30, alone):
            piece = text[window + begin : window + min(begin + alone, 30) + 1].clone()
            piece[0] = 7
            expected -= log_likelihoods(MODEL, piece).sum().item()
    result = evaluate_perplexity(MODEL, text, eval_length=30, begin=[7], **settings)
    assert math.isclose(result.overall.negative_log_likelihood, expected, rel_tol=1e-4)
    plain = evaluate_perplexity(MODEL, text, eval_length=30, **settings)
    assert result.overall.tokens == plain.overall.tokens and not math.isclose(result.overall.loss, plain.overall.loss)
    # Of several such tokens each has its place.
    rows = begun(torch.zeros(2, 9, dtype=torch.int64), [7, 8], 4)
    assert rows.tolist() == [[7, 8, 0, 0, 7, 8, 0, 0, 7]] * 2
