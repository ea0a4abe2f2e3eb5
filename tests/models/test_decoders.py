"""Decoders of the transformers library with landmarks: the same definition, files and reading for every family."""

import pytest
import torch
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

from landmark_cli.attention.dispatch import LandmarkLayout, landmark_attention_forward
from landmark_cli.attention.layer_kind import kind_of
from landmark_cli.data.checks import check_landmark_token
from landmark_cli.data.landmarks import insert_landmarks, landmark_positions
from landmark_cli.errors import LandmarkError
from landmark_cli.inference.block_reader import BlockReader
from landmark_cli.models import store
from landmark_cli.models.decoders import add_landmarks
from landmark_cli.models.layers import settle_layers
from landmark_cli.models.pretrained import plain_attention
from tests.awkward_tokenizers import byte_tokenizer
from tests.closeness import assert_close_norm
from tests.models.families import FAMILIES, VOCABULARY, tiny_decoder, tiny_tokenizer
from tests.tiny import tiny_baseline, tiny_model

FREQ, LENGTH = 7, 64
BLOCK = FREQ + 1


def landmark_decoder(family: str, **settings):
    model, tokenizer = tiny_decoder(family, **settings), tiny_tokenizer()
    add_landmarks(model, tokenizer, landmark_freq=FREQ, trained_length=LENGTH, top_k_blocks=2)
    return model, tokenizer


def texts(rows: int, length: int) -> torch.Tensor:
    return torch.randint(1, 257, (rows, length), generator=torch.Generator().manual_seed(1))


def attention_by_the_rule(module, query, key, value, mask, scaling=None, softcap=None, s_aux=None, **kwargs):
    """Landmark attention query by query, as the paper words it: outer softmax, inner softmax, product. What layers with
    a sliding window do, another test says."""
    if kind_of(module).local:
        given = kwargs | {"scaling": scaling, "softcap": softcap, "s_aux": s_aux}
        return landmark_attention_forward(module, query, key, value, mask, **given)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    logits = query @ key.transpose(-1, -2) * scaling
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    weights = torch.zeros_like(logits)
    sink = logits.new_empty(*logits.shape[:2], 0) if s_aux is None else s_aux[:, None].expand(*logits.shape[:2], 1)
    for i in range(query.shape[2]):
        own = i // BLOCK
        text = [j for j in range(own * BLOCK, i + 1) if j % BLOCK != FREQ]
        outer = logits[:, :, i, text + [b * BLOCK + FREQ for b in range(own)]]
        outer = torch.cat([outer, sink], -1).softmax(-1)
        weights[:, :, i, text] = outer[..., : len(text)]
        for b in range(own):
            inside = slice(b * BLOCK, b * BLOCK + FREQ)
            weights[:, :, i, inside] = outer[..., len(text) + b, None] * logits[:, :, i, inside].softmax(-1)
    return (weights @ value).transpose(1, 2), None


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family, tmp_path):
    model, tokenizer = landmark_decoder(family)
    AttentionInterface.register("by_the_rule", attention_by_the_rule)
    ids = texts(2, 53)
    stream = insert_landmarks(ids, FREQ, model.config.landmark_token_id)
    with torch.no_grad():
        logits = model(stream).logits

        model.set_attn_implementation("by_the_rule")
        assert_close_norm(logits, model(stream).logits)
        model.set_attn_implementation("landmark")

    read = torch.cat(
        [chunk.logits for chunk in BlockReader(model, top_k_blocks=9, chunk=20, batch=2).read(list(ids))], 1
    )
    assert_close_norm(read, logits[:, ~landmark_positions(stream.shape[1], BLOCK)])

    # As a user would: saved, opened by transformers, saved again, opened by us.
    model.save_pretrained(tmp_path / "a")
    tokenizer.save_pretrained(tmp_path / "a")
    again = AutoTokenizer.from_pretrained(tmp_path / "a")
    assert again.padding_side == "left" and again.pad_token_id == model.generation_config.pad_token_id
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert again.config._attn_implementation == "landmark"
    again.save_pretrained(tmp_path / "b")
    AutoTokenizer.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    opened, opened_tokenizer = store.load(tmp_path / "b", device="cpu")
    settings = ("landmark_freq", "landmark_token_id", "trained_length", "top_k_blocks")
    assert [getattr(opened.config, name) for name in settings] == [FREQ, len(tokenizer) - 1, LENGTH, 2]
    assert opened_tokenizer.convert_tokens_to_ids("<landmark>") == opened.config.landmark_token_id
    with torch.no_grad():
        assert torch.equal(again(stream).logits, logits)
        assert torch.equal(opened(stream).logits, logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_landmarks_it_is_the_model_it_was(family, tmp_path):
    plain, ids = tiny_decoder(family), texts(2, 140)
    assert plain.config._attn_implementation == plain_attention(plain.config)
    model, tokenizer = landmark_decoder(family)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    opened, _ = store.load(tmp_path, attention="sdpa", device="cpu")
    with torch.no_grad():
        assert torch.equal(opened(ids).logits[..., :257], plain(ids).logits[..., :257])
    with pytest.raises(LandmarkError, match=f'opened with the attention "{plain.config._attn_implementation}"'):
        BlockReader(opened)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("vocabulary", [257, 320, 300])
def test_new_rows_are_the_mean_of_the_old(tied, vocabulary):
    model, tokenizer = tiny_decoder("llama", vocab_size=vocabulary, tie_word_embeddings=tied), tiny_tokenizer()
    before = [m.weight.detach().clone() for m in (model.get_input_embeddings(), model.get_output_embeddings())]
    add_landmarks(model, tokenizer, landmark_freq=FREQ, trained_length=LENGTH)

    assert tokenizer.pad_token == "[PAD]" and model.config.pad_token_id == tokenizer.pad_token_id == 257
    assert model.config.landmark_token_id == 258 and len(tokenizer) == 259
    # A vocabulary with rows to spare keeps its size; an aligned one stays aligned.
    assert model.config.vocab_size == {257: 259, 320: 320, 300: 300}[vocabulary]
    after = [m.weight for m in (model.get_input_embeddings(), model.get_output_embeddings())]
    assert (after[0] is after[1]) == tied
    for old, new in zip(before, after, strict=True):
        kept = [id for id in range(vocabulary) if id not in (257, 258)]
        assert torch.equal(new[kept], old[kept])
        assert_close_norm(new[257:259], old[:257].mean(0).expand(2, -1))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("vocabulary", "grown"), [(320, 320), (280, 282), (270, 282), (256, 320)])
