"""Has a landmark model read a novel in which facts are hidden, and asks for them: with memory, and without.

    python recipes/demo/ask.py --model landmark_cli/assets/demo --pages runs/demo-asked
    python recipes/demo/ask.py --model runs/demo-shipped --facts 50 --brief --json measured.json

The novel is Persuasion, which no training of the shipped model saw; --text names another. It is read once; each
question then goes on from there by itself. Without memory the model gets the end of the novel, as much as a window of
its training holds, and the question.
"""

import argparse
import copy
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from hiding import Hidden, held_out_novel, hide_facts
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from landmark_cli.commands.models import MachineOptions, open_model
from landmark_cli.console import counted, show, write_json, write_out
from landmark_cli.errors import LandmarkError
from landmark_cli.inference.block_reader import BlockReader
from landmark_cli.inference.generation import Generation, encode_prompt, generate, read_prompts
from landmark_cli.inference.readers import BaseReader, trained_text_length
from landmark_cli.inference.settings import SamplingSettings
from landmark_cli.inference.trace import trace_of, write_trace

# Room for the longest value; an answer ends with its line.
ANSWER = SamplingSettings(max_new_tokens=32, temperature=0.0, stop=["\n"])
# With the words in front of it, a line of a terminal.
COLUMNS = 60
# From nothing to the most that a part of the text got; told apart without colours too.
LEVELS = " .:-=+*#%@"
COLOURS = ("grey50", "yellow4", "dark_orange", "red")


@dataclass(frozen=True)
class Answered:
    """A fact with what the model answered. block: that in which its sentence begins, of the text's. shares: (blocks,),
    what each block got of the last layer's attention while the answer was written, mean of its heads."""

    hidden: Hidden
    block: int
    with_memory: Generation
    without: Generation
    shares: np.ndarray


