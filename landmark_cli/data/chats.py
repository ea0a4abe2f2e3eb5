"""Rows of chats -> documents: the text that a chat template makes of messages, the assistant's turns as answers."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from landmark_cli.data.documents import BadText, Document, Marked, bad_document, marked_pieces, no_such_field
from landmark_cli.errors import LandmarkError

ASSISTANT = "assistant"
MESSAGES = "messages"
"""The field that holds the messages, unless another one is named."""


@dataclass(frozen=True)
class Chats:
    """How the rows of a corpus become documents.

    render: messages, and options as transformers' `apply_chat_template` takes them -> the text; raises LandmarkError
    where the template fails. close: ends what `render` started, and a later `render` starts it again: a process that
    renders holds the files that were open when it was started, locks among them. template: what tells one template from
    another. field: the field with the messages, each an object with a role and a content.
    """

    render: Callable[..., str]
    close: Callable[[], None]
    template: str
    field: str = MESSAGES

    @property
    def identity(self) -> list[str]:
        """What has to be the same for the documents to be the same."""
        return [self.field, hashlib.sha256(self.template.encode()).hexdigest()]

    def document(self, name: str, row: Mapping[str, Any], file: str | Path, size: int = 0) -> Document:
        """A row as a document; one that holds no messages is bad. name: for messages. size: bytes of the row."""
        if self.field not in row:
            return bad_document(BadText(no_such_field(name, self.field, row), file), size)
        if not _are_messages(row[self.field]):
            why = f"the field {self.field!r} holds no messages, each with a role and a content that is text"
            return bad_document(BadText(f"{name}: {why}", file), size)
        tools = {"tools": row["tools"]} if row.get("tools") else {}
        return Document(name, size, partial(self._pieces, name, row[self.field], tools, file))

    def _pieces(
        self, name: str, messages: list[dict[str, Any]], tools: dict[str, Any], file: str | Path, limit: int
    ) -> Iterator[Marked]:
        try:
            parts = list(self._parts(messages, tools))
        except (LandmarkError, ValueError) as error:
            raise BadText(f"{name}: {str(error).partition(';')[0]}", file) from None
        yield from marked_pieces(name, parts, limit)

    def _parts(self, messages: list[dict[str, Any]], tools: dict[str, Any]) -> Iterator[tuple[str, bool]]:
        """The text of a chat in parts, each with whether it is an answer.

        An answer is what a model has to write: what stands behind the text that it would be given up to then, to the
        end of its turn, with the token that ends the turn and without white space behind that.
        """
        whole, done = self.render(messages, **tools), 0
        for number, message in enumerate(messages):
            if message["role"] != ASSISTANT:
                continue
            before, asked = "", ""
            if number:
                before = self.render(messages[:number], **tools)
                asked = self.render(messages[:number], add_generation_prompt=True, **tools)
            # A prompt may end with more than what every turn begins with, such as the start of a thought.
            start = len(os.path.commonprefix([whole, asked]))
            turn = self.render(messages[: number + 1], **tools).rstrip()
            end = len(turn)
            if not whole.startswith(before) or start < max(len(before.rstrip()), done):
                raise ValueError(
                    f"the chat template writes the turns before turn {number + 1} otherwise when it follows"
                )
            if not whole.startswith(turn):
                raise ValueError(f"the chat template writes turn {number + 1} otherwise when others follow it")
            yield whole[done:start], False
            yield whole[start:end], True
            done = end
        yield whole[done:], False


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(
        isinstance(message, Mapping)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), (str, type(None)))
        for message in value
    )  # fmt: skip
