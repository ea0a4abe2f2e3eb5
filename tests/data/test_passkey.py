"""Pass-key prompts: exact lengths, the paper's words, documents that are a function of the seed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from landmark_cli.data.passkey import FILLER, QUESTION, TASK, PassKeyPrompts, passkey_corpus
from landmark_cli.data.prepare import prepare
from landmark_cli.data.token_file import TokenFile
from landmark_cli.data.tokenizers import load_tokenizer
from landmark_cli.errors import LandmarkError, UsageError
from tests.data.texts import documents_in

GPT2 = load_tokenizer("gpt2")
PROMPTS = PassKeyPrompts(GPT2.encode)


@given(st.integers(150, 3000), st.integers(1, 50000), st.floats(0, 1))
@settings(max_examples=50, deadline=None)
def test_prompts_have_their_length_and_hide_their_key(length, key, depth):
    prompt = PROMPTS.make(length, key, depth)
    assert prompt.tokens.shape == (length,) and prompt.tokens.dtype == np.int64
    text = GPT2.decode(prompt.tokens)
    line = f"\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
    assert text.startswith(f"{TASK}\n") and text.endswith(f"\n{QUESTION}") and text.count(line) == 1
    before, after = text.removeprefix(f"{TASK}\n").removesuffix(f"\n{QUESTION}").split(line)
    endless = " ".join([FILLER] * 200)
    assert endless.startswith(before) and endless.startswith(after)
    filler = len(before) + len(after)
    assert abs(len(before) - depth * filler) <= 12


def test_ends_of_the_filler():
    for depth, place in ((0.0, len(TASK) + 1), (1.0, -len(QUESTION) - 1)):
        text = GPT2.decode(PROMPTS.make(400, 7, depth).tokens)
        line = "\nThe pass key is 7. Remember it. 7 is the pass key.\n"
        assert text[place:].startswith(line) if depth == 0 else text[:place].endswith(line)


def test_in_a_haystack_a_key_stands_between_sentences():
    lengths = np.array([50, 7, 60, 40, 300])
    text, starts = np.repeat(np.arange(5), lengths), np.cumsum(lengths) - lengths
    head, line, tail = map(
        GPT2.encode, (f"{TASK}\n", "\nThe pass key is 7. Remember it. 7 is the pass key.\n", f"\n{QUESTION}")
    )
    prompts = PassKeyPrompts(GPT2.encode, haystack=lambda begin, tokens: (text[:tokens], starts[starts < tokens]))
    for depth, place in ((0.0, 0), (0.25, 50), (0.28, 57), (0.6, 117), (0.9, 200), (1.0, 200)):
        whole = prompts.make(len(head) + 200 + len(line) + len(tail), 7, depth).tokens.tolist()
        assert whole == [*head, *text[:place], *line, *text[place:200], *tail]


@pytest.mark.parametrize("depth, place", [(0.0, 0), (0.02, 0), (0.3, 600), (0.5, 1000), (0.52, 1000), (0.9, 1800)])
def test_in_text_without_sentences_a_key_stands_where_it_was_asked_for(depth, place):
    """And in front of one that begins within a twentieth of the text."""
    # Numbers that are tokens of nothing else here.
    text, starts = 10_000 + np.arange(2000), np.array([0, 1000])
    prompts = PassKeyPrompts(lambda piece: [ord(letter) for letter in piece], haystack=lambda *_: (text, starts))
    line = len("\nThe pass key is 7. Remember it. 7 is the pass key.\n")
    whole = prompts.make(len(f"{TASK}\n\n{QUESTION}") + line + 2000, 7, depth).tokens
    at = np.flatnonzero(whole >= 10_000) - len(f"{TASK}\n")
    assert at.tolist() == [*range(place), *range(place + line, 2000 + line)]


def test_the_haystack_is_taken_from_where_it_is_asked_for():
    prompts = PassKeyPrompts(
        GPT2.encode, haystack=lambda begin, tokens: (np.arange(begin, begin + tokens), np.array([0]))
    )
    at = len(GPT2.encode(f"{TASK}\n")) + len(GPT2.encode("\nThe pass key is 7. Remember it. 7 is the pass key.\n"))
    for asked, begin in (({}, 0), ({"begin": 9000}, 9000)):
        prompt = prompts.make(300, 7, 0.0, **asked)
        assert prompt.tokens[at] == begin and len(prompt.tokens) == 300 and prompt.begin == asked.get("begin")


def test_a_million_tokens():
    assert len(PROMPTS.make(1_000_000, 12345, 0.3).tokens) == 1_000_000


def test_too_short():
    PROMPTS.make(PROMPTS.shortest, 50000, 0.5)
    with pytest.raises(LandmarkError, match="of 40 tokens cannot be: without any filler it takes"):
        PROMPTS.make(40, 1, 0.5)


def test_tokens_in_front():
    prompt = PassKeyPrompts(GPT2.encode, begin=[GPT2.eot_id]).make(300, 5, 0.5)
    assert prompt.tokens[0] == GPT2.eot_id and len(prompt.tokens) == 300


def test_documents_are_prepared_like_any_corpus(tmp_path):
    settings = {"documents": 40, "shortest": 200, "longest": 900, "validation_share": 0.1}
    corpus = passkey_corpus(GPT2, **settings, seed=3)
    written = prepare(corpus, GPT2, tmp_path / "a")
    assert (written["train"].documents, written["validation"].documents) == (36, 4)
    file = TokenFile.open(tmp_path / "a" / "train.bin")
    documents = documents_in(file)
    lengths = [len(document) + 1 for document in documents]
    assert 190 <= min(lengths) < 300 and 600 < max(lengths) <= 910
    keys = set()
    for document in documents:
        text = GPT2.decode(document)
        key = text.rsplit(" ", 1)[1].removesuffix(".")
        assert text.count(f" {key}.") == 2 and f" {key} is the pass key." in text and text.startswith(TASK)
        keys.add(key)
    assert len(keys) > 30
    again = prepare(passkey_corpus(GPT2, **settings, seed=3), GPT2, tmp_path / "b")
    other = prepare(passkey_corpus(GPT2, **settings, seed=4), GPT2, tmp_path / "c")
    assert again["train"].sha256 == written["train"].sha256 != other["train"].sha256


@pytest.mark.parametrize(("shortest", "longest"), [(50, 400), (400, 300)])
def test_documents_that_cannot_be(shortest, longest):
    with pytest.raises(UsageError, match="cannot be: the shortest takes"):
        passkey_corpus(GPT2, shortest=shortest, longest=longest)
