"""OpenAI's requests and answers, as far as they are served.

Every field of a request is one of four kinds: served, which are the fields of the classes below; WITHOUT_EFFECT; those
of UNSERVED, refused by name unless their value asks for nothing; and fields that no API of OpenAI's has, which are
refused as it refuses them.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from landmark_cli.inference.settings import SamplingSettings
from landmark_cli.options import LARGEST, LARGEST_SEED
from landmark_cli.serving.request import End

FINISH_REASONS = {"length": "length"}

# What says whose request it is, how it is billed, kept or cached, and changes no answer.
WITHOUT_EFFECT = frozenset(
    {
        "annotations",
        "include_obfuscation",
        "metadata",
        "parallel_tool_calls",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)
# What would change an answer and is not served, with the values that ask for nothing; null is always one.
UNSERVED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("auto", "none"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "moderation": (),
    "name": (),
    "presence_penalty": (0,),
    "reasoning_effort": ("none",),
    "refusal": (),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_call_id": (),
    "tool_calls": ([],),
    "tool_choice": ("auto", "none"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": ("medium",),
    "web_search_options": (),
}


class Refused(Exception):
    """A request that gets an error in OpenAI's form."""

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    def body(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class Part(BaseModel):
    """Of a request; fields that it does not name are kept, to be looked at."""

    model_config = ConfigDict(extra="allow")
    # The fields of UNSERVED and WITHOUT_EFFECT that OpenAI's API has here.
    further: ClassVar[frozenset[str]] = frozenset()

    def check(self, place: str = "") -> None:
        """Raise Refused for a field that is not served and asks for something, or that there is not."""
        for name, value in (self.model_extra or {}).items():
            called = place + name
            if name not in self.further:
                raise Refused(400, f"Unknown parameter: '{called}'.", code="unknown_parameter", param=called)
            if name in UNSERVED and value is not None and not self.asks_for_nothing(name, value):
                raise Refused(400, f"{called} is not served: leave it out", param=called)
        for inner, part in self.parts():
            part.check(f"{place}{inner}.")

    def asks_for_nothing(self, name: str, value: Any) -> bool:
        # 0 and False are equal, and logprobs 0 asks for the chosen tokens' own.
        return any(
            value == nothing and isinstance(value, bool) == isinstance(nothing, bool) for nothing in UNSERVED[name]
        )

    def parts(self) -> Iterator[tuple[str, Part]]:
        """The parts that it has, with their places."""
        yield from ()


class StreamOptions(Part):
    further = frozenset({"include_obfuscation"})
    include_usage: bool = False


class Asked(Part):
    """What both kinds of request have. top_k and repetition_penalty are ours."""

    further = frozenset({"frequency_penalty", "logit_bias", "logprobs", "presence_penalty", "user"})
    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=1000)
    top_p: float = Field(1.0, ge=0, le=1)
    top_k: int = Field(0, ge=0, le=LARGEST)
    repetition_penalty: float = Field(1.0, ge=0.01, le=100)
    n: int = Field(1, ge=1, le=128)
    stop: str | list[str] | None = None
    seed: int | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    def parts(self) -> Iterator[tuple[str, Part]]:
        if self.stream_options is not None:
            yield "stream_options", self.stream_options

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
    further = Asked.further | {"best_of", "echo", "suffix"}
    prompt: str | list[str] | list[int] | list[list[int]]

    def asks_for_nothing(self, name: str, value: Any) -> bool:
        # The best n of n answers are these.
        return super().asks_for_nothing(name, value) or (name == "best_of" and value == self.n)

    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int)):
            return [self.prompt]
        return list(self.prompt)


class TextPart(Part):
    type: Literal["text"]
    text: str


class Message(Part):
    further = frozenset({"annotations", "audio", "function_call", "name", "refusal", "tool_call_id", "tool_calls"})
    role: str
    content: str | list[TextPart]

    def parts(self) -> Iterator[tuple[str, Part]]:
        if not isinstance(self.content, str):
            yield from ((f"content.{index}", part) for index, part in enumerate(self.content))

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text}


class ChatAsked(Asked):
    further = Asked.further | {
        "audio", "function_call", "functions", "metadata", "modalities", "moderation", "parallel_tool_calls",
        "prediction", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "reasoning_effort",
        "response_format", "safety_identifier", "service_tier", "store", "tool_choice", "tools", "top_logprobs",
        "verbosity", "web_search_options",
    }  # fmt: skip
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    def parts(self) -> Iterator[tuple[str, Part]]:
        yield from super().parts()
        yield from ((f"messages.{index}", message) for index, message in enumerate(self.messages))

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
