"""Products of a step that are brought up early wait before they touch what others write, and change no number by it."""

import ast
import inspect
import json
import os
import re
import subprocess
import sys
import types
from types import ModuleType

import pytest
import torch

from landmark_cli.attention.kernels.common import dependent
from landmark_cli.attention.kernels.reading import decode, launch
from landmark_cli.models import fused_step, row_products, step_kernels
from landmark_cli.models.fused_step import FusedStep
from tests.models.stepping import WIDE, landmark_decoder, steps

# Kernels that are launched before the one before them has ended, and those that let them; where each is made.
EARLY = {"products_kernel": row_products, "gated_products_kernel": row_products}
ANNOUNCING = {"add_norm_kernel": step_kernels, "gated_kernel": step_kernels, "decode_kernel": decode}
LAUNCHED_FROM = (step_kernels, row_products, launch)


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
    assert dependent.enabled and dependent.dependent_launch(x) == dependent.announcing(x) == {"PDL": False}


@pytest.mark.parametrize(
    "lacks, early",
    [({}, True), ({"gdc_wait": None}, False), ({"gdc_launch_dependents": None}, False), ({"capability": (8, 0)}, False),
     ({"capability": (12, 0)}, False), ({"cuda": None}, False), ({"enabled": False}, False)],
    ids=str,
)  # fmt: skip
def test_only_gpus_and_versions_on_which_it_was_found_faster_launch_early(lacks, early, monkeypatch):
    """All others launch their kernels as they did, with nothing that a version of Triton may not know."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: lacks.get("capability", (9, 0)))
    monkeypatch.setattr(torch.version, "cuda", lacks.get("cuda", "13.0"))
    for name in ("gdc_wait", "gdc_launch_dependents", "enabled"):
        monkeypatch.setattr(dependent, name, lacks.get(name, True))
    x = types.SimpleNamespace(device=torch.device("cuda"))
    dependent.brings_up_early.cache_clear()
    try:
        assert dependent.dependent_launch(x) == ({"PDL": True, "launch_pdl": True} if early else {"PDL": False})
        assert dependent.announcing(x) == {"PDL": early}
        # Without early launches products may still be streams, where both were timed.
        assert (fused_step._streams(x.device) is row_products) == (early or "enabled" in lacks)
    finally:
        dependent.brings_up_early.cache_clear()


def test_each_waits_or_lets_the_next_begin():
    for name, module in EARLY.items():
        # Which waits for them.
        assert "row_sums(" in inspect.getsource(getattr(module, name).fn), name
    source = inspect.getsource(row_products.row_sums.fn)
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
    monkeypatch.setattr(FusedStep, "streams", kind == "streams")
    monkeypatch.setattr(row_products, "serves", lambda x, weight: weight is not None and x.numel() <= 4 * x.shape[-1])
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
