"""PTX's types as numpy's, and immediates. Knows words of a program, no registers."""

from __future__ import annotations

import re
import struct
from typing import Any, Final

import numpy as np

from tests.support.ptx.errors import PtxError

FLOATS: Final[dict[str, type]] = {"f16": np.float16, "f32": np.float32, "f64": np.float64}
UNSIGNED: Final[dict[int, type]] = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED: Final[dict[int, type]] = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
PACKED: Final = {"f16x2": np.uint32, "bf16x2": np.uint32, "bf16": np.uint16}  # as bits

IMMEDIATE: Final = re.compile(r"-?\d.*")


def bits_of(kind: str) -> int:
    """Of a type such as s32, b64, f32."""
    return int(np.dtype(dtype_of(kind)).itemsize) * 8


def dtype_of(kind: str) -> type:
    if kind in FLOATS:
        return FLOATS[kind]
    if kind in PACKED:
        return PACKED[kind]
    width = int(kind[1:])
    return SIGNED[width] if kind[0] == "s" else UNSIGNED[width]


def wider(kind: str) -> str:
    """The integer type of twice the bits."""
    return f"{kind[0]}{int(kind[1:]) * 2}"


def parse_number(word: str, kind: str) -> Any:
    """An immediate as a numpy scalar of a type; 0f and 0d begin the bits of a float."""
    dtype, width = dtype_of(kind), bits_of(kind)
    lower = word.rstrip("U").lower()
    if match := re.fullmatch(r"0f([0-9a-f]{8})|0d([0-9a-f]{16})", lower):
        raw = bytes.fromhex(match[1] or match[2])
        if kind in FLOATS:
            return dtype(struct.unpack(">f" if match[1] else ">d", raw)[0])
        return UNSIGNED[width](int.from_bytes(raw, "big"))
    if not re.fullmatch(r"-?(0x[0-9a-f]+|\d+)", lower):
        if kind not in FLOATS:
            raise PtxError(f"not a number of type {kind}: {word}")
        return dtype(float(lower))
    number = int(lower, 0)
    if kind in FLOATS and not lower.startswith("0x"):
        return dtype(number)
    return UNSIGNED[width](number & ((1 << width) - 1)).view(dtype)
