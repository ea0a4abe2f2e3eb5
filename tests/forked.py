"""Processes that begin at once: each is a fork of one process that has imported torch, transformers and the commands.

A process of Python's own takes longer for these imports than most tests for all they do. What is tried by a start as a
user makes it, or before anything is imported, starts a process of its own.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import landmark_cli

LANDMARK = Path(landmark_cli.__file__).parent.parent / "landmark"
IMPORTED = ["landmark_cli.models", "landmark_cli.commands.finetune", "landmark_cli.training.loop", "tests.forked"]


@cache
def _context() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    return context


class Forked:
    """A program, by default `landmark`, that has been started with these arguments.

    said: a file, there or a new one, at whose end its standard output and error stand. environment: all of it, as what
    is imported later reads it. folder: where it works. program: a file, or a module's name.
    """

    def __init__(
        self,
        arguments: Sequence[object],
        said: Path,
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
        program: Path | str = LANDMARK,
    ) -> None:
        given = program, list(map(str, arguments)), said, dict(environment or os.environ), folder or Path.cwd()
        self.process, self.said = _context().Process(target=_run, args=given), said
        said.touch()
        self.process.start()

    def send_signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def running(self) -> bool:
        return self.process.exitcode is None

    def wait(self, seconds: float = 240) -> int:
        """The exit code, or the signal's number below 0."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"still at work after {seconds} seconds: {self.said.read_text()}"
        return self.process.exitcode


def run_ranks(
    number: int, arguments: Sequence[object], said: Path, environment: Mapping[str, str], program: Path | str = LANDMARK
) -> list[int]:
    """The exit codes of so many processes that work together, as torchrun starts them on one machine."""
    from torch.distributed import TCPStore

    # By which they find each other, and which stays until all of them have ended, as torchrun's.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    together = {"MASTER_ADDR": store.host, "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    together |= {"WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number), "TORCHELASTIC_RESTART_COUNT": "0"}
    started = []
    for rank in map(str, range(number)):
        own = {**environment, **together, "RANK": rank, "LOCAL_RANK": rank}
        started.append(Forked(arguments, said, own, program=program))
    return [process.wait() for process in started]


def _run(program: Path | str, arguments: list[str], said: Path, environment: dict[str, str], folder: Path) -> None:
    file = os.open(said, os.O_WRONLY | os.O_APPEND)
    for number in (1, 2):
        os.dup2(file, number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = [str(program), *arguments]
    if isinstance(program, Path):
        runpy.run_path(str(program), run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)
