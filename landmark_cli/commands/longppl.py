"""`landmark eval longppl`: perplexity of the tokens that need a long context, in one or several ways of reading."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from landmark_cli.commands.evaluate import (
    EvaluationOptions,
    by_text,
    check_retrieves,
    check_text,
    open_text,
    reading_alone,
    reading_alone_data,
    score_data,
)
from landmark_cli.commands.measurement import (
    json_option,
    sample_tokens_option,
    several_top_k_blocks_option,
    text_option,
    window_seed_option,
    windows_at_a_time,
)
from landmark_cli.commands.models import name_model, open_model, precision_of
from landmark_cli.console import counted, results, warn
from landmark_cli.interrupts import interrupts, keeping
from landmark_cli.locks import sole_writer
from landmark_cli.options import LONGEST, check_outputs, option

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from landmark_cli.data.token_file import TokenFile
    from landmark_cli.evaluation.longppl import LongPerplexity, LongText
    from landmark_cli.evaluation.studies import FinishedRows

MEASUREMENT = "Measurement"
OUTPUT = "Output"
INSTEAD = "leave it out: windows are then read by ordinary attention"


@dataclass
class LongPerplexityOptions(EvaluationOptions):
    """Perplexity of the tokens that need a long context (LongPPL), beside that of all tokens.

    Those are tokens whose loss falls by more than 2 nats, to less than 2, when an evaluator reads the whole window in
    place of the last 4096 tokens (arXiv 2410.23771). The evaluator is the model itself, reading with the most blocks
    asked for, or another with the same tokenizer. Results are kept in the output directory: an interrupted run goes on.
    """

    evaluator: str | None = option(
        None, panel=MEASUREMENT, help="The model that finds the key tokens. [default: the model itself]"
    )
    data: Path | None = text_option(MEASUREMENT)
    eval_length: int | None = option(
        None,
        panel=MEASUREMENT,
        min=2,
        max=LONGEST,
        help="Text tokens of a window. [default: 32768, or the whole text where that is shorter]",
        saves_memory="a shorter --eval-length",
    )
    short_context: int = option(
        4096,
        panel=MEASUREMENT,
        min=1,
        max=LONGEST,
        help="Tokens of the short context that the whole window is compared with.",
    )
    stride: int = option(
        1024,
        panel=MEASUREMENT,
        min=1,
        max=LONGEST,
        help="Tokens that share a short context: it begins --short-context tokens in front of the first of them.",
    )
    top_k_blocks: list[int] | None = several_top_k_blocks_option()
    sample_tokens: int | None = sample_tokens_option(MEASUREMENT)
    seed: int = window_seed_option(MEASUREMENT)
    batch_size: int | None = windows_at_a_time(MEASUREMENT)
    output: Path = option(
        Path("studies/longppl"), panel=OUTPUT, help="Directory of the results, from which an interrupted run goes on."
    )
    json: str | None = json_option(OUTPUT)


def run(options: LongPerplexityOptions) -> dict[str, Any]:
    """Find the key tokens, measure, print the table and, where asked, write the results as JSON. Returns what --json
    writes.

    Raises UsageError for windows that are too short or too long for a model, LandmarkError where models and token file
    do not fit each other or the text is too short, Stopped where a signal came.
    """
    from landmark_cli.evaluation.studies import FinishedRows

    check_outputs(options)
    file = open_text(options.data)
    name = name_model(options)
    with sole_writer(options.output):
        finished = FinishedRows(options.output / "windows.jsonl")
        with keeping(finished.place):
            text, key_tokens, measured = _measure(options, file, name, finished)
    marked = sum(map(len, key_tokens))
    if not marked:
        warn("no key token was found: the evaluator predicts none of these tokens better by reading further back")
    rows = [
        [one.way.name, one.key.perplexity, one.overall.perplexity, one.key.loss, one.overall.loss, one.key.tokens]
        for one in measured
    ]
    data = {
        "model": name,
        "evaluator": options.evaluator or name,
        "data": str(file.path),
        "eval_length": text.eval_length,
        "short_context": options.short_context,
        "stride": options.stride,
        "windows": len(text.starts),
        "reading": reading_alone_data(options),
        "results": [
            {
                "reading": one.way.name,
                "top_k_blocks": one.way.top_k_blocks,
                "full_attention": one.way.full,
                "key_tokens": score_data(one.key),
                "all_tokens": score_data(one.overall),
            }
            for one in measured
        ],
    }
    overall = measured[0].overall.tokens
    results(
        ["reading", "key perplexity", "perplexity", "key loss", "loss", "key tokens"],
        rows,
        data=data,
        json_target=options.json,
        title=f"LongPPL, {name} on {file.path}: {counted(len(text.starts), 'window')} of "
        f"{counted(text.eval_length, 'text token')}, {marked} of {counted(overall, 'key token')} by "
        f"{options.evaluator or name}{by_text(data['reading'])}",
    )
    return data


def _measure(
    options: LongPerplexityOptions, file: TokenFile, name: str, finished: FinishedRows
) -> tuple[LongText, list[list[int]], list[LongPerplexity]]:
    from landmark_cli.data.pretrained_tokenizers import begin_ids
    from landmark_cli.evaluation.longppl import (
        check_context,
        check_reading,
        find_key_tokens,
        long_text,
        measure_long_perplexity,
        ways_of_long,
    )
    from landmark_cli.evaluation.studies import model_identity
    from landmark_cli.models.store import outline

    about = file.metadata
    sample = {"sample_tokens": options.sample_tokens, "seed": options.seed}
    text = long_text(file.tokens, about.eot_id, about.sha256, eval_length=options.eval_length, **sample)
    common = {"finished": finished, "reading": reading_alone(options), "batch_size": options.batch_size}

    def opened(which: str) -> tuple[PreTrainedModel, LongText]:
        """A model, and the text as it reads it."""
        model, tokenizer = open_model(which, options)
        check_text(file, model, tokenizer, which)
        return model, replace(text, begin=tuple(begin_ids(tokenizer)))

    def depends_on(which: str) -> dict[str, Any]:
        return {"model": model_identity(which), **precision_of(options)}

    check_context(text, options.short_context)
    if options.evaluator is not None:
        # What the model would be refused for is told before the evaluator has read for hours.
        outlined, tokenizer = outline(name, trust_remote_code=options.trust_remote_code)
        check_text(file, outlined, tokenizer, name)
        check_retrieves(outlined, name, options.top_k_blocks, INSTEAD)
        ways = ways_of_long(outlined, options.top_k_blocks)
        check_reading(outlined, ways, reading_alone(options), text.eval_length)
    with interrupts("finishing the windows under way") as asked:
        evaluator = options.evaluator or name
        model, read = opened(evaluator)
        asked_for = options.top_k_blocks if options.evaluator is None else None
        check_retrieves(model, name, asked_for, INSTEAD)
        ways = ways_of_long(model, asked_for)
        check_reading(model, ways, reading_alone(options), text.eval_length)
        way = max(ways, key=lambda one: one.top_k_blocks or 0)
        key_tokens = find_key_tokens(
            model,
            way,
            read,
            asked=asked,
            context=options.short_context,
            stride=options.stride,
            depends_on=depends_on(evaluator),
            **common,
        )
        if options.evaluator is not None:
            # The evaluator's memory is given back before the model is opened.
            del model
            model, read = opened(name)
            check_retrieves(model, name, options.top_k_blocks, INSTEAD)
            ways = ways_of_long(model, options.top_k_blocks)
        measured = [
            measure_long_perplexity(model, way, read, key_tokens, asked=asked, depends_on=depends_on(name), **common)
            for way in ways
        ]
    return text, key_tokens, measured
