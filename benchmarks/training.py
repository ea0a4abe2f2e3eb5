"""The training step: landmark attention beside the same model with ordinary attention, in one process.

    python benchmarks/training.py --warm --output benchmarks/results/training-MACHINE.md
    python benchmarks/training.py --quick
    python benchmarks/training.py --cases seed --variants

What is timed is the training loop's own step: all micro-batches, clipping, AdamW, in the loop's precision. "seed" is
the paper's model at 512 tokens in micro-batches of 16 windows, 8 a step; "long" has 2048 tokens and 4 windows. With the
batch free, "free 128x4" has 128 windows of 512 tokens, 4 micro-batches a step; batches that do not fit are left out.

Stream tokens include landmarks and are what the GPU computes; text tokens are what is learned. MFU: stream tokens a
second x operations of a token / the chip's dense 16-bit peak. Operations of a token: 6 for every weight of a linear
layer, the head included, and 6 x layers x heads x head dim x window for attention (half the square), for both models.
Memory is the most that tensors took. Batches are on the GPU before the clock starts; "with loader" takes them from the
loop's loader instead. Random tokens, drawn as often as words are. Waits: how often the host waits for the GPU in a
step, by torch's own count of operations that do.

--warm compiles cases first, in processes side by side, as many as fit the memory. --variants: what single optimizations
are worth.
"""

from __future__ import annotations

import argparse
import functools
import gc
import math
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import triton
from torch import Tensor
from training_parts import milliseconds_of_parts
from training_report import report

import landmark_cli
from landmark_cli.console import info
from landmark_cli.data.batches import Batches
from landmark_cli.data.windows import Windows
from landmark_cli.models.gpt import GPTConfig, GPTForCausalLM
from landmark_cli.training.loop import Loop, LoopSettings
from landmark_cli.training.metrics import peak_flops
from landmark_cli.training.optimizer import Schedule
from landmark_cli.training.runs import device_name
from landmark_cli.training.setup import make_accelerator

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PRECISION = "bf16" if DEVICE.type == "cuda" else "fp32"
FREQUENCY, BLOCK, LANDMARK, END = 50, 51, 50260, 50256
SHAPES = {
    "paper": {},
    "tiny": {"n_layer": 2, "n_head": 2, "n_embd": 32},
}
GIB = 1 << 30
# Memory that a token of a micro-batch takes, about; more beside it does not depend on the batch.
TOKEN_BYTES = 500_000
MODES = "eager", "compiled"


@dataclass(frozen=True)
class Case:
    """One line of the table. kind: "landmark" or "baseline"; mode: "eager", "compiled", or "blocks" where every block
    is compiled by itself."""

    name: str
    kind: str
    mode: str
    length: int
    batch: int
    accumulation: int
    fused_loss: bool = True
    fp32_residual: bool = False

    def __str__(self) -> str:
        return f"{self.name} {self.kind} {self.mode}"


@dataclass
class Result:
    """seconds: of a step; loading: of one with the loader; memory: bytes; waits: of a step, for the GPU."""

    case: Case
    seconds: float
    loading: float
    memory: int
    flops: float
    waits: int

    @property
    def stream_tokens(self) -> float:
        return self.case.length * self.case.batch * self.case.accumulation / self.seconds

    @property
    def text_tokens(self) -> float:
        landmarks = self.case.length // BLOCK if self.case.kind == "landmark" else 0
        return self.stream_tokens * (1 - landmarks / self.case.length)

    @property
    def mfu(self) -> float | None:
        peak = peak_flops(DEVICE, PRECISION)
        return peak and self.stream_tokens * self.flops / peak


def windows(text: str) -> tuple[int, int]:
    """A micro-batch's windows and a step's micro-batches, of "128x4"; one micro-batch of "128"."""
    batch, _, accumulation = text.partition("x")
    return int(batch), int(accumulation or 1)


def cases(names: list[str], batches: list[str], tiny: bool, modes: Iterable[str] = MODES) -> list[Case]:
    """The cases of these names and modes; free ones have every batch, compiled."""
    shapes = {"seed": (512, 16, 8), "long": (2048, 4, 8)}
    if tiny:
        shapes = {"seed": (102, 2, 2), "long": (204, 1, 2)}
    kinds = "landmark", "baseline"
    found = [
        Case(name, kind, mode, *shapes[name]) for name in names if name in shapes for mode in modes for kind in kinds
    ]
    length = shapes["seed"][0]
    free = batches if "free" in names else []
    return found + [Case(f"free {text}", kind, "compiled", length, *windows(text)) for text in free for kind in kinds]


