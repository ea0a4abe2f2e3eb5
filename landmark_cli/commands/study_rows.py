"""How the rows of a study are measured: a class for each of the things that they measure, of which study_prompts.py has
those that ask prompts, and the models that play its roles."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from landmark_cli.commands.evaluate import (
    check_retrieves,
    check_text,
    open_text,
    perplexity_data,
    reading_alone,
    score_data,
)
from landmark_cli.commands.models import open_model, precision_of
from landmark_cli.commands.study_prompts import PassKeyRows, RulerRows
from landmark_cli.console import warn_once
from landmark_cli.errors import LandmarkError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from landmark_cli.commands.study import StudyOptions
    from landmark_cli.evaluation.longppl import LongText
    from landmark_cli.evaluation.ruler.encoding import PromptEncoder
    from landmark_cli.evaluation.ruler.haystacks import Prose
    from landmark_cli.evaluation.studies import FinishedRows, LongPerplexityRow, Row, Study
    from landmark_cli.interrupts import Interrupts


@dataclass
class Given:
    """What a study is asked for, and what its rows share. models: role to what the user calls the role's model."""

    options: StudyOptions
    study: Study
    output: Path
    models: dict[str, str]
    _encoded: dict[tuple[str, bool], tuple[PromptEncoder, Prose]] = field(default_factory=dict)

    def prose(
        self, name: str, tokenizer: PreTrainedTokenizerBase, *, chat: bool = False
    ) -> tuple[PromptEncoder, Prose]:
        """What encodes prompts for a model, and the prose in which they hide things. name: the model's."""
        from landmark_cli.evaluation.ruler.encoding import PromptEncoder
        from landmark_cli.evaluation.ruler.haystacks import Prose

        if (name, chat) not in self._encoded:
            # Encoding a long haystack takes seconds, which all rows of a model share.
            encoder = PromptEncoder(tokenizer, chat=chat)
            self._encoded[name, chat] = encoder, Prose(encoder, self.options.haystack)
        return self._encoded[name, chat]


class Begins:
    """With what the tokenizers of a study's models begin every text."""

    def __init__(self) -> None:
        self._by_role: dict[str, tuple[int, ...]] = {}

    def note(self, role: str, tokenizer: PreTrainedTokenizerBase) -> None:
        """The tokenizer of a role's model."""
        from landmark_cli.data.pretrained_tokenizers import begin_ids

        self._by_role[role] = tuple(begin_ids(tokenizer))

    def of(self, role: str) -> tuple[int, ...]:
        """The tokens, by a role whose tokenizer was noted."""
        return self._by_role[role]

    def depends_on(self, *roles: str) -> dict[str, Any]:
        """What the results of a row depend on that these roles' models read (JSON): nothing where nothing begins their
        texts, as nothing did in earlier versions."""
        begins = [list(self.of(role)) for role in roles]
        return {"begin": begins} if any(begins) else {}


