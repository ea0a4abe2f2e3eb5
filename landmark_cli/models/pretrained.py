"""Open a transformers model and its tokenizer from a directory or the hub, and check that they belong together."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from landmark_cli.attention.layer_kind import Turns
from landmark_cli.data.checks import check_landmark_token
from landmark_cli.data.pretrained_tokenizers import open_tokenizer
from landmark_cli.errors import LandmarkError
from landmark_cli.file_errors import reading
from landmark_cli.model_files import check_directory, check_no_code, opening
from landmark_cli.schema import check
from landmark_cli.softmax import Softmax
from landmark_cli.weight_diff.manifest import MANIFEST

from .size import check_size

# What a run's checkpoint says of itself.
CHECKPOINT = "training.json"


def open_pretrained(
    path: str | Path,
    *,
    attention: str | None = None,
    dtype: str | torch.dtype = "auto",
    trust_remote_code: bool = False,
    **options: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Open a causal language model and its tokenizer.

    path: a directory or a hub id. attention: transformers' `attn_implementation`, by default the saved one; "sdpa" is
    full attention, by whatever serves the model (see `plain_attention`).
    dtype: of the weights, by default as stored. trust_remote_code: whether Python code that comes with it may run.
    options: further arguments of `from_pretrained`.

    Raises LandmarkError naming what is missing, or what does not fit: weights and config, a landmark model's tokenizer.
    """
    config = open_config(path, trust_remote_code=trust_remote_code)
    attention = plain_attention(config) if attention == "sdpa" else attention
    check_size(config, path, attention, trust_remote_code=trust_remote_code)
    if attention is not None:
        options["attn_implementation"] = attention
    with opening(path, "the model", trust_remote_code) as code, _without_reports():
        # Weights that do not fit are found in the report rather than left to a traceback.
        model, report = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **code,
            **options,
        )
    _check_weights(report, config, path)
    if model.can_generate():
        with reading(Path(path) / "generation_config.json"):
            check(LandmarkSettings, _attributes(model.generation_config))
    tokenizer = open_tokenizer(path, trust_remote_code=trust_remote_code)
    if getattr(config, "landmark_freq", None) is not None:
        check_landmark_token(config, tokenizer, str(path))
    return model, tokenizer


def plain_attention(config: PreTrainedConfig) -> str:
    """transformers' `attn_implementation` for full attention: "sdpa", or "eager" for models that it does not serve."""
    model = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    # transformers before 5.21 lets sdpa serve models with soft-capped logits, and leaves the cap out without a word.
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    return "eager" if capped or getattr(model, "_supports_sdpa", True) is False else "sdpa"


def open_config(path: str | Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The config of a model directory or hub id. trust_remote_code: whether Python code that comes with it may run.

    Raises LandmarkError where there is none that transformers knows, where a setting of ours has an impossible value,
    and where a file of the directory lies or leads outside of it.
    """
    directory = Path(path)
    local = os.path.exists(path) or (os.sep in str(path) and not _looks_like_hub_id(str(path)))
    if local and not os.path.lexists(directory / "config.json"):
        of_a_run = "a checkpoint, the state of a run" if os.path.lexists(directory / CHECKPOINT) else ""
        if next(directory.glob(f"checkpoints/*/{CHECKPOINT}"), None) is not None:
            of_a_run = "a run that has not come to its end"
        if of_a_run:
            raise LandmarkError(f"{path} is {of_a_run}: `landmark models export {path}` makes a model of it")
        found = "is not there" if not os.path.exists(path) else "has no config.json"
        raise LandmarkError(f"cannot open the model {path}: it {found}; name a model directory or a hub id")
    if os.path.lexists(directory / MANIFEST):
        raise LandmarkError(
            f"{path} holds a weight difference, not a model; landmark weight-diff recover makes one of it"
        )
    if local:
        check_directory(directory)
    with opening(path, "the model", trust_remote_code) as code, _without_reports():
        settings, _ = PreTrainedConfig.get_config_dict(path)
        check_no_code(settings, path)
        config = AutoConfig.from_pretrained(path, **code)
        check(LandmarkSettings, _attributes(config)).check_values()
    return config


def shape_of(path: str | Path, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """A model on the meta device: its config and the shapes of its weights. path, trust_remote_code and errors as those
    of `open_config`."""
    config = open_config(path, trust_remote_code=trust_remote_code)
    with opening(path, "the config of", trust_remote_code) as code, torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, **code)


def random_model(
    path: str | Path,
    *,
    attention: str | None = None,
    dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A model of random weights on a device, of the shapes that a config says. attention: its `attn_implementation`.
    The rest, and errors, as of `open_config`."""
    config = open_config(path, trust_remote_code=trust_remote_code)
    attention = plain_attention(config) if attention == "sdpa" else attention
    given = {} if attention is None else {"attn_implementation": attention}
    with opening(path, "the config of", trust_remote_code) as code, device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype, **given, **code)


