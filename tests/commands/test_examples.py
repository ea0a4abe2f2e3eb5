"""The examples of docstrings and of the pages on Python and transformers run, in a workplace of the commands."""

import doctest
import re
from pathlib import Path

import pytest

import landmark_cli

DOCS = Path(__file__).parents[2] / "docs"
WITHOUT = {"LandmarkError", "Generation"}


@pytest.mark.parametrize("name", landmark_cli.__all__)
def test_examples_of_docstrings(name, workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    value = getattr(landmark_cli, name)
    assert value.__doc__
    found = doctest.DocTestFinder(recurse=False).find(value, name, globs={"landmark_cli": landmark_cli})
    assert sum(len(test.examples) for test in found) > 0 or name in WITHOUT
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert not sum(runner.run(test).failed for test in found)


@pytest.mark.parametrize("page", ["python.md", "transformers.md"])
def test_examples_of_a_page(page, workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) > 3
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, page, "exec"), names)
