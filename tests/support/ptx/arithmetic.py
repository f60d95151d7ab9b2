"""Sums, products, quotients, extremes and approximate functions. Knows numbers, no memory.

Each operation is rounded as a GPU's. Approximate ones are rounded correctly, or with noise: off by
a random part of what the manual allows them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final

import numpy as np

from tests.support.ptx.batch import Batch, Maker, Run
from tests.support.ptx.number_types import dtype_of, wider
from tests.support.ptx.program import Instr
from tests.support.ptx.rounding import (
    bf16_to_f32,
    f64_to_bf16,
    f64_to_f16,
    flush,
    fma_f32,
    fma_odd,
)


def binary(function: Any) -> Maker:
    def make(batch: Batch, instr: Instr, qualifiers: list[str]) -> Run | None:
        kind, flags = qualifiers[-1], set(qualifiers[:-1])
        if flags - {"rn", "ftz"}:
            return None
        if kind in ("f16x2", "bf16x2"):
            return packed(batch, instr, kind, function)
        if kind in ("f16", "bf16"):
            return halves(batch, instr, kind, function)
        if "ftz" in flags:
            return batch.elementwise(instr, kind, partial(flushed, function))
        return batch.in_place(instr, kind, function)

    return make


def flushed(function: Any, a: Any, b: Any) -> Any:
    """Of two numbers, with zero in place of what is subnormal on either side."""
    return flush(function(flush(a), flush(b)))


def unary(function: Any) -> Maker:
    def make(batch: Batch, instr: Instr, qualifiers: list[str]) -> Run:
        kind = qualifiers[-1]
        if kind in ("f16x2", "bf16x2"):
            return packed(batch, instr, kind, function)
        if kind == "bf16":
            return halves(batch, instr, kind, function)
        return batch.in_place(instr, kind, function)

    return make


def packed(batch: Batch, instr: Instr, kind: str, function: Callable[..., Any]) -> Run:
    """f16x2 and bf16x2: function on float64 (exact for one operation), rounded once."""
    destination, *words = instr.args
    sources = [batch.source(word, "b32") for word in words]
    write = batch.writer(destination, "b32")
    is_f16 = kind == "f16x2"

    def unpack(bits: Any) -> Any:
        both = np.ascontiguousarray(np.atleast_1d(bits)).view(np.uint16).reshape(-1, 2)
        return (both.view(np.float16) if is_f16 else bf16_to_f32(both)).astype(np.float64)

    def run(mask: Any) -> None:
        result = function(*(unpack(source) for source in sources))
        bits = f64_to_f16(result) if is_f16 else f64_to_bf16(result)
        write(np.ascontiguousarray(bits).view(np.uint32)[:, 0], mask)

    return run


def halves(batch: Batch, instr: Instr, kind: str, function: Callable[..., Any]) -> Run:
    """f16 and bf16: likewise."""
    is_f16 = kind == "f16"

    def run(*sources: Any) -> Any:
        wide = (np.asarray(each if is_f16 else bf16_to_f32(np.asarray(each))) for each in sources)
        result = function(*(each.astype(np.float64) for each in wide))
        return f64_to_f16(result) if is_f16 else f64_to_bf16(result)

    return batch.elementwise(instr, "f16" if is_f16 else "b16", run, "b16")


def multiply(batch: Batch, instr: Instr, qualifiers: list[str]) -> Run | None:
    part, kind = qualifiers[0], qualifiers[-1]
    if part == "lo":
        return batch.in_place(instr, kind, np.multiply)
    if part not in ("wide", "hi"):
        return binary(np.multiply)(batch, instr, qualifiers)
    if part == "hi" and kind[1:] == "64":
        return None
    dtype, bits = dtype_of(wider(kind)), int(kind[1:])

    def run(a: Any, b: Any) -> Any:
        product = np.asarray(a).astype(dtype) * np.asarray(b).astype(dtype)
        return product if part == "wide" else product >> dtype(bits)

    return batch.elementwise(instr, kind, run, wider(kind) if part == "wide" else kind)


def multiply_add(batch: Batch, instr: Instr, qualifiers: list[str]) -> Run | None:
    part, kind = qualifiers[0], qualifiers[-1]
    if part not in ("wide", "lo"):
        return None
    out = wider(kind) if part == "wide" else kind
    dtype = dtype_of(out)

    def run(a: Any, b: Any, c: Any) -> Any:
        return np.asarray(a).astype(dtype) * np.asarray(b).astype(dtype) + c

    return batch.elementwise(instr, kind, run, out, [kind, kind, out])


def fused_multiply_add(batch: Batch, instr: Instr, qualifiers: list[str]) -> Run | None:
    kind, flags = qualifiers[-1], set(qualifiers[:-1])
    if flags - {"rn"}:
        return None
    if kind == "f32":
        return batch.elementwise(instr, kind, fma_f32)
    if kind in ("f16x2", "bf16x2"):
        return packed(batch, instr, kind, fma_odd)
    return halves(batch, instr, kind, fma_odd) if kind in ("f16", "bf16") else None


def divide(batch: Batch, instr: Instr, qualifiers: list[str]) -> Run | None:
    kind = qualifiers[-1]
    if kind[0] in "su":
        return batch.elementwise(instr, kind, lambda a, b: quotient(a, b)[0])
    if kind != "f32" or qualifiers[0] not in ("full", "rn", "approx"):
        return None
    if qualifiers[0] == "rn":
        return batch.in_place(instr, "f32", np.divide)
    return batch.elementwise(instr, "f32", lambda a, b: noisy(batch, np.divide(a, b), 2))


def remainder(batch: Batch, instr: Instr, qualifiers: list[str]) -> Run:
    return batch.elementwise(instr, qualifiers[-1], lambda a, b: quotient(a, b)[1])


def quotient(a: Any, b: Any) -> tuple[Any, Any]:
    """C's quotient and remainder; anything where b is 0."""
    a, b = np.asarray(a), np.asarray(b)
    b = np.where(b == 0, b.dtype.type(1), b)
    floor = a // b
    is_below = (floor * b != a) & ((a < 0) != (b < 0))
    towards_zero = np.where(is_below, floor + a.dtype.type(1), floor)
    return towards_zero, a - towards_zero * b