@pytest.mark.parametrize("eos", ["</s>", "<|im_end|>"])
def test_rows_of_tokens_behind_a_gap_stay(tied, vocabulary, grown, eos, tmp_path):
    # 258 tokens in a row, two more behind gaps; the model may know one, both or neither of these.
    tokenizer = byte_tokenizer(ids={"<|im_start|>": 268, "<|im_end|>": 279}, eos_token=eos, pad_token=None)
    model = tiny_decoder("llama", vocab_size=vocabulary, tie_word_embeddings=tied)
    layers = model.get_input_embeddings, model.get_output_embeddings
    before = [layer().weight.detach().clone() for layer in layers]
    add_landmarks(model, tokenizer, landmark_freq=FREQ, trained_length=LENGTH)

    assert (tokenizer.pad_token_id, model.config.landmark_token_id) == (280, 281)
    assert model.config.vocab_size == model.get_input_embeddings().weight.shape[0] == grown
    known = [id for id in (*range(258), 268, 279) if id < vocabulary]
    for old, layer in zip(before, layers, strict=True):
        kept = [id for id in range(vocabulary) if id not in (280, 281)]
        assert torch.equal(layer().weight[kept], old[kept])
        new = [280, 281, *range(vocabulary, grown)]
        assert_close_norm(layer().weight[new], old[known].mean(0).expand(len(new), -1))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    opened, again = store.load(tmp_path, device="cpu")
    assert again.convert_tokens_to_ids("<landmark>") == opened.config.landmark_token_id


def test_a_token_that_only_the_config_names_keeps_its_row():
    model, tokenizer = tiny_decoder("llama", vocab_size=320, eos_token_id=[0, 290]), tiny_tokenizer()
    row = model.get_input_embeddings().weight[290].detach().clone()
    add_landmarks(model, tokenizer, landmark_freq=FREQ, trained_length=LENGTH)
    assert (tokenizer.pad_token_id, model.config.landmark_token_id) == (291, 292)
    assert torch.equal(model.get_input_embeddings().weight[290], row)


