"""What `--dry-run` prints: what a run would take, before anything is made for it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from landmark_cli.console import counted, duration, quantity, table
from landmark_cli.launch import is_launched

if TYPE_CHECKING:
    from torch import nn

    from landmark_cli.attention.window import WindowSettings
    from landmark_cli.commands.run_options import RunOptions
    from landmark_cli.training.rehearsal import Rehearsal

# What steps of a run with these options take.
Measure = Callable[[Any], "Rehearsal"]
TIME, MEMORY = "time, about", "memory, about"
MEASURED_STEPS = 3
# A micro-batch of more operations than this takes a CPU too long to be measured.
CPU_OPERATIONS = 1e11


def show_plan(
    options: RunOptions,
    model: nn.Module,
    read: WindowSettings | None,
    *,
    text: tuple[int, float] | None = None,
    teacher: nn.Module | None = None,
    teacher_beside: bool = True,
    hidden_states: bool = False,
    frozen_bytes: float | None = None,
    filled: float | None = None,
    measure: Measure | str,
) -> None:
    """Print what a run of these options takes.

    options: of the run, and of its windows. model: on the meta device, its weights frozen that will be. read: how
    windows are read chunk by chunk, if they are. text: how many text tokens the data has, and the share of text in the
    windows; None where the data is not prepared yet. filled: how much of windows of whole documents is text. teacher,
    teacher_beside, hidden_states, frozen_bytes: see `estimate`. measure: takes the steps of such options, or says why
    they are not taken.
    """
    from landmark_cli.training.estimate import attention_is_fused, estimate
    from landmark_cli.training.reading import said_of
    from landmark_cli.training.runs import attention_name, resolve_precision

    precision = resolve_precision(options.precision, options.device)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    windows, length = options.batch_size * options.accumulation * processes, options.sequence_length
    checkpointing = read is not None if options.gradient_checkpointing is None else options.gradient_checkpointing
    how: dict[str, Any] = {
        "sequence_length": length,
        "read": read,
        "checkpointing": checkpointing,
        "keep_retrieved": options.keep_retrieved,
        "frozen_bytes": frozen_bytes,
        "fused_attention": attention_is_fused(model, options.device, read, options.mask_documents),
    }
    taught = {"teacher": teacher, "teacher_beside": teacher_beside, "hidden_states": hidden_states}
    needs = estimate(model, options.batch_size, precision, options.fused_loss, **taught, **how)
    alone = estimate(model, options.batch_size, precision, options.fused_loss, **how)
    tokens = options.steps * windows * length
    passes = [] if text is None else [f"{tokens * text[1] / text[0]:.3g} over {counted(text[0], 'text token', ',')}"]
    rows = [
        ("parameters", f"{needs.parameters:,}"),
        *([] if needs.trained == needs.parameters else [("of them trained", f"{needs.trained:,}")]),
        ("attention", attention_name(model.config)),
        *([] if read is None else [("windows", said_of(read))]),
        ("documents", said_of_documents(options, filled)),
        ("tokens a step", f"{windows * length:,} in {counted(windows, 'window')} of {length:,}"),
        ("tokens in all", f"{quantity(tokens)} in {counted(options.steps, 'step', ',')}"),
        *(("passes over the data", said) for said in passes),
        (MEMORY, f"{quantity(needs.memory, 'B')} a device in {precision}, eager"),
        ("of it", f"{quantity(alone.state, 'B')} weights, gradients and optimizer"),
        *([] if teacher is None else [("and", f"{quantity(needs.memory - alone.memory, 'B')} for the teacher")]),
        *([("activations", "computed again in the backward pass")] if checkpointing else []),
        *time_rows(options, model, read, needs.memory, measure),
        ("disk", f"{quantity(needs.checkpoint, 'B')} a checkpoint, {options.keep} kept"),
    ]
    table(("dry run", "nothing is trained"), rows)


def time_rows(
    options: RunOptions, model: nn.Module, read: WindowSettings | None, memory: int, measure: Measure | str
) -> list[tuple[str, str]]:
    """How long the run's steps take, measured, for how long a device has to be paid, and on a GPU how much memory they
    did need; or why that is not known.

    memory: bytes that a device needs. The other arguments are those of `show_plan`.
    """
    import torch

    from landmark_cli.memory import is_out_of_memory
    from landmark_cli.training.fit import device_memory
    from landmark_cli.training.metrics import flops_per_token
    from landmark_cli.training.runs import device_name
    from landmark_cli.training.setup import uses_cpu

    parts, on_cpu = 1, uses_cpu(options.device)
    if is_launched():
        return [(TIME, "not measured in a launch of several processes")]
    if isinstance(measure, str):
        return [(TIME, measure)]
    if memory > device_memory(options.device):
        return [(TIME, "not measured: the memory does not hold a step")]
    if on_cpu:
        tokens = options.batch_size * options.sequence_length
        if tokens * flops_per_token(model, options.sequence_length, read) > CPU_OPERATIONS:
            return [(TIME, "not measured: a step takes a CPU long")]
        parts = options.accumulation
    try:
        found = measure(
            dataclasses.replace(options, steps=MEASURED_STEPS + 1, accumulation=options.accumulation // parts)
        )
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return [(TIME, "not measured: memory ran out in a step")]
    seconds = parts * found.seconds
    of_all = options.steps * seconds
    measured = counted(found.steps, "micro-batch" if on_cpu else "step")
    device = device_name(torch.device("cpu" if on_cpu else "cuda"))
    # A CPU's process holds much that is none of the run's.
    memory_row = [] if on_cpu else [("of memory", f"{quantity(found.memory, 'B')} at most in these steps, measured")]
    return [
        *memory_row,
        (TIME, f"{duration(of_all)}: {seconds:.3g} s a step, by {measured}; preparing and evaluating aside"),
        ("cost, about", f"{of_all / 3600:.3g} hours of one {device}"),
    ]


def said_of_documents(options: RunOptions, filled: float | None) -> str:
    """How documents stand in windows, in words."""
    said = "one after another, cut where windows end"
    if options.pack == "whole":
        said = "whole, where a window is long enough"
        said += "" if filled is None else f"; {filled:.0%} of the windows is text"
    return said + ("; none sees another" if options.mask_documents else "")
