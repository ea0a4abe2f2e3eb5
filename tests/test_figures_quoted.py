"""Figures that pages quote as measured stand in the tables that measurements wrote."""

import re

import pytest

from tests.pages import ROOT, SHOWN, text_of

SOURCES = [ROOT / "docs" / "results.md", *sorted((ROOT / "benchmarks" / "results").rglob("*.md"))]
NUMBER = re.compile(r"(?<![\w.,-])\d[\d,]*(?:\.\d+)?(?![\w.]*\d)")
MEASURED = {value for path in SOURCES for value in (float(n.replace(",", "")) for n in NUMBER.findall(text_of(path)))}


def quoted(text: str) -> list[str]:
    """The numbers in tables whose first column is headed as measured, that column left out."""
    rows, found = text.splitlines(), []
    for index, row in enumerate(rows):
        if row.startswith("| measured"):
            for below in rows[index + 2 :]:
                if not below.startswith("|"):
                    break
                found += [number for cell in below.split("|")[2:] for number in NUMBER.findall(cell)]
    return found


QUOTED = [(path.name, number) for path in SHOWN for number in quoted(text_of(path))]


@pytest.mark.parametrize("page", sorted({page for page, _ in QUOTED}))
def test_quoted_figures_were_measured(page):
    for number in (number for of_page, number in QUOTED if of_page == page):
        digits = len(number.partition(".")[2])
        value = float(number.replace(",", ""))
        # In a table's own unit, or in thousands of it.
        found = any(round(measured / unit, digits) == value for measured in MEASURED for unit in (1, 1000))
        assert found, f"no table of a measurement has {number}"


def test_there_are_quoted_figures():
    assert len(QUOTED) > 25
    assert quoted("| measured, x | a |\n|---|---|\n| 4096 tokens | 51.5, 1,200 |\n\n| other | 3 |\n") == [
        "51.5",
        "1,200",
    ]
