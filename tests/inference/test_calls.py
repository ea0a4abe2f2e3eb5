"""transformers' own generate and forward read with memory, and give what `landmark generate` gives."""

import copy
import functools
import os

import pytest
import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    SuppressTokensLogitsProcessor,
    TextStreamer,
    pipeline,
)
from transformers.generation.streamers import BaseStreamer

from landmark_cli.data.landmarks import insert_landmarks
from landmark_cli.data.pretrained_tokenizers import LANDMARK_TOKEN, add_tokens
from landmark_cli.errors import LandmarkError, UsageError
from landmark_cli.inference import landmark_cache, sampling_loop
from landmark_cli.inference.generation import generate
from landmark_cli.inference.landmark_cache import LandmarkCache
from landmark_cli.inference.readers import open_reader
from landmark_cli.inference.settings import ReadingSettings, SamplingSettings
from landmark_cli.models import calls
from landmark_cli.models.card import CARD
from landmark_cli.models.decoders import add_landmarks
from landmark_cli.models.generation_config import silence
from landmark_cli.models.store import load
from tests.closeness import assert_close_norm
from tests.models.families import VOCABULARY, tiny_decoder, tiny_tokenizer
from tests.tiny import tiny_model

FREQ, CHUNK, NEW = 4, 8, 8
READING = {"read_chunk": CHUNK, "top_k_blocks": 2}
DECODERS = ("llama", "qwen3", "gpt-neox")
WITH_LANDMARKS = ("gpt", "context miss", *DECODERS)
# A Transformer-XL reads rows of one length only.
KINDS = (*WITH_LANDMARKS, "baseline", "transformer-xl")
LENGTHS = (1, 3, CHUNK, 2 * CHUNK + 1, 20 * CHUNK)


@functools.cache
def opened(kind: str):
    """A random model of a kind and its tokenizer, as a run leaves them."""
    tokenizer = tiny_tokenizer()
    if kind in DECODERS:
        model = tiny_decoder(kind)
        add_landmarks(model, tokenizer, landmark_freq=FREQ, trained_length=40, top_k_blocks=1)
        return model.eval(), tokenizer
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token
    settings = {"vocab_size": VOCABULARY, "landmark_token_id": add_tokens(tokenizer, [LANDMARK_TOKEN])[0]}
    if kind in ("baseline", "transformer-xl"):
        lengths = {"memory_length": 12, "segment_length": 6} if kind == "transformer-xl" else {}
        settings = {"vocab_size": VOCABULARY, "landmark_freq": None, "landmark_token_id": None, **lengths}
    model = tiny_model(**settings, context_miss_token=kind == "context miss", eos_token_id=0, pad_token_id=0)
    silence(model, tokenizer)
    return model, tokenizer


def texts(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(1, 257, (length,), generator=generator) for length in lengths]


def padded(rows: list[torch.Tensor], side: str = "left") -> dict[str, torch.Tensor]:
    """Rows as a tokenizer would batch them, padded with the end of text."""
    width = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.long)
    for row, text in enumerate(rows):
        at = slice(width - len(text), width) if side == "left" else slice(len(text))
        ids[row, at], mask[row, at] = text, 1
    return {"input_ids": ids, "attention_mask": mask}


def ours(kind: str, rows: list[torch.Tensor], **settings) -> list[list[int]]:
    """What `landmark generate` gives at temperature 0."""
    sampling = SamplingSettings(max_new_tokens=NEW, temperature=0, **settings)
    reading = ReadingSettings(chunk=CHUNK, top_k_blocks=2)
    return [result.tokens for result in generate(*opened(kind), rows, sampling, reading=reading)]


def theirs(kind: str, inputs: dict[str, torch.Tensor], **settings) -> list[list[int]]:
    """What transformers' generate gives, up to the end of text."""
    settings = {"max_new_tokens": NEW, "do_sample": False, **READING, **settings}
    given = opened(kind)[0].generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :].tolist()
    return [row[: row.index(0) + 1] if 0 in row else row for row in given]


@pytest.mark.skipif("LANDMARK_TRANSFORMERS" not in os.environ, reason="make test-versions asks for a version")
def test_transformers_is_of_the_version_that_was_asked_for():
    assert f"{transformers.__version__}.".startswith(os.environ["LANDMARK_TRANSFORMERS"] + ".")


