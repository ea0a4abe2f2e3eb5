"""The server's addresses: OpenAI's, /health, and /metrics for Prometheus."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from transformers import PreTrainedTokenizerBase

from landmark_cli.console import counted
from landmark_cli.errors import LandmarkError
from landmark_cli.inference.chat import ChatTemplate
from landmark_cli.serving.encoding import Encoder
from landmark_cli.serving.engine import Closing, Engine, Full
from landmark_cli.serving.metrics import Metrics
from landmark_cli.serving.protocol import Answers, Asked, ChatAsked, CompletionAsked, Refused
from landmark_cli.serving.request import End, Request

# Bytes of JSON that a token of a prompt may take, and what a request may have besides.
TOKEN_BYTES, FURTHER_BYTES = 16, 1 << 20
# How often somebody who waits for a whole answer is looked for.
LOOK_SECONDS = 0.5


@dataclass
class Limits:
    """max_prompt_tokens, max_new_tokens: of one answer. api_key: what requests have to bear, None for nothing."""

    max_prompt_tokens: int
    max_new_tokens: int
    api_key: str | None = None


class Service:
    """What the addresses do. name: what clients call the model."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        limits: Limits,
        template: ChatTemplate | None,
    ) -> None:
        self.engine, self.name, self.limits, self.template = engine, name, limits, template
        self.encoder = Encoder(tokenizer)
        # A template's process is not for several threads at once.
        self._one_chat = asyncio.Lock()

    def models(self) -> dict[str, Any]:
        model = {"id": self.name, "object": "model", "created": 0, "owned_by": "landmark"}
        return {"object": "list", "data": [model]}

    async def complete(self, asked: CompletionAsked, http: HttpRequest) -> Response:
        self._check(asked)
        prompts = asked.prompts()
        if not prompts:
            raise Refused(400, "prompt: there is none", param="prompt")
        return await self._answer(asked, http, await asyncio.gather(*map(self._ids, prompts)), chat=False)

    async def chat(self, asked: ChatAsked, http: HttpRequest) -> Response:
        self._check(asked)
        if self.template is None:
            raise Refused(400, f"{self.name} has no chat template: use /v1/completions", param="messages")
        messages = [message.plain() for message in asked.messages]
        async with self._one_chat:
            try:
                text = await asyncio.to_thread(self.template.render, messages, add_generation_prompt=True)
            except LandmarkError as error:
                raise Refused(400, str(error), param="messages") from None
        return await self._answer(asked, http, [await self._ids(text)], chat=True)

    def _check(self, asked: Asked) -> None:
        if asked.model != self.name:
            raise Refused(404, f"there is no model {asked.model!r} here, only {self.name!r}", code="model_not_found")
        asked.check()
        most = asked.new_tokens()
        if most is not None and most > self.limits.max_new_tokens:
            raise Refused(
                400, f"max_tokens is {most}; at most {self.limits.max_new_tokens} are served", param="max_tokens"
            )

    async def _ids(self, prompt: str | list[int]) -> list[int]:
        ids = prompt
        if isinstance(prompt, str):
            try:
                ids = await self.encoder.ids(prompt)
            except LandmarkError as error:
                raise Refused(400, str(error), param="prompt") from None
        config, most = self.engine.model.config, self.limits.max_prompt_tokens
        if len(ids) > most:
            message = f"the prompt has {counted(len(ids), 'token')}; at most {most} are served"
            raise Refused(400, message, code="context_length_exceeded", param="prompt")
        if not ids or not 0 <= min(ids) <= max(ids) < config.vocab_size or config.landmark_token_id in ids:
            message = "the prompt is empty, or has tokens that are none of the model's text"
            raise Refused(400, message, param="prompt")
        return ids

    async def _answer(self, asked: Asked, http: HttpRequest, prompts: list[list[int]], *, chat: bool) -> Response:
        loop, most = asyncio.get_running_loop(), asked.new_tokens() or self.limits.max_new_tokens
        requests = [Request(ids, sampling, loop) for ids in prompts for sampling in asked.samplings(most)]
        try:
            self.engine.submit(requests)
        except Full:
            raise Refused(429, "too many requests wait already: try again later", code="queue_full") from None
        except Closing:
            raise Refused(503, "the server is being stopped") from None
        answers = Answers(self.name, chat)
        if asked.stream:
            with_usage = asked.stream_options is not None and asked.stream_options.include_usage
            stream = _stream(requests, answers, len(prompts) if with_usage else None)
            return StreamingResponse(stream, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        gathered = asyncio.gather(*map(_whole, requests))
        try:
            while not (await asyncio.wait([gathered], timeout=LOOK_SECONDS))[0]:
                if await http.is_disconnected():
                    return Response(status_code=499)
            texts, ends = zip(*gathered.result(), strict=True)
        except LandmarkError as error:
            raise Refused(500, str(error)) from None
        finally:
            gathered.cancel()
            for request in requests:
                request.cancel()
        return JSONResponse(answers.whole(list(texts), list(ends), len(prompts)))


async def _whole(request: Request) -> tuple[str, End]:
    pieces: list[str] = []
    async with aclosing(request.answer()) as answer:
        async for event in answer:
            if isinstance(event, End):
                return "".join(pieces), event
            pieces.append(event)
    raise AssertionError("an answer has an end")


async def _stream(requests: list[Request], answers: Answers, with_usage: int | None) -> AsyncIterator[str]:
    """Server-sent events: pieces of all answers as they come. with_usage: the number of prompts, where a last event is
    to say what was used."""
    ends: dict[int, End] = {}
    begun: set[int] = set()
    try:
        async with aclosing(_side_by_side(requests)) as events:
            async for index, event in events:
                first = index not in begun
                begun.add(index)
                if isinstance(event, End):
                    ends[index] = event
                    yield _event(answers.piece(index, None, event, first=first))
                else:
                    yield _event(answers.piece(index, event, first=first))
        if with_usage is not None:
            yield _event(answers.usage_piece([ends[index] for index in range(len(requests))], with_usage))
        yield "data: [DONE]\n\n"
    except LandmarkError as error:
        yield _event(Refused(500, str(error)).body())
    finally:
        # A client that goes away ends this generator, and with it the rows of its requests.
        for request in requests:
            request.cancel()


async def _side_by_side(requests: list[Request]) -> AsyncIterator[tuple[int, str | End]]:
    """Pieces and ends of all answers as they come, each with the number of its request. Raises LandmarkError where one
    of them has no answer."""
    if len(requests) == 1:
        # Without a task and a queue of its own, which every piece would have to go through.
        async with aclosing(requests[0].answer()) as answer:
            async for event in answer:
                yield 0, event
        return
    merged: asyncio.Queue = asyncio.Queue()

    async def forward(index: int, request: Request) -> None:
        try:
            async with aclosing(request.answer()) as answer:
                async for event in answer:
                    merged.put_nowait((index, event))
        except LandmarkError as error:
            merged.put_nowait((index, error))

    tasks = [asyncio.create_task(forward(index, request)) for index, request in enumerate(requests)]
    going = len(requests)
    try:
        while going:
            index, event = await merged.get()
            if isinstance(event, LandmarkError):
                raise event
            going -= isinstance(event, End)
            yield index, event
    finally:
        for task in tasks:
            task.cancel()


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"


class Gate:
    """ASGI middleware: who may ask, and how much a request may hold. Raises nothing; answers by itself."""

    def __init__(self, app: Any, limits: Limits, metrics: Metrics) -> None:
        self.app, self.limits, self.metrics = app, limits, metrics
        self.most_bytes = limits.max_prompt_tokens * TOKEN_BYTES + FURTHER_BYTES

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        refused = None
        borne = headers.get(b"authorization", b"").removeprefix(b"Bearer ").strip()
        key = self.limits.api_key
        if key is not None and scope["path"] != "/health" and not hmac.compare_digest(borne, key.encode()):
            refused = Refused(401, "this server needs its key: Authorization: Bearer KEY", code="invalid_api_key")
        elif int(headers.get(b"content-length", b"0") or 0) > self.most_bytes:
            refused = Refused(413, f"a request may have {counted(self.most_bytes, 'byte')}")
        if refused is not None:
            self.metrics.refusals.labels(refused.status).inc()
            await JSONResponse(refused.body(), refused.status)(scope, receive, send)
            return
        left = self.most_bytes

        async def bounded() -> Any:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                raise Refused(413, f"a request may have {counted(self.most_bytes, 'byte')}")
            return message

        await self.app(scope, bounded, send)


def build_app(service: Service, metrics: Metrics) -> FastAPI:
    """The application that uvicorn runs."""
    app = FastAPI(title="landmark", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Gate, limits=service.limits, metrics=metrics)

    @app.exception_handler(Refused)
    async def refuse(_: HttpRequest, error: Refused) -> JSONResponse:
        metrics.refusals.labels(error.status).inc()
        return JSONResponse(error.body(), error.status)

    @app.exception_handler(RequestValidationError)
    async def invalid(http: HttpRequest, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            at, why = first["loc"][-1], first["ctx"]["error"]
            return await refuse(http, Refused(400, f"the body is no JSON, from character {at} on: {why}"))
        place = ".".join(str(part) for part in first["loc"] if part != "body")
        return await refuse(http, Refused(400, f"{place or 'body'}: {first['msg']}", param=place or None))

    @app.exception_handler(HTTPException)
    async def no_such(http: HttpRequest, error: HTTPException) -> JSONResponse:
        return await refuse(http, Refused(error.status_code, f"{http.method} {http.url.path}: {error.detail}"))

    @app.exception_handler(Exception)
    async def unforeseen(http: HttpRequest, error: Exception) -> JSONResponse:
        return await refuse(http, Refused(500, f"something went wrong in the server ({type(error).__name__})"))

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return service.models()

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if name != service.name:
            raise Refused(404, f"there is no model {name!r} here", code="model_not_found")
        return service.models()["data"][0]

    @app.post("/v1/completions")
    async def completions(asked: CompletionAsked, http: HttpRequest) -> Response:
        return await service.complete(asked, http)

    @app.post("/v1/chat/completions")
    async def chats(asked: ChatAsked, http: HttpRequest) -> Response:
        return await service.chat(asked, http)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics")
    async def prometheus() -> PlainTextResponse:
        return PlainTextResponse(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return app
