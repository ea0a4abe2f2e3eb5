"""The two calls by which transformers asks a model for text, as they are answered with memory: generate and forward.

models/calls.py has transformers' own methods lead here.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from landmark_cli.console import warn
from landmark_cli.errors import LandmarkError, UsageError
from landmark_cli.inference import sampling_loop
from landmark_cli.inference.generation import NeverGenerated
from landmark_cli.inference.landmark_cache import LandmarkCache
from landmark_cli.inference.readers import has_landmarks
from landmark_cli.inference.settings import ReadingSettings
from landmark_cli.schema import check

# What a generation config and generate's arguments call the settings of reading.
SETTINGS = {"read_chunk" if field.name == "chunk" else field.name: field.name for field in fields(ReadingSettings)}
# Ways to decode that take tokens back after they were read.
ASSISTED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")
# What a plain forward can give and reading cannot.
INNER = ("output_hidden_states", "output_attentions")


def generate(plain: Callable, model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """transformers' `generate`, reading with memory.

    plain: transformers' own, with the arguments that follow. Those of SETTINGS say how to read: given here, in the
    generation config that is given, or in the model's own.

    Raises LandmarkError for what cannot be done with memory, UsageError for settings that make no sense.
    """
    given = dict(zip(list(inspect.signature(plain).parameters)[1:], args, strict=False)) | kwargs
    named = given.get("generation_config")

    def setting(name: str) -> Any:
        for source in (given, vars(named) if named is not None else {}, vars(model.generation_config)):
            if source.get(name) is not None:
                return source[name]
        return None

    settings = reading_settings({name: setting(name) for name in SETTINGS})
    for name in SETTINGS:
        given.pop(name, None)
    refuse(setting, given)
    cache = given.get("past_key_values")
    if cache is None:
        cache = LandmarkCache(model, settings)
    elif not isinstance(cache, LandmarkCache):
        raise other_cache(cache)
    cache.new_tokens = new_tokens(setting, given)
    given["past_key_values"] = cache
    if setting("cache_implementation") is not None:
        given["cache_implementation"] = None
    if setting("use_cache") is False:
        given["use_cache"] = True
    if has_landmarks(model):
        # The landmark is put in by the reader.
        processors = [NeverGenerated([model.config.landmark_token_id]), *(given.get("logits_processor") or ())]
        given["logits_processor"] = LogitsProcessorList(processors)
    with _any_length():
        return plain(model, **given)


def sample(
    plain: Callable,
    model: PreTrainedModel,
    input_ids: Any,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: GenerationConfig,
    synced_gpus: bool = False,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Any:
    """transformers' loop of greedy decoding and sampling, which `generate` comes to: ours over a LandmarkCache.

    plain: transformers' own, with the arguments that follow.
    """
    every_step = input_ids, logits_processor, stopping_criteria, generation_config
    if sampling_loop.goes(generation_config, synced_gpus, model_kwargs):
        return sampling_loop.sample(model, *every_step, streamer, model_kwargs)
    return plain(model, *every_step, synced_gpus=synced_gpus, streamer=streamer, **model_kwargs)


@contextmanager
def _any_length() -> Iterator[None]:
    """Keep transformers from warning that a text is longer than the model's positions: chunks never are."""
    logger = logging.getLogger("transformers.generation.stopping_criteria")

    def other(record: logging.LogRecord) -> bool:
        return "predefined maximum length" not in record.getMessage()

    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)


def reading_settings(values: dict[str, Any]) -> ReadingSettings:
    """Settings by the names of SETTINGS, of which None is the default. Raises UsageError for values of another kind."""
    chosen = {SETTINGS[name]: value for name, value in values.items() if value is not None}
    try:
        return check(ReadingSettings, chosen)
    except ValueError as error:
        raise UsageError(f"generate cannot read with {values}: {error}") from error


def refuse(setting: Callable[[str], Any], given: dict[str, Any]) -> None:
    """Raise LandmarkError for what generate cannot do with memory, saying what to do instead."""
    for name in ASSISTED:
        if setting(name):
            raise LandmarkError(
                f"{name}: assisted decoding takes tokens back, which a landmark model that has read them cannot; "
                "generate without it"
            )
    if given.get("inputs_embeds") is not None:
        raise LandmarkError("inputs_embeds: a landmark model reads token ids, among which it puts landmarks")
    kind = setting("cache_implementation")
    if kind not in (None, "dynamic"):
        raise LandmarkError(
            f"cache_implementation is {kind!r}: a landmark model keeps what it reads in blocks of its own; "
            'offload="cpu" keeps these in host memory'
        )