@pytest.mark.parametrize("kind", KINDS)
def test_generates_what_landmark_generate_does(kind):
    rows = texts(*LENGTHS) if kind != "transformer-xl" else texts(3 * CHUNK + 1, 3 * CHUNK + 1)
    expected = ours(kind, rows)
    assert theirs(kind, padded(rows)) == expected
    for row, alone in zip(rows, expected, strict=True):
        assert theirs(kind, padded([row])) == [alone]


def test_padding_on_the_right_is_not_read_either():
    """transformers warns of it, and goes on behind it."""
    rows = texts(3, 2 * CHUNK + 1)
    assert theirs("gpt", padded(rows, "right")) == ours("gpt", rows)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_reader_bit_for_bit(kind):
    (row,) = texts(3 * CHUNK + 2)
    model, _ = opened(kind)
    output = model.generate(
        row[None], max_new_tokens=NEW, do_sample=False, output_logits=True, return_dict_in_generate=True, **READING
    )
    reader = open_reader(model, ReadingSettings(chunk=CHUNK, top_k_blocks=2))
    *_, last = reader.read([row], last_only=True)
    expected = [last.logits[:, -1]]
    for token in output.sequences[0, len(row) : -1].tolist():
        expected.append(reader.step([token]))
    assert len(expected) == len(output.logits)
    assert all(torch.equal(one, other.float()) for one, other in zip(output.logits, expected, strict=True))


def test_settings_come_from_arguments_the_config_given_and_the_models_own(monkeypatch):
    model, tokenizer = opened("llama")
    model, seen = copy.deepcopy(model), []
    opening = landmark_cache.open_reader
    monkeypatch.setattr(
        landmark_cache, "open_reader", lambda model, chosen, batch: seen.append(chosen) or opening(model, chosen, batch)
    )
    (row,) = texts(30)

    def read_with(**arguments) -> ReadingSettings:
        model.generate(row[None], max_new_tokens=1, **arguments)
        return seen.pop()

    assert read_with() == ReadingSettings()
    model.generation_config.top_k_blocks, model.generation_config.read_chunk = 2, 12
    assert read_with() == ReadingSettings(top_k_blocks=2, chunk=12)
    given = GenerationConfig(top_k_blocks=3, selection="max_over_heads", cache_blocks=5)
    found = read_with(generation_config=given)
    assert found == ReadingSettings(top_k_blocks=3, chunk=12, selection="max_over_heads", cache_blocks=5)
    found = read_with(generation_config=given, top_k_blocks=1, offload="cpu")
    assert found == ReadingSettings(1, 12, 5, "max_over_heads", offload="cpu")
    assert read_with(positions="absolute", context_miss_cutoff=0.1).positions == "absolute"
    for wrong in ({"top_k_blocks": "many"}, {"selection": "best"}, {"offload": "disk"}, {"read_chunk": 1.5}):
        with pytest.raises(UsageError, match="|".join(map(str, wrong.values()))):
            read_with(**wrong)


def test_settings_are_saved_with_the_model(tmp_path):
    model, tokenizer = opened("llama")
    model = copy.deepcopy(model)
    model.generation_config.top_k_blocks = 2
    model.save_pretrained(tmp_path)
    again = GenerationConfig.from_pretrained(tmp_path)
    assert again.top_k_blocks == 2 and again.suppress_tokens == model.generation_config.suppress_tokens


class Wanting(LogitsProcessor):
    """A logits processor that wants these tokens."""

    def __init__(self, tokens):
        self.tokens = tokens

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, self.tokens] += 1e4
        return scores


@pytest.mark.parametrize("kind", ["gpt", "llama"])
@pytest.mark.parametrize("way", [{"do_sample": False}, {"do_sample": True, "top_k": 0}, {"num_beams": 2}], ids=str)
def test_nothing_but_text_is_generated(kind, way):
    model, tokenizer = opened(kind)
    (row,) = texts(20)
    silent = model.generation_config.suppress_tokens
    assert model.config.landmark_token_id in silent and 299 in silent
    processors = LogitsProcessorList([Wanting(silent)])
    out = model.generate(row[None], max_new_tokens=5, logits_processor=processors, **way)
    assert not torch.isin(out[:, len(row) :], torch.tensor(silent)).any()


def test_the_landmark_is_never_generated_even_without_a_list_of_what_is_no_text():
    model, tokenizer = opened("llama")
    model = copy.deepcopy(model)
    model.generation_config.suppress_tokens = None
    processors = LogitsProcessorList([Wanting([model.config.landmark_token_id])])
    out = model.generate(texts(20)[0][None], max_new_tokens=5, logits_processor=processors, do_sample=False)
    assert not (out == model.config.landmark_token_id).any()


