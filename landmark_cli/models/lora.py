"""LoRA adapters (peft) on a landmark decoder: small matrices beside the projections, embeddings and head in full.

What the landmark token's embedding row is, and what it means to every layer, has to be learned, so embeddings and head
are trained and saved whole; the other weights stay as they are. An adapter directory holds the adapters, embeddings and
head, the landmark model's config.json and the tokenizer, and names the model that it belongs to.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from landmark_cli.data.checks import check_landmark_token
from landmark_cli.data.pretrained_tokenizers import open_tokenizer
from landmark_cli.errors import LandmarkError, import_extra
from landmark_cli.families import EMBEDDINGS, HEADS
from landmark_cli.file_errors import reading
from landmark_cli.file_reading import read_record
from landmark_cli.weight_diff.checkpoint import open_shard

from .calls import lead_forward
from .layers import settle_layers
from .pretrained import open_config, open_pretrained, plain_attention
from .quantization import refuse_quantized

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
PAIRED = 2
# What the landmark model's config has that its base has not.
SETTINGS = (
    *("landmark_freq", "landmark_token_id", "trained_length", "top_k_blocks", "pad_token_id"),
    *("landmark_layers", "landmark_rotary", "landmark_softmax"),
)


@dataclass(frozen=True)
class LoraSettings:
    """rank: of the adapters. alpha: their output counts alpha / rank times. dropout: of their input.

    targets: names of the layers that get an adapter; None for all linear layers but the head.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    targets: tuple[str, ...] | None = None


def add_adapters(model: PreTrainedModel, settings: LoraSettings) -> nn.Module:
    """Freeze a landmark decoder and put adapters on it; returns the PeftModel to train. Trained weights are float32.

    Raises LandmarkError where peft is missing, a target is no layer of the model or its weights are quantized.
    """
    refuse_quantized(model, "adapters")
    peft = import_extra("peft", "lora")
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(settings.targets) if settings.targets else "all-linear",
        task_type="CAUSAL_LM",
    )
    try:
        with _without_deprecations():
            adapted = peft.get_peft_model(model, config)
    except ValueError as error:
        raise LandmarkError(f"--lora-targets: {str(error).strip().splitlines()[0]}") from error
    # So that the base is found again from whatever directory.
    base = model.config._name_or_path
    config.base_model_name_or_path = str(Path(base).resolve()) if Path(base).is_dir() else base
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        layer.weight.data = layer.weight.data.float()
        layer.requires_grad_(True)
    return adapted


def save_adapters(model: nn.Module, directory: Path, weights: dict[str, Tensor]) -> None:
    """Write an adapter directory, tokenizer aside. weights: all of the model's, by name."""
    model.save_pretrained(directory, state_dict=weights, save_embedding_layers=True)
    # peft's template of a model card says nothing about this model.
    (directory / "README.md").unlink(missing_ok=True)
    model.config.save_pretrained(directory)


def is_adapter(path: str | Path) -> bool:
    """Whether a directory holds adapters rather than a whole model."""
    return (Path(path) / ADAPTER_CONFIG).is_file()


@dataclass
class AdapterConfig:
    """What is taken from an adapter directory's config before peft reads it."""

    base_model_name_or_path: str
    peft_type: Literal["LORA"]
    r: int
    rank_pattern: dict[str, int] = field(default_factory=dict)
    layer_replication: None = None
    auto_mapping: None = None


