"""The `landmark` command: which subcommands there are, and how an options dataclass becomes one."""

from __future__ import annotations

import functools
import inspect
import io
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from dataclasses import MISSING
from typing import Annotated, Any

import typer
from rich.markup import escape

from landmark_cli import __version__, console, failures, launch
from landmark_cli.commands import evaluate, finetune, generate, prepare, study, train, weight_diff
from landmark_cli.interrupts import end_on_signals
from landmark_cli.options import KINDS, LONGEST, Setting, build, load_recipe, settings_of

Work = Callable[[Any], None]
Command = tuple[str, type, Work, str]

# The words on the command line, the options dataclass, the function that does the work, the examples that end the help.
COMMANDS: list[Command] = [
    ("prepare", prepare.PrepareOptions, prepare.run, prepare.EXAMPLES),
    ("train", train.TrainOptions, train.run, train.EXAMPLES),
    ("finetune", finetune.FinetuneOptions, finetune.run, finetune.EXAMPLES),
    ("eval perplexity", evaluate.PerplexityOptions, evaluate.run_perplexity, evaluate.PERPLEXITY_EXAMPLES),
    ("eval study", study.StudyOptions, study.run, study.EXAMPLES),
    ("eval passkey", evaluate.PassKeyOptions, evaluate.run_passkey, evaluate.PASSKEY_EXAMPLES),
    ("generate", generate.GenerateOptions, generate.run, generate.EXAMPLES),
    ("weight-diff make", weight_diff.MakeOptions, weight_diff.run_make, weight_diff.MAKE_EXAMPLES),
    ("weight-diff recover", weight_diff.RecoverOptions, weight_diff.run_recover, weight_diff.RECOVER_EXAMPLES),
]

GROUPS = {
    "eval": "Measure a model on held-out text.",
    "weight-diff": "Publish a fine-tuned model as its difference from weights that may not be passed on.",
}

ABOUT = "Landmark attention: from raw text to a trained model that reads inputs of any length."


def build_app(commands: Iterable[Command], begin: Callable[[Work, Any], None] | None = None) -> typer.Typer:
    """The Typer application of these commands; a command of two words ("eval perplexity") stands in a group.

    begin: what is done with a command's function and its options; by default the function is called.
    """
    commands = list(commands)
    shortest = {words: _shortest_example(examples) for words, _, _, examples in commands}
    one_each: dict[str, str] = {}
    for words, example in shortest.items():
        one_each.setdefault(words.split()[0], example)
    app = _group(ABOUT, one_each.values())
    app.callback()(_root)
    groups: dict[str, typer.Typer] = {}
    for words, options_class, run, examples in commands:
        group, _, name = words.rpartition(" ")
        if group and group not in groups:
            inside = [example for words, example in shortest.items() if words.startswith(f"{group} ")]
            groups[group] = _group(GROUPS[group], inside)
            app.add_typer(groups[group], name=group)
        parent = groups[group] if group else app
        work = functools.partial(begin, run) if begin else run
        parent.command(name, epilog=_epilog(examples))(_callback(words, options_class, work))
    return app


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `landmark` with these arguments (sys.argv's without any), print what goes wrong, and exit."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    _prepare_streams()
    options = None
    try:
        with launch.command(arguments), end_on_signals():
            launch.hear_of_launchers_end()
            run, options = _parse(arguments)
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
        except SystemExit:
            if not chosen:
                raise
    return chosen[0]


def _prepare_streams() -> None:
    """Let streams that are closed swallow what is printed, and print any text: a path may hold bytes of no encoding."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    if not sys.stderr.isatty():
        # transformers' own bars are for a terminal; in a log they would be line after line.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _group(help: str, examples: Iterable[str]) -> typer.Typer:
    return typer.Typer(
        help=help,
        epilog=_epilog("\n".join(examples)),
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode="rich",
        # A value for "help" keeps Typer from importing pydantic to convert none, a quarter of the time of any help.
        context_settings={"help_option_names": ["--help", "-h"], "default_map": {"help": False}},
    )


def _epilog(examples: str) -> str:
    return "Examples:\n" + escape("\n".join(line.strip() for line in examples.strip().splitlines()))


def _shortest_example(examples: str) -> str:
    return min((line for line in map(str.strip, examples.splitlines()) if line.startswith("landmark ")), key=len)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"landmark {__version__}")
        raise typer.Exit()


Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel="Common")]
Version = Annotated[bool, typer.Option("--version", help="Show the version.", is_eager=True, callback=_show_version)]


def _root(version: Version = False, debug: Debug = False) -> None:
    pass


def _callback(words: str, options_class: type, run: Work) -> Callable[..., None]:
    """The function Typer sees: its signature is the dataclass's fields, `--recipe` and `--debug`."""
    settings = settings_of(options_class)

    def use_recipe(context: typer.Context, recipe: str | None) -> None:
        if recipe is not None and not context.resilient_parsing:
            values = load_recipe(recipe, options_class, words)
            context.default_map = {name: _as_text(settings[name], value) for name, value in values.items()}

    def callback(**values: Any) -> None:
        run(build(options_class, {name: values[name] for name in settings}))

    recipe = typer.Option(
        "--recipe",
        help="Take the defaults from a recipe: a shipped one's name or a YAML file.",
        metavar="<name|path>",
        is_eager=True,
        callback=use_recipe,
        rich_help_panel="Common",
    )
    parameters = [_parameter(setting) for setting in settings.values()]
    parameters += [_keyword("recipe", Annotated[str | None, recipe], None), _keyword("debug", Debug, False)]
    callback.__signature__ = inspect.Signature(parameters)
    callback.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    paragraphs = (inspect.getdoc(options_class) or "").split("\n\n")
    callback.__doc__ = escape("\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs))
    return callback


def _parameter(setting: Setting) -> inspect.Parameter:
    """One field as Typer's: flags as they are, all else as text, which `build` converts the way it does a recipe's."""
    about = setting.metadata
    common = {
        "help": escape(about["help"]),
        "min": about["min"],
        "max": about["max"] if setting.bounds[1] < LONGEST else None,
        "rich_help_panel": about["panel"],
    }
    kind: Any = bool if setting.kind is bool else str
    kind = list[kind] if setting.many else kind
    default = setting.default
    default = inspect.Parameter.empty if default is MISSING else _as_text(setting, default, named_none=False)
    if about["positional"]:
        info = typer.Argument(metavar=about["metavar"], **common)
    else:
        info = typer.Option(*_names(setting), metavar=about["metavar"] or _metavar(setting), **common)
    return _keyword(setting.name, Annotated[kind | None, info], default)


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


def _names(setting: Setting) -> tuple[str, ...]:
    names = setting.metadata["names"] or (f"--{setting.key}",)
    if setting.kind is not bool or not setting.metadata["saved"]:
        return names
    return tuple(f"{name}/--no-{name[2:]}" if name.startswith("--") else name for name in names)


def _metavar(setting: Setting) -> str | None:
    if setting.kind is bool:
        return None
    return f"<{'|'.join(setting.choices) or KINDS[setting.kind]}>" + "..." * setting.many


def _as_text(setting: Setting, value: Any, named_none: bool = True) -> Any:
    """A value in the form that Typer takes from the command line, where None has a name only for some types."""
    if isinstance(value, bool):
        return value
    if value is None:
        return "none" if named_none and setting.none_has_a_name else None
    return [str(item) for item in value] if setting.many else str(value)
