"""`landmark eval perplexity` and `landmark eval passkey` as a user runs them."""

import json
import math
import re

import pytest

from landmark_cli.data import pretrained_tokenizers
from landmark_cli.data.token_file import TokenFile
from landmark_cli.data.token_file_writer import TokenFileWriter
from landmark_cli.data.tokenizers import load_tokenizer
from landmark_cli.evaluation.perplexity import evaluate_perplexity
from landmark_cli.inference.settings import ReadingSettings
from landmark_cli.models.store import load

SETTINGS = ["--eval-length", "60", "--chunk", "16", "--top-k-blocks", "2"]


def test_the_newest_model_on_the_newest_corpus(landmark, workplace):
    result = landmark("eval", "perplexity", *SETTINGS, "--json", "out/perplexity.json")
    assert result.code == 0, result.err
    assert "using runs/landmark, the newest" in result.err and "data/mine/validation.bin of the newest" in result.err
    data = json.loads((workplace / "out" / "perplexity.json").read_text())
    model, _ = load("runs/landmark", device="cpu")
    file = TokenFile.open("data/mine/validation.bin")
    expected = evaluate_perplexity(
        model,
        file.tokens,
        eot_id=file.metadata.eot_id,
        eval_length=60,
        reading=ReadingSettings(chunk=16, top_k_blocks=2),
    )
    assert data["perplexity"] == expected.overall.perplexity and data["tokens"] == expected.overall.tokens
    assert [part["loss"] for part in data["chunks"]] == [part.loss for part in expected.chunks]
    assert data["reading"] == {
        "top_k_blocks": 2,
        "cache_blocks": None,
        "selection": "per_token_and_head",
        "positions": "bounded",
        "rerank_blocks": None,
        "block_temperature": 1.0,
    }
    assert f"{expected.overall.perplexity:.4f}" in result.out
    assert "top-k-blocks 2 of all blocks" in " ".join(result.out.split())
    assert math.isclose(data["loss"], math.log(data["perplexity"]))


def test_json_on_standard_output_and_no_memory(landmark):
    arguments = ["eval", "perplexity", "--model", "runs/landmark", "--data", "data/mine/train.bin", "--no-memory"]
    arguments += ["--sample-tokens", "100", "--eval-length", "40", "--json", "-"]
    first, second = landmark(*arguments), landmark(*arguments)
    assert first.code == 0, first.err
    data = json.loads(first.out)
    assert first.out == second.out
    assert data["memory"] is False and data["reading"] is None and data["windows"] == 2
    assert json.loads(landmark(*arguments, "--seed", "2").out)["loss"] != data["loss"]


STUDY = "study: {kind}\ntitle: one row\nroles: {{it: a model}}\nrows: [{{role: it, eval-length: 60{more}}}]\n"


@pytest.mark.parametrize("command", ["perplexity", "longppl", "study", "study of longppl"])
def test_texts_are_read_as_the_tokenizer_begins_them(landmark, tmp_path, monkeypatch, command):
    """What was kept of them when they were read otherwise is not taken for it."""
    of_longppl = {"kind": "longppl\nevaluator: it", "more": ", short-context: 16"}
    text = STUDY.format(**of_longppl if command == "study of longppl" else {"kind": "perplexity", "more": ""})
    (tmp_path / "study.yaml").write_text(text)
    arguments = {
        "perplexity": ["--eval-length", "60"],
        "longppl": ["--eval-length", "60", "--short-context", "16", "--output", tmp_path / "kept"],
        "study": [tmp_path / "study.yaml", "--role", "it=runs/landmark", "--data", "data/mine"],
    }[command.split()[0]]
    output = ["--output", tmp_path / "kept"] if command.startswith("study") else []

    def losses():
        result = landmark("eval", command.split()[0], *arguments, *output, "--json", "-")
        assert result.code == 0, result.err
        return re.findall(r'"(?:loss|negative_log_likelihood)": ([0-9.]+)', result.out)

    plain = losses()
    assert losses() == plain
    monkeypatch.setattr(pretrained_tokenizers, "begin_ids", lambda tokenizer: [50])
    begun = losses()
    assert len(begun) == len(plain) > 0 and begun != plain


