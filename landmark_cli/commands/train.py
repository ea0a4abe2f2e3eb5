"""`landmark train`: the paper's model, or its baseline, from token files."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from landmark_cli.commands.models import CodeOptions
from landmark_cli.commands.run_options import (
    TOP_K_BLOCKS_HELP,
    RunOptions,
    begin,
    carry_out,
    check_window,
    loop_settings,
    open_split,
    validation_windows,
)
from landmark_cli.console import info, quantity, table
from landmark_cli.errors import UsageError
from landmark_cli.options import LONGEST, option, save_recipe

if TYPE_CHECKING:
    from landmark_cli.data.token_file import TokenFile
    from landmark_cli.data.tokenizers import TextTokenizer
    from landmark_cli.models.gpt import GPTConfig


@dataclass
class CorpusAndShape(CodeOptions):
    """What the paper's model is trained on, and its shape."""

    data: list[Path] | None = option(
        None, panel="Data", help="Directories that `landmark prepare` made. [default: the newest under data/]"
    )
    data_weights: list[float] | None = option(
        None,
        names=("--data-weights", "--mix"),
        panel="Data",
        min=0,
        help="How often to draw from each of them: 0.9,0.1. [default: by their number of tokens]",
    )
    sequence_length: int = option(
        512,
        panel="Data",
        min=2,
        max=LONGEST,
        help="Tokens of a training window, landmarks included.",
        saves_memory="a shorter --sequence-length",
    )
    landmark_freq: int = option(50, panel="Data", min=1, max=LONGEST, help="Text tokens between landmarks.")
    baseline: bool = option(False, panel="Data", help="Train the baseline: ordinary attention, no landmarks.")

    n_layer: int = option(
        12, panel="Model", min=1, max=10_000, help="Number of layers.", saves_memory="fewer --n-layer"
    )
    n_head: int = option(8, panel="Model", min=1, max=65_536, help="Number of attention heads.")
    n_embd: int = option(
        1024, panel="Model", min=2, max=1_048_576, help="Width of the hidden states.", saves_memory="a smaller --n-embd"
    )
    bias: bool = option(False, panel="Model", help="Give linear layers and norms biases.")
    dropout: float = option(0.0, panel="Model", min=0, max=0.99, help="Dropout after embedding, attention and MLP.")
    top_k_blocks: int | None = option(None, panel="Model", min=0, max=LONGEST, help=TOP_K_BLOCKS_HELP)

    memory_length: int | None = option(
        None,
        panel="Variants",
        min=1,
        max=LONGEST,
        help="Train a Transformer-XL that remembers this many tokens. [default: train no Transformer-XL]",
    )
    segment_length: int | None = option(
        None,
        panel="Variants",
        min=1,
        max=LONGEST,
        help="Tokens of a segment of the Transformer-XL. [default: --memory-length]",
    )
    context_miss_token: bool = option(
        False,
        panel="Variants",
        help="Learn a context-miss token, whose share of the attention says whether to retrieve.",
    )
    controlled_landmarks: float = option(
        0.5, panel="Variants", min=0, max=1, help="Share of landmarks that the context-miss token controls in training."
    )
    position_jump: int = option(
        0,
        panel="Variants",
        min=0,
        max=LONGEST,
        help="After every landmark, positions jump ahead by a random number below this.",
    )
    group_dropout: float = option(
        0.0,
        panel="Variants",
        min=0,
        max=0.99,
        help="Probability that attention leaves an earlier block out in training.",
    )


@dataclass
class TrainOptions(RunOptions, CorpusAndShape):
    """Train the paper's language model, or its baseline, on prepared token files.

    Without options: the paper's shape on the newest corpus under data/, into runs/. Runs on one device as it is, on
    several through `accelerate launch` or torchrun.
    """

    dry_run: bool = option(
        False, panel="Output", saved=False, help="Print parameters, tokens per step and estimated memory, and stop."
    )


def run(options: TrainOptions) -> None:
    """Train, and leave a model directory that `AutoModelForCausalLM.from_pretrained` opens.

    Raises UsageError for options that contradict each other, LandmarkError for what is wrong with data or directories.
    """
    from landmark_cli.data.token_file import find_corpus

    check(options)
    if not options.data:
        corpus = find_corpus(Path("data"))
        info(f"training on {corpus}, the newest prepared corpus under data/ (--data names another)")
        options = dataclasses.replace(options, data=[corpus])
    train_files = open_split(options.data, "train")
    from landmark_cli.data.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(train_files[0].metadata.tokenizer, trust_remote_code=options.trust_remote_code)
    train_files[0].check_tokenizer(tokenizer.encode, f"{tokenizer.name} as it is now")
    config = model_config(options, tokenizer)
    if options.dry_run:
        show_plan(options, config, train_files)
    else:
        tokenizer.check_saved(landmark=not options.baseline)
        train(options, config, tokenizer, train_files)


def check(options: TrainOptions) -> None:
    """Raise UsageError for options that cannot go together."""
    if not options.baseline:
        check_window(options.sequence_length, options.sequence_length, options.landmark_freq, options.top_k_blocks)
    if options.segment_length and not options.memory_length:
        raise UsageError("--segment-length is a Transformer-XL's: give --memory-length too")
    if options.memory_length and not options.baseline:
        raise UsageError("--memory-length makes a Transformer-XL, which has no landmarks: give --baseline too")
    needs_landmarks = {
        "--context-miss-token": options.context_miss_token,
        "--position-jump": options.position_jump,
        "--group-dropout": options.group_dropout,
    }
    for name, value in needs_landmarks.items():
        if value and options.baseline:
            raise UsageError(f"{name} is about landmarks: leave out --baseline or {name}")
    if options.n_embd % options.n_head or options.n_embd // options.n_head % 2:
        raise UsageError(f"--n-embd {options.n_embd} over --n-head {options.n_head} must give a whole, even head width")
    if options.data_weights and len(options.data_weights) != len(options.data or ()):
        raise UsageError(f"--data-weights: {len(options.data_weights)} given for {len(options.data or ())} of --data")


