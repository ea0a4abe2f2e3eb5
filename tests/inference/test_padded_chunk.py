"""Rows' texts as one chunk: each row's stream is its own, and logits come back at its own text positions."""

import random

import pytest
import torch

from landmark_cli.inference.padded_chunk import PaddedChunk

LANDMARK = 99


def stream_of(text, tail, freq):
    """The text with a landmark wherever a block of `freq` text tokens ends, of which `tail` were there before."""
    found = []
    for place, token in enumerate(text, tail + 1):
        found += [token, LANDMARK] if place % freq == 0 else [token]
    return found


@pytest.mark.parametrize("last_only", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_every_row_has_its_stream_and_its_logits(seed, last_only):
    draw = random.Random(seed)
    freq, batch = draw.randint(1, 6), draw.randint(1, 5)
    texts = [[draw.randrange(90) for _ in range(draw.choice([0, 1, freq, draw.randint(1, 20)]))] for _ in range(batch)]
    texts[draw.randrange(batch)] = [7, 8]
    tails = [draw.randrange(freq) for _ in texts]
    rows = [row for row, text in enumerate(texts) if text]
    tensors = [torch.tensor(text, dtype=torch.long) for text in texts]
    chunk = PaddedChunk.of(tensors, tails, rows, freq, LANDMARK, last_only=last_only)
    streams = [stream_of(text, tail, freq) for text, tail in zip(texts, tails, strict=True)]
    assert chunk.lengths == list(map(len, streams)) and chunk.ids.shape[1] == max(chunk.lengths)
    for ids, row in zip(chunk.ids.tolist(), rows, strict=True):
        assert ids == [LANDMARK] * (len(ids) - len(streams[row])) + streams[row]
    # A model that says of each position what token stands there.
    found = chunk.of_rows(chunk.ids[:, chunk.kept, None])[..., 0]
    assert found.shape == (batch, 1 if last_only else max(map(len, texts)))
    for text, said in zip(texts, found.tolist(), strict=True):
        kept = text[-1:] if last_only else text
        assert said[len(said) - len(kept) :] == kept
        assert text or set(said) == {0}
