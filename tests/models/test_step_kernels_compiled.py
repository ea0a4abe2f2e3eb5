"""The kernels of a step compiled for an H100, which takes no GPU: where they round.

A script compiles, since tests have Triton interpret kernels.
"""

import json
import os
import re
import subprocess
import sys

import pytest
import torch


@pytest.mark.slow
def test_products_are_rounded_before_they_are_added(tmp_path):
    """A multiplication and an addition that become one instruction round once, where transformers rounds twice."""
    settings = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=os.environ | settings)
    assert run.returncode == 0, run.stderr
    for name, (products, both) in json.loads(run.stdout).items():
        assert products >= 4 and both == 0, name


def main() -> None:
    """Print, as JSON, of each dtype the multiplications of that dtype in the rotation's assembly, and how many of these
    are additions as well."""
    from triton.runtime import driver

    from landmark_cli.models import step_kernels
    from tests.attention.kernels.compiling import H100, Compiled

    driver.set_active(H100())
    step_kernels.rotate_heads_kernel = kernel = Compiled(step_kernels.rotate_heads_kernel)
    found = {}
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "f16")):
        for norms in ((), (*torch.ones(2, 64, dtype=dtype), 1e-6)):
            q, k, cos, sin = (torch.empty(2, 1, *shape, dtype=dtype) for shape in ((2, 64), (1, 64), (64,), (64,)))
            step_kernels.rotate_heads(q, k, cos, sin, *norms)
            made = [re.findall(rf"\b{what}(?:\.\w+)*\.{name}(?:x2)?\b", kernel.assembly) for what in ("mul", "fma")]
            found[f"{name}, {'normed' if norms else 'as they are'}"] = [len(x) for x in made]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
