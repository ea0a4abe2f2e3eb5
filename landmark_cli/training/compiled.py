"""torch.compile layer by layer: a decoder's layers are alike, so what is compiled for one of them serves all.

Compiled as one graph, a model takes minutes before its first step, the more the deeper it is. By layers it takes as
long as one layer does, forward and backward, and what stands between layers runs as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

# Of what torch.compile keeps apart for one function: layers of several kinds, in training, evaluation and teaching.
VARIANTS = 32
TOLD_ONCE = "skip_fwd_side_effects_in_bwd_under_checkpoint"


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The layers that a model is a stack of, as transformers names them for those who split a model."""
    names = model._no_split_modules or ()
    # FSDP has made of each layer's class one of its own, under another name.
    return [layer for layer in model.modules() if any(of.__name__ in names for of in type(layer).__mro__)]


def compile_layers(model: PreTrainedModel, backend: str = "inductor") -> None:
    """Have each layer of a model run compiled code, wherever it is called. Modules and parameters keep their names.

    It comes before DDP, FSDP or DeepSpeed wrap the model. backend: of torch.compile. What it cannot compile runs as it
    is, which torch warns of.
    """
    settings = torch._dynamo.config
    settings.recompile_limit = max(settings.recompile_limit, VARIANTS)
    settings.suppress_errors = True
    # It would cut what a process compiles where DDP's buckets end. A layer is less than a bucket or some, and gradients
    # are sent layer by layer as it is.
    settings.optimize_ddp = False
    # A layer that is computed again in the backward pass has told what it had to tell (`gate.Gate`) the first time.
    # Versions that do not know this leave such layers uncompiled.
    if hasattr(settings, TOLD_ONCE):
        setattr(settings, TOLD_ONCE, True)
    for module in model.modules():
        if isinstance(getattr(module, "layer_idx", None), int):
            module.landmark_first = module.layer_idx == 0
    for layer in decoder_layers(model):
        layer.compile(dynamic=False, backend=backend)


def of_any_length(x: Tensor) -> None:
    """Have compiled layers take a tensor whatever the length of its first dimension, of two or more: for each other one
    they would be compiled anew, until so many are kept that the next runs uncompiled. Layers that are not compiled do
    not look at it."""
    # Where all of a model is compiled this is no place to say so.
    if len(x) > 1 and not torch.compiler.is_compiling():
        torch._dynamo.mark_dynamic(x, 0)


@contextmanager
def called_by(layer: nn.Module, call: Callable[..., Any]) -> Iterator[None]:
    """While the block runs, have a compiled layer's code be called by `call(code, *inputs, **options)`, which stands
    outside of what is compiled: a hook would be compiled with the layer, and anew for each."""
    code = layer._compiled_call_impl
    layer._compiled_call_impl = functools.partial(call, code)
    try:
        yield
    finally:
        layer._compiled_call_impl = code
