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
from landmark_cli.console import counted, warn_once
from landmark_cli.data.landmarks import stream_length
from landmark_cli.errors import LandmarkError
from landmark_cli.inference import reader_memory
from landmark_cli.inference.chunk_lengths import chunks_together, default_chunk, passage_tokens, positions_of
from landmark_cli.inference.graphs import ChunkForward
from landmark_cli.inference.memory import Memory
from landmark_cli.inference.memory_fit import About
from landmark_cli.inference.padded_chunk import PaddedChunk
from landmark_cli.inference.readers import BaseReader, ReadChunk, called, layer_token_bytes
from landmark_cli.inference.settings import ReadingSettings
from landmark_cli.models.device import to_device
from landmark_cli.models.layers import key_heads, landmark_layers
from landmark_cli.models.rotary import inverse_frequencies
from landmark_cli.options import LONGEST
from landmark_cli.softmax import is_joint, softmax_of

# A passage's queries choose so many times the blocks there are, or it is read chunk by chunk: then all blocks would
# travel for a few.
CHOSEN = 4
# Text tokens of a chunk, of all its rows: of up to 2016 several chunks at a time were 1.37 times as fast and more, of
# 4000 and more 0.94 to 1.03 times (benchmarks/results/long_context-offload-h200.md).
LITTLE_TEXT = 2048
# Graphs are recorded for numbers of rows of so many binary digits and zeros behind them: rows that rest fill up what is
# between.
ROW_DIGITS = 3
# Fewer steps are done before their graphs would be recorded.
FEW_STEPS = 8
# The positions of a step that give logits: made once, for every step needs one.
STEP_KEPT = {columns: torch.tensor(columns) for columns in ((0,), (0, 1))}