def stored_dtype(path: str | Path, *, trust_remote_code: bool = False) -> torch.dtype:
    """The dtype that a model's weights are opened in as stored: its config's, or where that names none, its files'.

    path, trust_remote_code and errors as those of `open_config`.
    """
    dtype = open_config(path, trust_remote_code=trust_remote_code).dtype
    if dtype is not None:
        return dtype
    with opening(path, "the model", trust_remote_code) as code, _without_reports():
        # On the meta device only the headers of the files are read, which say what the files hold.
        return AutoModelForCausalLM.from_pretrained(path, dtype="auto", device_map="meta", **code).dtype


@dataclass
class LandmarkSettings:
    """What this package's code takes from a config.json or generation_config.json, besides what transformers checks
    itself."""

    landmark_freq: int | None = None
    landmark_token_id: int | None = None
    trained_length: int | None = None
    top_k_blocks: int | None = None
    landmark_layers: list[int] | None = None
    landmark_rotary: list[Turns] | None = None
    num_hidden_layers: int | None = None
    memory_length: int | None = None
    segment_length: int | None = None
    vocab_size: int | None = None
    max_position_embeddings: int | None = None
    context_miss_token: bool = False
    landmark_softmax: Softmax | None = None
    bos_token_id: int | list[int] | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    suppress_tokens: list[int] | None = None

    def check_values(self) -> None:
        """Raise ValueError for a number that makes no sense where it stands."""
        least = {"landmark_token_id": 0, "top_k_blocks": 0}
        for name, value in vars(self).items():
            counted = type(value) is int and (name in least or not name.endswith("_token_id"))
            if counted and value < least.get(name, 1):
                raise ValueError(f"{name} is {value}, and should be at least {least.get(name, 1)}")
        if self.landmark_freq is None:
            return
        for name in ("landmark_token_id", "trained_length", "top_k_blocks"):
            if getattr(self, name) is None:
                raise ValueError(f"it has landmarks (landmark_freq {self.landmark_freq}) but lacks {name}")
        if self.landmark_softmax == "joint" and self.context_miss_token:
            raise ValueError(
                "landmark_softmax is joint, where landmarks' logits have no part in the softmax, and a "
                "context_miss_token competes with them"
            )
        layers = range(self.num_hidden_layers or 0)
        if self.landmark_layers is not None and not set(self.landmark_layers) & set(layers) >= set(
            self.landmark_layers
        ):
            raise ValueError(f"landmark_layers is {self.landmark_layers}, and there are layers 0 to {len(layers) - 1}")
        if self.landmark_rotary is not None and len(self.landmark_rotary) != len(layers):
            raise ValueError(f"landmark_rotary is of {len(self.landmark_rotary)} layers, and there are {len(layers)}")


def _attributes(config: Any) -> dict[str, Any]:
    names = [field.name for field in fields(LandmarkSettings) if hasattr(config, field.name)]
    return {name: getattr(config, name) for name in names}


def _check_weights(report: dict[str, Any], config: PreTrainedConfig, path: str | Path) -> None:
    """LandmarkError where the weights lack, or have in another shape, what the config says."""
    mismatched = sorted(report["mismatched_keys"])
    if mismatched:
        name, stored, expected = mismatched[0]
        found = f"{name} is {tuple(stored)} there and {tuple(expected)} by config.json"
    elif report["missing_keys"]:
        found = f"{min(report['missing_keys'])} is missing"
    else:
        layers = getattr(config, "num_hidden_layers", None)
        surplus = [name for name in sorted(report["unexpected_keys"]) if layers is not None and _layer(name) >= layers]
        if not surplus:
            return
        found = f"there is {surplus[0]}, but config.json has {layers} layers"
    raise LandmarkError(f"the weights of {path} do not match its config.json: {found}")


def _layer(name: str) -> int:
    number = re.search(r"\.(\d+)\.", name)
    return int(number.group(1)) if number else -1


def _looks_like_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


@contextmanager
def _without_reports() -> Iterator[None]:
    """Keep transformers from printing tables of weights; what matters in them is checked here."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
