"""The next token of rows that each sample in their own way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from landmark_cli.inference.generation import draw, logits_processors
from landmark_cli.inference.readers import are_finite
from landmark_cli.inference.settings import SamplingSettings
from landmark_cli.inference.text import TextStream
from landmark_cli.models.device import to_device
from landmark_cli.serving.request import Request

# Ways to sample of which the processors are kept.
MOST_WAYS = 1000


@dataclass
class Row:
    """A request that has a row. left: what is still to be read of its prompt; reused: tokens of it that a memory held.
    tokens: sampled so far. unsent: text that has not been handed on yet; begun: whether some has."""

    request: Request
    left: Tensor
    reused: int
    stream: TextStream
    generator: torch.Generator
    tokens: list[int] = field(default_factory=list)
    unsent: str = ""
    begun: bool = False


class Sampler:
    """Samples a token for each of several rows. Rows that sample alike do so together, and the device is waited for
    once."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer
        self._processors: dict[tuple, LogitsProcessorList] = {}

    def sample(self, rows: Mapping[int, Row], logits: Tensor) -> dict[int, int | None]:
        """The next token of each of these rows, by their numbers, None where its logits are not finite.

        logits: (B, vocabulary) of all rows there are, also of such as are not asked for.
        """
        finite = are_finite(logits)
        logits = torch.where(finite[:, None], logits.float(), 0.0)
        drawn = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        alike: dict[tuple, list[int]] = {}
        for number, row in rows.items():
            chosen = row.request.sampling
            way = chosen.temperature, chosen.top_p, chosen.top_k, chosen.repetition_penalty
            # A repetition penalty looks at each row's own tokens; nothing else does.
            alike.setdefault((way, number if chosen.repetition_penalty != 1.0 else None), []).append(number)
        for (way, _), numbers in alike.items():
            first = rows[numbers[0]]
            index = to_device(torch.tensor(numbers), logits.device)
            theirs = logits if len(numbers) == len(logits) else logits[index]
            seen = index.new_empty(len(numbers), 0)
            if first.request.sampling.repetition_penalty != 1.0:
                seen = to_device(torch.tensor([first.request.ids + first.tokens]), logits.device)
            scores = self._processors_of(way, first.request.sampling)(seen, theirs)
            greedy = first.request.sampling.temperature == 0
            drawn[index] = scores.argmax(-1) if greedy else draw(scores, [rows[each].generator for each in numbers])
        tokens, fine = torch.stack([drawn, finite.long()]).tolist()
        return {number: tokens[number] if fine[number] else None for number in rows}

    def _processors_of(self, way: tuple, sampling: SamplingSettings) -> LogitsProcessorList:
        if way not in self._processors:
            if len(self._processors) >= MOST_WAYS:
                self._processors.clear()
            self._processors[way] = logits_processors(self.model, self.tokenizer, sampling)
        return self._processors[way]
