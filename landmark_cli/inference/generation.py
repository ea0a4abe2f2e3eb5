"""Generate text after prompts of any length: read in chunks, then sampled token by token.

Sampling is transformers' own: logits processors, stopping criteria and streamers; only the reading is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    StopStringCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

from landmark_cli.console import progress
from landmark_cli.data.pretrained_tokenizers import prompt_ids, prompts_ids
from landmark_cli.errors import LandmarkError, UsageError
from landmark_cli.inference.chat import ChatTemplate
from landmark_cli.inference.readers import BaseReader, are_finite, open_reader
from landmark_cli.inference.settings import ReadingSettings, SamplingSettings
from landmark_cli.inference.stopping import Stopping
from landmark_cli.inference.text import CONTEXT, TextStream
from landmark_cli.models.generation_config import tokens_without_text

# Room is made for this many new tokens at a time: whoever asks for a million may get an end of text after ten.
EXPECTED_TOKENS = 4096
# At lower temperatures quotients of logits no longer fit into float32, and only the likeliest token is drawn anyway.
COLDEST = 1e-6
Finish = Literal["end of text", "stop string", "length", "stopping criterion"]


@dataclass(frozen=True)
class Generation:
    """What was generated after one prompt.

    text: without the prompt, the end-of-text token and the stop string. tokens: all that were sampled. finish: why
    generation ended. reads: where a trace was asked for, for each token the blocks that the query read which predicted
    it (see BaseReader.trace).
    """

    text: str
    tokens: list[int]
    prompt_tokens: int
    finish: Finish
    reads: list[list[dict[str, int | float]]] | None = None


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Sequence[int] | Tensor],
    sampling: SamplingSettings | None = None,
    *,
    reading: ReadingSettings | None = None,
    reader: BaseReader | None = None,
    processors: LogitsProcessorList | None = None,
    criteria: StoppingCriteriaList | None = None,
    streamer: BaseStreamer | None = None,
    on_text: Callable[[int, str], None] | None = None,
    on_read: Callable[[], None] | None = None,
    trace: bool = False,
    show_progress: bool = False,
) -> list[Generation]:
    """Continue prompts, texts or token ids of any lengths, as one batch.

    Row r samples with the seed `sampling.seed + r`, so a row gives what it would give alone with that seed. reader: a
    reader that has read nothing or a text that the prompts go on from; without one `reading` says how to read.
    processors, criteria: further logits processors and stopping criteria of transformers, which come after ours;
    criteria see the generated tokens only. streamer: a streamer of transformers, for a single prompt; it gets the
    prompt's ids and then every token as it comes. on_text: called with a row and its next piece of text. on_read:
    called once the prompts are read. trace: record which blocks were read, for a single prompt of a model with
    landmarks. show_progress: show a progress bar while the prompts are read.

    Raises LandmarkError where a prompt holds the landmark token or a token that the model does not know, or is empty
    and no token begins a text, and where the model's logits are not finite; UsageError where a model that reads no
    blocks is to be traced; TypeError for a single text, which stands in a list too; ValueError where there is no
    prompt, or one is no text and no row of token ids, or where both a reader and `reading` are given.

    >>> model, tokenizer = landmark_cli.load("runs/landmark", device="cpu")
    >>> settings = landmark_cli.SamplingSettings(max_new_tokens=5, temperature=0)
    >>> short, long = landmark_cli.generate(model, tokenizer, ["Once", "It was the best of times. " * 50], settings)
    >>> short.prompt_tokens, long.prompt_tokens, len(long.tokens), long.finish
    (1, 351, 5, 'length')
    """
    sampling = sampling or SamplingSettings()
    if isinstance(prompts, str):
        raise TypeError("prompts: a single text stands in a list too: [text]")
    encoded = (encode_prompt(tokenizer, prompt) if isinstance(prompt, str) else prompt for prompt in prompts)
    rows = [torch.as_tensor(prompt, dtype=torch.long) for prompt in encoded]
    if not rows or any(row.dim() != 1 for row in rows):
        raise ValueError("prompts: there must be one or more, each a text or a list of token ids")
    if not all(map(len, rows)):
        raise ValueError("prompts: a row of no tokens has nothing to go on from")
    check_ids(model, rows)
    if reader is not None and reading is not None:
        raise ValueError("reading: a reader reads by its own settings; give one of the two")
    if streamer is not None and len(rows) != 1:
        raise ValueError("streamer: transformers' streamers take a single prompt")
    if trace and len(rows) != 1:
        raise ValueError("trace: only a single prompt of a model with landmarks can be traced")
    reader = reader or open_reader(model, reading or ReadingSettings(), batch=len(rows))
    reads_of = reader.trace() if trace else None
    reads = [] if trace else None
    ends = end_tokens(model, tokenizer)
    streams = [TextStream(tokenizer, row[-CONTEXT:].tolist(), sampling.stop or ()) for row in rows]
    tokens: list[list[int]] = [[] for _ in rows]
    if streamer is not None:
        streamer.put(rows[0][None])

    def give(row: int, piece: str) -> None:
        if piece and on_text is not None:
            on_text(row, piece)

    for step in sample(
        reader,
        rows,
        sampling,
        LogitsProcessorList([*logits_processors(model, tokenizer, sampling), *(processors or ())]),
        StoppingCriteriaList([*stopping_criteria(tokenizer, ends, sampling), *(criteria or ())]),
        on_read=on_read,
        show_progress=show_progress,
        # A trace tells of what was read last.
        ahead=not trace,
    ):
        if trace:
            reads.append(reads_of(0))
        for row, token in enumerate(step):
            if token is None:
                continue
            tokens[row].append(token)
            if streamer is not None:
                streamer.put(torch.tensor([token]))
            if token not in ends:
                give(row, streams[row].add(token))
    for row, stream in enumerate(streams):
        give(row, stream.end())
    if streamer is not None:
        streamer.end()

    def finish(row: int) -> Finish:
        if streams[row].stopped:
            return "stop string"
        if tokens[row] and tokens[row][-1] in ends:
            return "end of text"
        return "length" if len(tokens[row]) == sampling.max_new_tokens else "stopping criterion"

    return [Generation(streams[r].text, tokens[r], len(rows[r]), finish(r), reads) for r in range(len(rows))]


def sample(
    reader: BaseReader,
    prompts: Sequence[Tensor],
    sampling: SamplingSettings,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    *,
    on_read: Callable[[], None] | None = None,
    show_progress: bool = False,
    ahead: bool = True,
) -> Iterator[list[int | None]]:
    """Read prompts, (n,) int64 text tokens each and none empty, and sample until the criteria have stopped every row.

    Yields the next token of each row; None for a row that has stopped. ahead: the tokens are being read already when
    they are yielded, so that the device is at work while the caller is; not so where criteria that are not known might
    look at what the caller does.

    Raises LandmarkError where the model's logits are not finite.
    """
    device = reader.model.device
    new = sampling.max_new_tokens
    reader.expect(max(map(len, prompts)) + min(new, EXPECTED_TOKENS), steps=new)
    logits = read_prompts(reader, prompts, show_progress=show_progress)
    if on_read is not None:
        on_read()
    width, most = max(map(len, prompts)), sampling.max_new_tokens
    # Rows are padded with a token of their own, so that a repetition penalty does the same to a row alone and in a
    # batch.
    ids = torch.stack([torch.cat([row[:1].expand(width - len(row)), row]) for row in prompts]).to(device)
    generators = [torch.Generator(device).manual_seed(sampling.seed + row) for row in range(len(prompts))]
    going, stopping = [True] * len(prompts), Stopping(criteria)
    greedy, ahead = sampling.temperature == 0, ahead and stopping.early
    for end in range(width, width + most):
        if end == ids.shape[1]:
            more = min(max(end, EXPECTED_TOKENS), width + most - end)
            ids = torch.cat([ids, ids.new_zeros(len(prompts), more)], dim=1)
        finite = are_finite(logits)
        logits = logits.float()
        if not greedy:
            # Drawing from scores that are not finite would end a GPU's work before the user can be told why.
            logits = torch.where(finite[:, None], logits, 0.0)
        scores = processors(ids[:, :end], logits)
        ids[:, end] = scores.argmax(-1) if greedy else draw(scores, generators)
        text = ids[:, width : end + 1]
        # In one go, so that the host waits for the device once.
        drawn, fine, *asked = torch.stack([ids[:, end], finite, *(stopping.asked(text) if ahead else ())]).tolist()
        reader.require_finite(all(fine for fine, on in zip(fine, going, strict=True) if on))
        tokens = [token if on else None for token, on in zip(drawn, going, strict=True)]
        if not ahead:
            yield tokens
            asked = [stops.tolist() for stops in stopping.asked(text)]
        going = stopping.going(going, drawn, text.shape[1], asked)
        if any(going):
            logits = reader.step([token if on else None for token, on in zip(tokens, going, strict=True)])
        if ahead:
            yield tokens
        if not any(going):
            return


def read_prompts(reader: BaseReader, prompts: Sequence[Tensor], *, show_progress: bool = False) -> Tensor:
    """Read every prompt, (n,) int64 text tokens, into its row; return the logits after its last token, (B,
    vocabulary)."""
    last = None
    with progress("reading", sum(map(len, prompts)), "tokens") if show_progress else nullcontext() as shown:
        for part in reader.read(prompts, last_only=True):
            logits = part.logits[:, -1]
            has = torch.tensor([length > 0 for length in part.lengths], device=logits.device)
            last = logits if last is None else torch.where(has[:, None], logits, last)
            if shown is not None:
                shown.advance(sum(part.lengths))
    return last


def draw(scores: Tensor, generators: list[torch.Generator]) -> Tensor:
    """A token of each row by its own generator: scores (B, V) -> (B,)."""
    shares = scores.softmax(-1)
    drawn = [torch.multinomial(row, 1, generator=generator) for row, generator in zip(shares, generators, strict=True)]
    return torch.cat(drawn)


class NeverGenerated(LogitsProcessor):
    """transformers' SuppressTokensLogitsProcessor, which looks all of the vocabulary up anew for every token, with a
    mask that is kept."""

    def __init__(self, tokens: Iterable[int]):
        self.tokens = frozenset(tokens)
        self._mask = torch.zeros(0, dtype=torch.bool)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores: (B, vocabulary), of which a copy is returned."""
        if (len(self._mask), self._mask.device) != (scores.shape[-1], scores.device):
            mask = torch.zeros(scores.shape[-1], dtype=torch.bool)
            mask[[token for token in self.tokens if 0 <= token < len(mask)]] = True
            self._mask = mask.to(scores.device)
        return scores.masked_fill(self._mask, -torch.inf)


