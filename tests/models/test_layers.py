"""Decoders whose layers are of several kinds: what each does with landmarks, in a whole input, a window and a cache."""

import copy
import itertools
import json

import pytest
import torch

from landmark_cli.attention.cache import HeldText
from landmark_cli.attention.dispatch import LandmarkLayout
from landmark_cli.attention.rotary import default_inverse_frequencies
from landmark_cli.attention.window import ReadingWindow, WindowSettings
from landmark_cli.data.landmarks import insert_landmarks, landmark_positions
from landmark_cli.errors import LandmarkError
from landmark_cli.inference import reader_memory
from landmark_cli.inference.block_reader import BlockReader
from landmark_cli.inference.landmark_cache import LandmarkCache
from landmark_cli.inference.memory import Memory
from landmark_cli.inference.readers import layer_token_bytes
from landmark_cli.inference.settings import ReadingSettings
from landmark_cli.models import store
from landmark_cli.models.decoders import add_landmarks
from landmark_cli.models.layers import key_heads, landmark_layers
from landmark_cli.models.pretrained import open_config, plain_attention
from landmark_cli.models.rotary import inverse_frequencies
from landmark_cli.training.metrics import flops_per_token
from tests.closeness import assert_close_norm
from tests.models.families import FAMILIES, LOCAL, LONGROPE
from tests.models.test_decoders import BLOCK, FREQ, LENGTH, landmark_decoder, texts

WITH_WINDOWS = [name for name, (_, settings) in FAMILIES.items() if LOCAL.items() <= settings.items()]
# And those whose layers with landmarks differ from Llama's.
UNUSUAL = [*WITH_WINDOWS, "smollm3", "cohere", "glm"]
# Of a row's size, what is rounding in tiny models that make it larger: one forward of Gemma 4 in float32 is forty times
# as far from float64 as one of Gemma 3, 2e-5.
SENSITIVE = {"gemma4": 2e-4}
# A layer of each kind that there is, in an order that none of the families above has.
MANY = {"num_hidden_layers": 4, "layer_types": [*["sliding_attention", "full_attention"] * 2]}


def silence(model, layers) -> None:
    """Have the attention of these layers say nothing."""
    for name, module in model.named_modules():
        if name.endswith("self_attn") and module.layer_idx in layers:
            module.register_forward_hook(lambda module, inputs, out: (torch.zeros_like(out[0]), *out[1:]))


def window_of(model, tokens: int, batch: int = 1, top_k: int = 2, **more) -> dict:
    settings = WindowSettings(2 * BLOCK, BLOCK, top_k)
    window = ReadingWindow.make(settings, batch, tokens, inverse_frequencies(model), **more)
    return {"landmark_window": window, "position_ids": window.position_ids}


def stream_of(ids, model):
    return insert_landmarks(ids, FREQ, model.config.landmark_token_id)


def read_all(reader, rows, **settings):
    return torch.cat([part.logits for part in reader.read(rows, **settings)], 1)


def windows_and_nothing_else(family: str):
    """A decoder whose layers with landmarks say nothing, and the same with transformers' own attention."""
    model, _ = landmark_decoder(family)
    assert landmark_layers(model.config) == [1]
    plain = copy.deepcopy(model)
    plain.set_attn_implementation(plain_attention(model.config))
    for each in (model, plain):
        silence(each, [1])
    return model, plain


@pytest.mark.parametrize("family", WITH_WINDOWS)
def test_to_a_layer_with_a_window_the_stream_is_its_text(family):
    model, plain = windows_and_nothing_else(family)
    ids = texts(2, 53)
    stream = stream_of(ids, model)
    text = ~landmark_positions(stream.shape[1], BLOCK)
    expected = plain(ids).logits
    weights = [model.model.layers[0].self_attn.q_proj.weight, model.model.layers[0].self_attn.v_proj.weight]
    same = [plain.model.layers[0].self_attn.q_proj.weight, plain.model.layers[0].self_attn.v_proj.weight]
    gradients = torch.autograd.grad(expected.square().sum(), same)
    for given in ({}, window_of(model, stream.shape[1], 2)):
        found = model(stream, **given).logits[:, text]
        assert_close_norm(found, expected, within=SENSITIVE.get(family))
        assert_close_norm(torch.autograd.grad(found.square().sum(), weights), gradients, within=SENSITIVE.get(family))
    with torch.no_grad():
        for chunk in (1, 5, 20):
            assert_close_norm(
                read_all(BlockReader(model, chunk=chunk, batch=2), list(ids)), expected, within=SENSITIVE.get(family)
            )


