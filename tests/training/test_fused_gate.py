"""The kernel that sums a teacher's logits up by blocks: against its definition, on random inputs."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from landmark_cli.data.landmarks import insert_landmarks
from landmark_cli.training import fused_gate
from landmark_cli.training.distillation import Distillation
from landmark_cli.training.gate import block_logits
from tests.closeness import assert_close_norm
from tests.training.test_distillation import some_texts

LANDMARK = 999


def some_sample(freq, tokens, documents, joint=True):
    """Queries of two rows: (n text tokens, the sample)."""
    stream = insert_landmarks(some_texts(2, tokens), freq, LANDMARK)
    width = stream.shape[1]
    ends = sorted({0, width, 2 * width} | ({width // 3, width // 3 + 1, width + width // 2} if documents else set()))
    cu_seqlens = torch.tensor(ends).int() if documents else None
    how = Distillation(
        SimpleNamespace(length=None), "self", LANDMARK, gate_weight=1.0, block_size=freq + 1, joint=joint
    )
    text, known = how.read(stream, cu_seqlens), stream != LANDMARK
    answers = known & (torch.arange(width) > width * 0.8)
    return text.tokens.shape[1], how.sample(text, stream, known, answers, cu_seqlens)


def poisoned(shape, dtype, device, generator):
    """Random numbers in the middle of memory that is otherwise nan, the head dimension dense."""
    whole = torch.full((*shape[:-1], shape[-1] + 5), torch.nan, dtype=dtype, device=device)
    whole[..., : shape[-1]] = (2 * torch.randn(shape, generator=generator)).to(dtype)
    return whole[..., : shape[-1]]


DEVICES = [pytest.param("cpu", id="interpreted"), pytest.param("cuda", marks=pytest.mark.gpu, id="gpu")]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("freq", "tokens", "heads", "groups", "dim", "documents", "reach", "dtype"),
    [
        (4, 38, 4, 2, 8, False, None, torch.float32),
        (15, 100, 3, 1, 24, True, None, torch.float32),
        (7, 60, 2, 2, 16, False, 13, torch.float32),
        (70, 220, 6, 2, 16, False, None, torch.float32),
        (15, 100, 6, 2, 16, False, None, torch.bfloat16),
    ],
)
def test_it_gives_what_its_definition_does(device, freq, tokens, heads, groups, dim, documents, reach, dtype):
    read, chosen = some_sample(freq, tokens, documents)
    generator = torch.Generator().manual_seed(freq)
    q, k = (poisoned((2, number, read, dim), dtype, device, generator) for number in (heads, groups))
    wanted = block_logits(q.cpu(), k.cpu(), chosen, 0.3, reach)
    found = fused_gate.block_logits(q, k, chosen.text.to(device), chosen.spans.to(device), 0.3, reach).cpu()
    assert chosen.real.sum() > 10 and found.dtype == torch.float32
    # A query that does not count may be told anything.
    found, wanted = (x.transpose(1, 2)[chosen.real] for x in (found, wanted))
    assert torch.equal(found == -torch.inf, wanted == -torch.inf)
    seen = wanted > -torch.inf
    assert 0 < seen.sum() < seen.numel()
    assert_close_norm(found[seen], wanted[seen])


@pytest.mark.gpu
def test_of_a_models_shape_it_gives_what_its_definition_does():
    read, chosen = some_sample(63, 8064, False)
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, number, read, 64, generator=generator).cuda().bfloat16() for number in (9, 3))
    wanted = block_logits(q.cpu(), k.cpu(), chosen, 0.125)
    found = fused_gate.block_logits(q, k, chosen.text.cuda(), chosen.spans.cuda(), 0.125).cpu()
    found, wanted = (x.transpose(1, 2)[chosen.real] for x in (found, wanted))
    assert torch.equal(found == -torch.inf, wanted == -torch.inf)
    assert_close_norm(found[wanted > -torch.inf], wanted[wanted > -torch.inf])


# Gemma 3 has heads of 256, Gemma 4 of 512.
COMPILED = [
    (8, torch.float32, None),
    (24, torch.bfloat16, 13),
    (64, torch.bfloat16, None),
    (256, torch.float32, None),
    (512, torch.bfloat16, None),
]


def test_it_compiles_for_a_gpu(tmp_path):
    """By a script, since tests have Triton interpret kernels."""
    settings = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=os.environ | settings)
    assert run.returncode == 0, run.stderr
    taken = dict(line.split() for line in run.stdout.splitlines())
    assert taken.keys() == {f"{dim}-{str(dtype).split('.')[1]}" for dim, dtype, _ in COMPILED}
    # What a GPU with little of it has.
    assert all(0 < int(shared) <= 64 << 10 for shared in taken.values()), taken


def main() -> None:
    """Compile it for an H100, for heads of several sizes, which are printed, with the shared memory that they take."""
    from triton.runtime import driver

    from tests.attention.kernels.compiling import H100, Compiled

    driver.set_active(H100())
    fused_gate.block_logits_kernel = kernel = Compiled(fused_gate.block_logits_kernel)
    text, spans = torch.zeros(2, 20, dtype=torch.int64), torch.zeros(2, 5, 2, dtype=torch.int64)
    for dim, dtype, reach in COMPILED:
        q, k = (torch.empty(2, heads, 80, dim, dtype=dtype) for heads in (6, 2))
        fused_gate.block_logits(q, k, text, spans, 0.125, reach)
        print(f"{dim}-{str(dtype).split('.')[1]} {kernel.shared}")


if __name__ == "__main__":
    main()