def logits_processors(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sampling: SamplingSettings
) -> LogitsProcessorList:
    """transformers' processors for the settings; tokens that are no text never pass."""
    processors = LogitsProcessorList()
    silent = tokens_without_text(model, tokenizer)
    if silent:
        processors.append(NeverGenerated(silent))
    if sampling.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature == 0:
        return processors
    if sampling.temperature != 1.0:
        processors.append(TemperatureLogitsWarper(max(sampling.temperature, COLDEST)))
    if sampling.top_k > 0:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1.0:
        processors.append(TopPLogitsWarper(sampling.top_p))
    return processors


def stopping_criteria(
    tokenizer: PreTrainedTokenizerBase, ends: Sequence[int], sampling: SamplingSettings
) -> StoppingCriteriaList:
    """transformers' criteria for the settings, to be asked about the generated tokens alone."""
    criteria = StoppingCriteriaList([MaxLengthCriteria(sampling.max_new_tokens)])
    if ends:
        criteria.append(EosTokenCriteria(list(ends)))
    if sampling.stop:
        criteria.append(StopStringCriteria(tokenizer, list(sampling.stop)))
    return criteria


def check_ids(model: PreTrainedModel, rows: Sequence[Tensor]) -> None:
    """Raise LandmarkError where a text (n,) has an id that the model has no row for: the tokenizer is another
    model's."""
    largest = max((int(row.max()) for row in rows if len(row)), default=0)
    known = model.config.vocab_size
    if largest >= known:
        raise LandmarkError(
            f"the tokenizer gives the token {largest}, and the model {model.config.name_or_path} knows {known}: put "
            "the tokenizer files it was saved with beside it"
        )


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a text by tokenizer, config or generation config."""
    found: set[int] = set()
    for source in (tokenizer, model.config, getattr(model, "generation_config", None)):
        named = getattr(source, "eos_token_id", None)
        found.update([named] if isinstance(named, int) else named or ())
    return sorted(found)


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: str, *, chat: bool = False, goes_on: bool = False
) -> list[int]:
    """The ids of a prompt, at least one: see `prompt_ids`. chat: as a user's message in the tokenizer's chat template.
    goes_on: the prompt goes on from a text that was read before, so nothing begins it.

    Raises UsageError where the tokenizer has no chat template or an empty text is to go on, LandmarkError where an
    empty prompt cannot be begun.
    """
    if chat:
        if not tokenizer.chat_template:
            raise UsageError("--chat: this model's tokenizer has no chat template; give the prompt without it")
        message = [{"role": "user", "content": prompt}]
        with closing(ChatTemplate(tokenizer)) as template:
            prompt = template.render(message, add_generation_prompt=True)
    if goes_on:
        ids = prompt_ids(tokenizer, prompt, begins=False)
        if not ids:
            raise UsageError("the prompt is empty: give some text that goes on from what was read")
        return ids
    return encode_prompts(tokenizer, [prompt])[0]


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[list[int]]:
    """The ids of each of several prompts, as `encode_prompt` gives them."""
    encoded = prompts_ids(tokenizer, prompts)
    if all(encoded):
        return encoded
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if begin is None:
        raise LandmarkError("the prompt is empty, and this tokenizer has no token to begin a text with; give some text")
    return [ids or [begin] for ids in encoded]
