"""How a training run of whatever command begins, gets its loop and goes through it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from landmark_cli.commands.courses import changes, keep_earlier
from landmark_cli.commands.run_options import RECIPE, RunOptions, compiles_layers
from landmark_cli.console import counted, info, quantity, warn
from landmark_cli.errors import UsageError
from landmark_cli.options import save_recipe

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn
    from transformers import PreTrainedConfig

    from landmark_cli.attention.window import WindowSettings
    from landmark_cli.data.training_data import TrainingData
    from landmark_cli.training.distillation import Distillation
    from landmark_cli.training.loop import Loop, LoopSettings

# Operations of a step, of each process, that take a processor of some cores a minute or longer.
LONG_ON_CPU = 1e13


@contextmanager
def begin(options: RunOptions, name: str) -> Iterator[tuple[Accelerator, Path, str]]:
    """What a run stands on, in every process: the accelerate object, the run's directory, which is held while the block
    runs, and the precision.

    name: of the directory under runs/ where no --output is given.
    """
    from landmark_cli.interrupts import keeping
    from landmark_cli.training.runs import place_of, run_directory
    from landmark_cli.training.setup import process_state

    process_state(options.device)
    with run_directory(options.output, name, options.resume) as output, keeping(partial(place_of, output)):
        yield begun_in(options, output)


def begun_in(options: RunOptions, output: Path) -> tuple[Accelerator, Path, str]:
    """What a run in a directory stands on: see `begin`."""
    from accelerate.utils import set_seed

    from landmark_cli.training.runs import resolve_precision
    from landmark_cli.training.setup import make_accelerator

    precision = resolve_precision(options.precision, options.device)
    accelerator = make_accelerator(
        precision=precision,
        accumulation=options.accumulation,
        batch_size=options.batch_size,
        clip=options.clip,
        device=options.device,
        compile=bool(options.compile) and not compiles_layers(options),
        tf32=options.tf32,
        log_with=options.log_with,
        output=output,
    )
    set_seed(options.seed)
    return accelerator, output, precision


def loop_settings(
    options: RunOptions,
    output: Path,
    precision: str,
    sequence_length: int,
    group_dropout: float = 0.0,
    read: WindowSettings | None = None,
) -> LoopSettings:
    """The options as the training loop takes them. sequence_length: positions of a window, landmarks included. read:
    see `LoopSettings`."""
    from landmark_cli.launch import again
    from landmark_cli.training.loop import LoopSettings
    from landmark_cli.training.optimizer import Schedule

    return LoopSettings(
        output=output,
        steps=options.steps,
        batch_size=options.batch_size,
        accumulation=options.accumulation,
        sequence_length=sequence_length,
        schedule=Schedule(options.schedule, options.lr, options.steps, options.warmup, options.final_lr),
        weight_decay=options.weight_decay,
        betas=(options.beta1, options.beta2),
        clip=options.clip,
        precision=precision,
        seed=options.seed,
        log_every=options.log_every,
        evaluate_every=options.eval_every,
        save_every=options.save_every,
        keep=options.keep,
        fused_loss=options.fused_loss,
        fp32_residual=options.fp32_residual,
        bad_steps=options.bad_steps,
        group_dropout=group_dropout,
        read=read,
        compile_layers=compiles_layers(options),
        examine_every=getattr(options, "eval_ruler_every", 0),
        go_on=again("resume", output=output),
    )


def make_loop(
    options: RunOptions,
    begun: tuple[Accelerator, Path, str],
    model: nn.Module,
    config: PreTrainedConfig,
    data: TrainingData,
    *,
    landmarks_in_loss: bool = False,
    variants: dict[str, Any] | None = None,
    group_dropout: float = 0.0,
    read: WindowSettings | None = None,
    identity: dict[str, Any],
    distillation: Distillation | None = None,
) -> Loop:
    """The loop of a run over its batches, and over its validation windows.

    begun: what `begin` gave. config: the model's, adapters aside. landmarks_in_loss: count landmarks as targets.
    variants: see `TrainingData.batches`. group_dropout, read: see `LoopSettings`. identity: what else must stay the
    same when the run is resumed, besides model, data, windows, seed and teacher. distillation: how it learns from a
    teacher, if it does; answers then have the weight that it says.
    """
    from landmark_cli.data.windows import AnswerWeights
    from landmark_cli.training.loop import Loop
    from landmark_cli.training.reading import windows_identity
    from landmark_cli.training.runs import run_identity
    from landmark_cli.training.setup import checkpoint_activations, without_adapters

    accelerator, output, precision = begun
    global_batch = options.batch_size * options.accumulation * accelerator.num_processes
    if options.gradient_checkpointing or (options.gradient_checkpointing is None and read is not None):
        checkpoint_activations(without_adapters(model), keep_retrieved=read is not None and options.keep_retrieved)
    windows = data.windows(
        config,
        landmarks_in_loss,
        sequence_length=options.sequence_length,
        mask_documents=options.mask_documents,
        pack=options.pack,
    )
    answer_weights = None
    if distillation is not None:
        if distillation.needs_answers:
            data.check_answers()
        identity = identity | distillation.identity | {"answers": data.answers}
    elif options.answers_only or options.answer_weight != 1:
        answer_weights = AnswerWeights(options.answer_weight, options.answers_only)
    return Loop(
        accelerator,
        model,
        data.batches(
            windows,
            global_batch,
            options.seed,
            answer_weights,
            mark_answers=distillation is not None and any(data.answers),
            **variants or {},
        ),
        loop_settings(options, output, precision, windows.sequence_length, group_dropout, read),
        identity=run_identity(config, data, global_batch, options.seed, answer_weights)
        | windows_identity(windows, read)
        | identity,
        validation=data.validation_windows(windows, options.eval_windows),
        distillation=distillation,
    )


def carry_out(options: RunOptions, command: str, config: PreTrainedConfig, loop: Loop) -> None:
    """Say what is about to run, go on from a checkpoint where that is wanted, write the options down, and train to the
    last step. command: its name, for the recipe. Raises UsageError where more steps are done than are asked for, and as
    `courses.changes` does."""
    from landmark_cli.training.setup import by_main_process

    describe(config, loop)
    output = loop.settings.output
    if options.resume:
        info(f"going on from step {loop.step}" if loop.resume() else f"{output} has no checkpoint yet: starting")
        if loop.step > options.steps:
            raise UsageError(
                f"--steps {options.steps}: the run in {output} has done {loop.step} already; give so many or more, or "
                "make a model of an earlier checkpoint with `landmark models export`"
            )
        changed = changes(options, command, output, loop.step)
        by_main_process(lambda: keep_earlier(output, loop.step, changed))
    # Not before: a resumption that is refused leaves what the directory says of its run as it is.
    by_main_process(lambda: save_recipe(options, output / RECIPE, command))
    settings = {name: value if isinstance(value, (int, float)) else str(value) for name, value in vars(options).items()}
    shown = {"wandb": {"name": options.log_name or output.resolve().name}}
    loop.accelerator.init_trackers(options.log_project, config=settings, init_kwargs=shown)
    loop.run()


def describe(config: PreTrainedConfig, loop: Loop) -> None:
    """Say what is about to run."""
    from landmark_cli.data.landmarks import text_length
    from landmark_cli.training.reading import said_of
    from landmark_cli.training.runs import attention_name, device_name

    accelerator, settings = loop.accelerator, loop.settings
    processes = f"{accelerator.num_processes} x " if accelerator.num_processes > 1 else ""
    windows, length = loop.batches.global_batch, settings.sequence_length
    info(f"model: {quantity(loop.parameters)} parameters, {attention_name(config)}")
    info(f"on {processes}{device_name(accelerator.device)} in {settings.precision}")
    info(f"{counted(windows, 'window')} of {length} = {quantity(windows * length)} tokens a step")
    operations = windows * length * loop.flops_per_token / accelerator.num_processes
    if accelerator.device.type == "cpu" and operations > LONG_ON_CPU:
        warn(
            f"each of {counted(settings.steps, 'step', ',')} is {operations:.1e} operations, which take a CPU minutes: "
            "this is work for a GPU; `landmark train --recipe demo/tiny` is work for a CPU"
        )
    if settings.read is not None:
        info(said_of(settings.read))
    if settings.compile_layers:
        info("layers are compiled, which the first step waits for; --no-compile runs them as they are")
    if loop.distillation is not None:
        info(loop.distillation.said(text_length(length, config.landmark_freq)))
