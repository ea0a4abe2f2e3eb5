"""What is shipped: the wheel, the recipes, the pinned versions."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from landmark_cli import __version__
from landmark_cli.commands import COMMANDS
from landmark_cli.options import load_recipe, recipe_names, recipes_folder
from tests.pages import CALL, TEXTS, lines_of, text_of

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
RECIPES = [(command, name) for command in COMMANDS for name in recipe_names(command.words)]


def tracked(*folders: str) -> list[str]:
    listed = subprocess.run(["git", "ls-files", *folders], cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    return next(folder.glob("*.whl"))


def test_wheel_holds_the_package_with_its_assets_and_the_recipes(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    wanted = {*tracked("landmark_cli"), *(f"landmark_cli/{name}" for name in tracked("recipes"))}
    assert wanted - held == set()
    assert {name.split("/")[0] for name in held if ".dist-info/" not in name} == {"landmark_cli"}
    assert not [name for name in held if name.endswith(".pyc")]


def test_installed_wheel_finds_its_recipes(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    script = "from landmark_cli import options; print(options.recipes_folder()); print(options.recipe_names('train'))"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); {script}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    folder, names = done.stdout.splitlines()
    assert folder == str(tmp_path / "site" / "landmark_cli" / "recipes")
    assert names == str(recipe_names("train"))


def test_there_are_recipes_of_the_paper_and_the_demo():
    assert {"demo/tiny", "pg19/baseline", "pg19/landmark"} <= set(recipe_names("train"))


@pytest.mark.parametrize(("command", "name"), RECIPES, ids=[name for _, name in RECIPES])
def test_every_recipe_fits_its_command(command, name):
    assert load_recipe(name, command.options_class, command.words)


def test_every_recipe_names_a_command_there_is():
    commands = {command.words for command in COMMANDS}
    for path in recipes_folder().rglob("*.yaml"):
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert content.get("command") in {None, *commands}, path


def test_every_requirement_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["dev"]
    requirements = [Requirement(text) for text in wanted]
    names = {canonicalize_name(needed.name) for needed in requirements if not needed.marker or needed.marker.evaluate()}
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = dict(re.fullmatch(r"([\w.-]+)==([\w.]+)(?: ; .*)?", line).groups() for line in lines)
    assert names - set(map(canonicalize_name, pins)) == set()
    assert pins["torch"] == "2.13.0"


def test_readme_lists_every_command():
    rows = re.findall(r"^\| `landmark ([a-z -]+)` \|", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    assert sorted(rows) == sorted(command.words for command in COMMANDS)


def test_readme_has_the_command_before_it_is_typed():
    """What `make install` made is no command until the environment is active."""
    code = [line.strip() for line in lines_of(text_of(ROOT / "README.md"))]
    active = next(index for index, line in enumerate(code) if line.startswith(". .venv/bin/activate"))
    typed = [index for index, line in enumerate(code) if CALL.match(line)]
    assert code[active - 1].startswith("make install") and active < min(typed)


def test_extras_that_pages_name_are_there():
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {
        extra.strip()
        for _, text in TEXTS.values()
        for extras in re.findall(r"(?:pip install|landmark-cli)[^\n]*?\[([a-z, -]+)\]'", text)
        for extra in extras.split(",")
    }
    assert named >= {"lora", "serve"} and named <= set(known)
    listed = re.search(r"^Extras: (.*?)\.$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert set(re.findall(r"`([a-z-]+)`", listed[1])) == set(known) - {"dev"}


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation) and citation["version"] == __version__
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()
    paper = citation["preferred-citation"]
    bibtex = re.search(r"^```bibtex\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)[1]
    authors = " and ".join(f"{one['family-names']}, {one['given-names']}" for one in paper["authors"])
    for said in (paper["title"], authors, paper["journal"], str(paper["year"])):
        assert f"{{{said}}}" in bibtex


def test_launcher_is_four_lines():
    assert len((ROOT / "landmark").read_text().splitlines()) == 4
