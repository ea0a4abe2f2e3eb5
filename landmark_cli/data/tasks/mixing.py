"""Tasks that are mixed into a run, hidden in the text that it trains on: those that are trained on in what is trained
on, those for validation in what is held out.

The haystack is read out of token files, so it is the very text of their splits, wherever that came from.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from landmark_cli.console import info
from landmark_cli.data.prepare import are_whole, finished_files, prepare
from landmark_cli.data.tasks.corpus import LEAST, SENTENCE_END, hidden_in
from landmark_cli.data.token_file import TokenFile
from landmark_cli.data.token_file_metadata import read_metadata

if TYPE_CHECKING:
    from landmark_cli.data.merge import Process
    from landmark_cli.data.text_tokenizer import TextTokenizer

LEAST_CHARACTERS = 1024
"""Text of the shortest document, whatever the tokenizer: room for a fact, its question and some text."""
SHORTEST_SHARE = 0.75
"""Of a window, what the shortest document takes: a window holds one document, and little is filled up."""
SPARE_SHARE = 1 / 64
"""Of a window, what the longest document leaves: lengths are met only about, and no document is to be cut."""
ABSENT = 0.1
"""Share of the look-ups that ask for what is not there."""
VALIDATION_DOCUMENTS = 32
MOST_TOKENS = 1 << 27
"""Of all documents together; a run that has windows for more reads them several times."""
MEASURED_TOKENS = 4096
SENTENCE_CHARACTERS = 600
PROBE = "48213"


class TokenHaystack:
    """Slices of the text of token files (see `corpus.Slices`); each file is taken round and round."""

    def __init__(self, files: Sequence[TokenFile], tokenizer: TextTokenizer) -> None:
        self._files, self._tokenizer = files, tokenizer
        self._ends = np.cumsum([len(file.tokens) for file in files])

    @property
    def tokens(self) -> int:
        """How many tokens it has."""
        return int(self._ends[-1])

    @cached_property
    def token_characters(self) -> float:
        """How many characters a token of it takes, about."""
        return len(self._tokenizer.decode(self._ids(self._files[0], 0, MEASURED_TOKENS))) / MEASURED_TOKENS

    @cached_property
    def _between(self) -> np.ndarray:
        """What stands between documents."""
        return np.asarray(self._tokenizer.encode("\n\n"), dtype=np.int64)

    def slice(self, share: float, tokens: int) -> list[int]:
        """See `Slices`."""
        place = int(share * self.tokens)
        number = int(np.searchsorted(self._ends, place, side="right"))
        file = self._files[number]
        reach = math.ceil(SENTENCE_CHARACTERS / max(self.token_characters, 0.1))
        ids = self._ids(file, place - int(self._ends[number]) + len(file.tokens), tokens + reach)
        text = self._tokenizer.decode(ids[:reach])
        found = SENTENCE_END.search(text)
        begin = found.end() if found else text.find(" ") + 1
        # The file's tokens are the text's own: to find the sentence's first one is less work than to encode all anew.
        first = bisect_left(range(reach), begin, key=lambda count: len(self._tokenizer.decode(ids[:count])))
        return ids[first : first + tokens].tolist()

    def _ids(self, file: TokenFile, start: int, tokens: int) -> np.ndarray:
        """Ids of so many tokens of a file from one on, an empty line between documents, (about tokens,) int64."""
        taken = np.take(file.tokens, np.arange(start, start + tokens), mode="wrap").astype(np.int64)
        documents = np.split(taken, np.flatnonzero(taken == file.metadata.eot_id))
        parts = [documents[0]]
        for document in documents[1:]:
            parts += [self._between, document[1:]]
        return np.concatenate(parts)


def why_no_tasks(files: Sequence[TokenFile], tokenizer: TextTokenizer, text_length: int) -> str | None:
    """Why no tasks can be hidden in the text of these files, for windows of `text_length` text tokens; None if they
    can."""
    if PROBE not in tokenizer.decode(tokenizer.encode(f"The code is {PROBE}.")):
        return f"the tokenizer {tokenizer.name} does not give back the numbers that it reads"
    least = math.ceil(_shortest(TokenHaystack(files, tokenizer)) / (1 - SPARE_SHARE))
    if text_length < least:
        return f"they take windows of at least {least} text tokens, and these have {text_length}"
    return None


def prepare_tasks(
    train: Sequence[TokenFile],
    validation: Sequence[TokenFile],
    tokenizer: TextTokenizer,
    output: Path,
    *,
    text_length: int,
    windows: int,
    seed: int,
    kinds: Sequence[str] | None = None,
    resume: bool,
    trained: bool = False,
    process: Process,
) -> None:
    """Write token files of tasks into a directory: documents that fill windows of `text_length` text tokens, one each.

    train, validation: what they are hidden in, by split; without the latter there are none for validation. windows: how
    many the run will take. seed: document i is a function of it, i, the kinds and the haystack. kinds: see `draw_task`.
    resume: make as many documents as the directory has, if it has some. trained: the run has been trained on what the
    directory holds, which stays as it is if it is whole, even if this version made other documents of the same.
    Processes other than the first may return before the files are there.

    Raises LandmarkError and Stopped as `prepare` does.
    """
    if trained and are_whole(output):
        info(f"{output} holds the tasks that the run has been trained on")
        return
    stacks = {
        split: TokenHaystack(files, tokenizer)
        for split, files in (("train", train), ("validation", validation))
        if files
    }
    held_out = VALIDATION_DOCUMENTS if validation else 0
    longest = int(text_length * (1 - SPARE_SHARE))
    documents = held_out + max(VALIDATION_DOCUMENTS, min(windows, MOST_TOKENS // longest))
    if resume and (found := _documents_in(output)):
        documents = found
    corpus = hidden_in(
        stacks,
        tokenizer,
        ", ".join(dict.fromkeys(file.metadata.source for file in train)),
        identity=[file.metadata.sha256 for file in (*train, *validation)],
        documents=documents,
        shortest=max(_shortest(stacks["train"]), int(SHORTEST_SHARE * longest)),
        longest=longest,
        absent=ABSENT,
        validation_share=held_out / documents,
        seed=seed,
        kinds=kinds,
    )
    prepare(corpus, tokenizer, output, process=process)


def _shortest(haystack: TokenHaystack) -> int:
    return max(LEAST, math.ceil(LEAST_CHARACTERS / max(haystack.token_characters, 0.1)))


def _documents_in(directory: Path) -> int:
    """How many documents the token files of a directory have together; 0 where it is not finished."""
    return sum(read_metadata(file).documents for file in finished_files(directory))
