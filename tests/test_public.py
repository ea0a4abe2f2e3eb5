"""What programs may build on: the names of the package, their types, options and results of commands."""

import dataclasses
import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import landmark_cli
from landmark_cli.commands import COMMANDS
from landmark_cli.options import Options, settings_of
from tests.greet import GreetOptions

ROOT = Path(__file__).parents[1]


def test_names_are_found_without_importing_what_they_need():
    script = (
        "import sys, landmark_cli; assert set(landmark_cli.__all__) <= set(dir(landmark_cli));"
        "from landmark_cli import LandmarkError, ReadingSettings;"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), 'heavy';"
        "from landmark_cli import *; assert generate and load"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        landmark_cli.lode  # noqa: B018


def test_the_names_for_type_checkers_are_those_for_programs():
    source = inspect.getsource(landmark_cli)
    checked = source.partition("if TYPE_CHECKING:\n")[2].partition("\n\n")[0]
    found = {}
    for module, names in re.findall(r"from landmark_cli\.([\w.]+) import (.*)", checked):
        found |= dict.fromkeys(names.split(", "), module)
    assert found == landmark_cli._FROM and sorted(found) == landmark_cli.__all__
    assert (ROOT / "landmark_cli" / "py.typed").is_file()


def test_types_as_a_checker_sees_them():
    """tests/typed_use.py is a program of somebody else's, with mistakes that a checker must find marked as such."""
    if importlib.util.find_spec("mypy") is None:
        pytest.skip("mypy is not installed")
    done = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout


PATHS = [
    (command, name)
    for command in COMMANDS
    for name, setting in settings_of(command.options_class).items()
    if setting.kind is Path
]


@pytest.mark.parametrize(("command", "name"), PATHS, ids=[f"{c.words} {n}" for c, n in PATHS])
def test_options_take_text_for_paths(command, name):
    settings = settings_of(command.options_class)
    needed = {key: "x" for key, setting in settings.items() if setting.default is dataclasses.MISSING}
    value = getattr(command.options_class(**{**needed, name: "a/b"}), name)
    assert value == ([Path("a/b")] if settings[name].many else Path("a/b"))


def test_there_are_such_options():
    assert len(PATHS) > 15
    assert all(issubclass(command.options_class, Options) for command in COMMANDS)


def test_options_take_either_for_either():
    options = GreetOptions(who=Path("x"), data=["a", Path("b")], words="one", out="c", note=None)
    assert (options.who, options.data, options.words, options.out) == ("x", [Path("a"), Path("b")], ["one"], Path("c"))


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.words)
def test_every_command_says_what_it_returns(command):
    _, run = command.load()
    assert inspect.signature(run).return_annotation not in ("None", None, inspect.Signature.empty)
    assert "eturns" in run.__doc__ or ", which is\n    returned" in run.__doc__
