"""Linear layers on a CPU, for any number of rows, on weights as they lie in memory.

Knows matrices, nothing of models. Rows and weights are both read along their channels, and sums lie
in the lanes, to be added up at the end of a tile: so weights need neither packing nor a second
copy, and those of half precision are widened in registers. Where the processor multiplies pairs of
bfloat16, rows of bfloat16 stay such.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from functools import cache
from struct import Struct
from typing import Any, Final, NamedTuple

import torch
from llvmlite import ir
from torch import Tensor

from .microkernels import ELEMENT_BYTES, decode, load_raw
from .native_code import (
    address_of,
    address_or_0,
    call,
    fetch_add,
    load_long,
    native,
    thread_scratch,
    worker,
)
from .threads import run_worker
from .vectors import FLOAT, INT, SHORT, Emitter, MachineCode, host_features, host_width

TILE_WEIGHTS: Final = 4  # rows of a weight that a tile multiplies at once ...
TILE_ROWS: Final = {16: 6, 8: 3, 4: 2}  # ... with so many rows, by lanes of a vector
UNIT_WEIGHTS: Final = 32  # a thread's unit of work: rows of a weight ...
UNIT_ROWS: Final = 48  # ... with rows; both stay in the second cache
PREFETCHED_ROWS: Final = 4  # so few take less time than their weights take to come
SCRATCH_BYTES: Final = 2 * UNIT_ROWS * UNIT_WEIGHTS * 4  # sums of a unit, for two weights
KINDS: Final = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}
ACTIVATIONS: Final = ("silu", "gelu_tanh")
LOG2_E: Final = 1 / math.log(2)


class Weight(NamedTuple):
    """Of a linear layer: [N, K] with K contiguous, and what is added, [N]."""

    matrix: Tensor
    bias: Tensor | None = None


class CallFields(NamedTuple):
    """Of a call; names of matrices are their addresses, strides are in bytes."""

    counters: int  # next unit of work, next thread
    scratch: int
    rows: int
    row_stride: int
    num_rows: int
    outputs: int  # one behind the other
    layer: int  # its fields


class LayerFields(NamedTuple):
    """Of the weights of a call, at an address of their own."""

    num_outputs: int
    num_channels: int
    item_bytes: int  # of an output's element
    tile_rows: int
    tiles: int  # the first of `tile_rows` addresses of microkernels
    lanes: int


class OutputFields(NamedTuple):
    """Of an output, behind those of the layer; names of matrices and microkernels are addresses."""

    first_column: int  # among those of all outputs
    num_columns: int
    weight_stride: int
    weight: int
    bias: int
    second_weight: int  # 0 but for gated outputs
    second_bias: int
    bias_bytes: int  # of an element; 0 without a bias
    finish: int
    finish_narrow: int  # of fewer columns than lanes


CALL: Final = CallFields(*range(len(CallFields._fields)))
LAYER: Final = LayerFields(*range(len(LayerFields._fields)))
OUTPUT: Final = OutputFields(*range(len(OutputFields._fields)))
NUM_LAYER, NUM_OUTPUT = len(LAYER), len(OUTPUT)
CALL_STRUCT: Final = Struct(f"={len(CALL)}q")


# -- microkernels ---------------------------------------------------------------------------------


@cache
def tile_kernel(kind: str, rows: int, is_paired: bool) -> MachineCode:
    """Sums of products of `rows` rows with `TILE_WEIGHTS` rows of a weight of `kind`.

    Arguments: rows, weight (addresses), their strides in bytes, number of channels, target
    [rows][UNIT_WEIGHTS] in float32. `is_paired`: rows are bfloat16, as the weight.
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
            load_raw(emitter, builder.add(start, at_weight), kind, lanes) for start in weight_starts
        ]
        if not is_paired:
            columns = [decode(emitter, raw, kind)[0] for raw in columns]
        for row, start in enumerate(row_starts):
            element = SHORT if is_paired else FLOAT
            vector = emitter.load(builder.add(start, at_row), element, lanes)
            for column, place in zip(columns, sums[row], strict=True):
                product = multiply_pairs if is_paired else Emitter.fma
                builder.store(product(emitter, vector, column, builder.load(place)), place)
    for row, places in enumerate(sums):
        total = sum_lanes(emitter, [builder.load(place) for place in places])
        emitter.store(total, emitter.offset(target, row * UNIT_WEIGHTS * 4))
    return MachineCode("linear", emitter.finish())


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
    activation: str | None, bias_kind: str | None, kind: str, lanes: int
) -> MachineCode:
    """A unit's sums as outputs of `kind`: biases added, the second of two multiplied.

    Arguments: sums [2][UNIT_ROWS][UNIT_WEIGHTS], bias and second bias (addresses), outputs, their
    stride in bytes, number of rows, number of columns, not fewer than lanes. Columns behind the
    last whole vector are computed with those before them once more.
    """
    emitter = Emitter("finish", 7)
    sums, bias, second_bias, target, target_stride, num_rows, num_columns = emitter.arguments
    builder, last = emitter.builder, emitter.variable(emitter.long(0))
    builder.store(builder.sub(num_columns, emitter.long(lanes)), last)

    def biased(vector: Any, start: Any, column: Any) -> Any:
        if bias_kind is None:
            return vector
        at = builder.add(start, emitter.times(column, ELEMENT_BYTES[bias_kind]))
        return builder.fadd(
            vector, decode(emitter, load_raw(emitter, at, bias_kind, lanes), bias_kind)[0]
        )

    with emitter.loop(emitter.long(0), num_rows, 1) as row:
        line = builder.add(sums, emitter.times(row, UNIT_WEIGHTS * 4))
        output = builder.add(target, builder.mul(row, target_stride))
        with emitter.loop(emitter.long(0), num_columns, lanes) as position:
            behind = builder.icmp_signed(">", position, builder.load(last))
            column = builder.select(behind, builder.load(last), position)
            at = builder.add(line, emitter.times(column, 4))
            vector = biased(emitter.load(at, FLOAT, lanes), bias, column)
            if activation is not None:
                second = emitter.load(emitter.offset(at, SCRATCH_BYTES // 2), FLOAT, lanes)
                second = biased(second, second_bias, column)
                vector = builder.fmul(activated(emitter, vector, activation), second)
            at = builder.add(output, emitter.times(column, ELEMENT_BYTES[kind]))
            emitter.store(rounded(emitter, vector, kind), at)
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


def rounded(emitter: Emitter, vector: Any, kind: str) -> Any:
    """A float vector as float32, or as the nearest bfloat16, to even."""
    if kind == "float32":
        return vector
    builder, lanes = emitter.builder, vector.type.count
    bits = builder.bitcast(vector, ir.VectorType(INT, lanes))
    odd = builder.and_(
        builder.lshr(bits, emitter.integers(16, INT, lanes)), emitter.integers(1, INT, lanes)
    )
    up = builder.add(builder.add(bits, emitter.integers(0x7FFF, INT, lanes)), odd)
    quiet = emitter.integers(0x7FC00000, INT, lanes)  # not a number stays so
    up = builder.select(builder.fcmp_unordered("uno", vector, vector), quiet, up)
    return builder.trunc(
        builder.lshr(up, emitter.integers(16, INT, lanes)), ir.VectorType(SHORT, lanes)
    )


# -- the worker -----------------------------------------------------------------------------------


@native
def multiply_unit(
    p: int, output: int, scratch: int, first_row: int, num_rows: int, first: int, last: int
) -> None:
    """Sums of one unit: rows with the columns from `first` to `last`, four at a time."""
    layer, row_stride = load_long(p, CALL.layer), load_long(p, CALL.row_stride)
    num_channels = load_long(layer, LAYER.num_channels)
    rows = load_long(p, CALL.rows) + first_row * row_stride
    weight_stride = load_long(output, OUTPUT.weight_stride)
    weight, second = load_long(output, OUTPUT.weight), load_long(output, OUTPUT.second_weight)
    tile_rows, tiles = load_long(layer, LAYER.tile_rows), load_long(layer, LAYER.tiles)
    num_tiles = -(-num_rows // tile_rows)
    while weight:
        row = 0
        for tile in range(num_tiles):  # as even as can be
            count = (num_rows - row) // (num_tiles - tile)
            column = first
            while column < last:
                column = min(column, last - TILE_WEIGHTS)
                call(
                    load_long(tiles, count - 1),
                    (rows + row * row_stride, weight + column * weight_stride, row_stride,
                     weight_stride, num_channels,
                     scratch + row * (UNIT_WEIGHTS * 4) + (column - first) * 4),
                )  # fmt: skip
                column += TILE_WEIGHTS
            row += count
        weight, second, scratch = second, 0, scratch + SCRATCH_BYTES // 2


@native
def finish_unit(
    p: int, output: int, scratch: int, first_row: int, num_rows: int, first: int, last: int
) -> None:
    """The outputs of one unit."""
    layer = load_long(p, CALL.layer)
    item_bytes, bias_bytes = (
        load_long(layer, LAYER.item_bytes),
        load_long(output, OUTPUT.bias_bytes),
    )
    stride = load_long(output, OUTPUT.num_columns) * item_bytes
    before = load_long(output, OUTPUT.first_column) * load_long(p, CALL.num_rows) * item_bytes
    target = load_long(p, CALL.outputs) + before + first_row * stride + first * item_bytes
    is_narrow = last - first < load_long(layer, LAYER.lanes)
    call(
        load_long(output, OUTPUT.finish_narrow if is_narrow else OUTPUT.finish),
        (scratch, load_long(output, OUTPUT.bias) + first * bias_bytes,
         load_long(output, OUTPUT.second_bias) + first * bias_bytes,
         target, stride, num_rows, last - first),
    )  # fmt: skip


@native
def run_linear(p: int) -> None:
    """Take units of all outputs until none is left."""
    counters, layer = load_long(p, CALL.counters), load_long(p, CALL.layer)
    scratch = load_long(p, CALL.scratch) + SCRATCH_BYTES * fetch_add(counters + 8)
    num_rows, num_outputs = load_long(p, CALL.num_rows), load_long(layer, LAYER.num_outputs)
    row_units = -(-num_rows // UNIT_ROWS)
    index, before, output = 0, 0, layer + 8 * NUM_LAYER
    unit = fetch_add(counters)
    while index < num_outputs:
        num_columns = load_long(output, OUTPUT.num_columns)
        num_units = -(-num_columns // UNIT_WEIGHTS) * row_units
        if unit - before >= num_units:
            before += num_units
            index += 1
            output += 8 * NUM_OUTPUT
            continue
        column_unit, row_unit = divmod(unit - before, row_units)
        first = min(column_unit * UNIT_WEIGHTS, num_columns - TILE_WEIGHTS)
        last = min(first + UNIT_WEIGHTS, num_columns)
        first_row = row_unit * UNIT_ROWS
        count = min(UNIT_ROWS, num_rows - first_row)
        multiply_unit(p, output, scratch, first_row, count, first, last)
        finish_unit(p, output, scratch, first_row, count, first, last)
        unit = fetch_add(counters)


def run_linear_of(parameters: Any) -> None:
    run_linear(address_of(parameters))


@cache
def linear_worker() -> int:
    """The address of the worker, compiled when first asked for and kept on disk."""
    return int(worker(run_linear_of).address)


# -- calls ----------------------------------------------------------------------------------------


def has_bfloat16_unit() -> bool:
    """Whether this processor multiplies pairs of bfloat16 as fast as it multiplies floats."""
    return host_width() == 16 and "+avx512bf16" in host_features()


def kind_of(tensor: Tensor) -> str:
    return KINDS[tensor.dtype]


def is_served(weight: Tensor) -> bool:
    """Whether a weight [N, K] can be multiplied here."""
    return (
        weight.dtype in KINDS
        and weight.device.type == "cpu"
        and weight.ndim == 2
        and weight.stride(1) == 1
        and weight.shape[0] >= TILE_WEIGHTS
        and weight.shape[1] % (2 * host_width()) == 0
    )


def linear(rows: Tensor, weights: Sequence[Weight]) -> list[Tensor]:
    """`functional.linear` of rows [M, K] with each of several weights, [M, N] in their precision.

    All weights have one dtype. Sums are float32.
    """
    return DenseLayer(weights)(rows)


def gated_linear(rows: Tensor, gate: Weight, up: Weight, activation: str) -> Tensor:
    """activation(linear(rows, gate)) * linear(rows, up); the activation is one of `ACTIVATIONS`.

    Both have a bias or none has.
    """
    return DenseLayer([gate, up], activation)(rows)[0]


@cache
def tile_addresses(kind: str, is_paired: bool) -> tuple[int, ctypes.Array[Any]]:
    count = TILE_ROWS[host_width()]
    addresses = [tile_kernel(kind, rows + 1, is_paired).address for rows in range(count)]
    array = (ctypes.c_int64 * count)(*addresses)
    return ctypes.addressof(array), array


class DenseLayer:
    """Weights [N, K] that multiply the same rows, all of one dtype: an output [M, N] for each.

    With an `activation` there are two, and the one output is that of the first, activated, times
    that of the second.
    """

    def __init__(self, weights: Sequence[Weight], activation: str | None = None) -> None:
        assert activation is None or len({weight.bias is None for weight in weights}) == 1
        self.weights, self.activation = list(weights), activation
        self._places = [addresses(weight) for weight in self.weights]
        self._kind = kind_of(self.weights[0].matrix)
        step = 1 if activation is None else 2
        self._columns = [len(weight.matrix) for weight in self.weights[::step]]
        self._records: dict[bool, ctypes.Array[Any]] = {}

    def is_of(self, weights: Sequence[Weight]) -> bool:
        """Whether it was made of these weights, and they are where they were."""
        return [addresses(weight) for weight in weights] == self._places

    def __call__(self, rows: Tensor) -> list[Tensor]:
        precision = rows.dtype
        is_paired = precision is torch.bfloat16 and self._kind == "bfloat16" and has_bfloat16_unit()
        if not is_paired:
            rows = rows.to(torch.float32)
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        num_rows, columns = rows.shape[0], self._columns
        output = rows.new_empty(num_rows * sum(columns))
        self._multiply(rows, output, is_paired)
        output = output.to(precision)
        if len(columns) == 1:
            return [output.view(num_rows, columns[0])]
        parts = torch.split(output, [num_rows * count for count in columns])
        return [part.view(num_rows, n) for part, n in zip(parts, columns, strict=True)]

    def _multiply(self, rows: Tensor, output: Tensor, is_paired: bool) -> None:
        layer = self._records.get(is_paired)
        if layer is None:
            layer = self._records[is_paired] = self._record(is_paired)
        num_threads = torch.get_num_threads()
        counters = ctypes.create_string_buffer(2 * 8)
        fields = CallFields(
            ctypes.addressof(counters),
            thread_scratch("linear", num_threads, SCRATCH_BYTES).address,
            rows.data_ptr(),
            rows.stride(0) * rows.element_size(),
            rows.shape[0],
            output.data_ptr(),
            ctypes.addressof(layer),
        )
        record = ctypes.create_string_buffer(CALL_STRUCT.pack(*fields))
        run_worker(linear_worker(), ctypes.addressof(record), num_threads)

    def _record(self, is_paired: bool) -> ctypes.Array[Any]:
        """What the worker reads of this layer."""
        lanes, kind = host_width(), "bfloat16" if is_paired else "float32"
        fields: list[int] = [
            *LayerFields(
                num_outputs=len(self._columns),
                num_channels=self.weights[0].matrix.shape[1],
                item_bytes=ELEMENT_BYTES[kind],
                tile_rows=TILE_ROWS[lanes],
                tiles=tile_addresses(self._kind, is_paired)[0],
                lanes=lanes,
            )
        ]
        first_column = 0
        for place, num_columns in enumerate(self._columns):
            matrix, bias = self.weights[place]
            second = None if self.activation is None else self.weights[1]
            finish = [
                finish_kernel(self.activation, bias if bias is None else kind_of(bias), kind, n)
                for n in (lanes, TILE_WEIGHTS)
            ]
            fields += OutputFields(
                first_column=first_column,
                num_columns=num_columns,
                weight_stride=matrix.stride(0) * matrix.element_size(),
                weight=matrix.data_ptr(),
                bias=address_or_0(bias),
                second_weight=address_or_0(second and second.matrix),
                second_bias=address_or_0(second and second.bias),
                bias_bytes=0 if bias is None else bias.element_size(),
                finish=finish[0].address,
                finish_narrow=finish[1].address,
            )
            first_column += num_columns
        return (ctypes.c_int64 * len(fields))(*fields)


def addresses(weight: Weight) -> tuple[int, int]:
    return weight.matrix.data_ptr(), address_or_0(weight.bias)
