"""A small command with every type of option, to test the machinery that all commands share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from landmark_cli.commands import Command
from landmark_cli.options import Options, option


@dataclass
class GreetOptions(Options):
    """Greet somebody [loudly].

    A second paragraph."""

    who: str = option("you", help="Who to greet.", positional=True)
    times: int = option(1, help="How often.", min=1, max=9, panel="Numbers")
    rate: float = option(2e-3, help="How fast.", min=0, panel="Numbers")
    blocks: int | None = option(20, help="How many [blocks], or none for all.", min=0)
    style: Literal["plain", "fancy"] = option("plain", help="In which style.")
    tone: Literal["high", "low"] | None = option(None, help="In which tone.")
    data: list[Path] = option([Path("a"), Path("b")], help="Files.", names=("--data", "-d"))
    words: list[str] = option([], help="Words.")
    mix: list[float] | None = option(None, help="Weights of the files.")
    loud: bool = option(False, help="Loudly.")
    twice: bool | None = option(None, help="Twice over.")
    out: Path | None = option(None, help="Where to write.")
    note: str | None = option(None, help="A note.")
    top_k: int = option(4, help="Blocks to read.", names=("--top-k-blocks", "-k"))
    resume: bool = option(False, help="Go on.", saved=False)


EXAMPLES = """
landmark greet
landmark greet me --times 3 --words [x]
"""


def greet_command(run: Callable[[GreetOptions], None], words: str = "greet") -> Command:
    """The command, with a function that does its work."""
    return Command(words, "Greet somebody [loudly].", EXAMPLES, lambda: (GreetOptions, run))
