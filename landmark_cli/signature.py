"""How an options dataclass becomes a command of Typer: its fields are the parameters, its docstring the help."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import MISSING
from typing import Annotated, Any

import typer
from rich.markup import escape

from landmark_cli.console import info
from landmark_cli.options import KINDS, LONGEST, Setting, build, load_recipe, recipe_names, settings_of


def callback_of(
    words: str, options_class: type, run: Callable[[Any], None], flags: Mapping[str, Any], panel: str
) -> Callable[..., None]:
    """The function that Typer makes a command of: its signature is the dataclass's fields, `--recipe` and the flags.

    words: the command, as a recipe names it. run: gets the options object. flags: what every command has, by name, with
    Typer's annotations. panel: the heading that `--recipe` stands under.
    """
    settings = settings_of(options_class)
    found_by = getattr(options_class, "resumed_recipe", None)
    asks = tuple(inspect.signature(found_by).parameters) if found_by else ()

    def use_recipe(context: typer.Context, parameter: typer.CallbackParam, value: Any) -> Any:
        """Called for `--recipe` and for what `resumed_recipe` takes, before any other option is looked at; those that
        are given come first."""
        given = context.meta.setdefault(f"recipe of {words}", {})
        given[parameter.name] = value
        if context.resilient_parsing:
            return value
        recipe = value if parameter.name == "recipe" else None
        if found_by and given.keys() == {"recipe", *asks} and given["recipe"] is None:
            recipe = found_by(**{name: given[name] for name in asks})
            if recipe is not None:
                info(f"with the options of {recipe}, beside those that are given")
        if recipe is not None:
            values = load_recipe(recipe, options_class, words)
            context.default_map = {name: _as_text(settings[name], value) for name, value in values.items()}
        return value

    def callback(**values: Any) -> None:
        run(build(options_class, {name: values[name] for name in settings}))

    eager: dict[str, Any] = {"is_eager": True, "callback": use_recipe}
    recipe = typer.Option(
        "--recipe",
        help="Take the defaults from a recipe: a shipped one's name or a YAML file.",
        metavar="<name|path>",
        autocompletion=lambda: recipe_names(words),
        rich_help_panel=panel,
        **eager,
    )
    parameters = [_parameter(setting, **eager if name in asks else {}) for name, setting in settings.items()]
    parameters.append(_keyword("recipe", Annotated[str | None, recipe], None))
    parameters += [_keyword(name, annotation, False) for name, annotation in flags.items()]
    callback.__signature__ = inspect.Signature(parameters)
    callback.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    callback.__doc__ = escape("\n\n".join(paragraphs(options_class)))
    return callback


def paragraphs(options_class: type) -> list[str]:
    """The paragraphs of a class's docstring, each in one line."""
    return [" ".join(paragraph.split()) for paragraph in (inspect.getdoc(options_class) or "").split("\n\n")]


def _parameter(setting: Setting, **early: Any) -> inspect.Parameter:
    """One field as Typer's: flags as they are, all else as text, which `build` converts the way it does a recipe's.
    early: what has Typer look at it before others."""
    about = setting.metadata
    common = {
        "help": escape(about["help"]),
        "min": about["min"],
        "max": about["max"] if setting.bounds[1] < LONGEST else None,
        "rich_help_panel": about["panel"],
        **early,
    }
    if setting.choices:
        common["autocompletion"] = lambda: list(setting.choices)
    kind: Any = bool if setting.kind is bool else str
    kind = list[kind] if setting.many else kind
    default = setting.default
    default = inspect.Parameter.empty if default is MISSING else _as_text(setting, default, named_none=False)
    if about["positional"]:
        typed = typer.Argument(metavar=about["metavar"], **common)
    else:
        typed = typer.Option(*_names(setting), metavar=metavar_of(setting), **common)
    return _keyword(setting.name, Annotated[kind | None, typed], default)


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


def _names(setting: Setting) -> tuple[str, ...]:
    names = setting.metadata["names"] or (f"--{setting.key}",)
    if setting.kind is not bool or not setting.metadata["saved"]:
        return names
    return tuple(f"{name}/--no-{name[2:]}" if name.startswith("--") else name for name in names)


def metavar_of(setting: Setting) -> str | None:
    """What help and usage show in place of an option's value; None where it takes none."""
    if setting.metadata["metavar"] or setting.kind is bool:
        return setting.metadata["metavar"]
    return f"<{'|'.join(setting.choices) or KINDS[setting.kind]}>" + "..." * setting.many


def _as_text(setting: Setting, value: Any, named_none: bool = True) -> Any:
    """A value in the form that Typer takes from the command line, where None has a name only for some types."""
    if isinstance(value, bool):
        return value
    if value is None:
        return "none" if named_none and setting.none_has_a_name else None
    return [str(item) for item in value] if setting.many else str(value)
