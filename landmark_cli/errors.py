"""What goes wrong in a way that a user can put right."""

from __future__ import annotations

import importlib
import reprlib
from types import ModuleType
from typing import Any

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60


class LandmarkError(Exception):
    """Work that failed: what the user did, what was found, what to do, in one or two lines. Exit code 1."""

    exit_code = 1


class UsageError(LandmarkError):
    """A request that makes no sense as it was put: an option, a recipe key, a combination. Exit code 2."""

    exit_code = 2


class Stopped(LandmarkError):
    """Work that was asked to stop and kept its place: what is kept, how to go on. Exit code 130 for SIGINT, 143 for
    SIGTERM, as a shell gives them."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal


def shown(value: Any) -> str:
    """A value as a message quotes it: short, whatever it is."""
    return _SHORT.repr(value)


def import_extra(module: str, extra: str) -> ModuleType:
    """Import a module that only an optional dependency brings.

    Raises LandmarkError naming the extra of this package when the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != module.partition(".")[0]:
            raise
        raise LandmarkError(
            f"this needs the package {error.name}, which is not installed: pip install 'landmark-cli[{extra}]'"
        ) from error
