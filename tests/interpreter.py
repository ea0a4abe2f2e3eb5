"""Triton's interpreter, without what it does again and again, half the time of tests that interpret kernels.

What a kernel computes, and what the interpreter checks, stays the same. These names are the interpreter's own, so a
Triton without them is left as it is.
"""

from functools import cache

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_EXACT = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


def quicken() -> None:
    """From now on in this process."""
    if hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_lang = _once_a_launch(interpreter._patch_lang)
    if hasattr(interpreter, "interpreter_semantic"):
        semantic = interpreter.interpreter_semantic
        semantic.binary_op_sanitize_overflow_impl = _check_at_once(semantic.binary_op_sanitize_overflow_impl)


def _once_a_launch(patch):
    """At a launch, and at every call of a function in it, the interpreter puts its own operations in the place of
    `triton.language`'s. Those that the launch has replaced need not be looked for again."""
    patched = set()

    @cache
    def languages(function) -> frozenset[str]:
        seen = function.__globals__.values()
        return frozenset(module.__name__ for module in (tl, tl.core) if any(x is module for x in seen))

    def patch_lang(function):
        if patched and languages(function) <= patched:
            return interpreter._LangPatchScope()
        scope = patch(function)
        restore = scope.restore
        patched.update(languages(function))

        def forget():
            patched.clear()
            restore()

        scope.restore = forget
        return scope

    return patch_lang


def _check_at_once(usual):
    """Whether a sum or product of whole numbers overflows, asked of numpy and not in ten operations of the language."""

    def check(lhs, rhs, binary_op) -> None:
        if lhs.type.scalar.int_bitwidth not in (8, 16, 32):
            return usual(lhs, rhs, binary_op)
        a, b = lhs.handle.data, rhs.handle.data
        exact, limits = _EXACT[binary_op.__name__](a, b, dtype=np.int64), np.iinfo(a.dtype)
        assert limits.min <= exact.min() and exact.max() <= limits.max, f"{a.dtype} overflow in {binary_op.__name__}"

    return check
