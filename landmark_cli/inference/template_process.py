"""The process in which chat templates run: a fresh interpreter, bounded in memory, started by `ChatTemplate`.

It is run as a file and imports nothing of landmark, with which models and torch would come: seconds for nothing.
"""

import json
import os
import pickle
import resource
import signal
import sys
from multiprocessing.connection import Connection
from pathlib import Path


def serve(pipe: Connection, memory: int, seconds: int) -> None:
    """Turn chats into text until the pipe is closed.

    pipe: through it come a tokenizer and then chats, each a pair of messages and options of `apply_chat_template`.
    Back goes a JSON object for each: with a failure in words, or with a chat's text, or empty for the tokenizer.
    memory: bytes that templates may take.
    seconds: when twice as many have passed, a template is ended even where nobody is left to end this process.
    """
    try:
        tokenizer = pickle.loads(pipe.recv_bytes())
        answer = {}
    except Exception as error:
        answer = {"failure": _reason(error)}
    _limit_memory(memory)
    pipe.send_bytes(json.dumps(answer).encode())
    while True:
        try:
            messages, options = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        signal.alarm(2 * seconds)
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
            answer = {"text": text.encode("utf-8").decode("utf-8")}
        except Exception as error:
            answer = {"failure": _reason(error)}
        pipe.send_bytes(json.dumps(answer).encode())
        signal.alarm(0)


def _reason(error: Exception) -> str:
    """Why a template failed, in a few words of one line."""
    if isinstance(error, RecursionError):
        return "nested too deep"
    if isinstance(error, MemoryError):
        return "out of memory"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


def _limit_memory(memory: int) -> None:
    statm = Path("/proc/self/statm")
    if statm.exists():
        used = int(statm.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        allowed = used + memory if hard == resource.RLIM_INFINITY else min(used + memory, hard)
        resource.setrlimit(resource.RLIMIT_AS, (allowed, hard))


if __name__ == "__main__":
    path, descriptor, memory, seconds = json.loads(sys.argv[1])
    sys.path[:] = path
    serve(Connection(descriptor), memory, seconds)
