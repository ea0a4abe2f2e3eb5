"""How transformers' own methods come to read with memory: `generate` and `forward` of every landmark model lead to
inference/calls.py.

`GenerationMixin.generate` is one method of all models, so it is led there once. `forward` is each class's own: a class
is led there when the first of its models has landmarks. Both are public, and their arguments are all that is relied on.
What has no landmarks goes to transformers' own as before.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers import GenerationMixin, PreTrainedModel


def register() -> None:
    """Lead transformers' methods here. May be called again."""
    if not _leads_here(GenerationMixin.generate):
        GenerationMixin.generate = _generating(GenerationMixin.generate)
    if not _leads_here(PreTrainedModel.post_init):
        PreTrainedModel.post_init = _made(PreTrainedModel.post_init)


def reads_with_memory(model: PreTrainedModel) -> bool:
    """Whether a model was opened with landmark attention, or is one of ours, which generates by the reader it has."""
    config = model.config
    if getattr(config, "landmark_freq", None):
        return config._attn_implementation == "landmark"
    return config.model_type == "landmark_gpt"


def lead_forward(model: PreTrainedModel) -> None:
    """Have the forward of a model's class lead to inference/calls.py, if it generates text and does not yet."""
    kind = type(model)
    if isinstance(model, GenerationMixin) and not _leads_here(kind.forward):
        kind.forward = _forwarding(kind.forward)


def _leads_here(method: Callable) -> bool:
    return getattr(method, "reads_with_memory", False)


def _generating(plain: Callable) -> Callable:
    @functools.wraps(plain)
    def generate(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        if not reads_with_memory(self):
            return plain(self, *args, **kwargs)
        from landmark_cli.inference import calls

        return calls.generate(plain, self, *args, **kwargs)

    generate.reads_with_memory = True
    return generate


def _forwarding(plain: Callable) -> Callable:
    names = list(inspect.signature(plain).parameters)[1:]

    @functools.wraps(plain)
    def forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        # A chunk of a text comes from the reader itself.
        if torch.compiler.is_compiling() or "landmark_chunk" in kwargs or not reads_with_memory(self):
            return plain(self, *args, **kwargs)
        from landmark_cli.inference import calls

        return calls.forward(plain, self, dict(zip(names, args, strict=False)) | kwargs)

    forward.reads_with_memory = True
    return forward


def _made(plain: Callable) -> Callable:
    @functools.wraps(plain)
    def post_init(self: PreTrainedModel) -> None:
        plain(self)
        if reads_with_memory(self):
            lead_forward(self)

    post_init.reads_with_memory = True
    return post_init
