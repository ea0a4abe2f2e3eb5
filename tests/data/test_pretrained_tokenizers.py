"""Whatever a tokenizer directory stores, texts are encoded whole; new tokens get ids that the saved files keep."""

import json
import random

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from landmark_cli.data.pretrained_tokenizers import (
    LANDMARK_TOKEN,
    add_tokens,
    begin_ids,
    check_read_back,
    largest_id,
    open_tokenizer,
    prompt_ids,
    special_ids,
    text_ids,
)
from landmark_cli.data.tokenizers import load_tokenizer
from landmark_cli.data.transformers_tokenizer import TransformersTokenizer
from landmark_cli.errors import LandmarkError
from tests.awkward_tokenizers import BEGIN, END, LARGEST_BYTE, byte_ids, byte_tokenizer

TEXT = "It was the best of times, it was the worst of times. " * 6
IM = {"<|im_start|>": LARGEST_BYTE + 10, "<|im_end|>": LARGEST_BYTE + 19}

STORED = {
    "plain": {},
    "truncation and padding": {"cut": 64},
    "an end of text": {"adds": "$A </s>"},
    "both ends and truncation": {"adds": "<s> $A </s>", "cut": 8},
    "special tokens split": {"adds": "<s> $A", "split_special_tokens": True},
}


@pytest.fixture(params=STORED)
def directory(request, tmp_path):
    byte_tokenizer(**STORED[request.param]).save_pretrained(tmp_path)
    return tmp_path


def test_what_is_stored_is_really_stored(tmp_path):
    # Or the tests below would show nothing.
    byte_tokenizer(cut=64, adds="$A </s>").save_pretrained(tmp_path)
    backend = AutoTokenizer.from_pretrained(tmp_path).backend_tokenizer
    assert len(backend.encode(TEXT).ids) % 128 == 0 and backend.truncation["max_length"] == 64


def test_documents_are_encoded_whole(directory):
    spelled = f"{TEXT}</s><s>"
    for text in (TEXT, spelled):
        assert text_ids(open_tokenizer(directory), text) == byte_ids(text)
        # Also by a tokenizer that somebody else has opened.
        assert text_ids(AutoTokenizer.from_pretrained(directory), text) == byte_ids(text)
    ours = load_tokenizer(str(directory))
    assert [ids.tolist() for ids in ours.encode_documents([TEXT, "", spelled])] == [*map(byte_ids, (TEXT, "", spelled))]
    assert ours.encode(TEXT) == byte_ids(TEXT)


@pytest.mark.parametrize("opened", [open_tokenizer, AutoTokenizer.from_pretrained])
def test_prompts_are_encoded_whole_and_go_on(directory, opened):
    tokenizer = opened(directory)
    begin = begin_ids(tokenizer)
    assert begin == ([BEGIN] if "<s>" in tokenizer.decode(tokenizer("a").input_ids) else [])
    assert prompt_ids(tokenizer, TEXT) == [*begin, *byte_ids(TEXT)]
    assert prompt_ids(tokenizer, "") == begin
    # What the text spells itself stands there once, and where it is not the tokenizer's own, as it is spelled.
    assert prompt_ids(tokenizer, f"<s>{TEXT}") == [BEGIN, *byte_ids(TEXT)]
    assert prompt_ids(tokenizer, "<s><s>a") == [*(begin or [BEGIN, BEGIN]), *byte_ids("a")]
    assert prompt_ids(tokenizer, "a</s>b") == [*begin, *byte_ids("a"), END, *byte_ids("b")]


def test_what_was_stored_is_not_saved_again(directory, tmp_path_factory):
    again = tmp_path_factory.mktemp("again")
    open_tokenizer(directory).save_pretrained(again)
    stored = json.loads((again / "tokenizer.json").read_text())
    assert (stored["truncation"], stored["padding"]) == (None, None)


def test_merges_are_not_left_out_at_random(tmp_path):
    byte_tokenizer(dropout=0.9).save_pretrained(tmp_path)
    # A space and one token for each word.
    assert len(text_ids(open_tokenizer(tmp_path), " the" * 100)) == 200
    assert len(load_tokenizer(str(tmp_path)).encode(" the" * 100)) == 200


GAPS = {
    "none": {},
    "in the vocabulary": {"ids": IM},
    "in front of the end of text": {"ids": IM, "eos_token": "<|im_end|>"},
    "no padding": {"ids": IM, "pad_token": None},
}


