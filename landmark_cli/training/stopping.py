"""When a run of several processes is to stop before its end, all of them stop after the same step."""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributed as dist

from landmark_cli.errors import LandmarkError


class Vote:
    """What the processes of a run want before each step; all of them learn the largest of these numbers.

    wanted: a number, 0 for going on. One process votes alone: the outcome is what it wants at the end of
    the step. Of several, what they wanted before the step is reduced while the step goes on, between their CPUs, so no
    GPU waits for the vote and nobody waits for the network: what comes up in one step is answered after the next.
    """

    def __init__(self) -> None:
        self._group = None
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            try:
                self._group = dist.new_group(backend="gloo")
            except RuntimeError as error:
                raise LandmarkError(
                    "the processes of this run do not reach each other over the network by their hosts' names "
                    f"({str(error).splitlines()[0]}): name the interface that joins them in GLOO_SOCKET_IFNAME"
                ) from error
        self._ballot: Tensor | None = None

    def begin(self, wanted: int) -> None:
        """Vote before a step. Every process calls it."""
        if self._group is not None:
            self._ballot = torch.tensor([wanted])
            self._work = dist.all_reduce(self._ballot, dist.ReduceOp.MAX, group=self._group, async_op=True)

    def end(self, wanted: int) -> int:
        """The outcome, after the step. wanted: what this process wants by now, which counts where it is the only one.

        Raises LandmarkError where another process is not there any more.
        """
        if self._group is None:
            return wanted
        try:
            self._work.wait()
        except RuntimeError as error:
            raise LandmarkError("another process of this run has ended, so this one ends too") from error
        return int(self._ballot)
