"""Traces of long prompts without a model to read them: a real text, and reads that are made up."""

from __future__ import annotations

import functools

import numpy as np

from landmark_cli.data.corpora import SAMPLE_HELD_OUT, novels
from landmark_cli.data.tokenizers import load_tokenizer
from landmark_cli.inference.text import texts_of_blocks
from landmark_cli.inference.trace import GenerationTrace

NEEDLE = " The number of the sealed letter is 48213; he had written it down twice. "
QUESTION = "\n\nWhat is the number of the sealed letter? The number is"
ANSWER = " 48213. It was written down twice, and he was sure of it; nothing else, he said, was worth the trouble.\n"


@functools.cache
def novel_blocks(prompt_tokens: int, landmark_freq: int) -> tuple[list[str], list[str], int]:
    """Blocks of a novel with something hidden in it and asked for at its end; the answer's tokens; and the block in
    which the number stands."""
    tokenizer = load_tokenizer("gpt2")
    question, answer = tokenizer.encode(QUESTION), tokenizer.encode(ANSWER)
    ids = tokenizer.encode(novels()[SAMPLE_HELD_OUT].decode())[: prompt_tokens - len(question)]
    at = int(0.62 * len(ids)) // landmark_freq * landmark_freq
    needle = tokenizer.encode(NEEDLE)
    ids[at : at + len(needle)] = needle
    decoder = tokenizer.as_transformers()
    blocks = texts_of_blocks(decoder, ids + question + answer[:-1], landmark_freq)
    return blocks, texts_of_blocks(decoder, answer, 1), at // landmark_freq


def made_trace(
    prompt_tokens: int = 100_000,
    new_tokens: int | None = None,
    *,
    layers: int = 12,
    heads: int = 12,
    top_k: int = 8,
    landmark_freq: int = 50,
    seed: int = 0,
) -> GenerationTrace:
    """A trace in which, while the number is written, some heads of the middle layers read where it stands, and all else
    is chance. new_tokens: of the answer, over and over; by default it is given once."""
    blocks, answer, hidden = novel_blocks(prompt_tokens, landmark_freq)
    answer = (answer * (1 + (new_tokens or 0) // len(answer)))[: new_tokens or len(answer)]
    number = {at for at in range(len(answer)) if answer[at].strip().isdigit()}
    random = np.random.default_rng(seed)
    complete = prompt_tokens // landmark_freq
    looks = random.random((layers, heads)) < 0.25
    reads = []
    for token in range(len(answer)):
        of_token = []
        for layer in range(layers):
            # What a layer's heads give to blocks at all, and how the blocks share it.
            given = random.uniform(0.02, 0.35, heads)
            parts = random.dirichlet(np.full(top_k, 0.4), heads) * given[:, None]
            chosen = np.minimum(random.zipf(1.4, (heads, 4 * top_k)), complete)
            for head in range(heads):
                found = list(dict.fromkeys((complete - chosen[head] % complete - 1).tolist()))
                found += random.integers(0, complete, 2 * top_k).tolist()
                read = dict(zip(found[:top_k], parts[head].tolist(), strict=False))
                if token in number and looks[layer, head] and layers // 3 <= layer < layers - layers // 4:
                    read = {block: share / 4 for block, share in read.items()} | {hidden: random.uniform(0.4, 0.9)}
                of_token += [
                    {"layer": layer, "head": head, "block": block, "share": share}
                    for block, share in sorted(read.items())
                ]
        reads.append(of_token)
    return GenerationTrace("a made-up model", 0, prompt_tokens, landmark_freq, blocks, answer, reads)
