"""`import landmark_cli` makes transformers know the models, and does not import transformers."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from landmark_cli import registration

KNOWS = """
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
config = AutoConfig.for_model("landmark_gpt", n_layer=1, n_head=1, n_embd=8, vocab_size=64, landmark_token_id=63)
assert type(AutoModelForCausalLM.from_config(config)).__name__ == "GPTForCausalLM"
assert "landmark" in AttentionInterface().valid_keys()
import transformers
assert transformers.GPTForCausalLM is type(AutoModelForCausalLM.from_config(config))
"""
EACH = """
import os, torch
for order in {orders}:
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0, order
    else:
        exec(order)
        os._exit(0)
"""


def run(script: str) -> None:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_transformers_knows_our_models():
    """Whatever is imported first, each in a process that has imported nothing else but torch, which takes long."""
    orders = "import landmark_cli", "import transformers, landmark_cli", "import landmark_cli.models.gpt"
    run(EACH.format(orders=[imports + KNOWS for imports in orders]))


def test_import_alone_is_light():
    run("import sys, landmark_cli; assert not {'torch', 'transformers', 'typer'} & set(sys.modules)")


@pytest.fixture
def library(monkeypatch, tmp_path):
    """A stand-in for transformers that can be imported afresh, and how often it was met by a registration."""
    (tmp_path / "stand_in_library.py").write_text("loaded = True\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(registration, "TARGET", "stand_in_library")
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if not isinstance(f, registration._AfterImport)])
    calls = []
    monkeypatch.setattr(registration, "_register", lambda: calls.append(sys.modules["stand_in_library"].loaded))
    yield calls
    sys.modules.pop("stand_in_library", None)


def test_looking_for_the_spec_is_not_importing(library):
    registration.register_with_transformers()
    registration.register_with_transformers()
    assert importlib.util.find_spec("stand_in_library") is not None
    assert library == []
    importlib.import_module("stand_in_library")
    assert library == [True]
    assert not any(isinstance(finder, registration._AfterImport) for finder in sys.meta_path)


def test_library_that_is_there_already_is_told_at_once(library):
    importlib.import_module("stand_in_library")
    registration.register_with_transformers()
    assert library == [True]


def test_missing_library_stays_missing(library, monkeypatch):
    monkeypatch.setattr(registration, "TARGET", "library_that_is_not_there")
    registration.register_with_transformers()
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("library_that_is_not_there")


def test_a_transformers_that_is_too_old_is_refused(monkeypatch):
    transformers = importlib.import_module("transformers")
    monkeypatch.setattr(transformers, "__version__", "5.4.9")
    with pytest.raises(ImportError, match=r"landmark needs transformers 5\.5 or newer and found 5\.4\.9"):
        registration.register_with_transformers()


def test_the_oldest_transformers_is_the_one_that_is_installed_at_least():
    root = Path(registration.__file__).parent.parent
    oldest = ".".join(map(str, registration.OLDEST))
    assert f'"transformers>={oldest}",' in (root / "pyproject.toml").read_text()