@pytest.mark.parametrize(("length", "top_k"), [(512, 4), (48, 4), (40, 3), (16, 0)])
def test_the_blocks_retrieved_by_default_leave_room_for_a_chunk(length, top_k):
    model = tiny_decoder("llama")
    add_landmarks(model, tiny_tokenizer(), landmark_freq=FREQ, trained_length=length)
    assert model.config.top_k_blocks == top_k
    with pytest.raises(LandmarkError, match=f"take at most {length // 8 - 2}"):
        add_landmarks(model, tiny_tokenizer(), landmark_freq=FREQ, trained_length=length, top_k_blocks=length // 8 - 1)


def test_a_window_that_a_model_could_not_read_with_is_refused():
    with pytest.raises(LandmarkError, match="a window of 15 tokens holds fewer than the two blocks of 7 text tokens"):
        add_landmarks(tiny_decoder("llama"), tiny_tokenizer(), landmark_freq=FREQ, trained_length=15)


def test_an_aligned_vocabulary_stays_aligned():
    model = tiny_decoder("llama", vocab_size=256)
    add_landmarks(model, tiny_tokenizer(pad_token="<|end|>"), landmark_freq=FREQ, trained_length=LENGTH)
    assert model.config.vocab_size == 320 and model.config.landmark_token_id == 257


def test_landmarks_added_twice_are_added_once():
    model, tokenizer = landmark_decoder("llama")
    rows, size = model.get_input_embeddings().weight.detach().clone(), len(tokenizer)
    add_landmarks(model, tokenizer, landmark_freq=15, trained_length=2 * LENGTH)
    assert torch.equal(model.get_input_embeddings().weight, rows) and len(tokenizer) == size
    assert (model.config.landmark_freq, model.config.trained_length) == (15, 2 * LENGTH)


def test_a_softmax_that_nobody_knows_changes_nothing():
    model, tokenizer = tiny_decoder("llama"), tiny_tokenizer()
    with pytest.raises(ValueError, match="softmax is 'newest'; take 'grouped' or 'joint'"):
        add_landmarks(model, tokenizer, landmark_freq=FREQ, trained_length=LENGTH, softmax="newest")
    assert "<landmark>" not in tokenizer.get_vocab() and not hasattr(model.config, "landmark_softmax")


def test_landmarks_that_only_choose_have_no_context_miss_token_beside_them():
    model = tiny_model(context_miss_token=True, vocab_size=VOCABULARY)
    with pytest.raises(LandmarkError, match="has a context-miss token, .*: take softmax grouped"):
        add_landmarks(model, tiny_tokenizer(), landmark_freq=4, trained_length=40, softmax="joint")


@pytest.mark.parametrize("family", ["llama", "gpt-neox", "gemma3", "gpt-oss"])
def test_padding_changes_nothing(family):
    model, _ = landmark_decoder(family)
    rows = [insert_landmarks(ids, FREQ, model.config.landmark_token_id) for ids in (texts(1, 50), texts(1, 31))]
    width = rows[0].shape[1]
    with torch.no_grad():
        alone = [model(row).logits[0] for row in rows]
        for side in ("left", "right"):
            ids, mask = torch.zeros(2, width, dtype=torch.long), torch.zeros(2, width, dtype=torch.long)
            for i, row in enumerate(rows):
                place = slice(width - row.shape[1], width) if side == "left" else slice(0, row.shape[1])
                ids[i, place], mask[i, place] = row[0], 1
            logits = model(ids, attention_mask=mask).logits
            for i in range(2):
                assert_close_norm(logits[i, mask[i].bool()], alone[i])


def test_uneven_and_packed_blocks_are_told_by_the_layout():
    model, _ = landmark_decoder("llama")
    first, second = (insert_landmarks(texts(1, n), FREQ, model.config.landmark_token_id) for n in (20, 33))
    with torch.no_grad():
        packed = torch.cat([first, second], 1)
        bounds = torch.tensor([0, first.shape[1], packed.shape[1]])
        logits = model(packed, landmark_layout=LandmarkLayout(cu_seqlens=bounds)).logits
        assert_close_norm(logits[:, : first.shape[1]], model(first).logits)
        assert_close_norm(logits[:, first.shape[1] :], model(second).logits)

        mask = first == model.config.landmark_token_id
        uneven = model(first, landmark_layout=LandmarkLayout(landmark_mask=mask)).logits
        assert_close_norm(uneven, model(first).logits)


def test_masks_that_cannot_be_honoured():
    model, _ = landmark_decoder("llama")
    ids, mask = texts(1, 20), torch.ones(1, 20, dtype=torch.long)
    mask[0, 5] = 0
    with pytest.raises(ValueError, match="middle of a row"):
        model(ids, attention_mask=mask)
    with pytest.raises(ValueError, match="4 dimensions"):
        model(ids, attention_mask=torch.zeros(1, 1, 20, 20))


def test_what_landmark_attention_does_not_have_is_refused_in_the_forward_pass_too():
    model = tiny_decoder("llama")
    model.set_attn_implementation("landmark")
    with pytest.raises(ValueError, match="add_landmarks"):
        model(texts(1, 20))
    model, _ = landmark_decoder("mistral-wide-window")
    with pytest.raises(ValueError, match="sliding_window is 128"):
        model(texts(1, 130))
    model = tiny_decoder("qwen2", landmark_freq=FREQ, landmark_layers=[1])
    model.set_attn_implementation("landmark")
    settle_layers(model)
    with pytest.raises(ValueError, match="leaves layer 0 its sliding window, and it has none"):
        model(texts(1, 20))


def test_windows_that_do_not_fit():
    model, tokenizer = tiny_decoder("llama"), tiny_tokenizer()
    with pytest.raises(LandmarkError, match="has 512 positions, fewer than a window of 600 tokens: .* of at most 512"):
        add_landmarks(model, tokenizer, landmark_freq=FREQ, trained_length=600)
    with pytest.raises(LandmarkError, match="fewer than the two blocks of 63"):
        add_landmarks(model, tokenizer, landmark_freq=63, trained_length=63)
    with pytest.raises(ValueError, match="landmark_freq is 0"):
        add_landmarks(model, tokenizer, landmark_freq=0)
    assert len(tokenizer) == 257 and model.config.vocab_size == VOCABULARY


def test_a_tokenizer_of_another_model():
    model, tokenizer = landmark_decoder("llama")
    check_landmark_token(model.config, tokenizer, "it")
    with pytest.raises(LandmarkError, match="no landmark token, but the model's landmark is token 258"):
        check_landmark_token(model.config, tiny_tokenizer(), "it")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<landmark>"])
    with pytest.raises(LandmarkError, match="<landmark> as token 257"):
        check_landmark_token(model.config, tokenizer, "it")


@pytest.mark.parametrize("make", [tiny_model, tiny_baseline])
def test_the_papers_own_model_goes_on_with_other_landmarks(make):
    model, tokenizer = make(vocab_size=320, trained_length=64), tiny_tokenizer(pad_token="<|end|>")
    add_landmarks(model, tokenizer, landmark_freq=FREQ, trained_length=LENGTH)
    assert (model.config.landmark_freq, model.config.landmark_token_id) == (FREQ, 257)
    ids = texts(1, 40)
    with torch.no_grad():
        logits = model(insert_landmarks(ids, FREQ, 257)).logits[:, -1]
    (read,) = BlockReader(model, top_k_blocks=9, chunk=40).read([ids[0]])
    assert_close_norm(read.logits[:, -1], logits)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "phi3", "olmo2", "gpt-neox", "granite", "mixtral"])
def test_attention_dropout_is_said_to_be_left_out(family, capsys):
    said = "asks for attention dropout of 0.1, which landmark attention does not have: it is trained without"
    landmark_decoder(family)
    assert said not in capsys.readouterr().err
    model = tiny_decoder(family, attention_dropout=0.1)
    state, training = torch.get_rng_state(), model.training
    add_landmarks(model, tiny_tokenizer(), landmark_freq=FREQ, trained_length=LENGTH)
    assert said in capsys.readouterr().err
    assert model.training == training and torch.equal(torch.get_rng_state(), state)
