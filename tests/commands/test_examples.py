"""The examples of docstrings and of docs/python.md run, in the workplace of the commands' tests."""

import doctest
import re
from pathlib import Path

import pytest

import landmark_cli

PAGE = Path(__file__).parents[2] / "docs" / "python.md"
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


def test_examples_of_the_page(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) > 3
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
