"""The kernels of windows that are read chunk by chunk in other configurations: times at 64k tokens, the fastest first.

    python benchmarks/tune_window.py
    python benchmarks/tune_window.py --kernels select attend

What is best goes into landmark_cli/attention/kernels/reading/window_configurations.py. A kernel's time is that of its
stage, with the other kernels as usual; the inputs are those of benchmarks/long_training.py.
"""

from __future__ import annotations

import argparse
import functools
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.reading_windows import CHUNK, LARGE, as_it_reads, forward_and_backward, stage_times, tensors
from landmark_cli.attention.kernels.common.choices import Choices
from landmark_cli.attention.kernels.common.configuration import Configuration
from landmark_cli.attention.kernels.reading import window as kernels

TOKENS = 64 << 10
CANDIDATES = {
    "select": [Configuration(64, 64, 4, 2), Configuration(64, 64, 4, 1, 128), Configuration(64, 64, 8, 2),
               Configuration(128, 64, 8, 2), Configuration(128, 64, 8, 1, 128), Configuration(64, 64, 4, 3, 168)],
    "attend": [Configuration(64, 64, 4, 1), Configuration(64, 64, 4, 1, 168), Configuration(64, 64, 8, 1),
               Configuration(128, 64, 8, 1), Configuration(128, 64, 8, 1, 128)],
    "merge": [Configuration(8, 64, 4), Configuration(16, 64, 4), Configuration(64, 64, 8), Configuration(32, 64, 8)],
    "own_gradient": [Configuration(8, 64, 4), Configuration(16, 64, 4), Configuration(64, 64, 8)],
    "pair_gradient": [Configuration(64, 64, 8, 1), Configuration(64, 64, 8, 3), Configuration(128, 64, 8, 1),
                      Configuration(128, 64, 8, 2), Configuration(64, 64, 4, 1), Configuration(64, 64, 4, 2)],
    "sum_queries": [Configuration(8, 64, 4), Configuration(16, 64, 4), Configuration(64, 64, 8)],
}  # fmt: skip
STAGE_OF = {"pair_gradient": "key_gradients"}
# Pairs of an item of work of backward.
ITEMS = 512, 1024, 4096


def tune(names: Sequence[str], rounds: int) -> Iterator[str]:
    """Each kernel's time in each of its candidates, the others as usual, line by line."""
    given = tensors(LARGE, TOKENS)
    work = functools.partial(forward_and_backward, as_it_reads(TOKENS, LARGE.dim), given)
    usual = kernels.window_choices
    work()
    for kernel in names:
        stage, found = STAGE_OF.get(kernel, kernel), []
        for choice in [None, *CANDIDATES[kernel]]:
            kernels.window_choices = functools.partial(chosen, usual, kernel, choice)
            try:
                work()
                found.append((stage_times(work, rounds, (stage,))[stage], choice or "as it is"))
            except Exception as error:
                yield f"{kernel} {choice}: {type(error).__name__}"
            finally:
                kernels.window_choices = usual
        yield from (f"{kernel} {taken:.2f}: {choice}" for taken, choice in sorted(found, key=lambda pair: pair[0]))
    for size in ITEMS if "pair_gradient" in names else ():
        before, kernels.ITEM = kernels.ITEM, size
        work()
        yield f"items of {size} pairs: {stage_times(work, rounds, ('key_gradients',))['key_gradients']:.2f}"
        kernels.ITEM = before


def chosen(usual: Callable, kernel: str, choice: Configuration | None, name: str, *given) -> Choices:
    return Choices([choice]) if choice is not None and name == kernel else usual(name, *given)


def compile_all(names: Sequence[str]) -> None:
    """Compile what will be timed, each candidate in a process of its own."""
    jobs = [[kernel, str(number)] for kernel in names for number in range(len(CANDIDATES[kernel]))]
    command = [sys.executable, __file__, "--compile"]
    for process in [subprocess.Popen([*command, *job], stderr=subprocess.DEVNULL) for job in jobs]:
        process.wait()


def compile_one(kernel: str, number: str) -> None:
    """What a process of compile_all does: run the candidate once, small."""
    kernels.window_choices = functools.partial(chosen, kernels.window_choices, kernel, CANDIDATES[kernel][int(number)])
    tokens = 2 * CHUNK
    forward_and_backward(as_it_reads(tokens, LARGE.dim), tensors(LARGE, tokens))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--kernels", nargs="+", choices=CANDIDATES, default=list(CANDIDATES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compile", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.compile:
        compile_one(*options.compile)
        return
    compile_all(options.kernels)
    print("Milliseconds of the kernel's stage", flush=True)
    for line in tune(options.kernels, options.rounds):
        print(line, flush=True)


if __name__ == "__main__":
    main()
