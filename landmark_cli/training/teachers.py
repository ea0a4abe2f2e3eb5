"""What a decoder learns from while it gets landmarks: a model that is not trained, as it reads text without them.

A teacher is no module of the model that learns from it, so neither an optimizer nor a checkpoint knows of it. With
adapters the untouched model is still there: `WithoutAdapters` reads with it, in the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from landmark_cli.data.pretrained_tokenizers import LANDMARK_TOKEN
from landmark_cli.errors import LandmarkError
from landmark_cli.models.decoders import PADDING_TOKEN
from landmark_cli.models.pretrained import open_pretrained, plain_attention
from landmark_cli.training.compiled import compile_layers, decoder_layers
from landmark_cli.training.setup import has_plain_head, quiet_transformers, without_adapters

ATTENTION, OBSERVED = "sdpa", "observed_sdpa"
# Is called in every layer with its module, queries (B, H, T, D) and keys (B, G, T, D), both rotated, the scale of their
# products, None for 1 / sqrt(D), and how many of the last tokens a query sees, None for all.
Observer = Callable[[nn.Module, Tensor, Tensor, float | None, int | None], None]


def observed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    landmark_observer: Observer,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' `sdpa`, before which an observer is told what it is given. The mask has the window already."""
    landmark_observer(module, query, key, scaling, sliding_window)
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **others)


AttentionInterface.register(OBSERVED, observed_attention)
AttentionMaskInterface.register(OBSERVED, sdpa_mask)


class Teacher:
    """A decoder of its own, frozen, with full attention.

    length: positions it was trained with, None where its config names none; what stands
    beyond them it is not asked about. plain: whether its logits are its hidden states times its head's weight.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.requires_grad_(False).eval()
        self.length: int | None = getattr(model.config, "max_position_embeddings", None)
        self.plain = has_plain_head(model)

    def prepare(self, accelerator: Accelerator) -> Teacher:
        """Move it to the run's device. Under FSDP every process then keeps its share of the weights, which are gathered
        layer by layer while it reads: of those, `head` is the share alone. Every process calls it."""
        self.model.to(accelerator.device)
        if accelerator.distributed_type == DistributedType.FSDP:
            shard(self.model)
        return self

    def compile_layers(self) -> None:
        """See `compiled.compile_layers`."""
        compile_layers(self.model)

    @property
    def head(self) -> Tensor:
        """Its head's weight, (V, E)."""
        return self.model.get_output_embeddings().weight

    @torch.compiler.disable
    def states(self, text: Tensor, position_ids: Tensor | None = None, observer: Observer | None = None) -> Tensor:
        """Last hidden states, (B, n, E), of texts, (B, n). position_ids: (B, n); a jump of more than 1 begins a text
        of its own, which does not see what stands before it. observer: is told of each layer's queries and keys."""
        with self._reading(text, observer) as (model, extra):
            given = {"input_ids": text, "position_ids": position_ids, "use_cache": False}
            return model.base_model(**given, **extra).last_hidden_state

    @torch.compiler.disable
    def logits(self, text: Tensor, position_ids: Tensor | None = None, observer: Observer | None = None) -> Tensor:
        """As `states`, the logits, (B, n, V)."""
        with self._reading(text, observer) as (model, extra):
            return model(input_ids=text, position_ids=position_ids, use_cache=False, **extra).logits

    @contextmanager
    def _reading(
        self, text: Tensor, observer: Observer | None
    ) -> Iterator[tuple[PreTrainedModel, dict[str, Observer]]]:
        """The model and what it is called with besides, so that it attends in full, and is observed."""
        config = self.model.config
        before = config._attn_implementation
        config._attn_implementation = plain_attention(config) if observer is None else OBSERVED
        try:
            # Its weights are in the precision of the run: autocast would only make products of layers that have
            # another.
            with torch.no_grad(), torch.autocast(text.device.type, enabled=False):
                yield self.model, {} if observer is None else {"landmark_observer": observer}
        finally:
            config._attn_implementation = before


