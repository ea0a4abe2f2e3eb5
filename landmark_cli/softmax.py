"""Which softmax the layers of a landmark model have, as its config says.

grouped: the paper's. Landmarks share a query's attention out among earlier blocks, and within each block its tokens
share what it got. joint: landmarks choose which blocks are read and do no more; all text that is read shares one
softmax, so that a layer that reads everything attends as it did without landmarks. docs/semantics.md, section 10.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from landmark_cli.errors import LandmarkError

Softmax = Literal["grouped", "joint"]


def softmax_of(config: Any) -> Softmax:
    """What a config says; without a word of it, grouped.

    Raises LandmarkError where it names one that is not known.
    """
    found = getattr(config, "landmark_softmax", None) or "grouped"
    if found not in get_args(Softmax):
        raise LandmarkError(
            f"config.landmark_softmax is {found!r}, and this version knows {' and '.join(get_args(Softmax))}: "
            "a newer version may open the model"
        )
    return found


def is_joint(config: Any) -> bool:
    """Whether landmarks only choose blocks."""
    return softmax_of(config) == "joint"


def check_softmax(softmax: Softmax) -> None:
    """Raise ValueError for an argument that names none."""
    if softmax not in get_args(Softmax):
        raise ValueError(f"softmax is {softmax!r}; take {' or '.join(map(repr, get_args(Softmax)))}")


def keep_softmax(config: Any, softmax: Softmax) -> None:
    """Write it into a config, as far as it is not as usual."""
    if softmax != "grouped":
        config.landmark_softmax = softmax
    elif hasattr(config, "landmark_softmax"):
        del config.landmark_softmax
