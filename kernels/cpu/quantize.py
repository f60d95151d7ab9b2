"""Copy tokens and quantize a block on a CPU, as machine code.

Knows addresses and element kinds, nothing of blocks. The codes are those of `eager.quantize`, bit
by bit: the same float32 operations in the same order, halves rounded to even.

Long because what writes a loop nests as the loop does, and a kernel is one nest of them.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Final

from llvmlite import ir

from ..code_bits import WIDE_BITS, lower_bits, upper_bits
from ..eager.quantize import FP16_MAX, INT8_LIMIT, INT8_OFFSET
from .elements import ELEMENT_TYPES, decode, encode
from .microkernels import MAX_DIM
from .vectors import (
    BYTE,
    FLOAT,
    HALF,
    INT,
    LONG,
    Emitter,
    MachineCode,
    host_width,
)

MAX_BLOCK_SIZE: Final = 128
KEY_ROW_BYTES: Final = (MAX_BLOCK_SIZE + 16) * 4  # of a channel's tokens in scratch
VALUE_ROW_BYTES: Final = (MAX_DIM + 16) * 4  # of a token's channels in scratch
COPY_UNROLL: Final = 8  # dims are multiples of 8
FEEDBACK_TOKENS: Final = 64  # of a channel, kept in registers: blocks are multiples of it


@cache
def copy_kernel(source_kind: str, target_kind: str) -> MachineCode:
    """Copy elements at strides: of one kind, to float32, or from float32, rounded to even.

    Arguments: source, source stride, target, target stride, count (a multiple of 8).
    """
    emitter = Emitter("copy", 5)
    source, source_stride, target, target_stride, count = emitter.arguments
    builder = emitter.builder
    with emitter.loop(emitter.long(0), count, COPY_UNROLL) as first:
        start = builder.add(source, builder.mul(first, source_stride))
        end = builder.add(target, builder.mul(first, target_stride))
        for _ in range(COPY_UNROLL):
            element = emitter.load(start, ELEMENT_TYPES[source_kind], 1)
            if source_kind != target_kind:
                [element] = decode(emitter, element, source_kind)
                element = encode(emitter, element, target_kind)
            emitter.store(element, end)
            start, end = builder.add(start, source_stride), builder.add(end, target_stride)
    return MachineCode("copy", emitter.finish())


def clamp(emitter: Emitter, vector: Any, low: float, high: float | Any) -> Any:
    lanes = vector.type.count
    vector = emitter.strict_maximum(vector, emitter.constant(low, lanes))
    most = emitter.constant(high, lanes) if isinstance(high, float) else high
    return emitter.strict_minimum(vector, most)


def to_half(emitter: Emitter, vector: Any) -> tuple[Any, Any]:
    """float32 rounded to half, saturating: the halves, and these as float32 again."""
    lanes = vector.type.count
    saturated = clamp(emitter, vector, -FP16_MAX, FP16_MAX)
    halves = emitter.builder.fptrunc(saturated, ir.VectorType(HALF, lanes))
    return halves, emitter.half_to_float(halves)


def to_codes(
    emitter: Emitter,
    vector: Any,
    scale: Any,
    low: float,
    high: float | Any,
    centre: float = 0.0,
) -> Any:
    """Quotients plus `centre`, rounded, as integers within [low, high]; the quotient is 0 where the
    scale is 0 or no number."""
    builder, lanes = emitter.builder, vector.type.count
    zero = emitter.constant(0.0, lanes)
    quotient = builder.fdiv(vector, scale)
    is_number = builder.fcmp_ordered("!=", scale, zero)
    quotient = builder.select(is_number, quotient, zero)
    is_number = builder.fcmp_ordered("ord", quotient, quotient)
    quotient = builder.select(is_number, quotient, zero)
    if centre:
        quotient = builder.fadd(quotient, emitter.constant(centre, lanes))
    rounded = clamp(emitter, emitter.round_to_even(quotient), low, high)
    return builder.fptosi(rounded, ir.VectorType(INT, lanes))


def store_bytes(emitter: Emitter, codes: Any, address: Any) -> None:
    emitter.store(emitter.builder.trunc(codes, ir.VectorType(BYTE, codes.type.count)), address)


def range_to_metadata(
    emitter: Emitter, low: Any, high: Any, clip: Any, top: Any, *, has_middle_zero: bool = False
) -> tuple[Any, Any, Any, Any]:
    """Scale and zero point of an asymmetric range: halves, and the same as float32."""
    builder, lanes = emitter.builder, low.type.count
    two = emitter.constant(2.0, lanes)
    middle = builder.fdiv(builder.fadd(low, high), two)
    half_range = builder.fmul(builder.fdiv(builder.fsub(high, low), two), clip)
    scale_half, scale = to_half(emitter, builder.fdiv(builder.fmul(two, half_range), top))
    zero = middle if has_middle_zero else builder.fsub(middle, half_range)
    zero_half, zero = to_half(emitter, zero)
    return scale_half, zero_half, scale, zero


@cache
def symmetric_key_kernel() -> MachineCode:
    """8-bit keys, one scale for each token; tokens in the lanes.

    Arguments: keys [key_dim][KEY_ROW_BYTES], key_dim, tokens, codes [key_dim][tokens], scale
    (half [tokens]).
    """
    lanes = host_width()
    emitter = Emitter("symmetric_keys", 5)
    keys, key_dim, num_tokens, codes, scale_address = emitter.arguments
    builder = emitter.builder
    with emitter.loop(emitter.long(0), num_tokens, lanes) as token:
        column = emitter.offset(keys, emitter.times(token, 4))
        top = emitter.variable(emitter.constant(0.0, lanes))
        with emitter.loop(emitter.long(0), key_dim, 1) as channel:
            place = emitter.offset(column, emitter.times(channel, KEY_ROW_BYTES))
            absolute = emitter.absolute(emitter.load(place, FLOAT, lanes))
            builder.store(emitter.strict_maximum(absolute, builder.load(top)), top)
        limit = emitter.constant(float(INT8_LIMIT), lanes)
        halves, scale = to_half(emitter, builder.fdiv(builder.load(top), limit))
        emitter.store(halves, emitter.offset(scale_address, emitter.times(token, 2)))
        with emitter.loop(emitter.long(0), key_dim, 1) as channel:
            place = emitter.offset(column, emitter.times(channel, KEY_ROW_BYTES))
            code = to_codes(
                emitter,
                emitter.load(place, FLOAT, lanes),
                scale,
                -float(INT8_LIMIT),
                float(INT8_LIMIT),
            )
            code = builder.add(code, emitter.integers(INT8_OFFSET, INT, lanes))
            line = emitter.offset(codes, builder.mul(channel, num_tokens), token)
            store_bytes(emitter, code, line)
    return MachineCode("symmetric_keys", emitter.finish())


@cache
def symmetric_value_kernel() -> MachineCode:
    """8-bit values, one scale for each token; channels in the lanes.

    Arguments: values [tokens][VALUE_ROW_BYTES], value_dim, tokens, codes [tokens][value_dim],
    scale (half [tokens]), and three that other kernels of values have.
    """
    lanes = min(host_width(), 8)
    emitter = Emitter("symmetric_values", 8)
    values, value_dim, num_tokens, codes, scale_address = emitter.arguments[:5]
    builder = emitter.builder
    with emitter.loop(emitter.long(0), num_tokens, 1) as token:
        row = emitter.offset(values, emitter.times(token, VALUE_ROW_BYTES))
        top = emitter.variable(emitter.constant(0.0, lanes))
        with emitter.loop(emitter.long(0), value_dim, lanes) as channel:
            place = emitter.offset(row, emitter.times(channel, 4))
            absolute = emitter.absolute(emitter.load(place, FLOAT, lanes))
            builder.store(emitter.strict_maximum(absolute, builder.load(top)), top)
        highest = emitter.splat(emitter.reduce(builder.load(top), emitter.strict_maximum), lanes)
        limit = emitter.constant(float(INT8_LIMIT), lanes)
        halves, scale = to_half(emitter, builder.fdiv(highest, limit))
        first = builder.extract_element(halves, ir.Constant(INT, 0))
        emitter.store(first, emitter.offset(scale_address, emitter.times(token, 2)))
        with emitter.loop(emitter.long(0), value_dim, lanes) as channel:
            place = emitter.offset(row, emitter.times(channel, 4))
            code = to_codes(
                emitter,
                emitter.load(place, FLOAT, lanes),
                scale,
                -float(INT8_LIMIT),
                float(INT8_LIMIT),
            )
            code = builder.add(code, emitter.integers(INT8_OFFSET, INT, lanes))
            store_bytes(
                emitter, code, emitter.offset(codes, builder.mul(token, value_dim), channel)
            )
    return MachineCode("symmetric_values", emitter.finish())


def lowest_and_highest(emitter: Emitter, start: Any, count: Any, lanes: int) -> tuple[Any, Any]:
    """Of `count` floats, in all lanes."""
    builder = emitter.builder
    first = emitter.load(start, FLOAT, lanes)
    low, high = emitter.variable(first), emitter.variable(first)
    with emitter.loop(emitter.long(lanes), count, lanes) as index:
        vector = emitter.load(emitter.offset(start, emitter.times(index, 4)), FLOAT, lanes)
        builder.store(emitter.strict_minimum(vector, builder.load(low)), low)
        builder.store(emitter.strict_maximum(vector, builder.load(high)), high)

    return (
        emitter.splat(emitter.reduce(builder.load(low), emitter.strict_minimum), lanes),
        emitter.splat(emitter.reduce(builder.load(high), emitter.strict_maximum), lanes),
    )


@cache
def channel_key_kernel(bits: int, *, has_wide: bool, has_feedback: bool) -> MachineCode:
    """Keys per channel in groups of tokens; tokens in the lanes, planes of tokens packed.

    Arguments: keys [key_dim][KEY_ROW_BYTES], key_dim, tokens, tokens of a group, codes
    [key_dim][code rows], scale and zero point (half [groups][key_dim]), address of the clip ratios
    of usual and of wide channels, scratch for codes (int32 [tokens]), wide channels (64-bit,
    ascending), how many, their upper codes [wide channels][rows of them], feedback (float
    [key_dim][key_dim]).

    With feedback the keys of a channel become its errors, which those behind it read.
    """
    lanes = host_width()
    emitter = Emitter("channel_keys", 13)
    keys, key_dim, num_tokens, key_group_size, codes, scale_at, zero_at = emitter.arguments[:7]
    clip_at, scratch, wide_channels, num_wide, upper_codes, feedback = emitter.arguments[7:]
    builder = emitter.builder
    usual_clip, wide_clip = (emitter.load(emitter.offset(clip_at, at), FLOAT) for at in (0, 4))
    usual_top, wide_top = (
        ir.Constant(FLOAT, float((1 << count) - 1)) for count in (bits, bits + WIDE_BITS)
    )
    offset = INT8_OFFSET if bits == 8 else 0
    num_rows = builder.udiv(num_tokens, emitter.long(8 // bits))
    num_wide_rows = builder.udiv(num_tokens, emitter.long(8 // WIDE_BITS))
    next_wide = emitter.variable(emitter.long(0))
    with emitter.loop(emitter.long(0), key_dim, 1) as channel:
        row = emitter.offset(keys, emitter.times(channel, KEY_ROW_BYTES))
        if has_feedback:
            take_errors(emitter, keys, row, channel, key_dim, num_tokens, feedback)
        clip, top, place = usual_clip, usual_top, builder.load(next_wide)
        if has_wide:
            last = builder.sub(num_wide, emitter.long(1))
            following = builder.select(builder.icmp_signed("<", place, last), place, last)
            following = emitter.offset(wide_channels, emitter.times(following, 8))
            is_wide = builder.icmp_signed("==", emitter.load(following, LONG), channel)
            clip = builder.select(is_wide, wide_clip, usual_clip)
            top = builder.select(is_wide, wide_top, usual_top)
        clip, top = emitter.splat(clip, lanes), emitter.splat(top, lanes)
        metadata = emitter.variable(emitter.times(channel, 2))
        with emitter.loop_by(emitter.long(0), num_tokens, key_group_size) as first:
            start = emitter.offset(row, emitter.times(first, 4))
            low, high = lowest_and_highest(emitter, start, key_group_size, lanes)
            scale_half, zero_half, scale, zero = range_to_metadata(
                emitter, low, high, clip, top, has_middle_zero=bool(offset)
            )
            at_group = builder.load(metadata)
            for halves, address in ((scale_half, scale_at), (zero_half, zero_at)):
                half = builder.extract_element(halves, ir.Constant(INT, 0))
                emitter.store(half, builder.add(address, at_group))
            builder.store(builder.add(at_group, emitter.times(key_dim, 2)), metadata)
            most = builder.fsub(top, emitter.constant(float(offset), lanes))
            with emitter.loop(emitter.long(0), key_group_size, lanes) as token:
                at = emitter.times(token, 4)
                vector = emitter.load(builder.add(start, at), FLOAT, lanes)
                shifted = builder.fsub(vector, zero)
                code = to_codes(emitter, shifted, scale, -float(offset), most)
                if has_feedback:
                    floats = builder.sitofp(code, ir.VectorType(FLOAT, lanes))
                    read = builder.fadd(builder.fmul(floats, scale), zero)
                    error = clamp(emitter, builder.fsub(vector, read), -FP16_MAX, FP16_MAX)
                    emitter.store(error, builder.add(start, at))
                code = builder.add(code, emitter.integers(offset, INT, lanes))
                emitter.store(code, emitter.offset(scratch, emitter.times(first, 4), at))
        line = emitter.offset(codes, builder.mul(channel, num_rows))
        pack_codes(emitter, scratch, line, num_rows, bits, 0)
        if has_wide:
            with builder.if_then(is_wide):
                upper = emitter.offset(upper_codes, builder.mul(place, num_wide_rows))
                pack_codes(emitter, scratch, upper, num_wide_rows, WIDE_BITS, bits)
                builder.store(builder.add(place, emitter.long(1)), next_wide)
    return MachineCode("channel_keys", emitter.finish())


def take_errors(
    emitter: Emitter,
    keys: Any,
    row: Any,
    channel: Any,
    key_dim: Any,
    num_tokens: Any,
    feedback: Any,
) -> None:
    """Take from a channel what the errors of all channels before it ask, one after the other.

    Products and differences are rounded one by one, as torch does.
    """
    builder, lanes = emitter.builder, host_width()
    vectors_at_once = FEEDBACK_TOKENS // lanes
    column = emitter.offset(feedback, emitter.times(channel, 4))
    with emitter.loop(emitter.long(0), num_tokens, FEEDBACK_TOKENS) as first:
        at_token = emitter.times(first, 4)
        places = [
            emitter.offset(row, at_token, vector * lanes * 4) for vector in range(vectors_at_once)
        ]
        sums = [emitter.variable(emitter.load(place, FLOAT, lanes)) for place in places]
        with emitter.loop(emitter.long(0), channel, 1) as earlier:
            weight = emitter.load(
                builder.add(column, emitter.times(builder.mul(earlier, key_dim), 4)), FLOAT
            )
            weight = emitter.splat(weight, lanes)
            errors = emitter.offset(keys, emitter.times(earlier, KEY_ROW_BYTES), at_token)
            for vector, total in enumerate(sums):
                error = emitter.load(emitter.offset(errors, vector * lanes * 4), FLOAT, lanes)
                builder.store(builder.fsub(builder.load(total), builder.fmul(error, weight)), total)
        for place, total in zip(places, sums, strict=True):
            emitter.store(builder.load(total), place)


def pack_codes(
    emitter: Emitter, scratch: Any, line: Any, num_rows: Any, bits: int, shift: int
) -> None:
    """The bits of a channel's codes from `shift` on, in bytes of all planes."""
    builder, lanes = emitter.builder, host_width()
    with emitter.loop(emitter.long(0), num_rows, lanes) as token_row:
        codes = []
        for plane in range(8 // bits):
            token = builder.add(token_row, emitter.times(num_rows, plane))
            place = emitter.offset(scratch, emitter.times(token, 4))
            codes.append(emitter.load(place, INT, lanes))
        store_packed(emitter, codes, shift, bits, builder.add(line, token_row))


def store_packed(emitter: Emitter, codes: list[Any], shift: int, bits: int, address: Any) -> None:
    """Bytes of the `bits` bits from `shift` on of codes of all planes."""
    builder, packed = emitter.builder, None
    for plane, code in enumerate(codes):
        lanes = code.type.count
        kept = builder.lshr(code, emitter.integers(shift, INT, lanes))
        kept = builder.and_(kept, emitter.integers((1 << bits) - 1, INT, lanes))
        kept = builder.shl(kept, emitter.integers(plane * bits, INT, lanes))
        packed = kept if packed is None else builder.or_(packed, kept)
    store_bytes(emitter, packed, address)


@cache
def value_kernel(bits: int, *, has_zero: bool) -> MachineCode:
    """Values of fewer than 8 bits per token; channels in the lanes, tokens of all planes packed.

    Arguments: values [tokens][VALUE_ROW_BYTES], value_dim, tokens, codes [code rows][value_dim],
    scale and, where there is one, zero point (half [tokens]), address of the clip ratio, upper
    codes [rows of them][value_dim]. Where there are such, a row of them takes the tokens of several
    rows of codes.
    """
    lower, upper = lower_bits(bits), upper_bits(bits)
    lanes, num_planes = min(host_width(), 8), 8 // (upper or lower)
    rows_at_once = num_planes * lower // 8
    emitter = Emitter("values", 8)
    values, value_dim, num_tokens, codes, scale_at, zero_at, clip_at, uppers = emitter.arguments
    builder, top = emitter.builder, float((1 << bits) - 1)
    clip = emitter.splat(emitter.load(clip_at, FLOAT), lanes)
    num_rows = builder.udiv(num_tokens, emitter.long(num_planes))
    with emitter.loop(emitter.long(0), num_rows, 1) as token_row:
        planes = []
        for plane in range(num_planes):
            token = builder.add(token_row, emitter.times(num_rows, plane))
            row = emitter.offset(values, emitter.times(token, VALUE_ROW_BYTES))
            low, high = lowest_and_highest(emitter, row, value_dim, lanes)
            zero = emitter.constant(0.0, lanes)
            if has_zero:
                halves, zeros, scale, zero = range_to_metadata(
                    emitter, low, high, clip, emitter.constant(top, lanes)
                )
                zero_half = builder.extract_element(zeros, ir.Constant(INT, 0))
                emitter.store(zero_half, emitter.offset(zero_at, emitter.times(token, 2)))
            else:
                greatest = emitter.strict_maximum(emitter.absolute(low), emitter.absolute(high))
                doubled = builder.fmul(emitter.constant(2.0, lanes), builder.fmul(greatest, clip))
                halves, scale = to_half(
                    emitter, builder.fdiv(doubled, emitter.constant(top, lanes))
                )
            half = builder.extract_element(halves, ir.Constant(INT, 0))
            emitter.store(half, emitter.offset(scale_at, emitter.times(token, 2)))
            planes.append((row, scale, zero))
        with emitter.loop(emitter.long(0), value_dim, lanes) as channel:
            numbers = []
            for row, scale, zero in planes:
                place = emitter.offset(row, emitter.times(channel, 4))
                vector = builder.fsub(emitter.load(place, FLOAT, lanes), zero)
                centre = 0.0 if has_zero else top / 2
                numbers.append(to_codes(emitter, vector, scale, 0.0, top, centre))
            for part in range(rows_at_once):
                code_row = builder.add(token_row, emitter.times(num_rows, part))
                line = emitter.offset(codes, builder.mul(code_row, value_dim), channel)
                store_packed(emitter, numbers[part::rows_at_once], 0, lower, line)
            if upper:
                line = emitter.offset(uppers, builder.mul(token_row, value_dim), channel)
                store_packed(emitter, numbers, lower, upper, line)
    return MachineCode("values", emitter.finish())
