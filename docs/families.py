"""Writes the tables of docs/finetuning.md that say which decoders landmark attention fits, from the tests' small ones.

    python docs/families.py

Run it, where the package is, after a family or a refusal has been added to tests/models; a test fails while the page is
not what asking these models says.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedModel

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from landmark_cli.errors import LandmarkError  # noqa: E402
from landmark_cli.families import FAMILIES  # noqa: E402
from landmark_cli.models.support import check_config, check_model  # noqa: E402
from tests.models import families, test_support  # noqa: E402

PAGE = ROOT / "docs" / "finetuning.md"
BEGIN, END = "<!-- made by docs/families.py -->", "<!-- end -->"
TRAINED_LENGTH = 64
POSITIONS = {"halves": "half-split", "pairs": "adjacent pairs", "none": "none"}


def main() -> None:
    """Write the tables into the page."""
    PAGE.write_text(page(), encoding="utf-8")


def page() -> str:
    """The page with the tables as they should be."""
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n\n{fitting()}\n\n{refused()}\n\n{END}{after}"


def fitting() -> str:
    """The table of families that it fits: what small models of each have been asked, and answered."""
    rows: dict[str, list[set[str]]] = {}
    for name, settings in families.FAMILIES.values():
        model = families.random_decoder(getattr(transformers, name), settings)
        family = FAMILIES[model.config.model_type].name
        kinds = check_model(model, TRAINED_LENGTH, family)
        found = rows.setdefault(family, [set() for _ in range(4)])
        found[0].add("those with full attention" if any(kinds.local) else "all")
        found[1] |= {POSITIONS[turn] for turn in kinds.turns}
        found[2] |= {kind for kind in rope_types(model) if kind != "default"}
        found[3] |= {name for name, given in (("soft-capping", kinds.softcap), ("sinks", kinds.sinks)) if given}
    head = "| fits | layers with landmarks | positions | scaling tried | logits |"
    lines = [f"| {name} | {' | '.join(', '.join(sorted(part)) for part in found)} |" for name, found in rows.items()]
    return "\n".join([head, "|---|---|---|---|---|", *lines])


def refused() -> str:
    """The table of models that are refused, each with the reason that a user gets."""
    lines = []
    for what, (name, settings, _) in test_support.REFUSED.items():
        model = families.random_decoder(getattr(transformers, name), settings)
        known = FAMILIES.get(model.config.model_type)
        lines.append(f"| {known.name if known else name.removesuffix('Config')} | {what} | {reason(model)} |")
    return "\n".join(["| refused | | because |", "|---|---|---|", *lines])


def reason(model: PreTrainedModel) -> str:
    try:
        check_config(model.config, "it")
        check_model(model, 128, "it")
    except LandmarkError as error:
        return str(error).split(": ", 1)[1].split(". Models it can be given to")[0]
    raise AssertionError(f"{type(model).__name__} is not refused")


def rope_types(model: PreTrainedModel) -> set[str]:
    """How a model's angles are scaled."""
    parameters: dict[str, Any] = getattr(model.config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
    return {value.get("rope_type", "default") for value in nested}


if __name__ == "__main__":
    main()
