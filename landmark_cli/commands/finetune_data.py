"""What `landmark finetune` trains on: token files of --data, or of the shipped novels, and the tasks mixed in."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from landmark_cli.commands.run_options import RECIPE
from landmark_cli.console import info, warn
from landmark_cli.data.assets import SAMPLE
from landmark_cli.errors import UsageError
from landmark_cli.options import load_recipe, settings_of

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedTokenizerBase

    from landmark_cli.commands.finetune import FinetuneOptions
    from landmark_cli.data.training_data import TrainingData

# Of the windows, beside a teacher.
TASKS_SHARE = 0.5
# By which options a run makes token files of its text.
TEXT_OPTIONS = ("text_field", "validation_share")


def open_data(
    options: FinetuneOptions, tokenizer: PreTrainedTokenizerBase, begun: tuple[Accelerator, Path, str]
) -> tuple[TrainingData, float]:
    """The data of a run, prepared where it is not yet, and the share of its windows that are tasks. Every process calls
    it.

    tokenizer: the model's, with landmarks. begun: what `begin` gave.

    Raises LandmarkError where data cannot be read or does not fit the model, UsageError as `check_text_options` and
    `with_tasks`.
    """
    from landmark_cli.data.checks import check_token_files
    from landmark_cli.data.pretrained_tokenizers import begin_ids, largest_id, text_ids
    from landmark_cli.data.training_data import TrainingData, token_files
    from landmark_cli.training.runs import begin_of_windows, newest_checkpoint

    accelerator, output, _ = begun
    trained = options.resume and newest_checkpoint(output) is not None
    if trained:
        check_text_options(options, output)
    prepare = partial(
        token_files,
        directory=output / "data",
        tokenizer=options.model,
        text_field=options.text_field,
        validation_share=options.validation_share,
        trust_remote_code=options.trust_remote_code,
        trained=trained,
    )
    directories = prepare(options.data or [SAMPLE])
    accelerator.wait_for_everyone()
    data = TrainingData.open(directories, options.data_weights, validation=options.eval_every > 0)
    check_token_files(data.files, partial(text_ids, tokenizer), largest_id(tokenizer) + 1, options.model)
    begin = begin_of_windows(output, options.resume, begin_ids(tokenizer))
    return with_tasks(options, dataclasses.replace(data, begin=begin), prepare, begun, trained)


def check_text_options(options: FinetuneOptions, output: Path) -> None:
    """Raise UsageError where a run that has been trained on token files of its own is to go on by other options of
    text: the files stay, and the options would change nothing. Of a run that says nowhere by which they were made,
    nothing is known."""
    from landmark_cli.data.training_data import is_prepared

    recipe = output / RECIPE
    if not recipe.is_file() or all(map(is_prepared, options.data or [SAMPLE])):
        return
    made_by = load_recipe(recipe, type(options), "finetune")
    for name in TEXT_OPTIONS:
        setting = settings_of(type(options))[name]
        given = getattr(options, name)
        if name in made_by and made_by[name] != given:
            raise UsageError(
                f"{setting.label} {given}: the run in {output} has been trained on text that was prepared by "
                f"{setting.label} {made_by[name]}, and goes on with that: give it so, or another --output"
            )


def share_of_tasks(options: FinetuneOptions, *, marked: bool) -> float:
    """Which share of the windows is to be tasks. marked: whether the data mark answers.

    Raises UsageError where the options name kinds of tasks, and there are to be none.
    """
    share = options.tasks_share
    if share is None:
        share = 0.0 if options.teacher == "none" or marked else TASKS_SHARE
    if options.kinds and not share:
        raise UsageError("--kinds is of tasks, and none are mixed in here: give their share too, --tasks-share 0.5")
    return share


def with_tasks(
    options: FinetuneOptions,
    data: TrainingData,
    prepare: Callable[[list[str]], list[Path]],
    begun: tuple[Accelerator, Path, str],
    trained: bool = False,
) -> tuple[TrainingData, float]:
    """The data with the tasks mixed in that the options ask for, and the share of windows that these are.

    prepare: makes token files of corpora by name, as the run's data are made. trained: whether the run goes on from a
    checkpoint, and so with the tasks that it has.

    Raises UsageError where tasks are asked for, and none can be hidden in windows of this length or by this tokenizer.
    """
    from landmark_cli.data.landmarks import text_length
    from landmark_cli.data.merge import Process
    from landmark_cli.data.tasks.mixing import prepare_tasks, why_no_tasks
    from landmark_cli.data.tokenizers import load_tokenizer
    from landmark_cli.data.training_data import TrainingData

    share = share_of_tasks(options, marked=any(data.answers))
    if not share:
        return data, 0.0
    accelerator, output, _ = begun
    haystack = data.without_answers()
    if not haystack:
        info(f"tasks are hidden in the shipped novels ({SAMPLE}), for --data marks answers, and is no text to hide in")
        directories = prepare([SAMPLE])
        accelerator.wait_for_everyone()
        haystack = TrainingData.open(directories, validation=False).without_answers()
    tokenizer = load_tokenizer(options.model, trust_remote_code=options.trust_remote_code)
    room = text_length(options.sequence_length, options.landmark_freq)
    if why := why_no_tasks(haystack["train"], tokenizer, room):
        if options.tasks_share or options.kinds:
            asked = f"--tasks-share {share:g}" if options.tasks_share else f"--kinds {options.kinds[0]}"
            raise UsageError(f"{asked}: tasks cannot be mixed in: {why}")
        warn(f"no tasks are mixed in: {why}. --tasks-share 0 leaves them out without a word")
        return data, 0.0
    directory = output / "data" / "tasks"
    windows = options.steps * options.batch_size * options.accumulation * accelerator.num_processes
    prepare_tasks(
        haystack["train"],
        haystack["validation"],
        tokenizer,
        directory,
        text_length=room,
        windows=math.ceil(share * windows),
        seed=options.seed,
        kinds=options.kinds,
        resume=options.resume,
        trained=trained,
        process=Process.from_environment(),
    )
    accelerator.wait_for_everyone()
    return data.with_tasks(directory, share), share
