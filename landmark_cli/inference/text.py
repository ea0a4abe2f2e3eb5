"""Tokens to text while the tokens come: no half characters, nothing that a stop string may still take back."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

HALF_CHARACTER = "\ufffd"
# Tokens of the prompt that are decoded along: some tokenizers drop the space in front of a text's first word.
CONTEXT = 8


class TextStream:
    """The text of a growing row of tokens, given out piece by piece; the pieces joined are `text`.

    context: tokens that stand before the row. stop: strings that end the text; `stopped` says whether one was found,
    and the text ends in front of it. Special tokens are left out.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context: Sequence[int] = (), stop: Sequence[str] = ()):
        self.tokenizer = tokenizer
        self.stop = [string for string in stop if string]
        self.text = ""
        self.stopped = False
        self._ids = list(context[-CONTEXT:])
        self._decoded = len(self._ids)
        self._begin = 0
        self._given = 0

    def add(self, token: int) -> str:
        """Count one more token in; returns the text that has become certain."""
        self._ids.append(token)
        return self._decode(final=False)

    def end(self) -> str:
        """No token comes any more; returns the rest of the text."""
        return self._decode(final=True)

    def _decode(self, final: bool) -> str:
        if self.stopped:
            return ""
        before, after = (self._text_of(self._ids[self._begin : end]) for end in (self._decoded, len(self._ids)))
        if final or not after.endswith(HALF_CHARACTER):
            self.text += after[len(before) :]
            self._begin, self._decoded = self._decoded, len(self._ids)
        return self._give(final)

    def _text_of(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _give(self, final: bool) -> str:
        found = [at for string in self.stop if (at := self.text.find(string, self._given)) >= 0]
        if found:
            self.text = self.text[: min(found)]
            self.stopped = True
        held = 0 if final or self.stopped else max((_overlap(self.text, string) for string in self.stop), default=0)
        # What was given out stays so, and what may be a stop string's beginning waits.
        piece = self.text[self._given : len(self.text) - held]
        self._given += len(piece)
        return piece


def _overlap(text: str, string: str) -> int:
    """The longest proper beginning of `string` with which `text` ends, in characters."""
    return next((n for n in range(min(len(string) - 1, len(text)), 0, -1) if text.endswith(string[:n])), 0)
