"""Work ahead in a background thread."""

from __future__ import annotations

import atexit
import queue
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")
_END = object()


def prefetched(items: Iterable[Item], depth: int = 2) -> Iterator[Item]:
    """The same items, made up to `depth` ahead in a background thread.

    What the source raises is raised here, in its place among the items. Closing this generator stops the thread, and
    closes a source that is a generator. The end of the program does so too, since a thread that still runs then can
    crash in native code.
    """
    ready: queue.Queue = queue.Queue(depth)
    stopped = threading.Event()

    def put(item: object) -> bool:
        while not stopped.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        source = iter(items)
        try:
            for item in source:
                if not put((item, None)):
                    break
            else:
                put((_END, None))
        except BaseException as error:
            put((_END, error))
        finally:
            if hasattr(source, "close"):
                source.close()

    def stop() -> None:
        stopped.set()
        thread.join()

    thread = threading.Thread(target=work, daemon=True, name="landmark-prefetch")
    atexit.register(stop)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            if item is _END:
                return
            yield item
    finally:
        stop()
        atexit.unregister(stop)
