"""Feed inputs of any length through a model chunk by chunk, landmarks and block cache included.

Callers deal in text: the reader puts a landmark after every `landmark_freq` text tokens of each row's stream and hands
back outputs at text positions only. Source: arXiv 2305.16300, section 3.2.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from landmark_cli.attention.cache import BlockCache, Offload, Positions, RetrievalSettings, Selection, Trace
from landmark_cli.attention.cache.pages import require_host_memory
from landmark_cli.console import counted
from landmark_cli.data.landmarks import insert_landmarks, largest_top_k, stream_length
from landmark_cli.errors import LandmarkError
from landmark_cli.inference import memory
from landmark_cli.inference.graphs import ChunkForward
from landmark_cli.inference.readers import BaseReader, ReadChunk, layer_token_bytes
from landmark_cli.inference.settings import ReadingSettings
from landmark_cli.models.device import to_device
from landmark_cli.models.layers import landmark_layers
from landmark_cli.models.rotary import inverse_frequencies


def default_chunk(trained_length: int, top_k_blocks: int, landmark_freq: int, name: str = "") -> int:
    """Text tokens a chunk: what the trained length (stream tokens) leaves beside top_k_blocks + 1 blocks.

    name: the model's, for the error where nothing is left.
    """
    block_size = landmark_freq + 1
    blocks = (trained_length - (top_k_blocks + 1) * block_size) // block_size
    if blocks < 1:
        raise LandmarkError(
            f"retrieving {counted(top_k_blocks, 'block')} leaves no room for a chunk: these, the incomplete block and "
            f"one of the chunk take {(top_k_blocks + 2) * block_size} positions, the model {name} was trained at "
            f"{trained_length}; retrieve at most {max(0, largest_top_k(trained_length, landmark_freq))} "
            "(--top-k-blocks), or give a chunk length"
        )
    return blocks * landmark_freq


class BlockReader(BaseReader):
    """Reads a batch of rows, each at its own pace, and remembers them in a block cache.

    model: any landmark model. top_k_blocks: blocks retrieved per query (config.top_k_blocks by default). chunk: text
    tokens a chunk (by default what the trained length leaves). cache_blocks, selection, positions,
    context_miss_cutoff: see RetrievalSettings. offload: "cpu" keeps blocks in host memory. batch: rows.

    Raises LandmarkError where the model has no landmarks or the settings do not fit it.

    >>> model, tokenizer = landmark_cli.load("runs/landmark", device="cpu")
    >>> reader = landmark_cli.Reader(model, top_k_blocks=2, batch=2)
    >>> rows = [tokenizer("It was the best of times. " * 20).input_ids, tokenizer("Call me").input_ids]
    >>> *_, last = reader.read(rows, last_only=True)
    >>> reader.step([262, 262]).shape
    torch.Size([2, 50304])
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        top_k_blocks: int | None = None,
        chunk: int | None = None,
        cache_blocks: int | None = None,
        selection: Selection = "per_token_and_head",
        positions: Positions = "bounded",
        context_miss_cutoff: float = 0.0,
        offload: Literal["none", "cpu"] = "none",
        batch: int = 1,
    ):
        config = model.config
        if not getattr(config, "landmark_freq", None):
            raise LandmarkError("this model has no landmarks, so it cannot read through a block cache")
        if config._attn_implementation != "landmark":
            raise LandmarkError(
                f'this model was opened with the attention "{config._attn_implementation}"; '
                'only with "landmark" can it read through a block cache'
            )
        self.model, self.batch = model, batch
        self.landmark_freq, self.landmark_token_id = config.landmark_freq, config.landmark_token_id
        top_k_blocks = config.top_k_blocks if top_k_blocks is None else top_k_blocks
        if chunk is not None and chunk < 1:
            raise LandmarkError(f"the chunk length is {chunk}; it must be at least 1 text token")
        self.chunk = chunk or default_chunk(
            config.trained_length, top_k_blocks, self.landmark_freq, config.name_or_path
        )
        self.cache = BlockCache(
            RetrievalSettings(
                self.landmark_freq + 1, top_k_blocks, selection, cache_blocks, positions, context_miss_cutoff
            ),
            inverse_frequencies(model),
            batch=batch,
            device=model.device,
            offload=Offload(len(landmark_layers(config))) if offload == "cpu" else None,
            one_landmark=True,
        )
        if model.device.type == "cuda":
            # Until then the memory that the graphs of an earlier reader held is of no use to others, in this process or
            # another.
            torch.cuda.empty_cache()
        self.forward = ChunkForward(model, self.cache)
        # What each row has read, as a memory keeps it.
        self.texts = [array("i") for _ in range(batch)]
        self.about: memory.About | None = None

    @classmethod
    def open(cls, model: PreTrainedModel, settings: ReadingSettings, batch: int) -> BlockReader:
        chosen = {field.name: getattr(settings, field.name) for field in fields(ReadingSettings)}
        return cls(model, **chosen, batch=batch)

    def expect(self, tokens: int) -> None:
        """Say that the longest row goes on for `tokens` text tokens more: memory for all of these is then taken at
        once.

        Raises LandmarkError where blocks are to be offloaded and host memory will not hold them all.
        """
        size = self.landmark_freq + 1
        read = max(n * size + r for n, r in zip(self.cache.host_blocks, self.cache.host_tail, strict=True))
        stream = read + stream_length(tokens, self.landmark_freq) + 1
        self.cache.expect(stream)
        if self.cache.offload is not None:
            require_host_memory(stream, len(landmark_layers(self.model.config)), self._layer_bytes(stream))

    def _layer_bytes(self, tokens: int) -> int:
        """What the blocks of a layer take, with `tokens` stream tokens in every row."""
        settings = self.cache.settings
        blocks = min(tokens // settings.block_size + 1, settings.retrievable)
        return self.cache.batch * blocks * settings.block_size * layer_token_bytes(self.model)

    @property
    def retrievals(self) -> int:
        return self.cache.retrievals

    @property
    def dropped_retrievals(self) -> int:
        return self.cache.dropped_retrievals

    def trace(self) -> Callable[[int], list[dict[str, int | float]]]:
        """As BaseReader.trace; blocks are numbered from the start of the row, `landmark_freq` text tokens each."""
        self.cache.trace = Trace()

        def reads(row: int) -> list[dict[str, int | float]]:
            # The last thing read is the row's newest text token, or the landmark after it.
            return self.cache.trace.read_by(row, -1 if self.cache.host_tail[row] else -2)

        return reads

    def reset(self) -> None:
        """Forget everything read."""
        self.cache.reset()
        self.texts = [array("i") for _ in range(self.batch)]

    def forget(self, row: int) -> None:
        """Forget what one row has read."""
        self.cache.forget(row)
        self.texts[row] = array("i")

    def save(self, path: str | Path, row: int = 0, what: str = "") -> None:
        """As BaseReader.save."""
        memory.take(self, row).save(path, what)

    def recall(self, *paths: str | Path, row: int = 0, what: str = "") -> None:
        """As BaseReader.recall."""
        memory.give(self, [memory.Memory.open(path, what) for path in paths], row)

    def take(self, rows: Sequence[int]) -> None:
        """As BaseReader.take."""
        if list(rows) == list(range(self.batch)):
            return
        self.cache.take(rows)
        # Copies: two rows that come of one go on apart.
        self.texts = [self.texts[row][:] for row in rows]
        self.batch = len(rows)

    def read(
        self, rows: Sequence[Tensor | Sequence[int]], *, last_only: bool = False, transient: bool = False
    ) -> Iterator[ReadChunk]:
        """As BaseReader.read. A row may be longer than another: every row is cut into chunks as it would be alone, so a
        batch gives what its rows give one by one. Raises LandmarkError where a row holds the landmark token."""
        rows = self._rows(rows)
        for row in rows:
            if (row == self.landmark_token_id).any():
                raise LandmarkError(
                    f"the text contains the landmark token ({self.landmark_token_id}); "
                    "give plain text, landmarks are put in while reading"
                )
        for begin in range(0, max(len(row) for row in rows), self.chunk):
            yield self._read_chunk([row[begin : begin + self.chunk] for row in rows], begin, last_only, transient)

    def step(self, tokens: Sequence[int | None]) -> Tensor:
        """As BaseReader.step."""
        landmark = self.landmark_token_id
        ends_block = [
            token is not None and tail == self.landmark_freq - 1
            for token, tail in zip(tokens, self.cache.host_tail, strict=True)
        ]
        width = 1 + any(ends_block)
        streams = [
            [] if token is None else [token, landmark] if ends else [token]
            for token, ends in zip(tokens, ends_block, strict=True)
        ]
        ids = torch.tensor([[landmark] * (width - len(stream)) + stream for stream in streams])
        columns = [width - 2 if ends else width - 1 for ends in ends_block]
        kept = sorted(set(columns))
        logits = self.forward(ids, [len(stream) for stream in streams], torch.tensor(kept))
        for text, token in zip(self.texts, tokens, strict=True):
            if token is not None:
                text.append(token)
        if len(kept) == 1:
            return logits[:, 0].clone()
        index = to_device(torch.tensor(columns), logits.device)[:, None, None]
        return logits.gather(1, index.expand(-1, 1, logits.shape[-1]))[:, 0]

    def _read_chunk(self, texts: list[Tensor], begin: int, last_only: bool, transient: bool) -> ReadChunk:
        streams = [self._stream(text, r) for text, r in zip(texts, self.cache.host_tail, strict=True)]
        stream_lengths = [len(stream) for stream in streams]
        ids = torch.full((len(streams), max(stream_lengths)), self.landmark_token_id)
        for row, stream in enumerate(streams):
            ids[row, ids.shape[1] - len(stream) :] = stream
        lengths = [len(text) for text in texts]
        wanted = min(1, max(lengths)) if last_only else max(lengths)
        kept, index = _text_positions(ids == self.landmark_token_id, wanted)
        logits = self.forward(ids, stream_lengths, kept)
        for text, read in zip(self.texts, texts, strict=True):
            text.frombytes(read.to(torch.int32).numpy().tobytes())
        if index is not None:
            index = to_device(index, logits.device)[..., None].expand(-1, -1, logits.shape[-1])
            logits = logits.gather(1, index)
        elif last_only or not transient:
            logits = logits.clone()
        return ReadChunk(logits, lengths, [begin] * self.batch)

    def _stream(self, text: Tensor, tail: int) -> Tensor:
        """Text of a row with its landmarks put in, going on with a tail block of which `tail` text tokens have been
        read."""
        head = self.landmark_freq - tail
        if len(text) < head:
            return text
        landmark = torch.tensor([self.landmark_token_id])
        rest = insert_landmarks(text[head:], self.landmark_freq, self.landmark_token_id)
        return torch.cat([text[:head], landmark, rest])


def _text_positions(landmark: Tensor, wanted: int) -> tuple[Tensor, Tensor | None]:
    """The last `wanted` text positions of each row, given where landmarks (and padding) stand, (B, T).

    Returns the positions that any row needs, (n,), and where among these each row's own are, (B, wanted), or None
    where all rows need the same positions.
    """
    text = ~landmark
    rank = text.long().flip(-1).cumsum(-1).flip(-1)
    needed = text & (rank <= wanted)
    kept = needed.any(0).nonzero().squeeze(-1)
    if needed[:, kept].all():
        return kept, None
    # A row's padding stands in front, so counting from the end keeps its text at the right.
    order = torch.argsort(needed[:, kept].long(), dim=-1, stable=True)
    return kept, order[:, order.shape[-1] - wanted :]
