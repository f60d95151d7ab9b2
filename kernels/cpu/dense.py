"""Linear layers on a CPU, for any number of rows, on weights as they lie in memory.

Knows matrices, nothing of models. Rows and weights are both read along their channels, and sums lie
in the lanes, to be added up at the end of a tile: so weights need neither packing nor a second
copy, and those of half precision are widened in registers. Where the processor multiplies pairs of
bfloat16, rows of bfloat16 stay such. Weights of 8 bits are widened for each unit of work, or in
registers for few rows, and their sums scaled.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from struct import Struct
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter, functional

from .dense_kernels import (
    HAS_PAIRS,
    ROW_BYTES_AT_ONCE,
    SCRATCH_BYTES,
    SUM_BYTES,
    TILE_ROWS,
    TILE_WEIGHTS,
    UNIT_ROWS,
    UNIT_WEIGHTS,
    WIDE_BYTES,
    finish_kernel,
    tile_kernel,
    widen_kernel,
)
from .elements import ELEMENT_BYTES
from .microkernels import prefetch_kernel
from .native_code import (
    KINDS,
    address_of,
    address_or_0,
    call,
    fetch_add,
    kind_of,
    load_long,
    native,
    store_long,
    thread_scratch,
    worker,
)
from .threads import run_worker
from .vectors import host_width

PAIRED_KINDS: Final = ("bfloat16", "int8")  # of weights that bfloat16 holds
WEIGHT_KINDS: Final = {**KINDS, torch.int8: "int8"}
MAX_PAIRED_ROWS: Final = 64  # of more rows of bfloat16 torch's products are faster


class Weight(NamedTuple):
    """Of a linear layer: [N, K] with K contiguous, what is added, [N], and factors of its rows.

    A matrix of int8 has factors, [N] contiguous in float32, and no other has.
    """

    matrix: Tensor
    bias: Tensor | None = None
    scale: Tensor | None = None


class CallFields(NamedTuple):
    """Of a call; names of matrices are their addresses, strides are in bytes."""

    counters: int  # next unit of work, next thread
    scratch: int
    rows: int
    row_stride: int
    num_rows: int
    outputs: int  # one behind the other
    residual: int  # what outputs are added to, as they lie; 0: nothing
    layer: int  # its fields


class LayerFields(NamedTuple):
    """Of the weights of a call, at an address of their own."""

    num_outputs: int
    num_channels: int
    row_bytes: int  # of an element of rows
    output_bytes: int  # of an element of outputs
    channels_at_once: int
    tile_rows: int
    tiles: int  # addresses of microkernels for 1 to `tile_rows` rows; then of those that add
    widen: int  # a microkernel's address; 0: weights are multiplied as they are
    wide_tiles: int  # as tiles, of widened weights
    weight_bytes: int  # of an element of a weight
    weight_stride: int
    lanes: int
    prefetch: int  # a microkernel's address


class OutputFields(NamedTuple):
    """Of an output, behind those of the layer; names of matrices and microkernels are addresses."""

    first_column: int  # among those of all outputs
    num_columns: int
    weight: int
    scale: int
    bias: int
    second_weight: int  # 0 but for gated outputs
    second_scale: int
    second_bias: int
    bias_bytes: int  # of an element; 0 without a bias
    finish: int
    finish_narrow: int  # of fewer columns than lanes


class UnitFields(NamedTuple):
    """A unit of work, in a thread's scratch."""

    output: int  # the address of its fields; 0: no unit
    first_row: int
    num_rows: int
    first: int  # column of the output ...
    last: int  # ... and one past the last


CALL: Final = CallFields(*range(len(CallFields._fields)))
LAYER: Final = LayerFields(*range(len(LayerFields._fields)))
OUTPUT: Final = OutputFields(*range(len(OutputFields._fields)))
UNIT: Final = UnitFields(*range(len(UnitFields._fields)))
NUM_LAYER, NUM_OUTPUT = len(LAYER), len(OUTPUT)
CALL_STRUCT: Final = Struct(f"={len(CALL)}q")