class PerplexityRows:
    """Measures the rows of a study of perplexity.

    common: what every row's result depends on. about: what the study's data say of it besides.
    """

    def __init__(self, given: Given):
        options = self._options = given.options
        self._begins = Begins()
        self._file = open_text(options.data)
        self.common = {
            "data": self._file.metadata.sha256,
            "sample_tokens": options.sample_tokens,
            "seed": options.seed,
            **precision_of(options),
        }
        self.about = {"text": str(self._file.path)}

    def check(self, row: Row, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str | None:
        """Raise LandmarkError where a row cannot be measured; model: without weights. name: its, for messages. Returns
        why the row may mislead, or stay empty; None where nothing is known against it."""
        from landmark_cli.evaluation.perplexity import default_eval_length, window_starts
        from landmark_cli.inference.readers import open_reader

        check_text(self._file, model, tokenizer, name)
        self._begins.note(row.role, tokenizer)
        tokens = len(self._file.tokens)
        window_starts(tokens, row.settings.get("eval-length", 1), None, 0)
        reader = open_reader(model, row.reading(), memory=row.settings.get("memory", True))
        return reader.beyond_training(row.settings.get("eval-length") or default_eval_length(model, tokens))

    def depends_on(self, row: Row) -> dict[str, Any]:
        """What else the result of a row depends on that was checked (JSON)."""
        return self._begins.depends_on(row.role)

    def measure(self, row: Row, opened: Opened, asked: Interrupts) -> dict[str, Any]:
        """The figures of a row that was checked."""
        from landmark_cli.evaluation.perplexity import evaluate_perplexity

        options, (model, _) = self._options, opened(row.role)
        reading = row.reading()
        result = evaluate_perplexity(
            model,
            self._file.tokens,
            eot_id=self._file.metadata.eot_id,
            eval_length=row.settings.get("eval-length"),
            memory=row.settings.get("memory", True),
            reading=reading,
            batch_size=options.batch_size,
            sample_tokens=options.sample_tokens,
            seed=options.seed,
            begin=self._begins.of(row.role),
        )
        return perplexity_data(result, model, reading)


class LongPerplexityRows:
    """Measures the rows of a study of LongPPL. What is found in a window is kept, so a row that was interrupted goes
    on. One role is the evaluator, whose key tokens all rows of the same windows share.

    common, about: as of PerplexityRows. Raises UsageError where no model plays the evaluator.
    """

    def __init__(self, given: Given):
        from landmark_cli.evaluation.studies import model_identity

        options, study, models = given.options, given.study, given.models
        if study.evaluator not in models:
            role = study.evaluator
            raise UsageError(f"{study.name} finds key tokens with the model of {role}: give --role {role}=MODEL")
        self._options, self._output, self._evaluator, self._models = options, given.output, study.evaluator, models
        self._begins = Begins()
        self._file = open_text(options.data)
        self._found: dict[str, list[list[int]]] = {}
        self.common = {
            "benchmark": "longppl",
            "evaluator": model_identity(models[study.evaluator]),
            "data": self._file.metadata.sha256,
            "sample_tokens": options.sample_tokens,
            "seed": options.seed,
            **precision_of(options),
        }
        self.about = {"text": str(self._file.path)}

    @cached_property
    def _windows(self) -> FinishedRows:
        from landmark_cli.evaluation.studies import FinishedRows

        return FinishedRows(self._output / "windows.jsonl")

    def check(self, row: Row, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str | None:
        """As of PerplexityRows. The evaluator reads every row's windows."""
        from landmark_cli.evaluation.longppl import check_context, check_reading, ways_of_long
        from landmark_cli.evaluation.ways import beyond_training
        from landmark_cli.inference.settings import ReadingSettings

        check_text(self._file, model, tokenizer, name)
        self._begins.note(row.role, tokenizer)
        asks, text = self._text(row)
        check_context(text, asks.short_context)
        blocks = None if asks.top_k_blocks is None else [asks.top_k_blocks]
        check_retrieves(model, name, blocks, "leave it out of its rows")
        (way,), reading = ways_of_long(model, blocks), reading_alone(row.reading())
        check_reading(model, [way], reading, text.eval_length)
        evaluator = self._evaluator_outline
        check_reading(evaluator, ways_of_long(evaluator, None), ReadingSettings(), text.eval_length)
        return beyond_training(model, way, reading, text.eval_length)

    @cached_property
    def _evaluator_outline(self) -> PreTrainedModel:
        from landmark_cli.models.store import outline

        model, tokenizer = outline(self._models[self._evaluator], trust_remote_code=self._options.trust_remote_code)
        self._begins.note(self._evaluator, tokenizer)
        return model

    def depends_on(self, row: Row) -> dict[str, Any]:
        """As of PerplexityRows."""
        return self._begins.depends_on(row.role, self._evaluator)

    def _text(self, row: Row) -> tuple[LongPerplexityRow, LongText]:
        """What a row asks for, and the text in its windows."""
        from landmark_cli.evaluation.longppl import long_text

        options, about = self._options, self._file.metadata
        asks = row.asks()
        sample = {"sample_tokens": options.sample_tokens, "seed": options.seed}
        return asks, long_text(self._file.tokens, about.eot_id, about.sha256, eval_length=asks.eval_length, **sample)

    def measure(self, row: Row, opened: Opened, asked: Interrupts) -> dict[str, Any]:
        """The figures of a row that was checked."""
        from landmark_cli.evaluation.longppl import find_key_tokens, measure_long_perplexity, ways_of_long
        from landmark_cli.evaluation.studies import model_identity

        options = self._options
        asks, text = self._text(row)

        def depends_on(role: str) -> dict[str, Any]:
            return {"model": model_identity(opened.name(role)), **precision_of(options)}

        of_windows = {"context": asks.short_context, "stride": asks.stride}
        key = repr((text.eval_length, of_windows))
        if key not in self._found:
            evaluator = self._model(opened, self._evaluator)
            (way,) = ways_of_long(evaluator, None)
            about_evaluator = {"depends_on": depends_on(self._evaluator), "batch_size": options.batch_size}
            self._found[key] = find_key_tokens(
                evaluator,
                way,
                self._read_by(self._evaluator, text),
                self._windows,
                asked,
                **of_windows,
                **about_evaluator,
            )
            del evaluator
        model = self._model(opened, row.role)
        (way,) = ways_of_long(model, None if asks.top_k_blocks is None else [asks.top_k_blocks])
        result = measure_long_perplexity(
            model,
            way,
            self._read_by(row.role, text),
            self._found[key],
            self._windows,
            asked,
            depends_on=depends_on(row.role),
            reading=reading_alone(row.reading()),
            batch_size=options.batch_size,
        )
        return {
            "eval_length": text.eval_length,
            "reading": way.name,
            "key_tokens": score_data(result.key),
            "all_tokens": score_data(result.overall),
        }

    def _read_by(self, role: str, text: LongText) -> LongText:
        """A text as a role's model reads it."""
        return replace(text, begin=self._begins.of(role))

    def _model(self, opened: Opened, role: str) -> PreTrainedModel:
        model, tokenizer = opened(role)
        # The evaluator may play in no row.
        check_text(self._file, model, tokenizer, opened.name(role))
        return model


def check_rows(
    study: Study,
    models: dict[str, str],
    kinds: dict[str, Rows],
    *,
    trust_remote_code: bool,
) -> None:
    """Raise LandmarkError naming the first row that cannot be measured, before hours have gone into those before it;
    warn of rows that may mislead, or stay empty."""
    from landmark_cli.models.store import outline

    outlines = {
        role: outline(models[role], trust_remote_code=trust_remote_code)
        for role in dict.fromkeys(row.role for row in study.rows)
        if role in models
    }
    doubts: dict[str, list[str]] = {}
    for number, row in enumerate(study.rows, 1):
        if row.role in outlines:
            try:
                said = kinds[row.kind].check(row, models[row.role], *outlines[row.role])
            except LandmarkError as error:
                raise type(error)(f"study {study.name}, row {number}: {error}") from None
            if said:
                doubts.setdefault(said, []).append(str(number))
    for said, rows in doubts.items():
        warn_once(said, f"study {study.name}, row{'s' * (len(rows) > 1)} {', '.join(rows)}: ")


Rows = PerplexityRows | LongPerplexityRows | RulerRows | PassKeyRows
MEASURES: dict[str, type[Rows]] = {
    "perplexity": PerplexityRows,
    "longppl": LongPerplexityRows,
    "ruler": RulerRows,
    "passkey": PassKeyRows,
}


class Opened:
    """Models by role, one open at a time."""

    def __init__(self, models: dict[str, str], options: StudyOptions):
        self._models, self._options = models, options
        self._open: tuple[tuple[str, str | None], Any] | None = None

    def name(self, role: str) -> str:
        """What the user calls the role's model."""
        return self._models[role]

    def __call__(self, role: str, attention: str | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The role's model and its tokenizer. attention: as of `open_model`."""
        if self._open is None or self._open[0] != (role, attention):
            # The memory of the last model is given back before the next is opened.
            self._open = None
            self._open = (role, attention), open_model(self._models[role], self._options, attention=attention)
        return self._open[1]
