"""Writes the reference of docs/python.md from the docstrings of what programs may build on.

    python docs/python.py

Run it after a docstring or a signature of `landmark_cli.__all__`, or of a command's function, has changed; a test fails
while the page is not what they say.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import landmark_cli
from landmark_cli.commands import COMMANDS
from landmark_cli.options import Options, settings_of

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "python.md"
BEGIN, END = "<!-- made by docs/python.py -->", "<!-- end -->"
WIDTH = 100
STARS = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
# A method that does what one above it is said to do, and perhaps says more.
AS = re.compile(r"As (\w+)\.(\w+)[.;:]?\s*", re.DOTALL)


def main() -> None:
    """Write the reference into the page."""
    PAGE.write_text(page(), encoding="utf-8")


def page() -> str:
    """The page with the reference as it should be."""
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    return f"{before}{BEGIN}\n\n{reference()}\n\n{END}{rest.split(END)[1]}"


def reference() -> str:
    """What every public name is, and every command as a function."""
    parts = [part for name in landmark_cli.__all__ for part in public(name, getattr(landmark_cli, name))]
    parts.append("### The commands' functions")
    parts += [part for command in COMMANDS for part in function_of(command)]
    return "\n\n".join(parts)


def public(name: str, value: Any) -> Iterator[str]:
    """One name of the package: its heading, its signature, what its docstring says, and a class's methods."""
    yield f"### landmark_cli.{name}"
    is_options = inspect.isclass(value) and issubclass(value, Options)
    if not is_options and not (inspect.isclass(value) and issubclass(value, BaseException)):
        yield code(signature_of(name, value))
    yield markdown(inspect.getdoc(value))
    if is_options:
        yield "\n".join(
            f"- `{setting.name}` ({default_of(setting)}): {setting.metadata['help']}" for setting in fields(value)
        )
    if inspect.isclass(value):
        for method in methods_of(value):
            yield code(signature_of(f"{name}.{method}", getattr(value, method)))
            yield markdown(doc_of(value, method))


def function_of(command: Any) -> Iterator[str]:
    """A command's options and its function."""
    options_class, run = command.load()
    yield code(
        f"# landmark {command.words}\n"
        f"from {options_class.__module__} import {options_class.__name__}, {run.__name__}\n\n"
        f"{signature_of(run.__name__, run)}"
    )
    yield markdown(inspect.getdoc(run))


def methods_of(value: type) -> list[str]:
    """The public methods of a class that this package defines, those of its bases first."""
    found: dict[str, None] = {}
    for owner in reversed(value.__mro__):
        if owner.__module__.startswith("landmark_cli") and not issubclass(Options, owner):
            of_class = (name for name, held in vars(owner).items() if inspect.isfunction(inspect.unwrap(held)))
            found |= dict.fromkeys(name for name in of_class if not name.startswith("_"))
    return list(found)


def doc_of(value: type, method: str) -> str:
    """A method's docstring, with that of the one that it says it is as."""
    text = inspect.getdoc(getattr(value, method)) or ""
    owners = {owner.__name__: owner for owner in value.__mro__}
    said = AS.match(text)
    if said is None or said[1] not in owners:
        return text
    more = text[said.end() :]
    return f"{inspect.getdoc(getattr(owners[said[1]], said[2]))}\n\n{more[:1].upper()}{more[1:]}".strip()


def signature_of(name: str, value: Any) -> str:
    """How a function is called, in lines that fit a page."""
    signature = inspect.signature(value)
    parameters, star = [], False
    for parameter in signature.parameters.values():
        if parameter.name == "self":
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not star:
            parameters.append("*")
        star |= parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
        text = STARS.get(parameter.kind, "") + parameter.name
        if parameter.annotation is not parameter.empty:
            text += f": {parameter.annotation}"
        if parameter.default is not parameter.empty:
            text += f" = {parameter.default!r}"
        parameters.append(text)
    returns = "" if inspect.isclass(value) else f" -> {signature.return_annotation}"
    line = f"{name}({', '.join(parameters)}){returns}"
    if len(line) <= WIDTH:
        return line
    return f"{name}(\n{''.join(f'    {parameter},{chr(10)}' for parameter in parameters)}){returns}"


def fields(options_class: type) -> list[Any]:
    """The settings of a dataclass of options."""
    return list(settings_of(options_class).values())


def default_of(setting: Any) -> str:
    """A setting's values and its default, in words."""
    kind = " or ".join(f'"{choice}"' for choice in setting.choices) or setting.kind.__name__
    if setting.many:
        kind = f"several of {kind}"
    return kind if setting.default in (None, dataclasses.MISSING) else f"{kind}; {setting.default!r}"


def code(text: str) -> str:
    """Text as a block that is shown and not run."""
    return f"```text\n{text}\n```"


def markdown(docstring: str | None) -> str:
    """A docstring as Markdown: sections of arguments and errors as lists, examples as they would be typed."""
    made = [of_paragraph(paragraph) for paragraph in (docstring or "").split("\n\n")]
    return "\n\n".join(made)


def of_paragraph(paragraph: str) -> str:
    """One paragraph of a docstring."""
    if paragraph.startswith(">>>"):
        return f"```pycon\n{paragraph}\n```"
    paragraph = paragraph.replace("``", "`")
    first, _, rest = paragraph.partition("\n")
    if first in ("Args:", "Raises:", "Returns:"):
        items = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", rest, re.MULTILINE)
        return f"{first}\n\n" + "\n".join(f"- `{name}`: {' '.join(text.split())}" for name, text in items)
    return paragraph


if __name__ == "__main__":
    main()
