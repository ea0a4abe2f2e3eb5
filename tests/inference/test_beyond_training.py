"""Reading with more positions than a model was trained at is warned of, whoever reads, once, and nothing else is."""

import pytest

from landmark_cli.attention.cache import RetrievalSettings
from landmark_cli.console import of_one_command
from landmark_cli.inference.chunk_lengths import positions_of
from landmark_cli.inference.plan import plan_reading
from landmark_cli.inference.readers import open_reader
from landmark_cli.inference.settings import ReadingSettings
from tests.tiny import tiny_baseline, tiny_model


@pytest.mark.parametrize("chunk", [1, 3, 4, 10, 12, 30])
@pytest.mark.parametrize("top_k", [0, 1, 3])
def test_the_positions_are_those_that_the_plan_works_out_chunk_by_chunk(chunk, top_k):
    model = tiny_model()
    settings = RetrievalSettings(model.config.landmark_freq + 1, top_k)
    for tokens in (1, 5, 9, 25, 400):
        planned = plan_reading(model, tokens, ReadingSettings(top_k, chunk)).positions
        told = positions_of(tokens, chunk, settings)
        assert planned <= told and (told == planned or tokens < 400)


@pytest.mark.parametrize(
    ("settings", "tokens", "beyond"),
    [
        ({}, 10**6, False),
        ({"chunk": 4}, 10**6, False),
        ({"chunk": 100}, 8, False),
        ({"chunk": 100}, 1000, True),
        ({"chunk": 20, "top_k_blocks": 0}, 1000, False),
        ({"chunk": 20, "top_k_blocks": 8}, 1000, True),
        ({"chunk": 20, "top_k_blocks": 8, "cache_blocks": 0}, 1000, False),
        ({"chunk": 100, "positions": "absolute"}, 1000, False),
    ],
)
def test_what_is_beyond_the_trained_length(settings, tokens, beyond):
    model = tiny_model()
    assert model.config.trained_length == 40
    said = open_reader(model, ReadingSettings(**settings)).beyond_training(tokens)
    assert (said is not None) == beyond
    if beyond:
        assert "text tokens beside" in said and "more than the 40 that the model was trained at" in said


@pytest.mark.parametrize("chunk", [3, 100])
def test_of_a_text_that_has_not_begun_nothing_is_beyond(chunk):
    reader = open_reader(tiny_model(), ReadingSettings(chunk=chunk))
    assert reader.beyond_training(0) is None
    reader.expect(0, steps=20)
    assert reader.step([7]).isfinite().all()


def test_a_window_and_a_chunk_alone_have_bounds_of_their_own():
    baseline, model = tiny_baseline(), tiny_model()
    for reader, longest, what in (
        (open_reader(baseline, ReadingSettings()), 10**6, None),
        (open_reader(baseline, ReadingSettings(), window=100), 40, "windows"),
        (open_reader(model, ReadingSettings(chunk=100), memory=False), 32, "chunks"),
        (open_reader(model, ReadingSettings(), memory=False), 10**6, None),
        (open_reader(model, ReadingSettings(), window=100), 40, "windows"),
    ):
        assert reader.beyond_training(longest) is None
        if what:
            said = reader.beyond_training(longest + 1)
            assert said.startswith(f"{what} of 100 text tokens are longer than the {longest} that")


def test_a_command_warns_once(capsys):
    for _ in range(2):
        with of_one_command(quiet=True):
            for _ in range(3):
                reader = open_reader(tiny_model(), ReadingSettings(chunk=100))
                reader.expect(1000)
        assert capsys.readouterr().err.count("may mislead") == 1