def new_tokens(setting: Callable[[str], Any], given: dict[str, Any]) -> int:
    """The most tokens that will be generated, as far as is known beforehand."""
    if setting("max_new_tokens") is not None:
        return setting("max_new_tokens")
    ids = given.get("inputs") if given.get("inputs") is not None else given.get("input_ids")
    return max(0, (setting("max_length") or 0) - (0 if ids is None else ids.shape[-1]))


def other_cache(cache: Any) -> LandmarkError:
    return LandmarkError(
        f"past_key_values is a {type(cache).__name__}: a landmark model reads on through a "
        "landmark_cli.LandmarkCache(model)"
    )


def forward(plain: Callable, model: PreTrainedModel, given: dict[str, Any]) -> Any:
    """A model's forward: with a LandmarkCache it reads on through it; text without landmarks is read as by generate,
    where no gradient is asked for; all else goes to the model's own forward.

    plain: the model's own. given: its arguments by name.

    Raises LandmarkError for another cache that holds something.
    """
    cache = given.get("past_key_values")
    if isinstance(cache, LandmarkCache):
        return _read(model, cache, given)
    if not has_landmarks(model):
        return plain(model, **given)
    if cache is not None and cache.get_seq_length():
        raise other_cache(cache)
    if _is_text(model, given):
        name = model.config.name_or_path or type(model).__name__
        if _reads(model, given):
            _once(
                model,
                f"{name} was given text without landmarks, and reads it as generate does: in chunks, with landmarks "
                "put in. For one pass over all of it put them in with landmark_cli.insert_landmarks",
            )
            return _read(model, LandmarkCache(model), given)
        _once(
            model,
            f"{name} was given text without landmarks, and takes every {model.config.landmark_freq + 1}th token for "
            "one: put them in with landmark_cli.insert_landmarks, or read in evaluation mode under "
            "torch.no_grad()",
        )
    return plain(model, **given)


def _is_text(model: PreTrainedModel, given: dict[str, Any]) -> bool:
    """Whether a forward is given text without landmarks where there should be some. Of a model that is being trained
    the first input only is looked at, for looking makes the host wait."""
    ids, landmark = given.get("input_ids"), getattr(model.config, "landmark_token_id", None)
    if ids is None or landmark is None or ids.dim() != 2 or given.get("landmark_layout") is not None:
        return False
    if ids.shape[1] <= model.config.landmark_freq and given.get("use_cache") is not True:
        return False
    if model.training or torch.is_grad_enabled():
        if getattr(model, "_landmarks_looked_for", False):
            return False
        model._landmarks_looked_for = True
    return not bool((ids == landmark).any())


def _reads(model: PreTrainedModel, given: dict[str, Any]) -> bool:
    """Whether reading can take the place of the model's own forward."""
    if model.training or torch.is_grad_enabled() or given.get("position_ids") is not None:
        return False
    return not any(given.get(name) or getattr(model.config, name, False) for name in INNER)


def _once(model: PreTrainedModel, message: str) -> None:
    if not getattr(model, "_landmarks_missed", False):
        model._landmarks_missed = True
        warn(message)


def _read(model: PreTrainedModel, cache: LandmarkCache, given: dict[str, Any]) -> Any:
    """The output of a forward that reads on through a cache."""
    if cache.model is not model:
        raise LandmarkError("past_key_values has been read by another model: a LandmarkCache belongs to one")
    if given.get("input_ids") is None:
        raise LandmarkError("inputs_embeds: a landmark model reads token ids, among which it puts landmarks")
    for name in INNER:
        if given.get(name):
            raise LandmarkError(f"{name}: a landmark model that reads with memory gives logits only")
    kept = given.get("logits_to_keep")
    logits = cache.read(given["input_ids"], given.get("attention_mask"), 0 if kept is None else kept)
    loss = None
    if given.get("labels") is not None:
        loss = model.loss_function(logits=logits, labels=given["labels"], vocab_size=model.config.vocab_size)
    output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)
    return output.to_tuple() if given.get("return_dict") is False else output
