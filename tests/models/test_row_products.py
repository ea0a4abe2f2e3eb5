"""Products of few rows by kernels that read a weight as a stream."""

import pytest
import torch

from landmark_cli.models import row_products, step_operations
from landmark_cli.models.row_products import Tiles
from tests.closeness import assert_close_norm

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Of rows and columns, some fit and some do not.
TILES = [None, Tiles(1, 64), Tiles(4, 32), Tiles(8, 128, 8, 3)]


def assert_alike(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Triton's interpreter cuts bfloat16 off where a GPU rounds."""
    assert found.dtype == expected.dtype and found.is_contiguous()
    cut_off = not found.is_cuda and found.dtype == torch.bfloat16
    assert_close_norm(found, expected, within=0.04 if cut_off else None)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tiles", TILES, ids=str)
@pytest.mark.parametrize("shape, bias", [((1, 1), False), ((2, 2), True)], ids=str)
def test_the_kernel_of_products_is_the_definition(shape, bias, tiles, dtype, device):
    x, weight, added = torch.randn(*shape, 2 * 80), torch.randn(18, 80), torch.randn(18) if bias else None
    # Rows of something wider.
    x = x.to(device, dtype)[..., 80:]
    weight, added = weight.to(device, dtype), None if added is None else added.to(device, dtype)
    assert_alike(row_products.products(x, weight, added, tiles=tiles), step_operations.products(x, weight, added))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tiles", TILES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (2, 2)], ids=str)
def test_the_kernel_of_gated_products_is_the_definition(shape, tiles, dtype, device):
    x, weight = torch.randn(*shape, 80).to(device, dtype), torch.randn(36, 80).mul(0.2).to(device, dtype)
    assert_alike(row_products.gated_products(x, weight, tiles=tiles), step_operations.gated_products(x, weight))


@pytest.mark.parametrize(
    "rows, weight, dtype, serves",
    [
        ((1, 1), (6144, 4096), torch.bfloat16, True),
        ((1, 1), (4096, 14336), torch.bfloat16, True),
        ((1, 1), (22016, 4096), torch.bfloat16, True),
        ((1, 2), (6144, 4096), torch.bfloat16, False),
        ((2, 1), (6144, 4096), torch.bfloat16, False),
        ((1, 1), (6144, 4096), torch.float16, False),
        ((1, 1), (6144, 4096), torch.float32, False),
        ((1, 1), (6144, 2048), torch.bfloat16, False),
        ((1, 1), (1024, 4096), torch.bfloat16, False),
        ((1, 1), (4096, 4100), torch.bfloat16, False),
    ],
    ids=str,
)
def test_only_products_that_were_timed_are_left_to_the_kernels(rows, weight, dtype, serves):
    x, weight = (torch.empty(shape, dtype=dtype, device="meta") for shape in ((*rows, weight[1]), weight))
    assert row_products.serves(x, weight) == serves
    assert not row_products.serves(x, None) and not row_products.serves(x, weight.t().contiguous().t())
    assert not row_products.serves(x.to(torch.float32), weight)
