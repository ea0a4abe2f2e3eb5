"""The model of a fine-tuning run: as it is before the first step, and how it is written."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from landmark_cli.commands.finetune_plan import adapter_settings
from landmark_cli.commands.finetune_report import card_of
from landmark_cli.commands.run_options import RECIPE, reading
from landmark_cli.options import save_recipe

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from landmark_cli.commands.finetune import FinetuneOptions
    from landmark_cli.training.publish import SaveModel


def untrained(
    options: FinetuneOptions,
    precision: str,
    *,
    four_bit_on: torch.device | None = None,
    opened: Callable[[PreTrainedModel], None] = lambda model: None,
) -> tuple[PreTrainedModel, nn.Module, PreTrainedTokenizerBase]:
    """The decoder with landmarks, what is trained (the same, or adapters on it), and its tokenizer, before any step.

    precision, four_bit_on, opened: see `open_with_landmarks`. Raises LandmarkError as that does, and where the options
    do not fit the model.
    """
    from landmark_cli.models.lora import add_adapters
    from landmark_cli.training.finetuning import open_with_landmarks
    from landmark_cli.training.trained import train_landmarks

    adapters, read = adapter_settings(options), reading(options, options.landmark_freq, options.top_k_blocks)
    model, tokenizer = open_with_landmarks(
        options.model,
        landmark_freq=options.landmark_freq,
        trained_length=trained_length(options),
        top_k_blocks=options.top_k_blocks if read is None else read.top_k,
        precision=precision,
        softmax=options.softmax,
        frozen=adapters is not None,
        four_bit_on=four_bit_on,
        trust_remote_code=options.trust_remote_code,
        opened=opened if adapters and options.teacher == "self" else lambda model: None,
    )
    model.config.include_landmark_in_loss = options.landmarks_in_loss
    trained = add_adapters(model, adapters) if adapters else model
    if options.train == "landmarks":
        train_landmarks(model)
    return model, trained, tokenizer


def write_rest(
    directory: Path,
    options: FinetuneOptions,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    run: Path,
    processes: int,
    steps: int | None = None,
) -> None:
    """Write what belongs beside a run's model: tokenizer, recipe and card. run: the directory of the run. processes: of
    the run. steps: that are done, where these are not all."""
    from landmark_cli.models.card import write_card

    tokenizer.save_pretrained(directory)
    save_recipe(options, directory / RECIPE, "finetune")
    done = options if steps is None else dataclasses.replace(options, steps=steps)
    write_card(model, directory, card_of(done, run, processes))


def saving_of(options: FinetuneOptions, tokenizer: PreTrainedTokenizerBase) -> SaveModel:
    """How the run's model is written, in its form and type."""
    from landmark_cli.training.finetuning import saving

    return saving(
        options.model,
        tokenizer,
        adapters=options.lora_rank is not None,
        merge=options.merge,
        dtype=options.save_dtype,
        trust_remote_code=options.trust_remote_code,
    )


def trained_length(options: FinetuneOptions) -> int:
    """The positions that a window takes, landmarks included, as the model's config will say."""
    read = reading(options, options.landmark_freq, options.top_k_blocks)
    return options.sequence_length if read is None else read.positions
