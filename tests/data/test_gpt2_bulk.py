"""gigatoken gives GPT-2's ids as tiktoken defines them."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from landmark_cli.data import gpt2_bulk
from tests.data.gpt2_texts import as_lists

characters = st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" \n\t'sdl1.é中🙂\u00a0"))


@settings(max_examples=300)
@given(text=st.text(characters, max_size=80))
def test_bulk_encoding_equals_tiktoken_on_any_text(gpt2, text):
    assert gpt2.encode_documents([text])[0].tolist() == gpt2.encode(text)
    assert gpt2.decode(gpt2.encode(text)) == text


def test_bulk_encoding_equals_tiktoken_on_a_sample_of_all_characters(gpt2):
    random_characters = random.Random(0).sample([c for c in range(0x110000) if not 0xD800 <= c < 0xE000], 20_000)
    newest = [c for first, last in gpt2_bulk._NEWER_RANGES for c in (first, last)]
    texts = [f"a{chr(c)}b {chr(c)}{chr(c)} 1{chr(c)}.{chr(c)}\n{chr(c)} 'S" for c in [*random_characters, *newest]]
    for text, ids in zip(texts, gpt2.encode_documents(texts), strict=True):
        assert ids.tolist() == gpt2.encode(text), repr(text)


def test_bulk_encoder_forgets_when_the_process_grows(gpt2):
    bulk = gpt2_bulk.BulkGPT2(gpt2._ranks, limit=-(1 << 40))
    before = bulk._tokenizer
    assert as_lists(bulk.encode([b"Hello world"])) == [[15496, 995]]
    assert bulk._tokenizer is not before
    assert as_lists(bulk.encode([b"Hello world"])) == [[15496, 995]]