def check_adapters(directory: Path, config: PreTrainedConfig) -> str:
    """The name of the model that adapters are for, once their config is known to describe the weights beside it.

    config: the landmark model's, in the same directory. Raises LandmarkError where adapters are not LoRA's, or their
    ranks or vocabulary are others than the weights': memory would be taken for whatever numbers stand there.
    """
    described = directory / ADAPTER_CONFIG
    adapters = read_record(AdapterConfig, described)
    if getattr(config, "landmark_freq", None) is None:
        raise LandmarkError(f"config.json of {directory} is no landmark model's (it lacks landmark_freq); get it again")
    file = next((directory / name for name in ADAPTER_WEIGHTS if os.path.lexists(directory / name)), None)
    if file is None:
        raise LandmarkError(f"{directory} has no {ADAPTER_WEIGHTS[0]}, the weights that {ADAPTER_CONFIG} belongs to")
    shapes = {name: shape for name, (_, shape) in open_shard(file, "the adapters in").tensors.items()}
    ranks = {shape[0] for name, shape in shapes.items() if ".lora_A." in name and shape}
    vocabularies = {shape[0] for name, shape in shapes.items() if name.endswith((*EMBEDDINGS, *HEADS)) and shape}
    # peft has patterns for layers that hold two weights in one, of twice the rank, whatever layers a model has.
    patterns = {rank for rank in adapters.rank_pattern.values() if rank != PAIRED * adapters.r}
    wrong = {adapters.r, *patterns} - ranks
    if wrong:
        raise LandmarkError(f"{described} gives the rank {min(wrong)}, which none of the weights in {file.name} has")
    if vocabularies and config.vocab_size not in vocabularies:
        raise LandmarkError(
            f"config.json of {directory} gives {config.vocab_size} tokens, and {file.name} has {max(vocabularies)}"
        )
    return adapters.base_model_name_or_path


def open_adapted(
    path: str | Path,
    *,
    attention: str | None = None,
    dtype: str | torch.dtype = "auto",
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Open an adapter directory as a plain model: the base with the adapters merged into its weights.

    Raises LandmarkError where peft is missing, the base is not where it was, or config and weights do not fit.
    """
    peft = import_extra("peft", "lora")
    directory = Path(path)
    config = open_config(directory, trust_remote_code=trust_remote_code)
    base = check_adapters(directory, config)
    try:
        model, _ = open_pretrained(base, dtype=dtype, trust_remote_code=trust_remote_code)
    except LandmarkError as error:
        raise LandmarkError(f"{directory} holds adapters for the model {base}, which is needed too: {error}") from error
    tokenizer = open_tokenizer(directory, trust_remote_code=trust_remote_code)
    check_landmark_token(config, tokenizer, str(directory))
    model.resize_token_embeddings(config.vocab_size, mean_resizing=False)
    with reading(directory, "the adapters in"), _without_deprecations():
        model = peft.PeftModel.from_pretrained(model, directory).merge_and_unload()
    for name in SETTINGS:
        if hasattr(config, name):
            setattr(model.config, name, getattr(config, name))
    # Messages about this model name the directory that was asked for, not the base.
    model.name_or_path = model.config._name_or_path = str(directory)
    model.set_attn_implementation(plain_attention(config) if attention == "sdpa" else attention or "landmark")
    settle_layers(model)
    lead_forward(model)
    return model, tokenizer


def save_merged(
    model: nn.Module,
    directory: Path,
    weights: dict[str, Tensor],
    *,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
) -> None:
    """Write the plain model that an adapter directory opens as, its weights summed in float32 and stored as dtype.

    weights: as for `save_adapters`; where there are none, only config and generation config are written. Raises
    LandmarkError where the base cannot be opened.
    """
    base = model.get_base_model()
    if not weights:
        base.config.save_pretrained(directory)
        base.generation_config.save_pretrained(directory)
        return
    adapters = directory / "adapters"
    save_adapters(model, adapters, weights)
    tokenizer.save_pretrained(adapters)
    merged, _ = open_adapted(adapters, dtype=torch.float32, trust_remote_code=trust_remote_code)
    shutil.rmtree(adapters)
    merged.generation_config = base.generation_config
    merged.to(dtype).save_pretrained(directory)


@contextmanager
def _without_deprecations() -> Iterator[None]:
    """What peft and transformers have to tell each other is not the user's concern."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        # Patterns of peft's own, for layers that a model may have.
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match", RuntimeWarning)
        yield
