"""A command's options: a dataclass is the only place where a name, a type, a default and a help text stand.

    @dataclass
    class GreetOptions(Options):
        "Greet somebody."
        name: str = option(help="Who to greet.", positional=True)
        times: int = option(1, help="How often.", min=1)

From the dataclass, which inherits `Options`, come the Typer command (`landmark_cli.signature`), the keys of a recipe
and the Python call `run(GreetOptions(name="you"))`. Types: bool, int, float, str, pathlib.Path and Literal of strings,
each as it is, as `X | None` or as `list[X]`.

A recipe is a YAML file (without aliases) of options for one command, `command: train` among its keys. On the command
line a recipe replaces the defaults, and an option given beside the recipe replaces the recipe's value. What a run saves
is a recipe too, and says `format: 2`. Where an option meant something else to the runs that saved recipes without a
format, or without the option, its dataclass has a static method `read_earlier(values, format)`, which gives the values
of such a recipe as they are meant today. Where a command line that names no recipe goes on with something that holds
one, its dataclass has a static method `resumed_recipe`, whose parameters are options by their names, as they were
given: it returns the recipe's path, or None.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import numbers
import os
import types
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from landmark_cli.errors import UsageError, shown
from landmark_cli.file_errors import writing
from landmark_cli.file_reading import read_text, read_yaml
from landmark_cli.file_writing import check_writable, write_whole

KINDS = {bool: "flag", int: "int", float: "float", str: "text", Path: "path"}
PACKAGE = Path(__file__).parent
# The bound of a number that declares none of its own: larger ones are mistakes, and their products overflow.
LARGEST = 10**9
RECIPE_FORMAT = 2
# In front of the checksum of what stands above it.
SEAL = "# sha256 of the lines above, by which a change is known: "
# Bounds of lengths, in tokens, and of seeds, which numpy takes too.
LONGEST = 2**24
LARGEST_SEED = 2**32 - 1


def option(
    default: Any = MISSING,
    *,
    help: str,
    panel: str | None = None,
    names: tuple[str, ...] = (),
    min: float | None = None,
    max: float | None = None,
    metavar: str | None = None,
    positional: bool = False,
    saved: bool = True,
    saves_memory: str = "",
    adapts: bool = False,
    in_recipe: bool = True,
    is_output: bool = False,
    may_replace: str = "",
) -> Any:
    """Declare one field of an options dataclass.

    default: the value, or a list (copied for each object); without one the option is required.
    panel: the heading that the option stands under in the help.
    names: the command-line names, where they differ from the field's: ("--top-k-blocks", "-k").
    min, max: bounds of a number, both included; without them LARGEST either way.
    metavar: what the help shows in place of the type.
    positional: an argument instead of an option.
    in_recipe: whether a recipe may set the option; False for what only whoever types the command can decide.
    is_output: whether the option names a file that the command writes at its end; "-" is standard output.
    may_replace: of such an option, the field that names files which are read and may be written over.
    saved: whether `save_recipe` writes the option; False for what belongs to one run only, such as `--resume`.
    saves_memory: how the option is given so that less memory is needed ("a smaller --batch-size"), if it can be.
    adapts: whether without such an option less is taken once memory has run out, so that to give it saves nothing more.
    """
    metadata = {
        "help": help,
        "panel": panel,
        "names": names,
        "min": min,
        "max": max,
        "metavar": metavar,
        "positional": positional,
        "saved": saved,
        "saves_memory": saves_memory,
        "adapts": adapts,
        "in_recipe": in_recipe,
        "is_output": is_output,
        "may_replace": may_replace,
    }
    if isinstance(default, list):
        return dataclasses.field(default_factory=functools.partial(list, default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Setting:
    """One field of an options dataclass, its type taken apart."""

    name: str
    kind: type
    choices: tuple[str, ...]
    optional: bool
    many: bool
    default: Any
    metadata: dict[str, Any]

    @property
    def key(self) -> str:
        """The name in a recipe and, behind two dashes, on the command line."""
        return next((name[2:] for name in self.metadata["names"] if name.startswith("--")), self.name.replace("_", "-"))

    @property
    def label(self) -> str:
        """How an error message calls it."""
        return self.key.upper() if self.metadata["positional"] else f"--{self.key}"

    @property
    def none_has_a_name(self) -> bool:
        """Whether the text "none" stands for None: only where that text could mean nothing else."""
        return self.optional and not self.many and (self.kind in (int, float) or bool(self.choices))

    @property
    def bounds(self) -> tuple[float, float]:
        """The smallest and the largest number it may be."""
        low, high = self.metadata["min"], self.metadata["max"]
        return -LARGEST if low is None else low, LARGEST if high is None else high

    def convert(self, value: Any) -> Any:
        """Text from the command line or a value of a recipe -> the field's type. ValueError says what is wrong."""
        if self.optional and (value is None or (value == "none" and self.none_has_a_name)):
            return None
        if not self.many:
            return self._convert_one(value)
        items = value if isinstance(value, (list, tuple)) else [value]
        if self.kind in (int, float):
            items = [part for item in items for part in (item.split(",") if isinstance(item, str) else [item])]
        return [self._convert_one(item) for item in items] or (None if self.optional else [])

    def _convert_one(self, value: Any) -> Any:
        if self.kind is bool:
            if not isinstance(value, bool):
                raise ValueError(f"expected true or false, found {shown(value)}")
            return value
        if self.choices:
            self._check_one(value)
            return value
        if self.kind in (int, float):
            return self._convert_number(value)
        readable = (str, Path) if self.kind is Path else (str, Path, int, float)
        if isinstance(value, bool) or not isinstance(value, readable):
            raise ValueError(f"expected text, found {shown(value)}")
        return Path(os.path.expanduser(value)) if self.kind is Path else str(value)

    def _convert_number(self, value: Any) -> int | float:
        readable = (int, str) if self.kind is int else (int, float, str)
        try:
            if isinstance(value, bool) or not isinstance(value, readable):
                raise ValueError
            number = self.kind(value)
        except (ValueError, OverflowError):
            wanted = "a whole number" if self.kind is int else "a number"
            raise ValueError(f"expected {wanted}, found {shown(value)}") from None
        self._check_one(number)
        return number

    def check(self, value: Any) -> None:
        """ValueError where a value of the field's type is out of bounds or none of the choices."""
        for one in value if self.many and isinstance(value, (list, tuple)) else [value]:
            if one is not None:
                self._check_one(one)

    def _check_one(self, value: Any) -> None:
        if self.choices and value not in self.choices:
            raise ValueError(f"expected one of {', '.join(self.choices)}; found {shown(value)}")
        if self.kind in (int, float) and isinstance(value, numbers.Real):
            low, high = self.bounds
            if not low <= value <= high:
                raise ValueError(f"must be at least {low} and at most {high}, found {shown(value)}")


