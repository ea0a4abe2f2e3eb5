"""Read with a model that has no landmarks: of every row it sees the last tokens that its trained length holds.

Same interface as `Reader`, so that generation and pass keys compare models with landmarks and without.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from landmark_cli.inference.reader import ReadChunk

PREFILL = 2048


class WindowReader:
    """Reads a batch of rows, each within its own window of the newest tokens.

    window: tokens a row may see, by default the trained length (config.trained_length, or else
    max_position_embeddings). When it is full the oldest quarter is forgotten and the rest read anew, so what is seen
    does not depend on whether the model has a key/value cache of its own; where it has one, it is used.
    batch: rows.
    """

    def __init__(self, model: PreTrainedModel, *, window: int | None = None, batch: int = 1):
        config = model.config
        self.model, self.batch = model, batch
        self.window = window or getattr(config, "trained_length", None) or config.max_position_embeddings
        self.has_cache = "past_key_values" in inspect.signature(model.forward).parameters
        self.reset()

    def reset(self) -> None:
        """Forget everything read."""
        self.rows: list[list[int]] = [[] for _ in range(self.batch)]
        self._cache: DynamicCache | None = None
        self._mask = torch.zeros(self.batch, 0, dtype=torch.long)

    def read(self, rows: Sequence[Tensor | Sequence[int]], *, last_only: bool = True) -> Iterator[ReadChunk]:
        """Read each row's tokens on from where it stands; yields once, with the logits of each row's last token.

        Raises ValueError for last_only=False: only what is seen at the end is kept.
        """
        if not last_only:
            raise ValueError("last_only: a WindowReader gives the logits of the last tokens only")
        rows = [torch.as_tensor(row, dtype=torch.long).tolist() for row in rows]
        if len(rows) != self.batch:
            raise ValueError(f"{len(rows)} rows given to a reader of {self.batch}")
        for seen, row in zip(self.rows, rows, strict=True):
            seen += row
            del seen[: self._forgotten(len(seen))]
        yield ReadChunk(self._read_anew()[:, None], [len(row) for row in rows], 0)

    def step(self, tokens: Sequence[int | None]) -> Tensor:
        """Read one more token of each row (None: the row rests) and return its logits, (B, vocabulary)."""
        for seen, token in zip(self.rows, tokens, strict=True):
            if token is not None:
                seen.append(token)
        full = [self._forgotten(len(seen)) for seen in self.rows]
        for seen, oldest in zip(self.rows, full, strict=True):
            del seen[:oldest]
        if any(full) or self._cache is None:
            return self._read_anew()
        real = torch.tensor([[token is not None] for token in tokens]).long()
        ids = torch.tensor([[token or 0] for token in tokens])
        return self._forward_cached(ids, real)

    def _forgotten(self, length: int) -> int:
        """How many of a row's oldest tokens go: none while it fits, else all but three quarters of the window."""
        return 0 if length <= self.window else length - max(1, self.window * 3 // 4)

    def _read_anew(self) -> Tensor:
        width = max(len(row) for row in self.rows)
        if not self.has_cache:
            return self._forward_all(width)
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
    def _forward_all(self, width: int) -> Tensor:
        """The same without a cache: rows padded on the right, where causal attention never looks."""
        ids = torch.zeros(self.batch, width, dtype=torch.long)
        for row, seen in enumerate(self.rows):
            ids[row, : len(seen)] = torch.tensor(seen, dtype=torch.long)
        last = torch.tensor([max(len(seen) - 1, 0) for seen in self.rows])
        kept, index = last.unique(return_inverse=True)
        device = self.model.device
        logits = self.model(input_ids=ids.to(device), logits_to_keep=kept.to(device), use_cache=False).logits
        return logits[torch.arange(self.batch, device=device), index.to(device)]