@pytest.mark.parametrize("family", WITH_WINDOWS)
@torch.no_grad()
def test_a_landmark_stands_where_the_next_text_token_does(family):
    model, plain = windows_and_nothing_else(family)
    ids, landmark = texts(1, 30), torch.tensor([[model.config.landmark_token_id]])
    found = model(stream_of(ids, model)).logits
    for block in range(4):
        begun = torch.cat([ids[:, : (block + 1) * FREQ], landmark], 1)
        assert_close_norm(found[:, block * BLOCK + FREQ], plain(begun).logits[:, -1], within=SENSITIVE.get(family))


@pytest.mark.parametrize("family", UNUSUAL)
@torch.no_grad()
def test_a_window_of_training_is_read_as_a_reader_reads(family):
    model, _ = landmark_decoder(family)
    ids = texts(2, 80)
    stream = stream_of(ids, model)
    text = ~landmark_positions(stream.shape[1], BLOCK)
    found = model(stream, **window_of(model, stream.shape[1], 2)).logits[:, text]
    assert_close_norm(
        found,
        read_all(BlockReader(model, top_k_blocks=2, chunk=2 * FREQ, batch=2), list(ids)),
        within=SENSITIVE.get(family),
    )


@pytest.mark.parametrize("family", UNUSUAL)
@torch.no_grad()
def test_documents_of_a_row_do_not_see_each_other(family):
    model, _ = landmark_decoder(family)
    parts = [stream_of(texts(1, length), model) for length in (20, 33, 6, 41)]
    packed = torch.cat(parts, 1).view(2, -1) if sum(part.shape[1] for part in parts) % 2 == 0 else None
    rows = torch.cat([torch.cat(parts, 1), torch.cat(parts[::-1], 1)]) if packed is None else packed
    order = [*parts, *parts[::-1]] if packed is None else parts
    bounds = torch.tensor([0, *itertools.accumulate(part.shape[1] for part in order)])
    assert rows.shape[0] == 2 and rows.shape[1] in bounds.tolist()
    windowed = window_of(model, rows.shape[1], 2, cu_seqlens=bounds)
    for given, alone in (
        ({"landmark_layout": LandmarkLayout(cu_seqlens=bounds)}, lambda part: {}),
        (windowed, lambda part: window_of(model, part.shape[1])),
    ):
        found = model(rows, **given).logits.flatten(0, 1)
        for begin, part in zip(bounds.tolist(), order, strict=False):
            assert_close_norm(
                found[begin : begin + part.shape[1]], model(part, **alone(part)).logits[0], within=SENSITIVE.get(family)
            )


@pytest.mark.parametrize("family", ["gemma3", "cohere2", "gpt-oss"])
@torch.no_grad()
def test_rows_of_a_window_that_are_padded_on_the_left(family):
    model, _ = landmark_decoder(family)
    parts = [stream_of(texts(1, length), model) for length in (60, 37)]
    start = torch.tensor([0, parts[0].shape[1] - parts[1].shape[1]])
    rows = torch.cat([parts[0], torch.nn.functional.pad(parts[1], (int(start[1]), 0))])
    found = model(rows, **window_of(model, rows.shape[1], 2, start=start)).logits
    for row, part in enumerate(parts):
        assert_close_norm(
            found[row, int(start[row]) :],
            model(part, **window_of(model, part.shape[1])).logits[0],
            within=SENSITIVE.get(family),
        )


