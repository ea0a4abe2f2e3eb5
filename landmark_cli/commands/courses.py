"""With what other options of the optimizer and its schedule a run was resumed: said, and kept beside its recipe."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from landmark_cli.commands.run_options import RECIPE
from landmark_cli.console import counted, info
from landmark_cli.errors import UsageError
from landmark_cli.file_errors import writing
from landmark_cli.options import load_recipe, settings_of

if TYPE_CHECKING:
    from landmark_cli.commands.run_options import RunOptions

# What may be another than it was when a run is resumed, and counts for the steps that are still to come.
COURSE = ("lr", "schedule", "warmup", "final_lr", "weight_decay", "beta1", "beta2", "clip")
EARLIER = "recipe-to-step-{}.yaml"


def changes(options: RunOptions, command: str, output: Path, step: int) -> bool:
    """Say what is another from here on than in the steps that the run in a directory has done, and return whether
    something is.

    step: that the run goes on from. Raises UsageError where no step is left: the recipe and the model card would tell
    of a training that never was.
    """
    if step == 0 or not (output / RECIPE).is_file():
        return False
    before = _course(recipe_at(output, step), type(options), command)
    settings = settings_of(type(options))
    others = [(name, value) for name, value in before.items() if value != getattr(options, name)]
    said = [(f"{settings[name].label} {getattr(options, name)}", f"{value}") for name, value in others]
    if said and step == options.steps:
        raise UsageError(
            f"{' '.join(given for given, _ in said)}: the run in {output} has done all of its "
            f"{counted(step, 'step', ',')} with {' and '.join(value for _, value in said)}; give more --steps, or "
            "leave that out"
        )
    for given, value in said:
        info(f"from step {step + 1} on {given}, which was {value} before")
    return bool(said)


def keep_earlier(output: Path, step: int, changed: bool) -> None:
    """Before the recipe of a run is written anew, which goes on from a step: keep the one by which that step was done,
    where something changed, and none of steps that are done again.

    Raises LandmarkError where a file cannot be written.
    """
    done_by, kept = recipe_at(output, step), output / EARLIER.format(step)
    if changed and done_by != kept:
        with writing(kept):
            os.replace(done_by, kept)
    for number, file in list(_earlier(output)):
        if number > step:
            with writing(file):
                file.unlink()


def earlier_courses(output: Path, options: RunOptions, command: str) -> list[tuple[int, str]]:
    """What of a run was another up to which steps than `options` say: the number of the last of these steps, and the
    options in words, the first steps first."""
    settings = settings_of(type(options))
    found = []
    for number, file in _earlier(output):
        course = _course(file, type(options), command).items()
        others = [f"{settings[name].label} {value}" for name, value in course if value != getattr(options, name)]
        if others:
            found.append((number, ", ".join(others)))
    return found


def recipe_at(output: Path, step: int) -> Path:
    """The recipe by which the run in a directory did a step, its first being 1."""
    return next((file for number, file in _earlier(output) if number >= step), output / RECIPE)


def _earlier(output: Path) -> Iterator[tuple[int, Path]]:
    """Recipes that a run had up to a step, the first step first."""
    numbers = (re.fullmatch(re.escape(EARLIER).replace(r"\{\}", r"(\d+)"), file.name) for file in output.glob("*"))
    for number in sorted(int(match[1]) for match in numbers if match):
        yield number, output / EARLIER.format(number)


def _course(recipe: Path, options_class: type, command: str) -> dict[str, object]:
    """What a recipe says of it."""
    try:
        values = load_recipe(recipe, options_class, command)
    except UsageError:
        # Damaged, or another version's: whoever goes on from it all the same has named a recipe, and was asked to.
        return {}
    return {name: values[name] for name in COURSE if name in values}
