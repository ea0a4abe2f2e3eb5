"""Every `landmark ...` that a page or a help shows is one that the command takes: it has these options, they may have
these values, and its recipe is shipped."""

import re
import shlex
from dataclasses import MISSING

import pytest

from landmark_cli import cli
from landmark_cli.commands import COMMANDS, GROUPS
from landmark_cli.errors import UsageError
from landmark_cli.options import settings_of
from tests.pages import TEXTS, calls_in, lines_of, spans_of

BY_WORDS = {command.words: command for command in COMMANDS}
# What ends a command in a shell, or is said of it in words behind it.
ENDS = re.compile(r"\s(?:&|\||\(.*)$|; .*$|\s>\s?\S+$")


def arguments_of(call: str, whole: bool) -> list[str] | None:
    """The arguments to try of what stands behind `landmark`; None where it only names a group.

    whole: whether it is meant to be typed as it stands. Otherwise it tells of a command, and what the command cannot do
    without is added, as where it says "...".
    """
    words = shlex.split(ENDS.sub("", call))
    if words in ([group] for group in GROUPS):
        return None
    name = " ".join(words[:2]) if " ".join(words[:2]) in BY_WORDS else words[0]
    if name not in BY_WORDS:
        return words
    if not whole or "..." in words:
        words = [word.rstrip(".,:;") for word in words if word != "..."]
        given = words[len(name.split()) :]
        for setting in settings_of(BY_WORDS[name].options_class).values():
            positional = setting.metadata["positional"]
            there = bool(given) and not given[0].startswith("-") if positional else setting.label in given
            if setting.default is MISSING and not there:
                words += ["1"] if positional else [setting.label, "1"]
    if "--recipe" in words and words[words.index("--recipe") + 1].startswith("runs/"):
        # A run has written that one.
        at = words.index("--recipe")
        del words[at : at + 2]
    return words


def parsed(arguments: list[str]) -> object:
    """The options that a command line means. Raises where the command would refuse it."""
    seen: list[object] = []
    app = cli.build_app(COMMANDS, lambda run, options: seen.append(options))
    try:
        app(args=arguments, prog_name="landmark", standalone_mode=True)
    except SystemExit as end:
        assert not end.code, f"landmark {shlex.join(arguments)} ends with {end.code}"
    return seen[0] if seen else None


CALLS = {
    f"{name}: landmark {call}": (call, whole)
    for name, (_, text) in TEXTS.items()
    for whole, code in ((True, lines_of(text)), (False, spans_of(text)))
    for call in calls_in(code)
}
EXAMPLES = [line.strip() for command in COMMANDS for line in command.examples.strip().splitlines()]
CALLS |= {f"--help: {line}": (call, True) for line in EXAMPLES for call in calls_in([line])}


@pytest.mark.parametrize("call, whole", CALLS.values(), ids=CALLS)
def test_a_command_that_is_shown_is_taken(call, whole):
    arguments = arguments_of(call, whole)
    if arguments is not None:
        assert parsed(arguments) is not None


@pytest.mark.parametrize(
    "wrong",
    ["generate --pompt x", "train --schedule cubic", "train --steps 0", "train --recipe pg19/landmarks", "tran"],
)
def test_a_command_that_cannot_be_is_not_taken(wrong):
    with pytest.raises((AssertionError, UsageError)):
        parsed(arguments_of(wrong, True))


def test_there_are_calls_of_every_command():
    assert len(CALLS) > 150
    shown = [f"{' '.join(arguments_of(call, whole) or [])} " for call, whole in CALLS.values()]
    assert all(any(call.startswith(f"{words} ") for call in shown) for words in BY_WORDS)
