"""docs/from-the-original.md tells of every script and flag of the authors' project, and why one is not here."""

import re

import pytest

from tests.original import SCRIPTS
from tests.pages import ROOT, text_of

PAGE = text_of(ROOT / "docs" / "from-the-original.md")
# What stands in the first column of a table, with what is said of it.
ROWS = [[cell.strip() for cell in row.split("|")[1:-1]] for row in re.findall(r"^\| `.*$", PAGE, re.MULTILINE)]
SECTIONS = {
    "main.py": "lm_benchmark/main.py",
    "eval.py": "lm_benchmark/eval.py",
    "train.py": "llama/train.py",
    "weight_diff.py": "llama/weight_diff.py",
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_is_told_of(script):
    assert any(cells[0] == f"`{script}`" and cells[1] for cells in ROWS)


@pytest.mark.parametrize("name, script", SECTIONS.items())
def test_every_flag_is_told_of_where_its_script_is(name, script):
    section = re.search(rf"^## [^\n]*`{name}`\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)[1]
    told = {
        flag for row in re.findall(r"^\| (`--.*?) \|", section, re.MULTILINE) for flag in re.findall("--[a-z]\\w*", row)
    }
    assert told == set(SCRIPTS[script])


def test_what_has_no_counterpart_has_a_reason():
    flags = [cells for cells in ROWS if cells[0].startswith("`--")]
    assert len(flags) > 50 and sum(not cells[1] for cells in flags) > 10
    assert not [cells[0] for cells in flags if not cells[1] and not cells[2]]
