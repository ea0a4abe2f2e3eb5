"""Kernels that are given up for the rest of the process once they have failed."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ...console import warn


class Fallible:
    """Kernels of which only a call tells whether they run on this machine; the Triton kernels run in their place.

    failure: what cannot what ("cuDNN 91900 does not attend here"), if that is why a call raised an error; None for any
    other error, which is raised.
    given_up: why they were given up for the rest of the process, once they were.
    """

    def __init__(self, failure: Callable[[Exception], str | None]) -> None:
        self.failure = failure
        self.given_up: str | None = None

    def call(self, function: Callable[..., tuple[Tensor, ...]], *arguments) -> tuple[Tensor, ...] | None:
        """What a function of these kernels gives; None where they cannot, now and for the rest of the process."""
        if self.given_up is not None:
            return None
        try:
            return function(*arguments)
        except Exception as error:
            failure = self.failure(error)
            if failure is None:
                raise
            words = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
            self.given_up = f"{failure} ({words})"
            warn(f"{self.given_up}; the Triton kernels run instead")
            return None


def or_else(function: Callable[..., tuple | None], otherwise: Callable[..., tuple]) -> Callable[..., tuple]:
    """A backend's forward or backward: what a function gives of its arguments, or, if that is None, `otherwise`."""

    def attend(*given):
        found = function(*given)
        return otherwise(*given) if found is None else found

    return attend
