"""The loss straight from hidden states, forward and backward: ours beside logits that are held and beside libraries.

    python benchmarks/cross_entropy.py --rows 8192 65536
    python benchmarks/cross_entropy.py --kernel      # our kernel alone, in other configurations

Hidden states are bfloat16, the head's weight float32 under autocast, targets random words. liger is liger-kernel, if it
is installed, with pieces so many times its own; torch is torch's own function, where there is one. Errors are relative,
of the gradients by hidden states and weight, against float32, on the first rows. Memory is what a call takes beside its
inputs and gradients.
"""

from __future__ import annotations

import argparse
import sys
import timeit
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from landmark_cli.training import fused_cross_entropy
from landmark_cli.training.linear_cross_entropy import linear_cross_entropy, score_and_differentiate
from tests.closeness import whole_error

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
LIGER_PIECES = 1, 8, 32
CHECKED = 1024 if GPU else 64

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def held(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The definition, all logits at once."""
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")


def implementations() -> dict[str, Loss]:
    found: dict[str, Loss] = {"ours": linear_cross_entropy, "logits held": held}
    if GPU:
        found["logits held, compiled"] = torch.compile(held, dynamic=False)
    if hasattr(F, "linear_cross_entropy"):
        # Without options it holds all logits; with them it works in pieces.
        pieces = torch.nn.LinearCrossEntropyOptions()
        found["torch"] = lambda h, w, t: F.linear_cross_entropy(h.to(w.dtype), w, t, reduction="sum", options=pieces)
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as liger
    except ImportError:
        return found
    for pieces in LIGER_PIECES:

        def loss(h: Tensor, w: Tensor, t: Tensor, pieces: int = pieces) -> Tensor:
            return liger(h, w, t, reduction="sum", accum_dtype=torch.float32, chunk_mem_const=pieces)

        found[f"liger, pieces x {pieces}"] = loss
    return found


def inputs(rows: int, width: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(rows, width, device=DEVICE).bfloat16().requires_grad_()
    weight = (0.02 * torch.randn(vocabulary, width, device=DEVICE)).requires_grad_()
    return hidden, weight, torch.randint(vocabulary, (rows,), device=DEVICE)


def gradients(loss: Loss, hidden: Tensor, weight: Tensor, targets: Tensor, half: bool = True) -> tuple[Tensor, ...]:
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=half):
        value = loss(hidden, weight, targets)
    return torch.autograd.grad(value, (hidden, weight))


def milliseconds(work: Callable[[], object]) -> float:
    if GPU:
        return triton.testing.do_bench(work, warmup=50, rep=300, return_mode="median")
    return timeit.timeit(work, number=2) / 2 * 1e3


def compare(rows: int, width: int, vocabulary: int) -> None:
    """A table of all implementations."""
    hidden, weight, targets = inputs(rows, width, vocabulary)
    few = hidden.detach()[:CHECKED].float().requires_grad_()
    exact = gradients(held, few, weight, targets[:CHECKED], half=False)
    print(f"\n{rows} rows of width {width}, {vocabulary} words:\n")
    print("| loss | ms | GiB | errors |\n| --- | ---: | ---: | --- |")
    for name, loss in implementations().items():
        try:
            some = hidden.detach()[:CHECKED].requires_grad_()
            found = gradients(loss, some, weight, targets[:CHECKED])
            errors = [whole_error(a, b) for a, b in zip(found, exact, strict=True)]
            taken = milliseconds(lambda loss=loss: gradients(loss, hidden, weight, targets))
            print(f"| {name} | {taken:.2f} | {memory(loss, hidden, weight, targets):.2f} | ", end="")
            print(", ".join(f"{error:.1e}" for error in errors), "|", flush=True)
        except Exception as error:
            print(f"| {name} | {type(error).__name__}: {str(error).splitlines()[0][:80]} | | |", flush=True)


def memory(loss: Loss, *tensors: Tensor) -> float:
    """GiB that a call takes, its two gradients left out."""
    if not GPU:
        return float("nan")
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = sum(x.numel() * x.element_size() for x in gradients(loss, *tensors))
    return (torch.cuda.max_memory_allocated() - before - kept) / 2**30


def configurations(rows: int, vocabulary: int) -> None:
    """Our kernel with other numbers of warps and of logits that a thread takes in a step."""
    logits = 3 * torch.randn(rows, vocabulary, device=DEVICE).bfloat16()
    targets, losses = torch.randint(vocabulary, (rows,), device=DEVICE), torch.empty(rows, device=DEVICE)
    expected = logits[:64].clone()
    score_and_differentiate(expected, targets[:64], torch.empty(64, device=DEVICE))
    room = torch.empty_like(logits)
    print(f"\n{rows} rows of {vocabulary} logits; a copy takes {milliseconds(lambda: room.copy_(logits)):.3f} ms")
    for warps in (4, 8, 16, 32):
        for depth in (1, 2, 4):

            def run(warps: int = warps, depth: int = depth) -> None:
                fused_cross_entropy.score_kernel[(rows,)](
                    room, targets, losses, vocabulary, vocabulary, IGNORED=-100, COLS=256 * warps, DEPTH=depth,
                    num_warps=warps,
                )  # fmt: skip

            room.copy_(logits)
            run()
            error = whole_error(room[:64], expected)
            print(f"  {warps} warps, {depth} deep: {milliseconds(run):.3f} ms, error {error:.1e}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[8192, 65536] if GPU else [256])
    parser.add_argument("--width", type=int, default=1024 if GPU else 32)
    parser.add_argument("--vocabulary", type=int, default=50304 if GPU else 1000)
    parser.add_argument("--kernel", action="store_true", help="only our kernel, in several configurations")
    options = parser.parse_args()
    for rows in options.rows:
        if options.kernel:
            configurations(min(rows, 9472), options.vocabulary)
        else:
            compare(rows, options.width, options.vocabulary)


if __name__ == "__main__":
    main()
