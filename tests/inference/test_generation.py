"""Generation: alone as in a batch, streamed as whole, nothing but text."""

import functools
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, MaxLengthCriteria, StoppingCriteriaList, TextIteratorStreamer

from landmark_cli.data.gpt2_tokenizer import GPT2_LANDMARK_ID
from landmark_cli.data.tokenizers import load_tokenizer
from landmark_cli.errors import LandmarkError, UsageError
from landmark_cli.inference.generation import encode_prompt, generate, read_prompts, tokens_without_text
from landmark_cli.inference.readers import open_reader
from landmark_cli.inference.settings import ReadingSettings, SamplingSettings
from landmark_cli.inference.text import TextStream
from landmark_cli.inference.window import WindowReader
from tests.closeness import assert_close_norm
from tests.tiny import LANDMARK, tiny_baseline, tiny_llama, tiny_model, tiny_text

GPT2 = load_tokenizer("gpt2")
PROMPTS = ["It was a dark and stormy night; the rain fell in torrents, except at occasional intervals.", "Call me", "9"]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("gpt2")
    GPT2.save_pretrained(directory)
    return AutoTokenizer.from_pretrained(directory)


@functools.cache
def gpt2_model(kind: str):
    ids = {"vocab_size": 50304, "eos_token_id": GPT2.eot_id}
    if kind in ("landmark", "context miss"):
        return tiny_model(landmark_token_id=GPT2_LANDMARK_ID, context_miss_token=kind == "context miss", **ids)
    return tiny_baseline(**ids) if kind == "baseline" else tiny_llama(**ids)


@pytest.mark.parametrize("kind", ["landmark", "baseline", "llama"])
@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_a_batch_gives_what_its_prompts_give_alone(tokenizer, kind, temperature):
    sampling = {"max_new_tokens": 12, "temperature": temperature, "top_p": 0.9, "repetition_penalty": 1.3}
    reading = ReadingSettings(chunk=7, top_k_blocks=2)
    model = gpt2_model(kind)
    together = generate(model, tokenizer, PROMPTS, SamplingSettings(**sampling, seed=5), reading=reading)
    for row, prompt in enumerate(PROMPTS):
        alone = generate(model, tokenizer, [prompt], SamplingSettings(**sampling, seed=5 + row), reading=reading)
        assert alone == [together[row]]
    if temperature:
        assert len({tuple(result.tokens) for result in together}) == 3
    assert generate(model, tokenizer, PROMPTS, SamplingSettings(**sampling, seed=5), reading=reading) == together


def test_seeds_differ(tokenizer):
    first, second = (
        generate(gpt2_model("landmark"), tokenizer, ["Once"], SamplingSettings(max_new_tokens=8, seed=seed))
        for seed in (0, 1)
    )
    assert first != second


@pytest.mark.parametrize("kind", ["landmark", "baseline"])
def test_only_text_is_emitted(tokenizer, kind):
    """Even where the model wants nothing but its landmark and the padding of its vocabulary."""
    model = gpt2_model(kind)
    silent = tokens_without_text(model, tokenizer)
    assert silent == [*range(50257, 50304)]
    wanted = torch.zeros(50304)
    wanted[silent] = 1e4

    def eager(module, inputs, output):
        output.logits = output.logits + wanted

    hook = model.register_forward_hook(eager)
    try:
        for temperature in (0.0, 2.0):
            sampling = SamplingSettings(max_new_tokens=10, temperature=temperature, top_k=0)
            (result,) = generate(model, tokenizer, ["Once"], sampling)
            assert len(result.tokens) == 10 and not set(result.tokens) & set(silent)
    finally:
        hook.remove()


def test_stops_at_end_of_text(tokenizer):
    class End:
        def __call__(self, input_ids, scores):
            scores = scores.clone()
            scores[:, GPT2.eot_id] = 1e4 if input_ids.shape[1] > 5 else -1e4
            return scores

    (result,) = generate(gpt2_model("landmark"), tokenizer, ["Call me"], SamplingSettings(), processors=[End()])
    assert result.finish == "end of text" and result.tokens[-1] == GPT2.eot_id and len(result.tokens) == 5
    assert result.text == GPT2.decode(result.tokens[:-1])


