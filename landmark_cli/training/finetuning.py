"""A pretrained decoder as `landmark finetune` trains it: refused where it will not do, opened with landmarks, saved."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from landmark_cli.attention.window import WindowSettings
from landmark_cli.data.pretrained_tokenizers import LANDMARK_TOKEN, check_read_back, special_ids, text_ids
from landmark_cli.errors import LandmarkError
from landmark_cli.models import lora
from landmark_cli.models.decoders import add_landmarks, check_length
from landmark_cli.models.directory import save_model
from landmark_cli.models.pretrained import open_config, open_pretrained, stored_dtype
from landmark_cli.models.support import check_config
from landmark_cli.softmax import Softmax
from landmark_cli.training.publish import SaveModel
from landmark_cli.training.setup import quiet_transformers


def check_pretrained(name: str, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Refuse a model by its config, before anything is read or written. Returns the config.

    name: a model directory or hub id. trust_remote_code: whether Python code that comes with the model may run.

    Raises LandmarkError where landmark attention does not fit the model.
    """
    if lora.is_adapter(name):
        raise LandmarkError(f"{name} holds adapters only: make it a whole model first, by --merge in its own run")
    config = open_config(name, trust_remote_code=trust_remote_code)
    check_config(config, name)
    return config


def check_positions(
    config: PreTrainedConfig, name: str, *, landmark_freq: int, trained_length: int, read: WindowSettings | None = None
) -> None:
    """Raise LandmarkError where windows do not fit the positions that a model's config names.

    name: what the user calls the model. landmark_freq: text tokens between landmarks. trained_length: positions that
    windows take, landmarks included. read: how windows are read chunk by chunk, if they are; they then take
    read.positions.
    """
    limit = getattr(config, "max_position_embeddings", None)
    if read is not None and limit is not None and read.positions > limit:
        room = (limit // read.block_size - read.top_k - 1) * read.block_size
        fits = f"at most --read-chunk {room}" if room > 0 else "fewer --top-k-blocks"
        raise LandmarkError(
            f"a chunk of {read.chunk} tokens and {read.top_k} + 1 blocks of {read.block_size} take {read.positions} "
            f"positions, and {name} was trained with {limit}: take {fits}"
        )
    check_length(trained_length, limit, landmark_freq, name)


def open_with_landmarks(
    name: str,
    *,
    landmark_freq: int,
    trained_length: int,
    top_k_blocks: int | None,
    precision: str,
    frozen: bool = False,
    softmax: Softmax = "grouped",
    four_bit_on: torch.device | None = None,
    trust_remote_code: bool = False,
    opened: Callable[[PreTrainedModel], None] = lambda model: None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A pretrained model and its tokenizer, with landmarks.

    landmark_freq, trained_length, top_k_blocks, softmax: see `add_landmarks`. precision: the run's, "bf16", "fp16" or
    "fp32". frozen: the weights will not be trained: they are kept in that precision, and in float32 otherwise.
    four_bit_on: the device on which they are kept in 4 bits; None for none. name, trust_remote_code: see
    `check_pretrained`. opened: is called with the model before it gets landmarks.

    Raises LandmarkError where landmark attention does not fit the model, and where its tokenizer would not come back
    the same from what is saved.
    """
    half = dtype_of(precision)
    loading: dict[str, Any] = {"dtype": half if frozen else torch.float32}
    if four_bit_on is not None:
        from transformers import BitsAndBytesConfig

        loading["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=half,
        )
        loading["device_map"] = {"": four_bit_on}
    with quiet_transformers():
        model, tokenizer = open_pretrained(name, trust_remote_code=trust_remote_code, **loading)
    opened(model)
    add_landmarks(
        model,
        tokenizer,
        landmark_freq=landmark_freq,
        trained_length=trained_length,
        top_k_blocks=top_k_blocks,
        softmax=softmax,
    )
    check_read_back(
        tokenizer.save_pretrained,
        name,
        partial(text_ids, tokenizer),
        special_ids(tokenizer, LANDMARK_TOKEN),
        trust_remote_code=trust_remote_code,
    )
    return model, tokenizer


def dtype_of(precision: str) -> torch.dtype:
    """Of what is computed in a run's precision, "bf16", "fp16" or "fp32"."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)


def saving(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    adapters: bool,
    merge: bool,
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> SaveModel:
    """How the finished model is written: as an adapter directory or, without adapters or where they are merged into the
    weights, as a plain model.

    dtype: of its weights; "auto": the one they are stored in where the model came from. name, trust_remote_code: see
    `check_pretrained`.
    """
    if adapters and not merge:
        return lora.save_adapters
    if dtype == "auto":
        kept = stored_dtype(name, trust_remote_code=trust_remote_code)
    else:
        kept = getattr(torch, dtype)
    if merge:
        return partial(lora.save_merged, tokenizer=tokenizer, dtype=kept, trust_remote_code=trust_remote_code)
    return partial(save_model, dtype=kept)
