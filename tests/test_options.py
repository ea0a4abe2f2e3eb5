"""Options dataclass, conversion of values, recipes."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from landmark_cli import options as options_module
from landmark_cli.commands import COMMANDS
from landmark_cli.errors import UsageError
from landmark_cli.inference.settings import ReadingSettings, SamplingSettings
from landmark_cli.options import (
    LARGEST_SEED,
    build,
    find_recipe,
    load_recipe,
    nearest,
    option,
    recipe_names,
    save_recipe,
    settings_of,
)
from tests.greet import GreetOptions

texts = st.text(st.characters(exclude_categories=["Cs"]))
paths = texts.filter(lambda text: not text.startswith("~")).map(Path)
numbers = st.floats(-1e9, 1e9)
greetings = st.builds(
    GreetOptions,
    who=texts,
    times=st.integers(1, 9),
    rate=st.floats(0, 1e9),
    blocks=st.none() | st.integers(0, 10**9),
    style=st.sampled_from(["plain", "fancy"]),
    tone=st.sampled_from(["high", "low", None]),
    data=st.lists(paths),
    words=st.lists(texts),
    mix=st.none() | st.lists(numbers, min_size=1),
    loud=st.booleans(),
    twice=st.none() | st.booleans(),
    out=st.none() | paths,
    note=st.none() | texts,
    top_k=st.integers(-(10**9), 10**9),
)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("times", "3", 3),
        ("times", 3, 3),
        ("rate", "2e-3", 0.002),
        ("rate", 1, 1.0),
        ("blocks", "none", None),
        ("blocks", None, None),
        ("tone", "none", None),
        ("note", "none", "none"),
        ("note", 12, "12"),
        ("out", "x/y", Path("x/y")),
        ("out", "~nobody-of-that-name/y", Path("~nobody-of-that-name/y")),
        ("data", "one", [Path("one")]),
        ("data", ["one", "t,w,o"], [Path("one"), Path("t,w,o")]),
        ("mix", "0.9,0.1", [0.9, 0.1]),
        ("mix", ["0.9", "0.05,0.05"], [0.9, 0.05, 0.05]),
        ("mix", [0.9, "1e-1"], [0.9, 0.1]),
        ("mix", None, None),
        ("mix", [], None),
        ("data", [], []),
        ("twice", False, False),
    ],
)
def test_converts(name, value, expected):
    converted = settings_of(GreetOptions)[name].convert(value)
    assert converted == expected
    assert type(converted) is type(expected)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("times", "x", "--times: expected a whole number, found 'x'"),
        ("times", 2.5, "--times: expected a whole number, found 2.5"),
        ("times", True, "--times: expected a whole number, found True"),
        ("times", 0, "--times: must be at least 1 and at most 9, found 0"),
        ("times", "10", "--times: must be at least 1 and at most 9, found 10"),
        ("rate", "nan", "--rate: must be at least 0 and at most 1000000000, found nan"),
        ("rate", [], "--rate: expected a number, found []"),
        ("times", None, "--times: expected a whole number, found None"),
        ("style", "fance", "--style: expected one of plain, fancy; found 'fance'"),
        ("loud", "yes", "--loud: expected true or false, found 'yes'"),
        ("note", True, "--note: expected text, found True"),
        ("out", 3, "--out: expected text, found 3"),
        ("mix", "0.9,,", "--mix: expected a number, found ''"),
        ("mix", "none", "--mix: expected a number, found 'none'"),
        ("mix", [None], "--mix: expected a number, found None"),
        ("data", None, "--data: expected text, found None"),
        ("words", [["a"]], "--words: expected text, found ['a']"),
        ("who", None, "WHO: expected text, found None"),
        ("top_k", "x", "--top-k-blocks: expected a whole number, found 'x'"),
    ],
)
def test_refuses_naming_the_option(name, value, message):
    with pytest.raises(UsageError) as error:
        build(GreetOptions, {name: value})
    assert str(error.value) == message


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.words)
def test_help_texts_stand_alone(command):
    """They are read one at a time: none goes on from the one above, as "Of that choice" and "Its length" would."""
    for setting in settings_of(command.options_class).values():
        text = setting.metadata["help"]
        assert re.fullmatch(r"(?!(Of|It|Its|They|Their|Such|So|That|Those|These|This) )[A-Z].*[.\]]", text), text


NUMBERS = {
    f"{command.words} {setting.label}": setting
    for command in COMMANDS
    for setting in settings_of(command.options_class).values()
    if setting.kind in (int, float)
}
NONSENSE = [
    "nan",
    "inf",
    "-inf",
    "1e999",
    "1e300",
    "-1e300",
    "9" * 400,
    "-" + "9" * 400,
    "9" * 5000,
    str(2**63),
    "",
    "x",
]


@pytest.mark.parametrize("setting", NUMBERS.values(), ids=NUMBERS)
def test_numbers_that_no_option_can_have_are_refused(setting):
    for value in [*NONSENSE, math.nan, math.inf, -math.inf, 10**400, -(10**400), True]:
        with pytest.raises(ValueError) as error:
            setting.convert(value)
        assert re.match(r"must be at least \S+ and at most \S+, found .{1,60}$|expected a ", str(error.value)), value


@pytest.mark.parametrize("setting", NUMBERS.values(), ids=NUMBERS)
def test_every_number_has_a_range_around_its_default(setting):
    low, high = setting.bounds
    assert setting.metadata["min"] == low >= 0
    assert low < high <= (LARGEST_SEED if setting.kind is int and setting.name == "seed" else 10**15)
    one = [setting.convert(str(bound)) for bound in (low, high)]
    assert one == ([[low], [high]] if setting.many else [low, high])
    for default in setting.default if setting.many and setting.default else [setting.default]:
        assert default in (None, dataclasses.MISSING) or low <= default <= high
    for beyond in (low - 1, high + 1):
        with pytest.raises(ValueError, match="^must be at least"):
            setting.convert(str(beyond))


CLASSES = {command.words: command.options_class for command in COMMANDS}
CLASSES |= {made.__name__: made for made in (ReadingSettings, SamplingSettings)}


@pytest.mark.parametrize("made", CLASSES.values(), ids=CLASSES)
def test_what_cannot_be_is_refused_where_python_makes_it(made):
    settings = settings_of(made)
    required = {name: ["x"] if s.many else "x" for name, s in settings.items() if s.default is dataclasses.MISSING}
    made(**required)
    for name, setting in settings.items():
        low, high = setting.bounds
        wrong = [low - 1, high + 1, math.nan] if setting.kind in (int, float) else ["nothing of the kind"]
        for value in wrong if setting.kind in (int, float) or setting.choices else []:
            with pytest.raises(UsageError, match=f"^{re.escape(setting.label)}: (must be|expected one of) .*found"):
                made(**required | {name: [value] if setting.many else value})


def test_python_call_needs_no_command_line():
    assert GreetOptions().data == [Path("a"), Path("b")]
    assert GreetOptions().data is not GreetOptions().data
    assert GreetOptions(times=3) == build(GreetOptions, {"times": "3"})


@pytest.mark.parametrize(
    ("annotation", "declared"),
    [
        (dict, option(None, help="A dict.")),
        (int | str, option(1, help="Two types.")),
        (list[bool], option([], help="A list of flags.")),
        (str | None, option("x", help="None could not be asked for.")),
        (int, 3),
    ],
    ids=["dict", "union", "flags", "nameless none", "bare"],
)
def test_refuses_fields_that_cannot_be_options(annotation, declared):
    cls = dataclasses.make_dataclass("Options", [("field", annotation, declared)])
    with pytest.raises(TypeError, match="^field: "):
        settings_of(cls)


@given(options=greetings)
def test_saved_recipe_gives_the_same_options(options, tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    save_recipe(options, path, "greet")
    assert GreetOptions(**load_recipe(path, GreetOptions, "greet")) == options


def test_saved_recipe_leaves_out_what_belongs_to_one_run(tmp_path):
    path = tmp_path / "recipe.yaml"
    save_recipe(GreetOptions(resume=True), path, "greet")
    text = path.read_text()
    assert text.startswith("command: greet\n")
    assert "resume" not in text
    assert "top-k-blocks: 4\n" in text


def test_recipe_keys_take_dashes_underscores_and_field_names(tmp_path):
    for key in ("top-k-blocks", "top_k_blocks", "top_k", "top-k"):
        path = write(tmp_path / "r.yaml", f"{key}: 9\n")
        assert load_recipe(path, GreetOptions, "greet") == {"top_k": 9}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tims: 3", 'unknown key "tims"; did you mean times?'),
        ("top_k_block: 3", 'unknown key "top_k_block"; did you mean top-k-blocks?'),
        ("zzzz: 3", 'unknown key "zzzz"; there are blocks, data, '),
        ("times: many", "times: expected a whole number, found 'many'"),
        ("command: train", "it is for `landmark train`, not for `landmark greet`"),
        ("- a\n- b", "expected lines of `key: value`"),
        ("", "expected lines of `key: value`"),
        ("a: [", "not YAML: "),
    ],
)
def test_bad_recipes_are_named(tmp_path, text, message):
    path = write(tmp_path / "r.yaml", text)
    with pytest.raises(UsageError) as error:
        load_recipe(path, GreetOptions, "greet")
    assert str(error.value).startswith(f"recipe {path}")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_recipe_that_is_not_text(tmp_path):
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not UTF-8 text"):
        load_recipe(tmp_path / "r.yaml", GreetOptions, "greet")


def test_recipes_by_name(tmp_path, monkeypatch):
    shipped = tmp_path / "recipes"
    (shipped / "small").mkdir(parents=True)
    write(shipped / "small" / "loud.yaml", "command: greet\nloud: true\n")
    write(shipped / "small" / "quiet.yaml", "command: greet\n")
    write(shipped / "small" / "other.yaml", "command: train\n")
    write(shipped / "small" / "cluster.yaml", "machines: 8\n")
    monkeypatch.setattr(options_module, "PACKAGE", tmp_path)
    assert recipe_names("greet") == ["small/loud", "small/quiet"]
    assert load_recipe("small/loud", GreetOptions, "greet") == {"loud": True}
    assert find_recipe(str(shipped / "small" / "loud.yaml"), "greet") == shipped / "small" / "loud.yaml"
    with pytest.raises(UsageError, match='is called "small/lout"; did you mean small/loud'):
        find_recipe("small/lout", "greet")
    with pytest.raises(UsageError, match='is called "big"; there are small/loud, small/quiet'):
        find_recipe("big", "greet")
    with pytest.raises(UsageError, match=r"recipe mine\.yaml: there is no such file"):
        find_recipe("mine.yaml", "greet")


def test_nearest_without_anything_near():
    assert nearest("x", []) == "; there are none"


def test_required_option_has_no_default():
    @dataclass
    class Options:
        model: str = option(help="Which.")

    assert settings_of(Options)["model"].default is dataclasses.MISSING
    with pytest.raises(TypeError):
        Options()
