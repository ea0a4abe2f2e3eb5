"""Reading with a context-miss token, against the definition's controlled landmarks."""

import pytest
import torch

from landmark_cli.attention.dispatch import LandmarkLayout
from landmark_cli.data.landmarks import insert_landmarks, landmark_positions
from landmark_cli.inference.block_reader import BlockReader
from landmark_cli.models import register
from landmark_cli.models.gpt import GPTConfig, GPTForCausalLM
from tests.closeness import assert_close_norm

register()
FREQ, LANDMARK = 4, 39


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    # One layer: what an earlier chunk's own queries retrieved does not show in the later chunk's keys.
    config = GPTConfig(
        vocab_size=40,
        n_layer=1,
        n_head=2,
        n_embd=16,
        landmark_freq=FREQ,
        landmark_token_id=LANDMARK,
        trained_length=64,
        initializer_range=0.5,
        eos_token_id=None,
        context_miss_token=True,
    )
    return GPTForCausalLM(config).eval()


def read(model, text, **options):
    reader = BlockReader(model, chunk=12, positions="absolute", **options)
    return torch.cat([chunk.logits for chunk in reader.read([text])], dim=1)[0], reader.cache


def test_retrieved_blocks_are_the_controlled_ones(model):
    text = torch.randint(0, LANDMARK, (21,), generator=torch.Generator().manual_seed(1))
    logits, cache = read(model, text, top_k_blocks=8)
    stream = insert_landmarks(text, FREQ, LANDMARK)
    controlled = (torch.arange(len(stream)) < 15)[None]
    with torch.no_grad():
        expected = model(stream[None], landmark_layout=LandmarkLayout(controlled=controlled)).logits[0]
    expected = expected[~landmark_positions(len(stream), FREQ + 1)]
    assert_close_norm(logits[12:], expected[12:])
    # 3 blocks for every one of the second chunk's 9 text tokens and 2 landmarks, in 2 heads.
    assert (cache.retrievals, cache.dropped_retrievals) == (3 * 11 * 2, 0)


def test_a_cutoff_of_one_drops_every_retrieval(model):
    text = torch.randint(0, LANDMARK, (30,), generator=torch.Generator().manual_seed(2))
    logits, cache = read(model, text, top_k_blocks=2, context_miss_cutoff=1.0)
    assert cache.dropped_retrievals == cache.retrievals > 0
    assert_close_norm(logits, read(model, text, top_k_blocks=0)[0])
    some = read(model, text, top_k_blocks=2, context_miss_cutoff=0.2)[1]
    assert 0 < some.dropped_retrievals < some.retrievals
