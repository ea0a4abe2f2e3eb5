"""The options by which commands open a model."""

import dataclasses

import pytest

from landmark_cli.commands import COMMANDS
from landmark_cli.commands.models import MachineOptions, open_model, precision_of
from landmark_cli.models.quantization import quantization_of
from landmark_cli.options import build
from tests.gpt2 import small_gpt2
from tests.tiny import tiny_model

OPENING = [command for command in COMMANDS if issubclass(command.options_class, MachineOptions)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = small_gpt2(folder)
    tokens = {"landmark_token_id": tokenizer.landmark_id, "eos_token_id": tokenizer.eot_id}
    tiny_model(n_embd=64, n_layer=1, vocab_size=tokenizer.landmark_id + 1, **tokens).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("command", OPENING, ids=lambda command: command.words)
def test_every_command_that_opens_a_model_opens_it_quantized(command, saved):
    known = {field.name for field in dataclasses.fields(command.options_class)}
    needed = {"model": str(saved), "study": "table1"}
    given = {name: value for name, value in needed.items() if name in known}
    options = build(command.options_class, {**given, "quantization": "int4", "device": "cpu"})
    assert quantization_of(open_model(str(saved), options)[0]) == "int4"
    assert precision_of(options) == {"dtype": "auto", "quantization": "int4"}


def test_those_are_the_commands_that_only_read():
    assert {command.words for command in OPENING} == {
        *("generate", "serve", "eval perplexity", "eval passkey", "eval ruler", "eval longppl", "eval study")
    }


def test_results_without_quantization_are_kept_as_they_were_before_it():
    assert precision_of(MachineOptions(dtype="bfloat16")) == {"dtype": "bfloat16"}
