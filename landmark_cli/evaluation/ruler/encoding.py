"""Text -> token ids as they stand inside of a prompt, and the frame that a prompt stands in: a chat, or none."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing

import numpy as np
from transformers import PreTrainedTokenizerBase

from landmark_cli.data.pretrained_tokenizers import WHOLE, begin_ids, encoding_by, prompt_ids
from landmark_cli.errors import LandmarkError, UsageError
from landmark_cli.inference.chat import ChatTemplate

# What a text is encoded behind, so that it gets the ids that it has inside of a longer text: a tokenizer may put a
# space of its own in front of every text.
WORD, LINE = "a", "\n"
# Stands for the task in a chat template.
TASK = "<<the task>>"


class PromptEncoder:
    """Encodes the pieces of a prompt, so that prompts of any exact number of tokens can be put together of them.

    chat: whether the prompt is a user's message in the tokenizer's chat template, and the beginning of the answer
    stands behind what the template begins an answer with. begin: the tokens in front of every prompt, such as one
    begin-of-text token.

    Raises UsageError where there is no chat template, LandmarkError where it cannot be used.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, chat: bool = False):
        self._tokenizer = tokenizer
        self.begin = begin_ids(tokenizer)
        self.chat = chat
        self._opened, self._closed = _chat_frame(tokenizer) if chat else ("", "")

    def inner(self, texts: Sequence[str], *, after: str = WORD, before: str = "") -> list[np.ndarray]:
        """The ids of each text, (n,) int64, as it stands behind the text `after` and in front of the text `before`.
        What is spelled like a special token is text."""
        return self._between(texts, after, before, special=False)

    def text(self, text: str, *, after: str = WORD, before: str = "") -> np.ndarray:
        """`inner` of one text."""
        return self.inner([text], after=after, before=before)[0]

    def head(self, text: str, before: str = "") -> np.ndarray:
        """What a prompt begins with, (n,) int64: `begin`, the chat's beginning and this text, in front of `before`."""
        whole = self._opened + text
        ids = prompt_ids(self._tokenizer, whole + before)
        behind = self.text(before, after=whole[-1]) if before else []
        if len(behind) and ids[-len(behind) :] == list(behind):
            return np.asarray(ids[: -len(behind)], dtype=np.int64)
        return np.asarray(prompt_ids(self._tokenizer, whole), dtype=np.int64)

    def tail(self, question: str, answer: str) -> np.ndarray:
        """What a prompt ends with, (n,) int64: the question, the chat's end and the beginning of the answer."""
        if self.chat and self._closed[-1:].isspace():
            answer = answer.lstrip(" ")
        return self._between([question + self._closed + answer], WORD, "", special=True)[0]

    def _between(self, texts: Sequence[str], after: str, before: str, special: bool) -> list[np.ndarray]:
        front, behind = self._encode([after], special)[0], []
        if before:
            behind = _without(self._encode([after + before], special)[0], front)
        whole = self._encode([after + text + before for text in texts], special)
        pieces = []
        for text, ids in zip(texts, whole, strict=True):
            piece = _without(ids, front)
            if piece is not None and behind:
                piece = piece[: -len(behind)] if piece[-len(behind) :] == behind else None
            pieces.append(np.asarray(self._encode([text], special)[0] if piece is None else piece, dtype=np.int64))
        return pieces

    def _encode(self, texts: Sequence[str], special: bool) -> list[list[int]]:
        with encoding_by(self._tokenizer.name_or_path):
            encoded = self._tokenizer(list(texts), add_special_tokens=False, split_special_tokens=not special, **WHOLE)
        return encoded["input_ids"]


def _without(ids: list[int], front: list[int]) -> list[int] | None:
    """The ids behind `front`; None where a token stands across the place."""
    return ids[len(front) :] if ids[: len(front)] == front else None


def _chat_frame(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """What a chat template puts in front of a user's first message, and behind it up to the answer."""
    if not tokenizer.chat_template:
        raise UsageError("--chat: this model's tokenizer has no chat template; leave --chat out")
    with closing(ChatTemplate(tokenizer)) as template:
        text = template.render([{"role": "user", "content": TASK}], add_generation_prompt=True)
    if text.count(TASK) != 1:
        raise LandmarkError(
            f"the chat template of {tokenizer.name_or_path} does not give a user's message as it is; leave --chat out"
        )
    before, after = text.split(TASK)
    return before, after
