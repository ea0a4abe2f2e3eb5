"""A model's forward pass over a chunk, recorded once as a CUDA graph and then replayed.

A decoding step is hundreds of small kernels; launching them one by one takes several times as long as running them.
Nothing in the fused kernels' shapes depends on what has been read, so one graph serves for all steps of a kind.
"""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from landmark_cli.attention.backends import BACKENDS
from landmark_cli.attention.cache import BlockCache, Chunk, Passage
from landmark_cli.console import warn
from landmark_cli.inference.graph_inputs import GraphInputs
from landmark_cli.models.device import to_device
from landmark_cli.models.fused_step import Fused, join_weights
from landmark_cli.models.quantization import weight_count

# Tokens of a chunk times weights of a layer (see `_layer_weights`), from which on a layer keeps a GPU busy for longer
# than the host takes to launch its kernels without a graph.
MOST_WORK = 6.4e10
MOST_GRAPHS = 12
# Where some of the rows have no text in a chunk, as many chunks like it are read before a graph is recorded for them.
# As rows of unlike lengths end one after the other, there are few chunks of as many rows, and recording takes as long
# as reading dozens of them; where it is one row's end that is long, or where the next texts end alike, there are more.
SEEN_OF_SOME = 8
# Stream tokens of a row in a step, at most: a token, and the landmark behind it.
STEP_WIDTH = 2
# Chunks after which blocks that have not been fetched yet are fetched all at once: until then a short answer is given
# without them, from then on a long one by graphs. Of a text that is asked a second time they are fetched at once, too:
# it will be asked a third time.
MOST_FETCHING = 32


class CudaGraph:
    """A function without arguments, recorded: replay() runs its kernels again, on the same memory."""

    def __init__(self, function: Callable[[], Tensor], device: torch.device, pool: tuple | None):
        """pool: memory of another graph, to be shared: no two graphs of a pool are replayed at once."""
        self.graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            # A first time without recording: what is compiled, grown or chosen at the first use must not be recorded.
            function()
            torch.cuda.synchronize(device)
            self.graph.capture_begin(*([] if pool is None else [pool]), capture_error_mode="thread_local")
            try:
                self.output = function()
            except BaseException:
                # Ending a recording that is broken fails too, and would hide why it broke.
                with suppress(RuntimeError):
                    self.graph.capture_end()
                # The device's random numbers still believe that they are recorded, and would refuse to be drawn.
                index = torch.cuda.current_device() if device.index is None else device.index
                random = torch.cuda.default_generators[index]
                random.graphsafe_set_state(random.clone_state())
                raise
            self.graph.capture_end()
        self.pool = self.graph.pool()

    def replay(self) -> None:
        self.graph.replay()


@dataclass(frozen=True)
class Recorded:
    """A graph, what it reads, and its trace."""

    graph: CudaGraph
    inputs: GraphInputs
    traced: dict