@functools.cache
def settings_of(options_class: type) -> dict[str, Setting]:
    """The settings of an options dataclass by field name. Raises TypeError for a field no option can stand for."""
    hints = get_type_hints(options_class)
    return {field.name: _setting(field, hints[field.name]) for field in dataclasses.fields(options_class)}


def _setting(field: dataclasses.Field, annotation: Any) -> Setting:
    if "help" not in field.metadata:
        raise TypeError(f"{field.name}: declare it with option(...), which asks for a help text")
    kind, optional, many, choices = annotation, False, False, ()
    if get_origin(kind) in (Union, types.UnionType) and types.NoneType in get_args(kind) and len(get_args(kind)) == 2:
        optional, (kind,) = True, (member for member in get_args(kind) if member is not types.NoneType)
    if get_origin(kind) is list:
        many, (kind,) = True, get_args(kind)
    if get_origin(kind) is Literal:
        kind, choices = str, get_args(kind)
    if kind not in KINDS or (many and kind is bool):
        raise TypeError(f"{field.name}: an option cannot have the type {annotation}")
    default = field.default if field.default_factory is MISSING else field.default_factory()
    setting = Setting(field.name, kind, choices, optional, many, default, dict(field.metadata))
    if optional and default not in (None, MISSING) and not setting.none_has_a_name:
        raise TypeError(f"{field.name}: with the type {annotation} only None can be the default")
    return setting


class Options:
    """What every dataclass of options inherits. In Python text may stand where a path is meant and a path where text
    is, alone or in place of a list: each becomes what the command line would make of it. A number out of its bounds and
    a word that is none of the choices raise UsageError naming the option."""

    def __post_init__(self) -> None:
        for name, setting in settings_of(type(self)).items():
            value = getattr(self, name)
            with naming(setting):
                setting.check(value)
            one = value[0] if isinstance(value, (list, tuple)) and value else value
            if setting.kind in (str, Path) and not setting.choices and isinstance(one, (str, Path)):
                setattr(self, name, setting.convert(value))


def build(options_class: type, values: dict[str, Any]) -> Any:
    """Make the options object from values by field name. A wrong value raises UsageError naming the option."""
    settings = settings_of(options_class)
    converted = {}
    for name, value in values.items():
        with naming(settings[name]):
            converted[name] = settings[name].convert(value)
    return options_class(**converted)


@contextmanager
def naming(setting: Setting) -> Iterator[None]:
    """ValueErrors about a setting's value as UsageError that names the option."""
    try:
        yield
    except ValueError as error:
        raise UsageError(f"{setting.label}: {error}") from None


def check_outputs(options: Any) -> None:
    """Raise LandmarkError where a file that the options want written cannot be, before any work is done for it, and
    UsageError where two of them are one file, or one is a file that another option has the command read."""
    taken: dict[str, str] = {}
    settings, read = settings_of(type(options)), _files_read(options)
    for name, setting in settings.items():
        value = getattr(options, name)
        if setting.metadata["is_output"] and value is not None and str(value) != "-":
            check_writable(value, setting.label)
            path = os.path.realpath(value)
            other = taken.setdefault(path, setting.label)
            if other != setting.label:
                raise UsageError(f"{other} and {setting.label} name the same file, {value}: give each one of its own")
            if path in read and read[path] != setting.metadata["may_replace"]:
                other = settings[read[path]].label
                raise UsageError(f"{setting.label} would write over {value}, which {other} names: give another file")


