"""How operators of landmark attention are told to PyTorch: what is the same of all of them.

They are defined by schemas and with autograd's part written out: torch.library.custom_op and register_autograd, which
are simpler to write, take the host three times as long for each call.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._ops import OpOverload

from .backends import BACKENDS
from .kernels.common.tensors import empty_heads_last

NO_SECOND_DERIVATIVES = "landmark attention's kernels have no second derivatives: use LANDMARK_ATTENTION=eager"

LIBRARY = torch.library.Library("landmark", "FRAGMENT")
# Inside of it an operator's own kernels run, not autograd's part.
below_autograd = torch._C._AutoDispatchBelowAutograd


def define(schema: str, compute: Callable, shapes: Callable) -> OpOverload:
    """An operator. compute: gives its outputs, of checked arguments. shapes: gives empty ones, for torch.compile."""
    LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
    name = schema.partition("(")[0]
    LIBRARY.impl(name, compute, "CompositeExplicitAutograd")
    torch.library.register_fake(f"landmark::{name}", shapes, lib=LIBRARY)
    return getattr(torch.ops.landmark, name).default


def differentiate(operator: OpOverload, function: type[torch.autograd.Function], inputs: int | None = None) -> None:
    """Have autograd go through `function` where a gradient of one of the first so many inputs, or of any, is asked
    for."""

    def differentiated(*given):
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in given[:inputs]):
            return function.apply(*given)
        with below_autograd():
            return operator(*given)

    LIBRARY.impl(operator.name().partition("::")[2], differentiated, "Autograd")


def refuse_second_derivatives(operator: OpOverload) -> None:
    """Have a backward operator tell who asks for second derivatives that there are none."""

    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *given):
            with below_autograd():
                return operator(*given)

        @staticmethod
        def backward(ctx, *gradients):
            raise NotImplementedError(NO_SECOND_DERIVATIVES)

    differentiate(operator, Backward)


def define_attention(
    name: str, settings: str, forward: str, backward: str, *, differentiable_lse: bool
) -> tuple[OpOverload, OpOverload]:
    """Two operators of attention with sinks: name(q, k, v, sinks, *settings) -> (out, lse), which autograd knows how to
    differentiate, and name_backward(dout, dlse, q, k, v, sinks, out, lse, *settings) -> (dq, dk, dv, dsinks).

    settings: their schema; the last is the name of the backend whose functions `forward` and `backward` they call, with
    the others. differentiable_lse: otherwise there is no dlse. dsinks is empty where there are no sinks, for which the
    backend gives None.
    """
    inputs, outputs = "Tensor q, Tensor k, Tensor v, Tensor? sinks", "Tensor out, Tensor lse"
    gradients = "Tensor dout, Tensor? dlse" if differentiable_lse else "Tensor dout"
    first = 2 if differentiable_lse else 1

    def compute(*given):
        *given, backend = given
        return getattr(BACKENDS[backend], forward)(*given)

    def shapes(q, *_):
        return empty_heads_last(q), q.new_empty(q.shape[:3], dtype=torch.float32)

    def compute_backward(*given):
        *given, backend = given
        *found, dsinks = getattr(BACKENDS[backend], backward)(*given)
        return *found, given[first].new_empty(0) if dsinks is None else dsinks

    def backward_shapes(*given):
        q, k, v, sinks = given[first : first + 4]
        dsinks = q.new_empty(0) if sinks is None else torch.empty_like(sinks)
        return *map(empty_heads_last, (q, k, v)), dsinks

    operator = define(f"{name}({inputs}, {settings}) -> ({outputs})", compute, shapes)
    schema = f"{name}_backward({gradients}, {inputs}, {outputs}, {settings})"
    schema += " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dsinks)"
    backward_operator = define(schema, compute_backward, backward_shapes)
    # Where tensors stand among the settings.
    places = [at for at, argument in enumerate(operator._schema.arguments[4:]) if "Tensor" in str(argument.type)]

    class Attention(torch.autograd.Function):
        """What autograd keeps between the two operators."""

        @staticmethod
        def forward(ctx, *given):
            with below_autograd():
                out, lse = operator(*given)
            settings = list(given[4:])
            ctx.save_for_backward(*given[:4], out, lse, *[settings[at] for at in places])
            for at in places:
                settings[at] = None
            ctx.settings = settings
            if differentiable_lse:
                ctx.set_materialize_grads(False)
            else:
                ctx.mark_non_differentiable(lse)
            return out, lse

        @staticmethod
        def backward(ctx, dout, dlse):
            q, k, v, sinks, out, lse, *tensors = ctx.saved_tensors
            settings = list(ctx.settings)
            for at, tensor in zip(places, tensors, strict=True):
                settings[at] = tensor
            if differentiable_lse:
                gradients = torch.zeros_like(out) if dout is None else dout, dlse
            else:
                gradients = (dout,)
            *found, dsinks = backward_operator(*gradients, q, k, v, sinks, out, lse, *settings)
            return *found, None if sinks is None else dsinks, *(None,) * len(settings)

    differentiate(operator, Attention, 4)
    refuse_second_derivatives(backward_operator)
    return operator, backward_operator
