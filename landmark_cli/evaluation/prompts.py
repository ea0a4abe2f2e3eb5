"""How many prompts a benchmark reads at a time, and the readers that it reads them with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TypeVar

from accelerate.utils import release_memory
from transformers import PreTrainedModel

from landmark_cli.console import counted, info
from landmark_cli.inference.readers import BaseReader, free_memory, layer_token_bytes, open_reader
from landmark_cli.inference.settings import ReadingSettings
from landmark_cli.memory import is_out_of_memory
from landmark_cli.models.layers import landmark_layers

Prompt = TypeVar("Prompt")
Answer = TypeVar("Answer")

# Prompts read at a time go through the model in pieces of at most about this many tokens together, and all their keys
# and values take at most this share of the free memory where these lie; on a CPU, they have at most so many tokens.
FORWARD_TOKENS = 131072
MEMORY_SHARE = 0.25
HOST_TOKENS = 8192


class PromptReaders:
    """Readers for batches of prompts, one for each number of prompts, opened once for all prompts of a length: what a
    reader has prepared (memory, CUDA graphs) serves the next batch too.

    reading: how to read. full_attention: by ordinary attention over the whole prompt and its answer. batch_size: how
    many prompts are asked at a time; None for what fits.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        reading: ReadingSettings,
        full_attention: bool = False,
        batch_size: int | None = None,
    ):
        self._model, self._reading, self._full, self._batch_size = model, reading, full_attention, batch_size
        self._length: int | None = None
        self._readers: dict[int, BaseReader] = {}
        self._at_a_time: int | None = None

    def ask(
        self, prompts: Iterable[Prompt], length: int, ask: Callable[[list[Prompt], BaseReader], list[Answer]]
    ) -> Iterator[tuple[list[Prompt], list[Answer]]]:
        """Have prompts of one length answered, `at_a_time` of them at a time and in their order; yields each batch and
        what `ask` has answered to it.

        length: tokens of a prompt and its answer. ask: given a batch and a reader of as many rows that has read
        nothing; it is given prompts again, fewer at a time, where memory ran out over several of them and nobody has
        said how many it has to be. What it does beside answering, it does twice then.

        Raises what `ask` raises: memory's error for one prompt too, and with a `batch_size` for any number.
        """
        waiting, batch = iter(prompts), []
        while batch := batch + list(islice(waiting, max(0, self.at_a_time(length) - len(batch)))):
            some = batch[: self.at_a_time(length)]
            try:
                answers = ask(some, self.of(len(some), length))
            except Exception as error:
                if not self._can_take_less(error, len(some)):
                    raise
            else:
                yield some, answers
                batch = batch[len(some) :]
                continue
            # Behind the handler, whose error holds on to the reader and to all that it was reading.
            self._take_less(len(some))

    def at_a_time(self, length: int) -> int:
        """How many prompts of so many tokens, their answers included, are asked at a time: as was said, or as many as
        fit when the first of them are asked, and from then on no more than there was memory for."""
        self._of_length(length)
        if self._at_a_time is None:
            self._at_a_time = self._batch_size or self.fitting(length)
        return self._at_a_time

    def of(self, prompts: int, length: int) -> BaseReader:
        """A reader of so many prompts that has read nothing. length: tokens of a prompt and its answer."""
        self._of_length(length)
        if prompts in self._readers:
            self._readers[prompts].reset()
        else:
            self._readers[prompts] = self._open(prompts, length)
        return self._readers[prompts]

    def fitting(self, length: int) -> int:
        """How many prompts of so many tokens, their answers included, are read at a time."""
        device = self._model.device
        if device.type != "cuda":
            return max(1, HOST_TOKENS // length)
        free = free_memory(device, offloaded=self._reading.offload == "cpu" and not self._full)
        config = self._model.config
        layers = config.num_hidden_layers if self._full else len(landmark_layers(config))
        token_bytes = layers * layer_token_bytes(self._model)
        return at_a_time(length, self._open(1, length).chunk, token_bytes, int(free * MEMORY_SHARE))

    def _of_length(self, length: int) -> None:
        if length != self._length:
            # Memory for prompts of another length is given back before more is taken.
            self._readers.clear()
            self._length, self._at_a_time = length, None

    def _can_take_less(self, error: Exception, prompts: int) -> bool:
        """Whether an error over so many prompts may not come up where less memory is taken."""
        return self._batch_size is None and is_out_of_memory(error) and (prompts > 1 or self._has_larger(prompts))

    def _take_less(self, prompts: int) -> None:
        """Give all memory back after it ran out over so many prompts, of which the next try takes less."""
        # The last prompts of a task are few, and the reader of more of them, which is idle then, may be what was too
        # much.
        only_idle = self._has_larger(prompts)
        self._readers.clear()
        # What another process has taken meanwhile may leave no room for what this one has reserved in other sizes.
        release_memory()
        if not only_idle:
            self._at_a_time = prompts // 2
            info(f"less memory is free than was: {counted(self._at_a_time, 'prompt')} at a time from here on")

    def _has_larger(self, prompts: int) -> bool:
        return any(number > prompts for number in self._readers)

    def _open(self, prompts: int, length: int) -> BaseReader:
        return open_reader(self._model, self._reading, prompts, window=length if self._full else None)


def at_a_time(length: int, chunk: int, token_bytes: int, memory: int) -> int:
    """How many prompts of `length` tokens, read in chunks of `chunk`, keep a GPU busy and fit into `memory` bytes."""
    return max(1, min(FORWARD_TOKENS // min(length, chunk), memory // (length * token_bytes)))
