"""The hidden states' loss: how far what the student's layers give is from what the teacher's give, for the same text.

The divergence of predictions reaches the first layers through all the others. Here each layer is told by itself: the
squared distance of its output from the teacher's, over the squared length of what the teacher's layer adds to its
input, so that layers count alike whatever their scale, and a layer that adds nothing counts 1. (Hidden states as what
is learned from a teacher: TinyBERT, arXiv 1909.10351.) Text is compared alone; a landmark has no hidden state there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from landmark_cli.errors import LandmarkError
from landmark_cli.training.compiled import called_by, decoder_layers

MOST = 50.0
"""What a position counts in a layer at most. A first token's hidden state is in some layers thousands of times as long
as the others', and what is added to it nothing."""


def check_found(model: PreTrainedModel, name: str) -> None:
    """Raise LandmarkError where a model does not say which of its modules its layers are. name: of the model."""
    found, layers = len(decoder_layers(model)), model.config.get_text_config().num_hidden_layers
    if found != layers:
        raise LandmarkError(
            f"--hidden-weight compares layers one by one, and of the {layers} of {name} ({type(model).__name__}) its "
            f"_no_split_modules names {found}: leave it out"
        )


@contextmanager
def collected(layers: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """While the block runs, the list takes what the first of the layers is given and what each of them gives, (B, n, E)
    each, when a model calls them in their order. A second call adds nothing, nor does one behind the block (a layer
    that is computed again in the backward pass)."""
    found: list[Tensor] = []

    def tell(inputs: tuple[Any, ...], options: dict[str, Any], output: Any) -> None:
        if len(found) > len(layers):
            return
        if not found:
            found.append(inputs[0] if inputs else options["hidden_states"])
        found.append(output[0] if isinstance(output, tuple) else output)

    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(_told(layer, tell))
        yield found


@contextmanager
def _told(layer: nn.Module, tell: Callable[[tuple[Any, ...], dict[str, Any], Any], None]) -> Iterator[None]:
    """Have what a layer is given and gives be told, from outside of what is compiled of it."""

    def call(code: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
        output = code(*inputs, **options)
        tell(inputs, options, output)
        return output

    if layer._compiled_call_impl is not None:
        with called_by(layer, call):
            yield
        return
    hook = layer.register_forward_hook(lambda layer, *told: tell(*told), with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def hidden_states_loss(
    ours: Sequence[Tensor], theirs: Sequence[Tensor], asked: Tensor, align: Callable[[Tensor], Tensor]
) -> Tensor:
    """The sum over the positions that are asked for, the mean over layers: a float32 scalar, differentiable in ours.

    ours: (B, T, E) each, what `collected` gave of the student; theirs: (B, n, E) each, of the teacher. asked: (B, T)
    bool. align: brings what is the teacher's to the student's positions (see `distillation.Text.align`).
    """
    total = torch.zeros((), dtype=torch.float32, device=asked.device)
    for given, found, wanted in zip(theirs[:-1], ours[1:], theirs[1:], strict=True):
        wanted = wanted.detach().float()
        added = (wanted - given.detach().float()).square().sum(-1, keepdim=True)
        added = align(added.clamp(min=torch.finfo(torch.float32).tiny))[..., 0]
        # What is not asked for may be anything, and nothing flows back to it.
        difference = (found.float() - align(wanted)).masked_fill(~asked[..., None], 0.0)
        counted = (difference.square().sum(-1) / added).clamp(max=MOST)
        total = total + counted.masked_fill(~asked, 0.0).sum()
    return total / (len(theirs) - 1)
