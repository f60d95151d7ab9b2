"""The inner loops of linear layers on a CPU as machine code: sums of products, and what ends them.

Knows addresses and element kinds, no layers. Rows and weights are both read along their channels;
sums lie in the lanes and are added up at the end of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, Final

from llvmlite import ir

from .elements import ELEMENT_BYTES, decode, encode, load_raw
from .matrix_tiles import BLOCK_WEIGHTS, TILE_BYTES, TILE_CHANNELS, transposed
from .matrix_tiles import TILE_ROWS as MATRIX_ROWS
from .vectors import FLOAT, INT, SHORT, Emitter, MachineCode, host_features, host_width

TILE_WEIGHTS: Final = 4  # rows of a weight that a tile multiplies at once ...
TILE_ROWS: Final = {16: 6, 8: 3, 4: 2}  # ... with so many rows, by lanes of a vector
UNIT_WEIGHTS: Final = 32  # a thread's unit of work: rows of a weight ...
UNIT_ROWS: Final = 64  # ... with rows; both stay in the second cache
SUM_BYTES: Final = UNIT_ROWS * UNIT_WEIGHTS * 4  # of a unit, for one weight
ROW_BYTES_AT_ONCE: Final = 4096  # of a row: a tile's rows stay in the first cache
WIDE_BYTES: Final = UNIT_WEIGHTS * ROW_BYTES_AT_ONCE
# Of a thread: sums for two weights, codes of a unit widened, then units.
SCRATCH_BYTES: Final = 2 * SUM_BYTES + WIDE_BYTES + 1024
PREFETCHED_ROWS: Final = 4  # so few take less time than their weights take to come
assert UNIT_WEIGHTS == BLOCK_WEIGHTS  # where a unit's sums are is where a block's are
# Whether this processor multiplies pairs of bfloat16 as fast as it multiplies floats.
HAS_PAIRS: Final = host_width() == 16 and "+avx512bf16" in host_features()
ACTIVATIONS: Final = ("silu", "gelu_tanh")
LOG2_E: Final = 1 / math.log(2)


@cache
def tile_kernel(kind: str, rows: int, is_paired: bool, adds: bool) -> MachineCode:
    """Sums of products of `rows` rows with `TILE_WEIGHTS` rows of a weight of `kind`.

    Arguments: rows, weight (addresses), their strides in bytes, number of channels, target
    [rows][UNIT_WEIGHTS] in float32, to which the sums are added if it `adds`. `is_paired`: rows are
    bfloat16, as the weight.
    """
    lanes = host_width() * (2 if is_paired else 1)  # channels at once
    emitter = Emitter("linear", 6)
    source, weight, row_stride, weight_stride, num_channels, target = emitter.arguments
    builder = emitter.builder
    zero = emitter.constant(0.0, host_width())
    sums = [[emitter.variable(zero) for _ in range(TILE_WEIGHTS)] for _ in range(rows)]
    row_bytes = 2 if is_paired else 4
    row_starts = [
        builder.add(source, builder.mul(row_stride, emitter.long(row))) for row in range(rows)
    ]
    weight_starts = [
        builder.add(weight, builder.mul(weight_stride, emitter.long(column)))
        for column in range(TILE_WEIGHTS)
    ]
    with emitter.loop(emitter.long(0), num_channels, lanes) as channel:
        at_row = emitter.times(channel, row_bytes)
        at_weight = emitter.times(channel, ELEMENT_BYTES[kind])
        for start in weight_starts if rows <= PREFETCHED_ROWS else ():
            ahead = builder.mul(weight_stride, emitter.long(TILE_WEIGHTS))
            emitter.prefetch(emitter.offset(start, at_weight, ahead))
        columns = [
            load_weights(emitter, builder.add(start, at_weight), kind, is_paired)
            for start in weight_starts
        ]
        for row, start in enumerate(row_starts):
            element = SHORT if is_paired else FLOAT
            vector = emitter.load(builder.add(start, at_row), element, lanes)
            for column, place in zip(columns, sums[row], strict=True):
                product = multiply_pairs if is_paired else Emitter.fma
                builder.store(product(emitter, vector, column, builder.load(place)), place)
    for row, places in enumerate(sums):
        total = sum_lanes(emitter, [builder.load(place) for place in places])
        at = emitter.offset(target, row * UNIT_WEIGHTS * 4)
        if adds:
            total = builder.fadd(total, emitter.load(at, FLOAT, TILE_WEIGHTS))
        emitter.store(total, at)
    return MachineCode("linear", emitter.finish())


def load_weights(emitter: Emitter, address: Any, kind: str, is_paired: bool) -> Any:
    """A vector of weights as rows are: floats, or bfloat16, which hold every code of 8 bits."""
    builder, lanes = emitter.builder, host_width() * (2 if is_paired else 1)
    raw = load_raw(emitter, address, kind, lanes)
    if kind != "int8":
        return raw if is_paired else decode(emitter, raw, kind)[0]
    parts = [raw]
    if is_paired:
        undefined, half = ir.Constant(raw.type, ir.Undefined), lanes // 2
        places = [
            ir.Constant(ir.VectorType(INT, half), list(range(n, n + half))) for n in (half, 0)
        ]
        parts = [builder.shuffle_vector(raw, undefined, each) for each in places]
    ints = [builder.sext(part, ir.VectorType(INT, part.type.count)) for part in parts]
    floats = [builder.sitofp(each, ir.VectorType(FLOAT, each.type.count)) for each in ints]
    if not is_paired:
        return floats[0]
    kind = ir.VectorType(SHORT, lanes)
    return emitter.call("llvm.x86.avx512bf16.cvtne2ps2bf16.512", kind, *floats)


@cache
def widen_kernel(kind: str, is_paired: bool) -> MachineCode:
    """Rows of a weight of `kind` as rows of what they are multiplied with, one behind the other.

    Arguments: weight, its stride in bytes, number of its rows, number of channels, target.
    """
    emitter = Emitter("widen", 5)
    weight, stride, num_rows, num_channels, target = emitter.arguments
    builder, lanes = emitter.builder, host_width() * (2 if is_paired else 1)
    row_bytes = 2 if is_paired else 4
    with emitter.loop(emitter.long(0), num_rows, 1) as row:
        source = builder.add(weight, builder.mul(row, stride))
        start = builder.mul(emitter.times(row, row_bytes), num_channels)
        with emitter.loop(emitter.long(0), num_channels, lanes) as channel:
            at = builder.add(source, emitter.times(channel, ELEMENT_BYTES[kind]))
            weights = load_weights(emitter, at, kind, is_paired)
            place = emitter.offset(target, start, emitter.times(channel, row_bytes))
            emitter.store(weights, place)
    return MachineCode("widen", emitter.finish())


@cache
def pack_kernel(kind: str) -> MachineCode:
    """`BLOCK_WEIGHTS` rows of a weight of `kind` in bfloat16 as `matrix_tiles` has them.

    Arguments: weight, its stride in bytes, number of its rows (of fewer, the last stands for those
    that are missing), number of channels, target [channels / 32][BLOCK_WEIGHTS / 16][16][64 bytes].
    """
    emitter = Emitter("pack", 5)
    weight, stride, num_rows, num_channels, target = emitter.arguments
    builder, last = emitter.builder, emitter.builder.sub(num_rows, emitter.long(1))
    for first in range(0, BLOCK_WEIGHTS, MATRIX_ROWS):
        starts = []
        for row in range(first, first + MATRIX_ROWS):
            is_there = builder.icmp_signed("<", emitter.long(row), num_rows)
            place = builder.select(is_there, emitter.long(row), last)
            starts.append(builder.add(weight, builder.mul(stride, place)))
        with emitter.loop(emitter.long(0), num_channels, TILE_CHANNELS) as channel:
            at = emitter.times(channel, ELEMENT_BYTES[kind])
            rows = [load_weights(emitter, builder.add(start, at), kind, True) for start in starts]
            pairs = [builder.bitcast(row, ir.VectorType(INT, MATRIX_ROWS)) for row in rows]
            place = emitter.offset(target, emitter.times(channel, 2 * BLOCK_WEIGHTS))
            for row, vector in enumerate(transposed(emitter, pairs)):
                emitter.store(vector, emitter.offset(place, (first + row) * TILE_BYTES))
    return MachineCode("pack", emitter.finish())


def multiply_pairs(emitter: Emitter, a: Any, b: Any, c: Any) -> Any:
    """The products of pairs of bfloat16, added to the lanes of `c`: VDPBF16PS."""
    return emitter.call("llvm.x86.avx512bf16.dpbf16ps.512", c.type, c, a, b)


def sum_lanes(emitter: Emitter, vectors: Sequence[Any]) -> Any:
    """The sums of four vectors, as one of four lanes; pairs within 128 bits come first."""
    builder = emitter.builder

    def added(a: Any, b: Any, places: Sequence[int]) -> Any:
        """The sum of two arrangements of lanes, given for each four of `a` and then of `b`."""
        count = a.type.count
        halves = [
            [
                group + place if place < 4 else count + group + place - 4
                for group in range(0, count, 4)
                for place in places[start : start + 4]
            ]
            for start in (0, 4)
        ]
        shuffled = [
            builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(INT, count), half))
            for half in halves
        ]
        return builder.fadd(*shuffled)

    first, second = (added(a, b, (0, 4, 1, 5, 2, 6, 3, 7)) for a, b in (vectors[:2], vectors[2:]))
    return emitter.halved(added(first, second, (0, 1, 4, 5, 2, 3, 6, 7)), 4)


@cache
def finish_kernel(
    activation: str | None,
    bias_kind: str | None,
    kind: str,
    has_residual: bool,
    has_scale: bool,
    lanes: int,
) -> MachineCode:
    """A unit's sums as outputs of `kind`: scaled, biases added, the second of two multiplied.

    Arguments: sums [2][UNIT_ROWS][UNIT_WEIGHTS], of each weight scales and bias (addresses),
    residual, which an output is added to, outputs, the stride in bytes of both, number of rows,
    number of columns, not fewer than lanes. Columns behind the last whole vector are computed with
    those before them once more, so that outputs and residual must not share memory.
    """
    emitter = Emitter("finish", 10)
    sums, *factors_and_biases, residual, target, stride, num_rows, num_columns = emitter.arguments
    scale, bias, second_scale, second_bias = factors_and_biases
    builder, last = emitter.builder, emitter.variable(emitter.long(0))
    builder.store(builder.sub(num_columns, emitter.long(lanes)), last)

    def biased(vector: Any, factors: Any, start: Any, column: Any) -> Any:
        if has_scale:
            at = builder.add(factors, emitter.times(column, 4))
            vector = builder.fmul(vector, emitter.load(at, FLOAT, lanes))
        if bias_kind is None:
            return vector
        at = builder.add(start, emitter.times(column, ELEMENT_BYTES[bias_kind]))
        return builder.fadd(
            vector, decode(emitter, load_raw(emitter, at, bias_kind, lanes), bias_kind)[0]
        )

    with emitter.loop(emitter.long(0), num_rows, 1) as row:
        line = builder.add(sums, emitter.times(row, UNIT_WEIGHTS * 4))
        before = builder.mul(row, stride)
        with emitter.loop(emitter.long(0), num_columns, lanes) as position:
            behind = builder.icmp_signed(">", position, builder.load(last))
            column = builder.select(behind, builder.load(last), position)
            at = builder.add(line, emitter.times(column, 4))
            vector = biased(emitter.load(at, FLOAT, lanes), scale, bias, column)
            if activation is not None:
                second = emitter.load(emitter.offset(at, SUM_BYTES), FLOAT, lanes)
                second = biased(second, second_scale, second_bias, column)
                vector = builder.fmul(activated(emitter, vector, activation), second)
            at = builder.add(before, emitter.times(column, ELEMENT_BYTES[kind]))
            if has_residual:  # rounded before, as it would be in a tensor of its own
                vector = decode(emitter, encode(emitter, vector, kind), kind)[0]
                raw = load_raw(emitter, builder.add(residual, at), kind, lanes)
                vector = builder.fadd(vector, decode(emitter, raw, kind)[0])
            emitter.store(encode(emitter, vector, kind), builder.add(target, at))
    return MachineCode("finish", emitter.finish())


def activated(emitter: Emitter, vector: Any, activation: str) -> Any:
    """x / (1 + e**-t): of SiLU t is x, of GELU by tanh 2 sqrt(2/pi) (x + 0.044715 x**3)."""
    builder, lanes = emitter.builder, vector.type.count
    exponent = vector
    if activation == "gelu_tanh":
        slope = 2 * math.sqrt(2 / math.pi)
        factor = emitter.fma(
            builder.fmul(vector, vector),
            emitter.constant(0.044715 * slope, lanes),
            emitter.constant(slope, lanes),
        )
        exponent = builder.fmul(vector, factor)
    is_negative = builder.fcmp_ordered("<", exponent, emitter.constant(0.0, lanes))
    scaled = builder.fmul(emitter.absolute(exponent), emitter.constant(-LOG2_E, lanes))
    power = emitter.exp2(scaled)  # at most 1: nothing overflows
    numerator = builder.select(is_negative, builder.fmul(vector, power), vector)
    return builder.fdiv(numerator, builder.fadd(emitter.constant(1.0, lanes), power))