def model_config(options: TrainOptions, tokenizer: TextTokenizer) -> GPTConfig:
    """The model's config: the shape from the options, token ids from the tokenizer, the vocabulary padded to 64s."""
    from landmark_cli.models.gpt import GPTConfig

    largest = max(tokenizer.vocab_size - 1, tokenizer.landmark_id)
    return GPTConfig(
        vocab_size=64 * (largest // 64 + 1),
        n_layer=options.n_layer,
        n_head=options.n_head,
        n_embd=options.n_embd,
        dropout=options.dropout,
        bias=options.bias,
        landmark_freq=None if options.baseline else options.landmark_freq,
        landmark_token_id=None if options.baseline else tokenizer.landmark_id,
        trained_length=options.sequence_length,
        top_k_blocks=options.top_k_blocks,
        eos_token_id=tokenizer.eot_id,
        context_miss_token=options.context_miss_token,
        memory_length=options.memory_length,
        segment_length=options.memory_length and (options.segment_length or options.memory_length),
    )


def train(options: TrainOptions, config: GPTConfig, tokenizer: TextTokenizer, files: list[TokenFile]) -> None:
    """The run itself, in every process."""
    from landmark_cli.data.batches import Batches
    from landmark_cli.data.variants import VariantBatches
    from landmark_cli.models.gpt import GPTForCausalLM
    from landmark_cli.training.loop import Loop
    from landmark_cli.training.publish import Publication
    from landmark_cli.training.runs import run_identity

    with begin(options, run_name(options)) as (accelerator, output, precision):
        model = GPTForCausalLM(config)

        def save_rest(directory: Path) -> None:
            tokenizer.save_pretrained(directory, landmark=not options.baseline)
            save_recipe(options, directory / "recipe.yaml", "train")

        publication = Publication(model, output, save_rest)
        global_batch = options.batch_size * options.accumulation * accelerator.num_processes
        windows = window_settings(options, config)
        batches = Batches(files, options.data_weights, global_batch=global_batch, seed=options.seed, **windows)
        controlled = options.controlled_landmarks if options.context_miss_token else 0.0
        variants = {"position_jump": options.position_jump, "controlled_landmarks": controlled}
        if any(variants.values()):
            batches = VariantBatches(batches, options.seed, **variants)
        variants["group_dropout"] = options.group_dropout
        loop = Loop(
            accelerator,
            model,
            batches,
            dataclasses.replace(
                loop_settings(options, output, precision, options.sequence_length), group_dropout=options.group_dropout
            ),
            identity=run_identity(config, files, options.data_weights, global_batch, options.seed) | variants,
            validation=validation_windows(options, options.data, windows),
        )
        carry_out(options, config, loop)
        publication.publish(loop)
        accelerator.end_training()
        info(f"trained model: {output}")


def run_name(options: TrainOptions) -> str:
    """The name of a run without --output: its first corpus and which model it is."""
    return f"{options.data[0].resolve().name}-{'baseline' if options.baseline else 'landmark'}"


def window_settings(options: TrainOptions, config: GPTConfig) -> dict[str, int | None]:
    """What cuts windows out of token files: the same for training and evaluation."""
    return {
        "sequence_length": options.sequence_length,
        "landmark_freq": config.landmark_freq,
        "landmark_token_id": config.landmark_token_id,
        "eot_id": config.eos_token_id,
    }


def show_plan(options: TrainOptions, config: GPTConfig, files: list[TokenFile]) -> None:
    """What `--dry-run` prints."""
    import torch

    from landmark_cli.models.gpt import GPTForCausalLM
    from landmark_cli.training.estimate import estimate
    from landmark_cli.training.runs import attention_name, resolve_precision

    with torch.device("meta"):
        model = GPTForCausalLM(config)
    precision = resolve_precision(options.precision, options.device)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    windows = options.batch_size * options.accumulation * processes
    needs = estimate(model, options.batch_size, precision, options.fused_loss)
    tokens = options.steps * windows * options.sequence_length
    text = sum(file.metadata.tokens for file in files)
    share = 1.0 if options.baseline else options.landmark_freq / (options.landmark_freq + 1)
    rows = [
        ("parameters", f"{needs.parameters:,}"),
        ("attention", attention_name(config)),
        ("tokens a step", f"{windows * options.sequence_length:,} in {windows} windows of {options.sequence_length}"),
        ("tokens in all", f"{quantity(tokens)} in {options.steps:,} steps"),
        ("passes over the data", f"{tokens * share / text:.3g} over {text:,} text tokens"),
        ("memory, about", f"{quantity(needs.memory, 'B')} a device in {precision}, eager"),
        ("of it", f"{quantity(needs.state, 'B')} weights, gradients and optimizer"),
        ("disk", f"{quantity(needs.checkpoint, 'B')} a checkpoint, {options.keep} kept"),
    ]
    table(("dry run", "nothing is trained"), rows)
