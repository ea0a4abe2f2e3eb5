"""What every training run is told: how to train, on what machine, what to write. train and finetune share it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from landmark_cli.console import counted
from landmark_cli.errors import UsageError
from landmark_cli.options import LARGEST_SEED, LONGEST, Options, check_saved, option

if TYPE_CHECKING:
    from landmark_cli.attention.window import WindowSettings


# In a run's directory: its options, from before the first step on.
RECIPE = "recipe.yaml"
TOP_K_BLOCKS_HELP = (
    "Blocks that the model is to retrieve for each token, as its config will say. "
    "[default: 4, or as many as the window has room for{further}]"
)


@dataclass(kw_only=True)
class DataOptions(Options):
    """What a run trains on, and how long the windows are that it reads."""

    data: list[Path] | None = option(
        None, panel="Data", help="Directories that `landmark prepare` made. [default: the newest under data/]"
    )
    data_weights: list[float] | None = option(
        None,
        names=("--data-weights", "--mix"),
        panel="Data",
        min=0,
        help="How often to draw from each of --data: 0.9,0.1. [default: by their number of tokens]",
    )
    sequence_length: int = option(
        512,
        panel="Data",
        min=2,
        max=LONGEST,
        help="Tokens of a training window, landmarks included.",
        saves_memory="a shorter --sequence-length",
    )
    read_chunk: int | None = option(
        None,
        panel="Data",
        min=2,
        max=LONGEST,
        help="Train on windows of any length as they are read: in chunks of so many tokens (landmarks included, whole "
        "blocks), each with --top-k-blocks of the blocks before it. [default: every token sees its whole window]",
    )
    explore: float = option(
        0.0,
        panel="Data",
        min=0,
        max=1,
        help="With --read-chunk: probability that a token's last choice is a random block, in training alone.",
    )
    mask_documents: bool = option(
        False, panel="Data", help="Have the documents of a window not see each other; landmarks count from each one."
    )
    pack: Literal["cut", "whole"] = option(
        "cut",
        panel="Data",
        help="What windows hold: text cut anywhere, or whole documents where a window is long enough, filled up.",
    )
    answer_weight: float = option(
        1.0,
        panel="Data",
        min=0,
        max=1e6,
        help="Weight in the loss of answers, where a corpus marks them (as tasks does); other tokens weigh 1.",
    )
    answers_only: bool = option(
        False, panel="Data", help="Count answers alone in the loss of the corpora that mark them; others count whole."
    )


@dataclass
class RunOptions(Options):
    """How to train, where, and what to write."""

    steps: int = option(15_000, panel="Training", min=1, help="Optimizer steps.")
    batch_size: int = option(
        16,
        panel="Training",
        min=1,
        help="Windows in a micro-batch: what each device takes at a time.",
        saves_memory="a smaller --batch-size (with more --accumulation)",
    )
    accumulation: int = option(8, panel="Training", min=1, help="Micro-batches per optimizer step, on each device.")
    lr: float = option(2e-3, panel="Training", min=0, max=1000, help="The highest learning rate.")
    schedule: Literal["one-cycle", "cosine", "linear", "constant"] = option(
        "one-cycle", panel="Training", help="How the learning rate climbs and falls."
    )
    warmup: float = option(
        0.02, panel="Training", min=0, max=1, help="Share of the steps in which the learning rate climbs."
    )
    final_lr: float = option(0.2, panel="Training", min=0, max=1, help="The last learning rate, as a share of --lr.")
    weight_decay: float = option(
        1e-3, panel="Training", min=0, max=1000, help="AdamW's weight decay, of matrices of linear layers only."
    )
    beta1: float = option(0.9, panel="Training", min=0, max=0.99999, help="AdamW's first beta.")
    beta2: float = option(0.95, panel="Training", min=0, max=0.99999, help="AdamW's second beta.")
    clip: float = option(
        1.0, panel="Training", min=0, help="Norm that larger gradients are clipped to; 0 for no clipping."
    )
    bad_steps: int = option(
        10,
        panel="Training",
        min=1,
        help="Stop after this many steps in a row whose loss or gradient is not finite. Such steps change nothing.",
    )
    seed: int = option(
        0, panel="Training", min=0, max=LARGEST_SEED, help="Seed for the initial weights, the data's order and dropout."
    )

    device: str = option(
        "auto",
        panel="Machine",
        saved=False,
        help="Where to train: cpu, cuda, cuda:1; auto: a GPU where there is one, each process of a launch its own.",
    )
    precision: Literal["auto", "bf16", "fp16", "fp32"] = option(
        "auto",
        panel="Machine",
        help="Precision to compute in; auto: accelerate's own setting, else bf16 on a GPU that has it, else fp32.",
    )
    tf32: bool = option(True, panel="Machine", help="Use TF32 on a GPU for products that stay in fp32.")
    compile: bool = option(False, panel="Machine", help="Compile the model with torch.compile.")
    fused_loss: bool = option(
        True, panel="Machine", help="Work the loss out piece by piece, without holding the logits of all tokens."
    )
    gradient_checkpointing: bool | None = option(
        None,
        panel="Machine",
        help="Compute activations again in the backward pass: less memory, a third more work. "
        "[default: with --read-chunk]",
        saves_memory="--gradient-checkpointing",
    )
    keep_retrieved: bool = option(
        True,
        panel="Machine",
        help="With --read-chunk and --gradient-checkpointing: do not choose and read blocks again, but keep what was "
        "found.",
        saves_memory="--no-keep-retrieved (with --read-chunk)",
    )

    fp32_residual: bool = option(
        False, panel="Machine", help="In a bf16 run, keep the sum that the layers add to (the residual stream) in fp32."
    )

    output: Path | None = option(
        None, panel="Output", saved=False, help="Directory of the run. [default: a new one under runs/]"
    )
    resume: bool = option(
        False,
        panel="Output",
        saved=False,
        help="Go on from the newest checkpoint in --output, with the options that the run was started with where no "
        "others are given; without a checkpoint there, start.",
    )
    log_every: int = option(10, panel="Output", min=1, help="Steps between two lines of metrics.jsonl.")
    eval_every: int = option(500, panel="Output", min=0, help="Steps between two evaluations; 0 for no evaluation.")
    eval_windows: int = option(128, panel="Output", min=1, help="Windows of validation text that an evaluation reads.")
    save_every: int = option(1000, panel="Output", min=0, help="Steps between two checkpoints; 0 for no checkpoints.")
    keep: int = option(2, panel="Output", min=1, help="How many of the newest checkpoints are kept.")
    log_with: list[Literal["wandb", "tensorboard"]] | None = option(
        None, panel="Output", saved=False, help="Trackers to log to besides metrics.jsonl."
    )
    log_project: str = option(
        "landmark",
        panel="Output",
        saved=False,
        help="With --log-with: the project that a run is shown in; of tensorboard, the folder in --output.",
    )
    log_name: str | None = option(
        None,
        panel="Output",
        saved=False,
        help="With --log-with wandb: the run's name there. [default: that of --output]",
    )

    @staticmethod
    def resumed_recipe(resume: bool, output: str | None) -> Path | None:
        """The recipe of a command line that names none: a run that is resumed goes on as its directory says."""
        recipe = Path(output).expanduser() / RECIPE if resume and output else None
        if recipe is None or not recipe.is_file():
            return None
        check_saved(
            recipe,
            f"if you changed it, give --recipe {recipe} too; if it was damaged, remove it and give the options again",
        )
        return recipe


def changed(name: str, default: Any, said: str = "") -> Any:
    """The option `name` of every run, with another default for one command. said: what the help says of the default."""
    fields = {**DataOptions.__dataclass_fields__, **RunOptions.__dataclass_fields__}
    metadata = dict(fields[name].metadata)
    if said:
        metadata["help"] = f"{metadata['help'].partition(' [default:')[0]} [default: {said}]"
    return dataclasses.field(default=default, metadata=metadata)


def check_weights(options: DataOptions) -> None:
    """Raise UsageError unless there is one of --data-weights for each of --data, or none, and where answers have a
    weight beside nothing."""
    if options.answers_only and options.answer_weight not in (None, 1):
        raise UsageError(
            "--answer-weight weighs answers against other tokens, which --answers-only leaves out: give one"
        )
    weights, corpora = len(options.data_weights or ()), len(options.data or ())
    if weights and weights != corpora:
        raise UsageError(f"--data-weights: {weights} given for {corpora} of --data")


def check_documents(options: DataOptions, landmarks: bool = True) -> None:
    """Raise UsageError where options of how windows are read and packed do not go with each other, LandmarkError where
    a corpus is known to have no documents to be masked. landmarks: whether the model has some."""
    if options.explore and options.read_chunk is None:
        raise UsageError("--explore draws blocks where a window is read chunk by chunk: give --read-chunk too")
    for name, value in (("--read-chunk", options.read_chunk), ("--mask-documents", options.mask_documents)):
        if value and not landmarks:
            raise UsageError(f"{name} is for landmark attention: leave out --baseline or {name}")
    if options.mask_documents:
        from landmark_cli.data.checks import check_known_documents

        check_known_documents(options.data or [])


def reading(options: DataOptions, landmark_freq: int, top_k_blocks: int | None) -> WindowSettings | None:
    """How windows are read chunk by chunk, or None where every token sees its whole window.

    Raises UsageError where the chunks do not fit the blocks or the windows.
    """
    from landmark_cli.training.reading import window_settings

    if options.read_chunk is None:
        return None
    return window_settings(
        options.read_chunk,
        options.sequence_length,
        landmark_freq,
        top_k_blocks,
        explore=options.explore,
        joint=getattr(options, "softmax", None) == "joint",
    )


def check_window(sequence_length: int, landmark_freq: int, top_k_blocks: int | None) -> None:
    """Raise UsageError where a model trained on such windows could not read with these settings."""
    from landmark_cli.data.landmarks import largest_top_k

    largest = largest_top_k(sequence_length, landmark_freq)
    if largest < 0:
        raise UsageError(
            f"--sequence-length {sequence_length} is shorter than two blocks of --landmark-freq "
            f"{counted(landmark_freq, 'text token')} and a landmark, which reading takes: make it longer, or the "
            "blocks shorter"
        )
    if top_k_blocks is not None and top_k_blocks > largest:
        raise UsageError(
            f"--top-k-blocks {top_k_blocks} leaves no room for a chunk in a window of {counted(largest + 2, 'block')}: "
            f"take at most {largest}, or a longer --sequence-length"
        )


def compiles_layers(options: RunOptions) -> bool:
    """Whether what is compiled are single layers, not the whole model: where steps are few, and layers alike. Those
    that draw random blocks are told their numbers, and one's code is not another's."""
    few = hasattr(options, "teacher")
    return bool(options.compile) and few and not options.explore