class WithoutAdapters(Teacher):
    """The model that adapters were put on, in its own weights: while it reads, they are off, embeddings and head, which
    are trained with them, are as they were, and attention is full."""

    def __init__(self, adapted: nn.Module, untouched: UntouchedRows) -> None:
        self.adapted, self.model, self.untouched = adapted, without_adapters(adapted), untouched
        self.length = getattr(self.model.config, "max_position_embeddings", None)
        self.plain = has_plain_head(self.model)

    def prepare(self, accelerator: Accelerator) -> WithoutAdapters:
        """Move what it has of its own; the rest is moved, and under FSDP sharded, with the model that learns."""
        self.untouched.to(accelerator.device)
        return self

    def compile_layers(self) -> None:
        """Its layers are those of the model that learns."""

    @property
    def head(self) -> Tensor:
        return self.untouched.head

    @contextmanager
    def _reading(
        self, text: Tensor, observer: Observer | None
    ) -> Iterator[tuple[PreTrainedModel, dict[str, Observer]]]:
        model, training = self.model, self.model.training
        layers = model.get_input_embeddings(), model.get_output_embeddings()
        try:
            switch_adapters(self.adapted, off=True)
            model.eval()
            with ExitStack() as stack:
                for layer, rows in zip(layers, (self.untouched.embedding, self.untouched.head), strict=True):
                    stack.enter_context(with_weight(layer, rows))
                yield stack.enter_context(super()._reading(text, observer))
        finally:
            model.train(training)
            switch_adapters(self.adapted, off=False)


def switch_adapters(adapted: nn.Module, *, off: bool) -> None:
    """Have a model's layers leave their adapters out, or not.

    peft's own switch also says of every adapter whether it is trained, of the weights that are there at the moment:
    under FSDP these may be gathered ones, and the shares that are trained would not hear of it.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in adapted.modules():
        if isinstance(layer, BaseTunerLayer):
            layer._disable_adapters = off


@contextmanager
def with_weight(layer: nn.Module, weight: Tensor) -> Iterator[None]:
    """While the block runs, a layer (or the one that its adapter is on) computes with another weight.

    The weight is there while the layer computes and no longer, so that what FSDP does before and after, putting
    gathered weights in the place of shares and back, finds what it left.
    """
    layer = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer

    # What is in an object's own dictionary goes before a module's parameters.
    def begin(layer: nn.Module, inputs: tuple) -> None:
        kept.append(layer.__dict__.get("weight"))
        layer.__dict__["weight"] = weight

    def end(layer: nn.Module, inputs: tuple, output: Tensor) -> None:
        before = kept.pop()
        if before is None:
            del layer.__dict__["weight"]
        else:
            layer.__dict__["weight"] = before

    kept: list[Tensor | None] = []
    hooks = (
        layer.register_forward_pre_hook(begin),
        layer.register_forward_hook(end, prepend=True, always_call=True),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def shard(model: PreTrainedModel) -> None:
    """Have FSDP keep every process's share of a frozen model, and no layer's whole weights after it was computed."""
    from torch.distributed.fsdp import fully_shard

    for layer in decoder_layers(model):
        fully_shard(layer)
    # Without a backward pass nothing else would have the rest, embedding and head, let go.
    fully_shard(model, reshard_after_forward=True)


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
    with quiet_transformers():
        model, own = open_pretrained(name, attention=ATTENTION, dtype=dtype, trust_remote_code=trust_remote_code)
    known, rows = own.get_vocab(), model.get_input_embeddings().weight.shape[0]
    for token, id in tokenizer.get_vocab().items():
        # These are put in for the student.
        if token in (LANDMARK_TOKEN, PADDING_TOKEN):
            continue
        if known.get(token) != id:
            raise LandmarkError(
                f"--teacher {name} is of another tokenizer: {token!r} is {id} in the model that is trained, and "
                f"{known.get(token, 'no token')} there; take a teacher of the same family, or --teacher self"
            )
        if id >= rows:
            raise LandmarkError(
                f"{name} cannot be the teacher: its tokenizer has {token!r} as {id}, and its embedding {rows} rows; "
                "take a teacher that can read all of its tokens, or --teacher none"
            )
    return Teacher(model)


def check_layers(
    teacher: PreTrainedConfig, student: PreTrainedConfig, name: str, *, heads: bool, joint: bool = False
) -> None:
    """Raise LandmarkError where the layers of two models cannot be compared: their outputs, or with heads their heads'
    products. name: of the teacher. joint: whether the student's landmarks only choose blocks, and so learn by these
    products alone."""
    option, alike = "--hidden-weight compares layers one by one", ("num_hidden_layers", "hidden_size")
    instead = "leave it out"
    if heads:
        option = "--gate-weight compares dot products head by head"
        alike = ("model_type", "num_hidden_layers", "num_attention_heads")
    if heads and joint:
        option = "--softmax joint has landmarks learn from the teacher's dot products, head by head"
        instead = "take --softmax grouped"
    for what in alike:
        theirs, ours = getattr(teacher, what, None), getattr(student, what, None)
        if theirs != ours:
            raise LandmarkError(
                f"{option}, and {what} is {theirs} in --teacher {name} and {ours} in the model that is trained: "
                f"{instead}, or take --teacher self"
            )
    if heads and plain_attention(teacher) != ATTENTION:
        raise LandmarkError(
            f"{option}, and {name} ({teacher.model_type}) soft-caps its logits or has attention sinks: {instead}"
        )
