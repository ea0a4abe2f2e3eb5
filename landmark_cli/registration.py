"""Tells transformers about the landmark models as soon as it is imported, and never imports it itself.

`import landmark_cli` has to be enough for `AutoModelForCausalLM.from_pretrained` to open a landmark model, but
importing transformers takes seconds, which `landmark --help` must not cost. So the registration waits for that import,
by a finder in sys.meta_path: it is the only place that hears of an import somebody else makes. A lazy `__getattr__` of
this package (PEP 562) would be 4 ms cheaper and hear only of names asked of this package, which whoever opens a model
by `AutoModelForCausalLM` has no reason to do; transformers finds no models by entry points.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

TARGET = "transformers"
# Older ones open landmark models with ordinary attention, without a word.
OLDEST = (5, 5)


def register_with_transformers() -> None:
    """Register the landmark models now if transformers has been imported, or else right after it will be."""
    if TARGET in sys.modules:
        _register()
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def _register() -> None:
    """Import the models, which registers them. Where they are what imports transformers, this is in their midst and
    does nothing: they go on to register themselves.

    Raises ImportError for a transformers that is too old.
    """
    found = sys.modules[TARGET].__version__
    if tuple(int(part) for part in found.split(".")[:2]) < OLDEST:
        raise ImportError(
            f"landmark needs transformers {'.'.join(map(str, OLDEST))} or newer and found {found}: "
            "pip install --upgrade transformers"
        )
    importlib.import_module("landmark_cli.models")


class _AfterImport:
    """A finder that asks the other finders for transformers and adds one step after its loading.

    It stays until transformers is really loaded: libraries also look for the spec just to see whether it is installed.
    """

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != TARGET:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_register(module: ModuleType) -> None:
                load(module)
                sys.meta_path.remove(self)
                _register()

            spec.loader.exec_module = load_and_register
        return spec
