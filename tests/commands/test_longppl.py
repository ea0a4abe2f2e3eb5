"""`landmark eval longppl` as a user runs it."""

import json

import pytest

from landmark_cli.data.token_file import TokenFile
from landmark_cli.evaluation import longppl
from landmark_cli.evaluation.longppl import find_key_tokens, long_text, measure_long_perplexity
from landmark_cli.evaluation.studies import FinishedRows
from landmark_cli.evaluation.ways import Way
from landmark_cli.inference.settings import ReadingSettings
from landmark_cli.interrupts import Interrupts
from landmark_cli.models.store import load

SHORT = ["--short-context", "16", "--stride", "8", "--chunk", "16"]


@pytest.fixture(autouse=True)
def bounds(monkeypatch):
    """Random models seldom gain two nats."""
    monkeypatch.setattr(longppl, "GAIN", 0.01)
    monkeypatch.setattr(longppl, "MOST_LOSS", 30.0)


def test_numbers_of_blocks_side_by_side(landmark, workplace, tmp_path):
    arguments = ["eval", "longppl", *SHORT, "--eval-length", "60", "--top-k-blocks", "1,2", "--output", tmp_path / "a"]
    result = landmark(*arguments, "--json", "out/longppl.json")
    assert result.code == 0, result.err
    data = json.loads((workplace / "out" / "longppl.json").read_text())
    assert (data["model"], data["evaluator"], data["eval_length"]) == ("runs/landmark", "runs/landmark", 60)
    file, (model, _) = TokenFile.open("data/mine/validation.bin"), load("runs/landmark", device="cpu")
    text = long_text(file.tokens, file.metadata.eot_id, eval_length=60)
    finished, asked = FinishedRows(tmp_path / "b.jsonl"), Interrupts("")
    settings = {"reading": ReadingSettings(chunk=16), "depends_on": {}}
    # The model itself finds the key tokens once, with the most blocks.
    key_tokens = find_key_tokens(model, Way(2), text, finished, asked, context=16, stride=8, **settings)
    assert sum(map(len, key_tokens)) > 10
    for one, k in zip(data["results"], (1, 2), strict=True):
        expected = measure_long_perplexity(model, Way(k), text, key_tokens, finished, asked, **settings)
        assert (one["reading"], one["top_k_blocks"], one["full_attention"]) == (f"top-k {k}", k, False)
        assert (one["key_tokens"]["loss"], one["all_tokens"]["loss"]) == (expected.key.loss, expected.overall.loss)
        assert one["key_tokens"]["tokens"] == sum(map(len, key_tokens))
    out = " ".join(result.out.split())
    assert (
        "top-k 1" in out and f"{sum(map(len, key_tokens))} of {data['results'][0]['all_tokens']['tokens']} key" in out
    )
    again = landmark(*arguments, "--json", "-")
    windows = data["windows"]
    assert again.err.count(f"{windows} of {windows} windows are kept from an earlier run") == 3
    assert again.out == (workplace / "out" / "longppl.json").read_text()


def test_another_evaluator(landmark, tmp_path):
    arguments = ["eval", "longppl", *SHORT, "--eval-length", "36", "--output", tmp_path, "--json", "-"]
    result = landmark(*arguments, "--evaluator", "runs/baseline", "--top-k-blocks", "1")
    assert result.code == 0, result.err
    by_other = json.loads(result.out)
    assert by_other["evaluator"] == "runs/baseline" and "key tokens, full attention" in result.err
    own = json.loads(landmark(*arguments, "--top-k-blocks", "1").out)
    key, every = ([data["results"][0][name] for data in (by_other, own)] for name in ("key_tokens", "all_tokens"))
    assert every[0] == every[1] and key[0] != key[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "runs/baseline"], "has no landmarks and knows 40 positions; give 40"),
        (["--model", "runs/baseline", "--top-k-blocks", "2"], "has no landmarks, so it retrieves no blocks"),
    ],
)
def test_a_model_is_refused_before_the_evaluator_reads(landmark, tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr(longppl, "find_key_tokens", lambda *_, **__: pytest.fail("the evaluator has read"))
    long = ["--eval-length", "60", "--output", tmp_path, "--evaluator", "runs/landmark"]
    result = landmark("eval", "longppl", *SHORT, *long, *arguments)
    assert result.code in (1, 2) and message in " ".join(result.err.split()), result.err


def test_the_last_number_of_blocks_is_refused_before_the_first_is_measured(landmark, tmp_path, monkeypatch):
    monkeypatch.setattr(longppl, "find_key_tokens", lambda *_, **__: pytest.fail("key tokens were looked for"))
    several = ["--top-k-blocks", "1", "--top-k-blocks", "50", "--short-context", "16", "--eval-length", "60"]
    result = landmark("eval", "longppl", *several, "--output", tmp_path)
    assert result.code == 1 and "retrieving 50 blocks leaves no room" in result.err, result.err


def test_no_key_token(landmark, tmp_path, monkeypatch):
    monkeypatch.setattr(longppl, "GAIN", 1000.0)
    result = landmark("eval", "longppl", *SHORT, "--eval-length", "60", "--output", tmp_path, "--json", "-")
    assert result.code == 0 and "no key token was found" in result.err
    (one,) = json.loads(result.out)["results"]
    assert one["key_tokens"]["perplexity"] is None and one["all_tokens"]["perplexity"] > 1


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--eval-length", "16"], 2, "key tokens are looked for behind the first 16 of a window (--short-context)"),
        (["--eval-length", "9999"], 1, "too few for one window"),
        (["--model", "runs/baseline", "--eval-length", "60"], 2, "has no landmarks and knows 40 positions; give 40"),
        (["--model", "runs/baseline", "--top-k-blocks", "2"], 2, "has no landmarks, so it retrieves no blocks"),
        (["--evaluator", "/none", "--eval-length", "60"], 1, "cannot open the model /none"),
        (["--short-context", "0"], 2, "must be at least 1"),
    ],
)
def test_mistakes(landmark, tmp_path, arguments, code, message):
    result = landmark("eval", "longppl", *SHORT, *arguments, "--output", tmp_path)
    assert (result.code, message in " ".join(result.err.split())) == (code, True), result.err
    assert "Traceback" not in result.err and not result.out
