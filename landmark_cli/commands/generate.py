"""`landmark generate`."""

from __future__ import annotations

import re
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from landmark_cli.commands.measurement import file_option
from landmark_cli.commands.models import ModelOptions, name_model, open_model
from landmark_cli.console import counted, info, print_json, quantity, write_json, write_out
from landmark_cli.disk_room import check_room
from landmark_cli.errors import LandmarkError, UsageError
from landmark_cli.file_errors import writing
from landmark_cli.file_writing import check_writable, require_ordinary
from landmark_cli.inference.settings import ReadingSettings, SamplingSettings
from landmark_cli.options import Options, check_outputs, option

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from landmark_cli.inference.generation import Generation
    from landmark_cli.inference.readers import BaseReader

PROMPT = "Prompt"
MEMORY = "Memory"

# How people write characters in a shell that hands on a backslash and a letter.
ESCAPES = {r"\n": ("\n", "a line break"), r"\t": ("\t", "a tab"), r"\r": ("\r", "a carriage return")}


@dataclass
class PromptOptions(Options):
    """Where the prompt comes from and what is written besides the text."""

    prompt: str | None = option(None, panel=PROMPT, help="The text to continue.")
    prompt_file: Path | None = option(None, panel=PROMPT, help="A UTF-8 file with the text to continue.")
    chat: bool = option(False, panel=PROMPT, help="Put the prompt into the model's chat template.")
    json: str | None = file_option(
        PROMPT, "Write the text, its tokens and why generation ended to this file; - for standard output."
    )
    trace: Path | None = file_option(
        PROMPT, "Write the blocks that each generated token read to this file: .html is a page to look at, .json data."
    )


@dataclass
class MemoryOptions(Options):
    """What was read before, and what is kept of what is read now."""

    memory: list[Path] | None = option(
        None,
        panel=MEMORY,
        help="A file that --save-memory wrote: the prompt goes on from what was read then. Several are read in order.",
    )
    save_memory: Path | None = file_option(
        MEMORY,
        "Write what was read, the prompt at its end, to this file, for any number of later prompts.",
        may_replace="memory",
    )
    append: bool = option(False, panel=MEMORY, saved=False, help="Write what was read back to the file of --memory.")


@dataclass
class GenerateOptions(ReadingSettings, SamplingSettings, ModelOptions, PromptOptions, MemoryOptions):
    """Continue a text of any length; the text goes to standard output as it comes.

    The prompt is --prompt, --prompt-file or standard input. It is read in chunks through the block cache; a model
    without landmarks sees the last tokens that its trained length holds. What was read can be kept and asked again:
    --save-memory once, then --memory with every question.
    """


def run(options: GenerateOptions) -> Generation:
    """Read the prompt, stream the text after it to standard output, and say how fast it went. Returns what was
    generated.

    Raises UsageError for none or several prompts, an empty --stop, a trace of no known kind, or a memory of another
    model or other settings; LandmarkError for a prompt or a memory that cannot be read.
    """
    target = memory_target(options)
    prompt, stop = read_prompt(options), stop_strings(options.stop or [])
    check_outputs(options)
    if options.trace is not None:
        from landmark_cli.inference.trace import check_trace, trace_of, write_trace

        check_trace(options.trace)
    name = name_model(options)
    model, tokenizer = open_model(name, options)
    from landmark_cli.inference.generation import encode_prompt, generate
    from landmark_cli.inference.readers import has_landmarks, open_reader

    memories = options.memory or []
    ids = encode_prompt(tokenizer, prompt, chat=options.chat, goes_on=bool(memories))
    reader = open_reader(model, options)
    if target is not None and not has_landmarks(model):
        raise UsageError(f"{target[0]}: {name} has no landmarks, so what it reads leaves no memory to keep")
    if memories:
        reader.recall(*memories, what="--memory")
    if target is not None:
        _check_room(target, model, len(ids), options)
    seen = reader.sees(len(ids))
    if seen < len(ids):
        info(f"{name} has no landmarks: of the prompt's {counted(len(ids), 'token')} it sees the last {seen} at most")
    to_stdout = options.json == "-"
    started = time.monotonic()
    first: list[float] = []

    def show(row: int, piece: str) -> None:
        first.append(time.monotonic())
        if not to_stdout:
            write_out(piece)

    (generation,) = generate(
        model,
        tokenizer,
        [ids],
        replace(options, stop=stop),
        reader=reader,
        on_text=show,
        on_read=None if target is None else lambda: save_memory(reader, *target),
        trace=options.trace is not None,
        show_progress=True,
    )
    ended = time.monotonic()
    data = {"model": name, **asdict(replace(generation, reads=None))}
    del data["reads"]
    if to_stdout:
        print_json(data)
    else:
        write_out("\n")
    if options.json is not None and not to_stdout:
        write_json(data, options.json)
    if options.trace is not None:
        write_trace(options.trace, trace_of(name, reader, tokenizer, generation))
        info(f"wrote {options.trace}")
    info(_summary(generation.prompt_tokens, len(generation.tokens), generation.finish, started, first, ended))
    return generation


