"""Code that comes with a model or tokenizer runs where --trust-remote-code says so, and nowhere else."""

import ast
import builtins
import json
from pathlib import Path

import pytest

import landmark_cli
from landmark_cli.commands import COMMANDS
from landmark_cli.errors import UsageError
from landmark_cli.options import load_recipe, settings_of
from tests.gpt2 import small_gpt2
from tests.tiny import tiny_llama

CODE = """
import os, pathlib
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

pathlib.Path(os.environ["CANARY"]).touch()

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig

class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def canary(tmp_path, monkeypatch):
    monkeypatch.setenv("CANARY", str(tmp_path / "canary"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    # Whoever asks is told to go on, as `yes |` does.
    monkeypatch.setattr(builtins, "input", lambda *_: "y")
    return tmp_path / "canary"


@pytest.fixture(params=["model", "tokenizer"])
def with_code(request, workplace, tmp_path):
    """A model directory whose config.json, or whose tokenizer_config.json, names code beside it."""
    folder = tmp_path / "stranger"
    tokenizer = small_gpt2(folder)
    tiny_llama(vocab_size=tokenizer.vocab_size).save_pretrained(folder)
    (folder / "own.py").write_text(CODE)
    name, changes = {
        "model": (
            "config.json",
            {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}},
        ),
        "tokenizer": (
            "tokenizer_config.json",
            {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}},
        ),
    }[request.param]
    (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | changes))
    return request.param, folder


def commands(part, folder, tmp_path):
    """Every command that opens a model, or a tokenizer."""
    data = tmp_path / "text.txt"
    data.write_text("It was the best of times. " * 50)
    yield "generate", "--model", folder, "--prompt", "It was", "--max-new-tokens", 1
    yield "eval", "perplexity", "--model", folder, "--eval-length", 20
    yield "eval", "passkey", "--model", folder, "--lengths", 60, "--prompts", 1
    study = tmp_path / "study.yaml"
    study.write_text("study: perplexity\nroles: {a: any}\nrows: [{role: a, eval-length: 20}]")
    yield "eval", "study", study, "--role", f"a={folder}", "--output", tmp_path / "study"
    run = ("--steps", 1, "--device", "cpu", "--batch-size", 1, "--accumulation", 1, "--eval-every", 0)
    length = ("--sequence-length", 27, "--landmark-freq", 7)
    quiet = ("--eval-ruler", "none")
    yield "finetune", "--model", folder, "--data", data, *length, "--output", tmp_path / "finetuned", *run, *quiet
    if part == "tokenizer":
        yield "prepare", "text", "--source", data, "--tokenizer", folder, "--output", tmp_path / "prepared"


def test_no_command_runs_it(landmark, canary, with_code, tmp_path):
    part, folder = with_code
    for command in commands(part, folder, tmp_path):
        ended = landmark(*command)
        refused = "comes with Python code of its own, which is not run; --trust-remote-code runs it" in ended.err
        # Where transformers has a class of its own for it, that one is taken.
        assert refused or (part == "tokenizer" and ended.code == 0), (command, ended.err)
        assert not canary.exists(), command


def test_the_flag_runs_it_and_says_whose_it_is(landmark, canary, with_code, tmp_path):
    part, folder = with_code
    command = ("generate", "--model", folder, "--prompt", "It was", "--max-new-tokens", 1, "--trust-remote-code")
    ended = landmark(*command)
    assert ended.code == 0, ended.err
    assert f"--trust-remote-code: Python code that comes with {folder} may run" in ended.err
    assert canary.exists()


@pytest.mark.parametrize("with_code", ["tokenizer"], indirect=True)
def test_a_tokenizer_with_code_comes_back_from_what_is_saved(landmark, canary, with_code, fresh_accelerator, tmp_path):
    _, folder = with_code
    *_, finetune, _ = commands("tokenizer", folder, tmp_path)
    ended = landmark(*finetune, "--trust-remote-code")
    assert ended.code == 0, ended.err
    model = ("--model", tmp_path / "finetuned", "--prompt", "It was", "--max-new-tokens", 1, "--trust-remote-code")
    assert landmark("generate", *model).code == 0
    assert canary.exists() and (tmp_path / "finetuned/own.py").is_file()


def test_every_call_that_may_run_code_says_whether_it_may():
    """Left out, transformers asks at the terminal; so the argument comes from the one place that knows the flag."""
    calls = []
    for path in sorted(Path(landmark_cli.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr.startswith("from_")
            ):
                if ast.unparse(node.func.value).startswith("Auto"):
                    calls.append((path.name, [ast.unparse(word.value) for word in node.keywords if word.arg is None]))
    assert len(calls) >= 4 and all("code" in given for _, given in calls), calls


WITHOUT = {"plot", "weight-diff make", "weight-diff recover"}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.words)
def test_every_command_that_opens_a_model_has_the_flag(command, tmp_path):
    words, options_class = command.words, command.options_class
    settings = settings_of(options_class)
    assert ("trust_remote_code" in settings) == (words not in WITHOUT)
    if words not in WITHOUT:
        assert settings["trust_remote_code"].default is False
        (tmp_path / "recipe.yaml").write_text("trust-remote-code: true\n")
        with pytest.raises(UsageError, match="cannot stand in a recipe; give --trust-remote-code with the command"):
            load_recipe(tmp_path / "recipe.yaml", options_class, words)
