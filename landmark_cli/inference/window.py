"""Read without a memory: a model sees of every row what one window holds."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel

from landmark_cli.console import counted, warn_once
from landmark_cli.data.landmarks import insert_landmarks
from landmark_cli.inference.readers import BaseReader, ReadChunk, called, has_landmarks, trained_text_length
from landmark_cli.inference.settings import ReadingSettings

PREFILL = 2048


class WindowReader(BaseReader):
    """Reads a batch of rows, each within its own window of the newest tokens, as one chunk.

    window: text tokens of a row that are seen at most, by default the trained length. kept: how many of them stay when
    a row has outgrown the window: by default three quarters, so that not every step has to read anew, or the whole
    window where `expect` has said that nothing comes after what is read. Those that stay are read anew then, so what is
    seen does not depend on whether the model has a key/value cache of its own; where it has one, the cache is used.
    landmarks: read with landmarks in the text, as the model was trained; else by ordinary attention over the text
    alone.
    """

    remembers = False
    seen_at_once: ClassVar[str] = "windows"

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        window: int | None = None,
        kept: int | None = None,
        landmarks: bool = False,
        batch: int = 1,
    ):
        self.model, self.batch = model, batch
        self.window = self.chunk = window or trained_text_length(model)
        self.kept = max(1, self.window * 3 // 4) if kept is None else kept
        self.landmarks = landmarks
        self.has_cache = not landmarks and "past_key_values" in inspect.signature(model.forward).parameters
        self.reset()

    def reset(self) -> None:
        """Forget everything read."""
        self.rows: list[list[int]] = [[] for _ in range(self.batch)]
        self._expected: int | None = None
        self._cache: DynamicCache | None = None
        self._mask = torch.zeros(self.batch, 0, dtype=torch.long)

    def take(self, rows: Sequence[int]) -> None:
        """As BaseReader.take."""
        self.rows = [list(self.rows[row]) for row in rows]
        self.batch = len(rows)
        if self._cache is not None:
            index = torch.tensor(rows)
            self._mask = self._mask[index]
            self._cache.batch_select_indices(index.to(self.model.device))

    def expect(self, tokens: int, steps: int = 0) -> None:
        self._expected = tokens
        if said := self.beyond_training(max(map(len, self.rows)) + tokens):
            warn_once(said)

    def beyond_training(self, tokens: int) -> str | None:
        """As BaseReader.beyond_training. By ordinary attention a model with landmarks has the positions that it had
        before it got them."""
        model = self.model
        plain = has_landmarks(model) and not self.landmarks
        trained = model.config.max_position_embeddings if plain else trained_text_length(model)
        if min(self.window, tokens) <= trained:
            return None
        return (
            f"{self.seen_at_once} of {counted(self.window, 'text token')} are longer than the {trained} that "
            f"{called(model)} was trained on: what it says or scores may mislead"
        )

    def sees(self, tokens: int) -> int:
        return tokens if tokens <= self.window else self.kept

    def read(
        self, rows: Sequence[Tensor | Sequence[int]], *, last_only: bool = False, transient: bool = False
    ) -> Iterator[ReadChunk]:
        """As BaseReader.read, but yields once, with the logits of what is seen in the end."""
        rows = self._rows(rows)
        longest = max(len(row) for row in rows)
        if longest == 0:
            return
        kept = self.kept
        if self._expected is not None:
            self._expected -= longest
            kept = self.window if self._expected <= 0 else kept
        for seen, row in zip(self.rows, rows, strict=True):
            seen += row.tolist()
            del seen[: self._forgotten(len(seen), kept)]
        if last_only:
            yield ReadChunk(self._read_anew()[:, None], [len(row) for row in rows], [0] * self.batch)
            return
        self._cache = None
        lengths = [min(len(row), len(seen)) for row, seen in zip(rows, self.rows, strict=True)]
        first = min(len(seen) - length for seen, length in zip(self.rows, lengths, strict=True))
        widest = max(map(len, self.rows))
        logits = self._forward_whole(torch.arange(first, widest) if first else None)
        begins = [len(row) - length for row, length in zip(rows, lengths, strict=True)]
        yield ReadChunk(logits, lengths, begins, [len(seen) - first for seen in self.rows])

    def step(self, tokens: Sequence[int | None]) -> Tensor:
        """As BaseReader.step."""
        self._require_rows(len(tokens))
        for seen, token in zip(self.rows, tokens, strict=True):
            if token is not None:
                seen.append(token)
        full = [self._forgotten(len(seen), self.kept) for seen in self.rows]
        for seen, oldest in zip(self.rows, full, strict=True):
            del seen[:oldest]
        if any(full) or self._cache is None:
            return self._read_anew()
        real = torch.tensor([[token is not None] for token in tokens]).long()
        ids = torch.tensor([[token or 0] for token in tokens])
        return self._forward_cached(ids, real)

    def _forgotten(self, length: int, kept: int) -> int:
        """How many of a row's oldest tokens go: none while the row fits into the window, else all but `kept`."""
        return 0 if length <= self.window else length - kept

    def _read_anew(self) -> Tensor:
        """Logits (B, vocabulary) after the last token of every row, of all that is seen."""
        if not self.has_cache:
            last = torch.tensor([max(len(seen) - 1, 0) for seen in self.rows])
            kept, index = last.unique(return_inverse=True)
            device = self.model.device
            return self._forward_whole(kept)[torch.arange(self.batch, device=device), index.to(device)]
        width = max(len(row) for row in self.rows)
        self._cache = DynamicCache(config=self.model.config)
        self._mask = torch.zeros(self.batch, 0, dtype=torch.long)
        ids, real = (torch.zeros(self.batch, width, dtype=torch.long) for _ in range(2))
        for row, seen in enumerate(self.rows):
            ids[row, width - len(seen) :] = torch.tensor(seen, dtype=torch.long)
            real[row, width - len(seen) :] = 1
        for begin in range(0, width, PREFILL):
            logits = self._forward_cached(ids[:, begin : begin + PREFILL], real[:, begin : begin + PREFILL])
        return logits

    @torch.no_grad()
    def _forward_cached(self, ids: Tensor, real: Tensor) -> Tensor:
        """Logits (B, vocabulary) at the last column of ids (B, T), which go into the cache; real: (B, T), 0 or 1."""
        self._mask = torch.cat([self._mask, real], dim=1)
        positions = (self._mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        # Without padding there is nothing to mask, and the fast causal path of sdpa can run.
        mask = None if self._mask.all() else self._mask.to(self.model.device)
        return self.model(
            input_ids=ids.to(self.model.device),
            attention_mask=mask,
            position_ids=positions.to(self.model.device),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]

    @torch.no_grad()
    def _forward_whole(self, columns: Tensor | None) -> Tensor:
        """Logits (B, n, vocabulary) at these text columns (n,), None for all, in one pass without a cache: rows are
        padded on the right, where causal attention never looks."""
        ids = pad_sequence([torch.tensor(seen, dtype=torch.long) for seen in self.rows], batch_first=True)
        if self.landmarks:
            freq = self.model.config.landmark_freq
            columns = torch.arange(ids.shape[1]) if columns is None else columns
            columns = columns + columns // freq
            ids = insert_landmarks(ids, freq, self.model.config.landmark_token_id)
        device = self.model.device
        kept = 0 if columns is None else columns.to(device)
        return self.model(input_ids=ids.to(device), logits_to_keep=kept, use_cache=False).logits


class SeparateChunkReader(WindowReader):
    """Reads chunk by chunk, each as if nothing came before it, whatever memory the model has.

    chunk: text tokens, by default what the trained length holds.
    """

    seen_at_once = "chunks"

    def __init__(self, model: PreTrainedModel, *, chunk: int | None = None, batch: int = 1):
        super().__init__(model, window=chunk, kept=1, landmarks=has_landmarks(model), batch=batch)

    @classmethod
    def open(cls, model: PreTrainedModel, settings: ReadingSettings, batch: int) -> SeparateChunkReader:
        return cls(model, chunk=settings.chunk, batch=batch)

    def sees(self, tokens: int) -> int:
        return (tokens - 1) % self.chunk + 1

    def read(
        self, rows: Sequence[Tensor | Sequence[int]], *, last_only: bool = False, transient: bool = False
    ) -> Iterator[ReadChunk]:
        """As BaseReader.read; every chunk begins with nothing read."""
        rows = self._rows(rows)
        for begin in range(0, max(len(row) for row in rows), self.chunk):
            self.reset()
            for part in super().read([row[begin : begin + self.chunk] for row in rows], last_only=last_only):
                yield replace(part, begins=[begin] * self.batch)