class ChunkForward:
    """Reads chunk after chunk into a block cache: the first chunks of a kind as usual, later ones as CUDA graphs.

    A kind is what decides which kernels run on which shapes: the chunk's width, its rows, how many positions give
    logits, whether there are blocks to retrieve and, for long chunks, how many, roughly.

    steps_alone: set it where chunks of text hardly ever come twice with as many rows of the same width, as those of a
    server's prompts: recording takes as long as reading dozens of them. fuses_steps: whether steps and chunks, with
    graphs or without, run in fewer kernels where the model's layers are known (see models/fused_step.py).
    """

    def __init__(self, model: PreTrainedModel, cache: BlockCache):
        self.model, self.cache, self.record = model, cache, CudaGraph
        self.recording = cache.device.type == "cuda" and len(set(getattr(model, "hf_device_map", {}).values())) < 2
        self._weights = _layer_weights(model)
        self.steps_alone, self.fuses_steps, self._fused = False, True, Fused(model)
        if self.recording:
            # Before the first graph, which reads the weights where they are then.
            join_weights(model)
        self._recorded: OrderedDict[tuple, Recorded] = OrderedDict()
        self._seen: Counter[tuple] = Counter()
        self._fetching = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> ChunkForward:
        """The same model with a copy of the cache; graphs, whose addresses are those of this cache, are not copied."""
        return ChunkForward(self.model, copy.deepcopy(self.cache, memo))

    def __call__(self, ids: Tensor, lengths: Sequence[int], kept: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        """Read a chunk and count it as read.

        ids: (B, W) stream tokens on the host, padded on the left, of these rows of the cache, in rising order, by
        default of all. lengths: how many each of the cache's rows has. kept: (n,) positions of W to give logits for.
        Returns (B, n, vocabulary), which the next chunk may overwrite.
        """
        rows = range(self.cache.batch) if rows is None else rows
        if not self.records(*ids.shape):
            return self._read(ids, lengths, kept, rows)
        if self.cache.fetching:
            # The host fetches what a layer has chosen, which cannot be recorded.
            self._fetching += 1
            if self._fetching <= MOST_FETCHING and not self.cache.asked_again:
                return self._read(ids, lengths, kept, rows)
            self.cache.fetch_all()
        self._fetching = 0
        self.cache.reserve(lengths)
        kind = self._kind(ids, kept, rows)
        if kind not in self._recorded:
            self._seen[kind[:-1]] += 1
            if self._seen[kind[:-1]] <= (1 if len(rows) == self.cache.batch else SEEN_OF_SOME):
                return self._read(ids, lengths, kept, rows)
            if not self._record(ids, lengths, kept, rows):
                return self._read(ids, lengths, kept, rows)
            kind = self._kind(ids, kept, rows)
        recorded = self._recorded[kind]
        self._recorded.move_to_end(kind)
        self.cache.begin(lengths)
        recorded.inputs.write(ids, kept, self.cache.counts(lengths, ids.shape[1], rows))
        recorded.graph.replay()
        if self.cache.trace is not None:
            # A copy, since the trace is written to when a chunk is read without a graph next.
            self.cache.trace.layers = dict(recorded.traced)
        self.cache.advance(lengths)
        return recorded.graph.output

    def records(self, rows: int, width: int) -> bool:
        """Whether graphs are recorded for chunks of so many rows of so many tokens, padding included."""
        if not self.recording or (self.steps_alone and width > STEP_WIDTH):
            return False
        return rows * width * self._weights <= MOST_WORK

    def passage(
        self,
        ids: Tensor,
        parts: Sequence[tuple[Sequence[int], int]],
        kept: Tensor,
        rows: Sequence[int] | None = None,
    ) -> Tensor:
        """Read chunks that follow one another by one call of the model, layer by layer, and count them as read.

        ids, rows: as of a chunk, the chunks side by side, each padded on the left. parts: of each chunk the lengths and
        its width. kept: (n,) positions of W to give logits for. Returns (B, n, vocabulary).
        """
        with self.cache.passage(parts, rows) as chunks:
            return self._forward(to_device(ids, self.cache.device), chunks, to_device(kept, self.cache.device))

    def record_steps(self, widths: Sequence[tuple[int, Sequence[int]]]) -> None:
        """Record the graphs of steps before the first of them: of each its stream tokens a row, and which of them give
        logits. Nothing is read. For rows that have blocks to retrieve; where the model cannot be recorded, or blocks
        have still to be fetched, nothing is done."""
        for width, columns in widths:
            ids, kept = torch.zeros(self.cache.batch, width, dtype=torch.long), torch.tensor(columns)
            if not self.records(*ids.shape) or self.cache.fetching:
                return
            lengths, rows = [width] * self.cache.batch, range(self.cache.batch)
            self.cache.reserve(lengths)
            if self._kind(ids, kept, rows) not in self._recorded:
                self._record(ids, lengths, kept, rows)

    def _read(self, ids: Tensor, lengths: Sequence[int], kept: Tensor, rows: Sequence[int]) -> Tensor:
        chunk = self.cache.begin_chunk(lengths, ids.shape[1], rows)
        logits = self._forward(to_device(ids, self.cache.device), chunk, to_device(kept, self.cache.device))
        self.cache.end_chunk(chunk)
        self.recording &= all(BACKENDS[name].recorded for name in self.cache.backends)
        return logits

    @torch.no_grad()
    def _forward(self, ids: Tensor, chunk: Chunk | Passage, kept: Tensor) -> Tensor:
        # Without a graph too: what a step or a chunk gives must not depend on when a graph is recorded.
        fused = self._fused() if self.recording and self.fuses_steps else None
        if fused is not None:
            return fused(ids, kept, **self.cache.inputs(chunk))
        return self.model(input_ids=ids, **self.cache.inputs(chunk), logits_to_keep=kept, use_cache=False).logits

    def _kind(self, ids: Tensor, kept: Tensor, rows: Sequence[int]) -> tuple:
        most = min(max(self.cache.host_blocks[row] for row in rows), self.cache.settings.retrievable)
        blocks = most.bit_length() if ids.shape[1] > STEP_WIDTH else most > 0
        return ids.shape[1], len(kept), blocks, len(rows), self.cache.trace is not None, self.cache.generation

    def _record(self, ids: Tensor, lengths: Sequence[int], kept: Tensor, rows: Sequence[int]) -> bool:
        """Record a graph for chunks like this one; False, once and for all, where the model cannot be recorded."""
        inputs = GraphInputs(*ids.shape, len(kept), self.cache.device)
        # Chunks that are run while recording must read and store nothing: they are all padding.
        inputs.counters[0] = ids.shape[1]

        def forward() -> Tensor:
            # A new chunk each time: what a chunk works out from its counters has to be recorded.
            chunk = self.cache.chunk(lengths, ids.shape[1], rows, inputs.counters)
            return self._forward(inputs.ids, chunk, inputs.kept)

        pool = next((recorded.graph.pool for recorded in self._recorded.values()), None)
        try:
            graph = self.record(forward, self.cache.device, pool)
        except RuntimeError as error:
            warn(f"reading without CUDA graphs, slower: {str(error).splitlines()[0]}")
            self.recording = False
            return False
        # What goes: graphs of memory that has been replaced, and of others the one that was not used for the longest
        # time, steps last: they may have been recorded long before the first of them.
        generation = self.cache.generation
        oldest = sorted(self._recorded, key=lambda kind: kind[0] <= STEP_WIDTH)
        stale = [kind for kind in self._recorded if kind[-1] != generation] + oldest[: 1 - MOST_GRAPHS]
        for kind in stale:
            self._recorded.pop(kind, None)
            if kind[-1] == generation:
                # What comes so seldom has to come as often again before it is recorded anew.
                del self._seen[kind[:-1]]
        traced = {} if self.cache.trace is None else dict(self.cache.trace.layers)
        self._recorded[self._kind(ids, kept, rows)] = Recorded(graph, inputs, traced)
        return True


def _layer_weights(model: PreTrainedModel) -> int:
    """How many weights of a layer, on the average, each token of a chunk is multiplied by. Those of the embedding, of
    which it takes a row, and of the head, which gives logits of few tokens, count in no layer; of small models with
    many words they are most. Nor does the number of layers count: the host launches each of them."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    if ends[1] is None or getattr(ends[1], "weight", None) is ends[0].weight:
        ends.pop()
    return (weight_count(model) - sum(map(weight_count, ends))) // model.config.get_text_config().num_hidden_layers
