"""Products of few rows with codes in Humming's order."""

import pytest
import torch

from landmark_cli.models import code_products, step_operations
from landmark_cli.models.code_products import Split, in_order
from landmark_cli.models.quantization import encode
from tests.closeness import assert_close_norm

DTYPES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("split", [None, Split(1, 2), Split(3, 2)], ids=["by itself", "whole", "in 3"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("bits", [8, 4])
def test_the_kernel_of_products_is_the_definition(bits, rows, split, dtype):
    weight = torch.randn(192, 160).mul(0.1).to(dtype)
    codes = encode(weight, bits, dtype)
    # Rows of something wider, and a weight of which some is padded.
    x = torch.randn(rows, 2 * 160).to(dtype)[:, 160:]
    packed = in_order(codes)._replace(out_features=150, in_features=140)
    arrived = torch.zeros(3, dtype=torch.int32)
    found = code_products.products(x, packed, arrived, split)
    expected = x[:, :140].float() @ codes.weight()[:150, :140].T
    assert found.shape == (rows, 150) and found.dtype == dtype and not arrived.any()
    # Triton's interpreter cuts bfloat16 off where a GPU rounds.
    assert_close_norm(found.float(), expected, within=0.01)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("split", [Split(1, 2), Split(3, 2)], ids=["whole", "in 3"])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("bits", [8, 4])
def test_the_kernel_of_gated_products_is_the_definition(bits, rows, split, dtype):
    codes = encode(torch.randn(256, 96).mul(0.2).to(dtype), bits, dtype)
    x, arrived = torch.randn(rows, 96).to(dtype), torch.zeros(4, dtype=torch.int32)
    packed = in_order(codes)
    assert code_products.gates(packed) and not code_products.gates(packed._replace(out_features=192))
    found = code_products.gated_products(x, packed, arrived, split)
    expected = step_operations.gated_products(x.float(), codes.weight())
    assert found.shape == (rows, 128) and found.dtype == dtype and not arrived.any()
    assert_close_norm(found.float(), expected, within=0.04 if dtype == torch.bfloat16 else 0.01)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(64, 64), (200 // 16 * 16, 96), (4096, 14336)], ids=str)
@pytest.mark.parametrize("bits", [8, 4])
def test_humming_keeps_codes_in_this_order(bits, shape, dtype, monkeypatch):
    pytest.importorskip("humming")
    from landmark_cli.models.quantized_products import HummingProduct

    weight = torch.randn(shape, device="cuda", dtype=dtype) * 0.02
    codes = encode(weight, bits, dtype)
    product = HummingProduct(codes, dtype)
    assert product.packed is not None
    monkeypatch.setattr(HummingProduct, "streams", True)
    for rows in (1, 2, 4):
        x = torch.randn(rows, shape[1], device="cuda", dtype=dtype)
        for _ in range(2):
            assert_close_norm(product(x).double(), x.double() @ codes.weight(torch.float64).T, within=0.01)
        assert not product.arrived.any()
