"""Reading the authors' outputs under tests/goldens."""

import json
from pathlib import Path

import torch
from safetensors import safe_open

FOLDER = Path(__file__).parent / "goldens"


def names(pattern: str) -> list[str]:
    """Files matching the pattern, without suffix; at least one, so that a lost folder fails."""
    found = sorted(path.stem for path in FOLDER.glob(f"{pattern}.safetensors"))
    assert found, f"no goldens match {pattern} in {FOLDER}"
    return found


def read(name: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """(spec, tensors) of one file, bfloat16 cast to float32."""
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        spec = json.loads(file.metadata()["spec"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    return spec, {key: t.float() if t.is_floating_point() else t for key, t in tensors.items()}


def part(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors whose names begin with `prefix`, without it: "w." for weights, "g." for gradients."""
    return {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
