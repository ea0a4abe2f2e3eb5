"""`landmark serve`."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from landmark_cli.commands.models import ModelOptions, name_model, open_model
from landmark_cli.console import counted, info
from landmark_cli.errors import LandmarkError, import_extra
from landmark_cli.file_errors import writing
from landmark_cli.file_writing import check_folder
from landmark_cli.inference.settings import ReadingSettings
from landmark_cli.interrupts import Interrupts, interrupts
from landmark_cli.options import LONGEST, Options, option

if TYPE_CHECKING:
    import uvicorn

SERVER, LIMITS, MEMORY = "Server", "Limits", "Memory"
KEY_VARIABLE = "LANDMARK_API_KEY"
GIB = 2**30
# What many small models answer to where nobody says how much.
NEW_TOKENS = 4096
LOOK_SECONDS = 0.1
# After how long a thread that runs Python has to let another one do so. The engine's lets others whenever it calls the
# device, a thousand times a second, and would wait ten times as long each time by default.
SWITCH_SECONDS = 5e-4


@dataclass
class ServerOptions(Options):
    """Where the server listens, how much it takes, and what it keeps."""

    host: str = option("127.0.0.1", panel=SERVER, help="Address to listen on; 0.0.0.0 for all of this machine's.")
    port: int = option(8000, panel=SERVER, min=0, max=65535, help="Port to listen on; 0 for any that is free.")
    name: str | None = option(
        None, panel=SERVER, help="What clients call the model. [default: the last part of --model]"
    )
    api_key: str | None = option(
        None,
        panel=SERVER,
        saved=False,
        in_recipe=False,
        help=f"Key that every request has to bear. [default: the environment's {KEY_VARIABLE}; without one, none]",
    )
    rows: int = option(
        16, panel=LIMITS, min=1, max=4096, help="Requests read and answered together.", saves_memory="fewer --rows"
    )
    queue: int = option(256, panel=LIMITS, min=0, help="Requests that may wait for a row; more are refused.")
    max_prompt_tokens: int = option(131072, panel=LIMITS, min=1, max=LONGEST, help="Longest prompt, in tokens.")
    max_new_tokens: int = option(
        NEW_TOKENS, panel=LIMITS, min=1, help="Most tokens of an answer, and how many a request gets that names none."
    )
    memory_budget: float = option(
        4.0,
        panel=MEMORY,
        min=0,
        max=10**6,
        help="GiB of host memory for what was read, from which later requests that begin alike go on; 0 for none.",
        saves_memory="a smaller --memory-budget",
    )
    memory_dir: Path | None = option(
        None, panel=MEMORY, help="Folder for memories that have no room, and for all of them when the server stops."
    )


@dataclass
class ServeOptions(ReadingSettings, ModelOptions, ServerOptions):
    """Answer requests over HTTP, as OpenAI's API does.

    Serves /v1/models, /v1/completions and /v1/chat/completions, whole or streamed, /health, and /metrics for
    Prometheus. Requests are read and answered together, and one that begins with what was read before goes on from
    there. SIGTERM finishes what was asked, then stops.
    """


def run(options: ServeOptions) -> int:
    """Serve until a signal comes, and finish what was asked by then. Returns how many answers came to their end.

    Raises LandmarkError where a package is missing, the model has no landmarks, or the address cannot be listened on.
    """
    for module in ("fastapi", "uvicorn", "prometheus_client"):
        import_extra(module, "serve")
    if options.memory_dir is not None:
        with writing(options.memory_dir, "--memory-dir"):
            options.memory_dir.mkdir(parents=True, exist_ok=True)
        check_folder(options.memory_dir, "--memory-dir")
    with closing(listen(options.host, options.port)) as listening:
        name = name_model(options)
        model, tokenizer = open_model(name, options)
        from landmark_cli.inference.chat import ChatTemplate
        from landmark_cli.serving.api import Limits, Service, build_app
        from landmark_cli.serving.engine import Engine
        from landmark_cli.serving.memories import PrefixMemories
        from landmark_cli.serving.metrics import Metrics

        template = ChatTemplate(tokenizer) if tokenizer.chat_template else None
        if template is not None:
            # Its process is there before the first request waits for it, and a bad template is told of now.
            template.render([{"role": "user", "content": "Hello"}], add_generation_prompt=True)
        keeps = options.memory_budget > 0 or options.memory_dir is not None
        memories = PrefixMemories(int(options.memory_budget * GIB), options.memory_dir) if keeps else None
        metrics = Metrics()
        engine = Engine(
            model, tokenizer, options, rows=options.rows, queue=options.queue, memories=memories, watch=metrics
        )
        metrics.follow(engine)
        key = options.api_key or os.environ.get(KEY_VARIABLE) or None
        limits = Limits(options.max_prompt_tokens, options.max_new_tokens, key)
        called = options.name or Path(name).name
        app = build_app(Service(engine, tokenizer, called, limits, template), metrics)
        sys.setswitchinterval(SWITCH_SECONDS)
        engine.start()
        with interrupts("finishing what was asked") as asked:
            host, port = listening.getsockname()[:2]
            info(f"serving {called} at http://{host}:{port}/v1 ({options.rows} requests at a time)")
            asyncio.run(serve_until(asked, app, listening))
            engine.close()
        if template is not None:
            template.close()
    info(f"stopped; {counted(metrics.given, 'answer')} given")
    return metrics.given


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens, before the model is opened for it. Raises LandmarkError."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise LandmarkError(f"--host {host} --port {port} cannot be listened on: {error.strerror or error}") from error


async def serve_until(asked: Interrupts, app: Any, listening: socket.socket) -> None:
    """Run the application until somebody asks to stop, then until all connections have their answers."""
    import uvicorn

    server = quiet_server(uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off"))
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    while not asked and not serving.done():
        await asyncio.sleep(LOOK_SECONDS)
    server.should_exit = True
    await serving


def quiet_server(config: uvicorn.Config) -> uvicorn.Server:
    """A server that leaves signals to `interrupts`."""
    import contextlib

    import uvicorn

    class Server(uvicorn.Server):
        def capture_signals(self) -> contextlib.AbstractContextManager[None]:
            return contextlib.nullcontext()

    return Server(config)
