"""Chat templates: small programs that come with a tokenizer, run where they can neither hang nor take all memory.

transformers runs templates in jinja2's sandbox, from which they reach nothing; but a loop of a template may have no
end, and a power or a padding in one may have as many digits as there is memory. So a template runs in a child process
that is stopped in time.
"""

from __future__ import annotations

import json
import multiprocessing
import pickle
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from landmark_cli.errors import LandmarkError
from landmark_cli.file_errors import reason

SECONDS = 5
MEMORY = 1 << 30
LONGEST_CHAT = 64 << 20
# What a fresh interpreter needs, on a busy machine, to be there with a large tokenizer.
START_SECONDS = 120
CHILD = Path(__file__).with_name("template_process.py")


class ChatTemplate:
    """A tokenizer's chat template, ready to turn messages into text.

    The child process is started with the first chat and serves all chats; `close` and the end of this process end it.
    The template is the one that the tokenizer has at that time.
    It is a fresh interpreter, which takes about a second to start: a fork of a process that has threads and native
    libraries may crash in them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._child: subprocess.Popen | None = None
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
            raise self._error(answer["failure"])
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
        if self._child is not None:
            self._pipe.close()
            self._child.kill()
            self._child.wait()
            self._child = self._pipe = None

    def _start(self) -> None:
        try:
            tokenizer = pickle.dumps(self._tokenizer)
        except Exception as error:
            raise self._error(f"its tokenizer cannot be handed to another process ({reason(error)})") from None
        ours, theirs = multiprocessing.Pipe()
        given = json.dumps([[str(path) for path in sys.path], theirs.fileno(), MEMORY, SECONDS])
        try:
            # Isolated, since its path is this process's own. In a session of its own: a terminal's Ctrl-C is for us.
            self._child = subprocess.Popen(
                [sys.executable, "-I", str(CHILD), given],
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        except OSError as error:
            ours.close()
            raise self._error(f"no process could be started for it ({reason(error)})") from None
        finally:
            theirs.close()
        self._pipe = ours
        try:
            ours.send_bytes(tokenizer)
            if not ours.poll(START_SECONDS):
                raise self._failed(f"its process was not there after {START_SECONDS} s")
            answer = json.loads(ours.recv_bytes())
        except (OSError, EOFError):
            raise self._failed("its process ended at once") from None
        if "failure" in answer:
            raise self._failed(f"its process cannot open the tokenizer: {answer['failure']}")

    def _failed(self, why: str) -> LandmarkError:
        self.close()
        return self._error(why)

    def _error(self, why: str) -> LandmarkError:
        name = self._tokenizer.name_or_path
        return LandmarkError(f"the chat template of {name} cannot be used: {why}; give the prompt without it")
