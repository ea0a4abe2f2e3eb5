"""`landmark models export`: a model of what a run has kept, while it goes on or after it was stopped."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from landmark_cli.commands.courses import recipe_at
from landmark_cli.commands.models import CodeOptions
from landmark_cli.commands.run_options import RECIPE
from landmark_cli.console import info
from landmark_cli.errors import LandmarkError
from landmark_cli.options import build, check_saved, load_recipe, option

if TYPE_CHECKING:
    from torch import nn

    from landmark_cli.commands.finetune import FinetuneOptions
    from landmark_cli.commands.train import TrainOptions
    from landmark_cli.training.checkpoints import Record
    from landmark_cli.training.publish import Publication


@dataclass(kw_only=True)
class ExportOptions(CodeOptions):
    """Make a model of a checkpoint of a run.

    The run may be going on, stopped or finished. A checkpoint is the state of a run: of fine-tuning only what is
    trained, all of it in 32 bits, and --keep removes it one day. The model is what the run would write if it ended
    there, adapters merged or not as the run would have them; every command opens it, and transformers does.
    """

    checkpoint: Path = option(
        positional=True, help="The checkpoint, or a run's directory, of which the newest one is taken."
    )
    output: Path | None = option(
        None, saved=False, help="Directory of the model. [default: beside the run's, with the step behind its name]"
    )


def run(options: ExportOptions) -> Path:
    """Write the model. Returns its directory.

    Raises LandmarkError where there is no such checkpoint, it is damaged, it does not fit the run's recipe or model, or
    the model cannot be written.
    """
    from landmark_cli.locks import sole_writer
    from landmark_cli.training.checkpoints import own_name, put, step_of, stored_of
    from landmark_cli.training.checksums import damage_of

    checkpoint, run_directory = find_checkpoint(options.checkpoint)
    step = step_of(checkpoint)
    output = options.output or run_directory.with_name(f"{run_directory.name}-step-{step}")
    check_output(output)
    what = damage_of(checkpoint)
    if what is not None:
        raise LandmarkError(f"{checkpoint} is damaged ({what}): take another one of {run_directory}")
    record = record_of(checkpoint, run_directory)
    tensors = weights_of(checkpoint)
    model, publication = made_again(options, run_directory, record, output)
    put({own_name(name): tensor for name, tensor in tensors.items()}, stored_of(model), checkpoint)
    with sole_writer(output):
        publication.write(model.state_dict())
    info(f"model of step {step}: {output}")
    return output


def check_output(output: Path) -> None:
    """Raise LandmarkError where a model cannot be written into a directory without writing over something: a model, a
    checkpoint, or what a run says of itself and will write there."""
    from landmark_cli.training.checkpoints import RECORD

    if (output / "config.json").exists():
        raise LandmarkError(f"{output} already holds a model: give another --output, or remove it")
    if (output / RECORD).exists() or (output / "checkpoints").exists():
        what = "a checkpoint" if (output / RECORD).exists() else "the directory of a run, which writes its model there"
        raise LandmarkError(f"{output} is {what}: give another --output")


def find_checkpoint(path: Path) -> tuple[Path, Path]:
    """The checkpoint that a path means, and the directory of its run."""
    from landmark_cli.training.checkpoints import NAME
    from landmark_cli.training.runs import newest_checkpoint

    if NAME.fullmatch(path.name):
        path = path if len(path.parts) > 2 else path.absolute()
        if not path.is_dir():
            there = sorted(other.name for other in path.parent.glob("step-*") if NAME.fullmatch(other.name))
            raise LandmarkError(f"there is no checkpoint {path}; there are {', '.join(there) or 'none'}")
        return path, path.parent.parent
    path = path if path.name not in ("", "..") else path.resolve()
    newest = newest_checkpoint(path)
    if newest is None:
        raise LandmarkError(f"{path} has no checkpoint; name a run's directory, or a checkpoint in it (step-00001000)")
    return newest, path


def record_of(checkpoint: Path, run_directory: Path) -> Record:
    """What a checkpoint says of itself. Raises LandmarkError where its weights lie in shards."""
    from landmark_cli.file_reading import read_record
    from landmark_cli.training.checkpoints import RECORD, WHOLE, Record, step_of
    from landmark_cli.training.runs import newest_checkpoint

    record = read_record(Record, checkpoint / RECORD)
    if record.layout not in (None, WHOLE):
        newest = newest_checkpoint(run_directory)
        later = newest is not None and step_of(newest) > record.step
        first = ", once you have moved the later checkpoints away, from which it would go on" if later else ""
        raise LandmarkError(
            f"{checkpoint} was saved as {record.layout}, in shards that the run's own launch reads: launched as it "
            f"was, with --resume --output {run_directory} --steps {record.step}, the run writes its model{first}"
        )
    return record


def weights_of(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint's tensors by name. Raises LandmarkError where they cannot be read."""
    from safetensors.torch import load_file

    from landmark_cli.file_errors import reading
    from landmark_cli.training.checkpoints import WEIGHTS

    with reading(checkpoint / WEIGHTS):
        return load_file(checkpoint / WEIGHTS)


