"""Files of torch.save, opened as weights only and mapped: tensors, never code, and none larger than the file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from landmark_cli.model_files import check_pickle


def load_weights(path: Path) -> Any:
    """What torch.save wrote, its tensors mapped from the file.

    Raises ValueError for a file of the format before PyTorch 1.6, one that holds more than weights, and one with a
    tensor that has more elements than the file stores (a tensor that repeats itself would become any size when it is
    copied); and what torch raises for a damaged one.
    """
    with path.open("rb") as file:
        if not file.read(4).startswith(b"PK"):
            raise ValueError("not a zip file of torch.save; one from before PyTorch 1.6 has to be saved again")
    check_pickle(path)
    content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    size = path.stat().st_size
    for name, tensor in tensors_in(content):
        if tensor.device.type != "cpu" or tensor.layout != torch.strided:
            raise ValueError(f"{name} is a {tensor.layout} tensor of {tensor.dtype}, which is not supported")
        if tensor.numel() * tensor.element_size() > min(tensor.untyped_storage().nbytes(), size):
            raise ValueError(f"{name} is larger ({tensor.numel()} elements) than what the file stores of it")
    return content


def tensors_in(content: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in nested dictionaries and lists, with their place for a message."""
    if isinstance(content, torch.Tensor):
        yield name, content
    elif isinstance(content, Mapping):
        for key, value in content.items():
            yield from tensors_in(value, f"{name}.{key}" if name else str(key))
    elif isinstance(content, (list, tuple)):
        for index, value in enumerate(content):
            yield from tensors_in(value, f"{name}[{index}]")
