"""What is told of reading beforehand is what a reader then takes and sees."""

import pytest

from landmark_cli.attention.cache.pages import GIB
from landmark_cli.errors import LandmarkError
from landmark_cli.inference.block_reader import BlockReader
from landmark_cli.inference.plan import layers_to_get_landmarks, plan_full_attention, plan_reading
from landmark_cli.inference.settings import ReadingSettings
from landmark_cli.models.decoders import attend_with_landmarks
from landmark_cli.models.layers import landmark_layers
from landmark_cli.models.support import check_model
from tests.models.families import FAMILIES, tiny_decoder
from tests.tiny import FREQ, LANDMARK, tiny_model, tiny_text

SETTINGS = [
    ReadingSettings(),
    ReadingSettings(top_k_blocks=0),
    ReadingSettings(top_k_blocks=5, chunk=12),
    ReadingSettings(top_k_blocks=3, chunk=7),
    ReadingSettings(top_k_blocks=3, chunk=7, cache_blocks=4),
    ReadingSettings(top_k_blocks=2, chunk=90, cache_blocks=20),
]


def taken(model, length, settings):
    """The chunk of a reader that has read so long a text, the positions that it needed, and the bytes it holds."""
    reader = BlockReader.open(model, settings, 1)
    cache, needed = reader.cache, []
    begin = cache.begin_chunk

    def placed(*arguments, **options):
        chunk = begin(*arguments, **options)
        needed.append(int(chunk.position_ids.max()) + 1 - int(cache.window_start(chunk).min()))
        return chunk

    cache.begin_chunk = placed
    reader.expect(length)
    for _ in reader.read([tiny_text(length)], last_only=True):
        pass
    tensors = [x for layer in cache.layers.values() for x in (layer.blocks, layer.landmark_keys)]
    tensors += [x for window in cache.windows.values() for x in (window.keys, window.values)]
    return min(length, reader.chunk), max(needed), sum(x.nbytes for x in tensors)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("length", [3, 50, 230])
def test_a_reader_takes_what_was_told(length, settings):
    model = tiny_model()
    plan = plan_reading(model, length, settings)
    assert (plan.chunk, plan.positions, plan.cache) == taken(model, length, settings)
    assert plan == plan_reading(model.to("meta"), length, settings)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_decoder_takes_what_was_told_before_it_had_landmarks(family):
    """Its config says which layers will have landmarks; where some keep their windows, so does the plan."""
    model = tiny_decoder(family)
    layers = layers_to_get_landmarks(model.config)
    kinds = check_model(model, 100, family)
    model.config.update({"landmark_freq": 4, "landmark_token_id": LANDMARK, "trained_length": 100, "top_k_blocks": 3})
    attend_with_landmarks(model, kinds)
    assert layers in (None, landmark_layers(model.config)) and (layers is None) == (not any(kinds.local))
    if layers is not None:
        plan = plan_reading(model, 120, ReadingSettings(chunk=30))
        assert (plan.chunk, plan.positions, plan.cache) == taken(model, 120, ReadingSettings(chunk=30))


@pytest.mark.parametrize("settings", SETTINGS[:3], ids=str)
@pytest.mark.parametrize("length", [4, 28, 100])
def test_a_token_sees_what_was_told(length, settings):
    """In one layer with one head the last token's logits depend on the tokens that it sees, and on no other."""
    model = tiny_model(n_layer=1, n_head=1, initializer_range=0.1)
    text = tiny_text(length)
    # The text, and for each of its tokens the text with another in that place.
    rows = [text, *text.repeat(length, 1)]
    for index, row in enumerate(rows[1:]):
        row[index] = (text[index] + 1) % LANDMARK
    *_, chunk = BlockReader.open(model, settings, len(rows)).read(rows, last_only=True)
    logits = chunk.logits[:, -1]
    seen = int((logits[1:] != logits[0]).any(-1).sum())
    plan = plan_reading(model, length, settings)
    begin = (length - 1) // plan.chunk * plan.chunk
    retrieved = min(plan.top_k_blocks, begin // FREQ)
    assert seen == begin % FREQ + length - begin + retrieved * FREQ <= plan.sees
    # Where its chunk is full, no token sees more.
    assert seen == plan.sees or length % plan.chunk


def test_numbers_by_hand():
    plan = plan_reading(tiny_model(), 40, ReadingSettings(top_k_blocks=2, chunk=8, offload="cpu"))
    # Two blocks of 4 before a chunk of 8; 8 landmarks, these 8 tokens, 8 of the chunk and the landmark between them.
    assert (plan.sees, plan.compared, plan.positions) == (16, 25, 25)
    # 16 blocks of 5 keys and values of 16 numbers of 4 bytes, their landmarks' keys; in two layers, powers of two.
    assert (plan.on_gpu, plan.cache) == (2 * (10240 + 1024), 2 * (16384 + 10240 + 1024))
    assert plan_full_attention(tiny_model(), 40).cache == 2 * 40 * 2 * 16 * 4
    assert plan_reading(tiny_model(), 16_000_000, ReadingSettings(offload="cpu")).on_gpu > 2 * GIB


@pytest.mark.parametrize(("window", "sees", "held"), [(16, 16, 15), (None, 100, 100), (200, 100, 100)])
def test_full_attention_sees_no_further_than_a_window_that_all_layers_have(window, sees, held):
    plan = plan_full_attention(tiny_decoder("mistral", sliding_window=window), 100)
    # Keys and values of two heads of 8 numbers of 4 bytes, in two layers.
    assert (plan.sees, plan.compared, plan.cache) == (sees, sees, held * 2 * 2 * 2 * 8 * 4)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gemma4"])
def test_full_attention_holds_what_its_own_cache_holds(family):
    """Layers may have other heads, and windows, than others."""
    model, length = tiny_decoder(family), 60
    config = model.config
    if (layers := layers_to_get_landmarks(config)) is not None:
        config.landmark_layers = layers
    cache = model(tiny_text(length)[None] % 256, use_cache=True).past_key_values
    held = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
    assert plan_full_attention(model, length).cache == held


@pytest.mark.parametrize("top_k, proposed, more", [(2, 6, 6), (2, 64, 12), (2, 2, 0), (5, 3, 0), (0, 6, 0)])
def test_a_query_is_compared_with_the_text_of_what_is_proposed(top_k, proposed, more):
    """Where more blocks are proposed than are read: of those that there are, 12 where the last chunk begins."""
    model, length = tiny_model(), 12 * FREQ + 12
    plain, found = (
        plan_reading(model, length, ReadingSettings(top_k_blocks=top_k, chunk=12, rerank_blocks=count)).compared
        for count in (None, proposed)
    )
    assert found == plain + more * FREQ


def test_blocks_that_leave_no_room():
    with pytest.raises(LandmarkError, match="retrieve at most 6"):
        plan_reading(tiny_model(), 100, ReadingSettings(top_k_blocks=7))