class Heard(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


class After(StoppingCriteria):
    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


@pytest.mark.parametrize("kind", ["gpt", "llama"])
def test_streamers_and_criteria_of_transformers(kind, capsys):
    model, tokenizer = opened(kind)
    (row,) = texts(30)
    heard = Heard()
    stop = StoppingCriteriaList([After(34)])
    out = model.generate(row[None], max_new_tokens=NEW, do_sample=False, streamer=heard, stopping_criteria=stop)
    assert out.shape[1] <= 34 and heard.tokens == out[0].tolist() and heard.ended
    capsys.readouterr()
    model.generate(row[None], max_new_tokens=3, do_sample=False, streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out.strip() == tokenizer.decode(out[0, 30:33]).strip()


def test_several_sequences_of_a_prompt():
    model, _ = opened("gpt")
    rows = padded(texts(9, 30))
    torch.manual_seed(0)
    out = model.generate(**rows, max_new_tokens=NEW, do_sample=True, num_return_sequences=3)
    assert out.shape[0] == 6 and len({tuple(row) for row in out[:3].tolist()}) == 3
    assert (out[:3, :30] == rows["input_ids"][0]).all() and (out[3:, :30] == rows["input_ids"][1]).all()


class Setting(LogitsProcessor):
    """A logits processor that sets the score of a token, whatever it was."""

    def __call__(self, input_ids, scores):
        return scores.index_fill(1, torch.tensor([3]), 50.0)


FORBIDDING = [SuppressTokensLogitsProcessor([3]) for _ in range(2)]
EARLY = {"do_sample": True, "temperature": 3.0, "num_return_sequences": 4, "eos_token_id": list(range(0, 257, 5))}
LOOPS = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 2.0, "top_k": 7, "num_return_sequences": 2},
    "rows that end early": EARLY,
    "padded with another token": {**EARLY, "pad_token_id": 9},
    "all that can be asked for": {"do_sample": False, "output_scores": True, "output_logits": True},
    "processors": {"do_sample": False, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "min_new_tokens": 4},
    "no list of what is no text": {"do_sample": False, "suppress_tokens": [3]},
    "forbidden, set and forbidden again": {
        "do_sample": False,
        "logits_processor": LogitsProcessorList([FORBIDDING[0], Setting(), FORBIDDING[1]]),
        "output_scores": True,
    },
    "a stop string": {"do_sample": False, "stop_strings": [chr(code) for code in range(97, 110)]},
}


@pytest.mark.parametrize("kind", ["gpt", "llama", "baseline"])
@pytest.mark.parametrize("way", LOOPS)
def test_the_loop_over_a_reader_does_what_transformers_own_does(kind, way, monkeypatch):
    model, tokenizer = opened(kind)
    rows, may, went = texts(30, 11), sampling_loop.goes, []

    def run(allowed: bool):
        monkeypatch.setattr(sampling_loop, "goes", lambda *given: allowed and (went.append(may(*given)) or went[-1]))
        torch.manual_seed(5)
        heard = Heard()
        inputs = padded(rows)
        cache = LandmarkCache(model, ReadingSettings(chunk=CHUNK, top_k_blocks=2))
        settings = {"max_new_tokens": 24, "return_dict_in_generate": True, "past_key_values": cache, **LOOPS[way]}
        if "stop_strings" in settings:
            settings["tokenizer"] = tokenizer
        return model.generate(**inputs, streamer=heard, **settings), heard, cache

    (ours, heard, cache), (theirs, also_heard, other) = run(True), run(False)
    assert went == [True]
    assert torch.equal(ours.sequences, theirs.sequences) and ours.sequences.shape[1] > 31
    if "eos_token_id" in LOOPS[way]:
        ended = torch.isin(ours.sequences[:, 30:-1], torch.tensor(LOOPS[way]["eos_token_id"])).any(-1)
        assert ended.any() and not ended.all()
    assert (heard.tokens, heard.ended) == (also_heard.tokens, also_heard.ended) == (heard.tokens, True)
    assert ours.past_key_values is cache and cache.get_seq_length() == other.get_seq_length()
    for one, another in ((ours.scores, theirs.scores), (ours.logits, theirs.logits)):
        assert (one is None) == (another is None)
        assert all(torch.equal(a, b) for a, b in zip(one or (), another or (), strict=True))


