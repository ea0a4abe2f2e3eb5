"""What Prometheus is told."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from landmark_cli.serving.engine import Engine
from landmark_cli.serving.request import End

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """The figures of one server, in a registry of its own. given: answers that came to their end."""

    def __init__(self) -> None:
        self.given = 0
        self.registry = CollectorRegistry()
        of = {"registry": self.registry, "namespace": "landmark"}
        self.answers = Counter("answers", "Answers that came to their end, by why they ended.", ["finish"], **of)
        self.refusals = Counter("refusals", "Requests refused, by HTTP status.", ["status"], **of)
        self.prompt_tokens = Counter("prompt_tokens", "Tokens of prompts.", **of)
        self.reused_tokens = Counter("reused_tokens", "Tokens of prompts that a memory held already.", **of)
        self.generated_tokens = Counter("generated_tokens", "Tokens generated.", **of)
        self.first = Histogram("time_to_first_token_seconds", "From request to first token.", buckets=SECONDS, **of)
        self.whole = Histogram("request_seconds", "From request to the end of its answer.", buckets=SECONDS, **of)
        self.seconds = Counter(
            "engine_seconds", "Where the engine's time went, waiting for the device included.", ["part"], **of
        )
        self._gauges = {
            name: Gauge(name, about, **of)
            for name, about in (
                ("running", "Requests that have a row."),
                ("waiting", "Requests that wait for one."),
                ("memory_bytes", "Memories of prompts, in host memory."),
                ("http_cpu_seconds", "Processor time of the thread that talks to clients."),
            )
        }
        # That thread is the one that asks for the figures.
        self._gauges["http_cpu_seconds"].set_function(time.thread_time)

    def follow(self, engine: Engine) -> None:
        """Take the gauges from an engine, whenever somebody asks."""
        self._gauges["running"].set_function(lambda: engine.running)
        self._gauges["waiting"].set_function(lambda: engine.waiting)
        memories = engine.memories
        self._gauges["memory_bytes"].set_function(lambda: 0 if memories is None else memories.nbytes)

    def first_token(self, seconds: float) -> None:
        self.first.observe(seconds)

    def ended(self, end: End, seconds: float) -> None:
        self.given += 1
        self.answers.labels(end.finish).inc()
        self.prompt_tokens.inc(end.prompt_tokens)
        self.reused_tokens.inc(end.reused)
        self.generated_tokens.inc(end.tokens)
        self.whole.observe(seconds)

    def spent(self, part: str, seconds: float) -> None:
        self.seconds.labels(part).inc(seconds)

    def text(self) -> bytes:
        return generate_latest(self.registry)