def made_again(
    options: ExportOptions, run_directory: Path, record: Record, output: Path
) -> tuple[nn.Module, Publication]:
    """The run's model as it was before the first step, and how it is written into `output`."""
    from landmark_cli.file_reading import read_yaml

    recipe = recipe_at(run_directory, record.step)
    if not recipe.is_file():
        raise LandmarkError(
            f"{run_directory} has no {RECIPE}, which says what its model is; a run of an earlier version gets one when "
            "it is resumed with the options that it was started with"
        )
    check_saved(recipe, "put it back as it was, or resume the run with the right options, which writes it anew")
    command = read_yaml(recipe, "recipe").get("command")
    if command not in MADE_AGAIN:
        raise LandmarkError(f"{recipe} is not of a run: its command is {str(command)[:60]!r}")
    return MADE_AGAIN[command](options, recipe, record, output)


def trained_again(options: ExportOptions, recipe: Path, record: Record, output: Path) -> tuple[nn.Module, Publication]:
    """As `made_again`, of `landmark train`."""
    from functools import partial

    from landmark_cli.commands.train import TrainOptions, model_config, untrained, write_rest
    from landmark_cli.data.tokenizers import load_tokenizer
    from landmark_cli.training.publish import Publication

    of_run: TrainOptions = options_of(recipe, TrainOptions, "train", options)
    name = record.identity.get("tokenizer")
    if not isinstance(name, str):
        raise LandmarkError(f"the checkpoint of {recipe.parent} does not say with which tokenizer it was trained")
    tokenizer = load_tokenizer(name, trust_remote_code=options.trust_remote_code)
    model = untrained(model_config(of_run, tokenizer), tokenizer)
    rest = partial(write_rest, options=of_run, tokenizer=tokenizer)
    return model, Publication(model, output, rest, rehearse=False)


def finetuned_again(
    options: ExportOptions, recipe: Path, record: Record, output: Path
) -> tuple[nn.Module, Publication]:
    """As `made_again`, of `landmark finetune`. Frozen weights that a run held in 4 bits are those of the model that it
    began with."""
    from landmark_cli.commands.finetune import FinetuneOptions
    from landmark_cli.commands.finetune_model import saving_of, untrained, write_rest
    from landmark_cli.training.publish import Publication

    of_run: FinetuneOptions = options_of(recipe, FinetuneOptions, "finetune", options)
    model, trained, tokenizer = untrained(of_run, "fp32")
    windows = record.identity.get("global_batch")
    processes = windows // (of_run.batch_size * of_run.accumulation) if isinstance(windows, int) else 1

    def save_rest(directory: Path) -> None:
        write_rest(directory, of_run, model, tokenizer, recipe.parent, processes, record.step)

    return trained, Publication(trained, output, save_rest, saving_of(of_run, tokenizer), rehearse=False)


def options_of(recipe: Path, options_class: type, command: str, options: ExportOptions) -> Any:
    """The options that a run was started with."""
    values = load_recipe(recipe, options_class, command)
    return build(options_class, values | {"trust_remote_code": options.trust_remote_code, "device": "cpu"})


MADE_AGAIN = {"train": trained_again, "finetune": finetuned_again}