@torch.no_grad()
@pytest.mark.parametrize("family", ["gemma3", "cohere2"])
def test_uneven_blocks(family):
    model, _ = landmark_decoder(family)
    ids = stream_of(texts(2, 40), model)
    mask = ids == model.config.landmark_token_id
    found = model(ids, landmark_layout=LandmarkLayout(landmark_mask=mask)).logits
    assert_close_norm(found, model(ids).logits, within=SENSITIVE.get(family))
    # Behind three tokens of padding, with a landmark among them that is none.
    padded = torch.cat([ids[:, FREQ - 2 : BLOCK], ids], 1)
    mask = padded == model.config.landmark_token_id
    layout = LandmarkLayout(landmark_mask=mask, start=torch.tensor([3, 3]))
    assert_close_norm(model(padded, landmark_layout=layout).logits[:, 3:], found, within=SENSITIVE.get(family))


def many(family: str):
    """A decoder with four layers: a window, landmarks, a window, landmarks; in SmolLM3 the last without positions."""
    settings = {"no_rope_layers": [1, 0, 1, 0], "num_hidden_layers": 4} if family == "smollm3" else MANY
    return landmark_decoder(family, **settings)[0]


@pytest.mark.parametrize(
    ("family", "selection", "positions"),
    [
        ("gemma3", "per_token_and_head", "bounded"),
        ("smollm3", "per_token_and_head", "bounded"),
        ("smollm3", "max_over_heads", "absolute"),
        ("gemma2", "per_token_and_head", "absolute"),
        ("cohere2", "max_over_heads", "absolute"),
        ("gpt-oss", "max_over_heads", "bounded"),
    ],
)
@torch.no_grad()
def test_rows_of_a_batch_are_read_as_each_alone(family, selection, positions):
    model = many(family)
    rows = [texts(1, 61)[0], texts(1, 9)[0], texts(1, 40)[0]]
    settings = {"chunk": 11, "selection": selection, "positions": positions}
    reader = BlockReader(model, batch=3, offload="cpu", **settings)
    parts = [part.row(row) for part in reader.read(rows) for row in range(3)]
    last = reader.step([5, None, 7])
    for row, ids in enumerate(rows):
        alone = BlockReader(model, **settings)
        assert_close_norm(torch.cat(parts[row::3]), read_all(alone, [ids])[0], within=SENSITIVE.get(family))
        if row != 1:
            assert_close_norm(last[row], alone.step([[5, None, 7][row]])[0], within=SENSITIVE.get(family))


@pytest.mark.parametrize("family", ["gemma3", "smollm3", "cohere2", "gpt-oss"])
@torch.no_grad()
def test_what_was_read_is_kept_copied_and_gone_on_from(family, tmp_path):
    model = many(family)
    ids, more = texts(1, 45)[0], texts(1, 70)[0][45:]
    reader = BlockReader(model, chunk=11)
    read_all(reader, [ids])
    reader.save(tmp_path / "memory")
    copied = copy.deepcopy(reader.cache)
    expected = read_all(reader, [more])

    other = BlockReader(model, chunk=11)
    other.recall(tmp_path / "memory")
    stored = Memory.open(tmp_path / "memory").layers
    for held, written in zip(reader_memory.take(other).layers, stored, strict=True):
        for part, other_part in zip(held, written, strict=True):
            assert torch.equal(part, other_part if isinstance(other_part, torch.Tensor) else other_part.whole())
    assert_close_norm(read_all(other, [more]), expected, within=SENSITIVE.get(family))
    other.recall(tmp_path / "memory")
    assert_close_norm(read_all(other, [more]), expected, within=SENSITIVE.get(family))

    other.reset()
    assert_close_norm(
        read_all(other, [more]), read_all(BlockReader(model, chunk=11), [more]), within=SENSITIVE.get(family)
    )

    reader.cache = reader.forward.cache = copied
    assert_close_norm(read_all(reader, [more]), expected, within=SENSITIVE.get(family))

    # Beams: rows become others, fewer and more.
    beams = BlockReader(model, chunk=11, batch=2)
    read_all(beams, [more, ids])
    beams.take([1, 1, 0])
    assert_close_norm(read_all(beams, [more, [], []])[0], expected[0], within=SENSITIVE.get(family))
    beams.take([2, 1, 2])
    beams.forget(2)
    found = read_all(beams, [[], more, more])
    assert_close_norm(found[1], expected[0], within=SENSITIVE.get(family))
    assert_close_norm(found[2], read_all(BlockReader(model, chunk=11), [more])[0], within=SENSITIVE.get(family))