def variants(seed: Case) -> dict[str, Case]:
    """The landmark model's compiled case with one thing changed in each."""
    return {
        "as it is": seed,
        "logits of all tokens held": replace(seed, fused_loss=False),
        "residual stream in 32 bits": replace(seed, fp32_residual=True),
        "every block compiled by itself": replace(seed, mode="blocks"),
    }


def random_words(count: int = 2_000_000) -> SimpleNamespace:
    """What a token file is to batches: tokens, a few of them frequent as the words of a language are."""
    share = 1 / (np.arange(END) + 2.7)
    tokens = np.random.default_rng(0).choice(END, count, p=share / share.sum()).astype(np.uint16)
    return SimpleNamespace(path="random words", tokens=tokens)


@contextmanager
def fresh() -> Iterator[None]:
    """Nothing compiled, no memory taken, and the peak counted from here."""
    torch._dynamo.reset()
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    yield


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


@contextmanager
def counted_waits() -> Iterator[list[warnings.WarningMessage]]:
    """The operations of the block that wait for the GPU, one warning each."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if DEVICE.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield caught
        finally:
            if DEVICE.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    # The mode itself is warned about once, too.
    caught[:] = [one for one in caught if "called a synchronizing" in str(one.message)]


class Bench:
    """What all cases share. shape: changes to the paper's model. seconds: measured of each case, about."""

    def __init__(self, shape: dict, seconds: float, output: Path) -> None:
        self.shape, self.seconds, self.output = shape, seconds, output
        self.words = random_words()

    def model(self, case: Case) -> GPTForCausalLM:
        torch.manual_seed(0)
        landmarks = case.kind == "landmark"
        config = GPTConfig(
            landmark_freq=FREQUENCY if landmarks else None,
            landmark_token_id=LANDMARK if landmarks else None,
            trained_length=case.length,
            **self.shape,
        )
        model = GPTForCausalLM(config)
        if case.mode == "blocks":
            for layer in model.model.layers:
                layer.compile(dynamic=False)
        return model

    def loop(self, case: Case) -> Loop:
        """The training loop as `landmark train` makes it."""
        accelerator = make_accelerator(
            precision=PRECISION,
            accumulation=case.accumulation,
            device="cpu" if DEVICE.type == "cpu" else "auto",
            compile=case.mode == "compiled",
        )
        model = self.model(case)
        batches = Batches(
            [self.words],
            None,
            Windows(case.length, model.config.landmark_freq, model.config.landmark_token_id, END),
            global_batch=case.batch * case.accumulation,
            seed=0,
        )
        settings = LoopSettings(
            output=self.output,
            steps=1 << 30,
            batch_size=case.batch,
            accumulation=case.accumulation,
            sequence_length=case.length,
            schedule=Schedule("constant", 1e-4, 1 << 30, 0.0),
            weight_decay=1e-3,
            betas=(0.9, 0.95),
            clip=1.0,
            precision=PRECISION,
            seed=0,
            log_every=0,
            evaluate_every=0,
            save_every=0,
            keep=1,
            fused_loss=case.fused_loss,
            fp32_residual=case.fp32_residual,
        )
        loop = Loop(accelerator, model, batches, settings, identity={})
        loop.module.train()
        return loop

    def run(self, case: Case) -> Result:
        """Time a case."""
        started = time.perf_counter()
        with fresh():
            result, ready = self.time(case)
        info(
            f"{case}, batch {case.batch}: {result.stream_tokens:,.0f} tokens/s, {result.memory / 2**30:.1f} GiB; "
            f"ready after {ready - started:.0f} s, done after {time.perf_counter() - started:.0f} s"
        )
        return result

    def time(self, case: Case) -> tuple[Result, float]:
        """The result, and when the case was compiled and warm."""
        loop = self.loop(case)
        parameters = list(loop.module.parameters())
        loader = loop.micro_batches()
        constant = next(loader)

        def step(micro_batches: list[dict[str, Tensor]]) -> None:
            loop.train_step(micro_batches, parameters)
            loop.step += 1

        for _ in range(2):
            step(constant)
        synchronize()
        ready = time.perf_counter()
        with counted_waits() as waits:
            step(constant)
        for one in waits:
            info(f"{case} waits for the GPU at {one.filename}:{one.lineno}")
        if DEVICE.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        once = seconds_of(lambda: step(constant))
        steps = max(2, math.ceil(self.seconds / 4 / once))
        seconds = statistics.median(seconds_of(lambda: step(constant), steps) for _ in range(3))
        next(loader)
        loading = seconds_of(lambda: [step(micro) for micro in islice(loader, steps)]) / steps
        loader.close()
        memory = torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else 0
        return Result(case, seconds, loading, memory, loop.flops_per_token, len(waits)), ready

    def parts(self, case: Case) -> dict[str, float]:
        """Milliseconds of a step's parts: see `training_parts.milliseconds_of_parts`."""
        with fresh():
            return milliseconds_of_parts(self.loop(replace(case, mode="eager")))


