"""The pages that are made from the code are current, and what they say of recipes is true of those that are shipped."""

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

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