@pytest.mark.parametrize("stored", GAPS)
@pytest.mark.parametrize("behind", [-1, 500])
def test_new_tokens_get_ids_behind_all_others_and_keep_them(stored, behind, tmp_path):
    tokenizer = byte_tokenizer(**GAPS[stored])
    before, vocabulary = largest_id(tokenizer), tokenizer.get_vocab()
    assert before == max(LARGEST_BYTE, *GAPS[stored].get("ids", {"": 0}).values())
    expected = [max(before, behind) + place for place in (1, 2)]
    assert add_tokens(tokenizer, ["[PAD]", LANDMARK_TOKEN], behind) == expected
    assert add_tokens(tokenizer, ["[PAD]", LANDMARK_TOKEN], behind) == []
    # In this process, and twice through files.
    for number in range(3):
        assert tokenizer.convert_tokens_to_ids(["[PAD]", LANDMARK_TOKEN]) == expected
        assert {token: tokenizer.get_vocab()[token] for token in vocabulary} == vocabulary
        assert largest_id(tokenizer) == expected[1]
        assert prompt_ids(tokenizer, f"a {LANDMARK_TOKEN}b") == [*byte_ids("a "), expected[1], *byte_ids("b")]
        assert text_ids(tokenizer, f"{TEXT}{LANDMARK_TOKEN}[PAD]") == byte_ids(f"{TEXT}{LANDMARK_TOKEN}[PAD]")
        assert tokenizer.decode([expected[1], *byte_ids("b")]) == f"{LANDMARK_TOKEN}b"
        assert tokenizer.decode([*expected, *byte_ids("b")], skip_special_tokens=True) == "b"
        tokenizer.save_pretrained(tmp_path / str(number))
        tokenizer = open_tokenizer(tmp_path / str(number))


@pytest.mark.parametrize("kind", ["Qwen2Tokenizer", "GPT2Tokenizer", "GPTNeoXTokenizer", "CohereTokenizer"])
@pytest.mark.parametrize("stored", ["none", "in the vocabulary"])
def test_classes_of_transformers_that_build_themselves_anew(kind, stored, tmp_path):
    # They add special tokens of their own while they are opened, into a gap where there is one.
    byte_tokenizer(**GAPS[stored]).save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": kind}))
    tokenizer = open_tokenizer(tmp_path)
    add_tokens(tokenizer, [LANDMARK_TOKEN])
    check_read_back(
        tokenizer.save_pretrained, kind, lambda text: text_ids(tokenizer, text), special_ids(tokenizer, LANDMARK_TOKEN)
    )
    ours = load_tokenizer(str(tmp_path))
    assert ours.landmark_id == tokenizer.get_vocab()[LANDMARK_TOKEN]
    ours.check_saved()


