"""Tokenizers of transformers behind the interface that GPT-2's has too."""

import pickle

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from landmark_cli.data.gpt2_tokenizer import gpt2_fast_tokenizer
from landmark_cli.data.tokenizers import load_tokenizer
from landmark_cli.data.transformers_tokenizer import TransformersTokenizer, byte_places
from landmark_cli.errors import LandmarkError
from tests.data.gpt2_texts import KNOWN, ODD, as_lists


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


def test_a_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(LandmarkError, match="the tokenizer .*nothing-here cannot be read"):
        load_tokenizer(str(tmp_path / "nothing-here"))


def test_a_tokenizer_without_end_of_text_is_refused(tmp_path):
    PreTrainedTokenizerFast(tokenizer_object=gpt2_fast_tokenizer()).save_pretrained(tmp_path)
    with pytest.raises(LandmarkError, match="no end-of-text token"):
        load_tokenizer(str(tmp_path))
