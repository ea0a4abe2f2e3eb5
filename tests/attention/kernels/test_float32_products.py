"""Whichever of PyTorch's two ways says how exact products of float32 are to be, everything that asks understands it."""

import pytest
import torch

from landmark_cli.attention.cache import BlockCache, RetrievalSettings
from landmark_cli.attention.kernels import reading
from landmark_cli.attention.kernels.reading.call import Call
from landmark_cli.attention.kernels.training import launch
from landmark_cli.attention.rotary import default_inverse_frequencies
from landmark_cli.training.setup import allow_tf32


def older(precision):
    return lambda: torch.set_float32_matmul_precision(precision)


def newer(precision, where=torch.backends.cuda.matmul):
    return lambda: setattr(where, "fp32_precision", precision)


WAYS = {
    "nothing": (lambda: None, "tf32x3"),
    "older, highest": (older("highest"), "tf32x3"),
    "older, high": (older("high"), "tf32"),
    "older, medium": (older("medium"), "tf32"),
    "newer, ieee": (newer("ieee"), "tf32x3"),
    "newer, tf32": (newer("tf32"), "tf32"),
    "newer, tf32 for everything": (newer("tf32", torch.backends), "tf32"),
}


@pytest.fixture(autouse=True)
def restored():
    """As PyTorch begins."""

    def begin():
        torch.backends.cuda.matmul.fp32_precision = torch.backends.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")
        torch.backends.cuda.matmul.fp32_precision = "none"

    begin()
    yield
    begin()


@pytest.mark.parametrize("name", WAYS)
def test_attention_and_reading_do_products_as_they_were_told(name):
    tell, expected = WAYS[name]
    tell()
    x = torch.randn(1, 1, 6, 16)
    cache = BlockCache(RetrievalSettings(3, 1), default_inverse_frequencies(16))
    chunk = cache.begin_chunk([6])
    blocks = cache.layer(0, x, chunk)
    reading.attend_chunk(x, x, x, blocks, chunk)
    assert Call(x, x, x, blocks, chunk, None).precision == expected
    choice = launch.choices("forward", x, 3).configurations[0]
    assert launch._constants(x, 1, launch.Layout(3, 1.0), choice)["PRECISION"] == expected


@pytest.mark.parametrize("name", WAYS)
def test_training_turns_tf32_on_whatever_was_said_before(name):
    WAYS[name][0]()
    allow_tf32()
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"
