"""Instructions on bits: logic, shifts, fields, permutations of bytes. Knows integers only."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

import numpy as np

from tests.support.ptx.batch import Batch, Maker, Run
from tests.support.ptx.errors import PtxError
from tests.support.ptx.number_types import SIGNED, UNSIGNED, dtype_of
from tests.support.ptx.program import Instr


def logic(function: Any) -> Maker:
    def make(batch: Batch, instr: Instr, qualifiers: list[str]) -> Run:
        return batch.in_place(instr, qualifiers[-1], function)

    return make


def invert(batch: Batch, instr: Instr, qualifiers: list[str]) -> Run:
    function = np.logical_not if qualifiers[-1] == "pred" else np.invert
    return batch.in_place(instr, qualifiers[-1], function)


def shift_left(batch: Batch, instr: Instr, qualifiers: list[str]) -> Run:
    kind = qualifiers[-1]
    dtype = dtype_of(kind)

    def run(a: Any, by: Any) -> Any:
        return np.left_shift(a, np.minimum(by, np.uint32(255)).astype(dtype))

    return batch.elementwise(instr, kind, run, kinds=[kind, "u32"])


def shift_right(batch: Batch, instr: Instr, qualifiers: list[str]) -> Run:
    kind = qualifiers[-1].replace("b", "u")
    dtype = dtype_of(kind)

    def run(a: Any, by: Any) -> Any:
        return np.right_shift(a, np.minimum(by, np.uint32(255)).astype(dtype))

    return batch.elementwise(instr, kind, run, kinds=[kind, "u32"])


def in_64_bits(low: Any, high: Any) -> Any:
    return np.asarray(high).astype(np.uint64) << np.uint64(32) | np.asarray(low).astype(np.uint64)


def funnel_shift(batch: Batch, instr: Instr, qualifiers: list[str]) -> Run | None:
    direction, mode = qualifiers[:2]
    if mode not in ("wrap", "clamp"):
        return None

    def run(low: Any, high: Any, by: Any) -> Any:
        both, by = in_64_bits(low, high), np.asarray(by).astype(np.uint64)
        by = by & np.uint64(31) if mode == "wrap" else np.minimum(by, np.uint64(32))
        moved = both >> by if direction == "r" else (both << by) >> np.uint64(32)
        return moved.astype(np.uint32)

    return batch.elementwise(instr, "b32", run)


def extract_field(batch: Batch, instr: Instr, qualifiers: list[str]) -> Run:
    kind = qualifiers[-1]
    bits = int(kind[1:])

    def run(a: Any, start: Any, length: Any) -> Any:
        if np.ndim(start) or np.ndim(length) or not 0 < length <= bits - start:
            raise PtxError("bfe with unusual fields is not implemented")
        dtype = (SIGNED if kind[0] == "s" else UNSIGNED)[bits]
        return (a << dtype(bits - start - length)) >> dtype(bits - length)

    return batch.elementwise(instr, kind, run, kinds=[kind, "u32", "u32"])


def insert_field(batch: Batch, instr: Instr, qualifiers: list[str]) -> Run | None:
    if qualifiers[-1] != "b32":
        return None

    def run(a: Any, b: Any, start: Any, length: Any) -> Any:
        if np.ndim(start) or np.ndim(length):
            raise PtxError("bfi with unusual fields is not implemented")
        field = np.uint32((((1 << int(length)) - 1) << int(start)) & 0xFFFFFFFF)
        return (a << start) & field | b & ~field

    return batch.elementwise(instr, "b32", run)


def permute_bytes(batch: Batch, instr: Instr, qualifiers: list[str]) -> Run | None:
    if qualifiers != ["b32"]:
        return None

    def run(a: Any, b: Any, selector: Any) -> Any:
        both = in_64_bits(a, b)
        result = np.zeros(np.broadcast(a, b, selector).shape, np.uint32)
        for i in range(4):
            chosen = (np.asarray(selector).astype(np.uint64) >> np.uint64(4 * i)) & np.uint64(15)
            byte = (both >> (chosen & np.uint64(7)) * np.uint64(8)) & np.uint64(255)
            sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
            byte = np.where(chosen & np.uint64(8), sign, byte)
            result |= byte.astype(np.uint32) << np.uint32(8 * i)
        return result

    return batch.elementwise(instr, "b32", run)


def count_bits(batch: Batch, instr: Instr, qualifiers: list[str]) -> Run:
    return batch.elementwise(instr, qualifiers[-1], np.bitwise_count, "u32")


def logic_by_table(batch: Batch, instr: Instr, qualifiers: list[str]) -> Run:
    table = int(instr.args[-1], 0)

    def run(a: Any, b: Any, c: Any) -> Any:
        result = np.zeros(batch.num_lanes, np.uint32)
        for i in range(8):
            if table >> i & 1:
                result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        return result

    return batch.elementwise(replace(instr, args=instr.args[:-1]), "b32", run)


INSTRUCTIONS: Final[dict[str, Maker]] = {
    "and": logic(np.bitwise_and),
    "or": logic(np.bitwise_or),
    "xor": logic(np.bitwise_xor),
    "not": invert,
    "shl": shift_left,
    "shr": shift_right,
    "shf": funnel_shift,
    "bfe": extract_field,
    "bfi": insert_field,
    "prmt": permute_bytes,
    "lop3": logic_by_table,
    "popc": count_bits,
}