def test_what_the_loop_over_a_reader_leaves_to_transformers_own():
    cached = {"past_key_values": LandmarkCache(opened("gpt")[0]), "use_cache": True}
    assert sampling_loop.goes(GenerationConfig(), False, cached)
    assert not sampling_loop.goes(GenerationConfig(), True, cached), "all processes step together, finished or not"
    assert not sampling_loop.goes(GenerationConfig(), False, {"past_key_values": DynamicCache(), "use_cache": True})


def test_a_loop_that_is_called_otherwise_is_kept(monkeypatch):
    assert GenerationMixin._sample.reads_with_memory

    def another(self, input_ids, settings):
        """A version of transformers to come."""

    for changed in ("_sample", "_prefill"):
        with monkeypatch.context() as version:
            version.setattr(GenerationMixin, "_sample", GenerationMixin._sample.__wrapped__)
            version.setattr(GenerationMixin, changed, another)
            kept = GenerationMixin._sample
            calls.register()
            assert GenerationMixin._sample is kept


class Rereading(LandmarkCache):
    """Reads every row anew, token by token behind its prompt, when rows are reordered: what that has to come to."""

    def read(self, input_ids, attention_mask=None, logits_to_keep=0):
        logits = super().read(input_ids, attention_mask, logits_to_keep)
        seen = torch.ones_like(input_ids) if attention_mask is None else attention_mask[:, -input_ids.shape[1] :]
        rows = [row[keep.bool()].tolist() for row, keep in zip(input_ids, seen, strict=True)]
        old = getattr(self, "history", [[] for _ in rows])
        self.history = [[*before, row] for before, row in zip(old, rows, strict=True)]
        return logits

    def reorder_cache(self, beam_idx):
        self.history = [self.history[row] for row in beam_idx.tolist()]
        self.reader = open_reader(self.model, self.settings, batch=len(self.history))
        for _ in self.reader.read([prompt for prompt, *_ in self.history], last_only=True):
            pass
        for tokens in zip(*(steps for _, *steps in self.history), strict=True):
            self.reader.step([token for (token,) in tokens])


@pytest.mark.parametrize("kind", ["gpt", "llama"])
def test_beam_search(kind):
    model, _ = opened(kind)
    rows = padded(texts(11, 22))
    settings = ReadingSettings(chunk=CHUNK, top_k_blocks=2)
    search = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False, "length_penalty": 0.0}
    out, expected = (
        model.generate(**rows, **search, past_key_values=cache(model, settings)) for cache in (LandmarkCache, Rereading)
    )
    assert torch.equal(out, expected)
    greedy = model.generate(**rows, **(search | {"num_beams": 1}), **READING)
    assert not torch.equal(out[:, : greedy.shape[1]], greedy[:, : out.shape[1]])


@pytest.mark.parametrize("kind", ["gpt", "llama", "baseline", "transformer-xl"])
@pytest.mark.parametrize("rows", [[1, 0], [1, 1, 0]], ids=str)
@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_rows_of_a_reader_take_each_others_place(kind, rows, offload):
    if offload == "cpu" and kind not in WITH_LANDMARKS:
        pytest.skip("nothing to offload")
    model, _ = opened(kind)
    settings = ReadingSettings(chunk=CHUNK, top_k_blocks=2, offload=offload, cache_blocks=6)
    read = texts(45, 45) if kind == "transformer-xl" else texts(45, 18)

    def reader(texts):
        opened_reader = open_reader(model, settings, batch=len(texts))
        for _ in opened_reader.read(texts):
            pass
        return opened_reader

    moved, expected = reader(read), reader([read[row] for row in rows])
    moved.take(rows)
    assert moved.batch == len(rows)
    for token in range(1, 6):
        steps = [token + row for row in range(len(rows))]
        assert_close_norm(moved.step(steps), expected.step(steps))
    assert getattr(moved, "texts", None) == getattr(expected, "texts", None)


