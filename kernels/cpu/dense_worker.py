"""What threads do for linear layers on a CPU: units of sums, each a part of an output.

Knows records of numbers and microkernels' addresses, no tensors. The next unit is drawn before one
runs, and its weights are fetched meanwhile.
"""

from __future__ import annotations

from functools import cache
from struct import Struct
from typing import Any, Final, NamedTuple

from .dense_kernels import (
    SCRATCH_BYTES,
    SUM_BYTES,
    TILE_WEIGHTS,
    UNIT_ROWS,
    UNIT_WEIGHTS,
    WIDE_BYTES,
)
from .matrix_tiles import BLOCK_ROWS
from .matrix_tiles import TILE_ROWS as MATRIX_ROWS
from .native_code import address_of, call, fetch_add, load_long, native, store_long, worker

BLOCK_CHANNELS: Final = WIDE_BYTES // UNIT_WEIGHTS // 2  # of packed weights, at once


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
    pack: int  # a microkernel's address; 0: there are no tile registers for these
    blocks: int  # addresses of microkernels for one and two tiles of rows; then of those that add
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
def multiply_blocks(
    p: int, places: tuple[int, int, int, int], sizes: tuple[int, int], ahead: int
) -> None:
    """`multiply_tiles` on packed weights: all rows of a unit, which are `sizes`, over channels."""
    rows, weights, blocks, sums = places
    num_rows, num_channels = sizes
    row_stride, row = load_long(p, CALL.row_stride), 0
    while row < num_rows:
        count = min(num_rows - row, BLOCK_ROWS)
        if ahead:
            first, last = row * UNIT_WEIGHTS // num_rows, (row + count) * UNIT_WEIGHTS // num_rows
            fetch_rows(p, ahead, first, last, num_channels)
        call(
            load_long(blocks, 1 if count > MATRIX_ROWS else 0),
            (rows + row * row_stride, row_stride, count, weights, num_channels,
             sums + row * UNIT_WEIGHTS * 4),
        )  # fmt: skip
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
    pack, num_adding = 0, load_long(layer, LAYER.tile_rows)
    if num_rows > num_adding:  # each weight is read by several tiles
        widen, pack = load_long(layer, LAYER.widen), load_long(layer, LAYER.pack)
    if pack:
        widen, tiles = pack, load_long(layer, LAYER.blocks)
        at_once, num_adding = min(at_once, BLOCK_CHANNELS), 2
    elif widen:
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
            if pack:
                multiply_blocks(p, places, (num_rows, count), ahead)
            else:
                sizes = (num_rows, num_columns, count, count * row_bytes if widen else stride)
                multiply_tiles(p, places, sizes, ahead)
            kernels = tiles + 8 * num_adding  # those that add
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
