"""The generation config that a model comes with and is saved with again."""

from __future__ import annotations

from typing import Any

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from landmark_cli.console import warn
from landmark_cli.data.gpt2_tokenizer import GPT2_UNUSED
from landmark_cli.data.pretrained_tokenizers import LANDMARK_TOKEN

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")


def settle_sampling(model: PreTrainedModel, name: str) -> None:
    """Settle whether a generation config samples where it says how but not that it does: transformers saves none such.

    Many older models give a temperature without do_sample: they are sampled from. Where do_sample is false, or the
    temperature 0, decoding is greedy, and the settings that had no effect go. What else transformers finds wrong is
    left for transformers to say. name: the model, as the user calls it.
    """
    config = model.generation_config if model.can_generate() else None
    if config is None or _is_valid(config):
        return
    given = {name: value for name in SAMPLING if (value := getattr(config, name, None)) is not None}
    if config.do_sample is None and config.temperature != 0:
        changes, done = {"do_sample": True}, "do_sample is set to true"
    else:
        changes, done = dict.fromkeys(given), "they are left out, and decoding stays greedy"
    before = {name: getattr(config, name) for name in changes}
    _set(config, changes)
    if _is_valid(config):
        found = ", ".join(f"{name} {value}" for name, value in given.items())
        warn(f"the generation config of {name} has settings of sampling ({found}), but does not sample: {done}")
    else:
        _set(config, before)


def silence(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Have transformers' generate never emit what is no text: see `tokens_without_text`. It is saved with the model."""
    if model.can_generate():
        config = model.generation_config
        silent = {*(config.suppress_tokens or ()), *tokens_without_text(model, tokenizer)}
        config.suppress_tokens = sorted(silent) or None
        # Of one that was made from the model's config transformers reads only its own settings back, none of ours.
        config._from_model_config = False


def tokens_without_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The landmark, placeholders of the vocabulary, and ids of the output layer that no token has."""
    vocabulary = tokenizer.get_vocab()
    silent = {vocabulary[name] for name in (*GPT2_UNUSED, LANDMARK_TOKEN) if name in vocabulary}
    silent.update(set(range(model.config.vocab_size)) - set(vocabulary.values()))
    landmark = getattr(model.config, "landmark_token_id", None)
    return sorted(silent if landmark is None else silent | {landmark})


def _set(config: GenerationConfig, values: dict[str, Any]) -> None:
    for name, value in values.items():
        setattr(config, name, value)


def _is_valid(config: GenerationConfig) -> bool:
    try:
        config.validate(strict=True)
    except ValueError:
        return False
    return True
