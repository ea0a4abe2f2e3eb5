"""Landmark attention for any rotary decoder of the transformers library.

The model's code is transformers' own. The model gets a landmark token, "landmark" as its attention implementation, and
four settings in its config: landmark_freq, landmark_token_id, trained_length, top_k_blocks (and more where its layers
are of several kinds, see layers.py, or landmarks only choose, see softmax.py). A config with a
landmark_freq opens with landmark attention wherever this package is imported; `attn_implementation="sdpa"` opens the
plain decoder.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from landmark_cli.console import counted, warn
from landmark_cli.data.landmarks import default_top_k, largest_top_k
from landmark_cli.data.pretrained_tokenizers import LANDMARK_TOKEN, add_tokens, largest_id, pad_on_the_left
from landmark_cli.errors import LandmarkError
from landmark_cli.families import is_ours
from landmark_cli.softmax import Softmax, check_softmax, keep_softmax

from .calls import lead_forward
from .generation_config import settle_sampling, silence
from .layers import keep_kinds, settle_layers
from .quantization import refuse_quantized
from .support import Kinds, attention_dropout, check_config, check_model

PADDING_TOKEN = "[PAD]"
# Products with a matrix of a multiple of 64 rows run at full speed on a GPU; an aligned vocabulary stays aligned.
VOCABULARY_MULTIPLE = 64
# No tokenizer's ids are that many times as large as there are tokens; rows for all of them would be made.
FAR = 4


def add_landmarks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    landmark_freq: int = 63,
    trained_length: int | None = None,
    top_k_blocks: int | None = None,
    softmax: Softmax = "grouped",
) -> None:
    """Give a pretrained decoder and its tokenizer landmarks, in place.

    The tokenizer pads on the left, as whoever generates wants it, and gets a landmark token, and a padding token where
    it has none, with ids behind those of all its tokens
    and of all that the config names. Their embedding rows (and the head's) are the mean of the rows that tokens have;
    no other row changes. Of a model that has landmarks already, only the settings change.

    landmark_freq: text tokens between landmarks. trained_length: stream tokens (landmarks included) of the windows that
    the model will be trained on; by default what the model's positions hold, at most 2048. top_k_blocks: blocks
    retrieved by default at inference; 4, or fewer where the windows leave no room beside them, and up to 16 with a
    joint softmax. softmax: "grouped", the paper's, or "joint", in which landmarks only choose blocks (see softmax.py).

    Raises LandmarkError where landmark attention does not fit the model (see support.py), or the windows do not fit its
    positions.

    >>> from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    >>> tokenizer = AutoTokenizer.from_pretrained("runs/baseline")
    >>> config = LlamaConfig(vocab_size=50257, hidden_size=32, num_attention_heads=2, num_hidden_layers=1)
    >>> model = LlamaForCausalLM(config)
    >>> landmark_cli.add_landmarks(model, tokenizer, landmark_freq=31, trained_length=512)
    >>> model.config.landmark_token_id == tokenizer.convert_tokens_to_ids("<landmark>")
    True
    """
    refuse_quantized(model, "landmarks")
    name = model.config._name_or_path or type(model).__name__
    if landmark_freq < 1:
        raise ValueError(f"landmark_freq is {landmark_freq}; a block needs at least one text token")
    check_softmax(softmax)
    limit = getattr(model.config, "max_position_embeddings", None)
    trained_length = trained_length or min(limit or 2048, 2048)
    check_length(trained_length, limit, landmark_freq, name)
    if top_k_blocks is None:
        top_k_blocks = default_top_k(trained_length, landmark_freq, softmax == "joint")
    elif not 0 <= top_k_blocks <= largest_top_k(trained_length, landmark_freq):
        raise LandmarkError(
            f"retrieving {counted(top_k_blocks, 'block')} leaves no room for a chunk in a window of "
            f"{counted(trained_length, 'token')}; take at most {largest_top_k(trained_length, landmark_freq)}"
        )
    check_config(model.config, name)
    if softmax == "joint" and getattr(model.config, "context_miss_token", False):
        raise LandmarkError(
            f"{name} has a context-miss token, which competes with landmarks' logits in the grouped softmax, and "
            "landmarks that only choose blocks have no part in one: take softmax grouped"
        )
    kinds = check_model(model, trained_length, name)
    if dropped := attention_dropout(model):
        warn(
            f"{name} asks for attention dropout of {dropped:g}, which landmark attention does not have: it is trained "
            "without"
        )

    _add_tokens(model, tokenizer, name)
    settle_sampling(model, name)
    config = model.config
    config.landmark_freq = landmark_freq
    config.landmark_token_id = tokenizer.convert_tokens_to_ids(LANDMARK_TOKEN)
    config.trained_length = trained_length
    config.top_k_blocks = top_k_blocks
    keep_softmax(config, softmax)
    silence(model, tokenizer)
    attend_with_landmarks(model, kinds)
    lead_forward(model)


def attend_with_landmarks(model: PreTrainedModel, kinds: Kinds) -> None:
    """Have a decoder whose config has the settings of landmarks attend with them, each layer as its kind says."""
    keep_kinds(model.config, kinds.local, kinds.turns)
    model.set_attn_implementation("landmark")
    settle_layers(model)


def check_length(trained_length: int, limit: int | None, landmark_freq: int, name: str) -> None:
    """LandmarkError where a window of `trained_length` stream tokens exceeds `limit` positions, or a model trained on
    such windows could not be read with."""
    if limit is not None and trained_length > limit:
        raise LandmarkError(
            f"{name} has {limit} positions, fewer than a window of {counted(trained_length, 'token')}: "
            f"take windows (--sequence-length) of at most {limit}, or read longer ones by --read-chunk"
        )
    if largest_top_k(trained_length, landmark_freq) < 0:
        raise LandmarkError(
            f"a window of {counted(trained_length, 'token')} holds fewer than the two blocks of "
            f"{counted(landmark_freq, 'text token')} and a "
            "landmark that reading takes; take longer windows or a smaller landmark-freq"
        )


@torch.no_grad()
def _add_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Add the tokens that are missing, and rows for them that are the mean of those that tokens have."""
    config, rows = model.config, model.get_input_embeddings().weight.shape[0]
    if largest_id(tokenizer) >= FAR * max(rows, len(tokenizer)):
        raise LandmarkError(
            f"the tokenizer of {name} has a token with the id {largest_id(tokenizer)}, and the model knows {rows} "
            "tokens: the two do not belong together"
        )
    known = {id for id in tokenizer.get_vocab().values() if id < rows}
    behind = max((id for id in _named_ids(config) if id < rows), default=-1)
    needs_padding = tokenizer.pad_token is None
    new = add_tokens(tokenizer, [PADDING_TOKEN, LANDMARK_TOKEN] if needs_padding else [LANDMARK_TOKEN], behind)
    if needs_padding:
        tokenizer.add_special_tokens({"pad_token": PADDING_TOKEN})
        config.pad_token_id = tokenizer.pad_token_id
        if model.can_generate():
            model.generation_config.pad_token_id = tokenizer.pad_token_id
    pad_on_the_left(tokenizer)
    size = largest_id(tokenizer) + 1
    if size > rows:
        multiple = VOCABULARY_MULTIPLE if rows % VOCABULARY_MULTIPLE == 0 else 1
        model.resize_token_embeddings(size, pad_to_multiple_of=multiple, mean_resizing=False)
    elif not new:
        return
    spare = [id for id in new if id < rows]
    end = max(known) + 1
    gaps = sorted(set(range(end)) - known)
    for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
        for parameter in embedding.parameters():
            # Indexing the known rows would copy them, gigabytes perhaps: the sum is that of all rows up to the last
            # known one, less the few in gaps.
            total = parameter[:end].sum(0, dtype=torch.float32) - parameter[gaps].sum(0, dtype=torch.float32)
            mean = (total / len(known)).to(parameter.dtype)
            parameter[spare] = mean
            parameter[rows:] = mean


def _named_ids(config: PreTrainedConfig) -> list[int]:
    """The tokens that a config names, which its model knows even if its tokenizer does not."""
    ids: list[int] = []
    for name, value in config.to_dict().items():
        if name.endswith(("_token_id", "_token_ids")):
            ids += [id for id in (value if isinstance(value, list) else [value]) if isinstance(id, int)]
    return ids


class OpensWithLandmarks:
    """`landmark_freq` of every transformers config: one that has it set opens with landmark attention.

    An `attn_implementation` that the caller gives has been set before, and wins. The value itself is stored and saved
    like any other of a config.
    """

    def __get__(self, config: PreTrainedConfig | None, owner: type | None = None) -> Any:
        if config is None:
            return self
        try:
            return config.__dict__["landmark_freq"]
        except KeyError:
            raise AttributeError(f"{type(config).__name__} has no landmark_freq") from None

    def __set__(self, config: PreTrainedConfig, value: int | None) -> None:
        config.__dict__["landmark_freq"] = value
        if value is not None and config._attn_implementation is None:
            config._attn_implementation = "landmark"


class OwnAttention:
    """`_attn_implementation` of every transformers config: where a caller names none (None), as `transformers serve`
    does, a model that was trained with an attention of ours keeps it; all else is as transformers has it."""

    def __init__(self, plain: property) -> None:
        self.plain = plain

    def __get__(self, config: PreTrainedConfig | None, owner: type | None = None) -> Any:
        return self if config is None else self.plain.fget(config)

    def __set__(self, config: PreTrainedConfig, value: str | dict[str, str] | None) -> None:
        if value is None and config.__dict__.get("landmark_freq") is not None:
            value = "landmark"
        elif value is None and config.__dict__.get("segment_length") is not None and is_ours(config.model_type):
            value = "transformer_xl"
        self.plain.fset(config, value)


def register() -> None:
    """Have saved landmark decoders open with landmark attention. May be called again."""
    PreTrainedConfig.landmark_freq = OpensWithLandmarks()
    if not isinstance(PreTrainedConfig.__dict__["_attn_implementation"], OwnAttention):
        PreTrainedConfig._attn_implementation = OwnAttention(PreTrainedConfig._attn_implementation)