@pytest.mark.parametrize("kind", WITH_LANDMARKS)
def test_forward_reads_on_through_its_cache(kind):
    model, _ = opened(kind)
    rows = texts(50, 50)
    ids = torch.stack(rows)
    settings = ReadingSettings(chunk=CHUNK, top_k_blocks=2)
    expected = torch.cat([part.logits.clone() for part in open_reader(model, settings, 2).read(rows)], dim=1)
    cache = LandmarkCache(model, settings)
    # Pieces of whole chunks, so that the chunks are the same.
    pieces = [model(ids[:, at : at + 16], past_key_values=cache).logits for at in range(0, 48, 16)]
    assert torch.equal(torch.cat(pieces, dim=1), expected[:, :48])
    one = model(ids[:, 48:49], past_key_values=cache)
    assert one.past_key_values is cache and cache.get_seq_length() == 49 and one.logits.shape[1] == 1
    kept = LandmarkCache(model, settings)
    assert torch.equal(model(ids, past_key_values=kept, logits_to_keep=5).logits, expected[:, -5:])
    chosen = model(ids, past_key_values=LandmarkCache(model, settings), logits_to_keep=torch.tensor([3, 20])).logits
    assert torch.equal(chosen, expected[:, [3, 20]])


def test_hidden_columns_are_not_read():
    model, _ = opened("gpt")
    rows = texts(30, 12)
    settings = ReadingSettings(chunk=CHUNK, top_k_blocks=2)
    inputs = padded(rows)
    logits = model(**inputs, past_key_values=LandmarkCache(model, settings)).logits
    for row, text in enumerate(rows):
        alone = model(text[None], past_key_values=LandmarkCache(model, settings)).logits[0]
        assert_close_norm(logits[row, 30 - len(text) :], alone)
        assert (logits[row, : 30 - len(text)] == 0).all()
    with pytest.raises(ValueError, match="nothing to read"):
        model(inputs["input_ids"], attention_mask=torch.zeros(2, 30), past_key_values=LandmarkCache(model))


def test_generate_goes_on_from_what_was_read_and_from_copies_of_it():
    model, tokenizer = opened("llama")
    (whole,) = texts(61)
    expected = theirs("llama", padded([whole]))
    settings = ReadingSettings(chunk=CHUNK, top_k_blocks=2)
    read = LandmarkCache(model, settings)
    with torch.no_grad():
        model(whole[None, :48], past_key_values=read)
    how = {"max_new_tokens": NEW, "do_sample": False}
    for cache in (copy.deepcopy(read), copy.deepcopy(read), read):
        out = model.generate(whole[None], past_key_values=cache, **how)
        assert out[0, 61:].tolist() == expected[0] and cache.get_seq_length() == 61 + len(expected[0]) - 1
    assert cache.model is model and len(cache) == 2
    # What a reader has read before it is no part of the text that is given.
    reader = open_reader(model, settings)
    for _ in reader.read([whole[:48]]):
        pass
    out = model.generate(whole[None, 48:], past_key_values=LandmarkCache(model, reader=reader), **how)
    assert out[0, 13:].tolist() == expected[0]


@pytest.mark.parametrize("kind", WITH_LANDMARKS)
def test_text_without_landmarks_is_read_as_by_generate_and_said_once(kind, capsys):
    model, _ = opened(kind)
    model = copy.deepcopy(model)
    (row,) = texts(50)
    expected = torch.cat([part.logits.clone() for part in open_reader(model, ReadingSettings()).read([row])], dim=1)
    capsys.readouterr()
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(model(row[None]).logits, expected)
        labelled = model(input_ids=row[None], labels=row[None])
    assert_close_norm(labelled.loss, torch.nn.functional.cross_entropy(expected[0, :-1].float(), row[1:]))
    assert capsys.readouterr().err.count("without landmarks") == 1
    with torch.no_grad():
        out = model(row[None, :3], use_cache=True)
        again = model(row[None, 3:4], past_key_values=out.past_key_values).logits
    assert_close_norm(again[:, 0], expected[:, 3])


@pytest.mark.parametrize("kind", WITH_LANDMARKS)
def test_training_on_text_without_landmarks_is_said_once(kind, capsys):
    model, _ = opened(kind)
    model = copy.deepcopy(model).train()
    (row,) = texts(50)
    for _ in range(2):
        model(row[None])
    assert capsys.readouterr().err.count("takes every 5th token for one") == 1


@pytest.mark.parametrize("kind", WITH_LANDMARKS)
@pytest.mark.parametrize("gradients", [False, True])
def test_text_with_landmarks_is_the_models_own_forwards(kind, gradients, capsys):
    model, _ = opened(kind)
    model = copy.deepcopy(model)
    stream = insert_landmarks(texts(24)[0], FREQ, model.config.landmark_token_id)[None]
    with torch.set_grad_enabled(gradients):
        assert torch.equal(model(stream).logits, type(model).forward.__wrapped__(model, stream).logits)
    assert "landmarks" not in capsys.readouterr().err


