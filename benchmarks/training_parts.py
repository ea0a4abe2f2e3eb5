"""What the parts of a training step take, each by itself: a table of training.py."""

from __future__ import annotations

import functools
import timeit
from collections.abc import Callable

import torch
import triton
from torch import Tensor, nn

from landmark_cli.attention.functional import landmark_attention
from landmark_cli.inference.graphs import CudaGraph
from landmark_cli.models.gpt import Rotation
from landmark_cli.training.linear_cross_entropy import linear_cross_entropy
from landmark_cli.training.loop import Loop


def milliseconds_of_parts(loop: Loop) -> dict[str, float]:
    """Milliseconds that the parts of a step take by themselves, forward and backward, for all layers and micro-batches.

    loop: of this package's own model, not compiled.
    """
    device, settings, model = loop.accelerator.device, loop.settings, loop.module.wrapped
    rows = settings.batch_size, settings.sequence_length
    half = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    block, config = model.model.layers[0], model.config
    x = torch.randn(*rows, config.n_embd, device=device, dtype=half, requires_grad=True)
    positions = torch.arange(settings.sequence_length, device=device)[None]
    rotation = Rotation(*(t.detach() for t in model.model.rotary_emb(positions)))
    labels = torch.randint(config.vocab_size, rows, device=device)
    heads = config.n_head, config.n_embd // config.n_head
    q, k, v = (torch.randn(*rows, *heads, device=device, dtype=half).transpose(1, 2).requires_grad_() for _ in range(3))
    if config.landmark_freq is None:
        attend = functools.partial(nn.functional.scaled_dot_product_attention, is_causal=True)
    else:
        attend = functools.partial(landmark_attention, block_size=config.landmark_freq + 1)
    works: dict[str, tuple[Callable[[], Tensor], int]] = {
        "attention itself": (lambda: attend(q, k, v), config.n_layer),
        "attention layer": (lambda: block.attention(block.attention_norm(x), rotation), config.n_layer),
        "MLP": (lambda: block.mlp(block.mlp_norm(x)), config.n_layer),
        "head and loss": (lambda: linear_cross_entropy(model.model.norm(x), model.lm_head.weight, labels), 1),
    }
    taken = {}
    for name, (work, times) in works.items():
        forward = work if name == "attention itself" else torch.compile(work, dynamic=False)
        run = functools.partial(forward_and_backward, forward, (x, q, k, v))
        taken[name] = milliseconds_of(run, device) * times * settings.accumulation
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    parameters = list(model.parameters())

    def update() -> None:
        loop.accelerator.clip_grad_norm_(parameters, 1.0)
        loop.optimizer.optimizer.step()

    taken["clipping and AdamW"] = milliseconds_of(update, device, record=False)
    return taken


def forward_and_backward(forward: Callable[[], Tensor], inputs: tuple[Tensor, ...]) -> None:
    """Gradients add up in the weights, as over micro-batches, but not in the inputs."""
    for tensor in inputs:
        tensor.grad = None
    with torch.autocast(inputs[0].device.type, torch.bfloat16, enabled=inputs[0].dtype is torch.bfloat16):
        out = forward()
    out.backward(torch.ones_like(out))


def milliseconds_of(work: Callable[[], object], device: torch.device, record: bool = True) -> float:
    """Median time of a piece of work, with a cold L2 cache; if it can be recorded, without the host's share."""
    if device.type == "cuda":
        if record:
            work = CudaGraph(work, device, None).replay
        return triton.testing.do_bench(work, warmup=20, rep=60, return_mode="median")
    work()
    return timeit.timeit(work, number=2) / 2 * 1e3