class BlockReader(BaseReader):
    """Reads a batch of rows, each at its own pace, and remembers them in a block cache.

    model: any landmark model. top_k_blocks: blocks retrieved per query (config.top_k_blocks by default). chunk: text
    tokens a chunk (by default what the trained length leaves). cache_blocks, selection, positions,
    rerank_blocks, block_temperature, context_miss_cutoff, offload: see ReadingSettings. batch: rows.

    Raises LandmarkError where the model has no landmarks or the settings do not fit it.

    >>> model, tokenizer = landmark_cli.load("runs/landmark", device="cpu")
    >>> reader = landmark_cli.Reader(model, top_k_blocks=2, batch=2)
    >>> rows = [tokenizer("It was the best of times. " * 20).input_ids, tokenizer("Call me").input_ids]
    >>> *_, last = reader.read(rows, last_only=True)
    >>> reader.step([262, 262]).shape == (2, model.config.vocab_size)
    True
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
        rerank_blocks: int | None = None,
        block_temperature: float = 1.0,
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
        if rerank_blocks is not None:
            asked = f"--rerank-blocks {rerank_blocks}"
            if not is_joint(config):
                raise LandmarkError(
                    f"{asked} asks the text of blocks, but in this model landmarks share attention out (its "
                    f'landmark_softmax is "{softmax_of(config)}"): leave the option out'
                )
            if selection != "per_token_and_head":
                raise LandmarkError(
                    f"{asked} is for selections that nobody shares, and --selection {selection} is shared: leave one "
                    "of them out"
                )
            if not 0 < top_k_blocks < rerank_blocks:
                warn_once(f"{asked} changes nothing where --top-k-blocks is {top_k_blocks}")
                rerank_blocks = None
        self.chunk = chunk or default_chunk(
            config.trained_length, top_k_blocks, self.landmark_freq, config.name_or_path
        )
        self.cache = BlockCache(
            RetrievalSettings(
                self.landmark_freq + 1,
                top_k_blocks,
                selection,
                cache_blocks,
                positions,
                context_miss_cutoff,
                is_joint(config),
                rerank_blocks,
                block_temperature,
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
        self.passage_tokens = passage_tokens(model)
        self._steps = 0
        # What each row has read, as a memory keeps it.
        self.texts = [array("i") for _ in range(batch)]
        self.about: About | None = None
        # By row, the files that it went on from last, and what was opened of them.
        self.recalled: dict[int, tuple[tuple, Memory]] = {}

    @classmethod
    def open(cls, model: PreTrainedModel, settings: ReadingSettings, batch: int) -> BlockReader:
        chosen = {field.name: getattr(settings, field.name) for field in fields(ReadingSettings)}
        return cls(model, **chosen, batch=batch)

    def expect(self, tokens: int, steps: int = 0) -> None:
        """As BaseReader.expect: memory for all tokens is taken at once, and graphs of steps are recorded while a text
        of several chunks is read.

        Raises LandmarkError where blocks are to be offloaded and host memory will not hold them all.
        """
        self._steps = steps
        if said := self.beyond_training(max(map(len, self.texts)) + tokens):
            warn_once(said)
        size = self.landmark_freq + 1
        read = max(n * size + r for n, r in zip(self.cache.host_blocks, self.cache.host_tail, strict=True))
        stream = read + stream_length(tokens, self.landmark_freq) + 1
        self.cache.expect(stream)
        if self.cache.offload is not None:
            require_host_memory(stream, len(landmark_layers(self.model.config)), self._layer_bytes(stream))

    def beyond_training(self, tokens: int) -> str | None:
        """As BaseReader.beyond_training. Blocks at their true distance are where they are wanted, and there are models
        that were trained for that."""
        settings, trained = self.cache.settings, self.model.config.trained_length
        if settings.positions == "absolute" or positions_of(tokens, self.chunk, settings) <= trained:
            return None
        # The same words for texts of any length.
        most = positions_of(LONGEST, self.chunk, settings)
        return (
            f"chunks of {counted(self.chunk, 'text token')} beside {counted(settings.top_k, 'block')} take up to "
            f"{most} positions, more than the {trained} that {called(self.model)} was trained at: what it says or "
            "scores may mislead. Read with a smaller chunk, or fewer blocks"
        )

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
        reader_memory.take(self, row).save(path, what)

    def recall(self, *paths: str | Path, row: int = 0, what: str = "") -> None:
        """As BaseReader.recall."""
        reader_memory.recall(self, paths, row, what)

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
        batch gives what its rows give one by one. Raises LandmarkError where a row holds the landmark token, and where
        a chunk of it failed before, a part of which layers with a sliding window hold."""
        rows = self._rows(rows)
        for row in rows:
            if (row == self.landmark_token_id).any():
                raise LandmarkError(
                    f"the text contains the landmark token ({self.landmark_token_id}); "
                    "give plain text, landmarks are put in while reading"
                )
        left = range(0, max(len(row) for row in rows), self.chunk)
        working = [sum(len(row) > begin for row in rows) for begin in left]
        while left:
            count = self._chunks_at_once(working[-len(left) :]) if last_only else 1
            texts = [[row[begin : begin + self.chunk] for row in rows] for begin in left[:count]]
            if count == 1:
                yield self._read_chunk(texts[0], left[0], last_only, transient)
            else:
                yield from self._read_passage(texts, left[:count])
            left = left[count:]
            if left:
                self._record_steps([len(row[left[0] :]) for row in rows])

    def step(self, tokens: Sequence[int | None]) -> Tensor:
        """As BaseReader.step."""
        self._require_rows(len(tokens))
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
        kept = STEP_KEPT[tuple(sorted(set(columns)))]
        logits = self.forward(ids, [len(stream) for stream in streams], kept)
        for text, token in zip(self.texts, tokens, strict=True):
            if token is not None:
                text.append(token)
        if len(kept) == 1:
            return logits[:, 0].clone()
        index = to_device(torch.tensor(columns), logits.device)[:, None, None]
        return logits.gather(1, index.expand(-1, 1, logits.shape[-1]))[:, 0]

    def _chunks_at_once(self, working: Sequence[int]) -> int:
        """How many of the chunks that are left, and of which the last logits alone are asked for, one call of the model
        reads. working: how many rows have text in each of them."""
        cache, config, rows = self.cache, self.model.config, working[0]
        if cache.trace is not None or getattr(config, "context_miss_token", False):
            return 1
        stream = stream_length(self.chunk, self.landmark_freq) + 1
        count = min(len(working), self.passage_tokens // (rows * stream))
        if cache.offload is None:
            return chunks_together(working[:count]) if self._passages_serve(rows, stream) else 1
        heads, _ = key_heads(config, landmark_layers(config)[0])
        chosen = count * self.chunk * cache.settings.top_k * config.get_text_config().num_attention_heads // heads
        few = chosen < CHOSEN * min(max(cache.host_blocks), cache.settings.retrievable)
        return 1 if count < 2 or few or cache.why_not_streamed() is not None else count

    def _passages_serve(self, rows: int, stream: int) -> bool:
        """Whether chunks of so many rows of `stream` tokens are better read several at a time, with nothing offloaded:
        where one of them is so little text, and so little work that it would be recorded.

        Not where a cache is bounded, which would need room for all of a passage, nor where layers have windows, which
        read chunk by chunk in a passage too.
        """
        cache = self.cache
        known = bool(cache.layers) and not cache.windows and not cache.fetching
        little = rows * self.chunk <= LITTLE_TEXT and self.forward.records(rows, stream)
        return known and cache.settings.cache_blocks is None and little

    def _record_steps(self, left: Sequence[int]) -> None:
        """Record the graphs of steps that are expected after each row's `left` text tokens more."""
        steps, self._steps = self._steps, 0
        if steps < FEW_STEPS or max(self.cache.host_blocks) == 0:
            return
        tails = [(tail + more) % self.landmark_freq for tail, more in zip(self.cache.host_tail, left, strict=True)]
        kinds = [(1, [0])]
        if max(tails) + steps >= self.landmark_freq:
            # Where a block ends the landmark is read too; rows that end none at that step stand beside it.
            kinds.append((2, [0] if len(set(tails)) == 1 else [0, 1]))
        self.forward.record_steps(kinds)

    def _read_chunk(self, texts: list[Tensor], begin: int, last_only: bool, transient: bool) -> ReadChunk:
        chunk = self._padded(texts, self.cache.host_tail, last_only, self._rows_at_work(texts))
        logits = self.forward(chunk.ids, chunk.lengths, chunk.kept, chunk.rows)
        self._remember(texts)
        found = chunk.of_rows(logits)
        if found is logits and (last_only or not transient):
            found = logits.clone()
        return ReadChunk(found, list(map(len, texts)), [begin] * self.batch)

    def _read_passage(self, texts: list[list[Tensor]], begins: Sequence[int]) -> Iterator[ReadChunk]:
        """Chunks that follow one another, by one call of the model; the last logits of each."""
        chunks, tails, offset, kept = [], self.cache.host_tail, 0, []
        rows = [row for row, text in enumerate(texts[0]) if len(text)]
        for of_chunk in texts:
            chunks.append(self._padded(of_chunk, tails, True, rows))
            tails = [(r + n) % (self.landmark_freq + 1) for r, n in zip(tails, chunks[-1].lengths, strict=True)]
            kept.append(chunks[-1].kept + offset)
            offset += chunks[-1].ids.shape[1]
        ids = torch.cat([chunk.ids for chunk in chunks], dim=1)
        parts = [(chunk.lengths, chunk.ids.shape[1]) for chunk in chunks]
        logits = self.forward.passage(ids, parts, torch.cat(kept), rows)
        for of_chunk in texts:
            self._remember(of_chunk)
        logits = logits.split([len(chunk.kept) for chunk in chunks], dim=1)
        for of_chunk, chunk, found, begin in zip(texts, chunks, logits, begins, strict=True):
            yield ReadChunk(chunk.of_rows(found), list(map(len, of_chunk)), [begin] * self.batch)

    def _rows_at_work(self, texts: list[Tensor]) -> list[int]:
        """The rows that the model is called with: those that have text in a chunk, and some that rest beside them where
        that keeps graphs few."""
        if self.cache.trace is not None:
            # It tells of the rows by their places.
            return list(range(self.batch))
        rows = [row for row, text in enumerate(texts) if len(text)]
        resting = [row for row, text in enumerate(texts) if len(text) == 0]
        step = 1 << max(0, (len(rows) - 1).bit_length() - ROW_DIGITS)
        resting = resting[: -len(rows) % step]
        recorded = self.forward.records(len(rows) + len(resting), stream_length(self.chunk, self.landmark_freq))
        return sorted(rows + resting) if recorded else rows

    def _padded(self, texts: list[Tensor], tails: list[int], last_only: bool, rows: list[int]) -> PaddedChunk:
        return PaddedChunk.of(texts, tails, rows, self.landmark_freq, self.landmark_token_id, last_only=last_only)

    def _remember(self, texts: list[Tensor]) -> None:
        for text, read in zip(self.texts, texts, strict=True):
            text.frombytes(read.to(torch.int32).numpy().tobytes())
