"""The `landmark` command: which subcommands there are, and what becomes of what is typed.

Help that shows commands shows names and summaries; a command's options are built when that command is wanted, which
also imports its module. So nothing here imports what only work needs.
"""

from __future__ import annotations

import functools
import gc
import io
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from shutil import get_terminal_size
from typing import Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from landmark_cli import __version__, console, failures, launch
from landmark_cli.commands import COMMANDS, GROUPS, Command, Work
from landmark_cli.errors import LandmarkError
from landmark_cli.interrupts import Interrupted, end_on_signals

ABOUT = "Landmark attention: from raw text to a trained model that reads inputs of any length."
COMMON = "Common"
TYPERS = ("help", "install_completion", "show_completion")
LOOK = {"rich_markup_mode": "rich"}


def build_app(commands: Iterable[Command], begin: Callable[[Work, Any], None] | None = None) -> typer.Typer:
    """The Typer application of these commands.

    begin: what is done with a command's function and its options; by default the function is called.
    """
    commands = list(commands)
    shortest = {command.words: _shortest_example(command.examples) for command in commands}
    one_each: dict[str, str] = {}
    for words, example in shortest.items():
        one_each.setdefault(words.split()[0], example)
    begin = begin or (lambda run, options: run(options))
    full = {command.words: functools.partial(_with_options, command, begin) for command in commands}
    app = _group(ABOUT, "\n".join(one_each.values()), full)
    app.callback()(_root)
    groups: dict[str, typer.Typer] = {}
    for command in commands:
        group, _, name = command.words.rpartition(" ")
        if group and group not in groups:
            inside = [words for words in full if words.startswith(f"{group} ")]
            of_group = {words.removeprefix(f"{group} "): full[words] for words in inside}
            groups[group] = _group(GROUPS[group], "\n".join(shortest[words] for words in inside), of_group)
            app.add_typer(groups[group], name=group)
        parent = groups[group] if group else app
        parent.command(name, help=escape(command.summary))(_summary_only)
    return app


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `landmark` with these arguments (sys.argv's without any), print what goes wrong, and exit."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    _prepare_streams("--quiet" in arguments)
    options = None
    try:
        with console.of_one_command("--quiet" in arguments), launch.command(arguments), end_on_signals() as asked:
            launch.hear_of_launchers_end()
            try:
                run, options = _parse(arguments)
            except SystemExit:
                if asked:
                    # Typer ends without a word, and takes every signal for Ctrl-C.
                    raise Interrupted(asked.signal) from None
                raise
            gc.enable()
            run(options)
            console.write_out("")
    except SystemExit:
        raise
    except BaseException as error:
        sys.exit(failures.tell(error, options, debug="--debug" in arguments))
    sys.exit(0)


def _parse(arguments: Sequence[str]) -> tuple[Work, Any]:
    """The function and the options that a command line means; help, version and wrong use end the program here.

    The work itself is done outside of Typer, which takes some exceptions for its own: an EOFError for the end of what
    is typed at a prompt, an interrupt and a broken pipe for something to be silent about.
    """
    chosen: list[tuple[Work, Any]] = []
    app = build_app(COMMANDS, lambda run, options: chosen.append((run, options)))
    with ExitStack() as stack:
        if not console.is_first_on_machine():
            # Every process of a launch finds the same in its command line; one of them says it.
            stack.enter_context(redirect_stdout(io.StringIO()))
            stack.enter_context(redirect_stderr(io.StringIO()))
        try:
            app(args=arguments, prog_name="landmark")
        except SystemExit as end:
            if not chosen:
                if not end.code:
                    console.write_out("")
                raise
        except OSError as error:
            # Help is all that is written here; files that options name are read by those who say what fails.
            raise LandmarkError(f"standard output cannot be written: {error.strerror or error}") from error
    return chosen[0]


def _prepare_streams(quiet: bool) -> None:
    """Let streams that are closed swallow what is printed, and print any text: a path may hold bytes of no encoding."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    if quiet or not sys.stderr.isatty():
        # transformers' own bars are for a terminal; in a log they would be line after line.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _group(help: str, examples: str, full: Mapping[str, Callable[[], TyperCommand]]) -> typer.Typer:
    """A group whose commands have a summary and no options until one is wanted; `full` then makes that one."""

    class Group(TyperGroup):
        def resolve_command(self, context: typer.Context, arguments: list[str]) -> tuple:
            name, command, rest = super().resolve_command(context, arguments)
            return name, full[name]() if name in full else command, rest

        def format_help(self, context: typer.Context, formatter: Any) -> None:
            # As wide as what Typer prints around it.
            self.epilog = escape("\n".join(["Examples:", *wrapped(examples, get_terminal_size().columns - 2)]))
            super().format_help(context, formatter)

    return typer.Typer(
        cls=Group,
        help=help,
        add_completion=True,
        no_args_is_help=True,
        # A value for Typer's own options keeps it from importing pydantic to convert none, a quarter of the time of any
        # help.
        context_settings={"help_option_names": ["--help", "-h"], "default_map": dict.fromkeys(TYPERS, False)},
        **LOOK,
    )


def _with_options(command: Command, begin: Callable[[Work, Any], None]) -> TyperCommand:
    """A command with all its options and its whole help."""
    from landmark_cli.signature import callback_of

    options_class, run = command.load()
    name = command.words.split()[-1]

    class WithHelp(TyperCommand):
        def format_help(self, context: typer.Context, formatter: Any) -> None:
            from landmark_cli.help import show_help

            show_help(context, options_class, COMMON, functools.partial(wrapped, command.examples))

    alone = typer.Typer(add_completion=False, **LOOK)
    alone.command(name, cls=WithHelp)(
        callback_of(command.words, options_class, functools.partial(begin, run), FLAGS, panel=COMMON)
    )
    return get_command(alone)


def _summary_only() -> None:
    """Stands for a command's work where only its name and summary are shown."""


def wrapped(examples: str, width: int) -> Iterator[str]:
    """Commands, one a line, in lines of at most so many characters: a longer one goes on in the next line, as a shell
    takes it. They are broken in front of options."""
    for example in examples.strip().splitlines():
        line = ""
        for part in re.split(r" (?=--)", example.strip()):
            if line and len(f"{line} {part} \\") > width:
                yield f"{line} \\"
                line = f"    {part}"
            else:
                line = f"{line} {part}" if line else part
        yield line


def _shortest_example(examples: str) -> str:
    return min((line for line in map(str.strip, examples.splitlines()) if line.startswith("landmark ")), key=len)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"landmark {__version__}")
        raise typer.Exit()


Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel=COMMON)]
Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet",
        help="Say nothing but results, warnings and errors: no messages, no progress.",
        rich_help_panel=COMMON,
    ),
]
FLAGS = {"quiet": Quiet, "debug": Debug}
Version = Annotated[bool, typer.Option("--version", help="Show the version.", is_eager=True, callback=_show_version)]


def _root(version: Version = False, quiet: Quiet = False, debug: Debug = False) -> None:
    pass
