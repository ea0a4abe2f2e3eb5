"""Every place where text becomes ids, with tokenizer directories that store what is not the text's."""

import json
from functools import partial

import pytest
from accelerate.state import AcceleratorState

from landmark_cli.data.checks import check_token_files
from landmark_cli.data.pretrained_tokenizers import text_ids
from landmark_cli.data.token_file import TokenFile
from landmark_cli.data.tokenizers import load_tokenizer
from landmark_cli.evaluation.harness import LandmarkLM
from landmark_cli.evaluation.passkey import evaluate_passkey, prompt_maker
from landmark_cli.inference.generation import encode_prompt, generate
from landmark_cli.inference.settings import SamplingSettings
from landmark_cli.models import store
from landmark_cli.models.decoders import add_landmarks
from tests.awkward_tokenizers import BEGIN, CHAT, END, LARGEST_BYTE, byte_ids, byte_tokenizer
from tests.models.families import tiny_decoder

TEXT = "It was the best of times, it was the worst of times. " * 4
GREEDY = SamplingSettings(max_new_tokens=2, temperature=0.0)
STORED = {
    "truncation and padding": {"cut": 16},
    "an end of text": {"adds": "$A </s>"},
    "both ends": {"adds": "<s> $A </s>", "cut": 16},
    "a begin of text": {"adds": "<s> $A"},
}


@pytest.fixture(scope="module", params=STORED)
def model(request, tmp_path_factory):
    """A landmark model's directory with such a tokenizer, and what its prompts begin with."""
    directory = tmp_path_factory.mktemp("model")
    stored = STORED[request.param]
    decoder, tokenizer = tiny_decoder("llama", bos_token_id=BEGIN, eos_token_id=None), byte_tokenizer(**stored)
    add_landmarks(decoder, tokenizer, landmark_freq=7, trained_length=64, top_k_blocks=2)
    decoder.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    assert bool(json.loads((directory / "tokenizer.json").read_text())["truncation"]) == ("cut" in stored)
    return directory, [BEGIN] if "<s>" in stored.get("adds", "") else []


@pytest.fixture(scope="module")
def opened(model):
    return *store.load(model[0], device="cpu"), model[1]


def test_prepare_and_what_token_files_are_checked_by(landmark, workplace, model, opened):
    directory, _ = model
    (workplace / "stored.txt").write_text(TEXT)
    arguments = ["--source", "stored.txt", "--tokenizer", directory, "--output", f"stored/{directory.name}"]
    result = landmark("prepare", "text", *arguments, "--validation-share", "0")
    assert result.code == 0, result.err
    file = TokenFile.open(workplace / "stored" / directory.name / "train.bin")
    assert file.tokens.tolist() == [*byte_ids(TEXT), END]
    check_token_files([file], partial(text_ids, opened[1]), opened[0].config.vocab_size, "it")


def test_prepare_passkey(landmark, workplace, model):
    arguments = ["--tokenizer", model[0], "--max-documents", 2, "--shortest", 600, "--longest", 700]
    output = f"stored-keys/{model[0].name}"
    result = landmark("prepare", "passkey", *arguments, "--validation-share", "0", "--output", output)
    assert result.code == 0, result.err
    tokens = TokenFile.open(workplace / output / "train.bin").tokens.tolist()
    assert len(tokens) > 1200 and tokens.count(END) == 2 and BEGIN not in tokens


def test_finetune(landmark, workplace, tmp_path):
    for name, stored in STORED.items():
        base = tmp_path / name.replace(" ", "-")
        tiny_decoder("llama", bos_token_id=BEGIN, eos_token_id=END).save_pretrained(base)
        byte_tokenizer(**stored).save_pretrained(base)
        (workplace / "stored.txt").write_text(TEXT)
        AcceleratorState._reset_state(reset_partial_state=True)
        arguments = [
            "--sequence-length",
            32,
            "--landmark-freq",
            7,
            "--steps",
            1,
            "--batch-size",
            2,
            "--device",
            "cpu",
            "--accumulation",
            1,
            "--eval-ruler",
            "none",
        ]
        output = tmp_path / f"{base.name}-landmark"
        result = landmark(
            "finetune", "--model", base, "--data", "stored.txt", "--output", output, "--validation-share", 0, *arguments
        )
        assert result.code == 0, result.err
        assert TokenFile.open(output / "data/0-stored-txt/train.bin").tokens.tolist() == [*byte_ids(TEXT), END]
        model, tokenizer = store.load(output, device="cpu")
        assert tokenizer.convert_tokens_to_ids("<landmark>") == model.config.landmark_token_id == LARGEST_BYTE + 1
    AcceleratorState._reset_state(reset_partial_state=True)


