"""How many processes a launcher started on this machine, and how many of its cores each may keep busy."""

from __future__ import annotations

import os


def processes_here() -> int:
    """How many processes of this one's launch, itself among them, share the machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def usable_cores() -> int:
    """The cores that the system lets this process run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_cores() -> int:
    """This process's share of them: all, or fewer when a launcher started several processes here."""
    return max(1, usable_cores() // processes_here())
