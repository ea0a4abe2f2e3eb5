"""What a landmark model has read, as transformers hands it from call to call: `past_key_values`.

cache = LandmarkCache(model)
model(ids, past_key_values=cache)             # reads text of any length, landmarks put in
model.generate(more, past_key_values=cache)   # goes on from there
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from landmark_cli.errors import LandmarkError
from landmark_cli.inference.generation import EXPECTED_TOKENS, read_prompts
from landmark_cli.inference.readers import BaseReader, has_landmarks, open_reader
from landmark_cli.inference.settings import ReadingSettings
from landmark_cli.models.device import to_device


class LandmarkCache(Cache):
    """A cache of transformers that holds a reader, and with it the block cache, instead of keys and values by layer.

    model: a landmark model, opened with landmark attention, or any model of this package. settings: how it is read.
    reader: one that has read already, a text that what is given here goes on from but is no part of it. Rows are made
    at the first call, as many as its ids have.

    It may be copied (`copy.deepcopy`): each copy goes on by itself. Tokens cannot be taken back.

    reader: the reader, None until the first call. new_tokens: how many tokens are expected to come behind the next
    text, for which room is made with it.

    >>> model, tokenizer = landmark_cli.load("runs/landmark", device="cpu")
    >>> cache = landmark_cli.LandmarkCache(model, landmark_cli.ReadingSettings(top_k_blocks=2))
    >>> ids = tokenizer("It was the best of times. " * 20, return_tensors="pt").input_ids
    >>> output = model(ids, past_key_values=cache, logits_to_keep=1)  # reads
    >>> output.logits.shape[1], cache.get_seq_length() == ids.shape[1]
    (1, True)
    """

    is_croppable = False

    def __init__(
        self, model: PreTrainedModel, settings: ReadingSettings | None = None, *, reader: BaseReader | None = None
    ) -> None:
        super().__init__(layers=[])
        self.model = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.settings = settings or ReadingSettings()
        self.reader = reader
        self.new_tokens = 0
        self._columns = 0

    def read(self, input_ids: Tensor, attention_mask: Tensor | None = None, logits_to_keep: int | Tensor = 0) -> Tensor:
        """Read text tokens, (B, T) int64 without landmarks, and return logits, (B, n, vocabulary).

        attention_mask: (B, T) or, with columns of earlier calls in front, longer; what it hides is not read, wherever
        it stands. logits_to_keep: columns whose logits are returned: the last so many, 0 for all, or these. A hidden
        column's logits are 0; of the last column alone, a row's are those after its last token.

        Raises ValueError for another number of rows than before and where nothing is to be read, LandmarkError where
        the text holds the landmark token.
        """
        ids, real = self._on_host(input_ids, attention_mask)
        rows = [row[seen] for row, seen in zip(ids, real, strict=True)]
        longest = max(map(len, rows))
        if longest == 0:
            raise ValueError("attention_mask hides every token: there is nothing to read")
        if self.reader is None:
            self.reader = open_reader(self.model, self.settings, batch=len(rows))
        if self.reader.batch != len(rows):
            raise ValueError(f"{len(rows)} rows were given, and {self.reader.batch} have been read before")
        landmark = getattr(self.model.config, "landmark_token_id", None)
        if landmark is not None and (ids == landmark).any():
            raise self._holds_landmark()
        if self._columns > 0 and ids.shape[1] == 1:
            return self.step([int(row[0]) if len(row) else None for row in rows])[:, None]
        self._columns += ids.shape[1]
        self.reader.expect(longest + min(self.new_tokens, EXPECTED_TOKENS), steps=self.new_tokens)
        if isinstance(logits_to_keep, int) and logits_to_keep == 1:
            return read_prompts(self.reader, rows)[:, None]
        return self._read_all(rows, real, logits_to_keep)

    def step(self, tokens: Sequence[int | None]) -> Tensor:
        """Read one more column behind those that were read, a token of each row or None where it is hidden, and return
        its logits, (B, vocabulary).

        Raises LandmarkError where a token is the landmark.
        """
        if getattr(self.model.config, "landmark_token_id", None) in tokens and has_landmarks(self.model):
            raise self._holds_landmark()
        self._columns += 1
        return self.reader.step(tokens)

    def _holds_landmark(self) -> LandmarkError:
        return LandmarkError(
            f"the text contains the landmark token ({self.model.config.landmark_token_id}); give plain text, landmarks "
            "are put in while reading"
        )

    def _on_host(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Ids and what is text of them, (B, T) int64 and bool, brought over in one go."""
        if input_ids.dim() != 2 or input_ids.shape[1] == 0:
            raise ValueError(f"input_ids has the shape {tuple(input_ids.shape)}; (B, T) with some tokens is read")
        ids = input_ids.detach().long()
        if attention_mask is None:
            ids = ids.cpu()
            return ids, torch.ones_like(ids, dtype=torch.bool)
        if attention_mask.dim() != 2 or attention_mask.shape[1] < ids.shape[1]:
            raise ValueError(
                f"attention_mask has the shape {tuple(attention_mask.shape)}, and input_ids {tuple(ids.shape)}"
            )
        mask = attention_mask[:, -ids.shape[1] :].to(ids)
        ids, mask = torch.stack([ids, mask]).cpu()
        return ids, mask != 0

    def _read_all(self, rows: list[Tensor], real: Tensor, logits_to_keep: int | Tensor) -> Tensor:
        width = real.shape[1]
        last = logits_to_keep if isinstance(logits_to_keep, int) else 0
        first = max(0, width - last) if last else 0
        columns = [seen.nonzero().squeeze(-1) for seen in real]
        found = None
        for part in self.reader.read(rows, transient=True):
            if found is None:
                found = part.logits.new_zeros(len(rows), width - first, part.logits.shape[-1])
            for row, (begin, length) in enumerate(zip(part.begins, part.lengths, strict=True)):
                at = columns[row][begin : begin + length] - first
                wanted = part.row(row)[int((at < 0).sum()) :]
                found[row, to_device(at[at >= 0], found.device)] = wanted
        return found if isinstance(logits_to_keep, int) else found[:, logits_to_keep.to(found.device)]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns given to this cache, padding included."""
        return self._columns

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """-1: a text may be of any length."""
        return -1

    get_max_length = get_max_cache_shape

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row r becomes what row beam_idx[r] was."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row becomes `repeats` rows, one after the other."""
        if self.reader is not None:
            self.batch_select_indices(torch.arange(self.reader.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Row r becomes what row indices[r] was; rows may become more or fewer."""
        if self.reader is not None:
            self.reader.take(indices.tolist())

    def crop(self, max_length: int) -> None:
        """Raises LandmarkError: what was read cannot be taken back."""
        if max_length and max_length != self._columns:
            raise LandmarkError(
                "what a landmark model has read cannot be taken back token by token: copy the cache before "
                "(copy.deepcopy), or decode without an assistant"
            )

    def reset(self) -> None:
        """Forget everything read."""
        self._columns = 0
        if self.reader is not None:
            self.reader.reset()

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Raises LandmarkError: keys and values come in by the model's forward, which does not know this cache."""
        raise LandmarkError(
            f"{type(self.model).__name__} does not read with memory: open it with landmark attention, after "
            "import landmark_cli"
        )

    @property
    def max_batch_size(self) -> int:
        return 0 if self.reader is None else self.reader.batch

    @property
    def max_cache_len(self) -> int:
        return -1

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return self._columns > 0

    def __len__(self) -> int:
        return self.model.config.num_hidden_layers

    def __repr__(self) -> str:
        return f"LandmarkCache({self.model.config.name_or_path or type(self.model).__name__}, {self._columns} columns)"

    def __deepcopy__(self, memo: dict[int, Any]) -> LandmarkCache:
        memo[id(self.model)] = self.model
        other = copy.copy(self)
        other.__dict__ = {name: copy.deepcopy(value, memo) for name, value in vars(self).items()}
        return other
