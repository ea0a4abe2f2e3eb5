"""What transformers asks for a mask before a model's layers run."""

from __future__ import annotations

from torch import Tensor


def padding_mask(*args, attention_mask: Tensor | None = None, **kwargs) -> Tensor | None:
    """transformers' mask function for "landmark": the attention is causal by itself, so only left padding is passed on.

    attention_mask: (B, T) bool, the model's own argument. Returns it where a row begins with padding and None
    otherwise: padding at the end is seen by nothing. Raises ValueError for padding between tokens.
    """
    if attention_mask is None:
        return None
    begins = attention_mask[:, :1].sum(-1) + (attention_mask[:, 1:] & ~attention_mask[:, :-1]).sum(-1)
    if (begins > 1).any():
        raise ValueError("attention_mask hides tokens in the middle of a row; only its ends may be padding")
    return None if attention_mask[:, 0].all() else attention_mask


def no_mask(*args, **kwargs) -> None:
    """transformers' mask function for an attention that is causal by itself and knows no padding."""
    return None
