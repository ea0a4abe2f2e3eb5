"""What a fine-tuned decoder learns from besides the text: a run's teacher, opened, and where there can be none."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from landmark_cli.commands.finetune_defaults import UNASKED
from landmark_cli.errors import UsageError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from landmark_cli.commands.finetune import FinetuneOptions
    from landmark_cli.training.distillation import Distillation
    from landmark_cli.training.teachers import Teacher, UntouchedRows


def distillation(
    options: FinetuneOptions,
    trained: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    untouched: list[UntouchedRows],
    begun: tuple[Accelerator, Path, str],
) -> Distillation | None:
    """How the run learns from its teacher, which is opened; None where it has none.

    trained: the student, with adapters if it has some, and then untouched: its embedding and head as they were, where
    the teacher is the model itself. tokenizer: the student's. begun: what `begin` gave.
    """
    from landmark_cli.training.finetuning import dtype_of
    from landmark_cli.training.hidden_states import check_found
    from landmark_cli.training.setup import without_adapters
    from landmark_cli.training.teachers import WithoutAdapters, check_layers, open_teacher

    if options.teacher == "none":
        return None
    accelerator, _, precision = begun
    config = without_adapters(trained).config
    if untouched:
        teacher = WithoutAdapters(trained, untouched[0])
    else:
        teacher = open_teacher(
            teachers_name(options), tokenizer, dtype=dtype_of(precision), trust_remote_code=options.trust_remote_code
        )
    for weight, heads in ((options.gate_weight, True), (options.hidden_weight, False)):
        if weight:
            check_layers(teacher.model.config, config, options.teacher, heads=heads, joint=options.softmax == "joint")
    if options.hidden_weight:
        check_found(without_adapters(trained), options.model)
        check_found(teacher.model, teachers_name(options))
    return distilled_from(teacher.prepare(accelerator), options, config)


def teachers_name(options: FinetuneOptions) -> str:
    """The directory or hub id of the teacher, where it is a model of its own."""
    return options.model if options.teacher == "self" else options.teacher


def distilled_from(teacher: Teacher, options: FinetuneOptions, config: PreTrainedConfig) -> Distillation:
    """How the options have a student learn from a teacher, which is ready to be asked. config: the student's, with
    landmarks."""
    from landmark_cli.softmax import is_joint
    from landmark_cli.training.distillation import Distillation

    return Distillation(
        teacher,
        options.teacher,
        config.landmark_token_id,
        answer_weight=options.answer_weight,
        answer_divergence_weight=options.answer_divergence_weight,
        text_weight=options.text_weight or 0.0,
        temperature=options.distill_temperature,
        gate_weight=options.gate_weight,
        hidden_weight=options.hidden_weight,
        block_size=config.landmark_freq + 1,
        joint=is_joint(config),
        chunk=options.read_chunk,
        needs_answers=any(getattr(options, name) not in weights for name, weights in UNASKED.items()),
    )


def check_launch(options: FinetuneOptions, accelerator: Accelerator) -> None:
    """Raise UsageError where the launch splits the model in a way in which the landmark's row would not be found, or a
    teacher not be split."""
    from accelerate import DistributedType

    launches = {DistributedType.FSDP: "FSDP", DistributedType.DEEPSPEED: "DeepSpeed"}
    if accelerator.distributed_type not in launches:
        return
    if options.train != "all":
        raise UsageError(
            f"--train {options.train} does not go with {launches[accelerator.distributed_type]} yet: launch without it"
        )
    if options.teacher != "none" and not accelerator.is_fsdp2:
        found = "FSDP 1" if accelerator.distributed_type == DistributedType.FSDP else "DeepSpeed"
        raise UsageError(
            f"--teacher {options.teacher} is split among devices by FSDP 2 alone, and this launch is of {found}: set "
            "fsdp_version: 2 for accelerate, or train on the text alone by --teacher none"
        )


def check_teacher(options: FinetuneOptions) -> None:
    """Raise UsageError for options of a teacher where there is none, or that a teacher takes the place of."""
    if options.teacher == "none":
        given = {
            "text-weight": options.text_weight is not None,
            "answer-divergence-weight": options.answer_divergence_weight is not None,
            "distill-temperature": options.distill_temperature != 1,
            "gate-weight": bool(options.gate_weight),
            "hidden-weight": options.hidden_weight > 0,
        }
        for name in (name for name, is_given in given.items() if is_given):
            raise UsageError(
                f"--{name} is for a teacher, and --teacher none has none: leave one of the two out, in the recipe too "
                "if there is one"
            )
    elif options.answers_only:
        raise UsageError(
            "--answers-only leaves out the text's own loss, as a teacher does: leave it out, or give --teacher none"
        )
    if options.softmax is not None:
        check_gate(options, asked=True)


def check_gate(options: FinetuneOptions, *, asked: bool) -> None:
    """Raise UsageError where landmarks that only choose blocks would learn nothing, and where the gate's loss of others
    is asked for and not known. asked: whether the user said what landmarks do; else the model says it."""
    if options.softmax == "joint" and (options.teacher == "none" or options.gate_weight == 0):
        none = options.teacher == "none"
        why = "--teacher none has no attention to show them" if none else "--gate-weight 0 leaves that out"
        who, leave = "--softmax joint: landmarks only choose blocks there", "leave one of the two out"
        if not asked:
            who, leave = f"{options.model} has landmarks that only choose blocks", "leave that out"
        raise UsageError(f"{who}, which they learn by the gate's loss, and {why}; {leave}, or take --softmax grouped")
    if options.softmax == "grouped" and options.gate_weight and options.read_chunk is not None:
        raise UsageError(
            "--gate-weight with --softmax grouped is for windows that are attended to as a whole, and --read-chunk "
            "reads them in chunks: leave one of the two out"
        )
