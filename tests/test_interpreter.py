"""The interpreter that tests quicken computes and checks what it did."""

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

if not triton.knobs.runtime.interpret:
    pytest.skip("kernels are compiled here", allow_module_level=True)

from triton.runtime import interpreter  # noqa: E402
from triton.runtime.errors import InterpreterError  # noqa: E402


@triton.jit
def doubled(x):
    return tl.sum(x, 0) * 2


@triton.jit
def calling_kernel(out, CALLS: tl.constexpr):
    total = tl.zeros([4], tl.int32)
    for _ in tl.static_range(CALLS):
        total += doubled(tl.arange(0, 4))
    tl.store(out + tl.arange(0, 4), total)


@triton.jit
def whole_numbers_kernel(x, y, out, WHAT: tl.constexpr):
    at = tl.arange(0, 2)
    a, b = tl.load(x + at), tl.load(y + at)
    tl.store(out + at, a + b if WHAT == "add" else a - b if WHAT == "sub" else a * b)


def test_the_language_is_replaced_once_a_launch(monkeypatch):
    looked, builtin = [], interpreter._patch_builtin
    monkeypatch.setattr(interpreter, "_patch_builtin", lambda *given: looked.append(given) or builtin(*given))
    before, out, times = dict(vars(tl)), torch.zeros(4, dtype=torch.int32), []
    for calls in (1, 2, 5):
        looked.clear()
        calling_kernel[(3,)](out, calls)
        times.append(len(looked))
        assert out.tolist() == [12 * calls] * 4
        assert dict(vars(tl)) == before
    assert times[1] == times[2] > 0


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(
    ("what", "pair"),
    [("add", (1, 2)), ("sub", (1, 2)), ("mul", (3, -2)), ("add", (9, 1)), ("sub", (-9, 2)), ("mul", (9, 2))],
)
def test_whole_numbers_that_overflow_are_told(what, pair, dtype):
    """9 and -9 stand for the ends of the dtype."""
    ends = {9: torch.iinfo(dtype).max, -9: torch.iinfo(dtype).min}
    x, y = (torch.tensor([1, ends.get(n, n)], dtype=dtype) for n in pair)
    out = torch.zeros_like(x)
    if abs(pair[0]) == 9 and dtype != torch.int64:
        with pytest.raises(InterpreterError, match="overflow"):
            whole_numbers_kernel[(1,)](x, y, out, what)
    else:
        whole_numbers_kernel[(1,)](x, y, out, what)
        assert torch.equal(out, getattr(torch, what)(x, y))
