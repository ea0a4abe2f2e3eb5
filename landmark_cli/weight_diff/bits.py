"""Tensors as bit patterns: the integer difference between two of them and casts that always give the same bits.

A tensor is a flat array of unsigned integers as wide as its elements, so that bfloat16 needs nothing but numpy.
Element types go by their names in safetensors files: "BF16", "F32", "I64".

The difference of two patterns is taken modulo 2^n, so nothing is rounded, and adding it back gives every bit, those of
NaNs and infinities too. Numbers that are close have patterns that are close, whatever their exponent: the differences
of a fine-tuned model are small integers. Their sign is folded into the lowest bit (0, -1, 1, -2, ... -> 0, 1, 2, 3,
...), so that the high bytes are zeros and the whole compresses better than a float difference.
"""

from __future__ import annotations

import numpy as np

ITEM_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
}
UNSIGNED = {1: np.dtype(np.uint8), 2: np.dtype(np.uint16), 4: np.dtype(np.uint32), 8: np.dtype(np.uint64)}
SIGNED = {1: np.dtype(np.int8), 2: np.dtype(np.int16), 4: np.dtype(np.int32), 8: np.dtype(np.int64)}
CASTABLE = ("F64", "F32", "F16", "BF16")
# Machines differ in which NaN a cast gives; here a cast gives this one.
NAN = {"F64": 0x7FF8000000000000, "F32": 0x7FC00000, "F16": 0x7E00, "BF16": 0x7FC0}


def pattern(dtype: str) -> np.dtype:
    """The unsigned integers that hold the bit patterns of an element type."""
    return UNSIGNED[ITEM_BYTES[dtype]]


def difference(tuned: np.ndarray, raw: np.ndarray, out: np.ndarray, spare: np.ndarray) -> np.ndarray:
    """out = tuned - raw modulo 2^n with the sign in the lowest bit. Four arrays of one shape and unsigned type."""
    signed = SIGNED[out.itemsize]
    np.subtract(tuned, raw, out=out)
    np.right_shift(out.view(signed), 8 * out.itemsize - 1, out=spare.view(signed))
    np.left_shift(out, 1, out=out)
    return np.bitwise_xor(out, spare, out=out)


def restore(diff: np.ndarray, raw: np.ndarray, out: np.ndarray, spare: np.ndarray) -> np.ndarray:
    """out = the `tuned` that `difference` was given. Four arrays of one shape and unsigned type."""
    np.bitwise_and(diff, 1, out=spare)
    np.negative(spare, out=spare)
    np.right_shift(diff, 1, out=out)
    np.bitwise_xor(out, spare, out=out)
    return np.add(out, raw, out=out)


def can_cast(source: str, target: str) -> bool:
    """Whether `cast` can turn one element type into the other: both the same, or both floats of 16 bits or more."""
    return source == target or (source in CASTABLE and target in CASTABLE)


def cast(values: np.ndarray, source: str, target: str) -> np.ndarray:
    """Bit patterns of one float type -> bit patterns of another, through float32, rounding to nearest, ties to even.

    The result depends on the values alone, not on machine or library. Raises ValueError for types `can_cast` excludes.
    """
    if source == target:
        return values
    if not can_cast(source, target):
        raise ValueError(f"source: {source} cannot be cast to {target}")
    return from_float32(to_float32(values, source), target)


def to_float32(values: np.ndarray, source: str) -> np.ndarray:
    """Bit patterns of a float type -> float32 numbers; exact except from F64, which is rounded to nearest."""
    if source == "F32":
        return values.view(np.float32)
    if source == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore"):
        return values.view({"F16": np.float16, "F64": np.float64}[source]).astype(np.float32)


def from_float32(numbers: np.ndarray, target: str) -> np.ndarray:
    """float32 numbers -> bit patterns of a float type, rounded to nearest, ties to even; every NaN becomes one NaN."""
    wide = numbers.view(np.uint32)
    if target == "F32":
        result = wide
    elif target == "BF16":
        result = ((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16).astype(np.uint16)
    else:
        with np.errstate(over="ignore"):
            result = numbers.astype({"F16": np.float16, "F64": np.float64}[target]).view(pattern(target))
    nan = np.isnan(numbers)
    return np.where(nan, pattern(target).type(NAN[target]), result) if nan.any() else result
