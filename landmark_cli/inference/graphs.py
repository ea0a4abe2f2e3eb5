"""A model's forward pass over a chunk, recorded once as a CUDA graph and then replayed.

A decoding step is hundreds of small kernels; launching them one by one takes several times as long as running them.
Nothing in the fused kernels' shapes depends on what has been read, so one graph serves for all steps of a kind.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from landmark_cli.attention.cache import BlockCache, Chunk
from landmark_cli.console import warn

# Chunks of more stream tokens keep a GPU busy by themselves.
MOST_TOKENS = 8192
MOST_GRAPHS = 12


@dataclass(frozen=True)
class Recorded:
    """A graph and the memory it reads and writes: token ids (B, W), counters (3, B), positions kept (n,), logits."""

    graph: torch.cuda.CUDAGraph
    ids: Tensor
    counters: Tensor
    kept: Tensor
    logits: Tensor
    traced: dict


class ChunkForward:
    """Reads chunk after chunk into a block cache: the first of a kind as usual, later ones as CUDA graphs.

    A kind is what decides which kernels run on which shapes: the chunk's width, how many positions give logits, whether
    there are blocks to retrieve and, for long chunks, how many, roughly.
    """

    def __init__(self, model: PreTrainedModel, cache: BlockCache):
        self.model, self.cache = model, cache
        self.recording = cache.device.type == "cuda" and len(set(getattr(model, "hf_device_map", {}).values())) < 2
        self._recorded: OrderedDict[tuple, Recorded] = OrderedDict()
        self._seen: set[tuple] = set()
        self._pool = None

    @torch.no_grad()
    def __call__(self, ids: Tensor, lengths: Sequence[int], kept: Tensor) -> Tensor:
        """Read a chunk and count it as read.

        ids: (B, W) stream tokens on the host, padded on the left; lengths: how many of each row are real. kept: (n,)
        positions of W to give logits for. Returns (B, n, vocabulary), which the next chunk may overwrite.
        """
        if not self.recording or ids.numel() > MOST_TOKENS:
            return self._read(ids, lengths, kept)
        self.cache.reserve(lengths)
        kind = self._kind(ids, kept)
        if kind not in self._recorded:
            if kind[:-1] not in self._seen:
                self._seen.add(kind[:-1])
                return self._read(ids, lengths, kept)
            if not self._record(ids, lengths, kept):
                return self._read(ids, lengths, kept)
            kind = self._kind(ids, kept)
        recorded = self._recorded[kind]
        self._recorded.move_to_end(kind)
        chunk = self._chunk(recorded.counters, ids, lengths)
        for to, source in (
            (recorded.ids, ids),
            (recorded.kept, kept),
            (recorded.counters, self.cache.counters(lengths, ids.shape[1])),
        ):
            to.copy_(source.pin_memory(), non_blocking=True)
        recorded.graph.replay()
        if self.cache.trace is not None:
            self.cache.trace.layers = recorded.traced
        self.cache.end_chunk(chunk)
        return recorded.logits

    def _read(self, ids: Tensor, lengths: Sequence[int], kept: Tensor) -> Tensor:
        chunk = self.cache.begin_chunk(lengths, ids.shape[1])
        logits = self._forward(to_device(ids, self.cache.device), chunk, to_device(kept, self.cache.device))
        self.cache.end_chunk(chunk)
        # What the eager definition does cannot be recorded: its shapes depend on what has been read.
        self.recording &= "eager" not in self.cache.implementations
        return logits

    def _forward(self, ids: Tensor, chunk: Chunk, kept: Tensor) -> Tensor:
        return self.model(
            input_ids=ids,
            position_ids=chunk.position_ids,
            landmark_chunk=chunk,
            logits_to_keep=kept,
            use_cache=False,
        ).logits

    def _kind(self, ids: Tensor, kept: Tensor) -> tuple:
        most = min(max(self.cache.host_blocks), self.cache.settings.retrievable)
        blocks = most.bit_length() if ids.shape[1] > 2 else most > 0
        return ids.shape[1], len(kept), blocks, self.cache.trace is not None, self.cache.generation

    def _chunk(self, counters: Tensor, ids: Tensor, lengths: Sequence[int]) -> Chunk:
        cache = self.cache
        return Chunk(cache, ids.shape[1], list(lengths), list(cache.host_blocks), list(cache.host_partial), counters)

    def _record(self, ids: Tensor, lengths: Sequence[int], kept: Tensor) -> bool:
        """Record a graph for chunks like this one; False, once and for all, where the model cannot be recorded."""
        device = self.cache.device
        # What is run while recording must read and store nothing: all padding.
        counters = torch.zeros(3, len(ids), dtype=torch.int32, device=device)
        counters[0] = ids.shape[1]
        static = Recorded(torch.cuda.CUDAGraph(), torch.zeros_like(ids, device=device), counters,
                          torch.zeros_like(kept, device=device), counters, {})  # fmt: skip
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        # Once without recording: what is compiled, grown or chosen on first use must not be recorded.
        with torch.cuda.stream(stream):
            self._forward(static.ids, self._chunk(counters, ids, lengths), static.kept)
        torch.cuda.synchronize(device)
        kind = self._kind(ids, kept)
        for other in [k for k in self._recorded if k[-1] != kind[-1]] + list(self._recorded)[: 1 - MOST_GRAPHS]:
            self._recorded.pop(other, None)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        try:
            with torch.cuda.stream(stream):
                static.graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    logits = self._forward(static.ids, self._chunk(counters, ids, lengths), static.kept)
                finally:
                    static.graph.capture_end()
        except RuntimeError as error:
            warn(f"decoding without CUDA graphs, slower: {str(error).splitlines()[0]}")
            self.recording = False
            return False
        traced = {} if self.cache.trace is None else dict(self.cache.trace.layers)
        self._recorded[kind] = Recorded(static.graph, static.ids, counters, static.kept, logits, traced)
        return True


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A host tensor on a device, without making the host wait for it."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)
