"""`landmark train`: the paper's model, or its baseline, from token files."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from landmark_cli.console import info, quantity, table, warn
from landmark_cli.errors import LandmarkError, UsageError
from landmark_cli.options import option, save_recipe

if TYPE_CHECKING:
    from landmark_cli.data.batches import SequentialWindows
    from landmark_cli.data.token_file import TokenFile
    from landmark_cli.data.tokenizers import TextTokenizer
    from landmark_cli.models.gpt import GPTConfig
    from landmark_cli.training.loop import Loop, LoopSettings

EXAMPLES = """\
accelerate launch landmark train
landmark train --data data/pg19 --output runs/pg19-landmark --compile
landmark train --recipe demo/tiny --device cpu
landmark train --recipe pg19/landmark --dry-run
landmark train --data data/pg19 --output runs/pg19-landmark --compile --resume
"""


@dataclass
class TrainOptions:
    """Train the paper's language model, or its baseline, on prepared token files.

    Without options: the paper's shape on the newest corpus under data/, into runs/. Runs on one device as it is, on
    several through `accelerate launch` or torchrun.
    """

    data: list[Path] | None = option(
        None, panel="Data", help="Directories that `landmark prepare` made. [default: the newest under data/]"
    )
    data_weights: list[float] | None = option(
        None, panel="Data", min=0, help="How often to draw from each of them. [default: by their number of tokens]"
    )
    sequence_length: int = option(512, panel="Data", min=2, help="Tokens of a training window, landmarks included.")
    landmark_freq: int = option(50, panel="Data", min=1, help="Text tokens between landmarks.")
    baseline: bool = option(False, panel="Data", help="Ordinary attention and no landmarks.")

    n_layer: int = option(12, panel="Model", min=1, help="Layers.")
    n_head: int = option(8, panel="Model", min=1, help="Attention heads.")
    n_embd: int = option(1024, panel="Model", min=2, help="Width.")
    bias: bool = option(False, panel="Model", help="Biases in linear layers and norms.")
    dropout: float = option(0.0, panel="Model", min=0, max=1, help="Dropout after embedding, attention and MLP.")
    top_k_blocks: int = option(4, panel="Model", min=0, help="Blocks the model retrieves unless it is told otherwise.")

    steps: int = option(15_000, panel="Training", min=1, help="Optimizer steps.")
    batch_size: int = option(16, panel="Training", min=1, help="Windows a device takes at a time.")
    accumulation: int = option(8, panel="Training", min=1, help="Times that it does so in a step.")
    lr: float = option(2e-3, panel="Training", min=0, help="The highest learning rate.")
    schedule: Literal["one-cycle", "cosine", "linear", "constant"] = option(
        "one-cycle", panel="Training", help="How the learning rate climbs and falls."
    )
    warmup: float = option(0.02, panel="Training", min=0, max=1, help="Share of the steps in which it climbs.")
    final_lr: float = option(0.2, panel="Training", min=0, max=1, help="The last learning rate, as a share of --lr.")
    weight_decay: float = option(1e-3, panel="Training", min=0, help="On matrices of linear layers only.")
    beta1: float = option(0.9, panel="Training", min=0, max=1, help="AdamW's first beta.")
    beta2: float = option(0.95, panel="Training", min=0, max=1, help="AdamW's second beta.")
    clip: float = option(1.0, panel="Training", min=0, help="Largest gradient norm; 0 for none.")
    seed: int = option(0, panel="Training", min=0, help="Of the initial weights, the data's order and dropout.")

    device: Literal["auto", "cpu"] = option("auto", panel="Machine", saved=False, help="Where to train.")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = option(
        "auto",
        panel="Machine",
        help="auto: accelerate's own setting, else bf16 on a GPU that has it, else fp32.",
    )
    tf32: bool = option(True, panel="Machine", help="TF32 for what stays in fp32 on a GPU.")
    compile: bool = option(False, panel="Machine", help="Compile the model with torch.compile.")

    output: Path | None = option(
        None, panel="Output", saved=False, help="The run's directory. [default: a new one under runs/]"
    )
    resume: bool = option(
        False, panel="Output", saved=False, help="Go on from the newest checkpoint there; start where there is none."
    )
    log_every: int = option(10, panel="Output", min=1, help="Steps between two lines of metrics.jsonl.")
    eval_every: int = option(500, panel="Output", min=0, help="Steps between two evaluations; 0 for none.")
    eval_windows: int = option(128, panel="Output", min=1, help="Windows of validation text that an evaluation reads.")
    save_every: int = option(1000, panel="Output", min=0, help="Steps between two checkpoints; 0 for none.")
    keep: int = option(2, panel="Output", min=1, help="The newest checkpoints kept.")
    log_with: list[Literal["wandb", "tensorboard"]] | None = option(
        None, panel="Output", saved=False, help="Trackers to log to besides metrics.jsonl."
    )
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

    tokenizer = load_tokenizer(train_files[0].metadata.tokenizer)
    train_files[0].check_tokenizer(tokenizer.encode, f"{tokenizer.name} as it is now")
    config = model_config(options, tokenizer)
    if options.dry_run:
        show_plan(options, config, train_files)
    else:
        train(options, config, tokenizer, train_files)


def check(options: TrainOptions) -> None:
    """Raise UsageError for options that cannot go together."""
    block = options.landmark_freq + 1
    if not options.baseline and options.sequence_length < block:
        raise UsageError(
            f"--sequence-length {options.sequence_length} is shorter than one block of {block} "
            f"(--landmark-freq {options.landmark_freq} and its landmark): make it longer, or the blocks shorter"
        )
    if options.n_embd % options.n_head or options.n_embd // options.n_head % 2:
        raise UsageError(f"--n-embd {options.n_embd} over --n-head {options.n_head} must give a whole, even head width")
    if options.data_weights and len(options.data_weights) != len(options.data or ()):
        raise UsageError(f"--data-weights: {len(options.data_weights)} given for {len(options.data or ())} of --data")


def open_split(directories: list[Path], split: str) -> list[TokenFile]:
    """The token files of one split, all of one tokenizer; directories without a split other than train are left out."""
    from landmark_cli.data.token_file import TokenFile

    paths = [directory / f"{split}.bin" for directory in directories]
    files = [TokenFile.open(path) for path in paths if split == "train" or path.exists()]
    if len({file.metadata.tokenizer_fingerprint for file in files}) > 1:
        names = ", ".join(f"{file.path} with {file.metadata.tokenizer}" for file in files)
        raise LandmarkError(f"--data: prepared with different tokenizers ({names}); prepare all with one")
    return files


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
    )


def train(options: TrainOptions, config: GPTConfig, tokenizer: TextTokenizer, files: list[TokenFile]) -> None:
    """The run itself, in every process."""
    from accelerate import PartialState
    from accelerate.utils import set_seed

    from landmark_cli.data.batches import Batches
    from landmark_cli.models.gpt import GPTForCausalLM
    from landmark_cli.training.loop import Loop
    from landmark_cli.training.runs import resolve_precision, run_directory, run_identity
    from landmark_cli.training.setup import make_accelerator

    state = PartialState(cpu=options.device == "cpu")
    output = run_directory(options.output, run_name(options), options.resume, state)
    precision = resolve_precision(options.precision, options.device)
    accelerator = make_accelerator(
        precision=precision,
        accumulation=options.accumulation,
        device=options.device,
        compile=options.compile,
        tf32=options.tf32,
        log_with=options.log_with,
        output=output,
    )
    set_seed(options.seed)
    model = GPTForCausalLM(config)
    global_batch = options.batch_size * options.accumulation * accelerator.num_processes
    batches = Batches(
        files, options.data_weights, global_batch=global_batch, seed=options.seed, **window_settings(options, config)
    )
    identity = run_identity(config, files, options.data_weights, global_batch, options.seed)
    validation = validation_windows(options, config)
    loop = Loop(accelerator, model, batches, loop_settings(options, output, precision), identity, validation)
    describe(config, loop)
    if options.resume:
        info(f"going on from step {loop.step}" if loop.resume() else f"{output} has no checkpoint yet: starting")
    settings = {name: value if isinstance(value, (int, float)) else str(value) for name, value in vars(options).items()}
    accelerator.init_trackers("landmark", config=settings)
    loop.run()

    def save_rest(directory: Path) -> None:
        tokenizer.save_pretrained(directory, landmark=not options.baseline)
        save_recipe(options, directory / "recipe.yaml", "train")

    loop.write_model(save_rest)
    accelerator.end_training()
    info(f"trained model: {output}")


def run_name(options: TrainOptions) -> str:
    """The name of a run without --output: its first corpus and which model it is."""
    return f"{options.data[0].resolve().name}-{'baseline' if options.baseline else 'landmark'}"


def validation_windows(options: TrainOptions, config: GPTConfig) -> list[SequentialWindows]:
    """The windows that evaluations read: --eval-windows of them, spread over all validation files."""
    from landmark_cli.data.batches import SequentialWindows

    files = open_split(options.data, "validation") if options.eval_every else []
    if options.eval_every and not files:
        warn(f"{options.data[0]} has no validation.bin: training without evaluation")
    limit = max(options.eval_windows // max(len(files), 1), 1)
    return [SequentialWindows(file, limit=limit, **window_settings(options, config)) for file in files]


def window_settings(options: TrainOptions, config: GPTConfig) -> dict[str, int | None]:
    """What cuts windows out of token files: the same for training and evaluation."""
    return {
        "sequence_length": options.sequence_length,
        "landmark_freq": config.landmark_freq,
        "landmark_token_id": config.landmark_token_id,
        "eot_id": config.eos_token_id,
    }


def loop_settings(options: TrainOptions, output: Path, precision: str) -> LoopSettings:
    """The options as the training loop takes them."""
    from landmark_cli.training.loop import LoopSettings
    from landmark_cli.training.optimizer import Schedule

    return LoopSettings(
        output=output,
        steps=options.steps,
        batch_size=options.batch_size,
        accumulation=options.accumulation,
        sequence_length=options.sequence_length,
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
    )


def describe(config: GPTConfig, loop: Loop) -> None:
    """Say what is about to run."""
    from landmark_cli.training.runs import attention_name, device_name

    accelerator, settings = loop.accelerator, loop.settings
    processes = f"{accelerator.num_processes} x " if accelerator.num_processes > 1 else ""
    windows, length = loop.batches.global_batch, settings.sequence_length
    info(f"model: {quantity(loop.parameters)} parameters, {attention_name(config, accelerator.device)}")
    info(f"on {processes}{device_name(accelerator.device)} in {settings.precision}")
    info(f"{windows} windows of {length} = {quantity(windows * length)} tokens a step")


def show_plan(options: TrainOptions, config: GPTConfig, files: list[TokenFile]) -> None:
    """What `--dry-run` prints."""
    import torch

    from landmark_cli.models.gpt import GPTForCausalLM
    from landmark_cli.training.estimate import estimate
    from landmark_cli.training.runs import attention_name, resolve_precision

    with torch.device("meta"):
        model = GPTForCausalLM(config)
    precision = resolve_precision(options.precision, options.device)
    device = torch.device("cuda" if options.device == "auto" and torch.cuda.is_available() else "cpu")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    windows = options.batch_size * options.accumulation * processes
    needs = estimate(model, options.batch_size, precision)
    tokens = options.steps * windows * options.sequence_length
    text = sum(file.metadata.tokens for file in files)
    share = 1.0 if options.baseline else options.landmark_freq / (options.landmark_freq + 1)
    rows = [
        ("parameters", f"{needs.parameters:,}"),
        ("attention", attention_name(config, device)),
        ("tokens a step", f"{windows * options.sequence_length:,} in {windows} windows of {options.sequence_length}"),
        ("tokens in all", f"{quantity(tokens)} in {options.steps:,} steps"),
        ("passes over the data", f"{tokens * share / text:.3g} over {text:,} text tokens"),
        ("memory, about", f"{quantity(needs.memory, 'B')} a device in {precision}, eager"),
        ("of it", f"{quantity(needs.state, 'B')} weights, gradients and optimizer"),
        ("disk", f"{quantity(needs.checkpoint, 'B')} a checkpoint, {options.keep} kept"),
    ]
    table(("dry run", "nothing is trained"), rows)