# -- the worker -----------------------------------------------------------------------------------


@native
def fetch_rows(p: int, weight: int, first: int, last: int, num_channels: int) -> None:
    """Bring some channels of some rows of a weight towards the processor."""
    layer = load_long(p, CALL.layer)
    stride = load_long(layer, LAYER.weight_stride)
    num_bytes = num_channels * load_long(layer, LAYER.weight_bytes)
    for row in range(first, last):
        call(load_long(layer, LAYER.prefetch), (weight + row * stride, num_bytes))


@native
def multiply_tiles(
    p: int, places: tuple[int, int, int, int], sizes: tuple[int, int, int, int], ahead: int
) -> None:
    """All tiles of a unit over some channels.

    `places` are the addresses of rows, weight, microkernels and sums; `sizes` number of rows, of
    columns and of channels, and the weight's stride. The weights of the next unit, at `ahead`, are
    fetched between tiles: they come from far.
    """
    rows, weight, tiles, sums = places
    num_rows, num_columns, num_channels, weight_stride = sizes
    row_stride, layer = load_long(p, CALL.row_stride), load_long(p, CALL.layer)
    tile_rows, row = load_long(layer, LAYER.tile_rows), 0
    num_tiles = -(-num_rows // tile_rows)
    turn, num_turns = 0, num_tiles * -(-num_columns // TILE_WEIGHTS)
    for tile in range(num_tiles):  # as even as can be
        count = (num_rows - row) // (num_tiles - tile)
        column = 0
        while column < num_columns:
            column = min(column, num_columns - TILE_WEIGHTS)
            if ahead:
                first, last = (
                    turn * UNIT_WEIGHTS // num_turns,
                    (turn + 1) * UNIT_WEIGHTS // num_turns,
                )
                fetch_rows(p, ahead, first, last, num_channels)
            call(
                load_long(tiles, count - 1),
                (rows + row * row_stride, weight + column * weight_stride, row_stride,
                 weight_stride, num_channels, sums + (row * UNIT_WEIGHTS + column) * 4),
            )  # fmt: skip
            column += TILE_WEIGHTS
            turn += 1
        row += count


@native
def find_unit(p: int, index: int, unit: int) -> None:
    """Where the unit of an index is; no output if there are not so many."""
    layer, num_rows = load_long(p, CALL.layer), load_long(p, CALL.num_rows)
    row_units = -(-num_rows // UNIT_ROWS)
    output = layer + 8 * NUM_LAYER
    for _ in range(load_long(layer, LAYER.num_outputs)):
        num_columns = load_long(output, OUTPUT.num_columns)
        num_units = -(-num_columns // UNIT_WEIGHTS) * row_units
        if index < num_units:
            column_unit, row_unit = divmod(index, row_units)
            first = min(column_unit * UNIT_WEIGHTS, num_columns - TILE_WEIGHTS)
            store_long(unit, UNIT.output, output)
            store_long(unit, UNIT.first_row, row_unit * UNIT_ROWS)
            store_long(unit, UNIT.num_rows, min(UNIT_ROWS, num_rows - row_unit * UNIT_ROWS))
            store_long(unit, UNIT.first, first)
            store_long(unit, UNIT.last, min(first + UNIT_WEIGHTS, num_columns))
            return
        index -= num_units
        output += 8 * NUM_OUTPUT
    store_long(unit, UNIT.output, 0)


@native
def weights_of(p: int, unit: int) -> int:
    """The address of the first weights of a unit; 0 for none."""
    output = load_long(unit, UNIT.output)
    if not output:
        return 0
    stride = load_long(load_long(p, CALL.layer), LAYER.weight_stride)
    return load_long(output, OUTPUT.weight) + load_long(unit, UNIT.first) * stride


@native
def multiply_unit(p: int, unit: int, following: int, scratch: int) -> None:
    """Sums of one unit, some channels at a time; `following` is the next one."""
    layer, output = load_long(p, CALL.layer), load_long(unit, UNIT.output)
    first, first_row = load_long(unit, UNIT.first), load_long(unit, UNIT.first_row)
    num_rows, num_columns = load_long(unit, UNIT.num_rows), load_long(unit, UNIT.last) - first
    num_channels = load_long(layer, LAYER.num_channels)
    at_once, tiles = load_long(layer, LAYER.channels_at_once), load_long(layer, LAYER.tiles)
    row_bytes = load_long(layer, LAYER.row_bytes)
    weight_bytes = load_long(layer, LAYER.weight_bytes)
    rows = load_long(p, CALL.rows) + first_row * load_long(p, CALL.row_stride)
    before = first * load_long(layer, LAYER.weight_stride)
    weight, second = weights_of(p, unit), load_long(output, OUTPUT.second_weight)
    stride, wide, widen = load_long(layer, LAYER.weight_stride), scratch + 2 * SUM_BYTES, 0
    if num_rows > load_long(layer, LAYER.tile_rows):  # each weight is read by several tiles
        widen = load_long(layer, LAYER.widen)
    if widen:
        tiles = load_long(layer, LAYER.wide_tiles)
    if second:
        second += before
    sums = scratch
    while weight:
        kernels, behind = tiles, second
        if not second:
            behind = weights_of(p, following)
        for channel in range(0, num_channels, at_once):
            start = weight + channel * weight_bytes
            count = min(at_once, num_channels - channel)
            ahead = behind
            if channel + at_once < num_channels:
                ahead = start + at_once * weight_bytes
            if widen:
                call(widen, (start, stride, num_columns, count, wide))
                start = wide
            places = (rows + channel * row_bytes, start, kernels, sums)
            sizes = (num_rows, num_columns, count, count * row_bytes if widen else stride)
            multiply_tiles(p, places, sizes, ahead)
            kernels = tiles + 8 * load_long(layer, LAYER.tile_rows)  # those that add
        weight, second, sums = second, 0, sums + SUM_BYTES


@native
def finish_unit(p: int, unit: int, scratch: int) -> None:
    """The outputs of one unit."""
    layer, output = load_long(p, CALL.layer), load_long(unit, UNIT.output)
    first, last = load_long(unit, UNIT.first), load_long(unit, UNIT.last)
    item_bytes = load_long(layer, LAYER.output_bytes)
    bias_bytes = load_long(output, OUTPUT.bias_bytes)
    stride = load_long(output, OUTPUT.num_columns) * item_bytes
    before = load_long(output, OUTPUT.first_column) * load_long(p, CALL.num_rows) * item_bytes
    before += load_long(unit, UNIT.first_row) * stride + first * item_bytes
    is_narrow = last - first < load_long(layer, LAYER.lanes)
    call(
        load_long(output, OUTPUT.finish_narrow if is_narrow else OUTPUT.finish),
        (scratch, load_long(output, OUTPUT.scale) + first * 4,
         load_long(output, OUTPUT.bias) + first * bias_bytes,
         load_long(output, OUTPUT.second_scale) + first * 4,
         load_long(output, OUTPUT.second_bias) + first * bias_bytes,
         load_long(p, CALL.residual) + before, load_long(p, CALL.outputs) + before, stride,
         load_long(unit, UNIT.num_rows), last - first),
    )  # fmt: skip


@native
def run_linear(p: int) -> None:
    """Take units of all outputs until none is left."""
    counters = load_long(p, CALL.counters)
    scratch = load_long(p, CALL.scratch) + SCRATCH_BYTES * fetch_add(counters + 8)
    unit = scratch + 2 * SUM_BYTES + WIDE_BYTES
    following = unit + 8 * len(UNIT)
    find_unit(p, fetch_add(counters), unit)
    while load_long(unit, UNIT.output):
        # The next unit is drawn before this one runs, so that its weights can be fetched ahead.
        find_unit(p, fetch_add(counters), following)
        multiply_unit(p, unit, following, scratch)
        finish_unit(p, unit, scratch)
        unit, following = following, unit


def run_linear_of(parameters: Any) -> None:
    run_linear(address_of(parameters))


@cache
def linear_worker() -> int:
    """The address of the worker, compiled when first asked for and kept on disk."""
    return int(worker(run_linear_of).address)


# -- calls ----------------------------------------------------------------------------------------


def is_served(weight: Tensor) -> bool:
    """Whether a weight [N, K] can be multiplied here; a tensor of another class lies elsewhere."""
    return (
        type(weight) in (Tensor, Parameter)
        and weight.dtype in WEIGHT_KINDS
        and weight.device.type == "cpu"
        and weight.ndim == 2
        and weight.is_contiguous()
        and weight.shape[0] >= TILE_WEIGHTS
        and weight.shape[1] % (2 * host_width()) == 0
        and not (weight.dtype is torch.int8 and weight.shape[0] % TILE_WEIGHTS)
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


def linear_by_torch(rows: Tensor, weight: Weight) -> Tensor:
    matrix, bias, scale = weight
    if scale is None:
        return functional.linear(rows, matrix, bias)
    output = functional.linear(rows, matrix.to(rows.dtype)).mul_(scale)
    return output if bias is None else output.add_(bias)


@cache
def tile_addresses(kind: str, is_paired: bool) -> tuple[int, ctypes.Array[Any]]:
    count = TILE_ROWS[host_width()]
    addresses = [
        tile_kernel(kind, rows + 1, is_paired, adds).address
        for adds in (False, True)
        for rows in range(count)
    ]
    array = (ctypes.c_int64 * len(addresses))(*addresses)
    return ctypes.addressof(array), array


class DenseLayer:
    """Weights [N, K] that multiply the same rows, all of one dtype: an output [M, N] for each.

    With an `activation` there are two, and the one output is that of the first, activated, times
    that of the second. Each has to be served (`is_served`). A call raises `ValueError` for rows of
    other channels.
    """

    def __init__(self, weights: Sequence[Weight], activation: str | None = None) -> None:
        assert activation is None or len({weight.bias is None for weight in weights}) == 1
        self.weights: Final = list(weights)
        self.activation: Final = activation
        self._places = [place_of(weight) for weight in self.weights]
        self._num_channels = self.weights[0].matrix.shape[1]
        self._kind = WEIGHT_KINDS[self.weights[0].matrix.dtype]
        step = 1 if activation is None else 2
        # Of each output.
        self.columns: Final = [len(weight.matrix) for weight in self.weights[::step]]
        self._records: dict[tuple[str, str, bool], ctypes.Array[Any]] = {}

    def is_of(self, weights: Sequence[Weight]) -> bool:
        """Whether it was made of these weights, and they are where they were."""
        return [place_of(weight) for weight in weights] == self._places

    def row_kind(self, dtype: torch.dtype) -> str:
        """What rows of a precision are multiplied as: pairs of bfloat16, or float32."""
        is_paired = dtype is torch.bfloat16 and self._kind in PAIRED_KINDS and HAS_PAIRS
        return "bfloat16" if is_paired else "float32"

    def __call__(self, rows: Tensor) -> list[Tensor]:
        precision = rows.dtype
        if rows.shape[1] != self._num_channels:
            raise ValueError(f"rows of {rows.shape[1]} channels, weights of {self._num_channels}")
        kind = self.row_kind(precision)
        if kind == "bfloat16" and rows.shape[0] > MAX_PAIRED_ROWS:
            return self._by_torch(rows)
        if kind == "float32":
            rows = rows.to(torch.float32)
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        num_rows, columns = rows.shape[0], self.columns
        output = rows.new_empty(num_rows * sum(columns))
        self._multiply(rows, output)
        output = output.to(precision)
        if len(columns) == 1:
            return [output.view(num_rows, columns[0])]
        parts = torch.split(output, [num_rows * count for count in columns])
        return [part.view(num_rows, n) for part, n in zip(parts, columns, strict=True)]

    def _by_torch(self, rows: Tensor) -> list[Tensor]:
        outputs = [linear_by_torch(rows, weight) for weight in self.weights]
        if self.activation is None:
            return outputs
        first, second = outputs
        if self.activation == "silu":
            return [functional.silu(first).mul_(second)]
        return [functional.gelu(first, approximate="tanh").mul_(second)]

    def _multiply(self, rows: Tensor, output: Tensor) -> None:
        num_threads = torch.get_num_threads()
        counters = ctypes.create_string_buffer(2 * 8)
        fields = CallFields(
            ctypes.addressof(counters),
            thread_scratch("linear", num_threads, SCRATCH_BYTES).address,
            rows.data_ptr(),
            rows.stride(0) * rows.element_size(),
            rows.shape[0],
            output.data_ptr(),
            0,
            self.record(*(kind_of(each) for each in (rows, output))),
        )
        record = ctypes.create_string_buffer(CALL_STRUCT.pack(*fields))
        run_worker(linear_worker(), ctypes.addressof(record), num_threads)

    def record(self, row_kind: str, output_kind: str, *, has_residual: bool = False) -> int:
        """The address of `LayerFields` for rows of a kind; valid as long as this object."""
        key = row_kind, output_kind, has_residual
        if key not in self._records:
            self._records[key] = self._record(*key)
        return ctypes.addressof(self._records[key])

    def _record(self, row_kind: str, output_kind: str, has_residual: bool) -> ctypes.Array[Any]:
        lanes, is_paired = host_width(), row_kind == "bfloat16"
        matrix = self.weights[0].matrix
        channels_at_once = ROW_BYTES_AT_ONCE // ELEMENT_BYTES[row_kind]
        if any(count % TILE_WEIGHTS for count in self.columns):
            channels_at_once = self._num_channels  # the last two tiles share columns
        fields: list[int] = [
            *LayerFields(
                num_outputs=len(self.columns),
                num_channels=self._num_channels,
                row_bytes=ELEMENT_BYTES[row_kind],
                output_bytes=ELEMENT_BYTES[output_kind],
                channels_at_once=channels_at_once,
                tile_rows=TILE_ROWS[lanes],
                tiles=tile_addresses(self._kind, is_paired)[0],
                widen=widen_kernel("int8", is_paired).address if self._kind == "int8" else 0,
                wide_tiles=tile_addresses(row_kind, is_paired)[0],
                weight_bytes=matrix.element_size(),
                weight_stride=matrix.shape[1] * matrix.element_size(),
                lanes=lanes,
                prefetch=prefetch_kernel().address,
            )
        ]
        first_column = 0
        for place, num_columns in enumerate(self.columns):
            matrix, bias, scale = self.weights[place]
            second = None if self.activation is None else self.weights[1]
            bias_kind = None if bias is None else kind_of(bias)
            finish = [
                finish_kernel(
                    self.activation, bias_kind, output_kind, has_residual, scale is not None, n
                )
                for n in (lanes, TILE_WEIGHTS)
            ]
            fields += OutputFields(
                first_column=first_column,
                num_columns=num_columns,
                weight=matrix.data_ptr(),
                scale=address_or_0(scale),
                bias=address_or_0(bias),
                second_weight=address_or_0(second and second.matrix),
                second_scale=address_or_0(second and second.scale),
                second_bias=address_or_0(second and second.bias),
                bias_bytes=0 if bias is None else bias.element_size(),
                finish=finish[0].address,
                finish_narrow=finish[1].address,
            )
            first_column += num_columns
        return (ctypes.c_int64 * len(fields))(*fields)


def place_of(weight: Weight) -> tuple[object, ...]:
    """Where a weight lies, and as what."""
    matrix, bias, scale = weight
    place = matrix.data_ptr(), matrix.dtype, matrix.shape
    return *place, address_or_0(bias), address_or_0(scale)
