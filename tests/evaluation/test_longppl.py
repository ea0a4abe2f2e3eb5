"""LongPPL: key tokens and perplexities as a plain definition has them, whatever the batches; kept; clear errors."""

import dataclasses
import math
import signal
from types import SimpleNamespace

import pytest
import torch

from landmark_cli.errors import LandmarkError, Stopped, UsageError
from landmark_cli.evaluation import longppl
from landmark_cli.evaluation.longppl import find_key_tokens, long_text, measure_long_perplexity, ways_of_long
from landmark_cli.evaluation.perplexity import evaluate_perplexity
from landmark_cli.evaluation.studies import FinishedRows
from landmark_cli.evaluation.ways import Way
from landmark_cli.inference.settings import ReadingSettings
from landmark_cli.interrupts import Interrupts
from tests.evaluation.test_perplexity import log_likelihoods
from tests.tiny import tiny_baseline, tiny_llama, tiny_model, tiny_text

EOT, FULL = 15, Way(None, full=True)
# Every block is retrieved, so that reading equals one forward pass.
ALL_BLOCKS, READING = Way(64), ReadingSettings(chunk=12)
MODELS = {"landmark": (tiny_model(), ALL_BLOCKS), "full attention": (tiny_baseline(), FULL)}


def find(tmp_path, model, way, text, asked=None, **settings):
    finished = FinishedRows(tmp_path / "w.jsonl")
    settings = {"context": 10, "stride": 4, "depends_on": {"model": "a"}, "reading": READING, **settings}
    return find_key_tokens(model, way, text, finished, asked or Interrupts(""), **settings)


def measure(tmp_path, model, way, text, key_tokens, **settings):
    finished = FinishedRows(tmp_path / "w.jsonl")
    settings = {"depends_on": {"model": "a"}, "reading": READING, **settings}
    return measure_long_perplexity(model, way, text, key_tokens, finished, Interrupts(""), **settings)


def as_a_text(tokens, begin):
    """With the token that begins a text, if there is one, in place of the first."""
    return tokens if begin is None else torch.cat([torch.tensor([begin]), tokens[1:]])


def defined_key_tokens(model, window, following, context, stride, gain, most, begin=None):
    """Token by token: the loss by the whole window, and by the short context that its group of tokens shares."""
    tokens = torch.cat([window, following])
    whole = -log_likelihoods(model, as_a_text(tokens, begin))
    found = []
    for token in range(context, len(tokens)):
        first = (token - context) // stride * stride
        short = -log_likelihoods(model, as_a_text(tokens[first : token + 1], begin))[-1]
        if tokens[token - 1] != EOT and short - whole[token - 1] > gain and whole[token - 1] < most:
            found.append(token - 1)
    return found


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("begin", [None, 7])
@pytest.mark.parametrize(("eval_length", "context", "stride"), [(30, 10, 4), (23, 5, 6), (12, 11, 3), (21, 20, 50)])
def test_key_tokens_by_their_definition(tmp_path, monkeypatch, kind, eval_length, context, stride, begin):
    # Random models seldom gain two nats.
    monkeypatch.setattr(longppl, "GAIN", 0.02)
    monkeypatch.setattr(longppl, "MOST_LOSS", 5.0)
    model, way = MODELS[kind]
    tokens = tiny_text(2 * eval_length + 1)
    plain = long_text(tokens.numpy(), EOT, eval_length=eval_length)
    text = plain if begin is None else dataclasses.replace(plain, begin=(begin,))
    # What another text left is not taken for this one's.
    find(tmp_path, model, way, dataclasses.replace(plain, begin=(9,)), context=context, stride=stride)
    found = find(tmp_path, model, way, text, context=context, stride=stride, batch_size=3)
    windows = [(tokens[:eval_length], tokens[eval_length : eval_length + 1]), (tokens[eval_length:-1], tokens[-1:])]
    expected = [defined_key_tokens(model, *window, context, stride, 0.02, 5.0, begin) for window in windows]
    assert found == expected
    if eval_length == 30:
        assert 2 < sum(map(len, found)) < 30 and (tokens == EOT).any()


@pytest.mark.parametrize("kind", MODELS)
def test_perplexities_of_key_tokens_and_of_all(tmp_path, kind):
    model, way = MODELS[kind]
    tokens = tiny_text(61)
    text = long_text(tokens.numpy(), EOT, eval_length=20)
    key_tokens = [[3, 11], [], [19]]
    result = measure(tmp_path, model, way, text, key_tokens)
    plain = evaluate_perplexity(
        model, tokens, eot_id=EOT, eval_length=20, memory=kind == "landmark", reading=ReadingSettings(64, chunk=20)
    )
    assert (result.overall.tokens, result.overall.correct) == (plain.overall.tokens, plain.overall.correct)
    assert math.isclose(result.overall.loss, plain.overall.loss, rel_tol=1e-5)
    losses = [-log_likelihoods(model, tokens[first : first + 21]) for first in (0, 20, 40)]
    # One of the three holds the end-of-text token, which predicts nothing.
    counted = [(window, place) for window, place in ((0, 3), (0, 11), (2, 19)) if tokens[20 * window + place] != EOT]
    assert result.key.tokens == len(counted) == 2
    expected = sum(losses[window][place] for window, place in counted)
    assert math.isclose(result.key.negative_log_likelihood, expected, rel_tol=1e-5)
    none = measure(tmp_path, model, way, text, [[], [], []])
    assert none.key.tokens == 0 and math.isnan(none.key.perplexity) and none.overall == result.overall


