"""`landmark finetune`: landmark attention for a pretrained decoder."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from landmark_cli.commands.finetune_data import open_data, share_of_tasks
from landmark_cli.commands.finetune_defaults import GATE, PLAIN, TAUGHT, WIDTH
from landmark_cli.commands.finetune_model import saving_of, trained_length, untrained, write_rest
from landmark_cli.commands.finetune_plan import adapter_settings, plan, with_defaults
from landmark_cli.commands.finetune_report import AUTO, Report, check_report
from landmark_cli.commands.finetune_teacher import check_gate, check_launch, check_teacher, distillation
from landmark_cli.commands.finetune_warnings import warn_of_blocks, warn_of_course
from landmark_cli.commands.models import CodeOptions
from landmark_cli.commands.run_loop import begin, carry_out, make_loop
from landmark_cli.commands.run_options import (
    TOP_K_BLOCKS_HELP,
    DataOptions,
    RunOptions,
    changed,
    check_documents,
    check_weights,
    check_window,
    reading,
)
from landmark_cli.commands.task_kinds import KINDS_HELP, TaskKind
from landmark_cli.console import counted, info
from landmark_cli.errors import UsageError, import_extra
from landmark_cli.options import LONGEST, Options, option
from landmark_cli.softmax import Softmax
from landmark_cli.training.fit import CPU_WINDOW, STEP_TOKENS

if TYPE_CHECKING:
    from accelerate import Accelerator

    from landmark_cli.training.teachers import UntouchedRows

DATA, MODEL, LORA, TEACHER = "Data", "Model", "LoRA", "Teacher"
NAMED_BY_EARLIER_RUNS = {"sequence_length", "landmark_freq", "landmarks_in_loss", "text_field", "validation_share"}
NAMED_BY_EARLIER_RUNS |= {"lora_rank", "lora_alpha", "lora_dropout", "lora_targets", "merge", "four_bit", "save_dtype"}


@dataclass
class LoraOptions(Options):
    """Adapters in place of training every weight."""

    lora_rank: int | None = option(
        None,
        panel=LORA,
        min=1,
        max=65_536,
        help="Train adapters of this rank, the embeddings and the head. [default: train every weight]",
        saves_memory="a small --lora-rank",
    )
    lora_alpha: float | None = option(
        None, panel=LORA, min=0, max=1e6, help="What adapters add is scaled by alpha / rank. [default: twice the rank]"
    )
    lora_dropout: float = option(0.0, panel=LORA, min=0, max=0.99, help="Dropout of the adapters' input.")
    lora_targets: list[str] | None = option(
        None, panel=LORA, help="Names of the layers that get adapters. [default: every linear layer but the head]"
    )
    merge: bool = option(False, panel=LORA, help="Write a plain model, the adapters merged into its weights.")
    four_bit: bool = option(
        False,
        panel=LORA,
        help="Keep the frozen weights in 4 bits (needs bitsandbytes).",
        saves_memory="--four-bit with a --lora-rank",
    )


@dataclass
class TeacherOptions(Options):
    """What the model learns from besides the text."""

    teacher: str = option(
        "self",
        panel=TEACHER,
        help="Whose predictions the model is to keep while it gets landmarks, by their divergence at every token: self "
        "is the model as it was, with full attention; or another one of its family (a directory or a hub id); none "
        "trains on the text alone.",
    )
    answer_divergence_weight: float | None = option(
        None,
        panel=TEACHER,
        min=0,
        max=1e6,
        help="Weight of the mean divergence over the tokens of answers, where a corpus marks them (as tasks does): "
        f"what the teacher can look up, the model is to. [default: {TAUGHT['answer_divergence_weight']:g}]",
    )
    text_weight: float | None = option(
        None,
        panel=TEACHER,
        min=0,
        max=1e6,
        help="Weight of the text's own loss beside the teacher. [default: 0]",
    )
    distill_temperature: float = option(
        1.0, panel=TEACHER, min=0.01, max=100, help="Temperature of both predictions where they are compared."
    )
    gate_weight: float | None = option(
        None,
        panel=TEACHER,
        min=0,
        max=1e6,
        help="Weight of the gate's own loss: how every layer shares its attention out among blocks, beside how the "
        f"teacher's layer does. [default: {GATE:g} with --softmax joint, whose landmarks learn by it alone; else 0]",
    )
    hidden_weight: float = option(
        0.0,
        panel=TEACHER,
        min=0,
        max=1e6,
        help="Weight of the hidden states' loss: how far every layer's output is from that of the teacher's layer.",
    )


@dataclass(kw_only=True)
class PretrainedOptions(CodeOptions):
    """Which model, and its landmarks."""

    model: str = option(panel=MODEL, help="The model to fine-tune: a directory or a hub id.")
    landmark_freq: int = option(63, panel=MODEL, min=1, max=LONGEST, help="Text tokens between landmarks.")
    top_k_blocks: int | None = option(
        None, panel=MODEL, min=0, max=LONGEST, help=TOP_K_BLOCKS_HELP.format(further="; up to 16 with --softmax joint")
    )
    softmax: Softmax | None = option(
        None,
        panel=MODEL,
        help="What landmarks do. joint: they choose the blocks that are read, and all text that is read shares one "
        "softmax, so that the model keeps what it knows. grouped: they also share attention out among blocks, as in "
        "the paper. [default: joint, where a teacher can show which blocks matter; grouped with --teacher none and "
        "for models with soft-capped logits or attention sinks; that of a model with landmarks]",
    )


@dataclass(kw_only=True)
class TextOptions(DataOptions):
    """What to train on."""

    data: list[str] | None = option(
        None,
        panel=DATA,
        help="A directory of token files made with the model's tokenizer, files or folders of text (.txt, .md, .tex, "
        ".jsonl, .parquet), a hub id, or sample, pg19, arxiv-math, redpajama. Repeatable. [default: sample, the novels "
        "that are part of this program]",
    )
    tasks_share: float | None = option(
        None,
        panel=DATA,
        min=0,
        max=1,
        help="Share of the windows that hold tasks: facts hidden in the text of --data (in the novels where all of it "
        "marks answers), and asked for at the window's end. [default: 0.5; 0 with --teacher none and where --data "
        "marks answers already]",
    )
    kinds: list[TaskKind] | None = option(
        None, panel=DATA, help=f"{KINDS_HELP} [default: as `landmark prepare tasks` draws them]"
    )
    sequence_length: int | None = changed(
        "sequence_length",
        None,
        f"as many as the model has positions, {STEP_TOKENS} at most, or as the memory holds; {CPU_WINDOW} on a CPU; "
        f"{PLAIN['sequence_length']} with --teacher none",
    )
    answer_weight: float | None = option(
        None,
        panel=DATA,
        min=0,
        max=1e6,
        help="Weight, beside the teacher, of the mean loss over the tokens of answers, where a corpus marks them (as "
        "tasks does). With --teacher none: of each of their tokens, where other tokens weigh 1. [default: "
        + f"{TAUGHT['answer_weight']:g}; {PLAIN['answer_weight']:g} with --teacher none]",
    )
    landmarks_in_loss: bool = option(False, panel=DATA, help="Train the model to predict landmarks too.")
    text_field: str = option("text", panel=DATA, help="The field or column that holds the text of .jsonl and .parquet.")
    validation_share: float = option(
        0.01, panel=DATA, min=0, max=0.5, help="Share of text held out where the data has no validation split."
    )


@dataclass
class FinetuneOptions(RunOptions, TeacherOptions, LoraOptions, PretrainedOptions, TextOptions):
    """Give a pretrained decoder landmark attention and fine-tune it.

    Works for decoders of the transformers library with rotary positions: Llama, Mistral, Qwen, Phi3, OLMo, GPT-NeoX
    and others. Text is tokenized with the model's tokenizer into token files beside the run, packed into windows, and
    landmarks are put in. Runs on one device as it is, on several, with FSDP or DeepSpeed through `accelerate launch`.
    """

    train: Literal["all", "landmarks"] = option(
        "all",
        panel="Training",
        help="Which weights: all of them, or the landmark's row and every layer's queries and keys alone; "
        "for adapters see --lora-rank.",
    )
    steps: int | None = changed("steps", None, f"{TAUGHT['steps']}; {PLAIN['steps']} with --teacher none")
    batch_size: int | None = changed(
        "batch_size", None, f"as many of a step's windows as fit; {PLAIN['batch_size']} with --teacher none"
    )
    accumulation: int | None = changed(
        "accumulation",
        None,
        f"so many that a step has {STEP_TOKENS} tokens; {PLAIN['accumulation']} with --teacher none",
    )
    lr: float | None = changed(
        "lr",
        None,
        f"{TAUGHT['lr']:g}, and times {WIDTH} over its width for a wider model; {PLAIN['lr']:g} with --teacher none",
    )
    schedule: Literal["one-cycle", "cosine", "linear", "constant"] = changed("schedule", "cosine")
    warmup: float = changed("warmup", 0.03)
    final_lr: float = changed("final_lr", 0.1)
    weight_decay: float = changed("weight_decay", 0.1)
    beta2: float = changed("beta2", 0.999)
    gradient_checkpointing: bool | None = changed(
        "gradient_checkpointing", None, "with --read-chunk, and where the memory would not hold a step otherwise"
    )
    compile: bool | None = changed(
        "compile",
        None,
        "in runs of more than some two minutes on GPUs, none of which holds a share of the model; not with --four-bit",
    )
    eval_windows: int | None = changed(
        "eval_windows", None, f"{PLAIN['eval_windows']}, beside a teacher fewer of longer windows and of short runs"
    )
    # What a bf16 residual stream does to pretrained weights has not been measured.
    fp32_residual: bool = changed("fp32_residual", True)
    save_dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto",
        panel="Output",
        help="Type of the weights in the finished model; auto: the type they had before fine-tuning.",
    )

    eval_ruler: str = option(
        AUTO,
        panel="Output",
        metavar="<samples>",
        help="Samples of each task and length of a small RULER (three tasks, up to 8 times the trained length) that "
        "the trained model is asked at the end, and the untouched one: a number; auto, up to 10, as the device is "
        "fast; none.",
    )
    eval_ruler_every: int = option(
        0, panel="Output", min=0, help="Ask it every so many steps too; 0 asks at the end alone."
    )
    dry_run: bool = option(
        False,
        panel="Output",
        saved=False,
        help="Print parameters, tokens per step, estimated memory (the teacher too) and time, measured on a few "
        "steps with random weights; then stop.",
    )

    @staticmethod
    def read_earlier(values: dict[str, Any], format: int | None) -> dict[str, Any]:
        """The values of a recipe of some format as they are meant today: see `options.load_recipe`.

        What a run saved names every option that there was, which nobody does by hand. Runs that saved no teacher had
        none. Those of the earliest versions saved no format either: their sequence_length counted text alone, and the
        landmarks of a window came on top. A recipe that lacks some options was written for what the help says.
        """
        if not NAMED_BY_EARLIER_RUNS <= values.keys():
            return values
        values = {"teacher": "none", "tasks_share": 0.0, "softmax": "grouped"} | values
        if values["teacher"] != "none":
            values = {"answer_divergence_weight": 0.0} | values
        if format is not None:
            return values
        from landmark_cli.data.landmarks import stream_length

        text = values["sequence_length"]
        length = stream_length(text, values["landmark_freq"])
        found = counted(text, "text token")
        info(f"the recipe was saved by an earlier version: its {found} a window are {length} with landmarks")
        return values | {"sequence_length": length}


def run(options: FinetuneOptions) -> Path | None:
    """Fine-tune, and leave a model directory (or, with adapters that are not merged, an adapter directory), which is
    returned; after a dry run there is none.

    Raises UsageError for options that contradict each other, LandmarkError for a model that landmark attention does not
    fit and for what is wrong with data or directories.
    """
    check(options)
    from landmark_cli.training.finetuning import check_positions, check_pretrained
    from landmark_cli.training.setup import use_device

    use_device(options.device)
    config = check_pretrained(options.model, trust_remote_code=options.trust_remote_code)
    given, options = options, with_defaults(options, config)
    check_gate(options, asked=given.softmax is not None)
    warn_of_course(given, options)
    warn_of_blocks(options, config)
    check_windows(options)
    check_positions(
        config,
        options.model,
        landmark_freq=options.landmark_freq,
        trained_length=trained_length(options),
        read=reading(options, options.landmark_freq, options.top_k_blocks),
    )
    if options.dry_run:
        plan(options)
        return None
    with begin(options, run_name(options)) as begun:
        return finetune(options, begun)


def finetune(options: FinetuneOptions, begun: tuple[Accelerator, Path, str]) -> Path:
    """The run itself, in every process. Returns its directory."""
    from landmark_cli.training.publish import Publication
    from landmark_cli.training.teachers import UntouchedRows

    accelerator, output, precision = begun
    check_launch(options, accelerator)
    untouched: list[UntouchedRows] = []
    model, trained, tokenizer = untrained(
        options,
        precision,
        four_bit_on=accelerator.device if options.four_bit else None,
        opened=lambda model: untouched.append(UntouchedRows(model)),
    )

    def save_rest(directory: Path) -> None:
        write_rest(directory, options, model, tokenizer, output, accelerator.num_processes)

    publication = Publication(trained, output, save_rest, saving_of(options, tokenizer))

    # Before the text is tokenized, which may take hours: a teacher that cannot be opened ends the run here.
    distilled = distillation(options, trained, tokenizer, untouched, begun)
    data, tasks_share = open_data(options, tokenizer, begun)
    options = dataclasses.replace(options, tasks_share=tasks_share)
    loop = make_loop(
        options,
        begun,
        trained,
        model.config,
        data,
        landmarks_in_loss=options.landmarks_in_loss,
        read=reading(options, options.landmark_freq, options.top_k_blocks),
        identity={"adapters": str(adapter_settings(options)), "landmarks_in_loss": options.landmarks_in_loss}
        | ({} if options.train == "all" else {"train": options.train})
        | ({} if options.softmax == "grouped" else {"softmax": options.softmax})
        | ({"tasks_share": tasks_share} if tasks_share else {})
        | ({"kinds": options.kinds} if tasks_share and options.kinds else {}),
        distillation=distilled,
    )
    report = Report(options, model, tokenizer, publication, loop)
    loop.examine = report.in_the_middle
    carry_out(options, "finetune", model.config, loop)
    publication.publish(loop)
    report.at_the_end()
    accelerator.end_training()
    info(f"trained {'adapters' if options.lora_rank is not None and not options.merge else 'model'}: {output}")
    return output


def check(options: FinetuneOptions) -> None:
    """Raise UsageError for options that cannot go together, LandmarkError for a missing package that one needs."""
    check_documents(options)
    if options.sequence_length is not None:
        check_windows(options)
    check_weights(options)
    check_teacher(options)
    # Here for what options say by themselves: text may take hours to tokenize.
    share_of_tasks(options, marked=False)
    check_report(options)
    given = [name for name in ("merge", "four_bit", "lora_targets", "lora_alpha") if getattr(options, name)]
    if given and options.lora_rank is None:
        raise UsageError(f"--{given[0].replace('_', '-')} is for adapters: give --lora-rank too")
    if options.train != "all" and options.lora_rank is not None:
        raise UsageError("--train landmarks and --lora-rank both say what is trained: give one")
    if options.lora_rank is not None:
        import_extra("peft", "lora")
    if options.four_bit:
        import_extra("bitsandbytes", "qlora")


def check_windows(options: FinetuneOptions) -> None:
    """Raise UsageError where a model could not be read with such windows, blocks and chunks."""
    if reading(options, options.landmark_freq, options.top_k_blocks) is None:
        check_window(options.sequence_length, options.landmark_freq, options.top_k_blocks)


def run_name(options: FinetuneOptions) -> str:
    """The name of a run without --output."""
    return f"{Path(options.model).name}-landmark"
