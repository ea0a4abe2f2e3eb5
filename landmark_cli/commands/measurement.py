"""Options that several commands have which measure a model on text, each under that command's own heading (`panel`)."""

from __future__ import annotations

from typing import Any

from landmark_cli.inference.settings import READING
from landmark_cli.options import LARGEST_SEED, LONGEST, option


def text_option(panel: str) -> Any:
    """The text to measure on: Path | None."""
    return option(
        None,
        panel=panel,
        help="A token file, or a prepared corpus whose validation.bin is read. [default: the newest under data/]",
    )


def sample_tokens_option(panel: str) -> Any:
    """How much of it: int | None."""
    return option(
        None,
        panel=panel,
        min=1,
        max=10**15,
        help="Read a random choice of windows, of about this many tokens in all. [default: all windows]",
    )


def window_seed_option(panel: str) -> Any:
    """Which part of it: int."""
    return option(0, panel=panel, min=0, max=LARGEST_SEED, help="Seed for choosing the windows.")


def several_top_k_blocks_option() -> Any:
    """With how many blocks each: list[int] | None."""
    return option(
        None,
        panel=READING,
        min=0,
        max=LONGEST,
        help="Blocks retrieved for each token, with commas between: each number is measured. [default: the number in "
        "the model's config]",
    )


def batch_size_option(panel: str, help: str, adapts: bool = False) -> Any:
    """How much at a time: int | None. adapts: see `option`."""
    return option(None, panel=panel, min=1, help=help, saves_memory="a smaller --batch-size", adapts=adapts)


def windows_at_a_time(panel: str) -> Any:
    """How many windows are read at a time: int | None."""
    return batch_size_option(panel, "Windows read at a time. [default: by the length of their chunks]")


def prompts_at_a_time(panel: str) -> Any:
    """How many prompts are read at a time: int | None."""
    help = "Prompts read at a time. [default: by their length and the memory, fewer once it runs out]"
    return batch_size_option(panel, help, adapts=True)


def samples_option(panel: str) -> Any:
    """How often RULER's tasks are asked: int."""
    return option(50, panel=panel, min=1, max=10_000, help="Prompts of each of RULER's tasks at each length.")


def haystack_option(
    panel: str,
    help: str = "Text in which RULER's tasks with prose hide their needles. [default: the shipped novels]",
) -> Any:
    """What things are hidden in: Path | None. The word `sample` names the shipped novels."""
    return option(None, panel=panel, metavar="<sample|file|folder>", help=help)


def file_option(panel: str, help: str, may_replace: str = "") -> Any:
    """A file to write, tried before the work begins: str | None or Path | None. may_replace: see `option`."""
    return option(None, panel=panel, saved=False, is_output=True, may_replace=may_replace, help=help)


def json_option(panel: str) -> Any:
    """Where results go as data: str | None."""
    return file_option(panel, "Write the results to this file as data too; - for standard output.")
