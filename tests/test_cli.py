"""The command line: what Typer makes of an options dataclass, errors and exit codes, help that is quick."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from rich.emoji import Emoji

from landmark_cli import cli, console, signature
from landmark_cli.errors import LandmarkError, UsageError, import_extra
from landmark_cli.options import save_recipe, settings_of
from landmark_cli.signature import paragraphs
from tests.greet import GreetOptions, greet_command
from tests.test_console import ODD_NAMES
from tests.test_options import greetings

ROOT = Path(__file__).parent.parent
HELPS = sorted({tuple(command.words.split()[:length]) for command in cli.COMMANDS for length in (0, 1, 2)})
HEAVY = {"torch", "transformers", "numpy", "datasets", "accelerate", "tokenizers", "pydantic", "matplotlib", "yaml"}
# What a command's module may import, and not what the names and summaries of all commands need.
SLOWISH = {"json", "hashlib", "socket"}
COMMANDS = {tuple(command.words.split()) for command in cli.COMMANDS}
# Our modules that the names and summaries of commands need.
LIGHT = {
    f"landmark_cli.{name}" for name in "cli commands console errors failures interrupts launch registration".split()
}


def landmark(*arguments: str, **options) -> subprocess.CompletedProcess:
    """Run the command as a user does, in its own process."""
    command = [sys.executable, "-m", "landmark_cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


@pytest.fixture
def greet(monkeypatch, capsys):
    """Run `landmark greet ...` in this process: exit code, the options its function got, stdout, stderr."""
    console.console.cache_clear()
    seen = []

    def run(options: GreetOptions) -> None:
        seen.append(options)
        if options.note == "fail":
            raise LandmarkError("greeting nobody: no such person; name somebody")
        if options.note == "misuse":
            raise UsageError("--loud: not together with --twice")
        if options.note == "crash":
            raise ValueError("something\nelse")
        if options.note == "silent crash":
            raise AssertionError
        if options.note == "interrupt":
            raise KeyboardInterrupt
        if options.note == "talk":
            console.info("by the way")
            console.table(["a"], [["b"]], stderr=True)
            with console.progress("greeting", 2) as shown:
                shown.advance(2)
            console.warn("look out")
            console.write_out("a result\n")

    def call(*arguments: str):
        seen.clear()
        with pytest.raises(SystemExit) as exit:
            cli.main(arguments)
        out, err = capsys.readouterr()
        return exit.value.code, seen[0] if seen else None, out, err

    monkeypatch.setattr(cli, "COMMANDS", [greet_command(run)])
    yield call
    console.console.cache_clear()


def test_defaults_are_the_dataclass_ones(greet):
    assert greet("greet")[:2] == (0, GreetOptions())


def test_the_garbage_collector_works_when_the_work_begins(greet):
    gc.disable()
    try:
        assert greet("greet")[0] == 0 and gc.isenabled()
    finally:
        gc.enable()


def test_every_kind_of_option(greet):
    values = "--times 3 --rate 1e-3 --blocks none --style fancy --out z --note n -k 0"
    lists = "-d x --data y --words a,b --mix 0.5,0.25 --mix 0.25"
    flags = "--loud --no-twice --resume"
    code, options, _, _ = greet("greet", "me", *values.split(), *lists.split(), *flags.split())
    assert code == 0
    assert options == GreetOptions(
        who="me",
        times=3,
        rate=1e-3,
        blocks=None,
        style="fancy",
        data=[Path("x"), Path("y")],
        words=["a,b"],
        mix=[0.5, 0.25, 0.25],
        loud=True,
        twice=False,
        out=Path("z"),
        note="n",
        top_k=0,
        resume=True,
    )


def test_command_line_beats_recipe_beats_default(greet, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("command: greet\ntimes: 5\nrate: 0.5\nblocks: null\nloud: true\ndata: only\nwho: them\n")
    for arguments in (["--recipe", str(recipe), "--times", "6"], ["--times", "6", "--recipe", str(recipe)]):
        code, options, _, _ = greet("greet", *arguments)
        assert code == 0
        expected = GreetOptions(who="them", times=6, rate=0.5, blocks=None, loud=True, data=[Path("only")])
        assert options == expected
    assert greet("greet", "you", "--recipe", str(recipe), "--no-loud", "--blocks", "1", "-d", "z")[1] == GreetOptions(
        times=5, rate=0.5, blocks=1, data=[Path("z")]
    )


def test_help_shows_the_recipes_values(greet, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("times: 5\n")
    code, _, out, _ = greet("greet", "--recipe", str(recipe), "--help")
    assert code == 0
    assert "[default: 5]" in out


@given(options=greetings)
def test_saved_recipe_repeats_the_command(options, tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    save_recipe(options, path, "greet")
    seen = []
    app = cli.build_app([greet_command(seen.append)])
    with pytest.raises(SystemExit) as exit:
        app(["greet", "--recipe", str(path)])
    assert exit.value.code == 0
    assert seen == [options]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--note", "fail"], 1, "error: greeting nobody: no such person; name somebody\n"),
        (["--note", "misuse"], 2, "error: --loud: not together with --twice\n"),
        (["--note", "crash"], 1, "error: ValueError: something\nrun again with --debug for the traceback\n"),
        (["--note", "silent crash"], 1, "error: AssertionError\nrun again with --debug for the traceback\n"),
        (["--note", "interrupt"], 130, "stopped by SIGINT\n"),
        (["--times", "0"], 2, "error: --times: must be at least 1 and at most 9, found 0\n"),
        (["--recipe", "nonsense"], 2, 'error: no recipe of `landmark greet` is called "nonsense"; there are none\n'),
        (["--recipe", "no.yaml"], 2, "error: recipe no.yaml: there is no such file\n"),
    ],
)
def test_errors_are_a_line_or_two(greet, arguments, code, message):
    found, _, out, err = greet("greet", *arguments)
    assert (found, out, err) == (code, "", message)


@pytest.mark.parametrize("place", [["--debug", "greet"], ["greet", "--debug"]], ids=["before", "after"])
def test_debug_shows_the_traceback(greet, place):
    code, _, _, err = greet(*place, "--note", "crash")
    assert code == 1
    assert "Traceback (most recent call last)" in err
    assert "error: ValueError: something\n" in err
    assert "run again" not in err


@pytest.mark.parametrize("place", [["--quiet", "greet"], ["greet", "--quiet"]], ids=["before", "after"])
def test_quiet_leaves_warnings_and_results_and_how_it_ended(greet, place):
    assert greet(*place, "--note", "talk")[2:] == ("a result\n", "warning: look out\n")
    assert greet("greet", "--note", "talk")[3].startswith("by the way\n")
    assert greet(*place, "--note", "interrupt")[3] == "stopped by SIGINT\n"
    assert greet(*place, "--note", "fail")[3].startswith("error: greeting nobody")
    assert greet("greet", "--note", "talk")[3].startswith("by the way\n")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["greet", "--tims", "3"], "--times"),
        (["gret"], "Did you mean 'greet'"),
        (["greet", "--style"], "requires an argument"),
    ],
)
def test_misspelt_words_are_usage_errors(greet, arguments, expected):
    code, options, _, err = greet(*arguments)
    assert (code, options) == (2, None)
    assert expected in err
    assert "Traceback" not in err


@pytest.mark.parametrize("name", ODD_NAMES)
def test_usage_errors_and_help_show_names_as_they_are(greet, monkeypatch, tmp_path, name):
    monkeypatch.setenv("COLUMNS", "300")
    assert f"({name})" in greet("greet", "a", name)[3]
    assert f"--{name}" in greet("greet", f"--{name}")[3]
    assert f'called "{name}"' in greet("greet", "--recipe", name)[3]
    assert repr(name) in greet("greet", "--style", name)[3]
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"out: {json.dumps(name)}\n")
    assert f"[default: {name}]" in greet("greet", "--recipe", str(recipe), "--help")[2]


@pytest.mark.parametrize("command", cli.COMMANDS, ids=lambda command: command.words)
def test_help_has_no_emoji_codes(command):
    """Typer gives rich its texts as markup; brackets can be escaped there, emoji codes cannot."""
    options_class = command.options_class
    texts = [
        options_class.__doc__,
        command.examples,
        *(one.metadata["help"] for one in settings_of(options_class).values()),
    ]
    assert [Emoji.replace(text) for text in texts] == texts


def test_help_tells_all(greet, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    code, _, out, _ = greet("greet", "--help")
    assert code == 0
    for text in [
        "Greet somebody [loudly].",
        "A second paragraph.",
        "How many [blocks], or none for all. [x>=0] [default: 20]",
        "--top-k-blocks",
        "-k",
        "<plain|fancy>",
        "[1<=x<=9]",
        "Numbers",
        "--no-loud",
        "--recipe",
        "--debug",
    ]:
        assert text in out
    assert "--no-resume" not in out
    assert out.rstrip().endswith("landmark greet me --times 3 --words [x]")


def test_groups(capsys, monkeypatch):
    monkeypatch.setattr(cli, "GROUPS", {"eval": "Measure."})
    seen = []
    commands = [greet_command(seen.append, "eval greet"), greet_command(seen.append)]
    app = cli.build_app(commands)
    with pytest.raises(SystemExit) as exit:
        app(["eval", "greet", "me"])
    assert exit.value.code == 0
    assert seen == [GreetOptions(who="me")]
    with pytest.raises(SystemExit) as exit:
        app(["eval", "--help"])
    assert exit.value.code == 0
    assert "Measure." in capsys.readouterr().out


@pytest.mark.parametrize("words", HELPS, ids=" ".join)
def test_help_ends_with_an_example_and_imports_little(words):
    script = f"""
