"""Landmark attention: train on short windows, read inputs of any length through retrieved blocks.

    import landmark_cli

    model, tokenizer = landmark_cli.load("runs/my-run")
    (answer,) = landmark_cli.generate(model, tokenizer, [novel + "Who did it? It was"])

What is named in `__all__` is the whole of what programs may build on; docs/python.md shows it. The names are imported
when they are asked for: importing this package imports neither torch nor transformers, and makes the transformers
library know the landmark models (`AutoModelForCausalLM.from_pretrained` opens their directories) and the attention
implementation "landmark".
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from landmark_cli.registration import register_with_transformers

if TYPE_CHECKING:
    from landmark_cli.attention.functional import landmark_attention
    from landmark_cli.data.landmarks import insert_landmarks
    from landmark_cli.errors import LandmarkError
    from landmark_cli.inference.generation import Generation, generate
    from landmark_cli.inference.landmark_cache import LandmarkCache
    from landmark_cli.inference.reader import Reader
    from landmark_cli.inference.settings import ReadingSettings, SamplingSettings
    from landmark_cli.models.decoders import add_landmarks
    from landmark_cli.models.store import load

__version__ = "0.1.0"
__all__ = [
    "Generation",
    "LandmarkCache",
    "LandmarkError",
    "Reader",
    "ReadingSettings",
    "SamplingSettings",
    "add_landmarks",
    "generate",
    "insert_landmarks",
    "landmark_attention",
    "load",
]

# The module of each name.
_FROM = {
    "Generation": "inference.generation",
    "LandmarkCache": "inference.landmark_cache",
    "LandmarkError": "errors",
    "Reader": "inference.reader",
    "ReadingSettings": "inference.settings",
    "SamplingSettings": "inference.settings",
    "add_landmarks": "models.decoders",
    "generate": "inference.generation",
    "insert_landmarks": "data.landmarks",
    "landmark_attention": "attention.functional",
    "load": "models.store",
}

register_with_transformers()


if not TYPE_CHECKING:
    # A checker would take any name for one that this gives.
    def __getattr__(name: str) -> Any:
        if name not in _FROM:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found = getattr(importlib.import_module(f"{__name__}.{_FROM[name]}"), name)
        # Found at once from now on.
        globals()[name] = found
        return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
