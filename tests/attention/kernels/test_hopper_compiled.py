"""The Hopper kernels compiled for an H100, which takes no GPU: what ptxas says of them.

Changes that slowed them down, made where no GPU was at hand, showed here: a variable too many, and registers no longer
suffice. A script compiles, since tests have Triton interpret kernels: `test_hopper_compiled.py DIM BLOCK_SIZE TOKENS`.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from tests.attention.kernels.compiling import H100, Compiled

# Bytes of registers spilled. The key gradient has two accumulators, and spills what it needs once a tile.
SPILLED = {"forward_kernel": 0, "query_gradient_kernel": 0, "key_gradient_kernel": 48}


@pytest.mark.parametrize(
    ("dim", "block_size", "tokens"), [pytest.param(128, 64, 2048, marks=pytest.mark.slow), (64, 51, 1024)]
)
def test_registers_suffice_and_products_overlap(tmp_path, dim, block_size, tokens):
    # Compiled anew, lest a cache hide what the compiler says.
    settings = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, __file__, str(dim), str(block_size), str(tokens)]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | settings)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found.keys() == SPILLED.keys()
    for name, (products, said) in found.items():
        assert products > 10 and "serialized" not in said, (name, said)
        assert int(re.search(r"(\d+) bytes spill stores", said)[1]) <= SPILLED[name], (name, said)


def main(dim: int, block_size: int, tokens: int) -> None:
    """Print, as JSON, each kernel's number of products in the assembly and what ptxas said."""
    from triton import knobs
    from triton.runtime import driver

    from landmark_cli.attention.kernels.hopper import launch

    torch.cuda.device = lambda *_: contextlib.nullcontext()
    torch.cuda.get_device_properties = lambda *_: types.SimpleNamespace(multi_processor_count=132)
    driver.set_active(H100())
    kernels = {name: Compiled(getattr(launch, name)) for name in SPILLED}
    for name, kernel in kernels.items():
        setattr(launch, name, kernel)
    q, k, v, dout = (torch.empty(1, tokens, 2, dim, dtype=torch.bfloat16).transpose(1, 2) for _ in range(4))
    out, lse = launch.forward(q, k, v, block_size, dim**-0.5)
    launch.backward(dout, None, q, k, v, out, lse, block_size, dim**-0.5)
    found = {}
    for name, kernel in kernels.items():
        source = Path(knobs.cache.dir, f"{name}.ptx")
        source.write_text(kernel.assembly)
        command = [knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", source, "-o", source.with_suffix(".cubin")]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        found[name] = kernel.assembly.count("wgmma.mma_async"), said
    print(json.dumps(found))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
