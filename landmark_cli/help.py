"""A command's help, in which no name is cut, however narrow the terminal is.

Typer's own help has columns for names, their negations, short names and types, and cuts names where these do not fit
into 80 characters. Here an option's names and what it takes stand one above another in one column, what it does in
another. Examples go on in the next line with a backslash, so that they can be copied.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from landmark_cli.options import LONGEST, Setting, settings_of
from landmark_cli.signature import metavar_of, paragraphs

if TYPE_CHECKING:
    from typer.core import TyperArgument, TyperOption

ARGUMENTS, OPTIONS = "Arguments", "Options"
# The column of names: a name and what it takes stand in one line where they fit into it.
NAMES_WIDTH = 30
NAME, NEGATION, TAKES, ASIDE = "bold cyan", "bold magenta", "yellow", "dim"
DEFAULT = re.compile(r"\s*\[default: [^\]]*\]$")


def show_help(
    context: typer.Context, options_class: type, common: str, examples: Callable[[int], Iterable[str]]
) -> None:
    """Print the help of the command that the context is of.

    options_class: what its options are made of. common: the title of what every command has. examples: the lines of its
    examples, for a number of characters.
    """
    console = Console(markup=False, emoji=False, highlight=False)
    console.print(Padding(Text(context.command.get_usage(context), style="bold"), 1))
    for number, paragraph in enumerate(paragraphs(options_class)):
        console.print(Padding(Text(paragraph, style=ASIDE if number else ""), (0, 1, 1, 1)))
    for title, rows in panels(context, settings_of(options_class), common).items():
        table = Table.grid(padding=(0, 2), expand=True)
        table.add_column(no_wrap=True, width=NAMES_WIDTH)
        table.add_column(ratio=1, overflow="fold")
        for names, does in rows:
            table.add_row(names, does)
        console.print(Panel(table, title=title, title_align="left", border_style=ASIDE))
    console.print(Padding(Text("\n".join(["Examples:", *examples(console.width - 2)])), 1))


def panels(context: typer.Context, settings: dict[str, Setting], common: str) -> dict[str, list[tuple[Text, Text]]]:
    """By their titles, the rows of what can be given: its names, what it does. What has no panel comes first."""
    found: dict[str, list[tuple[Text, Text]]] = {ARGUMENTS: [], OPTIONS: []}
    for given in context.command.get_params(context):
        setting = settings.get(given.name)
        positional = setting is not None and setting.metadata["positional"]
        title = common if given.name == "help" else getattr(given, "rich_help_panel", None)
        title = title or (ARGUMENTS if positional else OPTIONS)
        row = Text("\n").join(names_of(given, setting)), does_of(context, given, setting)
        found.setdefault(title, []).append(row)
    return {title: rows for title, rows in found.items() if rows}


def names_of(given: TyperOption | TyperArgument, setting: Setting | None) -> Iterator[Text]:
    """The lines of the column of names: the names, what they take, and the names of the opposite."""
    positional = setting is not None and setting.metadata["positional"]
    # Long names first: those of --help come in any order.
    names = sorted(given.opts, key=lambda name: not name.startswith("--"))
    name = Text(setting.label if positional else ", ".join(names), style=NAME)
    takes = given.metavar if setting is None else metavar_of(setting)
    if takes and len(name) + 1 + len(takes) <= NAMES_WIDTH:
        yield name.append(f" {takes}", style=TAKES)
    else:
        yield name
        for line in broken(takes or "", NAMES_WIDTH - 2):
            yield Text(f"  {line}", style=TAKES)
    if given.secondary_opts:
        yield Text(", ".join(given.secondary_opts), style=NEGATION)


def does_of(context: typer.Context, given: TyperOption | TyperArgument, setting: Setting | None) -> Text:
    """What it does, between which bounds it may be, and what it is where it is not given."""
    does = given.help if setting is None else setting.metadata["help"]
    low, high = (None, None) if setting is None else (setting.metadata["min"], setting.metadata["max"])
    high = high if high is not None and high < LONGEST else None
    default, described = default_of(context, given), DEFAULT.search(does)
    default = f"[default: {default}]" if default else described and described[0].strip()
    text = Text(DEFAULT.sub("", does))
    if low is not None or high is not None:
        # A bound may be a float that is whole: 1e6.
        low, high = (int(x) if x is not None and x == int(x) else x for x in (low, high))
        text.append(f" [x>={low}]" if high is None else f" [{low}<=x<={high}]", style=TAKES)
    if default:
        text.append(f" {default}", style=ASIDE)
    if given.required:
        text.append(" [required]", style="red")
    return text


def default_of(context: typer.Context, given: TyperOption | TyperArgument) -> str:
    """The value that counts where none is given, a recipe's where there is one; empty where there is none to tell."""
    value: Any = context.lookup_default(given.name)
    value = given.get_default(context) if value is None else value
    if isinstance(value, bool):
        names = given.opts if value else given.secondary_opts
        return names[0].removeprefix("--") if names and given.secondary_opts else ""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)


def broken(takes: str, width: int) -> Iterator[str]:
    """The words that an option takes, in lines of at most so many characters where a word is no longer than that."""
    line = ""
    for word in re.findall(r"[^|]+\|?", takes):
        if line and len(line + word) > width:
            yield line
            line = ""
        line += word
    if line:
        yield line
