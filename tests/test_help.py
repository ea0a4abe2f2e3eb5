"""Help at two widths, as it was when somebody last looked at it, and what holds at any width."""

from pathlib import Path

import pytest

from landmark_cli.cli import wrapped
from landmark_cli.commands import COMMANDS
from landmark_cli.signature import metavar_of
from tests.modules import load_script

options = load_script(Path(__file__).resolve().parents[1] / "docs" / "options.py")
NARROW = 70


@pytest.mark.parametrize("width", options.WIDTHS)
@pytest.mark.parametrize("words", options.WITH_HELP)
def test_help_is_as_it_was(words, width):
    text = options.help_file(words, width).read_text(encoding="utf-8")
    assert options.show_help(words, width) == text, "look at it, then run python docs/options.py"


def test_no_other_help_is_kept():
    kept = {options.help_file(words, width) for words in options.WITH_HELP for width in options.WIDTHS}
    assert set(options.HELPS.glob("*")) == kept


@pytest.mark.parametrize("width", [NARROW, *options.WIDTHS])
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.words)
def test_no_name_and_no_word_is_cut(command, width):
    text = options.show_help(command.words, width)
    shown, _, examples = text.partition("Examples:")
    assert "…" not in text and all(len(line) <= width for line in shown.splitlines())
    cells = [line[2:34].strip() for line in shown.splitlines() if line.startswith("│")]
    words = {word.rstrip(",") for cell in cells for word in cell.split()}
    for setting in options.settings_of(command.options_class).values():
        names = [setting.label] if setting.metadata["positional"] else list(options.names(setting))
        if setting.kind is bool and setting.metadata["saved"]:
            names += [f"--no-{name[2:]}" for name in names]
        assert set(names) <= words
        assert (metavar_of(setting) or "") in "".join("".join(cells).split())
    # Put together again, the examples are the commands that they were.
    joined = examples.replace(" \\\n     ", " ").strip().splitlines()
    assert [line.strip() for line in joined] == command.examples.strip().splitlines()


@pytest.mark.parametrize("words", ["", *options.GROUPS])
def test_no_command_is_cut(words):
    text = options.show_help(words, min(options.WIDTHS))
    assert "…" not in text
    for command in COMMANDS:
        if words and not command.words.startswith(f"{words} "):
            continue
        name = command.words.removeprefix(words).split()[0]
        assert f"│ {name} " in text


def test_commands_are_broken_in_front_of_options():
    example = 'landmark generate --prompt "It was the best of times" --seed 3'
    assert list(wrapped(example, 100)) == [example]
    assert list(wrapped(example, 40)) == [
        "landmark generate \\",
        '    --prompt "It was the best of times" \\',
        "    --seed 3",
    ]