@pytest.mark.parametrize("model", ["WordLevel", "WordPiece", "Unigram"])
def test_new_tokens_of_other_kinds_of_tokenizers(model, tmp_path):
    words = {"<unk>": 0, "</s>": 1, "a": 2, "b": 3} | ({} if model == "Unigram" else {"c": 40})
    if model == "Unigram":
        tokenizer = Tokenizer(models.Unigram([(word, -1.0) for word in words], unk_id=0))
    else:
        tokenizer = Tokenizer(getattr(models, model)(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")
    before = max(words.values())
    assert add_tokens(tokenizer, [LANDMARK_TOKEN]) == [before + 1]
    tokenizer.save_pretrained(tmp_path)
    again = open_tokenizer(tmp_path)
    assert prompt_ids(again, f"a {LANDMARK_TOKEN} b") == [2, before + 1, 3]
    assert text_ids(again, "a b") == [2, 3]


def test_ids_that_a_tokenizer_cannot_have_are_refused():
    tokenizer = Tokenizer(models.Unigram([("<unk>", -1.0), ("a", -1.0)], unk_id=0))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, name_or_path="some/model")
    with pytest.raises(LandmarkError, match="tokenizer of some/model has gaps .*<landmark> is 2, not 11"):
        add_tokens(tokenizer, [LANDMARK_TOKEN], behind=10)


@pytest.mark.parametrize("stored", GAPS)
def test_ids_of_token_files_are_below_the_vocabulary(stored, tmp_path):
    byte_tokenizer(**GAPS[stored]).save_pretrained(tmp_path / "a")
    ours = load_tokenizer(str(tmp_path / "a"))
    assert isinstance(ours, TransformersTokenizer)
    assert ours.vocab_size == ours.landmark_id == largest_id(ours.as_transformers(landmark=False)) + 1
    assert ours.eot_id < ours.vocab_size
    ours.check_saved()
    ours.save_pretrained(tmp_path / "b")
    again = load_tokenizer(str(tmp_path / "b"))
    assert (again.landmark_id, again.vocab_size, again.eot_id) == (ours.landmark_id, ours.vocab_size + 1, ours.eot_id)
    assert again.fingerprint == ours.fingerprint


class TestReadBack:
    def check(self, tokenizer, **changes):
        save = changes.pop("save", tokenizer.save_pretrained)
        special = special_ids(tokenizer, LANDMARK_TOKEN) | changes
        check_read_back(save, "my/model", lambda text: text_ids(tokenizer, text), special)

    def tokenizer(self, **stored):
        tokenizer = byte_tokenizer(**stored)
        add_tokens(tokenizer, [LANDMARK_TOKEN])
        return tokenizer

    @pytest.mark.parametrize("stored", GAPS)
    def test_the_same(self, stored):
        self.check(self.tokenizer(**GAPS[stored]))

    def test_a_landmark_that_moves(self):
        # As the tokenizers library adds it, behind a gap.
        tokenizer = byte_tokenizer(ids=IM)
        tokenizer.add_tokens([LANDMARK_TOKEN], special_tokens=True)
        moved = f"<landmark> is {LARGEST_BYTE + 3}, not {LARGEST_BYTE + 20}"
        with pytest.raises(LandmarkError, match=f"tokenizer of my/model does not come back the same .*{moved}"):
            self.check(tokenizer)

    @pytest.mark.parametrize("role", ["eos_token", "bos_token", LANDMARK_TOKEN])
    def test_another_special_token(self, role):
        tokenizer = self.tokenizer()
        with pytest.raises(LandmarkError, match=rf"{role} is \d+, not 77"):
            self.check(tokenizer, **{role: 77})

    def test_other_ids_of_a_text(self):
        tokenizer = self.tokenizer()

        def save(directory):
            tokenizer.save_pretrained(directory)
            path = f"{directory}/tokenizer.json"
            content = json.load(open(path))
            content["pre_tokenizer"]["add_prefix_space"] = True
            json.dump(content, open(path, "w"))

        with pytest.raises(LandmarkError, match="the text 'It was the best of times' has other ids"):
            self.check(tokenizer, save=save)

    def test_a_text_that_becomes_a_landmark(self):
        vocabulary = {"<unk>": 0, "a": 1, LANDMARK_TOKEN: 2}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
        with pytest.raises(LandmarkError, match="the text '<landmark>' is read as the token of that name"):
            self.check(tokenizer)

    def test_what_cannot_be_saved(self):
        def save(directory):
            raise OSError(28, "No space left on device")

        with pytest.raises(LandmarkError, match="cannot be saved and opened again.*No space left on device"):
            self.check(self.tokenizer(), save=save)


def test_random_vocabularies_with_gaps(tmp_path):
    """Ids of special tokens anywhere behind the bytes: nothing old moves, the landmark is the last and stays it."""
    generator = random.Random(0)
    for number in range(20):
        ids = sorted(generator.sample(range(LARGEST_BYTE + 1, LARGEST_BYTE + 60), generator.randint(1, 6)))
        tokenizer = byte_tokenizer(ids={f"<|{id}|>": id for id in ids})
        assert add_tokens(tokenizer, [LANDMARK_TOKEN]) == [ids[-1] + 1]
        check_read_back(
            tokenizer.save_pretrained,
            str(number),
            lambda text, tokenizer=tokenizer: text_ids(tokenizer, text),
            special_ids(tokenizer, LANDMARK_TOKEN, *(f"<|{id}|>" for id in ids)),
        )
        assert np.all(np.array(ids) == tokenizer.convert_tokens_to_ids([f"<|{id}|>" for id in ids]))


SLOW = {"type": "Split", "pattern": {"Regex": "(a|a|aa)*$|(a+)+b"}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize("encode", ["document", "documents", "prompt"])
def test_an_expression_that_never_ends_is_the_tokenizers_fault(tmp_path, encode):
    byte_tokenizer().save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    stored = json.loads(file.read_text())
    file.write_text(json.dumps(stored | {"pre_tokenizer": SLOW}))
    text = "a" * 5000 + "!"
    with pytest.raises(LandmarkError, match=f"the tokenizer {tmp_path} cannot be read: .*retry-limit"):
        if encode == "documents":
            load_tokenizer(str(tmp_path)).encode_documents([text])
        else:
            {"document": text_ids, "prompt": prompt_ids}[encode](open_tokenizer(tmp_path), text)