def extremum(*, least: bool) -> Maker:
    def make(batch: Batch, instr: Instr, qualifiers: list[str]) -> Run | None:
        kind, flags = qualifiers[-1], set(qualifiers[:-1])
        if kind[0] in "su":
            return batch.in_place(instr, kind, np.minimum if least else np.maximum)
        if kind != "f32" or flags - {"NaN"}:
            return None
        functions = (np.minimum, np.maximum) if "NaN" in flags else (np.fmin, np.fmax)
        function: Any = functions[0] if least else functions[1]

        def run(a: Any, b: Any) -> Any:
            result, a, b = np.asarray(function(a, b)), np.asarray(a), np.asarray(b)
            if (zeros := (a == 0) & (b == 0)).any():  # -0 is below +0
                bits = a.view(np.uint32), b.view(np.uint32)
                signs = bits[0] | bits[1] if least else bits[0] & bits[1]
                result = np.where(zeros, signs.view(np.float32), result)
            canonical = np.uint32(0x7FFFFFFF).view(np.float32)
            return np.where(np.isnan(result), canonical, result)

        return batch.elementwise(instr, kind, run)

    return make


def noisy(batch: Batch, result: Any, ulps: float, absolute: float = 0.0) -> Any:
    """As random as the seed and the result are: the same everywhere where that is the same."""
    if batch.settings.noise is None:
        return result
    result = np.asarray(result, np.float32)
    mixed = result.view(np.uint32).astype(np.uint64) + np.uint64(batch.settings.noise)
    mixed = mixed * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(40)
    size = np.spacing(np.abs(result)).astype(np.float64) * ulps + absolute
    off = (result + size * (mixed / 2.0**23 - 1)).astype(np.float32)
    return np.where(np.isfinite(result) & (result != 0), off, result)


def approximate(function: Any, ulps: float, absolute: float = 0.0) -> Maker:
    def make(batch: Batch, instr: Instr, qualifiers: list[str]) -> Run | None:
        if qualifiers[-1] != "f32" or qualifiers[0] != "approx":
            return None
        flags = set(qualifiers[1:-1])
        if flags - {"ftz"}:
            return None

        def run(a: Any) -> Any:
            a = flush(a) if flags else a
            result = function(np.asarray(a, np.float64)).astype(np.float32)
            result = noisy(batch, result, ulps, absolute)
            return flush(result) if flags else result

        return batch.elementwise(instr, "f32", run)

    return make


INSTRUCTIONS: Final[dict[str, Maker]] = {
    "add": binary(np.add),
    "sub": binary(np.subtract),
    "mul": multiply,
    "mad": multiply_add,
    "fma": fused_multiply_add,
    "div": divide,
    "rem": remainder,
    "abs": unary(np.abs),
    "neg": unary(np.negative),
    "min": extremum(least=True),
    "max": extremum(least=False),
    "ex2": approximate(np.exp2, 2),
    "lg2": approximate(np.log2, 1, 2.0**-22),
    "rcp": approximate(np.reciprocal, 1),
}
