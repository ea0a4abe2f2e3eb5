"""`landmark plan`: what reading takes and what it sees, before a model is trained or read with."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from landmark_cli.commands.measurement import json_option
from landmark_cli.commands.models import MODEL, CodeOptions, name_model
from landmark_cli.console import counted, info, quantity, results, warn
from landmark_cli.errors import LandmarkError, UsageError
from landmark_cli.inference.settings import READING, ReadingSettings
from landmark_cli.options import LONGEST, check_outputs, option

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from landmark_cli.inference.plan import ReadingPlan

# Short, so that a row fits a terminal: freq is --landmark-freq, k is --top-k-blocks.
COLUMNS = "length", "freq", "k", "chunk", "sees", "compared", "memory"
OFFLOADED = "on GPU"
FULL = "full"
LANDMARK_FREQ = 63


def _of_reading(name: str) -> Any:
    """The option `name` of everything that reads."""
    found = ReadingSettings.__dataclass_fields__[name]
    return dataclasses.field(default=found.default, metadata=found.metadata)


@dataclass
class PlanOptions(CodeOptions):
    """Say what reading with blocks takes and what a token sees, by settings, without reading.

    Every combination of --lengths, --landmark-freq and --top-k-blocks is a row: the tokens of a chunk, how many tokens
    a query sees in a layer at most, with how many keys it is compared there (the landmarks of all blocks that it
    chooses from among them), and the memory of one text's keys and values in all layers. Beside them stands full
    attention. Of the model only the config is opened.
    """

    model: str | None = option(
        None,
        panel=MODEL,
        help="The model, with landmarks or without: a directory or a hub id. [default: the newest finished model under "
        "runs/]",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", panel=MODEL, help="Type of keys and values; auto: the type that the weights are stored in."
    )
    landmark_freq: list[int] | None = option(
        None,
        panel=MODEL,
        min=1,
        max=LONGEST,
        help="Text tokens between landmarks, for a model that has none yet; with commas between. [default: 63]",
    )
    sequence_length: int | None = option(
        None,
        panel=MODEL,
        min=2,
        max=LONGEST,
        help="Tokens of a training window, landmarks included, for a model without landmarks. [default: its positions, "
        "32768 at most]",
    )
    lengths: list[int] = option(
        [4096, 32768, 131072], panel=READING, min=1, max=LONGEST, help="Text tokens to be read, with commas between."
    )
    top_k_blocks: list[int] | None = option(
        None,
        panel=READING,
        min=0,
        max=LONGEST,
        help="Blocks retrieved for each token, with commas between. [default: the number in the model's config; 4]",
    )
    chunk: int | None = _of_reading("chunk")
    cache_blocks: int | None = _of_reading("cache_blocks")
    rerank_blocks: int | None = _of_reading("rerank_blocks")
    offload: Literal["none", "cpu"] = _of_reading("offload")
    json: str | None = json_option("Output")


def run(options: PlanOptions) -> list[dict[str, Any]]:
    """Work out what reading takes and print it. Returns what --json writes: a dict for every row.

    Raises UsageError where landmarks that a model has are to become others, LandmarkError for a model that cannot be
    opened or cannot have landmarks, and where no setting leaves room for a chunk.
    """
    from landmark_cli.inference.plan import plan_full_attention, plan_reading

    check_outputs(options)
    name = name_model(options)
    model = _outline(name, options)
    plans: list[tuple[int | None, ReadingPlan]] = []
    impossible: dict[str, LandmarkError] = {}
    for length in options.lengths:
        for freq in _frequencies(model, name, options):
            for top_k in options.top_k_blocks or [None]:
                settings = ReadingSettings(
                    top_k,
                    options.chunk,
                    options.cache_blocks,
                    rerank_blocks=options.rerank_blocks,
                    offload=options.offload,
                )
                try:
                    plans.append((freq, plan_reading(model, length, settings)))
                except LandmarkError as error:
                    impossible[str(error)] = error
        plans.append((None, plan_full_attention(model, length)))
    with_landmarks = [plan for freq, plan in plans if freq]
    if not with_landmarks:
        raise next(iter(impossible.values()))
    for reason in impossible:
        warn(f"left out: {reason}")
    weights = sum(parameter.nbytes for parameter in model.parameters())
    dtype = str(model.dtype).removeprefix("torch.")
    info(f"{quantity(weights, 'B')} of weights in {dtype}; trained at {model.config.trained_length} positions")
    needed = max(plan.positions for plan in with_landmarks)
    if needed > model.config.trained_length:
        warn(f"these chunks stand at up to {needed} positions: beyond those of training nothing is known of a model")
    columns = COLUMNS if options.offload == "none" else (*COLUMNS, OFFLOADED)
    rows = (_cells(plan, freq)[: len(columns)] for freq, plan in plans)
    data = [{"landmark_freq": freq, **asdict(plan)} for freq, plan in plans]
    results(columns, rows, data=data, json_target=options.json)
    return data


def _outline(name: str, options: PlanOptions) -> PreTrainedModel:
    """A model on the meta device, in the dtype that is asked for, that knows at how many positions it is trained."""
    import torch

    from landmark_cli.inference.plan import layers_to_get_landmarks
    from landmark_cli.inference.readers import has_landmarks
    from landmark_cli.models.store import outline_alone
    from landmark_cli.models.support import check_config
    from landmark_cli.training.fit import longest_of

    model = outline_alone(name, trust_remote_code=options.trust_remote_code)
    config = model.config
    if has_landmarks(model):
        for option_name, given in (
            ("--landmark-freq", options.landmark_freq),
            ("--sequence-length", options.sequence_length),
        ):
            if given:
                raise UsageError(
                    f"{option_name}: {name} has landmarks already, after every "
                    f"{counted(config.landmark_freq, 'text token')} of windows of {config.trained_length}; leave it "
                    "out, or name a model without landmarks"
                )
    else:
        check_config(config, name)
        config.trained_length = options.sequence_length or longest_of(config)
        if (layers := layers_to_get_landmarks(config)) is not None:
            config.landmark_layers = layers
    dtype = config.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
    return model.to(device="meta", dtype=dtype or model.dtype)


def _frequencies(model: PreTrainedModel, name: str, options: PlanOptions) -> Iterator[int]:
    """The distances of landmarks to plan with, each when the model's config has it."""
    from landmark_cli.data.landmarks import default_top_k
    from landmark_cli.inference.readers import has_landmarks
    from landmark_cli.models.decoders import check_length

    config = model.config
    if has_landmarks(model):
        yield config.landmark_freq
        return
    for freq in options.landmark_freq or [LANDMARK_FREQ]:
        check_length(config.trained_length, getattr(config, "max_position_embeddings", None), freq, name)
        config.landmark_freq, config.top_k_blocks = freq, default_top_k(config.trained_length, freq)
        yield freq
    config.landmark_freq = None


def _cells(plan: ReadingPlan, freq: int | None) -> tuple[Any, ...]:
    """A row of the table, where blocks are offloaded and where they are not."""
    settings = (None, FULL) if freq is None else (f"{freq:,}", f"{plan.top_k_blocks:,}")
    counts = (f"{count:,}" for count in (plan.chunk, plan.sees, plan.compared))
    of_bytes = (None if size is None else quantity(size, "B") for size in (plan.cache, plan.on_gpu))
    return f"{plan.length:,}", *settings, *counts, *of_bytes