def test_generate(landmark, opened, model):
    _, tokenizer, begin = opened
    assert encode_prompt(tokenizer, TEXT) == [*begin, *byte_ids(TEXT)]
    (alone,) = generate(*opened[:2], [TEXT], GREEDY)
    (by_ids,) = generate(*opened[:2], [[*begin, *byte_ids(TEXT)]], GREEDY)
    assert alone == by_ids
    result = landmark("generate", "--model", model[0], "--prompt", TEXT, "--max-new-tokens", 2, "--json", "-")
    assert json.loads(result.out)["prompt_tokens"] == len(begin) + len(TEXT), result.err


@pytest.mark.parametrize("template", [CHAT, CHAT.replace("{{ bos_token }}", "")], ids=["begins", "does not"])
def test_chat(opened, template):
    _, tokenizer, begin = opened
    expected = [*(begin or [BEGIN] * ("bos" in template)), *byte_ids("[user] Who?\n")]
    before, tokenizer.chat_template = tokenizer.chat_template, template
    try:
        assert encode_prompt(tokenizer, "Who?", chat=True) == expected
    finally:
        tokenizer.chat_template = before


def test_pass_keys(opened):
    model, tokenizer, begin = opened
    tokens = prompt_maker(tokenizer).make(700, 4711, 0.5).tokens.tolist()
    assert len(tokens) == 700 and tokens[: len(begin)] == begin
    assert tokens[len(begin) :].count(BEGIN) == tokens.count(END) == 0
    (trial,) = evaluate_passkey(model, tokenizer, [600], prompts=1).trials
    assert trial.length == 600


def test_harness(model):
    directory, begin = model
    lm = LandmarkLM(str(directory), device="cpu", batch_size=2)
    assert lm.tok_encode(TEXT) == [*begin, *byte_ids(TEXT)]
    assert lm.tok_encode(f"<s>{TEXT}") == [BEGIN, *byte_ids(TEXT)]
    assert lm.tok_encode(TEXT, add_special_tokens=False) == byte_ids(TEXT)
    assert lm._encode_pair("The sky ", "is") == ([*begin, *byte_ids("The sky")], byte_ids(" is"))
    # Nothing but spaces in front: they belong to the continuation, behind what begins a text.
    assert lm._encode_pair("  ", "is") == ([BEGIN], byte_ids("  is"))

    asked = []
    lm._score = lambda pairs: asked.extend(pairs) or [(0.0, True)] * len(pairs)
    lm.loglikelihood(harness_instances("loglikelihood", ("The sky", " is"), ("", "is")), disable_tqdm=True)
    assert sorted(asked) == sorted([([*begin, *byte_ids("The sky")], byte_ids(" is")), ([BEGIN], byte_ids("is"))])
    asked.clear()
    lm.loglikelihood_rolling(harness_instances("loglikelihood_rolling", (f"{TEXT}</s>",)), True)
    assert asked == [([BEGIN], byte_ids(f"{TEXT}</s>"))]


def test_harness_generates_after_the_whole_prompt(model, monkeypatch):
    directory, begin = model
    lm = LandmarkLM(str(directory), device="cpu")
    given = []
    monkeypatch.setattr(
        "landmark_cli.evaluation.harness.generate",
        lambda model, tokenizer, rows, *rest, **more: given.extend(rows) or generate(model, tokenizer, rows, GREEDY),
    )
    lm.generate_until(harness_instances("generate_until", (TEXT, {}), ("", {})), disable_tqdm=True)
    assert given == [[*begin, *byte_ids(TEXT)], [BEGIN]]


def harness_instances(kind, *arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, one, index) for index, one in enumerate(arguments)]


def test_a_tokenizer_by_name_reads_as_the_models(model):
    assert load_tokenizer(str(model[0])).encode(TEXT) == byte_ids(TEXT)