def _files_read(options: Any) -> dict[str, str]:
    """The files that options name to be read, each with the name of the option's field."""
    found = {}
    for name, setting in settings_of(type(options)).items():
        value = getattr(options, name)
        if setting.kind is Path and not setting.metadata["is_output"] and value is not None:
            files = filter(os.path.isfile, value if setting.many else [value])
            found |= {os.path.realpath(file): name for file in files}
    return found


def load_recipe(recipe: str | Path, options_class: type, command: str) -> dict[str, Any]:
    """The values of a recipe by field name, each of the field's type.

    recipe: a shipped recipe's name ("demo/tiny") or the path of a YAML file.
    Raises UsageError for an unknown recipe, format, key or value, or a recipe of another command.
    """
    path = find_recipe(recipe, command)
    content = read_yaml(path, "recipe", kind=UsageError)
    owner = content.pop("command", command)
    if owner != command:
        raise UsageError(f"recipe {recipe}: it is for `landmark {owner}`, not for `landmark {command}`")
    version = content.pop("format", None)
    if version not in (None, RECIPE_FORMAT):
        raise UsageError(f"recipe {recipe}: this version reads format {RECIPE_FORMAT}, not {shown(version)}")
    settings = settings_of(options_class)
    by_key = {name: setting for setting in settings.values() for name in (setting.name.replace("_", "-"), setting.key)}
    values = {}
    for key, value in content.items():
        setting = by_key.get(str(key).replace("_", "-"))
        if setting is None:
            keys = [setting.key for setting in settings.values()]
            raise UsageError(f'recipe {recipe}: unknown key "{str(key)[:60]}"{nearest(str(key), keys)}')
        if not setting.metadata["in_recipe"]:
            raise UsageError(f"recipe {recipe}: {key} cannot stand in a recipe; give {setting.label} with the command")
        try:
            values[setting.name] = setting.convert(value)
        except ValueError as error:
            raise UsageError(f"recipe {recipe}: {key}: {error}") from None
    if hasattr(options_class, "read_earlier"):
        values = options_class.read_earlier(values, version)
    return values


def save_recipe(options: Any, path: str | Path, command: str) -> None:
    """Write options as a recipe, so that `landmark COMMAND --recipe PATH` repeats the run. Its last line is a comment
    with its checksum, for `check_saved`."""
    import yaml

    content: dict[str, Any] = {"command": command, "format": RECIPE_FORMAT}
    for name, setting in settings_of(type(options)).items():
        if setting.metadata["saved"]:
            content[setting.key] = _for_yaml(getattr(options, name))
    text = yaml.safe_dump(content, sort_keys=False, width=120)
    with writing(path):
        write_whole(Path(path), f"{text}{SEAL}{_checksum(text)}\n")


def check_saved(path: Path, to_do: str) -> None:
    """Raise UsageError where a recipe is not as `save_recipe` wrote it: what goes on from it would be another run. One
    without a checksum, of an earlier version, is taken as it is. to_do: what the user can do about it."""
    text, sealed, checksum = read_text(path, "recipe", kind=UsageError).rpartition(SEAL)
    if sealed and checksum.strip() != _checksum(text):
        raise UsageError(f"recipe {path} is not as it was written, by the checksum in its last line: {to_do}")


def _checksum(text: str) -> str:
    import hashlib

    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def find_recipe(recipe: str | Path, command: str) -> Path:
    """The file of a shipped recipe or of a path. Raises UsageError that lists the command's recipes."""
    shipped = recipes_folder() / f"{recipe}.yaml"
    if shipped.is_file():
        return shipped
    path = Path(recipe).expanduser()
    if path.is_file():
        return path
    if path.suffix in (".yaml", ".yml"):
        raise UsageError(f"recipe {recipe}: there is no such file")
    names = recipe_names(command)
    raise UsageError(f'no recipe of `landmark {command}` is called "{recipe}"{nearest(str(recipe), names)}')


def recipe_names(command: str) -> list[str]:
    """The shipped recipes of one command, such as ["demo/tiny", "pg19/landmark"]."""
    folder = recipes_folder()
    files = [
        path
        for path in sorted(folder.rglob("*.yaml"))
        if read_yaml(path, "recipe", kind=UsageError).get("command") == command
    ]
    return [path.relative_to(folder).with_suffix("").as_posix() for path in files]


def recipes_folder() -> Path:
    """Where the shipped recipes are: in the package when it came as a wheel, beside it in a checkout."""
    inside = PACKAGE / "recipes"
    return inside if inside.is_dir() else PACKAGE.parent / "recipes"


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of an error message about an unknown name: the one it may have meant, or all there are."""
    known = sorted(known)
    word = word.replace("_", "-")
    close = difflib.get_close_matches(word, known, n=1) or [name for name in known if word and name.startswith(word)]
    return f"; did you mean {close[0]}?" if close else f"; there are {', '.join(known) or 'none'}"


def _for_yaml(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_for_yaml(item) for item in value]
    return str(value) if isinstance(value, Path) else value
