"""`landmark train`: the paper's model, or its baseline, from token files."""

from __future__ import annotations

import dataclasses
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from landmark_cli.commands.models import CodeOptions
from landmark_cli.commands.plan import show_plan
from landmark_cli.commands.run_loop import begin, begun_in, carry_out, make_loop
from landmark_cli.commands.run_options import (
    RECIPE,
    TOP_K_BLOCKS_HELP,
    DataOptions,
    RunOptions,
    check_documents,
    check_weights,
    check_window,
    reading,
)
from landmark_cli.console import info
from landmark_cli.errors import UsageError
from landmark_cli.options import LONGEST, option, save_recipe

if TYPE_CHECKING:
    from accelerate import Accelerator

    from landmark_cli.data.text_tokenizer import TextTokenizer
    from landmark_cli.data.training_data import TrainingData
    from landmark_cli.models.gpt import GPTConfig, GPTForCausalLM
    from landmark_cli.training.loop import Loop
    from landmark_cli.training.rehearsal import Rehearsal


@dataclass
class CorpusAndShape(DataOptions, CodeOptions):
    """What the paper's model is trained on, and its shape."""

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
    top_k_blocks: int | None = option(
        None, panel="Model", min=0, max=LONGEST, help=TOP_K_BLOCKS_HELP.format(further="")
    )

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
        False,
        panel="Output",
        saved=False,
        help="Print parameters, tokens per step, estimated memory and time, measured on a few steps; then stop.",
    )


def run(options: TrainOptions) -> Path | None:
    """Train, and leave a model directory that `AutoModelForCausalLM.from_pretrained` opens. Returns it; after a dry run
    there is none.

    Raises UsageError for options that contradict each other, LandmarkError for what is wrong with data or directories.
    """
    check(options)
    from landmark_cli.data.checks import check_token_files
    from landmark_cli.data.token_file import newest_corpus
    from landmark_cli.data.tokenizers import load_tokenizer
    from landmark_cli.data.training_data import TrainingData
    from landmark_cli.training.setup import use_device

    use_device(options.device)
    if not options.data:
        corpus = newest_corpus(Path("data"))
        info(f"training on {corpus}, the newest prepared corpus under data/ (--data names another)")
        options = dataclasses.replace(options, data=[corpus])
    evaluated = options.eval_every > 0 and not options.dry_run
    data = TrainingData.open(options.data, options.data_weights, validation=evaluated)
    tokenizer = load_tokenizer(data.train[0].metadata.tokenizer, trust_remote_code=options.trust_remote_code)
    check_token_files(data.files, tokenizer.encode, tokenizer.vocab_size, f"{tokenizer.name} as it is now")
    config = model_config(options, tokenizer)
    if options.dry_run:
        plan(options, config, data)
        return None
    tokenizer.check_saved(landmark=not options.baseline)
    return train(options, config, tokenizer, data)


def check(options: TrainOptions) -> None:
    """Raise UsageError for options that cannot go together."""
    check_documents(options, landmarks=not options.baseline)
    read = reading(options, options.landmark_freq, options.top_k_blocks)
    if read is None and not options.baseline:
        check_window(options.sequence_length, options.landmark_freq, options.top_k_blocks)
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
    whole_windows = {
        "--context-miss-token": options.context_miss_token,
        "--position-jump": options.position_jump,
        "--group-dropout": options.group_dropout and read is not None,
    }
    for name, value in whole_windows.items():
        if value and (read is not None or options.mask_documents):
            other = "--mask-documents" if read is None else "--read-chunk"
            raise UsageError(f"{name} is for windows that are seen as a whole: leave out {other} or {name}")
    if options.n_embd % options.n_head or options.n_embd // options.n_head % 2:
        raise UsageError(f"--n-embd {options.n_embd} over --n-head {options.n_head} must give a whole, even head width")
    check_weights(options)


