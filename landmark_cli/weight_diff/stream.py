"""Many tensors through a few threads, each tensor in pieces that stay in the processor's cache."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

from landmark_cli import console
from landmark_cli.cores import usable_cores
from landmark_cli.weight_diff.checkpoint import Tensor

PIECE_BYTES = 512 << 10
MOST_THREADS = 8

Result = TypeVar("Result")


class Stopped(Exception):
    """Another tensor failed; this one need not be finished."""


def pieces(start: int, stop: int, itemsize: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of the pieces that elements start..stop are worked on in."""
    step = PIECE_BYTES // itemsize
    return ((at, min(at + step, stop)) for at in range(start, stop, step))


def default_threads() -> int:
    """As many as there are processors, within reason: reading, arithmetic, sha256 and writing all run side by side."""
    return min(usable_cores(), MOST_THREADS)


def for_each_tensor(
    tensors: Iterable[Tensor],
    work: Callable[[Tensor, Callable[[], None]], Result],
    *,
    threads: int,
    description: str,
) -> dict[str, Result]:
    """Call work(tensor, check) for every tensor, `threads` at a time, with a progress bar -> results by name.

    `work` calls check() between pieces, which ends the work on a tensor when another tensor has failed. The first
    failure is raised.
    """
    tensors = list(tensors)
    stop = threading.Event()

    def check() -> None:
        if stop.is_set():
            raise Stopped

    results: dict[str, Result] = {}
    total = sum(tensor.nbytes for tensor in tensors)
    with console.progress(description, total, "B") as progress, ThreadPoolExecutor(threads) as pool:
        running = {pool.submit(work, tensor, check): tensor for tensor in tensors}
        try:
            for future in as_completed(running):
                tensor = running[future]
                results[tensor.name] = future.result()
                progress.advance(tensor.nbytes)
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    return results