@pytest.mark.parametrize(
    ("device", "within"),
    # Products of float32 are done in three parts of fewer bits on a GPU, and in another order.
    [("cpu", None), pytest.param("cuda", 2e-4, marks=pytest.mark.gpu)],
)
@pytest.mark.parametrize("family", ["gemma2", "gpt-oss"])
def test_kernels_bound_logits_and_know_sinks_as_the_definition_does(family, device, within, monkeypatch):
    model, _ = landmark_decoder(family)
    model.to(device)
    ids = texts(1, 20)
    stream = stream_of(ids, model).to(device)
    attention = model.model.layers[1].self_attn
    leaves = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
    leaves += [attention.sinks] if family == "gpt-oss" else []

    def results(backend):
        monkeypatch.setenv("LANDMARK_ATTENTION", backend)
        window = ReadingWindow.make(
            WindowSettings(BLOCK, BLOCK, 2), 1, stream.shape[1], inverse_frequencies(model).to(device)
        )
        for given in ({}, {"landmark_window": window, "position_ids": window.position_ids}):
            logits = model(stream, **given).logits
            yield [logits.detach(), *torch.autograd.grad(logits.square().sum(), leaves)]
        with torch.no_grad():
            yield read_all(BlockReader(model, top_k_blocks=2, chunk=FREQ), list(ids))

    assert_close_norm(list(results("triton")), list(results("eager")), within=within)


@pytest.mark.parametrize("backend", ["triton", "blockwise"])
@torch.no_grad()
def test_backends_read_layers_without_positions_as_the_definition_does(backend, monkeypatch):
    model, _ = landmark_decoder("smollm3")
    found = []
    for name in (backend, "eager"):
        monkeypatch.setenv("LANDMARK_ATTENTION", name)
        found.append(read_all(BlockReader(model, top_k_blocks=2, chunk=14), [texts(1, 40)[0]]))
    assert_close_norm(*found)


@torch.no_grad()
@pytest.mark.parametrize(
    "family, settings",
    [*((family, {}) for family in UNUSUAL), ("gemma4", {"attention_k_eq_v": True, "num_global_key_value_heads": 1})],
)
def test_heads_of_layers_that_differ_are_those_of_each_layer(family, settings, tmp_path):
    model, _ = landmark_decoder(family, **settings)
    reader = BlockReader(model, batch=2)
    reader.expect(2 * LENGTH)
    read_all(reader, texts(2, 2 * LENGTH))
    held = reader_memory.take(reader, 1)
    for layer, of_layer in enumerate(held.layers):
        heads, head_dim = key_heads(model.config, layer)
        part = of_layer.keys if isinstance(of_layer, HeldText) else of_layer.landmark_keys
        assert (part.shape[0], part.shape[2]) == (heads, head_dim)
    # Keys and values of a token, of the blocks that are held.
    assert held.held_blocks.blocks[:, 0, :, 0].nbytes == layer_token_bytes(model)
    assert flops_per_token(model, 2 * LENGTH) > flops_per_token(model, LENGTH)
    reader.save(tmp_path / "memory", row=1)
    reader.recall(tmp_path / "memory", row=0)
    first, second = reader.step([5, 5])
    assert_close_norm(first, second, within=SENSITIVE.get(family))


def test_of_a_library_a_window_holds_the_last_text_alone(tmp_path):
    model, _ = windows_and_nothing_else("gemma3")
    reader, more = BlockReader(model), texts(1, 9)[0]
    for name, length in (("a", 33), ("b", 5)):
        reader.reset()
        read_all(reader, [texts(1, length)[0]])
        reader.save(tmp_path / name)
    expected = read_all(reader, [more])
    reader.recall(tmp_path / "a", tmp_path / "b")
    assert_close_norm(read_all(reader, [more]), expected)


@pytest.mark.parametrize("family", UNUSUAL)
@torch.no_grad()
def test_generate_goes_on_as_the_definition(family):
    model, _ = landmark_decoder(family)
    cache = LandmarkCache(model, ReadingSettings(top_k_blocks=9, chunk=9))
    found = model.generate(texts(1, 40), max_new_tokens=4, do_sample=False, past_key_values=cache)
    for place in range(40, found.shape[1]):
        logits = model(stream_of(found[:, :place], model)).logits[:, -1 if place % FREQ else -2]
        # What is never generated: the landmark, and ids that no token has.
        logits[:, [model.config.landmark_token_id, *(model.generation_config.suppress_tokens or ())]] = -torch.inf
        assert found[:, place] == logits.argmax(-1)


