"""Which rows stop, and what waits for what while tokens are generated."""

import pytest
import torch
from transformers import (
    EosTokenCriteria,
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from landmark_cli.inference.block_reader import BlockReader
from landmark_cli.inference.generation import sample
from landmark_cli.inference.settings import SamplingSettings
from landmark_cli.inference.stopping import Stopping
from tests.tiny import tiny_model, tiny_text


class Odd(StoppingCriteria):
    """Stops rows behind an odd token."""

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] % 2 == 1


WAYS = {
    "none": [],
    "an end": [EosTokenCriteria(3)],
    "several ends": [EosTokenCriteria([3, 5]), EosTokenCriteria(7)],
    "a length": [MaxLengthCriteria(4), MaxLengthCriteria(6)],
    "time": [MaxTimeCriteria(1e9)],
    "one of one's own": [Odd()],
    "all": [MaxLengthCriteria(6), EosTokenCriteria([4, 5]), Odd(), MaxTimeCriteria(1e9)],
}


@pytest.mark.parametrize("way", WAYS)
def test_rows_stop_as_transformers_criteria_say(way):
    criteria, text = StoppingCriteriaList(WAYS[way]), tiny_text(60, 1).view(10, 6) % 9
    stopping, going, expected = Stopping(criteria), [True] * 10, torch.ones(10, dtype=torch.bool)
    for length in range(1, 7):
        ids = text[:, :length]
        asked = stopping.asked(ids)
        assert bool(asked) == any(type(each) not in (EosTokenCriteria, MaxLengthCriteria) for each in criteria)
        going = stopping.going(going, ids[:, -1].tolist(), length, [stops.tolist() for stops in asked])
        expected &= ~criteria(ids, None) if criteria else True
        assert going == expected.tolist(), length
    assert stopping.early == (way not in ("one of one's own", "all"))


class Logged(BlockReader):
    """Says when it steps."""

    def step(self, tokens):
        self.log.append("step")
        return super().step(tokens)


@pytest.mark.parametrize(
    "criteria, ahead, expected",
    [
        ([], True, ["step", "given"] * 3 + ["given"]),
        ([MaxTimeCriteria(1e9)], True, ["step", "given"] * 3 + ["given"]),
        # What may hang on the newest token's having been given out is asked then.
        ([Odd()], True, ["given", "step"] * 3 + ["given"]),
        ([], False, ["given", "step"] * 3 + ["given"]),
    ],
    ids=["known criteria", "time", "criteria of one's own", "a trace"],
)
def test_the_device_is_at_work_while_tokens_are_given_out(criteria, ahead, expected, monkeypatch):
    monkeypatch.setattr(Odd, "__call__", lambda self, ids, scores: torch.zeros(len(ids), dtype=torch.bool))
    reader = Logged(tiny_model(), chunk=8)
    reader.log = []
    criteria = StoppingCriteriaList([MaxLengthCriteria(4), *criteria])
    settings = SamplingSettings(max_new_tokens=4, temperature=0)
    for _ in sample(reader, [tiny_text(20)], settings, LogitsProcessorList(), criteria, ahead=ahead):
        reader.log.append("given")
    assert reader.log == expected


class Listener(BaseStreamer, StoppingCriteria):
    """Stops at once when it has heard so many tokens."""

    def __init__(self, most):
        self.heard, self.most = -1, most

    def put(self, value):
        self.heard += 1

    def end(self):
        pass

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), self.heard >= self.most)


def test_criteria_know_of_the_newest_token_what_a_streamer_does():
    text, listener = tiny_text(20)[None], Listener(3)
    stop = StoppingCriteriaList([listener])
    model = tiny_model()
    out = model.generate(text, max_new_tokens=9, do_sample=False, streamer=listener, stopping_criteria=stop)
    assert out.shape[1] == 23
