"""`landmark eval perplexity` and `landmark eval passkey`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from landmark_cli.commands.models import ModelOptions, name_model, open_model
from landmark_cli.console import info, results
from landmark_cli.errors import LandmarkError
from landmark_cli.inference.settings import ReadingSettings, has_landmarks
from landmark_cli.options import option

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from landmark_cli.data.token_file import TokenFile
    from landmark_cli.evaluation.perplexity import PerplexityResult, Score

PERPLEXITY_EXAMPLES = """
landmark eval perplexity --model runs/pg19-landmark --data data/pg19/validation.bin --eval-length 4096 --top-k 4
landmark eval perplexity --eval-length 2048 --sample-tokens 100000 --json perplexity.json
landmark eval perplexity --model runs/pg19-landmark --no-memory --eval-length 512
landmark eval perplexity --model runs/pg19-baseline --data data/pg19 --eval-length 360
"""

MEASUREMENT = "Measurement"
OUTPUT = "Output"


@dataclass
class PerplexityOptions(ReadingSettings, ModelOptions):
    """Perplexity and accuracy of a model on a token file, overall and by chunk.

    The text is cut into windows of --eval-length text tokens, each read in chunks through the block cache. Every token
    predicts the one after it; landmarks and ends of documents predict nothing.
    """

    top_k_blocks: int | None = option(
        None,
        names=("--top-k",),
        panel="Reading",
        min=0,
        help="Blocks retrieved for each token; 0 for none. [default: as the model says]",
    )
    data: Path | None = option(
        None,
        panel=MEASUREMENT,
        help="A token file, or a prepared corpus whose validation.bin is read. [default: the newest under data/]",
    )
    eval_length: int | None = option(
        None, panel=MEASUREMENT, min=1, help="Text tokens of a window. [default: 4 times the trained length]"
    )
    memory: bool = option(True, panel=MEASUREMENT, help="Remember earlier chunks; without, each is read by itself.")
    sample_tokens: int | None = option(
        None, panel=MEASUREMENT, min=1, help="Read a random choice of windows of about so many tokens. [default: all]"
    )
    seed: int = option(0, panel=MEASUREMENT, min=0, help="Of that choice.")
    batch_size: int | None = option(
        None, panel=MEASUREMENT, min=1, help="Windows read at a time. [default: by their chunks' length]"
    )
    json: str | None = option(
        None, panel=OUTPUT, saved=False, help="Write the results to this file as data too; - for standard output."
    )


def run_perplexity(options: PerplexityOptions) -> None:
    """Measure, print a table and, where asked, write the results as JSON.

    Raises LandmarkError where model and token file do not fit each other or the text is too short.
    """
    file = open_text(options.data)
    name = name_model(options)
    model, tokenizer = open_model(name, options)
    check_fits(file, name, model, tokenizer)
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


def open_text(path: Path | None) -> TokenFile:
    """The token file a path names: itself, or a corpus directory's validation.bin; by default the newest corpus's."""
    from landmark_cli.data.token_file import TokenFile, find_corpus

    if path is None:
        path = find_corpus(Path("data"))
        info(f"reading {path / 'validation.bin'} of the newest prepared corpus under data/ (--data names another)")
    return TokenFile.open(path / "validation.bin" if path.is_dir() else path)


def check_fits(file: TokenFile, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise LandmarkError unless the token file's ids mean to the model what they meant to its tokenizer."""
    file.check_tokenizer(lambda text: tokenizer.encode(text, add_special_tokens=False), name)
    if file.metadata.vocab_size > model.config.vocab_size:
        raise LandmarkError(
            f"{file.path} has ids up to {file.metadata.vocab_size}, the model {name} knows {model.config.vocab_size}: "
            f"prepare the corpus with the model's own tokenizer"
        )


def perplexity_data(result: PerplexityResult, model: PreTrainedModel, reading: ReadingSettings) -> dict[str, Any]:
    """A result as plain data; the same run gives the same data. "reading" is None where no block is retrieved."""
    retrieval = None
    if result.memory and has_landmarks(model):
        retrieval = {
            "top_k": model.config.top_k_blocks if reading.top_k_blocks is None else reading.top_k_blocks,
            "cache_blocks": reading.cache_blocks,
            "selection": reading.selection,
            "positions": reading.positions,
        }
    return {
        "eval_length": result.eval_length,
        "chunk": result.chunk,
        "windows": result.windows,
        "memory": result.memory,
        "reading": retrieval,
        "dropped_retrievals": result.dropped,
        **_score_data(result.overall),
        "chunks": [_score_data(score) for score in result.chunks],
    }


def _score_data(score: Score) -> dict[str, Any]:
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
        cache = "all blocks" if reading["cache_blocks"] is None else f"the newest {reading['cache_blocks']} blocks"
        how = f"top-k {reading['top_k']} of {cache}, {reading['selection']}"
    if result.dropped is not None:
        how += f", {result.dropped:.1%} of retrievals dropped"
    return (
        f"{name} on {file.path}: {result.windows} windows of {result.eval_length} text tokens "
        f"in chunks of {result.chunk}, {how}"
    )
