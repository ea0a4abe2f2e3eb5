"""How the windows of a run are read chunk by chunk: from its options, for its identity, and in words."""

from __future__ import annotations

from typing import Any

from landmark_cli.attention.window import WindowSettings
from landmark_cli.console import counted
from landmark_cli.data.landmarks import usual_top_k
from landmark_cli.data.windows import Windows
from landmark_cli.errors import UsageError


def window_settings(
    chunk: int,
    sequence_length: int,
    landmark_freq: int,
    top_k_blocks: int | None,
    explore: float = 0.0,
    joint: bool = False,
) -> WindowSettings:
    """How windows are read, for chunks of `chunk` stream tokens.

    sequence_length: stream tokens of a window. landmark_freq: text tokens between landmarks. top_k_blocks: None for as
    many as a model retrieves where nobody sets a number. joint: landmarks only choose blocks (softmax.py).

    Raises UsageError where the chunks do not fit the blocks or the windows.
    """
    size = landmark_freq + 1
    if chunk % size:
        fitting = " or ".join(str(n * size) for n in (chunk // size, chunk // size + 1) if n)
        raise UsageError(
            f"--read-chunk {chunk} is no whole number of blocks of --landmark-freq "
            f"{counted(landmark_freq, 'text token')} and a landmark: take {fitting}"
        )
    if sequence_length < chunk:
        raise UsageError(
            f"--sequence-length {sequence_length} holds no whole chunk of --read-chunk {counted(chunk, 'token')}: "
            "take longer windows or a shorter chunk"
        )
    if explore and top_k_blocks == 0:
        raise UsageError("--explore draws the last of --top-k-blocks, and 0 leaves none: take 1 or more")
    # No more than a chunk has itself.
    top_k = usual_top_k(chunk // size, joint) if top_k_blocks is None else top_k_blocks
    return WindowSettings(chunk, size, top_k, explore=explore, joint=joint)


def said_of(read: WindowSettings) -> str:
    """How windows are read, for people."""
    explored = f", the last at random with probability {read.explore:g}" if read.explore else ""
    return f"read in chunks of {counted(read.chunk, 'token')}, each with {read.top_k} of the blocks before it{explored}"


def windows_identity(windows: Windows, read: WindowSettings | None) -> dict[str, Any]:
    """What must stay the same for a run to be resumed exactly, of windows that are not those of a model's trained
    length, cut anywhere and attended to as a whole."""
    identity: dict[str, Any] = {}
    if read is not None:
        identity |= {"sequence_length": windows.sequence_length, "read_chunk": read.chunk, "explore": read.explore}
    if windows.mask_documents:
        identity["mask_documents"] = True
    if windows.pack != "cut":
        identity["pack"] = windows.pack
    if windows.begin:
        identity["begin"] = list(windows.begin)
    return identity
