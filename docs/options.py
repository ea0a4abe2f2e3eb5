"""Writes docs/options.md, recipes/schema.json and the helps in tests/help from the options dataclasses.

    python docs/options.py

Run it after an option has changed; a test fails while these files are not what the dataclasses say. An editor that
knows JSON Schema checks and completes a recipe that begins with the line

    # yaml-language-server: $schema=../schema.json
"""

from __future__ import annotations

import io
import json
import os
import re
from contextlib import redirect_stdout, suppress
from dataclasses import MISSING
from pathlib import Path
from typing import Any

from landmark_cli.cli import build_app
from landmark_cli.commands import COMMANDS, GROUPS
from landmark_cli.options import KINDS, LONGEST, RECIPE_FORMAT, Setting, settings_of

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "options.md"
SCHEMA = ROOT / "recipes" / "schema.json"
HELPS = ROOT / "tests" / "help"
WITH_HELP = ("", *GROUPS, *(command.words for command in COMMANDS))
WIDTHS = (80, 120)
TYPES = {bool: "boolean", int: "integer", float: "number"}


def main() -> None:
    """Write all files."""
    PAGE.write_text(page(), encoding="utf-8")
    SCHEMA.write_text(schema(), encoding="utf-8")
    HELPS.mkdir(exist_ok=True)
    shown = {help_file(words, width): show_help(words, width) for words in WITH_HELP for width in WIDTHS}
    for path in set(HELPS.glob("*.txt")) - shown.keys():
        path.unlink()
    for path, text in shown.items():
        path.write_text(text, encoding="utf-8")


def help_file(words: str, width: int) -> Path:
    """Where the help of a command, or of a group of commands, is kept as a terminal of a width shows it."""
    return HELPS / f"{'-'.join(['landmark', *words.split()])}.{width}.txt"


def show_help(words: str, width: int) -> str:
    """What `--help` prints on a terminal of so many columns, without colours."""
    before, printed = os.environ.get("COLUMNS"), io.StringIO()
    os.environ["COLUMNS"] = str(width)
    try:
        with redirect_stdout(printed), suppress(SystemExit):
            build_app(COMMANDS)([*words.split(), "--help"], prog_name="landmark")
    finally:
        os.environ.pop("COLUMNS")
        os.environ.update({} if before is None else {"COLUMNS": before})
    lines = re.sub(r"\x1b\[[\d;]*m", "", printed.getvalue()).strip("\n").splitlines()
    return "".join(f"{line.rstrip()}\n" for line in lines)


def page() -> str:
    """The page of all options, one table for each command and panel of its help."""
    parts = [
        "# Options and recipe keys",
        "Made by `python docs/options.py` from the options dataclasses. An option's name without its dashes is its key"
        " in a recipe and, with underscores, its field in Python; options marked *not in a recipe* belong to one run or"
        " to whoever types the command. A recipe has two more keys: `command`, and in what a run saved, `format`.",
    ]
    for command in COMMANDS:
        options_class = command.options_class
        settings = settings_of(options_class)
        parts.append(f"## landmark {command.words}")
        parts.append(f"`{options_class.__module__}.{options_class.__name__}`")
        panels = dict.fromkeys(setting.metadata["panel"] for setting in settings.values())
        for panel in sorted(panels, key=lambda panel: panel is not None):
            rows = [row(s) for s in settings.values() if s.metadata["panel"] == panel]
            parts.append(
                "\n".join(
                    [
                        f"| {panel or 'Arguments and options'} | values | default | |",
                        "|---|---|---|---|",
                        *rows,
                    ]
                )
            )
    return "\n\n".join(parts) + "\n"


def row(setting: Setting) -> str:
    """One option as a line of its table."""
    notes = setting.metadata["help"].replace("|", "\\|")
    if not saved_in_recipe(setting):
        notes += " *Not in a recipe.*"
    name = setting.label if setting.metadata["positional"] else " ".join(names(setting))
    return f"| `{name}` | {values(setting)} | {default(setting)} | {notes} |"


def names(setting: Setting) -> tuple[str, ...]:
    """What may be typed on the command line."""
    return setting.metadata["names"] or (f"--{setting.key}",)


def values(setting: Setting) -> str:
    """What an option takes: its type or its words, its bounds, and whether there may be several."""
    text = ", ".join(f"`{choice}`" for choice in setting.choices) or KINDS[setting.kind]
    low, high = setting.metadata["min"], setting.metadata["max"]
    if low is not None:
        text += f" from {low:g}"
    if high is not None and high < LONGEST:
        text += f" to {high:g}"
    return text + ("; several" if setting.many else "")


def default(setting: Setting) -> str:
    """An option's default, or that it must be given."""
    value = setting.default
    if value is MISSING:
        return "*required*"
    if isinstance(value, bool):
        return "on" if value else "off"
    if value is None:
        return "-"
    return f"`{','.join(map(str, value))}`" if setting.many else f"`{value}`"


def saved_in_recipe(setting: Setting) -> bool:
    """Whether the option is a key that a recipe is meant to have."""
    return setting.metadata["saved"] and setting.metadata["in_recipe"]


def schema() -> str:
    """The JSON schema of recipes: `command` says which command's keys there may be."""
    commands = {command.words: command.options_class for command in COMMANDS}
    rules = [
        {
            "if": {"properties": {"command": {"const": words}}, "required": ["command"]},
            "then": {
                "properties": {
                    "command": True,
                    "format": True,
                    **{s.key: json_type(s) for s in recipe_settings(options_class)},
                },
                "additionalProperties": False,
            },
        }
        for words, options_class in commands.items()
    ]
    content = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A recipe of the landmark command",
        "type": "object",
        "properties": {"command": {"enum": list(commands)}, "format": {"const": RECIPE_FORMAT}},
        "required": ["command"],
        "allOf": rules,
    }
    return json.dumps(content, indent=2) + "\n"


def recipe_settings(options_class: type) -> list[Setting]:
    """The settings of a command that a recipe may set."""
    return [setting for setting in settings_of(options_class).values() if setting.metadata["in_recipe"]]


def json_type(setting: Setting) -> dict[str, Any]:
    """What a recipe may give for a setting."""
    one: dict[str, Any] = {"enum": list(setting.choices)} if setting.choices else {}
    if not one:
        one["type"] = TYPES.get(setting.kind, "string")
    for bound, keyword in ((setting.metadata["min"], "minimum"), (setting.metadata["max"], "maximum")):
        if bound is not None and setting.kind in (int, float):
            one[keyword] = bound
    allowed = [one]
    if setting.many:
        allowed.append({"type": "array", "items": one})
        if setting.kind in (int, float):
            allowed.append({"type": "string", "description": "numbers with commas between"})
    if setting.optional:
        allowed.append({"type": "null"})
        if setting.none_has_a_name:
            allowed.append({"const": "none"})
    return {"description": setting.metadata["help"], **(allowed[0] if len(allowed) == 1 else {"anyOf": allowed})}


if __name__ == "__main__":
    main()
