"""GPT-2's ids, in every way this package makes them."""

from transformers import AutoTokenizer

from landmark_cli.data import gpt2_tokenizer
from landmark_cli.data.gpt2_tokenizer import GPT2_LANDMARK_ID, GPT2Tokenizer
from landmark_cli.data.pretrained_tokenizers import LANDMARK_TOKEN
from landmark_cli.data.tokenizers import load_tokenizer
from tests.data.gpt2_texts import KNOWN, ODD, as_lists


def test_known_ids(gpt2):
    assert {text: gpt2.encode(text) for text in KNOWN} == KNOWN
    assert (gpt2.vocab_size, gpt2.eot_id, gpt2.landmark_id) == (50257, 50256, 50260)


def test_many_documents_get_the_ids_of_one(gpt2, novel):
    documents = [*KNOWN, *ODD, novel[:100_000]]
    expected = [gpt2.encode(text) for text in documents]
    assert as_lists(gpt2.encode_documents(documents)) == expected
    assert as_lists(gpt2.encode_documents([text.encode() for text in documents])) == expected


def test_without_gigatoken_tiktoken_gives_the_same_and_it_is_said(novel, monkeypatch, capsys):
    def missing(*_):
        raise ImportError("gigatoken")

    monkeypatch.setattr(gpt2_tokenizer, "BulkGPT2", missing)
    slow = GPT2Tokenizer()
    documents = [novel[:50_000], *ODD]
    assert as_lists(slow.encode_documents(documents)) == [slow.encode(text) for text in documents]
    slow.encode_documents(documents)
    assert capsys.readouterr().err.count("gigatoken") == 1


def test_gpt2_directory_opens_with_transformers_and_reads_alike(gpt2, gpt2_directory, novel):
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
