"""GPT-2's ids, in every way this package makes them, and tokenizers of transformers behind the same interface."""

import pickle
import random
import tarfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from landmark_cli.data import tokenizers
from landmark_cli.data.tokenizers import (
    ASSETS,
    GPT2_LANDMARK_ID,
    LANDMARK_TOKEN,
    GPT2Tokenizer,
    TransformersTokenizer,
    byte_places,
    load_tokenizer,
    tokenizer_fingerprint,
)
from landmark_cli.errors import LandmarkError

KNOWN = {
    "Hello world": [15496, 995],
    "": [],
    " the  the\n\n the": [262, 220, 262, 628, 262],
    "It's 1859, naïve": [1026, 338, 1248, 3270, 11, 41492],
}
ODD = [
    "\r\n\t \u00a0\u3000x\u2028y\u200b z  \n",
    "🙂👩‍👩‍👧 中文 e\u0301 ß ﬁ Ⅷ ²½ ٣",
    "<|endoftext|><landmark> is text here",
    "a" * 5000 + " " * 3000 + "=-" * 500,
    "\x00\x1c\x85 don't DON'T I'LL we’ve",
]


@pytest.fixture(scope="module")
def gpt2():
    return load_tokenizer("gpt2")


@pytest.fixture(scope="module")
def gpt2_directory(gpt2, tmp_path_factory):
    directory = tmp_path_factory.mktemp("gpt2")
    gpt2.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def novel():
    with tarfile.open(ASSETS / "austen.tar.xz") as archive:
        return archive.extractfile("persuasion.txt").read().decode()


def test_known_ids(gpt2):
    assert {text: gpt2.encode(text) for text in KNOWN} == KNOWN
    assert (gpt2.vocab_size, gpt2.eot_id, gpt2.landmark_id) == (50257, 50256, 50260)


def as_lists(arrays):
    assert all(array.dtype == np.uint32 for array in arrays)
    return [array.tolist() for array in arrays]


def test_many_documents_get_the_ids_of_one(gpt2, novel):
    documents = [*KNOWN, *ODD, novel[:100_000]]
    expected = [gpt2.encode(text) for text in documents]
    assert as_lists(gpt2.encode_documents(documents)) == expected
    assert as_lists(gpt2.encode_documents([text.encode() for text in documents])) == expected


def test_without_gigatoken_tiktoken_gives_the_same_and_it_is_said(novel, monkeypatch, capsys):
    def missing(*_):
        raise ImportError("gigatoken")

    monkeypatch.setattr(tokenizers, "BulkGPT2", missing)
    slow = GPT2Tokenizer()
    documents = [novel[:50_000], *ODD]
    assert as_lists(slow.encode_documents(documents)) == [slow.encode(text) for text in documents]
    slow.encode_documents(documents)
    assert capsys.readouterr().err.count("gigatoken") == 1


characters = st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" \n\t'sdl1.é中🙂\u00a0"))


@settings(max_examples=300)
@given(st.text(characters, max_size=80))
def test_bulk_encoding_equals_tiktoken_on_any_text(text):
    tokenizer = load_cached()
    assert tokenizer.encode_documents([text])[0].tolist() == tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def load_cached(made=[]):  # noqa: B006 (one tokenizer for all of a property's examples)
    if not made:
        made.append(load_tokenizer("gpt2"))
    return made[0]


def test_bulk_encoding_equals_tiktoken_on_a_sample_of_all_characters(gpt2):
    random_characters = random.Random(0).sample([c for c in range(0x110000) if not 0xD800 <= c < 0xE000], 20_000)
    newest = [c for first, last in tokenizers._NEWER_RANGES for c in (first, last)]
    texts = [f"a{chr(c)}b {chr(c)}{chr(c)} 1{chr(c)}.{chr(c)}\n{chr(c)} 'S" for c in [*random_characters, *newest]]
    for text, ids in zip(texts, gpt2.encode_documents(texts), strict=True):
        assert ids.tolist() == gpt2.encode(text), repr(text)


def test_bulk_encoder_forgets_when_the_process_grows(gpt2):
    bulk = tokenizers.BulkGPT2(gpt2._ranks, limit=-(1 << 40))
    before = bulk._tokenizer
    assert as_lists(bulk.encode([b"Hello world"])) == [[15496, 995]]
    assert bulk._tokenizer is not before
    assert as_lists(bulk.encode([b"Hello world"])) == [[15496, 995]]


