"""Integer differences are invertible for every pattern, and casts round as PyTorch does."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from landmark_cli.weight_diff import bits

TORCH = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def as_tensor(values: np.ndarray, dtype: str) -> torch.Tensor:
    return torch.from_numpy(values.view(np.uint8)).view(TORCH[dtype])


@given(st.sampled_from([1, 2, 4, 8]), st.binary(min_size=16, max_size=16), st.binary(min_size=16, max_size=16))
def test_any_pattern_comes_back(width, tuned, raw):
    dtype = bits.UNSIGNED[width]
    tuned, raw = np.frombuffer(tuned, dtype), np.frombuffer(raw, dtype)
    out, spare = np.full((2, tuned.size), 0x77, dtype)
    diff = bits.difference(tuned, raw, out, spare).copy()
    assert np.array_equal(bits.restore(diff, raw, out, spare), tuned)


def test_small_changes_of_either_sign_are_small_numbers():
    raw = np.array([100, 100, 100, 100, 100], np.uint16)
    tuned = np.array([100, 99, 101, 98, 102], np.uint16)
    diff = bits.difference(tuned, raw, np.empty_like(raw), np.empty_like(raw))
    assert diff.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("source", ["F16", "BF16"])
@pytest.mark.parametrize("target", ["F32", "F16", "BF16"])
def test_casts_of_every_16_bit_pattern_equal_torch(source, target):
    values = np.arange(1 << 16, dtype=np.uint16)
    check_against_torch(values, source, target)


@pytest.mark.parametrize("target", ["F16", "BF16"])
def test_casts_from_float32_equal_torch(target):
    # Every exponent and sign with mantissas at and around the ties, and every pattern of the upper half besides.
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    lower = [0, 1, 0x0FFF, 0x1000, 0x1001, 0x2FFF, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF]
    check_against_torch(np.concatenate([upper | low for low in lower]), "F32", target)


def check_against_torch(values: np.ndarray, source: str, target: str) -> None:
    found = as_tensor(np.ascontiguousarray(bits.cast(values, source, target)), target)
    wanted = as_tensor(values, source).to(TORCH[target])
    nan = wanted.isnan()
    assert torch.equal(found.isnan(), nan)
    assert torch.equal(found[~nan].view(torch.uint8), wanted[~nan].view(torch.uint8))
    if source != target:
        assert found[nan].view(torch.uint8).reshape(-1, found.itemsize).unique(dim=0).shape[0] == 1


def test_float64_goes_through_float32():
    values = torch.tensor([1.0, -1e300, 0.1, 65519.999999], dtype=torch.float64)
    found = as_tensor(bits.cast(values.numpy().view(np.uint64), "F64", "F16"), "F16")
    assert torch.equal(found, values.float().half())


def test_a_type_is_cast_to_itself_untouched_and_integers_not_at_all():
    values = np.arange(4, dtype=np.uint32)
    assert bits.cast(values, "I32", "I32") is values
    with pytest.raises(ValueError, match="I32 cannot be cast to F32"):
        bits.cast(values, "I32", "F32")
