"""A step's kernels that are brought up early wait before they touch what others write, and change no number by it."""

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
from landmark_cli.attention.kernels.reading import candidates, decode, launch, selection, store
from landmark_cli.models import code_products, row_products, step_kernels
from landmark_cli.models.fused_step import FusedStep
from tests.models.stepping import WIDE, landmark_decoder, steps

# Where a step's kernels are launched, and where each of them is.
LAUNCHED_FROM = (step_kernels, row_products, code_products, launch, selection)
KERNELS = {
    "add_norm_kernel": step_kernels,
    "rotate_heads_kernel": step_kernels,
    "gated_kernel": step_kernels,
    "products_kernel": row_products,
    "gated_products_kernel": row_products,
    "code_products_kernel": code_products,
    "store_kernel": store,
    "candidates_kernel": candidates,
    "decode_kernel": decode,
}
# Those that have a weight, which no kernel writes.
READ_WEIGHTS = {"add_norm_kernel", "products_kernel", "gated_products_kernel", "code_products_kernel"}
# What kernels call that waits for them.
WAITING = (row_products.row_sums, code_products.sums_of_4_bits, code_products.sums_of_8_bits)


def launched_early(module: ModuleType) -> set[str]:
    """Kernels that a module launches in a step's way."""
    ways, found = ("dependent_launch(", "launch", "call.launch", "_constants("), set()
    for call in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Subscript):
            given = [ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg is None]
            if any(x == way or (way.endswith("(") and x.startswith(way)) for x in given for way in ways):
                found.add(ast.unparse(call.func.value))
    return found


def test_these_are_all_that_are_brought_up_early():
    assert set().union(*map(launched_early, LAUNCHED_FROM)) == KERNELS.keys()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_elsewhere_nothing_is(device):
    x = torch.empty(1, device=device)
    assert dependent.dependent_launch(x) == {"PDL": False} and not dependent.launches_early(x.device)


@pytest.mark.parametrize("name", KERNELS)
def test_each_waits(name):
    source = inspect.getsource(getattr(KERNELS[name], name).fn)
    assert "wait_for_previous(PDL)" in source or "row_sums(" in source or "block_sums(" in source
    assert all("wait_for_previous(PDL)" in inspect.getsource(function.fn) for function in WAITING)


@pytest.mark.slow
@pytest.mark.parametrize("waits", [True, False], ids=["as they are", "without waiting"])
def test_nothing_is_touched_before_the_wait(tmp_path, waits):
    settings = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, __file__, *([] if waits else ["without"])]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | settings)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found.keys() == KERNELS.keys()
    for name, (before, behind) in found.items():
        if waits:
            assert "st" not in before and {"ld", "st"} <= set(behind), name
            assert "ld" not in before or name in READ_WEIGHTS, name
        else:
            assert {"ld", "st"} <= set(before) and not behind, name


@pytest.mark.gpu
@pytest.mark.parametrize("early", [False, True], ids=["in turn", "early"])
@pytest.mark.parametrize("ahead", [False, True], ids=["", "asked ahead"])
@pytest.mark.parametrize("kind", ["none", "streams", "int8", "int4"])
def test_steps_give_the_same_logits(kind, ahead, early, monkeypatch):
    from landmark_cli.models.quantization import quantize

    if kind.startswith("int"):
        pytest.importorskip("humming")
    device, found = torch.device("cuda"), []
    monkeypatch.setattr(FusedStep, "streams", kind == "streams")
    for as_asked in (False, True):
        monkeypatch.setattr(dependent, "enabled", as_asked and early)
        monkeypatch.setattr(FusedStep, "asks_ahead", as_asked and ahead)
        model = landmark_decoder(**WIDE).to(device, torch.bfloat16)
        if kind.startswith("int"):
            quantize(model, kind, device)
        found.append(steps(model, True, count=60, batch=2)[0])
    assert all(map(torch.equal, *found))


def main(waits: bool) -> None:
    """Print, as JSON, of each kernel the loads and stores of global memory in its assembly, in order: those before it
    waits, and those behind."""
    from triton.runtime import driver

    from landmark_cli.attention.cache import BlockCache
    from landmark_cli.attention.cache.settings import RetrievalSettings
    from landmark_cli.attention.rotary import default_inverse_frequencies
    from landmark_cli.models.quantization import encode
    from tests.attention.kernels.compiling import H100, Compiled

    driver.set_active(H100())
    on, compiled = {"PDL": waits, "launch_pdl": True}, {}
    # Where they are looked up when they are launched.
    places = KERNELS | {"store_kernel": launch, "decode_kernel": launch, "candidates_kernel": selection}
    for name, place in places.items():
        compiled[name] = Compiled(getattr(place, name))
        setattr(place, name, compiled[name])
    for module in (step_kernels, row_products, code_products):
        module.dependent_launch = lambda x: on
    launch.Call.launch = on
    q, k, v = (torch.empty(1, 1, n, 128, dtype=torch.bfloat16) for n in (4, 2, 2))
    angles, x, weight = (torch.empty(shape, dtype=torch.bfloat16) for shape in ((1, 1, 128), (1, 1, 1024), (64, 1024)))
    step_kernels.add_norm(x, x.clone(), weight[0], 1e-5, following=weight)
    step_kernels.rotate_heads(q, k, angles, angles, following=weight)
    step_kernels.gated(x, x.clone(), following=weight)
    row_products.products(x, weight)
    row_products.gated_products(x, weight)
    packed = code_products.in_order(encode(torch.zeros(128, 1024), 4))
    code_products.gated_products(x[0], packed, torch.zeros(2, dtype=torch.int32))
    cache = BlockCache(RetrievalSettings(64, 8), default_inverse_frequencies(128))
    cache.host_blocks = [100]
    chunk = cache.begin_chunk([1])
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    launch.attend_chunk(q, k, v, cache.layer(0, k, chunk), chunk)
    launch.store(launch.Call(q, k, v, cache.layers[0], chunk, None))
    found = {}
    for name, kernel in compiled.items():
        touched = re.findall(r"griddepcontrol\.wait|\b(?:ld|st|atom)\.global", kernel.assembly)
        touched = [what.removesuffix(".global") for what in touched]
        waited = touched.index("griddepcontrol.wait") if waits else len(touched)
        found[name] = touched[:waited], touched[waited + 1 :]
    print(json.dumps(found))


if __name__ == "__main__":
    main("without" not in sys.argv)
