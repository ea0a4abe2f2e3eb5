"""What a decoder learns from while it gets landmarks: a model that is not trained, as it reads text without them.

A teacher is no module of the model that learns from it, so neither an optimizer nor a checkpoint knows of it. With
adapters the untouched model is still there: `WithoutAdapters` reads with it, in the same weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from landmark_cli.data.pretrained_tokenizers import LANDMARK_TOKEN
from landmark_cli.errors import LandmarkError
from landmark_cli.models.decoders import PADDING_TOKEN
from landmark_cli.models.pretrained import open_pretrained
from landmark_cli.training.setup import has_plain_head, without_adapters

ATTENTION = "sdpa"


class Teacher:
    """A decoder of its own, frozen, with full attention.

    length: positions it was trained with, None where its config names none; what stands
    beyond them it is not asked about. plain: whether its logits are its hidden states times its head's weight.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.requires_grad_(False).eval()
        self.length: int | None = getattr(model.config, "max_position_embeddings", None)
        self.plain = has_plain_head(model)

    def to(self, device: torch.device) -> Teacher:
        """Move it."""
        self.model.to(device)
        return self

    @property
    def head(self) -> Tensor:
        """Its head's weight, (V, E)."""
        return self.model.get_output_embeddings().weight

    @torch.compiler.disable
    def states(self, text: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Last hidden states, (B, n, E), of texts, (B, n). position_ids: (B, n); a jump of more than 1 begins a text
        of its own, which does not see what stands before it."""
        with self._reading(text) as model:
            return model.base_model(input_ids=text, position_ids=position_ids, use_cache=False).last_hidden_state

    @torch.compiler.disable
    def logits(self, text: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """As `states`, the logits, (B, n, V)."""
        with self._reading(text) as model:
            return model(input_ids=text, position_ids=position_ids, use_cache=False).logits

    @contextmanager
    def _reading(self, text: Tensor) -> Iterator[PreTrainedModel]:
        # Its weights are in the precision of the run: autocast would only make products of layers that have another.
        with torch.no_grad(), torch.autocast(text.device.type, enabled=False):
            yield self.model


class WithoutAdapters(Teacher):
    """The model that adapters were put on, in its own weights: while it reads, they are off, embeddings and head, which
    are trained with them, are as they were, and attention is full."""

    def __init__(self, adapted: nn.Module, untouched: UntouchedRows) -> None:
        self.adapted, self.model, self.untouched = adapted, without_adapters(adapted), untouched
        self.length = getattr(self.model.config, "max_position_embeddings", None)
        self.plain = has_plain_head(self.model)

    @property
    def head(self) -> Tensor:
        return self.untouched.head

    @contextmanager
    def _reading(self, text: Tensor) -> Iterator[PreTrainedModel]:
        model, config = self.model, self.model.config
        attention, training = config._attn_implementation, model.training
        layers = [
            layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
            for layer in (model.get_input_embeddings(), model.get_output_embeddings())
        ]
        trained = [layer.weight for layer in layers]
        try:
            self.adapted.base_model.disable_adapter_layers()
            model.eval()
            config._attn_implementation = ATTENTION
            for layer, rows in zip(layers, (self.untouched.embedding, self.untouched.head), strict=True):
                layer.weight = rows
            with super()._reading(text):
                yield model
        finally:
            for layer, weight in zip(layers, trained, strict=True):
                layer.weight = weight
            config._attn_implementation = attention
            model.train(training)
            self.adapted.base_model.enable_adapter_layers()


class UntouchedRows:
    """A copy of a model's embedding and head, before they get rows for landmarks and are trained; one copy where the
    two are tied."""

    def __init__(self, model: PreTrainedModel) -> None:
        embedding, head = (layer.weight for layer in (model.get_input_embeddings(), model.get_output_embeddings()))
        self.embedding = nn.Parameter(embedding.detach().clone(), requires_grad=False)
        self.head = self.embedding if head is embedding else nn.Parameter(head.detach().clone(), requires_grad=False)

    def to(self, device: torch.device) -> UntouchedRows:
        """Move them."""
        for rows in (self.embedding, self.head):
            rows.data = rows.data.to(device)
        return self


def open_teacher(
    name: str, tokenizer: PreTrainedTokenizerBase, *, dtype: torch.dtype, trust_remote_code: bool = False
) -> Teacher:
    """Open a teacher of its own.

    name: a model directory or hub id. tokenizer: the student's, with landmarks. dtype: the run's half precision, or
    float32 in a run without one. trust_remote_code: whether Python code that comes with the model may run.

    Raises LandmarkError where it cannot be opened, or gives other ids to the student's tokens.
    """
    model, own = open_pretrained(name, attention=ATTENTION, dtype=dtype, trust_remote_code=trust_remote_code)
    known, rows = own.get_vocab(), model.get_input_embeddings().weight.shape[0]
    for token, id in tokenizer.get_vocab().items():
        # These are put in for the student.
        if token in (LANDMARK_TOKEN, PADDING_TOKEN):
            continue
        if known.get(token) != id or id >= rows:
            raise LandmarkError(
                f"--teacher {name} is of another tokenizer: {token!r} is {id} in the model that is trained, and "
                f"{known.get(token, 'no token')} there; take a teacher of the same family, or --teacher self"
            )
    return Teacher(model)