def test_a_baseline_is_read_in_plain_windows(landmark):
    result = landmark("eval", "perplexity", "--model", "runs/baseline", "--eval-length", "36", "--json", "-")
    data = json.loads(result.out)
    assert (data["memory"], data["eval_length"], data["chunk"], len(data["chunks"])) == (False, 36, 36, 1)
    warned = landmark("eval", "perplexity", "--model", "runs/baseline", "--eval-length", "90", "--chunk", "80")
    assert warned.code == 0 and "chunks of 80 text tokens are longer than the 40" in warned.err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--eval-length", "5000"], 1, "too few for one window of 5000"),
        (["--data", "data/other"], 1, "there is no token file data/other.bin"),
        (["--model", "./runs/none"], 1, "cannot open the model ./runs/none"),
        (["--eval-length", "0"], 2, "must be at least 1"),
        (["--top-k-blocks", "20"], 1, "leaves no room for a chunk"),
        (["--top-k", "2"], 2, "No such option: --top-k (Possible options: --top-k-blocks)"),
        (["--device", "nowhere"], 2, "--device nowhere: there is no such device here; there is cpu"),
    ],
)
def test_mistakes(landmark, arguments, code, message):
    result = landmark("eval", "perplexity", *arguments)
    assert (result.code, message in result.err) == (code, True), result.err
    assert "Traceback" not in result.err and not result.out


def test_tokens_of_another_tokenizer(landmark, workplace):
    tokenizer = load_tokenizer("gpt2")

    class Reversed:
        name, vocab_size, eot_id, fingerprint = "reversed", tokenizer.vocab_size, tokenizer.eot_id, "another"

    with TokenFileWriter(workplace / "other" / "validation.bin", Reversed(), source="a test") as writer:
        writer.add_document(tokenizer.encode_documents(["Call me Ishmael. " * 40])[0])
    result = landmark("eval", "perplexity", "--data", "other")
    assert result.code == 1
    assert "prepared with the tokenizer reversed, which is not that of runs/landmark" in result.err


def test_passkey(landmark, workplace):
    arguments = ["eval", "passkey", "--lengths", "140,150", "--prompts", "2", "--depths", "2", "--chunk", "64"]
    result = landmark(*arguments, "--json", "keys.json", "--plot", "keys.png")
    assert result.code == 0, result.err
    data = json.loads((workplace / "keys.json").read_text())
    assert [(length["tokens"], length["prompts"], length["found"]) for length in data["lengths"]] == [
        (140, 4, 0),
        (150, 4, 0),
    ]
    assert [depth["from"] for depth in data["lengths"][0]["depths"]] == [0.0, 1.0]
    assert len(data["trials"]) == 8 and data["reading"]["top_k_blocks"] == 2 and data["model"] == "runs/landmark"
    assert (workplace / "keys.png").stat().st_size > 1000
    assert "0.000-0.490" in result.out and "keys found, by depth and length" in result.out
    assert landmark(*arguments, "--json", "-").out == (workplace / "keys.json").read_text()


def test_passkey_in_a_text_of_ones_own(landmark, workplace):
    (workplace / "hay.txt").write_text("It was a fine day. Nobody came.\n" * 4)
    arguments = ["eval", "passkey", "--lengths", "150", "--prompts", "1", "--chunk", "64", "--json", "-", "--haystack"]
    result = landmark(*arguments, "hay.txt")
    assert result.code == 0 and "hay.txt has 40 tokens, fewer than the longest prompt: it is repeated" in result.err
    found = json.loads(result.out)
    novels = landmark(*arguments, "sample")
    assert novels.code == 0 and "pass keys in the shipped novels" in novels.err
    assert (found["haystack"], json.loads(novels.out)["haystack"]) == ("hay.txt", "sample")
    # Where the stretch begins: at one of the eight sentences, of six and four tokens.
    (begin,) = (trial["begin"] for trial in found["trials"])
    assert begin % 10 in (0, 6) and begin < 40
    filler = json.loads(landmark(*arguments[:-1]).out)
    assert filler["haystack"] is None and [trial["begin"] for trial in filler["trials"]] == [None]
    missing = landmark(*arguments, "none.txt")
    assert missing.code == 1
    assert "--haystack: there is no file or folder none.txt; the shipped novels are called sample" in missing.err


def test_passkey_of_a_baseline_by_full_attention(landmark):
    arguments = ["eval", "passkey", "--model", "runs/baseline", "--lengths", "140", "--prompts", "1", "--json", "-"]
    data = json.loads(landmark(*arguments, "--full-attention").out)
    assert (data["full_attention"], data["reading"], data["lengths"][0]["prompts"]) == (True, None, 1)
    assert landmark(*arguments[:5], "20").code == 1
