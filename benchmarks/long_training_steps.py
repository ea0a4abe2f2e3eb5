"""Whole training steps of one long window, beside as many tokens dense: rows of long_training.py."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator

import torch

from benchmarks.long_context_steps import SHAPES, Run, llama
from benchmarks.reading_windows import (
    BLOCK,
    DEVICE,
    DTYPE,
    TOP_K,
    gibibytes,
    milliseconds,
    milliseconds_in_turn,
    stage_times,
    window_of,
)
from landmark_cli.training.linear_cross_entropy import linear_cross_entropy
from landmark_cli.training.setup import checkpoint_activations

# Of whole steps whose speeds are compared.
LENGTHS = 32 << 10, 1 << 20


def training_step(shape: str, layers: int | None) -> Callable[..., Callable[[], None]]:
    """of(tokens, reads, keep_retrieved) -> a whole training step of one window, or, if it does not read, of windows of
    2048 tokens: forward, backward with checkpointed layers, AdamW."""
    model = llama(shape, Run(layers=layers), top_k_blocks=TOP_K).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def of(tokens: int, reads: bool = True, keep_retrieved: bool = True) -> Callable[[], None]:
        ids = torch.randint(model.config.vocab_size - 1, (1, tokens), device=DEVICE)
        ids[:, BLOCK - 1 :: BLOCK] = model.config.landmark_token_id
        inputs = {"input_ids": ids if reads else ids.view(-1, 2048)}
        if reads:
            window = window_of(tokens, model.config.hidden_size // model.config.num_attention_heads)
            inputs |= {"position_ids": window.position_ids, "landmark_window": window}

        def step() -> None:
            checkpoint_activations(model, keep_retrieved and reads)
            hidden = model.model(**inputs, use_cache=False).last_hidden_state
            targets = inputs["input_ids"].roll(-1, dims=1)
            (linear_cross_entropy(hidden, model.lm_head.weight, targets) / tokens).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    return of


def step_row(name: str, rounds: int) -> str:
    """Whole training steps of one window and of as many tokens dense."""
    shape, layers, tokens = {"smollm2-step": ("smollm2", None, 128 << 10), "llama-step": ("8b", 4, 64 << 10)}[name]
    of = training_step(shape, layers)
    reading = of(tokens)
    work = {
        f"as it reads, {tokens >> 10}k": reading,
        f"as it reads, {tokens >> 10}k, blocks chosen and read twice": of(tokens, keep_retrieved=False),
        "dense, 2k": of(tokens, reads=False),
    }
    memory = {title: gibibytes(call) for title, call in work.items()}
    times = milliseconds_in_turn(work, rounds)
    lines = [f"## {name}: whole steps of {tokens} tokens, layers checkpointed", ""]
    for title, found in times.items():
        taken = statistics.median(found)
        lines.append(f"{title}: {taken:.0f} ms, {tokens / taken * 1e3:.0f} tokens/s, {memory[title]:.1f} GiB")
    ours, _, theirs = times.values()
    lines.append(f"{statistics.median(b / a for a, b in zip(ours, theirs, strict=True)):.2f} of dense 2k's tokens/s")
    parts = ", ".join(f"{part} {taken:.1f}" for part, taken in stage_times(reading, 1).items())
    lines.append(f"Milliseconds by part, all layers: {parts}")
    return "\n".join(lines)


def million_step_row(
    rounds: int, begun: Callable[[], float], limit: float = math.inf, compiled: Callable[[], None] = lambda: None
) -> Iterator[str]:
    """Whole training steps of one window of a million tokens, SmolLM2's shape, beside those of 32k.

    Yields lines, each as soon as it is measured, since device time may end. The first step at a length allocates, and
    is said apart.

    begun: seconds since the script began; what would take longer than `limit` seconds of these is left out, and said.
    compiled: waits until the kernels are.
    """
    yield "## 1m-step: whole steps of one window, SmolLM2's shape, layers checkpointed, not compiled\n"
    of = training_step("smollm2", None)
    yield f"the model is there after {begun():.0f} s"
    compiled()
    yield f"kernels are compiled after {begun():.0f} s"
    short, long = LENGTHS
    speeds: dict[int, list[float]] = {short: [], long: []}
    taken = 0.0
    for tokens, keep_retrieved in ((short, True), (long, True), (long, False)):
        said = named(tokens) + ("" if keep_retrieved else ", blocks chosen and read twice")
        # A first step and another, which read twice: a third more than those before them, with some room.
        if not keep_retrieved and begun() + 3 * taken / 1e3 > limit:
            yield f"{said}: left out, there is no time for it"
            continue
        try:
            step = of(tokens, keep_retrieved=keep_retrieved)
            first: list[float] = []
            memory = gibibytes(lambda step=step, first=first: first.append(milliseconds(step)))
            yield f"{said}: first step {first[0]:.0f} ms, {memory:.1f} GiB ({begun():.0f} s)"
            taken = statistics.median(milliseconds(step) for _ in range(rounds if tokens == short else 1))
        except torch.cuda.OutOfMemoryError:
            yield f"{said}: out of memory"
            continue
        finally:
            step = None
            torch.cuda.empty_cache()
        speeds[tokens].append(tokens / taken * 1e3)
        yield f"{said}: {taken:.0f} ms, {speeds[tokens][-1]:.0f} tokens/s, {memory:.1f} GiB ({begun():.0f} s)"
        if tokens == long and speeds[short]:
            ratio = max(speeds[long]) / speeds[short][0]
            yield f"{named(long)} at {ratio:.2f} of the speed at {named(short)} (target 0.6)"


def named(tokens: int) -> str:
    return f"{tokens >> 20}M" if tokens >= 1 << 20 else f"{tokens >> 10}k"


def loss_once() -> None:
    """The kernel of a step's loss, of as many logits as SmolLM2's vocabulary has."""
    weight = torch.zeros(SHAPES["smollm2"]["vocab_size"], 64, dtype=DTYPE, device=DEVICE, requires_grad=True)
    hidden = torch.zeros(1, 16, 64, dtype=DTYPE, device=DEVICE, requires_grad=True)
    linear_cross_entropy(hidden, weight, torch.zeros(1, 16, dtype=torch.long, device=DEVICE)).backward()
