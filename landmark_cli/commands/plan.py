"""What `--dry-run` prints: what a run would take, before anything is made for it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from landmark_cli.console import counted, quantity, table

if TYPE_CHECKING:
    from torch import nn

    from landmark_cli.attention.window import WindowSettings
    from landmark_cli.commands.run_options import RunOptions


def show_plan(
    options: RunOptions,
    model: nn.Module,
    read: WindowSettings | None,
    *,
    text: tuple[int, float] | None = None,
    teacher: nn.Module | None = None,
    teacher_beside: bool = True,
    frozen_bytes: float | None = None,
    filled: float | None = None,
    time: str | None = None,
) -> None:
    """Print what a run of these options takes.

    options: of the run, and of its windows. model: on the meta device, its weights frozen that will be. read: how
    windows are read chunk by chunk, if they are. text: how many text tokens the data has, and the share of text in the
    windows; None where the data is not prepared yet. filled: how much of windows of whole documents is text. teacher,
    teacher_beside, frozen_bytes: see `estimate`. time: how long it takes, in words.
    """
    from landmark_cli.training.estimate import estimate
    from landmark_cli.training.reading import said_of
    from landmark_cli.training.runs import attention_name, resolve_precision
    from landmark_cli.training.setup import uses_cpu

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
        "fused_attention": not uses_cpu(options.device),
    }
    needs = estimate(
        model, options.batch_size, precision, options.fused_loss, teacher=teacher, teacher_beside=teacher_beside, **how
    )
    alone = estimate(model, options.batch_size, precision, options.fused_loss, **how)
    tokens = options.steps * windows * length
    passes = [] if text is None else [f"{tokens * text[1] / text[0]:.3g} over {counted(text[0], 'text token', ',')}"]
    rows = [
        ("parameters", f"{needs.parameters:,}"),
        *([] if needs.trained == needs.parameters else [("of them trained", f"{needs.trained:,}")]),
        ("attention", attention_name(model.config)),
        *([] if read is None else [("windows", said_of(read))]),
        ("documents", said_of_documents(options, filled)),
        ("tokens a step", f"{windows * length:,} in {counted(windows, 'window')} of {length}"),
        ("tokens in all", f"{quantity(tokens)} in {counted(options.steps, 'step', ',')}"),
        *(("passes over the data", said) for said in passes),
        ("memory, about", f"{quantity(needs.memory, 'B')} a device in {precision}, eager"),
        ("of it", f"{quantity(alone.state, 'B')} weights, gradients and optimizer"),
        *([] if teacher is None else [("and", f"{quantity(needs.memory - alone.memory, 'B')} for the teacher")]),
        *([("activations", "computed again in the backward pass")] if checkpointing else []),
        *([] if time is None else [("time, about", time)]),
        ("disk", f"{quantity(needs.checkpoint, 'B')} a checkpoint, {options.keep} kept"),
    ]
    table(("dry run", "nothing is trained"), rows)


def said_of_documents(options: RunOptions, filled: float | None) -> str:
    """How documents stand in windows, in words."""
    said = "one after another, cut where windows end"
    if options.pack == "whole":
        said = "whole, where a window is long enough"
        said += "" if filled is None else f"; {filled:.0%} of the windows is text"
    return said + ("; none sees another" if options.mask_documents else "")
