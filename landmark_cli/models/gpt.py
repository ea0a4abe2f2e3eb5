"""The paper's language model: a pre-norm decoder with rotary positions, as a model of the transformers library.

Which attention the model has is transformers' `attn_implementation`: "landmark", or "sdpa" for the baseline.
Source: arXiv 2305.16300, section 4.1.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from landmark_cli.attention.cache import BlockCache, Chunk
from landmark_cli.attention.masks import padding_mask
from landmark_cli.attention.recurrent import RecurrentMemory
from landmark_cli.attention.rotary import default_inverse_frequencies, rotation_table, split_and_rotate
from landmark_cli.data.landmarks import default_top_k
from landmark_cli.schema import check_attributes


class GPTConfig(PreTrainedConfig):
    """Shape and landmark settings of a `GPTForCausalLM`.

    n_layer, n_head, n_embd: layers, heads, width (head dim = n_embd / n_head); the MLP is 4 times as wide.
    bias: biases in linear layers and norms (the paper has none). dropout: after embedding, attention and MLP.
    landmark_freq: text tokens between landmarks; None for the baseline, which knows no landmarks.
    landmark_token_id: the landmark's token. trained_length: stream tokens (landmarks included) of a training window.
    top_k_blocks: blocks retrieved by default at inference; 4, or fewer where windows leave no room beside them.
    context_miss_token: a learned token in front of every input offers a key for "nothing earlier is needed" (4.1.3).
    memory_length, segment_length: a Transformer-XL instead: inputs are read in segments, each attending to the last
    memory_length tokens before it.
    """

    model_type = "landmark_gpt"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "n_embd",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
        "max_position_embeddings": "trained_length",
    }

    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 8
    n_embd: int = 1024
    dropout: float = 0.0
    bias: bool = False
    layer_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    initializer_range: float = 0.02
    landmark_freq: int | None = 50
    landmark_token_id: int | None = 50260
    trained_length: int = 512
    top_k_blocks: int | None = None
    context_miss_token: bool = False
    memory_length: int | None = None
    segment_length: int | None = None
    eos_token_id: int | None = 50256
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs) -> None:
        check_attributes(self, GPTConfig)
        if self.n_embd % self.n_head or self.n_embd // self.n_head % 2:
            raise ValueError(f"n_embd {self.n_embd} over n_head {self.n_head} must be a whole, even head dim")
        if (self.memory_length is None) != (self.segment_length is None):
            raise ValueError("a Transformer-XL needs both memory_length and segment_length")
        if self.landmark_freq and self.memory_length is not None:
            raise ValueError("memory_length belongs to the baseline; a model with landmarks has landmark_freq alone")
        if self.context_miss_token and not self.landmark_freq:
            raise ValueError("context_miss_token needs landmarks: set landmark_freq")
        if self.top_k_blocks is None:
            self.top_k_blocks = default_top_k(self.trained_length, self.landmark_freq or 0)
        # A model directory opens with the attention it was trained with; from_pretrained's own argument still wins.
        if kwargs.get("attn_implementation") is None:
            plain = "sdpa" if self.memory_length is None else "transformer_xl"
            kwargs["attn_implementation"] = "landmark" if self.landmark_freq else plain
        super().__post_init__(**kwargs)


class RotaryEmbedding(nn.Module):
    """cos and sin of the positions given, for the whole head dim."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.head_dim, self.base = config.n_embd // config.n_head, config.rope_theta
        self.register_buffer("inv_freq", default_inverse_frequencies(self.head_dim, self.base), persistent=False)

    def forward(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """position_ids: (B, T) -> cos, sin: (B, 1, T, head dim / 2) float32."""
        cos, sin = rotation_table(position_ids, self.inv_freq)
        return cos[:, None], sin[:, None]


class Rotation:
    """`RotaryEmbedding`'s cos and sin, for all layers. It is no tuple, for it is an argument of layers: under FSDP they
    would get the tables in the precision of their weights (see attention/dispatch.py)."""

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        self.cos = cos
        self.sin = sin


class Attention(nn.Module):
    """Self-attention; the attention itself is what transformers has registered as config._attn_implementation."""

    def __init__(self, config: GPTConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.n_embd // config.n_head
        self.is_causal = True
        self.qkv_proj = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.o_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.o_proj.adds_to_residual = True
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rotation: Rotation, mask: Tensor | None = None, **kwargs) -> Tensor:
        qkv = self.qkv_proj(x).view(*x.shape[:2], 3, self.config.n_head, self.head_dim)
        q, k, v = split_and_rotate(qkv, rotation.cos, rotation.sin)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, None)
        if self.config.context_miss_token:
            kwargs["context_miss_key"] = k[:, :, :1]
            q, k, v = q[:, :, 1:], k[:, :, 1:], v[:, :, 1:]
        out, _ = attend(self, q, k, v, mask, scaling=self.head_dim**-0.5, **kwargs)
        if self.config.context_miss_token:
            # The context-miss token itself attends to nothing.
            out = nn.functional.pad(out, (0, 0, 0, 0, 1, 0))
        return self.dropout(self.o_proj(out.reshape(x.shape)))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.down_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.down_proj.adds_to_residual = True
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.down_proj(nn.functional.gelu(self.up_proj(x))))