def memory_target(options: MemoryOptions) -> tuple[str, Path] | None:
    """Where the memory goes: the option that says so, and the file. Raises UsageError for options that contradict each
    other, LandmarkError for a device or a pipe, which a memory cannot be read from."""
    if not options.append:
        if options.save_memory is None:
            return None
        with writing(options.save_memory, "--save-memory"):
            require_ordinary(options.save_memory)
        return "--save-memory", options.save_memory
    if options.save_memory is not None or len(options.memory or []) != 1:
        raise UsageError("--append writes back to one --memory FILE: give one, and no --save-memory")
    check_writable(options.memory[0], "--append")
    return "--append", options.memory[0]


def _check_room(target: tuple[str, Path], model: PreTrainedModel, tokens: int, options: MemoryOptions) -> None:
    """Raise LandmarkError, before hours of reading, where the disk has no room for what is read: so many tokens, and
    what --memory holds."""
    from landmark_cli.inference.plan import least_file

    held = sum(path.stat().st_size for path in options.memory or []) if options.cache_blocks is None else 0
    check_room(target[1], held + least_file(model, tokens, options), target[0])


def save_memory(reader: BaseReader, option: str, path: Path) -> None:
    """Keep what a reader has read, and tell the user."""
    reader.save(path, what=option)
    info(f"wrote {path}: {quantity(path.stat().st_size, 'B')}")


def read_prompt(options: GenerateOptions) -> str:
    """The prompt from where the options say, or standard input."""
    if options.prompt is not None and options.prompt_file is not None:
        raise UsageError("--prompt and --prompt-file: both given; give one")
    if options.prompt is not None:
        return options.prompt
    if options.prompt_file is None and (sys.stdin is None or sys.stdin.isatty()):
        raise UsageError("no prompt: give --prompt, --prompt-file, or text on standard input")
    source: Any = options.prompt_file or "standard input"
    try:
        data = options.prompt_file.read_bytes() if options.prompt_file else sys.stdin.buffer.read()
        # Editors of some systems put a byte-order mark in front, which is no part of the text.
        return data.decode("utf-8").removeprefix("\ufeff")
    except OSError as error:
        raise LandmarkError(f"--prompt-file {source} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise LandmarkError(f"{source} is not UTF-8 text (byte {error.start}): convert it first") from error


def stop_strings(typed: list[str]) -> list[str]:
    r"""What --stop was meant to say: \n, \t and \r typed as two characters are the one character that they stand for.

    Where there is other text beside them, the text as it was typed stops too: \newpage and \tau are LaTeX. Raises
    UsageError for an empty text.
    """
    strings = []
    for text in typed:
        if not text:
            raise UsageError("--stop: an empty text is everywhere; name some text, or leave the option out")
        found = re.findall("|".join(map(re.escape, ESCAPES)), text)
        meant = text
        for escape in found:
            meant = meant.replace(escape, ESCAPES[escape][0])
        if found:
            what = ", ".join(f"{escape} as {ESCAPES[escape][1]}" for escape in dict.fromkeys(found))
            info(f"--stop {text}: read {what}")
        strings += [meant] if text in ("".join(found), meant) else [meant, text]
    return strings


def _summary(prompt: int, new: int, finish: str, started: float, first: list[float], ended: float) -> str:
    text = f"read {counted(prompt, 'token')}, generated {new}"
    if len(first) > 1 and ended > first[0]:
        text += f"; first text after {first[0] - started:.2f} s, then {(new - 1) / (ended - first[0]):.1f} tokens/s"
    return f"{text}; ended by {finish}"
