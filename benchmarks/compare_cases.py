"""What `compare.py` times, in a process of its own for a tree of the code:

    python benchmarks/compare_cases.py TREE PART full|small

imports landmark_cli, and the other scripts of benchmarks/, from TREE, makes the part's cases and warms them up, says
their names, and then times whichever is named on standard input. Everything said is a line of JSON on standard output;
what libraries print goes to standard error.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

# A case, measured once: milliseconds.
Measure = Callable[[], float]
# B, H, key heads, T, D, tokens of a block.
SHAPES = {
    "full": [
        (16, 8, 8, 512, 128, 51),
        (4, 32, 8, 2048, 128, 64),
        (1, 32, 32, 8192, 128, 64),
        (4, 16, 16, 4096, 64, 64),
    ],
    "small": [(2, 4, 2, 204, 32, 51)],
}
# Names of the cases of training.py, and modes.
STEPS = {"full": [("seed", "compiled"), ("seed", "eager"), ("long", "compiled")], "small": [("seed", "eager")]}
# Text tokens that are read, tokens generated after them.
READ = {"full": (32768, 100), "small": (1000, 10)}
# Of a measurement by the clock.
SECONDS = 0.1


def attention(size: str, folder: Path) -> dict[str, Measure]:
    """Landmark attention alone, by the backend that serves: forward, and forward with backward."""
    import torch

    from landmark_cli import landmark_attention

    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    cases: dict[str, Measure] = {}
    for batch, heads, key_heads, tokens, dim, block in SHAPES[size]:
        torch.manual_seed(0)
        q, k, v, gradient = (
            torch.randn(batch, n, tokens, dim, device=device, dtype=dtype) for n in (heads, key_heads, key_heads, heads)
        )
        leaves = [x.requires_grad_() for x in (q, k, v)]

        def forward(leaves: list = leaves, block: int = block) -> Any:
            with torch.no_grad():
                return landmark_attention(*leaves, block_size=block)

        def both(leaves: list = leaves, gradient: torch.Tensor = gradient, block: int = block) -> None:
            for leaf in leaves:
                leaf.grad = None
            landmark_attention(*leaves, block_size=block).backward(gradient)

        shape = f"B{batch} H{heads}/{key_heads} T{tokens} D{dim} block {block}"
        cases[f"attention {shape}, forward"] = kernels(forward)
        cases[f"attention {shape}, forward and backward"] = kernels(both)
    return cases


def step(size: str, folder: Path) -> dict[str, Measure]:
    """The training loop's own step, as training.py of the same tree makes it."""
    import training

    bench = training.Bench(training.SHAPES["tiny" if size == "small" else "paper"], 0.0, folder)
    cases: dict[str, Measure] = {}
    for name, mode in STEPS[size]:
        planned = training.cases([name], [], size == "small", [mode])
        loop = bench.loop(next(case for case in planned if case.kind == "landmark"))
        parameters = list(loop.module.parameters())
        # One step's micro-batches, again and again.
        constant = next(loop.micro_batches())

        def train(loop: Any = loop, parameters: list = parameters, constant: Any = constant) -> None:
            loop.train_step(constant, parameters)
            loop.step += 1

        cases[f"training step, {name} {mode}"] = clock(train)
    return cases


def reading(size: str, folder: Path) -> dict[str, Measure]:
    """A long text read through the block cache, and tokens generated after it."""
    import torch
    import training

    import landmark_cli
    from landmark_cli.models.gpt import GPTConfig, GPTForCausalLM

    text, new = READ[size]
    shape = training.SHAPES["tiny" if size == "small" else "paper"]
    torch.manual_seed(0)
    config = GPTConfig(landmark_freq=50, landmark_token_id=50260, trained_length=512, top_k_blocks=4, **shape)
    model = GPTForCausalLM(config).to(training.DEVICE).eval()
    if training.DEVICE.type == "cuda":
        model = model.bfloat16()
    ids = torch.randint(0, 50000, (text,), generator=torch.Generator().manual_seed(0))
    whole, after = (landmark_cli.Reader(model, chunk=250) for _ in range(2))

    def read(reader: Any = whole) -> None:
        reader.reset()
        reader.expect(text)
        for _ in reader.read([ids], last_only=True):
            pass

    def generate() -> None:
        tokens = [1]
        for _ in range(new):
            tokens = after.step(tokens).argmax(-1).tolist()

    read(after)
    return {f"reading {text} tokens": clock(read), f"{new} tokens after {text}": clock(generate)}


def preparing(size: str, folder: Path) -> dict[str, Measure]:
    """`landmark prepare` as a user runs it: processor time of the whole process."""
    import prepare

    arguments = ["sample"]
    if size == "small":
        (folder / "text.txt").write_text("It was the best of times, it was the worst of times.\n" * 2000)
        arguments = ["text", "--source", str(folder / "text.txt")]
    command = [sys.executable, "-m", "landmark_cli", "prepare", *arguments, "--output"]

    def measure() -> float:
        with tempfile.TemporaryDirectory(dir=folder) as output:
            return 1e3 * prepare.measure([*command, output])["processor"]

    return {f"prepare {arguments[0]}, processor time": measure}


PARTS = {"attention": attention, "step": step, "reading": reading, "preparing": preparing}


def clock(work: Callable[[], object]) -> Measure:
    """By the clock, everything included: the median of repeats. Warms up first."""
    import training

    for _ in range(3):
        work()

    def measure() -> float:
        taken: list[float] = []
        while sum(taken) < SECONDS or len(taken) < 3:
            taken.append(training.seconds_of(work))
        return 1e3 * statistics.median(taken)

    return measure


def kernels(work: Callable[[], object]) -> Measure:
    """By a CUDA graph's replays, the host's share left out; by the clock where there is no GPU."""
    import torch

    if not torch.cuda.is_available():
        return clock(work)
    from triton.testing import do_bench_cudagraph

    work()
    return lambda: do_bench_cudagraph(work, rep=25, return_mode="median")


def main(tree: str, part: str, size: str) -> None:
    said = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(**what: Any) -> None:
        print(json.dumps(what), file=said, flush=True)

    # In place of this script's own folder; processes that a case starts find the same tree.
    sys.path[:1] = [tree, f"{tree}/benchmarks"]
    os.environ["PYTHONPATH"] = tree
    import landmark_cli

    found = Path(landmark_cli.__file__).resolve().parents[1]
    if found != Path(tree).resolve():
        raise SystemExit(f"landmark_cli was imported from {found}, not from {tree}")
    with tempfile.TemporaryDirectory() as folder:
        cases = PARTS[part](size, Path(folder))
        say(cases=list(cases))
        for line in sys.stdin:
            say(value=cases[json.loads(line)]())


if __name__ == "__main__":
    main(*sys.argv[1:])