@pytest.mark.parametrize("kind", ["landmark", "baseline"])
def test_room_for_new_tokens_is_made_as_they_come(tokenizer, kind, monkeypatch):
    settings = {"temperature": 1.3, "repetition_penalty": 1.3}
    (free,) = generate(gpt2_model(kind), tokenizer, ["Call me"], SamplingSettings(max_new_tokens=12, **settings))
    monkeypatch.setattr("landmark_cli.inference.generation.EXPECTED_TOKENS", 3)
    twelfth = StoppingCriteriaList([MaxLengthCriteria(12)])
    most = SamplingSettings(max_new_tokens=10**9, **settings)
    (stopped,) = generate(gpt2_model(kind), tokenizer, ["Call me"], most, criteria=twelfth)
    assert stopped.tokens == free.tokens and (stopped.finish, free.finish) == ("stopping criterion", "length")


@pytest.mark.parametrize("temperature", [1e-300, 5e-324, 1e-45, 1e-6, 1e-5])
def test_the_coldest_temperatures_are_greedy(tokenizer, temperature):
    greedy, cold = (
        generate(gpt2_model("landmark"), tokenizer, ["Call me"], SamplingSettings(max_new_tokens=5, temperature=t))
        for t in (0.0, temperature)
    )
    assert cold[0].tokens == greedy[0].tokens


def test_stop_strings_end_the_text_in_front_of_them(tokenizer):
    model = gpt2_model("landmark")
    sampling = {"max_new_tokens": 12, "temperature": 0.0}
    (free,) = generate(model, tokenizer, ["Call me"], SamplingSettings(**sampling))
    assert free.finish == "length" and len(free.tokens) == 12
    stop = free.text[11:16]
    pieces = []
    (stopped,) = generate(
        model,
        tokenizer,
        ["Call me"],
        SamplingSettings(**sampling, stop=["never seen", stop]),
        on_text=lambda row, piece: pieces.append(piece),
    )
    assert stopped.finish == "stop string"
    assert stopped.text == free.text[: free.text.index(stop)] == "".join(pieces)
    assert len(stopped.tokens) < 12


def test_streamers_of_transformers(tokenizer):
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    results = []

    def work():
        results.extend(generate(gpt2_model("landmark"), tokenizer, ["Call me"], streamer=streamer))

    thread = threading.Thread(target=work)
    thread.start()
    streamed = "".join(streamer)
    thread.join()
    assert streamed == tokenizer.decode(results[0].tokens)
    with pytest.raises(ValueError, match="single prompt"):
        generate(gpt2_model("landmark"), tokenizer, PROMPTS, streamer=streamer)


@given(st.text(max_size=60), st.text(max_size=20), st.lists(st.text(min_size=1, max_size=4), max_size=3))
@settings(max_examples=150, deadline=None)
def test_streamed_pieces_are_the_text(tokenizer, text, prompt, stop):
    whole = text
    for at in [at for string in stop if (at := text.find(string)) >= 0]:
        whole = whole[: min(at, len(whole))]
    stream = TextStream(tokenizer, GPT2.encode(prompt), stop)
    pieces = [stream.add(token) for token in GPT2.encode(text)] + [stream.end()]
    assert "".join(pieces) == stream.text == whole
    assert stream.stopped == (whole != text or any(text.startswith(string, len(whole)) for string in stop))


def test_half_characters_wait(tokenizer):
    stream = TextStream(tokenizer)
    tokens = GPT2.encode("東京🙂")
    pieces = [stream.add(token) for token in tokens]
    assert len(tokens) > 3 and [piece for piece in pieces if piece] == ["東", "京", "🙂"]
    # What never becomes a character comes out at the end.
    stream.add(GPT2.encode("🙂")[0])
    assert stream.end() == "\ufffd"


@pytest.mark.parametrize("kind", ["baseline", "llama"])
def test_a_window_reader_sees_the_newest_tokens_only(kind):
    model = tiny_baseline(trained_length=32) if kind == "baseline" else tiny_llama()
    rows = [tiny_text(length, seed) for seed, length in enumerate([50, 20, 3])]
    reader = WindowReader(model, batch=3)
    assert reader.window == 32
    seen = [rows[0][-24:], rows[1], rows[2]]
    found = [read_prompts(reader, rows)]
    for step in range(20):
        tokens = [torch.tensor(step + row) for row in range(3)]
        seen = [torch.cat([row, token[None]]) for row, token in zip(seen, tokens, strict=True)]
        seen = [row if len(row) <= 32 else row[-24:] for row in seen]
        with torch.no_grad():
            expected = torch.stack([model(row[None]).logits[0, -1] for row in seen])
        assert_close_norm(reader.step([t.item() for t in tokens]), expected)
        found.append(expected)
    # A row that rests changes nothing for the others.
    reader.reset()
    read_prompts(reader, rows)
    for step in range(10):
        logits = reader.step([None if row == 1 else step + row for row in range(3)])
        assert_close_norm(logits[[0, 2]], found[step + 1][[0, 2]])


