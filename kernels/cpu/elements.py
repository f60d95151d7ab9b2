"""Elements of keys, values and rows as float vectors in registers: loaded, decoded and encoded.

Knows kinds of elements, nothing of what they stand for.
"""

from __future__ import annotations

from typing import Any, Final

from llvmlite import ir

from .vectors import BYTE, FLOAT, HALF, INT, SHORT, Emitter

CODE_BITS: Final = {"int8": 8, "int4": 4, "int2": 2, "int1": 1}
ELEMENT_BYTES: Final = {"float32": 4, "bfloat16": 2, "float16": 2, **dict.fromkeys(CODE_BITS, 1)}
NUM_PLANES: Final = {
    **dict.fromkeys(("float32", "bfloat16", "float16"), 1),
    **{kind: 8 // bits for kind, bits in CODE_BITS.items()},
}
ELEMENT_TYPES: Final[dict[str, Any]] = {"float32": FLOAT, "bfloat16": SHORT, "float16": HALF}
NAN_BITS: Final = 0x7FC00000  # of a float32


def decode(emitter: Emitter, raw: Any, kind: str, shift: int = 0) -> list[Any]:
    """The float vectors, one a plane, in a raw vector of keys or values.

    Codes of fewer than 8 bits count 2**shift times.
    """
    builder, lanes = emitter.builder, raw.type.count
    floats, ints = ir.VectorType(FLOAT, lanes), ir.VectorType(INT, lanes)
    if kind == "float32":
        return [raw]
    if kind == "float16":
        return [emitter.half_to_float(raw)]
    if kind == "bfloat16":
        bits = builder.shl(builder.zext(raw, ints), emitter.integers(16, INT, lanes))
        return [builder.bitcast(bits, floats)]
    if kind == "int8":  # offset 128 to two's complement
        signed = builder.xor(raw, emitter.integers(0x80, BYTE, lanes))
        return [builder.sitofp(builder.sext(signed, ints), floats)]
    bits = CODE_BITS[kind]
    wide = builder.zext(raw, ints)
    if shift:
        wide = builder.shl(wide, emitter.integers(shift, INT, lanes))
    planes = []
    for plane in range(NUM_PLANES[kind]):
        codes = wide
        if plane:
            codes = builder.lshr(wide, emitter.integers(plane * bits, INT, lanes))
        if shift or plane + 1 < NUM_PLANES[kind]:
            mask = (1 << bits) - 1 << shift
            codes = builder.and_(codes, emitter.integers(mask, INT, lanes))
        planes.append(builder.sitofp(codes, floats))
    return planes


def load_raw(emitter: Emitter, address: Any, kind: str, lanes: int) -> Any:
    return emitter.load(address, ELEMENT_TYPES.get(kind, BYTE), lanes)


def encode(emitter: Emitter, floats: Any, kind: str) -> Any:
    """A float32 vector as elements of open blocks, rounded to even; the inverse of `decode`."""
    builder, lanes = emitter.builder, floats.type.count
    if kind == "float32":
        return floats
    if kind == "float16":
        return builder.fptrunc(floats, ir.VectorType(HALF, lanes))
    ints = ir.VectorType(INT, lanes)
    bits = builder.bitcast(floats, ints)
    is_odd = builder.and_(
        builder.lshr(bits, emitter.integers(16, INT, lanes)), emitter.integers(1, INT, lanes)
    )
    rounded = builder.add(bits, builder.add(is_odd, emitter.integers(0x7FFF, INT, lanes)))
    is_number = builder.fcmp_ordered("ord", floats, floats)
    rounded = builder.select(is_number, rounded, emitter.integers(NAN_BITS, INT, lanes))
    high = builder.lshr(rounded, emitter.integers(16, INT, lanes))
    return builder.trunc(high, ir.VectorType(SHORT, lanes))
