"""What a backend is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..retrieval import Read
from .problem import Problem


@dataclass(frozen=True)
class Backend:
    """One way to compute landmark attention.

    meant_for: whether it is tried unasked on a device. why_not: why it cannot serve a problem, naming the argument and
    what is allowed; None if it can.
    forward, backward: of the operators (operators.py), whose arguments they take: (q, k, v, sinks, *settings) -> (out,
    lse) and (dout, dlse, q, k, v, sinks, out, lse, *settings) -> (dq, dk, dv, dsinks), sinks and their gradient being
    None where there are none. None: the definition, which autograd differentiates.
    reads_as: the name of the backend that reads, and that serves layers with a sliding window, where this one is asked
    for; None: whoever does unasked. read: attention of a chunk through the cache, (q, k, v, blocks, chunk, scale,
    context_miss_key, traced) -> Read, to which softcap and sinks come by name where there are some; None where another
    one reads.
    recorded: whether shapes of what it reads do not depend on what has been read, so that CUDA graphs can record it.
    stores_first: whether it stores a chunk before it reads, so that chunks that follow one another can be read side by
    side, as rows.
    retrieve_forward, retrieve_backward: of the operators of window_operators.py, whose arguments they take; None: the
    definition, or another one.
    local_forward, local_backward: of the operators of local_operators.py, whose arguments they take; None: the
    definition, or another one.
    local_read: attention of a chunk in a layer that holds text, (q, k, v, held, chunk, frequencies, scale, softcap,
    sinks) -> out, see local.attend_chunk; None: the definition.
    tried: whether it is tried unasked for a problem, on the devices it is meant for.
    """

    name: str
    meant_for: Callable[[str], bool]
    why_not: Callable[[Problem], str | None]
    reads_as: str | None
    forward: Callable[..., tuple[Tensor, Tensor]] | None = None
    backward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor | None]] | None = None
    read: Callable[..., Read] | None = None
    recorded: bool = False
    stores_first: bool = False
    retrieve_forward: Callable[..., tuple[Tensor, ...]] | None = None
    retrieve_backward: Callable[..., tuple[Tensor | None, ...]] | None = None
    local_forward: Callable[..., tuple[Tensor, Tensor | None]] | None = None
    local_backward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor | None]] | None = None
    local_read: Callable[..., Tensor] | None = None
    tried: Callable[[Problem], bool] = lambda problem: True
