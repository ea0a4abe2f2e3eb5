"""How many prompts a benchmark reads at a time, and the readers that it reads them with."""

from __future__ import annotations

from transformers import PreTrainedModel

from landmark_cli.inference.readers import BaseReader, free_memory, layer_token_bytes, open_reader
from landmark_cli.inference.settings import ReadingSettings
from landmark_cli.models.layers import landmark_layers

# Prompts read at a time go through the model in pieces of at most about this many tokens together, and all their keys
# and values take at most this share of the free memory where these lie; on a CPU, they have at most so many tokens.
FORWARD_TOKENS = 131072
MEMORY_SHARE = 0.25
HOST_TOKENS = 8192


class PromptReaders:
    """Readers for batches of prompts, one for each number of prompts, opened once for all prompts of a length: what a
    reader has prepared (memory, CUDA graphs) serves the next batch too.

    reading: how to read. full_attention: by ordinary attention over the whole prompt and its answer.
    """

    def __init__(self, model: PreTrainedModel, reading: ReadingSettings, full_attention: bool = False):
        self._model, self._reading, self._full = model, reading, full_attention
        self._length: int | None = None
        self._readers: dict[int, BaseReader] = {}

    def of(self, prompts: int, length: int) -> BaseReader:
        """A reader of so many prompts that has read nothing. length: tokens of a prompt and its answer."""
        if length != self._length:
            # Memory for prompts of another length is given back before more is taken.
            self._readers.clear()
            self._length = length
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

    def _open(self, prompts: int, length: int) -> BaseReader:
        return open_reader(self._model, self._reading, prompts, window=length if self._full else None)


def at_a_time(length: int, chunk: int, token_bytes: int, memory: int) -> int:
    """How many prompts of `length` tokens, read in chunks of `chunk`, keep a GPU busy and fit into `memory` bytes."""
    return max(1, min(FORWARD_TOKENS // min(length, chunk), memory // (length * token_bytes)))