def model_config(options: TrainOptions, tokenizer: TextTokenizer) -> GPTConfig:
    """The model's config: the shape from the options, token ids from the tokenizer, the vocabulary padded to 64s."""
    from landmark_cli.models.gpt import GPTConfig

    largest = max(tokenizer.vocab_size - 1, tokenizer.landmark_id)
    read = reading(options, options.landmark_freq, options.top_k_blocks)
    return GPTConfig(
        vocab_size=64 * (largest // 64 + 1),
        n_layer=options.n_layer,
        n_head=options.n_head,
        n_embd=options.n_embd,
        dropout=options.dropout,
        bias=options.bias,
        landmark_freq=None if options.baseline else options.landmark_freq,
        landmark_token_id=None if options.baseline else tokenizer.landmark_id,
        trained_length=options.sequence_length if read is None else read.positions,
        top_k_blocks=options.top_k_blocks if read is None else read.top_k,
        eos_token_id=tokenizer.eot_id,
        context_miss_token=options.context_miss_token,
        memory_length=options.memory_length,
        segment_length=options.memory_length and (options.segment_length or options.memory_length),
    )


def train(options: TrainOptions, config: GPTConfig, tokenizer: TextTokenizer, data: TrainingData) -> Path:
    """The run itself, in every process. Returns its directory."""
    from landmark_cli.training.publish import Publication
    from landmark_cli.training.runs import begin_of_windows

    with begin(options, run_name(options)) as begun:
        accelerator, output, _ = begun
        data = dataclasses.replace(data, begin=begin_of_windows(output, options.resume, tokenizer.begin))
        model = untrained(config, tokenizer)
        publication = Publication(model, output, partial(write_rest, options=options, tokenizer=tokenizer))
        loop = loop_of(options, begun, model, data)
        carry_out(options, "train", config, loop)
        publication.publish(loop)
        accelerator.end_training()
        info(f"trained model: {output}")
        return output


def untrained(config: GPTConfig, tokenizer: TextTokenizer) -> GPTForCausalLM:
    """The model of a run before its first step."""
    from landmark_cli.models.generation_config import silence
    from landmark_cli.models.gpt import GPTForCausalLM

    model = GPTForCausalLM(config)
    saved = tokenizer.as_transformers(landmark=config.landmark_freq is not None)
    model.generation_config.pad_token_id = saved.pad_token_id
    silence(model, saved)
    return model


def write_rest(directory: Path, options: TrainOptions, tokenizer: TextTokenizer) -> None:
    """Write what belongs beside a run's model: tokenizer and recipe."""
    tokenizer.save_pretrained(directory, landmark=not options.baseline)
    save_recipe(options, directory / RECIPE, "train")


def loop_of(
    options: TrainOptions, begun: tuple[Accelerator, Path, str], model: GPTForCausalLM, data: TrainingData
) -> Loop:
    """The run's loop. begun: see `make_loop`."""
    controlled = options.controlled_landmarks if options.context_miss_token else 0.0
    variants = {"position_jump": options.position_jump, "controlled_landmarks": controlled}
    return make_loop(
        options,
        begun,
        model,
        model.config,
        data,
        variants=variants,
        group_dropout=options.group_dropout,
        read=reading(options, options.landmark_freq, options.top_k_blocks),
        identity=variants | {"group_dropout": options.group_dropout},
    )


def run_name(options: TrainOptions) -> str:
    """The name of a run without --output: its first corpus and which model it is."""
    return f"{options.data[0].resolve().name}-{'baseline' if options.baseline else 'landmark'}"


def plan(options: TrainOptions, config: GPTConfig, data: TrainingData) -> None:
    """Print what the run would take."""
    import torch

    from landmark_cli.models.gpt import GPTForCausalLM

    # What the run itself would be refused for.
    windows = data.windows(config, mask_documents=options.mask_documents, pack=options.pack)
    if options.answers_only or options.answer_weight != 1:
        data.check_answers()
    with torch.device("meta"):
        model = GPTForCausalLM(config)
    share = 1.0 if options.baseline else options.landmark_freq / (options.landmark_freq + 1)
    filled = data.batches(windows, options.batch_size * options.accumulation, options.seed).filled
    text = sum(file.metadata.tokens for file in data.train), share * filled
    read = reading(options, options.landmark_freq, options.top_k_blocks)
    show_plan(options, model, read, text=text, filled=filled, measure=partial(measure, config, data))


def measure(config: GPTConfig, data: TrainingData, options: TrainOptions) -> Rehearsal:
    """As `show_plan` takes it: the run's own steps, of which nothing is kept."""
    from landmark_cli.models.gpt import GPTForCausalLM
    from landmark_cli.training.rehearsal import rehearse

    with tempfile.TemporaryDirectory() as directory:
        begun = begun_in(options, Path(directory))
        return rehearse(loop_of(options, begun, GPTForCausalLM(config), data), compiled=options.compile)
