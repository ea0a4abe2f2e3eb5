"""Which tensor of the raw weights belongs to which tensor of the tuned weights, and whether both are one kind of
model."""

from __future__ import annotations

from dataclasses import dataclass

from landmark_cli.errors import LandmarkError
from landmark_cli.families import EMBEDDINGS, HEADS
from landmark_cli.weight_diff.bits import can_cast
from landmark_cli.weight_diff.checkpoint import Checkpoint, Tensor


@dataclass(frozen=True)
class Pair:
    """A tensor of the tuned weights (or of their difference) and the raw tensor that it differs from.

    raw: None for a tensor that stands for itself. shared: how many leading elements both have; what comes after them
    are the rows of new tokens.
    """

    tensor: Tensor
    raw: Tensor | None
    shared: int


def is_parameter(name: str) -> bool:
    """Whether a tensor is a weight of the model, not a buffer such as `rotary_emb.inv_freq`."""
    return name.endswith((".weight", ".bias"))


def pair(tuned: Checkpoint, raw: Checkpoint) -> list[Pair]:
    """A pair for every tensor of `tuned`, in the order of `tuned`. `raw` may have fewer tokens, and other buffers.

    A head that the raw model ties to its embedding is paired with the embedding.
    Raises LandmarkError naming the first tensor that shows that the two are different models.
    """
    pairs, problems = [], []
    for tensor in tuned.tensors.values():
        under = raw.tensors.get(tensor.name) or _tied_embedding(tensor.name, raw)
        if under is None and is_parameter(tensor.name):
            problems.append(f"it has no {tensor.name}")
        elif under is None:
            pairs.append(Pair(tensor, None, 0))
        elif not _fits(tensor, under, raw.vocab_size):
            problems.append(f"{tensor.name} is {under.size} in it and {tensor.size} in {tuned.role}")
        elif can_cast(under.dtype, tensor.dtype):
            pairs.append(Pair(tensor, under, under.count))
        elif is_parameter(tensor.name):
            problems.append(f"{tensor.name} is {under.dtype} in it and {tensor.dtype} in {tuned.role}")
        else:
            pairs.append(Pair(tensor, None, 0))
    problems += [
        f"{tuned.role} has no {name}"
        for name in raw.tensors
        if name not in tuned.tensors and is_parameter(name) and name not in HEADS
    ]
    if problems:
        more = f" (and {len(problems) - 1} more such tensors)" if len(problems) > 1 else ""
        raise LandmarkError(
            f"{raw.role} {raw.folder}: not the model that was fine-tuned: {problems[0]}{more}; give its raw weights"
        )
    return pairs


def _tied_embedding(name: str, raw: Checkpoint) -> Tensor | None:
    embeddings = [tensor for tensor in raw.tensors.values() if tensor.name.endswith(tuple(EMBEDDINGS))]
    return embeddings[0] if name in HEADS and len(embeddings) == 1 else None


def _fits(tensor: Tensor, raw: Tensor, vocab_size: int | None) -> bool:
    if tensor.shape == raw.shape:
        return True
    grown = tensor.shape[1:] == raw.shape[1:] and len(tensor.shape) == len(raw.shape) and tensor.count > raw.count
    return grown and raw.shape[0] == vocab_size
