"""Memory that ran out, however Python, numpy, torch, CUDA or the system put it."""

from __future__ import annotations

import errno
import re

SAID = re.compile(
    r"can't allocate memory|cannot allocate memory|not enough memory|unable to allocate|out of memory"
    r"|_STATUS_ALLOC_FAILED|std::bad_alloc|cudaErrorMemoryAllocation",
    re.IGNORECASE,
)
AMOUNT = re.compile(r"(?:tried to allocate|unable to allocate) (\d[\d.]*) ?(bytes|[KMGT]?i?B)", re.IGNORECASE)
ON_GPU = re.compile(r"\bcuda|cublas|cudnn|\bgpu\b|\bhip\b", re.IGNORECASE)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: Python's and numpy's, torch's on CPU and GPU, the system's."""
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError):
        # What the system's error says beside its number is a file's name.
        return error.errno == errno.ENOMEM
    # torch has a class of its own for a GPU's memory only, and asking for that class would mean importing torch.
    return SAID.search(str(error)) is not None


def asked_for(error: BaseException) -> str:
    """Where memory ran out and how much more was wanted, as far as an error says it."""
    where = "GPU memory" if ON_GPU.search(str(error)) else "memory"
    amount = AMOUNT.search(str(error))
    return f"{where} ({_amount(*amount.groups())} more were asked for)" if amount else where


def _amount(number: str, unit: str) -> str:
    if unit.lower() != "bytes":
        return f"{number.rstrip('.')} {unit}"
    return f"{float(number) / 2**30:.2f} GiB" if float(number) >= 2**30 else f"{float(number) / 2**20:.1f} MiB"
