"""What `landmark finetune` takes: the defaults that depend on model, teacher and memory, and the plan of a dry run."""

from __future__ import annotations

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from landmark_cli.commands.finetune_defaults import GATE, PLAIN, TAUGHT, WIDTH
from landmark_cli.commands.finetune_teacher import distilled_from, teachers_name
from landmark_cli.commands.plan import show_plan
from landmark_cli.commands.run_loop import begun_in, loop_settings
from landmark_cli.commands.run_options import compiles_layers, reading
from landmark_cli.console import info, quantity, warn
from landmark_cli.errors import LandmarkError
from landmark_cli.launch import is_launched

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn
    from transformers import PreTrainedConfig

    from landmark_cli.commands.finetune import FinetuneOptions
    from landmark_cli.models.lora import LoraSettings
    from landmark_cli.softmax import Softmax
    from landmark_cli.training.distillation import Distillation
    from landmark_cli.training.rehearsal import Rehearsal

# Of a weight in 4 bits, with what scales it.
FOUR_BIT_BYTES = 0.53
EVALUATED_TOKENS = 1 << 18
# Runs that would take longer than so many seconds are compiled unasked: it takes some 20 of them, and saves a quarter.
COMPILED_SECONDS = 120
# What a step that is not compiled makes of a GPU's peak: 14% on an H200. The peak of one that is not known.
UNCOMPILED_USE, UNKNOWN_PEAK = 0.14, 100e12


@dataclass(frozen=True)
class Shapes:
    """The models of a run as shapes on the meta device, the student's weights frozen that will be.

    teacher: None where there is none. beside: whether it is a model of its own; else it is the student without its
    adapters.
    """

    model: nn.Module
    teacher: nn.Module | None
    beside: bool


def shapes_of(options: FinetuneOptions) -> Shapes:
    """The models that the options name; the few rows that landmarks add are left out."""
    from landmark_cli.models.lora import add_adapters
    from landmark_cli.models.pretrained import shape_of
    from landmark_cli.softmax import keep_softmax
    from landmark_cli.training.trained import train_landmarks

    model = shape_of(options.model, trust_remote_code=options.trust_remote_code)
    model.config.landmark_freq = options.landmark_freq
    keep_softmax(model.config, options.softmax or "grouped")
    adapters, teacher = adapter_settings(options), None
    if options.teacher != "none":
        teacher = shape_of(teachers_name(options), trust_remote_code=options.trust_remote_code)
    if adapters:
        add_adapters(model, adapters)
    if options.train == "landmarks":
        model.config.landmark_token_id = 0
        train_landmarks(model)
    return Shapes(model, teacher, adapters is None or options.teacher != "self")


def adapter_settings(options: FinetuneOptions) -> LoraSettings | None:
    """The options of the adapters, or None where every weight is trained."""
    from landmark_cli.models.lora import LoraSettings

    if options.lora_rank is None:
        return None
    alpha = 2.0 * options.lora_rank if options.lora_alpha is None else options.lora_alpha
    targets = tuple(options.lora_targets) if options.lora_targets else None
    return LoraSettings(options.lora_rank, alpha, options.lora_dropout, targets)


def with_defaults(options: FinetuneOptions, config: PreTrainedConfig) -> FinetuneOptions:
    """The options with a number for each that is left to model, teacher and memory. Every process calls it.

    config: the model's.
    """
    if not is_launched() or options.dry_run:
        return _with_defaults(options, config)
    from landmark_cli.training.setup import by_main_process, process_state

    # All processes take what the first one finds, whatever memory the others have.
    process_state(options.device)
    return by_main_process(lambda: _with_defaults(options, config))