REFUSED = {
    "assistant_model": lambda model, ids: model.generate(ids, assistant_model=model),
    "prompt_lookup_num_tokens": lambda model, ids: model.generate(ids, prompt_lookup_num_tokens=3),
    "inputs_embeds": lambda model, ids: model.generate(inputs_embeds=model.get_input_embeddings()(ids)),
    "cache_implementation": lambda model, ids: model.generate(ids, cache_implementation="static"),
    "DynamicCache": lambda model, ids: model.generate(ids, past_key_values=DynamicCache()),
    "continuous batching": lambda model, ids: model.init_continuous_batching(),
    "landmark token": lambda model, ids: model.generate(ids.fill_(model.config.landmark_token_id)),
    "another model": lambda model, ids: model(ids, past_key_values=LandmarkCache(opened("qwen3")[0])),
    "taken back": lambda model, ids: LandmarkCache(model).crop(-1),
    "output_hidden_states": lambda model, ids: model.generate(
        ids, max_new_tokens=2, output_hidden_states=True, return_dict_in_generate=True
    ),
    "output_attentions": lambda model, ids: model(ids, past_key_values=LandmarkCache(model), output_attentions=True),
    "read with memory": lambda model, ids: LandmarkCache(model).update(ids, ids, 0),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_be_done_with_memory_is_refused(words):
    model, _ = opened("llama")
    with pytest.raises(LandmarkError, match=words):
        REFUSED[words](model, texts(12)[0][None])


def test_a_cache_of_ordinary_attention_that_holds_something_is_refused():
    model, _ = opened("llama")
    cache = DynamicCache(config=model.config)
    model(texts(3)[0][None], past_key_values=cache)
    with pytest.raises(LandmarkError, match="LandmarkCache"):
        model(texts(1)[0][None], past_key_values=cache)


@pytest.mark.parametrize("kind", KINDS)
def test_whoever_names_no_attention_gets_the_models_own(kind, tmp_path):
    """`transformers serve` says None, to the class itself; text would be read by ordinary attention without a word."""
    model, _ = opened(kind)
    model.save_pretrained(tmp_path)
    for by in (AutoModelForCausalLM, type(model)):
        again = by.from_pretrained(tmp_path, attn_implementation=None)
        assert again.config._attn_implementation == model.config._attn_implementation
        assert by.from_pretrained(tmp_path, attn_implementation="sdpa").config._attn_implementation == "sdpa"


def test_settings_that_need_no_cache_change_nothing():
    (row,) = texts(30)
    expected = theirs("llama", padded([row]))
    assert theirs("llama", padded([row]), use_cache=False) == expected
    assert theirs("llama", padded([row]), cache_implementation="dynamic") == expected


def test_models_without_landmarks_are_transformers_own():
    model = tiny_decoder("llama")
    (row,) = texts(40)
    out = model.generate(row[None], max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    assert isinstance(out.past_key_values, DynamicCache)


@pytest.mark.parametrize("kind", ["gpt", "llama", "baseline"])
def test_a_pipeline_on_a_directory(kind, tmp_path, caplog):
    model, tokenizer = opened(kind)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    prompts = ["It was a dark and stormy night; the rain fell in torrents, except at occasional intervals.", "Call me"]
    generated = pipeline("text-generation", model=str(tmp_path))
    results = generated(prompts, batch_size=2, max_new_tokens=NEW, do_sample=False, **READING)
    assert "not supported" not in caplog.text
    assert generated.model.config._attn_implementation == model.config._attn_implementation
    tokens = ours(kind, [torch.tensor(tokenizer.encode(prompt)) for prompt in prompts])
    for prompt, (result,), expected in zip(prompts, results, tokens, strict=True):
        assert result["generated_text"] == prompt + tokenizer.decode(expected, skip_special_tokens=True)
    card = (tmp_path / CARD).read_text()
    assert "import landmark_cli" in card and ("landmark_gpt" if kind != "llama" else "ordinary `llama`") in card
    (tmp_path / CARD).write_text("mine")
    again, _ = load(tmp_path)
    again.save_pretrained(tmp_path)
    assert (tmp_path / CARD).read_text() == "mine"
