"""The judge of numerical tests: rounding passes at any size, and one wrong row never does."""

import math

import pytest
import torch

from tests.closeness import TOLERANCE, assert_close_norm, relative_error, tolerance, whole_error

DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
SIZES = pytest.mark.parametrize("size", [1e-20, 1e-3, 1.0, 1e6])


def tensor(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@DTYPES
@SIZES
def test_rounding_passes_whatever_the_size(dtype, size):
    if dtype == torch.float16 and not 1e-4 < size < 1e4:
        pytest.skip("beyond what the type can hold")
    exact = tensor(4, 100, 32) * size
    assert_close_norm(exact.to(dtype), exact, dtype)
    again = sum(part.to(dtype) for part in (exact / 2, exact / 3, exact / 6))
    assert_close_norm(again, exact, dtype)


@DTYPES
@SIZES
def test_one_wrong_row_of_many_fails(dtype, size):
    exact = tensor(4, 1000, 32) * size
    wrong = exact.clone()
    wrong[2, 777] *= 1 + 1.5 * TOLERANCE[dtype]
    assert (wrong - exact).norm() < 0.1 * TOLERANCE[dtype] * exact.norm()
    with pytest.raises(AssertionError, match="of a row's size"):
        assert_close_norm(wrong, exact, dtype)


def test_one_wrong_element_fails():
    exact = tensor(100, 64)
    wrong = exact.clone()
    wrong[50, 3] += 2e-5 * exact[50].norm() * 1.1
    with pytest.raises(AssertionError):
        assert_close_norm(wrong, exact, torch.float32)


def test_a_small_row_is_judged_by_its_neighbours_and_a_small_tensor_by_itself():
    exact = torch.cat([tensor(9, 8), torch.zeros(1, 8)])
    assert_close_norm(exact + 1e-6, exact, torch.float32)
    with pytest.raises(AssertionError):
        assert_close_norm(exact[9:] + 1e-30, exact[9:], torch.float32)
    assert_close_norm(exact[9:], exact[9:])


@pytest.mark.parametrize("change", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_the_same_only_where_both_are(change):
    exact = tensor(5, 4)
    other = exact.clone()
    other[3, 2] = change
    for actual, expected in ((other, exact), (exact, other)):
        with pytest.raises(AssertionError):
            assert_close_norm(actual, expected)
    if math.isinf(change):
        assert_close_norm(other + 1e-16, other)


def test_the_coarser_type_decides_and_shapes_have_to_agree():
    assert tolerance(torch.float32, torch.float64) == TOLERANCE[torch.float32]
    exact = tensor(5, 4)
    assert_close_norm(exact.bfloat16(), exact)
    with pytest.raises(AssertionError):
        assert_close_norm(exact.bfloat16(), exact, torch.float32)
    with pytest.raises(AssertionError, match=r"\(5, 4\) instead of"):
        assert_close_norm(exact, exact[None])


def test_containers_and_numbers():
    a = tensor(3)
    assert_close_norm({"x": [a, (a, 1.0)]}, {"x": [a, (a, 1.0 + 1e-7)]})
    assert_close_norm([1.0, 2.0], [1.0, 2.0 + 1e-6])
    for actual, expected in [({"x": a}, {"y": a}), ([a], [a, a]), ([a, a + 1], [a, a]), ([1.0, 2.0], [1.0, 2.001])]:
        with pytest.raises(AssertionError):
            assert_close_norm(actual, expected)


def test_the_measure_is_symmetric_enough_to_read():
    a = tensor(6, 3)
    assert relative_error(a, a) == 0
    assert relative_error(2 * a, a) == pytest.approx(1.0)
    assert relative_error(torch.empty(0, 3), torch.empty(0, 3)) == 0
    assert relative_error(torch.tensor(1.1), torch.tensor(1.0)) == pytest.approx(0.1, rel=1e-5)


def test_of_all_rows_together_nothing_is_the_same_as_nothing():
    a = tensor(6, 3)
    assert whole_error(2 * a, a) == pytest.approx(1.0)
    for same in (a, torch.zeros(6, 3), torch.empty(1, 0, 3), torch.empty(1, 0, dtype=torch.bool)):
        assert whole_error(same, same) == 0
    assert whole_error(a, torch.zeros(6, 3)) == math.inf
    for wrong in (math.nan, math.inf):
        other = a.clone()
        other[0, 0] = wrong
        # No bound holds.
        for actual, expected in ((other, a), (a, other), (other, torch.zeros(6, 3)), (other, other)):
            assert not whole_error(actual, expected) <= 1e30
    with pytest.raises(AssertionError, match=r"\(6, 3\) instead of"):
        whole_error(a, a[None])
