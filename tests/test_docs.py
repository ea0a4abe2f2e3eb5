"""The pages that are made from the code are current, and what they say of recipes is true of those that are shipped."""

import ast
import json
import re
from pathlib import Path

import jsonschema
import pytest
import yaml

from landmark_cli.commands import COMMANDS, GROUPS
from landmark_cli.options import settings_of
from tests.modules import load_script

ROOT = Path(__file__).resolve().parents[1]
options = load_script(ROOT / "docs" / "options.py")
RECIPES = sorted(
    path
    for path in (ROOT / "recipes").rglob("*.yaml")
    if "command" in (yaml.safe_load(path.read_text(encoding="utf-8")) or {})
)


@pytest.mark.parametrize("path, make", [(options.PAGE, options.page), (options.SCHEMA, options.schema)])
def test_made_pages_are_current(path, make):
    assert path.read_text(encoding="utf-8") == make(), "run python docs/options.py"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_shipped_recipes_follow_the_schema(path):
    schema = json.loads(options.SCHEMA.read_text(encoding="utf-8"))
    jsonschema.validate(yaml.safe_load(path.read_text(encoding="utf-8")), schema)


def test_the_schema_knows_no_other_key():
    schema = json.loads(options.SCHEMA.read_text(encoding="utf-8"))
    for recipe in ({"command": "train", "steps": 0}, {"command": "train", "stepz": 3}, {"command": "trian"}, {}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(recipe, schema)


# --- what pages name is there

PACKAGE = ROOT / "landmark_cli"
SHOWN = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = sorted((ROOT / "benchmarks").glob("*.py"))
# What every command has, besides its dataclass's fields.
COMMON = {"--recipe", "--debug", "--help", "--version"}
# Options of other programs, which these pages name; those of launchers that have an underscore are known by it.
OTHERS = {"--shutdown-timeout": "torchrun", "--nnodes": "torchrun", "--cpu": "accelerate"}
OTHERS |= {"--tasks": "lm_eval", "--metadata": "lm_eval", "--limit": "lm_eval"}
ROOMS = [path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name not in ("data", "__pycache__")]
PLACE = re.compile(
    rf"(?<![\w./:$-])((?:[\w.-]+/)*[\w-]+\.(?:py|sh)\b|(?:\.\./)?(?:docs|tests|benchmarks|recipes|{'|'.join(ROOMS)})/[\w./-]*)"
)
# What may stand in front of `landmark` where it is a command, and its words.
CALL = re.compile(
    r"^\s*(?:\$ |\d+ s +|cat .* \| |until )?(?:\w+=\w+ )?(?:(?:accelerate launch|torchrun|\$here)\b.*? )?"
    r"(?:landmark|(?:python )?-m landmark_cli) ([a-z].*)"
)


def text_of(path: Path) -> str:
    """A page; of a script its docstring, of a recipe its comments."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return ast.get_docstring(ast.parse(text)) or ""
    if path.suffix == ".yaml":
        return "\n".join(line.lstrip()[1:].removeprefix(" ") for line in text.splitlines() if line.lstrip()[:1] == "#")
    return text


def code_of(text: str) -> list[str]:
    """What stands in a text as code: lines of blocks, each with those it goes on in, and what is between backticks."""
    text = re.sub(r"\\\n\s*", "", text)
    fenced = re.findall(r"^```.*?\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    plain = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    blocks = [line for line in plain.splitlines() if line.startswith("    ")]
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", plain)]
    return [line for block in fenced for line in block.splitlines()] + blocks + spans


def calls_of(text: str) -> list[list[str]]:
    """The words of every `landmark ...` in a text."""
    found = (CALL.match(re.sub(r"\s#.*", "", line)) for line in code_of(text))
    return [match[1].split() for match in found if match]


def options_of(command) -> set[str]:
    settings = settings_of(command.options_class).values()
    names = {name for setting in settings for name in options.names(setting)}
    return names | {
        f"--no-{name[2:]}" for setting in settings if setting.kind is bool for name in options.names(setting)
    }


OPTIONS = {command.words: options_of(command) for command in COMMANDS}
TEXTS = {
    path.relative_to(ROOT).as_posix(): (path, text_of(path))
    for path in [*SHOWN, *SCRIPTS, *sorted((ROOT / "recipes").rglob("*.yaml"))]
}
each_text = pytest.mark.parametrize("path, text", TEXTS.values(), ids=TEXTS)


FOLDERS = "landmark_cli", "tests", "benchmarks", "docs", "recipes"
NAMES = {path.name for folder in FOLDERS for path in (ROOT / folder).rglob("*.*")}
SCRIPTS_TEXT = "".join(path.read_text(encoding="utf-8") for path in SCRIPTS)
SOURCE = "".join(path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py")))


@each_text
def test_files_that_a_page_names_are_there(path, text):
    starts = path.parent, ROOT, PACKAGE, PACKAGE / "attention"
    # What a command shall write need not be there.
    for place in {place.rstrip(".-") for place in PLACE.findall(re.sub(r"(?:--output|>) \S+|\S*NAME\.\w+", "", text))}:
        found = any((start / place).exists() for start in starts) if "/" in place else place in NAMES
        assert found, f"there is no {place}"
    for link in re.findall(r"\]\(([^)#]+)", text):
        assert "://" in link or (path.parent / link).exists(), f"there is no {link}"
    named = [words[words.index("--recipe") + 1] for words in calls_of(text) if "--recipe" in words[:-1]]
    for recipe in named + re.findall(r"recipe `([\w-]+/[\w-]+)`", text):
        assert recipe.startswith("runs/") or (ROOT / "recipes" / f"{recipe}.yaml").exists(), f"no recipe {recipe}"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_files_that_a_script_takes_are_there(path):
    for parts in re.findall(r'ROOT((?: / "[^"]+")+)', path.read_text(encoding="utf-8")):
        assert ROOT.joinpath(*re.findall(r'"([^"]+)"', parts)).exists(), parts


@each_text
def test_commands_and_options_that_a_page_names_are_there(path, text):
    for words in calls_of(text):
        command = next((n for n in (2, 1) if " ".join(words[:n]) in OPTIONS), 0)
        if not command:
            assert words in ([group] for group in GROUPS), f"no command landmark {' '.join(words)}"
            continue
        given = {word.split("=")[0].rstrip(".,:;)") for word in words if word.startswith("--")}
        unknown = given - OPTIONS[" ".join(words[:command])] - COMMON
        assert not unknown, f"landmark {' '.join(words)}: {unknown}"
    known = COMMON.union(OTHERS, re.findall(r'"(--[\w-]+)"', SCRIPTS_TEXT), *OPTIONS.values())
    named = {name for name in re.findall(r"(?<![\w-])--[a-z][\w-]*", text) if "_" not in name}
    assert named <= known
    for code in code_of(text):
        if script := re.match(r"\s*python (benchmarks/\w+\.py) (.*)", re.sub(r"\s#.*", "", code)):
            takes = (ROOT / script[1]).read_text(encoding="utf-8")
            assert all(f'"{name}"' in takes for name in re.findall(r"(?<!\S)--[\w-]+", script[2])), code
    make = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = {target for code in code_of(text) for target in re.findall(r"^\s*(?:\$ )?make ([a-z][a-z0-9-]*)", code)}
    assert all(f"\n{target}:" in make for target in targets), targets


def test_the_last_two_tests_find_what_they_look_for():
    calls = [words for _, text in TEXTS.values() for words in calls_of(text)]
    assert len(calls) > 60 and {" ".join(words[:2]) for words in calls} >= {words for words in OPTIONS if " " in words}
    assert sum(len(PLACE.findall(text)) for _, text in TEXTS.values()) > 100


@pytest.mark.parametrize("path", SHOWN, ids=lambda path: path.name)
def test_names_of_the_code_that_a_page_names_are_there(path):
    text = text_of(path)
    for name in set(re.findall(r"landmark_cli(?:\.\w+)+", text)):
        *parts, last = name.split(".")
        module = next(
            (
                p
                for p in (ROOT.joinpath(*parts, last), ROOT.joinpath(*parts))
                if p.with_suffix(".py").is_file() or p.is_dir()
            ),
            None,
        )
        assert module, name
        file = module.with_suffix(".py") if module.with_suffix(".py").is_file() else module / "__init__.py"
        assert module.name == last or re.search(rf"\b{last}\b", file.read_text(encoding="utf-8")), name
    names = set(re.findall(r"\bLANDMARK_\w+", text))
    if path.name in ("CONTRIBUTING.md", "architecture.md"):
        names |= {span for span in code_of(text) if re.fullmatch(r"[A-Za-z_]\w+", span)}
    missing = {name for name in names if not re.search(rf"\b{name}\b", SOURCE)}
    assert not missing
