"""OpenAI's requests and answers, as far as they are served. What a request has besides is ignored, as it is there,
unless it would change the answer."""

from __future__ import annotations

import time
import uuid
from typing import Any, Literal

from pydantic import BaseModel, Field

from landmark_cli.inference.settings import SamplingSettings
from landmark_cli.serving.request import End

FINISH_REASONS = {"length": "length"}
LARGEST_SEED = 2**32 - 1


class Refused(Exception):
    """A request that gets an error in OpenAI's form."""

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    def body(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class StreamOptions(BaseModel):
    include_usage: bool = False


class Asked(BaseModel):
    """What both kinds of request have. top_k and repetition_penalty are ours."""

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=1000)
    top_p: float = Field(1.0, ge=0, le=1)
    top_k: int = Field(0, ge=0)
    repetition_penalty: float = Field(1.0, ge=0.01, le=100)
    n: int = Field(1, ge=1, le=128)
    stop: str | list[str] | None = None
    seed: int | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None

    def unserved(self) -> list[str]:
        """The fields that ask for what is not served."""
        return [name for name in ("presence_penalty", "frequency_penalty", "logit_bias") if getattr(self, name)]

    def new_tokens(self) -> int | None:
        return self.max_tokens

    def samplings(self, most: int) -> list[SamplingSettings]:
        """One for each of the n answers."""
        seed = uuid.uuid4().int if self.seed is None else self.seed
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [
            SamplingSettings(
                max_new_tokens=most,
                temperature=self.temperature,
                top_p=self.top_p,
                top_k=self.top_k,
                repetition_penalty=self.repetition_penalty,
                stop=[text for text in stop if text],
                seed=(seed + index) % (LARGEST_SEED + 1),
            )
            for index in range(self.n)
        ]


class CompletionAsked(Asked):
    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = None
    echo: bool = False
    suffix: str | None = None
    best_of: int | None = None

    def unserved(self) -> list[str]:
        further = [name for name in ("logprobs", "echo", "suffix") if getattr(self, name)]
        return super().unserved() + further + ["best_of"] * (self.best_of not in (None, self.n))

    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int)):
            return [self.prompt]
        return list(self.prompt)


class Part(BaseModel):
    type: Literal["text"]
    text: str


class Message(BaseModel):
    role: str
    content: str | list[Part]

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text}


class ChatAsked(Asked):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    tools: list[Any] | None = None
    response_format: dict[str, Any] | None = None

    def unserved(self) -> list[str]:
        further = [name for name in ("logprobs", "tools") if getattr(self, name)]
        form = (self.response_format or {}).get("type", "text")
        return super().unserved() + further + ["response_format"] * (form != "text")

    def new_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class Answers:
    """The JSON of the answers to one request, whole or in pieces. chat: in the form of chats."""

    def __init__(self, model: str, chat: bool) -> None:
        self.chat = chat
        self.common = {
            "id": ("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex,
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, texts: list[str], ends: list[End], prompts: int) -> dict[str, Any]:
        choices = []
        for index, (text, end) in enumerate(zip(texts, ends, strict=True)):
            said = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
            choices.append({"index": index, **said, "finish_reason": reason(end), "logprobs": None})
        name = "chat.completion" if self.chat else "text_completion"
        return {**self.common, "object": name, "choices": choices, "usage": usage(ends, prompts)}

    def piece(self, index: int, text: str | None, end: End | None = None, *, first: bool = False) -> dict[str, Any]:
        delta = {**({"role": "assistant"} if first else {}), **({} if text is None else {"content": text})}
        said = {"delta": delta} if self.chat else {"text": text or ""}
        choice = {"index": index, **said, "finish_reason": None if end is None else reason(end), "logprobs": None}
        return {**self.common, "object": self._piece_name, "choices": [choice]}

    def usage_piece(self, ends: list[End], prompts: int) -> dict[str, Any]:
        return {**self.common, "object": self._piece_name, "choices": [], "usage": usage(ends, prompts)}

    @property
    def _piece_name(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"


def reason(end: End) -> str:
    return FINISH_REASONS.get(end.finish, "stop")


def usage(ends: list[End], prompts: int) -> dict[str, Any]:
    """prompts: how many the request had; each has the same number of answers, one after another."""
    each = ends[:: max(1, len(ends) // prompts)]
    prompt, new = sum(end.prompt_tokens for end in each), sum(end.tokens for end in ends)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": sum(end.reused for end in each)},
    }
