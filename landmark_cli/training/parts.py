"""Long work of the main process alone, for which the others wait."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from landmark_cli.errors import LandmarkError, Stopped


def in_parts(work: Callable[[], Iterator[Any]]) -> None:
    """Have the main process run through `work()`. Every process calls it, and returns when the work is done.

    After each part that the iterator gives, the main process says that it goes on: no process waits for another one
    longer than a part takes, which has to be less than what the collectives of a launch wait.

    Raises, in every process, the LandmarkError (Stopped among them) that the work raises.
    """
    main, failed = PartialState().is_main_process, None
    parts = work() if main else iter(())
    while True:
        ended, words, signal = False, None, None
        if main:
            try:
                next(parts)
            except StopIteration:
                ended = True
            except Exception as error:
                failed = error
                ended, words = True, str(error)
                signal = error.exit_code - 128 if isinstance(error, Stopped) else None
        ended, words, signal = broadcast_object_list([ended, words, signal])
        if failed is not None:
            raise failed
        if words is not None:
            raise LandmarkError(words) if signal is None else Stopped(words, signal)
        if ended:
            return
