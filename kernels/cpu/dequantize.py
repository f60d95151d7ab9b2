"""Read codes back as floats, as machine code: the inverse of `quantize`.

Knows addresses and element kinds, nothing of blocks. Values are those of `eager.quantize`, bit by
bit: the same float32 operations in the same order.

Long because what writes a loop nests as the loop does, and a kernel is one nest of them.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Final

from llvmlite import ir

from ..code_bits import WIDE_BITS, lower_bits, upper_bits
from ..eager.quantize import centre
from .elements import NUM_PLANES, decode, load_raw
from .vectors import BYTE, FLOAT, HALF, INT, Emitter, MachineCode

LANES: Final = 8  # channels and tokens come in multiples of it


@cache
def read_key_kernel(bits: int, *, has_token_scales: bool) -> MachineCode:
    """Keys [block_size, key_dim] in float32 of codes that lie channel by channel.

    Arguments: codes [key_dim][bytes], scales, zero points, target, key_dim, block_size, tokens of a
    group. Scales are halves [groups][key_dim], or with `has_token_scales`, and then there are no
    zero points, [block_size].
    """
    kind, emitter = f"int{bits}", Emitter("read_keys", 7)
    codes, scales, zeros, target, key_dim, block_size, group_size = emitter.arguments
    builder, num_planes = emitter.builder, NUM_PLANES[kind]
    num_rows = builder.sdiv(block_size, emitter.long(num_planes))
    all_channels = emitter.loop(emitter.long(0), key_dim, LANES)
    all_rows = emitter.loop(emitter.long(0), num_rows, LANES)
    with all_channels as channel, all_rows as row:
        planes = []
        for lane in range(LANES):
            at = builder.mul(emitter.offset(channel, lane), num_rows)
            raw = load_raw(emitter, emitter.offset(codes, at, row), kind, LANES)
            planes.append(decode(emitter, raw, kind))
        for plane, vectors in enumerate(zip(*planes, strict=True)):
            first = builder.add(row, builder.mul(num_rows, emitter.long(plane)))
            tokens = transposed(emitter, list(vectors))
            if not has_token_scales:
                group = builder.sdiv(first, group_size)
                place = emitter.times(builder.add(builder.mul(group, key_dim), channel), 2)
                scale = half_vector(emitter, builder.add(scales, place))
                zero = half_vector(emitter, builder.add(zeros, place))
            for lane, vector in enumerate(tokens):
                token = emitter.offset(first, lane)
                if has_token_scales:
                    scale = half_splat(emitter, builder.add(scales, emitter.times(token, 2)))
                vector = builder.fmul(vector, scale)
                if not has_token_scales:
                    vector = builder.fadd(vector, zero)
                place = builder.add(builder.mul(token, key_dim), channel)
                emitter.store(vector, builder.add(target, emitter.times(place, 4)))
    return MachineCode("read_keys", emitter.finish())


@cache
def read_wide_kernel(bits: int) -> MachineCode:
    """The channels of `read_key_kernel` that have WIDE_BITS more, once more with these.

    Arguments: as there, then wide codes [num_wide][bytes], wide channels (64-bit), how many.
    """
    kind, wide_kind, emitter = f"int{bits}", f"int{WIDE_BITS}", Emitter("read_wide", 10)
    codes, scales, zeros, target, key_dim, block_size, group_size = emitter.arguments[:7]
    wide_codes, wide_channels, num_wide = emitter.arguments[7:]
    builder, num_planes = emitter.builder, NUM_PLANES[kind]
    num_rows = builder.sdiv(block_size, emitter.long(num_planes))
    num_wide_rows = builder.sdiv(block_size, emitter.long(NUM_PLANES[wide_kind]))
    with emitter.loop(emitter.long(0), num_wide, 1) as index:
        channel = emitter.load(emitter.offset(wide_channels, emitter.times(index, 8)), key_dim.type)
        wide_row = builder.add(wide_codes, builder.mul(index, num_wide_rows))
        code_row = builder.add(codes, builder.mul(channel, num_rows))
        with emitter.loop(emitter.long(0), num_rows, LANES) as row:
            raw = load_raw(emitter, builder.add(code_row, row), kind, LANES)
            for plane, vector in enumerate(decode(emitter, raw, kind)):
                first = builder.add(row, builder.mul(num_rows, emitter.long(plane)))
                upper = upper_codes(emitter, wide_row, first, num_wide_rows, WIDE_BITS)
                upper = builder.fmul(upper, emitter.constant(float(1 << bits), LANES))
                vector = builder.fadd(vector, upper)
                group = builder.sdiv(first, group_size)
                place = emitter.times(builder.add(builder.mul(group, key_dim), channel), 2)
                vector = builder.fmul(vector, half_splat(emitter, builder.add(scales, place)))
                vector = builder.fadd(vector, half_splat(emitter, builder.add(zeros, place)))
                for lane in range(LANES):
                    token = builder.mul(emitter.offset(first, lane), key_dim)
                    at = emitter.times(builder.add(token, channel), 4)
                    element = builder.extract_element(vector, ir.Constant(INT, lane))
                    emitter.store(element, builder.add(target, at))
    return MachineCode("read_wide", emitter.finish())


@cache
def read_value_kernel(bits: int, *, has_zero: bool) -> MachineCode:
    """Values [block_size, value_dim] in float32 of codes that lie token by token.

    Arguments: codes [bytes][value_dim], upper codes, scales and zero points (halves
    [block_size]), target, value_dim, block_size.
    """
    kind, emitter = f"int{lower_bits(bits)}", Emitter("read_values", 7)
    codes, uppers, scales, zeros, target, value_dim, block_size = emitter.arguments
    builder, num_planes = emitter.builder, NUM_PLANES[kind]
    middle = emitter.constant(0.0 if has_zero or bits == 8 else centre(bits), LANES)
    num_rows = builder.sdiv(block_size, emitter.long(num_planes))
    num_upper = builder.sdiv(block_size, emitter.long(8 // (upper_bits(bits) or 8)))
    with emitter.loop(emitter.long(0), num_rows, 1) as row:
        tokens = [
            builder.add(row, builder.mul(num_rows, emitter.long(plane)))
            for plane in range(num_planes)
        ]
        halves = [emitter.times(token, 2) for token in tokens]
        factors = [half_splat(emitter, builder.add(scales, at)) for at in halves]
        shifts = [half_splat(emitter, builder.add(zeros, at)) for at in halves] if has_zero else []
        with emitter.loop(emitter.long(0), value_dim, LANES) as channel:
            at = builder.add(builder.mul(row, value_dim), channel)
            raw = load_raw(emitter, builder.add(codes, at), kind, LANES)
            for plane, vector in enumerate(decode(emitter, raw, kind)):
                token = tokens[plane]
                if upper_bits(bits):
                    above = upper_values(emitter, uppers, token, num_upper, value_dim, channel)
                    worth = emitter.constant(float(1 << lower_bits(bits)), LANES)
                    vector = builder.fadd(vector, builder.fmul(above, worth))
                vector = builder.fmul(builder.fsub(vector, middle), factors[plane])
                if has_zero:
                    vector = builder.fadd(vector, shifts[plane])
                place = builder.add(builder.mul(token, value_dim), channel)
                emitter.store(vector, builder.add(target, emitter.times(place, 4)))
    return MachineCode("read_values", emitter.finish())


def upper_values(
    emitter: Emitter, uppers: Any, token: Any, num_rows: Any, value_dim: Any, channel: Any
) -> Any:
    """The third bits of one token's values, as floats."""
    builder = emitter.builder
    row = builder.srem(token, num_rows)
    at = builder.add(builder.mul(row, value_dim), channel)
    return shifted_codes(emitter, builder.add(uppers, at), builder.sdiv(token, num_rows), 1)