class Copier(torch.nn.Module):
    """A model that is sure of a token where the two before it have stood in its window already, with that token
    behind."""

    def __init__(self):
        super().__init__()
        self.config = tiny_llama(max_position_embeddings=400).config
        self.device, self.unused = torch.device("cpu"), torch.nn.Linear(1, 1)
        self.config.vocab_size = 1000

    def forward(self, input_ids, logits_to_keep=0, use_cache=False):
        logits = torch.zeros(*input_ids.shape, 1000)
        for row, ids in enumerate(input_ids.tolist()):
            behind = {}
            for place in range(1, len(ids)):
                pair = (ids[place - 1], ids[place])
                if pair in behind:
                    logits[row, place, behind[pair]] = 20.0
                if place + 1 < len(ids):
                    behind[pair] = ids[place + 1]
        return SimpleNamespace(logits=logits)


def test_what_is_repeated_from_far_away_is_key(tmp_path):
    """The paper's own bounds: a passage that comes again after 200 tokens is key but for its first two tokens, one that
    comes again after 20 is none."""
    tokens = torch.randperm(1000)[:301]
    tokens[230:240] = tokens[20:30]
    tokens[280:290] = tokens[260:270]
    text = long_text(tokens.numpy(), None, eval_length=300)
    found = find(tmp_path, Copier(), FULL, text, context=64, stride=16)
    # Position p predicts token p + 1: the pair of tokens 230 and 231 foretells 232, and 240 is another one than 30.
    assert found == [list(range(231, 239))]
    # The short contexts of tokens 232 to 239 begin with tokens 160 to 175: the first passage's repetition is not there.
    result = measure(tmp_path, Copier(), FULL, text, found)
    assert result.key.perplexity < 1.01 and result.overall.perplexity > 100
    assert find(tmp_path, Copier(), FULL, text, context=220, stride=16) == [[]]


def test_windows_are_kept_and_a_run_goes_on(tmp_path, capsys):
    model, tokens = Copier(), torch.randperm(1000)[:301]
    text = long_text(tokens.numpy(), None, "a text", eval_length=100)
    asked = Interrupts("finishing the windows under way")
    asked.note(signal.SIGTERM)
    with pytest.raises(Stopped, match="what was measured is kept; go on with"):
        find(tmp_path, model, FULL, text, asked)
    first = find(tmp_path, model, FULL, text)
    lines = (tmp_path / "w.jsonl").read_text().splitlines()
    (tmp_path / "w.jsonl").write_text("\n".join(lines[:2]) + "\n")
    assert find(tmp_path, model, FULL, text) == first
    assert "key tokens, full attention: 2 of 3 windows are kept from an earlier run" in capsys.readouterr().err
    for changed in (
        {"context": 11},
        {"stride": 5},
        {"depends_on": {"model": "b"}},
        {"text": long_text(tokens.numpy(), None, "another", eval_length=100)},
    ):
        find(tmp_path, model, FULL, **{"text": text, **changed})
        assert "are kept" not in capsys.readouterr().err, changed
    one = measure(tmp_path, model, FULL, text, [[1], [], []])
    assert measure(tmp_path, model, FULL, text, [[1], [], []]) == one
    assert measure(tmp_path, model, FULL, text, [[1], [2], []]).key.tokens == 2


def test_ways_and_mistakes(tmp_path):
    landmark, llama, recurrent = tiny_model(), tiny_llama(), tiny_baseline(memory_length=8, segment_length=8)
    assert ways_of_long(landmark, [2, 4]) == [Way(2), Way(4)] and ways_of_long(landmark, None) == [Way(2)]
    assert ways_of_long(llama, None) == [FULL] and ways_of_long(recurrent, None) == [Way(None, recurrent=True)]
    text = long_text(tiny_text(100).numpy(), None, eval_length=40)
    with pytest.raises(UsageError, match="--eval-length 40: .* knows 32 positions; give 32 or less"):
        find(tmp_path, llama, FULL, text)
    with pytest.raises(UsageError, match="--eval-length 40: key tokens are looked for behind the first 40 of a window"):
        find(tmp_path, landmark, Way(2), text, context=40)
    with pytest.raises(LandmarkError, match="too few for one window"):
        long_text(tiny_text(10).numpy(), None, eval_length=10)
    assert long_text(tiny_text(10).numpy(), None).eval_length == 9