def test_kinds_are_kept_in_the_config_where_they_are_unusual(tmp_path):
    plain, _ = landmark_decoder("llama")
    plain.save_pretrained(tmp_path)
    assert not [name for name in (tmp_path / "config.json").read_text().split('"') if name.startswith("landmark_l")]
    for family, layers, turns in (
        ("gemma3", [1, 3], None),
        ("cohere2", [1, 3], ["pairs", "none", "pairs", "none"]),
        ("smollm3", None, ["halves", "none", "halves", "none"]),
    ):
        model = many(family)
        model.save_pretrained(tmp_path)
        config = open_config(tmp_path)
        assert getattr(config, "landmark_layers", None) == layers
        assert getattr(config, "landmark_rotary", None) == turns


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"landmark_layers": [1, 2]}, "landmark_layers is .1, 2., and there are layers 0 to 1"),
        ({"landmark_rotary": ["halves"]}, "landmark_rotary is of 1 layers, and there are 2"),
        ({"landmark_rotary": ["halves", "thirds"]}, "landmark_rotary"),
        ({"landmark_softmax": "newest"}, "landmark_softmax should be 'grouped' or 'joint'.*newest"),
        ({"landmark_softmax": "joint", "context_miss_token": True}, "landmark_softmax is joint.* context_miss_token"),
    ],
)
def test_a_config_that_cannot_be(wrong, said, tmp_path):
    model, tokenizer = landmark_decoder("gemma3")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    saved = tmp_path / "config.json"
    saved.write_text(json.dumps(json.loads(saved.read_text()) | wrong))
    with pytest.raises(LandmarkError, match=said):
        store.load(tmp_path, device="cpu")


# --- angles that change with the input's length


@pytest.mark.parametrize(("original", "length", "factors"), [(32, 64, "long_factor"), (128, 64, "short_factor")])
def test_long_rope_is_fixed_at_the_angles_of_the_trained_length(original, length, factors, tmp_path):
    model, tokenizer = landmark_decoder("phi3-longrope", original_max_position_embeddings=original)
    assert model.config.trained_length == length
    base = default_inverse_frequencies(8)
    expected = base / torch.tensor(LONGROPE[factors])
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    opened, _ = store.load(tmp_path, device="cpu")
    for each in (model, opened):
        for tokens in (200, 3, 60):
            with torch.no_grad():
                each(stream_of(texts(1, tokens), each))
            assert_close_norm(each.model.rotary_emb.inv_freq, expected)
            assert_close_norm(inverse_frequencies(each), expected)
    # Without landmarks they are transformers' own: of every input's length.
    plain, _ = store.load(tmp_path, attention="sdpa", device="cpu")
    for tokens, own in ((original + 1, "long_factor"), (3, "short_factor")):
        plain(texts(1, tokens))
        assert_close_norm(plain.model.rotary_emb.inv_freq, base / torch.tensor(LONGROPE[own]))


def test_another_trained_length_fixes_them_anew():
    model, tokenizer = landmark_decoder("phi3-longrope")
    long = inverse_frequencies(model).clone()
    add_landmarks(model, tokenizer, landmark_freq=FREQ, trained_length=32)
    short = inverse_frequencies(model).clone()
    copied = copy.deepcopy(model)
    add_landmarks(model, tokenizer, landmark_freq=FREQ, trained_length=LENGTH)
    assert not torch.equal(short, long) and torch.equal(inverse_frequencies(model), long)
    assert torch.equal(inverse_frequencies(copied), short)


def test_dynamic_rope_stays_as_it_is_at_the_trained_length():
    # transformers changes these angles where an input is longer than the model's positions.
    model, _ = landmark_decoder("llama-dynamic", max_position_embeddings=LENGTH)
    with torch.no_grad():
        model(stream_of(texts(1, 100), model))
    assert_close_norm(model.model.rotary_emb.inv_freq, default_inverse_frequencies(8))
