"""Moves, comparisons, choices and conversions between types. Knows registers only."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from tests.support.ptx.batch import Batch, Maker, Mask, Run
from tests.support.ptx.number_types import FLOATS, UNSIGNED, dtype_of
from tests.support.ptx.program import Instr
from tests.support.ptx.rounding import bf16_to_f32, f32_to_bf16, f32_to_f16

COMPARISONS: Final[dict[str, Any]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
ROUNDINGS: Final = ("rn", "rz", "rni", "rzi")


def move(batch: Batch, instr: Instr, qualifiers: list[str]) -> Run:
    kind = qualifiers[-1]
    destination, source = instr.args
    if isinstance(source, list):
        return pack(batch, instr, kind)
    if isinstance(destination, list):
        return unpack(batch, instr, kind)
    if kind == "pred" and source not in batch.program.registers:
        value: Any = bool(int(source, 0))
    else:
        value = batch.source(source, kind)
    write = batch.writer(destination, kind)
    return lambda mask: write(value, mask)


def pack(batch: Batch, instr: Instr, kind: str) -> Run:
    """Several registers into one, the lowest bits first."""
    destination, words = instr.args
    width, dtype = int(kind[1:]) // len(words), UNSIGNED[int(kind[1:])]
    parts = [batch.source(word, f"b{width}") for word in words]
    write = batch.writer(destination, kind)

    def run(mask: Mask) -> None:
        total = np.zeros(batch.num_lanes, dtype)
        for i, part in enumerate(parts):
            total |= np.asarray(part).astype(dtype) << dtype(width * i)
        write(total, mask)

    return run


def unpack(batch: Batch, instr: Instr, kind: str) -> Run:
    words, source = instr.args
    width, dtype = int(kind[1:]) // len(words), UNSIGNED[int(kind[1:])]
    value = batch.source(source, kind)
    writes = [batch.writer(word, f"b{width}") for word in words]

    def run(mask: Mask) -> None:
        whole = np.array(value, dtype)  # a copy: a part may be the source's own register
        for i, write in enumerate(writes):
            write((whole >> dtype(width * i)).astype(UNSIGNED[width]), mask)

    return run


def choose(batch: Batch, instr: Instr, qualifiers: list[str]) -> Run:
    kind = qualifiers[-1]
    destination, yes, no, predicate = instr.args
    sources = batch.register(predicate), batch.source(yes, kind), batch.source(no, kind)
    write = batch.writer(destination, kind)
    return lambda mask: write(np.where(*sources), mask)


def comparison(name: str, *, is_float: bool) -> Any:
    """By its name; of floats, an ordered one or one with a `u` behind it. None: not implemented."""
    if not is_float:
        return COMPARISONS.get(name)

    def unordered(a: Any, b: Any) -> Any:
        return np.isnan(a) | np.isnan(b)

    if name in ("num", "nan"):
        return unordered if name == "nan" else lambda a, b: ~unordered(a, b)
    if name in COMPARISONS:
        ordered = COMPARISONS[name]
        return lambda a, b: ordered(a, b) & ~unordered(a, b)
    if name[-1] == "u" and name[:-1] in COMPARISONS:
        ordered = COMPARISONS[name[:-1]]
        return lambda a, b: ordered(a, b) | unordered(a, b)
    return None


def compare(batch: Batch, instr: Instr, qualifiers: list[str]) -> Run | None:
    name, kind = qualifiers[0], qualifiers[-1]
    is_bf16 = kind == "bf16"
    function = comparison(name, is_float=kind in FLOATS or is_bf16)
    if function is None or len(qualifiers) > 2 or len(instr.args) > 3:
        return None
    if not isinstance(instr.args[0], str):
        return None
    if is_bf16:
        return batch.elementwise(
            instr, "b16", lambda a, b: function(bf16_to_f32(a), bf16_to_f32(b)), "pred"
        )
    return batch.elementwise(instr, kind, function, "pred")


def convert(batch: Batch, instr: Instr, qualifiers: list[str]) -> Run | None:
    *flags, target, source = qualifiers
    mode = next((flag for flag in flags if flag in ROUNDINGS), None)
    if set(flags) - {mode}:
        return None
    narrow: Any = {"f": f32_to_f16, "b": f32_to_bf16}[target[0]] if target[0] in "fb" else None
    if target in ("f16x2", "bf16x2"):

        def both(high: Any, low: Any) -> Any:
            upper = np.asarray(narrow(high, mode)).astype(np.uint32)
            return upper << np.uint32(16) | narrow(low, mode)

        return batch.elementwise(instr, "f32", both, "b32")
    if target in ("f16", "bf16") and source == "f32":
        return batch.elementwise(instr, "f32", lambda a: narrow(a, mode), "b16")
    if target == "f32" and source == "bf16":
        return batch.elementwise(instr, "b16", lambda a: bf16_to_f32(np.asarray(a)), "f32")
    if target == source == "f32" and mode == "rni":
        return batch.elementwise(instr, "f32", np.rint, "f32")
    if source == "f32" and target[0] in "su":
        return round_to_integer(batch, instr, target, mode)
    is_exact = (target, source) == ("f32", "f16") or (target[0] in "su" and source[0] in "su")
    is_rounded = target == "f32" and source[0] in "su" and mode == "rn"
    if (is_exact and mode is None) or is_rounded:
        dtype = dtype_of(target)
        return batch.elementwise(instr, source, lambda a: np.asarray(a).astype(dtype), target)
    return None


def round_to_integer(batch: Batch, instr: Instr, target: str, mode: str | None) -> Run | None:
    """Of float32: saturated, NaN to 0."""
    if mode not in ("rzi", "rni") or target[1:] == "64":
        return None
    dtype = dtype_of(target)
    limits = np.iinfo(dtype)

    def run(a: Any) -> Any:
        whole = (np.trunc if mode == "rzi" else np.rint)(np.asarray(a, np.float64))
        whole = np.where(np.isnan(whole), 0.0, whole)
        return np.clip(whole, float(limits.min), float(limits.max)).astype(dtype)

    return batch.elementwise(instr, "f32", run, target)


INSTRUCTIONS: Final[dict[str, Maker]] = {
    "mov": move,
    "cvta": move,
    "selp": choose,
    "setp": compare,
    "cvt": convert,
}
