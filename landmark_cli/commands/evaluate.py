"""`landmark eval perplexity` and `landmark eval passkey`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from landmark_cli.commands.measurement import (
    file_option,
    haystack_option,
    json_option,
    prompts_at_a_time,
    sample_tokens_option,
    text_option,
    window_seed_option,
    windows_at_a_time,
)
from landmark_cli.commands.models import ModelOptions, name_model, open_model
from landmark_cli.console import counted, info, results, show
from landmark_cli.errors import UsageError
from landmark_cli.inference.settings import ReadingSettings
from landmark_cli.options import LARGEST_SEED, check_outputs, option

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from landmark_cli.data.token_file import TokenFile
    from landmark_cli.evaluation.passkey import Cell, PassKeyResult
    from landmark_cli.evaluation.perplexity import PerplexityResult
    from landmark_cli.evaluation.ruler.haystacks import Prose
    from landmark_cli.evaluation.score import Score

MEASUREMENT = "Measurement"
OUTPUT = "Output"


@dataclass
class EvaluationOptions(ReadingSettings, ModelOptions):
    """How a command that measures opens a model and reads with it."""


@dataclass
class PerplexityOptions(EvaluationOptions):
    """Perplexity and accuracy of a model on a token file, overall and by chunk.

    The text is cut into windows of --eval-length text tokens, each read in chunks through the block cache. Every token
    predicts the one after it; landmarks and ends of documents predict nothing.
    """

    data: Path | None = text_option(MEASUREMENT)
    eval_length: int | None = option(
        None,
        panel=MEASUREMENT,
        min=1,
        help="Text tokens of a window. [default: 4 times the trained length]",
        saves_memory="a shorter --eval-length",
    )
    memory: bool = option(
        True, panel=MEASUREMENT, help="Remember earlier chunks; otherwise each chunk is read by itself."
    )
    sample_tokens: int | None = sample_tokens_option(MEASUREMENT)
    seed: int = window_seed_option(MEASUREMENT)
    batch_size: int | None = windows_at_a_time(MEASUREMENT)
    json: str | None = json_option(OUTPUT)


@dataclass
class PassKeyOptions(EvaluationOptions):
    """Hide a number in filler text, or in --haystack, and ask the model for it.

    Lengths count text tokens, the question included. The table gives the share of keys found with its 95 % interval
    (Wilson), the heat map the share by depth of the key and length of the prompt.
    """

    lengths: list[int] = option(
        [512, 1024, 2048, 4096],
        panel=MEASUREMENT,
        min=1,
        help="Text tokens of the prompts, with commas between.",
        saves_memory="shorter --lengths",
    )
    prompts: int = option(
        10, panel=MEASUREMENT, min=1, help="Prompts of each length; with --depths, of each length at each depth."
    )
    depths: int | None = option(
        None,
        panel=MEASUREMENT,
        min=1,
        help="Put keys at this many depths, evenly from 0 to 1. [default: at depths drawn from 0 to 1]",
    )
    haystack: Path | None = haystack_option(
        MEASUREMENT,
        "Text to hide keys in, between its sentences: sample, the shipped novels, or your own. [default: the paper's "
        "filler, one sentence repeated]",
    )
    full_attention: bool = option(
        False, panel=MEASUREMENT, help="Read with ordinary attention, as models without landmarks do."
    )
    batch_size: int | None = prompts_at_a_time(MEASUREMENT)
    seed: int = option(
        0, panel=MEASUREMENT, min=0, max=LARGEST_SEED, help="Seed for drawing keys, depths and stretches of --haystack."
    )
    json: str | None = json_option(OUTPUT)
    plot: Path | None = file_option(OUTPUT, "Write the heat map to this file as a picture. Needs the extra plot.")


def run_perplexity(options: PerplexityOptions) -> dict[str, Any]:
    """Measure, print a table and, where asked, write the results as JSON. Returns what --json writes.

    Raises LandmarkError where model and token file do not fit each other or the text is too short.
    """
    check_outputs(options)
    file = open_text(options.data)
    name = name_model(options)
    model, tokenizer = open_model(name, options)
    check_text(file, model, tokenizer, name)
    from landmark_cli.data.pretrained_tokenizers import begin_ids
    from landmark_cli.evaluation.perplexity import evaluate_perplexity

    result = evaluate_perplexity(
        model,
        file.tokens,
        eot_id=file.metadata.eot_id,
        eval_length=options.eval_length,
        memory=options.memory,
        reading=options,
        batch_size=options.batch_size,
        sample_tokens=options.sample_tokens,
        seed=options.seed,
        begin=begin_ids(tokenizer),
    )
    data = {"model": name, "data": str(file.path), **perplexity_data(result, model, options)}
    chunks = [_score_row(str(index), score) for index, score in enumerate(result.chunks)]
    results(
        ["chunk", "perplexity", "loss", "accuracy", "tokens"],
        [*chunks, _score_row("all", result.overall)],
        data=data,
        json_target=options.json,
        title=_title(name, file, result, data["reading"]),
    )
    return data


def run_passkey(options: PassKeyOptions) -> dict[str, Any]:
    """Measure, print table and heat map and, where asked, write the results as JSON and as a picture. Returns what
    --json writes.

    Raises LandmarkError for a length that no prompt can have, or where the picture's package is missing.
    """
    check_outputs(options)
    if options.plot is not None:
        from landmark_cli.evaluation.pictures import check_picture

        check_picture(options.plot)
    name = name_model(options)
    model, tokenizer = open_model(name, options, attention="sdpa" if options.full_attention else None)
    from landmark_cli.evaluation.heat_map import draw_heat_map, terminal_heat_map
    from landmark_cli.evaluation.passkey import evaluate_passkey

    prose = _passkey_prose(options, tokenizer)
    result = evaluate_passkey(
        model,
        tokenizer,
        options.lengths,
        prompts=options.prompts,
        depths=options.depths,
        reading=options,
        full_attention=options.full_attention,
        batch_size=options.batch_size,
        seed=options.seed,
        prose=prose,
    )
    rows = [
        [length, cell.prompts, cell.found, cell.accuracy, "{:.3f}-{:.3f}".format(*cell.interval)]
        for length, cell in ((length, result.cell(length)) for length in result.lengths)
    ]
    data = {"model": name, **passkey_data(result, model, options)}
    reading = data["reading"]
    how = f"top-k-blocks {reading['top_k_blocks']}{by_text(reading)}" if reading else "its own window"
    if options.full_attention:
        how = "full attention"
    where = "" if prose is None else f" in {prose.name}"
    results(
        ["tokens", "prompts", "found", "accuracy", "95 % interval"],
        rows,
        data=data,
        json_target=options.json,
        title=f"pass keys{where}, {name}, {how}",
    )
    show(terminal_heat_map(result), stderr=options.json == "-")
    if options.plot is not None:
        draw_heat_map(result, options.plot, f"keys found{where}: {Path(name).name}, {how}")
        info(f"wrote {options.plot}")
    return data


def _passkey_prose(options: PassKeyOptions, tokenizer: PreTrainedTokenizerBase) -> Prose | None:
    """What --haystack names; None for the paper's filler."""
    if options.haystack is None:
        return None
    from landmark_cli.evaluation.ruler.encoding import PromptEncoder
    from landmark_cli.evaluation.ruler.haystacks import Prose

    prose = Prose(PromptEncoder(tokenizer), options.haystack)
    prose.check_tokens(max(options.lengths))
    return prose


