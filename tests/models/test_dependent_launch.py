"""Products of a step that are brought up early wait before they touch what others write, and change no number by it."""

import ast
import inspect
import json
import os
import re
import subprocess
import sys
from types import ModuleType

import pytest
import torch

from landmark_cli.attention.kernels.common import dependent
from landmark_cli.attention.kernels.reading import decode, launch
from landmark_cli.models import code_products, row_products, step_kernels
from landmark_cli.models.fused_step import FusedStep
from landmark_cli.models.quantized_products import HummingProduct
from tests.models.stepping import WIDE, landmark_decoder, steps

# Kernels that are launched before the one before them has ended, and those that let them; where each is made.
EARLY = {
    "products_kernel": row_products,
    "gated_products_kernel": row_products,
    "code_products_kernel": code_products,
}
ANNOUNCING = {"add_norm_kernel": step_kernels, "gated_kernel": step_kernels, "decode_kernel": decode}
# What the first of these call, which waits for them.
WAITING = (row_products.row_sums, code_products.sums_of_4_bits, code_products.sums_of_8_bits)
LAUNCHED_FROM = (step_kernels, row_products, code_products, launch)


def launched(module: ModuleType, way: str) -> set[str]:
    """Kernels that a module launches with what `way` returns."""
    found = set()
    for call in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Subscript):
            given = [ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg is None]
            # row_products puts it among other constants.
            ways = (f"{way}(", "_constants(") if way == "dependent_launch" else (f"{way}(",)
            if any(x.startswith(ways) for x in given):
                found.add(ast.unparse(call.func.value))
    return found


def test_these_are_all_that_are_brought_up_early():
    assert set().union(*(launched(module, "dependent_launch") for module in LAUNCHED_FROM)) == EARLY.keys()
    assert set().union(*(launched(module, "announcing") for module in LAUNCHED_FROM)) == ANNOUNCING.keys()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_elsewhere_nothing_is(device):
    x = torch.empty(1, device=device)
    assert dependent.dependent_launch(x) == dependent.announcing(x) == {"PDL": False}


def test_each_waits_or_lets_the_next_begin():
    for name, module in EARLY.items():
        source = inspect.getsource(getattr(module, name).fn)
        assert "row_sums(" in source or "block_sums(" in source, name
    for function in WAITING:
        source = inspect.getsource(function.fn)
        assert "let_next_begin(PDL)" in source and "wait_for_previous(PDL)" in source
    for name, module in ANNOUNCING.items():
        assert "let_next_begin(PDL)" in inspect.getsource(getattr(module, name).fn), name


@pytest.mark.slow
@pytest.mark.parametrize("early", [True, False], ids=["early", "in turn"])
def test_nothing_but_weights_is_touched_before_the_wait(tmp_path, early):
    settings = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, __file__, *(["early"] if early else [])]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | settings)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found.keys() == EARLY.keys() | ANNOUNCING.keys()
    for name, touched in found.items():
        waits = early and name in EARLY
        assert ("wait" in touched) == waits and ("launch_dependents" in touched) == early, name
        if waits:
            before, behind = touched[: touched.index("wait")], touched[touched.index("wait") :]
            assert "st" not in before and "atom" not in before and {"ld", "st"} <= set(behind), name


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["none", "streams", "int8", "int4"])
def test_steps_give_the_same_logits(kind, monkeypatch):
    from landmark_cli.models.quantization import quantize

    if kind.startswith("int"):
        pytest.importorskip("humming")
    device, found = torch.device("cuda"), []
    monkeypatch.setattr(FusedStep, "streams", kind != "none")
    monkeypatch.setattr(HummingProduct, "streams", True)
    for early in (False, True):
        monkeypatch.setattr(dependent, "enabled", early)
        torch.manual_seed(0)
        model = landmark_decoder(**WIDE).to(device, torch.bfloat16)
        if kind.startswith("int"):
            quantize(model, kind, device)
        found.append(steps(model, True, count=60, batch=2)[0])
    assert all(map(torch.equal, *found))


def main(early: bool) -> None:
    """Print, as JSON, of each kernel what its assembly does in order: loads and stores of global memory, and what is
    said and waited for."""
    from triton.runtime import driver

    from landmark_cli.attention.cache import BlockCache
    from landmark_cli.attention.cache.settings import RetrievalSettings
    from landmark_cli.attention.kernels.reading import selection
    from landmark_cli.attention.rotary import default_inverse_frequencies
    from landmark_cli.models.quantization import encode
    from tests.attention.kernels.compiling import H100, Compiled

    driver.set_active(H100())
    compiled = {}
    # Where they are looked up when they are launched.
    for name, place in (EARLY | ANNOUNCING | {"decode_kernel": launch, "candidates_kernel": selection}).items():
        compiled[name] = Compiled(getattr(place, name))
        setattr(place, name, compiled[name])
    for module in LAUNCHED_FROM:
        module.dependent_launch = lambda x: {"PDL": early, "launch_pdl": early}
        module.announcing = lambda x: {"PDL": early}
    x, weight = (torch.empty(shape, dtype=torch.bfloat16) for shape in ((1, 1, 1024), (64, 1024)))
    step_kernels.add_norm(x, x.clone(), weight[0], 1e-5)
    step_kernels.gated(x, x.clone())
    row_products.products(x, weight)
    row_products.gated_products(x, weight)
    packed = code_products.in_order(encode(torch.zeros(128, 1024), 4))
    code_products.gated_products(x[0], packed, torch.zeros(2, dtype=torch.int32))
    cache = BlockCache(RetrievalSettings(64, 8), default_inverse_frequencies(128))
    cache.host_blocks = [100]
    chunk = cache.begin_chunk([1])
    q, k, v = (torch.empty(1, 1, n, 128, dtype=torch.bfloat16).transpose(1, 2) for n in (4, 2, 2))
    launch.attend_chunk(q, k, v, cache.layer(0, k, chunk), chunk)
    found = {}
    for name in EARLY | ANNOUNCING:
        touched = re.findall(r"griddepcontrol\.(\w+)|\b(ld|st|atom)\.global", compiled[name].assembly)
        found[name] = [said or done for said, done in touched]
    print(json.dumps(found))


if __name__ == "__main__":
    main("early" in sys.argv)
