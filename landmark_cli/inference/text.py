"""Tokens to text, piece by piece: no half characters, and, while the tokens come, nothing that a stop string may still
take back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HALF_CHARACTER = "\ufffd"
# Tokens of the prompt that are decoded along: some tokenizers drop the space in front of a text's first word.
CONTEXT = 8


class Decoder:
    """Decodes a growing row of tokens: the pieces joined are the row's text.

    context: tokens that stand before the row. special: whether special tokens are part of the text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context: Sequence[int] = (), *, special: bool = False):
        self.tokenizer = tokenizer
        self.special = special
        # What is decoded each time: the tokens since the last place but one at which no character was cut in two. Of
        # their text so many characters were given out, or are the context's.
        self._ids = list(context[-CONTEXT:])
        self._whole = len(self._ids)
        self._given = len(self._text())

    def add(self, tokens: Sequence[int], *, final: bool = False) -> str:
        """Count more tokens in; returns the text that has become certain. final: no more will come, so that half a
        character at the end is given out too."""
        self._ids += tokens
        text = self._text()
        certain = text if final else text.rstrip(HALF_CHARACTER)
        piece = certain[self._given :]
        self._given = max(self._given, len(certain))
        if certain == text:
            self._ids = self._ids[self._whole :]
            self._whole, self._given = len(self._ids), len(self._text())
        return piece

    def _text(self) -> str:
        return self.tokenizer.decode(
            self._ids, skip_special_tokens=not self.special, clean_up_tokenization_spaces=False
        )


def texts_of_blocks(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], size: int, context: Sequence[int] = ()
) -> list[str]:
    """The text of every `size` tokens, special tokens as they are written; joined they are the text of all.

    A character that two blocks have a part of stands in the second. context: tokens that stand before these.
    """
    decoder = Decoder(tokenizer, context, special=True)
    begins = range(0, len(ids), size)
    return [decoder.add(ids[begin : begin + size], final=begin == begins[-1]) for begin in begins]


class TextStream:
    """The text of a growing row of tokens, given out piece by piece; the pieces joined are `text`.

    context: tokens that stand before the row. stop: strings that end the text; `stopped` says whether one was found,
    and the text ends in front of it. Special tokens are left out.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context: Sequence[int] = (), stop: Sequence[str] = ()):
        self.stop = [string for string in stop if string]
        self.text = ""
        self.stopped = False
        self._decoder = Decoder(tokenizer, context)
        self._given = 0

    def add(self, token: int) -> str:
        """Count one more token in; returns the text that has become certain."""
        return self._decode([token], final=False)

    def end(self) -> str:
        """No token comes any more; returns the rest of the text."""
        return self._decode([], final=True)

    def _decode(self, tokens: Sequence[int], final: bool) -> str:
        if self.stopped:
            return ""
        self.text += self._decoder.add(tokens, final=final)
        return self._give(final)

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
