"""Landmarks in token tensors: put them in, take them out, build targets.

A *text* is what the tokenizer gave. A *stream* is the text with a landmark token after every ``landmark_freq`` text
tokens (arXiv 2305.16300, section 3): block b of ``block_size = landmark_freq + 1`` positions ends with its landmark.
All functions work along the last dimension and leave the others alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

IGNORED_TARGET = -100
"""The target of a position that predicts nothing: transformers' and PyTorch's cross entropy skip it."""
DEFAULT_TOP_K, CHOSEN_TOP_K = 4, 16
"""Blocks that are retrieved where nobody sets a number, and the most of these where landmarks only choose."""


def stream_length(text_length: int, landmark_freq: int) -> int:
    """Positions that ``text_length`` text tokens take with their landmarks, the one after the last whole group too."""
    _check_length("text_length", text_length)
    _check_freq(landmark_freq)
    return text_length + text_length // landmark_freq


def text_length(stream_length: int, landmark_freq: int) -> int:
    """Text tokens among the first ``stream_length`` positions of a stream.

    The inverse of the function ``stream_length``, except that a stream may also be cut right before a landmark.
    """
    _check_length("stream_length", stream_length)
    _check_freq(landmark_freq)
    return stream_length - stream_length // (landmark_freq + 1)


def largest_top_k(trained_length: int, landmark_freq: int) -> int:
    """The most blocks that a model can retrieve within ``trained_length`` positions; below 0 where it cannot read.

    Beside the retrieved blocks stand the incomplete block and a chunk of one block at least, so reading takes two whole
    blocks.
    """
    return trained_length // (landmark_freq + 1) - 2


def default_top_k(trained_length: int, landmark_freq: int, joint: bool = False) -> int:
    """Blocks that a model retrieves where nobody sets a number: 4, or as many as there is room for. joint: where
    landmarks only choose (softmax.py), up to 16 in a quarter of its positions."""
    usual = usual_top_k(trained_length // 4 // (landmark_freq + 1) - 1, joint)
    return max(0, min(usual, largest_top_k(trained_length, landmark_freq)))


def usual_top_k(room: int, joint: bool) -> int:
    """Blocks retrieved where nobody sets a number: 4; where landmarks only choose (joint), which costs a model nothing
    that it has learned, as many as `room`, from 4 to 16."""
    return max(DEFAULT_TOP_K, min(CHOSEN_TOP_K, room)) if joint else DEFAULT_TOP_K


def landmark_positions(length: int, block_size: int, *, device: torch.device | str | None = None) -> Tensor:
    """Where the landmarks of a stream of ``length`` positions stand: a bool mask (length,)."""
    _check_length("length", length)
    _check_block_size(block_size)
    return torch.arange(length, device=device) % block_size == block_size - 1


def insert_landmarks(tokens: Tensor, landmark_freq: int, landmark_token_id: int) -> Tensor:
    """Text (..., n) -> stream (..., n + n // landmark_freq): a landmark after every ``landmark_freq`` tokens.

    A landmark also stands after the last group when that group is complete.

    Raises:
        ValueError: ``landmark_freq`` is below 1, or ``landmark_token_id`` does not fit the dtype of ``tokens``.

    >>> import torch
    >>> landmark_cli.insert_landmarks(torch.arange(5), landmark_freq=2, landmark_token_id=9)
    tensor([0, 1, 9, 2, 3, 9, 4])
    """
    _check_freq(landmark_freq)
    if not 0 <= landmark_token_id <= torch.iinfo(tokens.dtype).max:
        raise ValueError(f"landmark_token_id {landmark_token_id} does not fit tokens of type {tokens.dtype}")
    length = tokens.shape[-1]
    groups = length // landmark_freq
    whole = groups * landmark_freq
    blocks = tokens[..., :whole].unflatten(-1, (groups, landmark_freq))
    blocks = torch.nn.functional.pad(blocks, (0, 1), value=landmark_token_id)
    return torch.cat([blocks.flatten(-2), tokens[..., whole:]], dim=-1)


def remove_landmarks(stream: Tensor, block_size: int) -> Tensor:
    """Stream (..., n) -> its text (..., n - n // block_size): drops every ``block_size``-th position.

    Works for anything that has a value per position, ids and losses alike.
    """
    return stream[..., ~landmark_positions(stream.shape[-1], block_size, device=stream.device)]


def next_token_targets(
    stream: Tensor,
    *,
    landmark_token_id: int | None,
    eot_id: int | None,
    include_landmarks: bool = False,
    following: Tensor | None = None,
) -> Tensor:
    """What each position of a stream has to predict: int64, same shape, -100 where nothing.

    A text position predicts the next *text* token, so the position before a landmark predicts the first text token
    after it; a landmark predicts nothing. A position holding the end-of-text token predicts nothing either, because
    another document follows. With ``include_landmarks`` every position predicts the position after it, landmarks
    included (except across the end of a document).

    Args:
        stream: ids (..., n). Landmarks may stand anywhere.
        landmark_token_id: the landmark's id; None for plain text.
        eot_id: the end-of-text token's id; None if there is none.
        include_landmarks: count landmarks as targets, and let them predict.
        following: ids (...), the one token that comes after each row: the target of the row's last positions. Without
            ``following`` those positions are ignored.

    Raises:
        ValueError: the shape of ``following`` is not that of ``stream`` without its last dimension.
    """
    if following is None:
        following = stream.new_full(stream.shape[:-1], IGNORED_TARGET, dtype=torch.int64)
    elif following.shape != stream.shape[:-1]:
        raise ValueError(f"following has shape {tuple(following.shape)}, expected {tuple(stream.shape[:-1])}")
    length = stream.shape[-1]
    # The stream moved up by one: what stands right after each position.
    after = torch.cat([stream[..., 1:].long(), following.long().unsqueeze(-1)], dim=-1)[..., :length]
    ended = torch.zeros_like(stream, dtype=torch.bool) if eot_id is None else stream == eot_id
    if landmark_token_id is None:
        return after.masked_fill(ended, IGNORED_TARGET)
    landmark = stream == landmark_token_id
    if include_landmarks:
        ended_before_landmark = torch.zeros_like(ended)
        ended_before_landmark[..., 1:] = landmark[..., 1:] & ended[..., :-1]
        return after.masked_fill(ended | ended_before_landmark, IGNORED_TARGET)
    # Look past landmarks: the index of the nearest position of `after`, here or to the right, that holds no landmark.
    index = torch.arange(length, device=stream.device).expand(after.shape)
    index = torch.where(after == landmark_token_id, length - 1, index)
    nearest = index.flip(-1).cummin(-1).values.flip(-1)
    targets = after.gather(-1, nearest)
    return targets.masked_fill(ended | landmark | (targets == landmark_token_id), IGNORED_TARGET)


def _check_length(name: str, length: int) -> None:
    if length < 0:
        raise ValueError(f"{name} must not be negative, got {length}")


def _check_freq(landmark_freq: int) -> None:
    if landmark_freq < 1:
        raise ValueError(f"landmark_freq must be at least 1 text token, got {landmark_freq}")


def _check_block_size(block_size: int) -> None:
    if block_size < 2:
        raise ValueError(f"block_size must be at least 2 (one text token and its landmark), got {block_size}")