def test_prompts_are_read_to_each_row_s_own_end():
    model = tiny_model()
    rows = [tiny_text(length, seed) for seed, length in enumerate([31, 8, 2])]
    settings = ReadingSettings(chunk=5)
    together = read_prompts(open_reader(model, settings, batch=3), rows, show_progress=True)
    for row, text in enumerate(rows):
        alone = read_prompts(open_reader(model, settings), [text])
        assert_close_norm(together[row], alone[0])


def test_prompts(tokenizer):
    assert encode_prompt(tokenizer, "Call me") == GPT2.encode("Call me")
    assert encode_prompt(tokenizer, "") == [GPT2.eot_id]
    with pytest.raises(UsageError, match="no chat template"):
        encode_prompt(tokenizer, "Call me", chat=True)
    with pytest.raises(LandmarkError, match="landmark token"):
        generate(tiny_model(), tokenizer, [[1, LANDMARK]])
    with pytest.raises(ValueError, match="prompts: a row of no tokens"):
        generate(tiny_model(), tokenizer, [[1], []])
    reading = ReadingSettings(chunk=3)
    with pytest.raises(ValueError, match="reading: a reader reads by its own settings"):
        generate(tiny_model(), tokenizer, [[1]], reader=open_reader(tiny_model(), reading), reading=reading)
    with pytest.raises(TypeError, match="prompts: a single text stands in a list too"):
        generate(tiny_model(), tokenizer, "Call me")
    for none in ([], [1, 2], [[[1, 2]]]):
        with pytest.raises(ValueError, match="prompts: there must be one or more, each a text or a list of token ids"):
            generate(tiny_model(), tokenizer, none)


def test_criteria_of_one_s_own(tokenizer):
    def after_three(input_ids, scores):
        return torch.full((len(input_ids),), input_ids.shape[1] >= 3)

    results = generate(gpt2_model("landmark"), tokenizer, PROMPTS[:2], criteria=[after_three])
    assert [(len(result.tokens), result.finish) for result in results] == [(3, "stopping criterion")] * 2


@pytest.mark.parametrize("kind", ["landmark", "context miss"])
def test_a_trace_says_which_blocks_predicted_each_token(tokenizer, kind):
    model = gpt2_model(kind)
    prompt = [*range(100, 122)]
    sampling = SamplingSettings(max_new_tokens=7, temperature=0.0)
    for chunk in (22, 20, 7):
        reading = ReadingSettings(chunk=chunk, top_k_blocks=16)
        (result,) = generate(model, tokenizer, [prompt], sampling, reading=reading, trace=True)
        assert len(result.reads) == 7
        for step, reads in enumerate(result.reads):
            # The query stands at the end of prompt and text so far; in its own chunk blocks are not retrieved.
            at = 22 + step
            before = at - 1 if step else (21 // chunk) * chunk
            expected = {(layer, head, block) for layer in range(2) for head in range(2) for block in range(before // 4)}
            assert {(read["layer"], read["head"], read["block"]) for read in reads} == expected
            assert all(0 <= read["share"] <= 1 for read in reads)
    with pytest.raises(ValueError, match="trace: only a single prompt"):
        generate(model, tokenizer, PROMPTS, trace=True)
    with pytest.raises(UsageError, match="--trace: the model has no landmarks, so it reads no blocks"):
        generate(gpt2_model("baseline"), tokenizer, ["a"], trace=True)


def test_blocks_in_host_memory_give_the_same(tokenizer, monkeypatch):
    model, sampling = gpt2_model("landmark"), SamplingSettings(max_new_tokens=6, temperature=0.0)
    prompt = [*range(100, 180)]
    results = [
        generate(model, tokenizer, [prompt], sampling, reading=ReadingSettings(offload=offload))
        for offload in ("none", "cpu")
    ]
    assert results[0] == results[1]
    monkeypatch.setattr("landmark_cli.attention.cache.pages.available_host_memory", lambda: 1000)
    with pytest.raises(LandmarkError, match="of host memory"):
        generate(model, tokenizer, [prompt], sampling, reading=ReadingSettings(offload="cpu"))