def upper_codes(emitter: Emitter, row: Any, first: Any, num_rows: Any, bits: int) -> Any:
    """Codes of the tokens from `first` on of a row of bytes, as floats."""
    at = emitter.builder.add(row, emitter.builder.srem(first, num_rows))
    return shifted_codes(emitter, at, emitter.builder.sdiv(first, num_rows), bits)


def shifted_codes(emitter: Emitter, address: Any, plane: Any, bits: int) -> Any:
    """The codes of one plane, known only when it runs, of the bytes at an address."""
    builder, ints = emitter.builder, ir.VectorType(INT, LANES)
    wide = builder.zext(emitter.load(address, BYTE, LANES), ints)
    shift = builder.trunc(emitter.times(plane, bits), INT)
    shifted = builder.lshr(wide, emitter.splat(shift, LANES))
    mask = emitter.integers((1 << bits) - 1, INT, LANES)
    return builder.sitofp(builder.and_(shifted, mask), ir.VectorType(FLOAT, LANES))


def half_vector(emitter: Emitter, address: Any) -> Any:
    return emitter.half_to_float(emitter.load(address, HALF, LANES))


def half_splat(emitter: Emitter, address: Any) -> Any:
    return emitter.half_to_float(emitter.splat(emitter.load(address, HALF), LANES))


def transposed(emitter: Emitter, vectors: list[Any]) -> list[Any]:
    """As many vectors as lanes: lane i of vector j becomes lane j of vector i."""
    half = len(vectors) // 2
    while half:
        lanes = range(len(vectors))
        near = [lane + len(vectors) - half if lane & half else lane for lane in lanes]
        far = [lane + len(vectors) if lane & half else lane + half for lane in lanes]
        masks = [ir.Constant(ir.VectorType(INT, len(lanes)), order) for order in (near, far)]
        for index in lanes:
            if not index & half:
                pair = vectors[index], vectors[index + half]
                vectors[index], vectors[index + half] = (
                    emitter.builder.shuffle_vector(*pair, mask) for mask in masks
                )
        half //= 2
    return vectors