class Block(GradientCheckpointingLayer):
    def __init__(self, config: GPTConfig, layer_idx: int):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.n_embd, eps=config.layer_norm_eps, bias=config.bias)
        self.attention = Attention(config, layer_idx)
        self.mlp_norm = nn.LayerNorm(config.n_embd, eps=config.layer_norm_eps, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rotation: Rotation, **kwargs) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotation, **kwargs)
        return x + self.mlp(self.mlp_norm(x))


class GPTPreTrainedModel(PreTrainedModel):
    config_class = GPTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["Block"]
    _supports_sdpa = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            # Each layer adds to the residual twice; scaled so, the sum has the scale of one addition.
            residual = getattr(module, "adds_to_residual", False)
            nn.init.normal_(module.weight, std=std / math.sqrt(2 * self.config.n_layer) if residual else std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, RotaryEmbedding):
            module.inv_freq.copy_(default_inverse_frequencies(module.head_dim, module.base))


class GPTModel(GPTPreTrainedModel):
    """Embedding, blocks and final norm: token ids (B, T) -> hidden states (B, T, n_embd)."""

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)
        if config.context_miss_token:
            self.context_miss_embedding = nn.Embedding(1, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.norm = nn.LayerNorm(config.n_embd, eps=config.layer_norm_eps, bias=config.bias)
        self.rotary_emb = RotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool = False,
        **kwargs,
    ) -> BaseModelOutput:
        """Exactly one of input_ids (B, T) and inputs_embeds (B, T, n_embd); positions count from 0 by default.

        attention_mask: (B, T), 0 where a row is padded, at either end; a row's blocks count from its first token.
        Further keyword arguments (landmark_cache and landmark_chunk, landmark_layout) reach the attention. A
        Transformer-XL reads an input on from `recurrent_memory`, if given, whatever position_ids say.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if attention_mask is not None:
            kwargs["mask"] = self._mask(attention_mask.to(x.device, torch.bool))
        if kwargs.get("recurrent_memory") is not None:
            return BaseModelOutput(last_hidden_state=self._read_segments(x, **kwargs))
        if position_ids is None:
            position_ids = torch.arange(x.shape[1], device=x.device)[None]
        if self.config.context_miss_token:
            reading = kwargs.get("landmark_cache"), kwargs.get("landmark_chunk")
            x, position_ids = self._with_context_miss(x, position_ids, *reading)
        x = self._layers(x, position_ids, **kwargs)
        return BaseModelOutput(last_hidden_state=x[:, 1:] if self.config.context_miss_token else x)

    def _layers(self, x: Tensor, position_ids: Tensor, **kwargs) -> Tensor:
        rotation = Rotation(*self.rotary_emb(position_ids))
        x = self.dropout(x)
        for layer in self.layers:
            x = layer(x, rotation, **kwargs)
        return self.norm(x)

    def _read_segments(self, x: Tensor, recurrent_memory: RecurrentMemory, **kwargs) -> Tensor:
        """Hidden states (B, T, n_embd) of a Transformer-XL, segment by segment, going on from `recurrent_memory`."""
        hidden = []
        for segment in x.split(self.config.segment_length, dim=1):
            end = recurrent_memory.tokens_read + segment.shape[1]
            position_ids = torch.arange(recurrent_memory.tokens_read, end, device=x.device)[None]
            hidden.append(self._layers(segment, position_ids, recurrent_memory=recurrent_memory, **kwargs))
            recurrent_memory.tokens_read = end
        return torch.cat(hidden, dim=1)

    def _mask(self, attention_mask: Tensor) -> Tensor | None:
        """(B, T) bool as the attention takes it; None where nothing is padded."""
        if attention_mask.all():
            return None
        if self.config.landmark_freq and not self.config.context_miss_token:
            return padding_mask(attention_mask=attention_mask)
        if self.config.landmark_freq or self.config.memory_length is not None:
            raise ValueError("attention_mask: a model with a context-miss token or recurrence reads rows of one length")
        causal = torch.ones(2 * attention_mask.shape[1:], dtype=torch.bool, device=attention_mask.device).tril()
        # Padding sees itself, for a row of scores must not be empty.
        return (attention_mask[:, None] & causal | causal.diag().diag())[:, None]

    def _with_context_miss(
        self, x: Tensor, position_ids: Tensor, cache: BlockCache | None, chunk: Chunk | None
    ) -> tuple[Tensor, Tensor]:
        """Put the context-miss token in front of x (B, T, n_embd): right before position 0, or before the whole window
        from which a chunk retrieves."""
        position_ids = position_ids.expand(x.shape[:2])
        if chunk is None:
            front = position_ids.new_full((x.shape[0], 1), -1)
        else:
            front = cache.window_start(chunk)[:, None] - 1
        token = self.context_miss_embedding.weight.expand(x.shape[0], 1, -1)
        return torch.cat([token.to(x.dtype), x], dim=1), torch.cat([front, position_ids], dim=1)


class GPTForCausalLM(GPTPreTrainedModel, GenerationMixin):
    """The language model: token ids (B, T) -> logits (B, T, vocab_size), and a loss where labels are given.

    `generate` and `past_key_values` are answered by the reader that the model has (see models/calls.py).
    """

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        self.model = GPTModel(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        attention_mask: Tensor | None = None,
        **kwargs,
    ) -> CausalLMOutput:
        """labels: (B, T), the inputs themselves, shifted inside as transformers does; or give shift_labels as well, the
        target of every position, -100 where there is none. logits_to_keep: only the last so many positions (0: all).
        """
        hidden = self.model(
            input_ids=input_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            **kwargs,
        ).last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutput(loss=loss, logits=logits)