def test_gpt2_directory_opens_with_transformers_and_reads_alike(gpt2, gpt2_directory, novel):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(gpt2_directory)
    assert len(theirs) == GPT2_LANDMARK_ID + 1
    assert theirs.convert_tokens_to_ids([LANDMARK_TOKEN, "<|endoftext|>"]) == [GPT2_LANDMARK_ID, 50256]
    assert theirs.eos_token_id == 50256
    assert LANDMARK_TOKEN in theirs.all_special_tokens
    for text in [*KNOWN, *ODD[:2], *ODD[3:], novel[20_000:60_000]]:
        ids = gpt2.encode(text)
        assert theirs.encode(text, add_special_tokens=False) == ids
        assert theirs.decode(ids) == gpt2.decode(ids) == text
    special = [50256, 15496, GPT2_LANDMARK_ID, 995, 50257]
    assert theirs.decode(special) == gpt2.decode(special) == "<|endoftext|>Hello<landmark> world<unused0>"


def test_gpt2_directory_without_landmark(gpt2, tmp_path):
    gpt2.save_pretrained(tmp_path, landmark=False)
    assert load_tokenizer(str(tmp_path)).vocab_size == 50257


def test_tokenizer_of_transformers_behind_the_interface(gpt2, gpt2_directory, novel, tmp_path):
    ours = load_tokenizer(str(gpt2_directory))
    assert isinstance(ours, TransformersTokenizer)
    assert (ours.vocab_size, ours.eot_id, ours.landmark_id) == (50261, 50256, 50260)
    documents = [*KNOWN, *ODD, novel[:20_000]]
    assert as_lists(ours.encode_documents(documents)) == [gpt2.encode(text) for text in documents]
    assert ours.encode("<landmark>") == gpt2.encode("<landmark>")
    assert ours.decode(gpt2.encode(ODD[0])) == ODD[0]
    assert ours.fingerprint == gpt2.fingerprint
    ours.save_pretrained(tmp_path / "again")
    assert load_tokenizer(str(tmp_path / "again")).landmark_id == 50260


def test_a_tokenizer_in_another_process_reads_and_writes_as_here(gpt2_directory, novel):
    ours = load_tokenizer(str(gpt2_directory))
    again = pickle.loads(pickle.dumps(ours))
    texts = [*KNOWN, *ODD, "a <landmark> b<|endoftext|>", novel[:20_000]]
    assert as_lists(again.encode_documents(texts)) == as_lists(ours.encode_documents(texts))
    assert again.fingerprint == ours.fingerprint and (again.eot_id, again.vocab_size) == (ours.eot_id, ours.vocab_size)
    ids = [50260, *ours.encode(novel[:500]), 50256, 50257, 198, 50260]
    theirs = ours.as_transformers().decode(ids, clean_up_tokenization_spaces=False)
    assert again.decode(ids) == again.decode(np.array(ids)) == ours.decode(ids) == theirs


def test_a_tokenizer_that_decodes_in_python_does_so_and_stays_here(gpt2_directory):
    ours = load_tokenizer(str(gpt2_directory))
    plain = type(ours._tokenizer)
    for name in ("decode", "_decode"):
        own = type("Own", (plain,), {name: lambda self, token_ids, **options: f"{len(token_ids)} ids"})
        other = object.__new__(TransformersTokenizer)
        other._open = lambda own=own: own.from_pretrained(gpt2_directory)
        other.__init__("own")
        assert other.decode([1, 2, 3]) == "3 ids"
        with pytest.raises(TypeError, match="own cannot be handed to another process"):
            pickle.dumps(other)


@pytest.mark.parametrize(
    "text", ["", "plain", "naïve “quotes” — 東京 🙂 x", "\x7f\x80\u07ff\u0800\uffff\U00010000\U0010ffff"]
)
def test_places_of_bytes(text):
    assert byte_places(text).tolist() == [len(text[:end].encode()) for end in range(len(text) + 1)]


def test_a_tokenizer_without_landmark_gets_one_at_the_end(gpt2, tmp_path):
    gpt2.save_pretrained(tmp_path / "plain", landmark=False)
    plain = load_tokenizer(str(tmp_path / "plain"))
    assert plain.landmark_id == 50257
    plain.save_pretrained(tmp_path / "with")
    with_landmark = load_tokenizer(str(tmp_path / "with"))
    assert (with_landmark.landmark_id, with_landmark.vocab_size) == (50257, 50258)
    assert with_landmark.decode([15496, 50257]) == "Hello<landmark>"


def test_fingerprints_tell_tokenizers_apart(gpt2):
    assert tokenizer_fingerprint(gpt2.encode) == gpt2.fingerprint
    assert tokenizer_fingerprint(lambda text: list(text.encode())) != gpt2.fingerprint


def test_a_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(LandmarkError, match="the tokenizer .*nothing-here cannot be read"):
        load_tokenizer(str(tmp_path / "nothing-here"))


def test_a_tokenizer_without_end_of_text_is_refused(tmp_path):
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=tokenizers.gpt2_fast_tokenizer()).save_pretrained(tmp_path)
    with pytest.raises(LandmarkError, match="no end-of-text token"):
        load_tokenizer(str(tmp_path))
