"""How results are rounded to float32, float16 and bfloat16. Knows arrays of numbers, no threads.

A bfloat16 is its bits, in uint16; so is a float16 that has just been rounded to.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.support.ptx.errors import PtxError


def bf16_to_f32(bits: NDArray) -> NDArray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(numbers: NDArray, mode: str | None = "rn") -> NDArray:
    """Bits, rounded to nearest even or (rz) towards zero; NaN is 0x7fff."""
    bits = np.ascontiguousarray(numbers, np.float32).view(np.uint32)
    upper = bits >> np.uint32(16)
    if mode == "rn":
        upper = (bits + np.uint32(0x7FFF) + (upper & np.uint32(1))) >> np.uint32(16)
    elif mode != "rz":
        raise PtxError(f"rounding {mode} to bf16 is not implemented")
    return np.where(np.isnan(numbers), np.uint32(0x7FFF), upper).astype(np.uint16)


def f32_to_f16(numbers: NDArray, mode: str | None = "rn") -> NDArray:
    if mode != "rn":
        raise PtxError(f"rounding {mode} to f16 is not implemented")
    return f64_to_f16(np.asarray(numbers))


def f64_to_f16(numbers: NDArray) -> NDArray:
    """Bits of exact results (or of one float64 operation), rounded to fp16."""
    half = numbers.astype(np.float16).view(np.uint16)
    return np.where(np.isnan(numbers), np.uint16(0x7FFF), half)


def f64_to_bf16(numbers: NDArray) -> NDArray:
    """As `f64_to_f16`: through float32, rounded to odd on the way."""
    single = cut_to_f32(np.asarray(numbers, np.float64)).astype(np.float32)
    bits = np.ascontiguousarray(single).view(np.uint32)
    inexact = (single.astype(np.float64) != numbers) & np.isfinite(numbers)
    return f32_to_bf16((bits | inexact.astype(np.uint32)).view(np.float32))


def cut_to_f32(numbers: NDArray) -> NDArray:
    """float64 cut off to float32's bits, still in float64."""
    rounded = numbers.astype(np.float32)
    too_far = np.abs(rounded.astype(np.float64)) > np.abs(numbers)
    return np.where(too_far, np.nextafter(rounded, np.float32(0)), rounded).astype(np.float64)


def flush(numbers: NDArray) -> NDArray:
    """Subnormal float32 become zeros of their sign: .ftz."""
    tiny = np.float32(2.0**-126)
    return np.where(np.abs(numbers) < tiny, np.copysign(np.float32(0), numbers), numbers)


def fma_odd(a: Any, b: Any, c: Any) -> NDArray:
    """a * b + c of float32 or less in float64, rounded to odd: rounding that again is exact."""
    product = np.asarray(a, np.float64) * np.asarray(b, np.float64)
    c = np.asarray(c, np.float64)
    total = product + c
    back = total - product  # the error of the sum, by Knuth, is one more bit for it
    error = (product - (total - back)) + (c - back)
    inexact = (error != 0) & np.isfinite(error) & np.isfinite(total)
    if inexact.any():
        bits = np.atleast_1d(total).view(np.int64)
        even = inexact & ((bits & 1) == 0)
        away = (error > 0) == (total > 0)  # from zero, towards the exact value
        total = np.where(even, (bits + np.where(away, 1, -1)).view(np.float64), total)
    return total


def fma_f32(a: Any, b: Any, c: Any) -> NDArray:
    return fma_odd(a, b, c).astype(np.float32)