def _with_defaults(options: FinetuneOptions, config: PreTrainedConfig) -> FinetuneOptions:
    from landmark_cli.training.fit import CPU_BATCH, device_memory, fit, longest_window
    from landmark_cli.training.setup import uses_cpu

    taught = options.teacher != "none"
    defaults = PLAIN
    if taught:
        width = config.get_text_config().hidden_size
        defaults = TAUGHT | {"lr": float(f"{TAUGHT['lr'] * min(1.0, WIDTH / width):.2g}")}
    options = filled(options, defaults | {"softmax": usual_softmax(options, config)})
    options = filled(options, {"gate_weight": GATE if options.softmax == "joint" else 0.0})
    shapes = shapes_of(options)
    memory = device_memory(options.device)

    def needs(sequence_length: int, batch_size: int, checkpointing: bool) -> int:
        given = dataclasses.replace(options, sequence_length=sequence_length, batch_size=batch_size)
        return memory_needed(given, shapes, checkpointing)

    read = options.read_chunk is not None
    found = fit(
        needs,
        memory,
        sequence_length=options.sequence_length,
        longest=longest_window(config, options.device),
        shortest=options.read_chunk or 2 * (options.landmark_freq + 1),
        batch_size=options.batch_size,
        accumulation=options.accumulation,
        most=CPU_BATCH if uses_cpu(options.device) else None,
        checkpointing=True if read and options.gradient_checkpointing is None else options.gradient_checkpointing,
    )
    if options.gradient_checkpointing is None and found.checkpointing and not read:
        without = needs(found.sequence_length, found.batch_size, False)
        info(
            f"gradient checkpointing, a third more work: without it a step would take about {quantity(without, 'B')}, "
            f"and the device has {quantity(memory, 'B')} for it"
        )
    if not found.fits:
        least = needs(found.sequence_length, found.batch_size, found.checkpointing)
        warn(f"about {quantity(least, 'B')} are needed, and the device has {quantity(memory, 'B')} for a run")
    options = dataclasses.replace(
        options,
        sequence_length=found.sequence_length,
        batch_size=found.batch_size,
        accumulation=found.accumulation,
        gradient_checkpointing=found.checkpointing,
    )
    if options.compile is None:
        options = dataclasses.replace(options, compile=worth_compiling(options, shapes.model))
    rows = options.steps * options.batch_size * options.accumulation
    windows = min(PLAIN["eval_windows"], max(8, EVALUATED_TOKENS // found.sequence_length), max(8, rows))
    return filled(options, {"eval_windows": windows})


def usual_softmax(options: FinetuneOptions, config: PreTrainedConfig) -> Softmax:
    """What landmarks do where nobody says it: what they did in a model that has some; else they only choose, where a
    teacher's attention can teach them to, and is to. config: the model's."""
    from landmark_cli.models.pretrained import open_config
    from landmark_cli.softmax import softmax_of
    from landmark_cli.training.teachers import check_layers

    if getattr(config, "landmark_freq", None):
        return softmax_of(config)
    if options.teacher == "none" or options.gate_weight == 0:
        return "grouped"
    teacher = config
    if options.teacher != "self":
        teacher = open_config(options.teacher, trust_remote_code=options.trust_remote_code)
    try:
        check_layers(teacher, config, options.teacher, heads=True)
    except LandmarkError:
        return "grouped"
    return "joint"


def worth_compiling(options: FinetuneOptions, model: nn.Module) -> bool:
    """Whether the steps of a run, on one device or as many copies of the model, save more than compiling takes.

    model: the student as shapes.
    """
    import torch
    from accelerate.utils import parse_flag_from_env

    from landmark_cli.training.compiled import decoder_layers
    from landmark_cli.training.metrics import flops_per_token, peak_flops
    from landmark_cli.training.runs import resolve_precision
    from landmark_cli.training.setup import uses_cpu, without_adapters

    sharded = any(parse_flag_from_env(f"ACCELERATE_USE_{name}") for name in ("FSDP", "DEEPSPEED"))
    # Of layers in 4 bits and in shards it has not been measured.
    if uses_cpu(options.device) or sharded or options.four_bit or not decoder_layers(without_adapters(model)):
        return False
    if not compiles_layers(dataclasses.replace(options, compile=True)):
        return False
    peak = peak_flops(torch.device("cuda"), resolve_precision(options.precision, options.device))
    tokens = options.steps * options.batch_size * options.accumulation * options.sequence_length
    read = reading(options, options.landmark_freq, options.top_k_blocks)
    operations = tokens * flops_per_token(model, options.sequence_length, read)
    return operations > COMPILED_SECONDS * UNCOMPILED_USE * (peak or UNKNOWN_PEAK)


def filled(options: FinetuneOptions, values: dict[str, Any]) -> FinetuneOptions:
    """The options with these values for those of them that are not given."""
    return dataclasses.replace(
        options, **{name: value for name, value in values.items() if getattr(options, name) is None}
    )


def memory_needed(options: FinetuneOptions, shapes: Shapes, checkpointing: bool) -> int:
    """Bytes that a device needs for a run, about."""
    from landmark_cli.training.estimate import attention_is_fused, estimate
    from landmark_cli.training.runs import resolve_precision

    read = reading(options, options.landmark_freq, options.top_k_blocks)
    return estimate(
        shapes.model,
        options.batch_size,
        resolve_precision(options.precision, options.device),
        options.fused_loss,
        sequence_length=options.sequence_length,
        read=read,
        checkpointing=checkpointing,
        keep_retrieved=options.keep_retrieved,
        frozen_bytes=FOUR_BIT_BYTES if options.four_bit else None,
        fused_attention=attention_is_fused(shapes.model, options.device, read, options.mask_documents),
        teacher=shapes.teacher,
        teacher_beside=shapes.beside,
        hidden_states=options.hidden_weight > 0,
    ).memory


def plan(options: FinetuneOptions) -> None:
    """Print what the run would take, of configs alone, and how long its steps are, measured on models with random
    weights."""
    shapes = shapes_of(options)
    show_plan(
        options,
        shapes.model,
        reading(options, options.landmark_freq, options.top_k_blocks),
        teacher=shapes.teacher,
        teacher_beside=shapes.beside,
        hidden_states=options.hidden_weight > 0,
        frozen_bytes=FOUR_BIT_BYTES if options.four_bit else None,
        measure="not measured with --four-bit" if options.four_bit else measure,
    )


def measure(options: FinetuneOptions) -> Rehearsal:
    """As `show_plan` takes it, with random weights and random text."""
    from landmark_cli.training.loop import Loop
    from landmark_cli.training.rehearsal import RandomBatches, rehearse

    read = reading(options, options.landmark_freq, options.top_k_blocks)
    with tempfile.TemporaryDirectory() as directory:
        begun = begun_in(options, Path(directory))
        model, distilled = random_models(options, begun)
        batches = RandomBatches(model.config, options.sequence_length, options.batch_size * options.accumulation)
        settings = loop_settings(options, begun[1], begun[2], options.sequence_length, read=read)
        loop = Loop(begun[0], model, batches, settings, {}, distillation=distilled)
        return rehearse(loop, compiled=bool(options.compile))


def random_models(
    options: FinetuneOptions, begun: tuple[Accelerator, Path, str]
) -> tuple[nn.Module, Distillation | None]:
    """The model of the run, with landmarks and adapters, and how it learns from its teacher, if it does: with random
    weights. begun: what `begin` gives."""
    import torch

    from landmark_cli.models.decoders import attend_with_landmarks
    from landmark_cli.models.lora import add_adapters
    from landmark_cli.models.pretrained import random_model
    from landmark_cli.models.support import check_model
    from landmark_cli.softmax import keep_softmax
    from landmark_cli.training.finetuning import dtype_of
    from landmark_cli.training.setup import checkpoint_activations, without_adapters
    from landmark_cli.training.teachers import ATTENTION, Teacher, UntouchedRows, WithoutAdapters
    from landmark_cli.training.trained import train_landmarks

    accelerator, _, precision = begun
    read, adapters = reading(options, options.landmark_freq, options.top_k_blocks), adapter_settings(options)
    half, device = dtype_of(precision), accelerator.device
    opening: dict[str, Any] = {"device": device, "trust_remote_code": options.trust_remote_code}
    model = random_model(options.model, dtype=half if adapters else torch.float32, **opening)
    untouched = UntouchedRows(model)
    config = model.config
    config.landmark_freq, config.landmark_token_id = options.landmark_freq, config.vocab_size - 1
    config.trained_length = options.sequence_length if read is None else read.positions
    keep_softmax(config, options.softmax)
    attend_with_landmarks(model, check_model(model, config.trained_length, options.model))
    trained = add_adapters(model, adapters) if adapters else model
    if options.train == "landmarks":
        train_landmarks(model)
    if options.gradient_checkpointing:
        checkpoint_activations(without_adapters(trained), keep_retrieved=read is not None and options.keep_retrieved)
    if options.teacher == "none":
        return trained, None
    if adapters and options.teacher == "self":
        teacher: Teacher = WithoutAdapters(trained, untouched)
    else:
        teacher = Teacher(random_model(teachers_name(options), attention=ATTENTION, dtype=half, **opening))
    return trained, distilled_from(teacher.prepare(accelerator), options, config)
