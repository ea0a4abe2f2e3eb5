"""The kernels of landmarks' own queries compiled for an H100, which takes no GPU: what ptxas says of them.

A script compiles, since tests have Triton interpret kernels: `test_landmarks_compiled.py DIM`.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

KERNELS = "forward_kernel", "query_gradient_kernel", "key_gradient_kernel"
# Bytes of registers spilled at most, by head dim.
SPILLED = {64: 0, 128: 80}


@pytest.mark.parametrize("dim", [pytest.param(128, marks=pytest.mark.slow), 64])
def test_registers_suffice(tmp_path, dim):
    settings = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, __file__, str(dim)]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | settings)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found.keys() == set(KERNELS)
    for name, (products, said) in found.items():
        spilled = int(re.search(r"(\d+) bytes spill stores", said)[1])
        assert products > 10 and "serialized" not in said and spilled <= SPILLED[dim], (name, said)


def main(dim: int) -> None:
    """Print, as JSON, each kernel's number of products in the assembly and what ptxas said."""
    from triton import knobs
    from triton.runtime import driver

    from landmark_cli.attention.kernels.landmarks import launch
    from tests.attention.kernels.compiling import H100, Compiled

    driver.set_active(H100())
    kernels = {name: Compiled(getattr(launch, name)) for name in KERNELS}
    for name, kernel in kernels.items():
        setattr(launch, name, kernel)
    q = torch.empty(4, 128, 9, dim, dtype=torch.bfloat16).transpose(1, 2)
    k = torch.empty(4, 128 * 63, 3, dim, dtype=torch.bfloat16).transpose(1, 2)
    out, lse = launch.forward(q, k, k, 63, dim**-0.5)
    launch.backward(out, q, k, k, out, lse, 63, dim**-0.5)
    found = {}
    for name, kernel in kernels.items():
        source = Path(knobs.cache.dir, f"{name}.ptx")
        source.write_text(kernel.assembly)
        command = [knobs.nvidia.ptxas.path, "-v", "-arch=sm_90a", str(source), "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        found[name] = len(re.findall(r"wgmma\.mma_async", kernel.assembly)), said
    print(json.dumps(found))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