def seconds_of(work: Callable[[], object], times: int = 1) -> float:
    """Wall time of one of `times` runs in a row."""
    synchronize()
    start = time.perf_counter()
    for _ in range(times):
        work()
    synchronize()
    return (time.perf_counter() - start) / times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--cases", nargs="*", choices=["seed", "long", "free"], default=["seed", "long", "free"])
    checked = {"type": lambda text: windows(text) and text, "default": ["128", "256"]}
    parser.add_argument("--batches", nargs="*", help="of the free cases", **checked)
    parser.add_argument("--modes", nargs="*", choices=MODES, default=MODES)
    parser.add_argument("--quick", action="store_true", help="the seed's cases only, for half the time")
    parser.add_argument("--variants", action="store_true", help="change single things too")
    parser.add_argument("--warm", action="store_true")
    parser.add_argument("--shape", choices=SHAPES, default="paper" if DEVICE.type == "cuda" else "tiny")
    parser.add_argument("--seconds", type=float, default=2.0 if DEVICE.type == "cuda" else 0.1, help="of each case")
    parser.add_argument("--only", help="compile this case and stop (what --warm does)")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.quick:
        options.cases, options.seconds = ["seed"], options.seconds / 2
    with tempfile.TemporaryDirectory() as directory:
        bench = Bench(SHAPES[options.shape], options.seconds, Path(directory))
        planned = cases(options.cases, options.batches, options.shape == "tiny", options.modes)
        compared = variants(replace(cases(["seed"], [], options.shape == "tiny")[0], mode="compiled"))
        compared = compared if options.variants else {}
        work = {str(case): case for case in planned} | compared
        if options.only:
            bench.run(work[options.only])
            return
        if options.warm:
            warm({name: case for name, case in work.items() if case.mode != "eager"}, options)
        print(measure(bench, planned, compared, options.output), end="")


def warm(work: dict[str, Case], options: argparse.Namespace) -> None:
    """Fill the compiler's caches, every case in a process of its own; those beyond what fits compile when they run."""
    command = [sys.executable, __file__, "--shape", options.shape, "--seconds", "0", "--variants"]
    command += ["--batches", *options.batches, "--only"]
    room = torch.cuda.get_device_properties(DEVICE).total_memory if DEVICE.type == "cuda" else math.inf
    started, running = time.perf_counter(), []
    for name, case in sorted(work.items(), key=lambda item: item[1].batch * item[1].length):
        room -= 6 * GIB + case.batch * case.length * TOKEN_BYTES
        if room < 0:
            break
        running.append(subprocess.Popen([*command, name], stderr=subprocess.DEVNULL))
    for process in running:
        process.wait()
    info(f"{len(running)} cases compiled in {time.perf_counter() - started:.0f} s")


def measure(bench: Bench, planned: list[Case], compared: dict[str, Case], output: Path | None) -> str:
    """Run everything; what fails is said and left out. The report so far is written after every piece."""
    results, parts, changed = [], {}, {}
    about = (
        f"`python benchmarks/training.py {' '.join(sys.argv[1:])}` on one {device_name(DEVICE)}, {PRECISION}, "
        f"torch {torch.__version__}, triton {triton.__version__}, landmark {landmark_cli.__version__}."
    )
    written = functools.partial(report, about, "\n\n".join(__doc__.split("\n\n")[2:4]))

    def attempt(work: Callable[[], Result], into: Callable[[Result], object]) -> None:
        try:
            into(work())
        except Exception as error:
            info(f"failed: {type(error).__name__}: {error}")
        if output:
            output.write_text(written(results, parts, changed), encoding="utf-8")

    for case in planned:
        attempt(lambda case=case: bench.run(case), results.append)
    for name, case in compared.items():
        known = next((r for r in results if r.case == case), None)
        attempt(lambda case=case, known=known: known or bench.run(case), lambda r, name=name: changed.update({name: r}))
    for result in [r for r in results if (r.case.name, r.case.mode) == ("seed", "compiled")]:
        case = result.case
        attempt(lambda case=case: bench.parts(case), lambda taken, case=case: parts.update({case: taken}))
    return written(results, parts, changed)


if __name__ == "__main__":
    main()
