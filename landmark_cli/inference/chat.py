"""Chat templates: small programs that come with a tokenizer, run where they can neither hang nor take all memory.

transformers runs templates in jinja2's sandbox, from which they reach nothing; but a loop of a template may have no
end, and a power or a padding in one may have as many digits as there is memory. So a template runs in a child process
that is stopped in time.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from landmark_cli.errors import LandmarkError
from landmark_cli.files import reason

SECONDS = 5
MEMORY = 1 << 30
LONGEST_CHAT = 64 << 20


class ChatTemplate:
    """A tokenizer's chat template, ready to turn messages into text.

    The child process is forked with the first chat and serves all chats; `close` and the end of this process end it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._child = 0
        self._pipe: Connection | None = None

    def render(self, messages: list[dict[str, str]], **options: Any) -> str:
        """The text of a chat. options: as `apply_chat_template` takes them.

        Raises LandmarkError where the template fails, takes longer than SECONDS or more than MEMORY.
        """
        # A child that ended may have been ended by somebody else, such as a system that is short of memory: a template
        # is to blame where the next one ends too.
        answer = self._ask(messages, options) or self._ask(messages, options)
        if answer is None:
            raise self._failed(f"it took more than {MEMORY >> 30} GB of memory, or wrote without end")
        if "failure" in answer:
            raise self._failed(answer["failure"])
        return answer["text"]

    def _ask(self, messages: list[dict[str, str]], options: dict[str, Any]) -> dict[str, str] | None:
        """What the child process answers, or None where it ended. LandmarkError where it takes longer than SECONDS."""
        if self._pipe is None:
            self._start()
        try:
            self._pipe.send((messages, options))
            if not self._pipe.poll(SECONDS):
                raise self._failed(f"it ran for more than {SECONDS} s")
            return json.loads(self._pipe.recv_bytes(LONGEST_CHAT))
        except (OSError, EOFError):
            self.close()
            return None

    def close(self) -> None:
        """End the child process. A later `render` starts another."""
        if self._pipe is not None:
            self._pipe.close()
            os.kill(self._child, signal.SIGKILL)
            os.waitpid(self._child, 0)
            self._pipe = None

    def _start(self) -> None:
        ours, theirs = multiprocessing.Pipe()
        with warnings.catch_warnings():
            # Newer Pythons warn of forks beside threads; this child takes no lock that a thread may hold.
            warnings.simplefilter("ignore", DeprecationWarning)
            self._child = os.fork()
        if self._child == 0:
            try:
                ours.close()
                _serve(self._tokenizer, theirs)
            finally:
                os._exit(1)
        theirs.close()
        self._pipe = ours

    def _failed(self, why: str) -> LandmarkError:
        self.close()
        name = self._tokenizer.name_or_path
        return LandmarkError(f"the chat template of {name} cannot be used: {why}; give the prompt without it")


def _serve(tokenizer: PreTrainedTokenizerBase, pipe: Connection) -> None:
    """The child process: turn chats into text until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _limit_memory()
    while True:
        try:
            messages, options = pipe.recv()
        except EOFError:
            return
        # For when nobody is left to stop this process.
        signal.alarm(2 * SECONDS)
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
            answer = {"text": text.encode("utf-8").decode("utf-8")}
        except Exception as error:
            answer = {"failure": reason(error)}
        pipe.send_bytes(json.dumps(answer).encode())
        signal.alarm(0)


def _limit_memory() -> None:
    statm = Path("/proc/self/statm")
    if statm.exists():
        used = int(statm.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        allowed = used + MEMORY if hard == resource.RLIM_INFINITY else min(used + MEMORY, hard)
        resource.setrlimit(resource.RLIMIT_AS, (allowed, hard))
