"""blockwise: plain PyTorch, made for a CPU, for reading."""

from __future__ import annotations

import torch

from ..blockwise import attend_chunk
from .backend import Backend
from .problem import Problem, knows_no_other_logits


def why_not(problem: Problem) -> str | None:
    if problem.local:
        # A layer without blocks is computed by definition, whoever reads the others.
        return None
    if problem.block_size is None:
        return "landmark_mask makes blocks of any size"
    if not problem.reading:
        return "only reading is made block by block"
    if problem.differentiated:
        return "gradients are asked for"
    if problem.dtype == torch.float64:
        return "q is float64 and blocks are read in float32"
    return knows_no_other_logits("reading block by block", problem)


BLOCKWISE = Backend("blockwise", lambda device: not device.startswith("cuda"), why_not, "blockwise", read=attend_chunk)
