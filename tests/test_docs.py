"""The pages that are made from the code are current, and what they say of recipes is true of those that are shipped."""

import importlib
import json
import re
from xml.etree import ElementTree

import jsonschema
import pytest
import yaml

from landmark_cli.commands import COMMANDS, GROUPS
from landmark_cli.options import settings_of
from tests import original
from tests.modules import load_script
from tests.pages import ROOT, SCRIPTS, SHOWN, TEXTS, calls_of, headings_of, lines_of, spans_of, text_of

options = load_script(ROOT / "docs" / "options.py")
python = load_script(ROOT / "docs" / "python.py")
figures = load_script(ROOT / "docs" / "figures.py")
RECIPES = sorted(
    path
    for path in (ROOT / "recipes").rglob("*.yaml")
    if "command" in (yaml.safe_load(path.read_text(encoding="utf-8")) or {})
)


MADE = {
    "options.md": (options.PAGE, options.page, "options.py"),
    "schema.json": (options.SCHEMA, options.schema, "options.py"),
    "python.md": (python.PAGE, python.page, "python.py"),
    **{name: (ROOT / "docs" / name, draw, "figures.py") for name, draw in figures.FIGURES.items()},
}


@pytest.mark.parametrize("path, make, script", MADE.values(), ids=MADE)
def test_made_pages_are_current(path, make, script):
    assert path.read_text(encoding="utf-8") == make(), f"run python docs/{script}"


@pytest.mark.parametrize("name", figures.FIGURES)
def test_words_of_a_figure_stand_in_it(name):
    drawing = ElementTree.fromstring((ROOT / "docs" / name).read_text(encoding="utf-8"))
    space = "{http://www.w3.org/2000/svg}"
    width, height = float(drawing.get("width")), float(drawing.get("height"))
    texts = drawing.findall(f"{space}text")
    for text in texts:
        # A letter of a plain font is hardly more than half as wide as it is high.
        wide, x = 0.56 * float(text.get("font-size")) * len(text.text), float(text.get("x"))
        left = {"start": x, "middle": x - wide / 2, "end": x - wide}[text.get("text-anchor")]
        assert 0 <= left and left + wide <= width and float(text.get("y")) <= height, text.text
    assert len(texts) > 10 and drawing.find(f"{space}title").text


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
# What every command has, besides its dataclass's fields.
COMMON = {"--recipe", "--quiet", "--debug", "--help", "--version", "--install-completion", "--show-completion"}
# Options of other programs, which these pages name; those of launchers that have an underscore are known by it.
OTHERS = {"--shutdown-timeout": "torchrun", "--nnodes": "torchrun", "--cpu": "accelerate"}
OTHERS |= {"--tasks": "lm_eval", "--metadata": "lm_eval", "--limit": "lm_eval"}
OTHERS |= {flag: "the authors' project" for flags in original.SCRIPTS.values() for flag in flags}
ROOMS = [path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name not in ("data", "__pycache__")]
PLACE = re.compile(
    rf"(?<![\w./:$-])((?:[\w.-]+/)*[\w-]+\.(?:py|sh)\b|(?:\.\./)?(?:docs|tests|benchmarks|recipes|{'|'.join(ROOMS)})/[\w./-]*)"
)


def options_of(command) -> set[str]:
    settings = settings_of(command.options_class).values()
    names = {name for setting in settings for name in options.names(setting)}
    return names | {
        f"--no-{name[2:]}" for setting in settings if setting.kind is bool for name in options.names(setting)
    }


OPTIONS = {command.words: options_of(command) for command in COMMANDS}
each_text = pytest.mark.parametrize("path, text", TEXTS.values(), ids=TEXTS)

# A link to a heading of a page, or of the page that it stands on.
LINK = re.compile(r"\]\(([\w./-]*)#([^)]+)\)")

FOLDERS = "landmark_cli", "tests", "benchmarks", "docs", "recipes"
NAMES = {path.name for folder in FOLDERS for path in (ROOT / folder).rglob("*.*")}
SCRIPTS_TEXT = "".join(path.read_text(encoding="utf-8") for path in SCRIPTS)
SOURCE = "".join(path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py")))


@each_text
def test_files_that_a_page_names_are_there(path, text):
    starts = path.parent, ROOT, PACKAGE, PACKAGE / "attention"
    # What a command shall write need not be there.
    places = PLACE.findall(re.sub(r"(?:--output|>) \S+|\S*NAME\.\w+", "", text))
    for place in {place.rstrip(".-") for place in places} - original.FILES:
        found = any((start / place).exists() for start in starts) if "/" in place else place in NAMES
        assert found, f"there is no {place}"
    for link in re.findall(r"\]\(([^)#]+)", text):
        assert "://" in link or (path.parent / link).exists(), f"there is no {link}"
    named = [words[words.index("--recipe") + 1] for words in calls_of(text) if "--recipe" in words[:-1]]
    for recipe in named + re.findall(r"recipe `([\w-]+/[\w-]+)`", text):
        assert recipe.startswith("runs/") or (ROOT / "recipes" / f"{recipe}.yaml").exists(), f"no recipe {recipe}"


@pytest.mark.parametrize("path", SHOWN, ids=lambda path: path.name)
def test_headings_that_a_page_links_to_are_there(path):
    for page, anchor in LINK.findall(text_of(path)):
        target = path.parent / page if page else path
        assert target.suffix != ".md" or anchor in headings_of(text_of(target)), f"{page} has no heading #{anchor}"


def test_every_page_is_linked_to_from_the_readme():
    linked = re.findall(r"\]\(([\w./-]+\.md)", text_of(ROOT / "README.md"))
    assert {(ROOT / page).resolve() for page in linked} >= {*SHOWN} - {ROOT / "README.md"}


IMPORTS = {
    f"{path.name}: {module} {names}": (module, names)
    for path in SHOWN
    for module, names in re.findall(r"from (landmark_cli[\w.]*) import ([\w, ]+)", text_of(path))
}


@pytest.mark.parametrize("module, names", IMPORTS.values(), ids=IMPORTS)
def test_what_a_page_imports_is_there(module, names):
    found = importlib.import_module(module)
    assert all(hasattr(found, name) for name in names.split(", "))


def test_headings_are_linked_to():
    assert sum(len(LINK.findall(text_of(path))) for path in SHOWN) > 5
    text = "# A *b*, `c_d`\n## [E](f.md)\n```\n# no heading\n```\n## E\n"
    assert headings_of(text) == ["a-b-c_d", "e", "e-1"]


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
    for code in lines_of(text) + spans_of(text):
        if script := re.match(r"\s*python (benchmarks/\w+\.py) (.*)", re.sub(r"\s#.*", "", code)):
            takes = (ROOT / script[1]).read_text(encoding="utf-8")
            assert all(f'"{name}"' in takes for name in re.findall(r"(?<!\S)--[\w-]+", script[2])), code
    make = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = {
        target
        for code in lines_of(text) + spans_of(text)
        for target in re.findall(r"^\s*(?:\$ )?make ([a-z][a-z0-9-]*)", code)
    }
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
        names |= {span for span in lines_of(text) + spans_of(text) if re.fullmatch(r"[A-Za-z_]\w+", span)}
    missing = {name for name in names if not re.search(rf"\b{name}\b", SOURCE)}
    assert not missing
