"""With what other options of the optimizer and its schedule a run was resumed: said, and kept beside its recipe."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from landmark_cli.commands.run_options import RECIPE
from landmark_cli.console import counted, info
from landmark_cli.errors import UsageError
from landmark_cli.file_errors import writing
from landmark_cli.options import load_recipe, settings_of

if TYPE_CHECKING:
    from landmark_cli.commands.run_options import RunOptions

# What may be another than it was when a run is resumed, and counts for the steps that are still to come.
COURSE = ("lr", "schedule", "warmup", "final_lr", "weight_decay", "beta1", "beta2", "clip")
EARLIER = re.compile(r"recipe-to-step-(\d+)\.yaml")


def changes(options: RunOptions, command: str, output: Path, step: int) -> bool:
    """Say what is another from here on than in the steps that the run in a directory has done, and return whether
    something is.

    step: that the run goes on from. Raises UsageError where no step is left: the recipe and the model card would tell
    of a training that never was.
    """
    if step == 0 or not (output / RECIPE).is_file():
        return False
    settings, others = settings_of(type(options)), _others(recipe_at(output, step), options, command)
    said = [(f"{settings[name].label} {getattr(options, name)}", f"{value}") for name, value in others.items()]
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
    done_by, kept = recipe_at(output, step), output / f"recipe-to-step-{step}.yaml"
    if changed and done_by != kept:
        with writing(kept):
            os.replace(done_by, kept)
    for number, file in _earlier(output):
        if number > step:
            with writing(file):
                file.unlink()


def earlier_courses(output: Path, options: RunOptions, command: str) -> list[tuple[int, str]]:
    """What of a run was another up to which of its steps than `options` say, before the last that these ask for: the
    number of the last of these steps, and the options in words, the first steps first."""
    settings = settings_of(type(options))
    earlier = [(number, _others(file, options, command)) for number, file in _earlier(output) if number < options.steps]
    return [
        (number, ", ".join(f"{settings[name].label} {value}" for name, value in others.items()))
        for number, others in earlier
        if others
    ]


def recipe_at(output: Path, step: int) -> Path:
    """The recipe by which the run in a directory did a step, its first being 1."""
    return next((file for number, file in _earlier(output) if number >= step), output / RECIPE)


def _earlier(output: Path) -> list[tuple[int, Path]]:
    """Recipes that a run had up to a step, the first step first."""
    return sorted((int(match[1]), file) for file in output.glob("*") if (match := EARLIER.fullmatch(file.name)))


def _others(recipe: Path, options: RunOptions, command: str) -> dict[str, Any]:
    """What of the course is another in a recipe than in the options, as the recipe has it."""
    try:
        values = load_recipe(recipe, type(options), command)
    except UsageError:
        # Damaged, or another version's: whoever goes on from it all the same has named a recipe, and was asked to.
        return {}
    return {name: values[name] for name in COURSE if name in values and values[name] != getattr(options, name)}
