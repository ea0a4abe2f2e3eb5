"""transformers' loop of greedy decoding and sampling, `GenerationMixin._sample`, over a LandmarkCache.

What comes out is the same, bit for bit. Left out is what the cache has no use for, which takes as long as a good part
of a small model's step on a GPU: attention masks and positions that grow with the text, a forward that is given the
newest tokens on the device and fetches them to the host again, and a second wait for the device in every step.
models/calls.py has transformers' loop lead here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
    SuppressTokensLogitsProcessor,
)
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.streamers import BaseStreamer

from landmark_cli.inference.generation import NeverGenerated
from landmark_cli.inference.landmark_cache import LandmarkCache
from landmark_cli.inference.stopping import Stopping
from landmark_cli.models.device import to_device


def goes(config: GenerationConfig, synced_gpus: bool, model_kwargs: dict[str, Any]) -> bool:
    """Whether the loop here may take the place of transformers' own, given what that is called with."""
    cached = isinstance(model_kwargs.get("past_key_values"), LandmarkCache) and model_kwargs.get("use_cache", True)
    return cached and not synced_gpus and not getattr(config, "is_assistant", False)


def sample(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    config: GenerationConfig,
    streamer: BaseStreamer | None,
    model_kwargs: dict[str, Any],
) -> GenerateDecoderOnlyOutput | Tensor:
    """What `GenerationMixin._sample` returns: the text, (B, T) int64, and what the config asks for besides."""
    cache: LandmarkCache = model_kwargs["past_key_values"]
    scores = () if config.return_dict_in_generate and config.output_scores else None
    all_logits = () if config.return_dict_in_generate and config.output_logits else None
    ends = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    padding = _padding(config) if ends else None
    processors = _without_repeats(logits_processor)

    def give(tokens: list[int]) -> None:
        if streamer is not None:
            streamer.put(torch.tensor(tokens))

    logits = model._prefill(input_ids, config, model_kwargs, is_first_iteration=True).logits[:, -1]
    going, unfinished, stopping = [True] * len(input_ids), None, Stopping(stopping_criteria)
    while True:
        # A copy: the reader may write over what it gave.
        logits = logits.to(input_ids.device, torch.float32, copy=True)
        of_step = processors(input_ids, logits)
        scores = scores if scores is None else (*scores, of_step)
        all_logits = all_logits if all_logits is None else (*all_logits, logits)
        if config.do_sample:
            tokens = torch.multinomial(of_step.softmax(-1), num_samples=1).squeeze(1)
        else:
            tokens = of_step.argmax(-1)
        if padding is not None and unfinished is not None:
            tokens = torch.where(unfinished, tokens, padding)
        input_ids = torch.cat([input_ids, tokens[:, None]], dim=-1)
        # In one go, so that the host waits for the device once.
        drawn, *asked = torch.stack([tokens, *(stopping.asked(input_ids, scores) if stopping.early else ())]).tolist()
        if not stopping.early:
            give(drawn)
            asked = [stops.tolist() for stops in stopping.asked(input_ids, scores)]
        before, going = going, stopping.going(going, drawn, input_ids.shape[1], asked)
        if any(going):
            logits = cache.step(drawn)
        if stopping.early:
            # The device is at work meanwhile.
            give(drawn)
        if not any(going):
            break
        if going != before:
            unfinished = to_device(torch.tensor(going), input_ids.device)
    if streamer is not None:
        streamer.end()
    if not config.return_dict_in_generate:
        return input_ids
    return GenerateDecoderOnlyOutput(sequences=input_ids, scores=scores, logits=all_logits, past_key_values=cache)


def _padding(config: GenerationConfig) -> int:
    """What stands behind a row's end."""
    if config.pad_token_id is not None:
        return int(config.pad_token_id)
    ends = config.eos_token_id
    return int(ends[0] if isinstance(ends, list | tuple) else ends)


def _without_repeats(processors: LogitsProcessorList) -> LogitsProcessorList:
    """The same processors, of which none looks the vocabulary up for every token, or forbids what the one before it has
    forbidden."""
    if type(processors) is not LogitsProcessorList:
        return processors
    kept = []
    for processor in processors:
        if type(processor) is SuppressTokensLogitsProcessor:
            processor = NeverGenerated(processor.suppress_tokens.flatten().tolist())
        before = kept[-1] if kept else None
        both = isinstance(processor, NeverGenerated) and isinstance(before, NeverGenerated)
        if not (both and processor.tokens <= before.tokens):
            kept.append(processor)
    return LogitsProcessorList(kept)