def open_text(path: Path | None) -> TokenFile:
    """The token file a path names: itself, or a corpus directory's validation.bin; by default the newest corpus's."""
    from landmark_cli.data.token_file import TokenFile, newest_corpus

    if path is None:
        path = newest_corpus(Path("data"))
        info(f"reading {path / 'validation.bin'} of the newest prepared corpus under data/ (--data names another)")
    return TokenFile.open(path / "validation.bin" if path.is_dir() else path)


def check_text(file: TokenFile, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raise LandmarkError where a token file was made with another tokenizer than the model's. name: what the user
    calls the model."""
    from landmark_cli.data.checks import check_token_files
    from landmark_cli.data.pretrained_tokenizers import text_ids

    check_token_files([file], partial(text_ids, tokenizer), model.config.vocab_size, name)


def perplexity_data(result: PerplexityResult, model: PreTrainedModel, reading: ReadingSettings) -> dict[str, Any]:
    """A result as plain data; the same run gives the same data. "reading" is None where no block is retrieved."""
    return {
        "eval_length": result.eval_length,
        "chunk": result.chunk,
        "windows": result.windows,
        "memory": result.memory,
        "reading": retrieval_data(model, reading) if result.memory else None,
        "dropped_retrievals": result.dropped,
        **score_data(result.overall),
        "chunks": [score_data(score) for score in result.chunks],
    }


def passkey_data(result: PassKeyResult, model: PreTrainedModel, options: PassKeyOptions) -> dict[str, Any]:
    """A result as plain data; the same run gives the same data."""
    return {
        "haystack": None if options.haystack is None else str(options.haystack),
        "full_attention": options.full_attention,
        "reading": None if options.full_attention else retrieval_data(model, options),
        "seed": options.seed,
        "lengths": [
            {
                "tokens": length,
                **cell_data(result.cell(length)),
                "depths": [
                    {"from": depths[0], "to": depths[1], **cell_data(result.cell(length, depths))}
                    for depths in result.depths
                ],
            }
            for length in result.lengths
        ],
        "trials": trials_data(result),
    }


def trials_data(result: PassKeyResult) -> list[dict[str, Any]]:
    """Every prompt and its answer, as plain data."""
    return [{**asdict(trial), "found": trial.found} for trial in result.trials]


def retrieval_data(model: PreTrainedModel, reading: ReadingSettings) -> dict[str, Any] | None:
    """How a model retrieves, as plain data; None for a model without landmarks."""
    from landmark_cli.inference.readers import has_landmarks

    if not has_landmarks(model):
        return None
    return {
        "top_k_blocks": model.config.top_k_blocks if reading.top_k_blocks is None else reading.top_k_blocks,
        "cache_blocks": reading.cache_blocks,
        "selection": reading.selection,
        "positions": reading.positions,
        "rerank_blocks": reading.rerank_blocks,
        "block_temperature": reading.block_temperature,
    }


def by_text(reading: dict[str, Any]) -> str:
    """What the text of blocks decides, for a title; nothing where it decides nothing. reading: plain data."""
    found = "" if reading["rerank_blocks"] is None else f", by the text of {reading['rerank_blocks']}"
    return found + ("" if reading["block_temperature"] == 1.0 else f", at temperature {reading['block_temperature']:g}")


def reading_alone(options: ReadingSettings) -> ReadingSettings:
    """How blocks are read, but for their number, of which such a command measures several."""
    names = {field.name for field in fields(ReadingSettings)} - {"top_k_blocks"}
    return ReadingSettings(**{name: getattr(options, name) for name in names})


def reading_alone_data(options: ReadingSettings) -> dict[str, Any]:
    """The same as plain data."""
    return {key: value for key, value in asdict(reading_alone(options)).items() if key != "top_k_blocks"}


def check_retrieves(model: PreTrainedModel, name: str, top_k_blocks: list[int] | None, instead: str) -> None:
    """Raise UsageError where numbers of blocks are asked for of a model without landmarks. instead: what to do."""
    from landmark_cli.inference.readers import has_landmarks

    if top_k_blocks is not None and not has_landmarks(model):
        raise UsageError(f"--top-k-blocks: {name} has no landmarks, so it retrieves no blocks; {instead}")


def cell_data(cell: Cell) -> dict[str, Any]:
    """How many keys were found, as plain data."""
    return {"prompts": cell.prompts, "found": cell.found, "accuracy": cell.accuracy, "interval": cell.interval}


def score_data(score: Score) -> dict[str, Any]:
    return {
        "tokens": score.tokens,
        "loss": score.loss,
        "perplexity": score.perplexity,
        "accuracy": score.accuracy,
    }


def _score_row(name: str, score: Score) -> list[Any]:
    return [name, score.perplexity, score.loss, score.accuracy, score.tokens]


def _title(name: str, file: TokenFile, result: PerplexityResult, reading: dict[str, Any] | None) -> str:
    how = "with the memory of earlier ones" if result.memory else "each by itself"
    if reading is not None:
        cache = (
            "all blocks"
            if reading["cache_blocks"] is None
            else f"the newest {counted(reading['cache_blocks'], 'block')}"
        )
        how = f"top-k-blocks {reading['top_k_blocks']} of {cache}, {reading['selection']}{by_text(reading)}"
    if result.dropped is not None:
        how += f", {result.dropped:.1%} of retrievals dropped"
    return (
        f"{name} on {file.path}: {counted(result.windows, 'window')} of {counted(result.eval_length, 'text token')} "
        f"in chunks of {result.chunk}, {how}"
    )