import sys
from landmark_cli.cli import main
try:
    main({[*words, "--help"]})
finally:
    print("imported", *sys.modules)
"""
    environment = {**os.environ, "COLUMNS": "200"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, env=environment)
    *help_lines, imported = done.stdout.rstrip().splitlines()
    example = [line for line in help_lines if line.strip()][-1]
    assert " ".join(["landmark", *words]) in example
    imported = set(imported.split())
    assert HEAVY & imported == set()
    if words not in COMMANDS:
        assert SLOWISH & imported == set()
        assert {name for name in imported if name.startswith("landmark_cli.")} == LIGHT


def test_options_are_built_for_the_wanted_command_only(monkeypatch, capsys):
    loaded = []
    commands = [
        greet_command(print, words)._replace(load=lambda words=words: loaded.append(words) or (GreetOptions, print))
        for words in ("greet", "part", "eval greet", "eval part")
    ]
    monkeypatch.setattr(cli, "COMMANDS", commands)
    for arguments, expected in [
        ([], []),
        (["--help"], []),
        (["--version"], []),
        (["gret"], []),
        (["eval"], []),
        (["eval", "--help"], []),
        (["part", "--help"], ["part"]),
        (["--debug", "eval", "part", "--help"], ["eval part"]),
        (["greet", "eval", "--times", "2"], ["greet"]),
    ]:
        loaded.clear()
        with pytest.raises(SystemExit):
            cli.main(arguments)
        assert loaded == expected, arguments


@pytest.mark.parametrize("command", cli.COMMANDS, ids=lambda command: command.words)
def test_summaries_are_what_the_options_say(command):
    assert command.summary == paragraphs(command.options_class)[0]


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("", {"eval", "greet"}),
        ("eval ", {"greet"}),
        ("greet --st", {"--style"}),
        ("eval greet --loud --ti", {"--times"}),
        ("greet --style ", {"plain", "fancy"}),
        ("eval greet --tone h", {"high"}),
        ("greet --recipe ", {"some/recipe"}),
        ("--q", {"--quiet"}),
    ],
)
def test_shells_are_told_what_may_follow(monkeypatch, capsys, typed, expected):
    """What completion asks of the commands, once `landmark --install-completion` has told the shell of them."""
    monkeypatch.setattr(signature, "recipe_names", lambda words: ["some/recipe"])
    monkeypatch.setattr(cli, "COMMANDS", [greet_command(print), greet_command(print, "eval greet")])
    monkeypatch.setenv("_LANDMARK_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", f"landmark {typed}")
    monkeypatch.setenv("COMP_CWORD", str(len(f"landmark {typed}x".split()) - 1))
    with pytest.raises(SystemExit):
        cli.main([])
    assert set(capsys.readouterr().out.split()) == expected


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_is_told_where_to_ask(monkeypatch, capsys, shell):
    monkeypatch.setattr("shellingham.detect_shell", lambda: (shell, shell))
    with pytest.raises(SystemExit) as exit:
        cli.main(["--show-completion"])
    shown = capsys.readouterr().out
    assert exit.value.code == 0 and "landmark" in shown and f"complete_{shell}" in shown


@pytest.mark.parametrize(
    "command",
    [[Path(sys.executable).parent / "landmark"], [sys.executable, "-m", "landmark_cli"], [sys.executable, "landmark"]],
    ids=["console script", "module", "launcher"],
)
def test_all_ways_in(command):
    done = subprocess.run([*command, "--version"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, f"landmark {cli.__version__}\n")


def test_missing_command_and_unknown_command_in_a_process():
    assert landmark().returncode == 2
    name = cli.COMMANDS[0].words.split()[0]
    done = landmark(name[:-1])
    assert done.returncode == 2
    assert f"Did you mean '{name}'" in done.stderr
    assert "Traceback" not in done.stderr


def test_missing_extra_is_named():
    assert import_extra("json", "lora") is json
    with pytest.raises(LandmarkError, match=r"needs the package not_there.*pip install 'landmark-cli\[lora\]'"):
        import_extra("not_there.part", "lora")


def test_extra_that_is_broken_inside_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "broken_extra.py").write_text("import something_it_needs\n")
    monkeypatch.syspath_prepend(os.fspath(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="something_it_needs"):
        import_extra("broken_extra", "lora")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["--version"], ["weight-diff"]], ids=" ".join)
def test_help_that_nobody_can_read_is_an_error(arguments):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "landmark_cli", *arguments], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 1
    assert done.stderr.startswith("error: standard output cannot be written: No space left on device")