def main() -> None:
    options = parsed()
    model, tokenizer = open_model(options.model, MachineOptions(device=options.device))
    tell(about(model, options.model))
    text = held_out_novel() if options.text is None else options.text.read_text(encoding="utf-8")
    text, facts = hide_facts(text, options.facts, options.seed, begun=not options.plain)
    ids = encode_prompt(tokenizer, text)
    freq = model.config.landmark_freq
    reader = BlockReader(model, chunk=options.chunk, top_k_blocks=options.top_k_blocks)
    named = "Persuasion (not trained on)" if options.text is None else str(options.text)
    tell(f"{named}, with {counted(len(facts), 'fact')} hidden: {len(ids):,} tokens, {len(ids) // freq:,} blocks")
    if not options.brief:
        for fact in facts:
            tell(f"  {fact.place / len(text):4.0%}  {fact.sentence}")
    began = time.monotonic()
    reader.expect(len(ids) + ANSWER.max_new_tokens)
    read_prompts(reader, [torch.tensor(ids)], show_progress=True)
    seconds = time.monotonic() - began
    tell(f"read in {seconds:.1f} s: {len(ids) / seconds:,.0f} tokens/s on {machine(model)}")
    answers = []
    for number, fact in enumerate(facts, 1):
        block = len(encode_prompt(tokenizer, text[: fact.place])) // freq
        answered, asked = answer(model, tokenizer, reader, ids, fact, block)
        answers.append(answered)
        if not options.brief:
            show_answer(answered)
        if options.pages is not None:
            page = options.pages / f"question-{number}.html"
            write_trace(page, trace_of(options.model, asked, tokenizer, answered.with_memory))
            tell(f"  every token's reads: {page}")
    counts = found(answers)
    tell(f"\nanswered right, of {len(facts)}: with memory {counts['with memory']}, without {counts['without memory']}")
    if options.json is not None:
        about_run = {"model": options.model, "tokens": len(ids), "facts": len(facts), "seed": options.seed}
        ways = {"answer begun": not options.plain, "chunk": reader.chunk, "blocks": reader.cache.settings.top_k}
        told = [asdict(a.hidden) | {"answer": a.with_memory.text, "without": a.without.text} for a in answers]
        write_json(about_run | ways | {"seconds": round(seconds, 1)} | counts | {"answers": told}, options.json)


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options. arguments: of the command line, by default this process's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a model directory with landmarks")
    parser.add_argument("--text", type=Path, help="a UTF-8 file to hide facts in (the sample's Persuasion)")
    parser.add_argument("--facts", type=int, default=3, help="how many are hidden and asked for (3)")
    parser.add_argument("--seed", type=int, default=0, help="other facts at other places for another number (0)")
    parser.add_argument("--plain", action="store_true", help="ask without giving the beginning of the answer")
    parser.add_argument("--chunk", type=int, help="text tokens read at a time (as a window of its training has room)")
    parser.add_argument(
        "--top-k-blocks", type=int, help="blocks retrieved for each token (what the model's config says)"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ... (cpu)")
    parser.add_argument("--brief", action="store_true", help="print how many were answered right, not the answers")
    parser.add_argument("--pages", type=Path, help="folder for a page of what was read, for each question")
    parser.add_argument("--json", type=Path, help="write the figures and all answers to this file")
    options = parser.parse_args(arguments)
    if options.facts < 1:
        parser.error("--facts: there must be one at least")
    return options


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    reader: BlockReader,
    ids: list[int],
    fact: Hidden,
    block: int,
) -> tuple[Answered, BlockReader]:
    """Ask for a fact. reader: has read the text `ids`, and stays as it is. Returns the answer, and the reader that has
    read it too."""
    question = encode_prompt(tokenizer, fact.question, goes_on=True)
    # Another question must not read this one's answer.
    asked = copy.deepcopy(reader)
    generation = ask(model, tokenizer, question, asked, trace=True)
    # All that a window of its training holds, read by a reader that has read nothing before.
    room = trained_text_length(model) - len(question) - ANSWER.max_new_tokens
    nothing_read = BlockReader(model, chunk=reader.chunk, top_k_blocks=reader.cache.settings.top_k)
    without = ask(model, tokenizer, [*ids[-room:], *question], nothing_read)
    shares = block_shares(generation, -(-len(ids) // model.config.landmark_freq))
    return Answered(fact, block, generation, without, shares), asked


def ask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[int],
    reader: BaseReader,
    *,
    trace: bool = False,
) -> Generation:
    """The likeliest answer to a prompt, by a reader that may have read a text before it."""
    (generation,) = generate(model, tokenizer, [prompt], ANSWER, reader=reader, trace=trace)
    return generation


def block_shares(generation: Generation, blocks: int) -> np.ndarray:
    """What each of so many blocks of a text got of the attention that wrote an answer, (blocks,) float64: the mean of
    its shares over the answer's tokens, and over the heads of the last layer, whose reads go into the answer as they
    are."""
    reads = [entry for of_token in generation.reads for entry in of_token]
    last = max((entry["layer"] for entry in reads), default=0)
    reads = [entry for entry in reads if entry["layer"] == last]
    shares = np.zeros(blocks)
    readers = len({entry["head"] for entry in reads}) * len(generation.reads)
    for entry in reads:
        # What is read of the question itself is no block of the text.
        if entry["block"] < blocks:
            shares[entry["block"]] += entry["share"] / readers
    return shares


def found(answers: list[Answered]) -> dict[str, int]:
    """How many answers are right, by the way of reading."""
    return {
        "with memory": sum(a.hidden.answered_by(a.with_memory.text) for a in answers),
        "without memory": sum(a.hidden.answered_by(a.without.text) for a in answers),
    }


def show_answer(answered: Answered) -> None:
    """Print a question with its answers, and where in the text the first of them was read."""
    hidden, shares = answered.hidden, answered.shares
    tell(hidden.question.replace("\n\n", "\n"))
    for way, generation in (("with memory", answered.with_memory), ("without memory", answered.without)):
        right = "right" if hidden.answered_by(generation.text) else f"wrong: it is {hidden.value}"
        tell(f"  {way:14}  {generation.text.strip()}  ({right})")
    show(heat_map(shares, COLUMNS))
    place = column(answered.block, len(shares), COLUMNS)
    tell(f"  {'it stands here':14}  {' ' * place}^")
    # The sentence may go on into the next block.
    read = shares[answered.block : answered.block + 2].sum() / max(shares.sum(), 1e-9)
    tell(f"  {'':14}  {read:.0%} of what its last layer read of the text was read there")


def heat_map(shares: np.ndarray, columns: int) -> Text:
    """A text from its beginning to its end as one line of characters, by what its parts got of an answer's
    attention."""
    places = np.array([column(block, len(shares), columns) for block in range(len(shares))])
    parts = np.bincount(places, shares, minlength=columns)
    line = Text(f"  {'read, by place':14}  ")
    for part in parts / max(parts.max(), 1e-9):
        line.append(LEVELS[round(part * (len(LEVELS) - 1))], COLOURS[round(part * (len(COLOURS) - 1))])
    return line


def column(block: int, blocks: int, columns: int) -> int:
    """In which of the columns a block stands."""
    return block * columns // blocks


def about(model: PreTrainedModel, name: str) -> str:
    """A model in words. Raises LandmarkError for one that has no landmarks."""
    config = model.config
    if not getattr(config, "landmark_freq", None):
        raise LandmarkError(f"{name} has no landmarks, so it has no memory to be asked")
    millions = sum(weight.numel() for weight in model.parameters()) / 1e6
    return f"{name}: {millions:.1f} million parameters, trained in windows of {config.trained_length:,} tokens"


def machine(model: PreTrainedModel) -> str:
    """What a model runs on, in words."""
    if model.device.type != "cpu":
        return str(model.device)
    return f"{counted(torch.get_num_threads(), 'thread')} of {os.cpu_count()} CPUs"


def tell(line: str) -> None:
    """Print a line of results."""
    write_out(f"{line}\n")


if __name__ == "__main__":
    try:
        main()
    except LandmarkError as error:
        raise SystemExit(f"error: {error}") from None
