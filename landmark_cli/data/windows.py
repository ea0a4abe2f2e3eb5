"""Windows of a stream out of token files: landmarks put in, targets, what each target weighs, where documents begin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from landmark_cli.data.landmarks import IGNORED_TARGET, insert_landmarks, next_token_targets, text_length
from landmark_cli.data.packing import Place, Streams, bounds_of, lay_out
from landmark_cli.errors import LandmarkError

Pack = Literal["cut", "whole"]


@dataclass(frozen=True)
class AnswerWeights:
    """What the targets of token files that mark answers weigh in the loss: those of answers `answer`, the others 0
    where only answers count, else 1. Targets of token files without marks weigh 1."""

    answer: float = 1.0
    answers_only: bool = False


class Windows:
    """Cuts windows out of token files and puts landmarks in: what training batches and evaluation share.

    Args:
        sequence_length: positions of a window's stream, landmarks included.
        landmark_freq: text tokens between landmarks; None for plain text. Every window starts a block.
        landmark_token_id: required with `landmark_freq`.
        eot_id: positions that hold it predict nothing; None if there is no such token.
        include_landmarks: count landmarks as targets (see `landmarks.next_token_targets`).
        mask_documents: the documents of a window are not to see each other: landmarks count from the beginning of each,
            and batches say where they begin. What landmarks then leave over of a window is filled up at its end.
        pack: "cut" cuts text at the window's length, wherever that is; "whole" cuts no document that a window can hold
            (see `packing.whole_documents`).
        begin: tokens that the tokenizer puts in front of every text by itself, of which a model predicts poorly what
            does not begin with them. They take the place of a window's first tokens, and with mask_documents of each
            document's.
    """

    def __init__(
        self,
        sequence_length: int,
        landmark_freq: int | None,
        landmark_token_id: int | None,
        eot_id: int | None,
        include_landmarks: bool = False,
        mask_documents: bool = False,
        pack: Pack = "cut",
        begin: Sequence[int] = (),
    ) -> None:
        if landmark_freq is not None and sequence_length < landmark_freq + 1:
            raise LandmarkError(
                f"the sequence length {sequence_length} is shorter than one block of {landmark_freq} text tokens and "
                f"their landmark: make it at least {landmark_freq + 1}, or landmark_freq smaller"
            )
        if sequence_length < 1:
            raise LandmarkError(f"the sequence length must be at least 1, not {sequence_length}")
        if landmark_freq is not None and landmark_token_id is None:
            raise ValueError("landmark_token_id is needed where landmark_freq is given")
        if mask_documents and eot_id is None:
            raise ValueError("mask_documents needs eot_id, which says where documents end")
        self.sequence_length = sequence_length
        self.landmark_freq = landmark_freq
        self.landmark_token_id = None if landmark_freq is None else landmark_token_id
        self.eot_id = eot_id
        self.include_landmarks = include_landmarks
        self.mask_documents, self.pack, self.begin = mask_documents, pack, tuple(begin)
        self.text_length = sequence_length if landmark_freq is None else text_length(sequence_length, landmark_freq)

    def cut(self, places: Sequence[Place]) -> dict[str, Tensor]:
        """The windows that hold these texts.

        Returns:
            input_ids and labels, both (n, sequence_length) int64; labels are the targets of their own position (already
            shifted), -100 where there is none. With mask_documents also cu_seqlens (see `packing.bounds_of`).
        """
        if self.mask_documents or self.pack == "whole" or any(place.length < self.text_length for place in places):
            return self._cut_documents(places)
        text = self._text(places, "tokens")
        if self.begin:
            self._begin(text, self._streams(text))
        stream = following = torch.from_numpy(text)
        if self.landmark_freq is not None:
            stream = insert_landmarks(stream, self.landmark_freq, self.landmark_token_id)
            following = stream if self.include_landmarks else following
        # What comes after the window: the next position of the stream, or of the text where landmarks are no targets.
        following = following[:, self.sequence_length if following is stream else -1]
        input_ids = stream[:, : self.sequence_length].contiguous()
        return {"input_ids": input_ids, "labels": self._targets(input_ids, following)}

    def _cut_documents(self, places: Sequence[Place]) -> dict[str, Tensor]:
        """As `cut`, of texts of any length and landmarks that count from documents."""
        text, lengths = self._text(places, "tokens"), np.array([place.length for place in places])
        streams = self._streams(text)
        self._begin(text, streams)
        rows, last = np.arange(len(places)), lengths - 1
        ends = np.minimum(streams.column[rows, last] + 1 + streams.closes[rows, last], self.sequence_length)
        # One token after the text, which its last position predicts; it may stand behind a landmark that is cut off.
        width = self.sequence_length + 2
        stream = np.full((len(places), width), self.eot_id or 0)
        given = np.arange(text.shape[1]) <= lengths[:, None]
        row, token = np.nonzero(given)
        stream[row, streams.column[row, token]] = text[row, token]
        if self.landmark_freq is not None:
            row, token = np.nonzero(given & streams.closes)
            landmark = streams.column[row, token] + 1
            stream[row[landmark < width], landmark[landmark < width]] = self.landmark_token_id
        filled = torch.from_numpy(np.arange(self.sequence_length) < ends[:, None])
        stream = torch.from_numpy(stream)
        labels = self._targets(stream)[:, : self.sequence_length].masked_fill(~filled, IGNORED_TARGET)
        filling = self.eot_id or 0
        batch = {"input_ids": stream[:, : self.sequence_length].masked_fill(~filled, filling), "labels": labels}
        if self.mask_documents:
            batch["cu_seqlens"] = torch.from_numpy(bounds_of(streams, lengths, ends, self.sequence_length))
        return batch

    def _targets(self, stream: Tensor, following: Tensor | None = None) -> Tensor:
        return next_token_targets(
            stream,
            landmark_token_id=self.landmark_token_id,
            eot_id=self.eot_id,
            include_landmarks=self.include_landmarks,
            following=following,
        )

    def _text(self, places: Sequence[Place], name: str) -> np.ndarray:
        """What an array of each file, `tokens` or `answers`, has of the texts and of the token after them: (n, text
        length + 1) int64, filled up with ends of text, or with 0 where there is no such array."""
        found = np.full((len(places), self.text_length + 1), self.eot_id or 0 if name == "tokens" else 0)
        for row, place in zip(found, places, strict=True):
            values = getattr(place.file, name)
            if values is not None:
                values = values[place.start : place.start + place.length + 1]
                row[: len(values)] = values
        return found

    def _begin(self, text: np.ndarray, streams: Streams) -> None:
        """Put `begin` into text, in place, but for ends of text, which stay. streams: of the text as it was, for what
        begins a text may be what ends one."""
        ends = text == self.eot_id
        # The last first: where a document is shorter than these, the next one's stand.
        for offset, token in reversed(list(enumerate(self.begin))):
            places = np.pad(streams.begins, ((0, 0), (offset, 0)))[:, : text.shape[1]]
            text[places & ~ends] = token

    def _streams(self, text: np.ndarray) -> Streams:
        return lay_out(text, self.landmark_freq, self.eot_id if self.mask_documents else None)

    def answers(self, places: Sequence[Place]) -> Tensor:
        """Which positions of these windows have a token of an answer as their target: bool, of the shape of `cut`'s
        labels. Positions without a target may be marked too; of files without marks none is."""
        marks = self._text(places, "answers") > 0
        text = self._text(places, "tokens") if self.mask_documents else marks
        streams = self._streams(text)
        # The token before an answer's has it as its target, and so has a landmark between the two; where landmarks are
        # targets, that of the token is the landmark, which is of no answer.
        of_answer, closes = marks[:, 1:], streams.closes[:, :-1]
        target = np.zeros((len(places), self.sequence_length + 1), dtype=bool)
        rows = np.arange(len(places))[:, None]
        column = streams.column[:, :-1]
        target[rows, column] = of_answer & ~closes if self.include_landmarks else of_answer
        row, token = np.nonzero(of_answer & closes)
        target[row, column[row, token] + 1] = True
        return torch.from_numpy(target[:, : self.sequence_length])

    def weights(self, places: Sequence[Place], labels: Tensor, answer_weights: AnswerWeights) -> Tensor:
        """What each target of these windows weighs: float32, of the shape of `labels`, which `cut` gave; 0 where there
        is no target."""
        others = [0.0 if answer_weights.answers_only and place.file.answers is not None else 1.0 for place in places]
        weights = torch.where(self.answers(places), answer_weights.answer, torch.tensor(others)[:, None])
        return weights.masked_fill(labels == IGNORED_TARGET, 0.0)
