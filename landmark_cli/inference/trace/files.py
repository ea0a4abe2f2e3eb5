"""The files that a trace is written to."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from landmark_cli.errors import UsageError
from landmark_cli.file_errors import writing
from landmark_cli.file_writing import write_whole

from .contents import GenerationTrace
from .page import page_of


def data_of(trace: GenerationTrace) -> bytes:
    """A trace as JSON: a block's text or a token a line, so that a long file can be looked through. Block n holds the
    text tokens from n * landmark_freq on."""
    head = {name: getattr(trace, name) for name in ("model", "memory_tokens", "prompt_tokens", "landmark_freq")}
    blocks = map(json.dumps, trace.blocks)
    tokens = (json.dumps({"text": text, "reads": read}) for text, read in zip(trace.tokens, trace.reads, strict=True))
    lists = (f'"{name}": [\n' + ",\n".join(lines) + "\n]" for name, lines in (("blocks", blocks), ("tokens", tokens)))
    return ", ".join([json.dumps(head).removesuffix("}"), *lists]).encode() + b"}\n"


KINDS: dict[str, Callable[[GenerationTrace], bytes]] = {".json": data_of, ".html": page_of}


def check_trace(path: Path, what: str = "--trace") -> str:
    """The ending of a trace's file, which says what is written. Raises UsageError for another one than there are."""
    ending = path.suffix.lower()
    if ending not in KINDS:
        found = f"{ending} is" if ending else "no ending is"
        raise UsageError(
            f"{what} {path}: {found} no kind of trace: name a file .html (a page to look at) or .json (data)"
        )
    return ending


def write_trace(path: Path, trace: GenerationTrace, what: str = "--trace") -> None:
    """Write a trace to a file, as the file's ending says. Raises as `check_trace` does, and LandmarkError where it
    cannot be written."""
    data = KINDS[check_trace(path, what)](trace)
    with writing(path, what):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, data)
