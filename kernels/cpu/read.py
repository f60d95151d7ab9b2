"""Read stored tokens back as dense tensors on a CPU, without copies in between.

Knows a layer's blocks and places, nothing of sequences. What `eager.read` reads, bit by bit.
"""

from __future__ import annotations

import ctypes
from functools import cache
from struct import Struct
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from ..block_views import LayerBlocks
from ..stored_places import DenseTokens, StoredPlaces
from .dequantize import read_key_kernel, read_value_kernel, read_wide_kernel
from .microkernels import MAX_DIM, affine_kernel
from .native_code import (
    address_of,
    call,
    fetch_add,
    kind_of,
    load_long,
    native,
    thread_scratch,
    worker,
)
from .quantize import MAX_BLOCK_SIZE
from .rotation import rotate_kernel
from .store import LayerFields, stored_layer
from .threads import run_worker

TOKENS_AT_ONCE: Final = 8  # of open blocks, read by one thread before it asks for more
MIN_THREAD_UNITS: Final = 4  # kv heads of sealed blocks and groups of tokens
SCRATCH_BYTES: Final = MAX_BLOCK_SIZE * MAX_DIM * 4  # keys or values of a block


class CallFields(NamedTuple):
    """Of a call; names of arrays and of microkernels are their addresses, strides are in bytes."""

    counters: int  # next unit of work, next thread
    scratch: int
    num_open: int
    open_rows: int
    open_tokens: int
    open_slots: int
    num_sealed: int
    sealed_rows: int
    sealed_tokens: int
    sealed_ids: int
    columns: int
    num_columns: int
    keys: int
    key_row_stride: int  # from sequence to sequence
    key_head_stride: int
    key_bytes: int  # of a key
    values: int
    value_row_stride: int
    value_head_stride: int
    value_bytes: int
    write: int  # floats to elements of keys and values
    read_keys: int
    read_wide: int
    read_values: int
    rotate: int  # 0: values are not turned back


NUM_CALL, NUM_LAYER = len(CallFields._fields), len(LayerFields._fields)
# Places in 64-bit integers from the start of the record.
CALL: Final = CallFields(*range(NUM_CALL))
LAYER: Final = LayerFields(*range(NUM_CALL, NUM_CALL + NUM_LAYER))
UNCHANGED: Final = NUM_CALL + NUM_LAYER  # a shift of 0 and a factor of 1, behind the clips
NUM_CLIP_BYTES: Final = 12
CALL_STRUCT: Final = Struct(f"={NUM_CALL}q")
UNCHANGED_BYTES: Final = Struct("=2f").pack(0.0, 1.0)


@native
def column_of(p: int, row: int, token: int) -> int:
    return load_long(load_long(p, CALL.columns), row * load_long(p, CALL.num_columns) + token)


@native
def write_rows(p: int, source: int, target: int, dim: int) -> None:
    """One row of floats in the target's precision."""
    numbers = p + 8 * UNCHANGED + NUM_CLIP_BYTES
    call(load_long(p, CALL.write), (source, target, dim, numbers))


@native
def read_token(p: int, index: int, scratch: int) -> None:
    """One token of an open block, all kv heads."""
    row = load_long(load_long(p, CALL.open_rows), index)
    column = column_of(p, row, load_long(load_long(p, CALL.open_tokens), index))
    slot = load_long(load_long(p, CALL.open_slots), index)
    block, offset = divmod(slot, load_long(p, LAYER.open_block_size))
    record, item_bytes = block * load_long(p, LAYER.block_stride), load_long(p, LAYER.item_bytes)
    key = load_long(p, LAYER.open_keys) + record + offset * item_bytes
    value = load_long(p, LAYER.open_values) + record
    value += offset * load_long(p, LAYER.open_value_stride)
    key_dim, value_dim = load_long(p, LAYER.key_dim), load_long(p, LAYER.value_dim)
    convert, rotate = load_long(p, LAYER.convert), load_long(p, CALL.rotate)
    key_target = load_long(p, CALL.keys) + row * load_long(p, CALL.key_row_stride)
    key_target += column * load_long(p, CALL.key_bytes)
    value_target = load_long(p, CALL.values) + row * load_long(p, CALL.value_row_stride)
    value_target += column * load_long(p, CALL.value_bytes)
    for _ in range(load_long(p, LAYER.num_kv_heads)):
        call(convert, (key, load_long(p, LAYER.open_key_stride), scratch, 4, key_dim))
        write_rows(p, scratch, key_target, key_dim)
        call(convert, (value, item_bytes, scratch, 4, value_dim))
        if rotate:
            call(rotate, (scratch, scratch, 0, 0, 1))
        write_rows(p, scratch, value_target, value_dim)
        key += load_long(p, LAYER.kv_head_stride)
        value += load_long(p, LAYER.kv_head_stride)
        key_target += load_long(p, CALL.key_head_stride)
        value_target += load_long(p, CALL.value_head_stride)


@native
def read_block_keys(p: int, record: int, kv_head: int, scratch: int) -> None:
    codes, scales = load_long(p, LAYER.key_codes) + record, load_long(p, LAYER.key_scale) + record
    zeros, size = load_long(p, LAYER.key_zero) + record, load_long(p, LAYER.block_size)
    key_dim, group_size = load_long(p, LAYER.key_dim), load_long(p, LAYER.key_group_size)
    num_wide = load_long(p, LAYER.num_wide)
    call(load_long(p, CALL.read_keys), (codes, scales, zeros, scratch, key_dim, size, group_size))
    if num_wide:
        wide_codes = load_long(p, LAYER.wide_codes) + record
        wide_channels = load_long(p, LAYER.wide_channels) + 8 * kv_head * num_wide
        call(
            load_long(p, CALL.read_wide),
            (codes, scales, zeros, scratch, key_dim, size, group_size,
             wide_codes, wide_channels, num_wide),
        )  # fmt: skip


@native
def read_block_values(p: int, record: int, scratch: int) -> None:
    codes = load_long(p, LAYER.value_codes) + record
    uppers = load_long(p, LAYER.upper_value_codes) + record
    scales = load_long(p, LAYER.value_scale) + record
    zeros, size = load_long(p, LAYER.value_zero) + record, load_long(p, LAYER.block_size)
    value_dim, rotate = load_long(p, LAYER.value_dim), load_long(p, CALL.rotate)
    call(load_long(p, CALL.read_values), (codes, uppers, scales, zeros, scratch, value_dim, size))
    if rotate:
        call(rotate, (scratch, scratch, 0, 0, size))


@native
def read_block(p: int, index: int, kv_head: int, scratch: int) -> None:
    """One kv head of a sealed block."""
    size, row = load_long(p, LAYER.block_size), load_long(load_long(p, CALL.sealed_rows), index)
    record = load_long(load_long(p, CALL.sealed_ids), index) * load_long(p, LAYER.block_stride)
    record += kv_head * load_long(p, LAYER.kv_head_stride)
    tokens = load_long(p, CALL.sealed_tokens) + 8 * index * size
    target = load_long(p, CALL.keys) + row * load_long(p, CALL.key_row_stride)
    target += kv_head * load_long(p, CALL.key_head_stride)
    dim, num_bytes = load_long(p, LAYER.key_dim), load_long(p, CALL.key_bytes)
    read_block_keys(p, record, kv_head, scratch)
    for token in range(size):
        column = column_of(p, row, load_long(tokens, token))
        write_rows(p, scratch + 4 * token * dim, target + column * num_bytes, dim)
    target = load_long(p, CALL.values) + row * load_long(p, CALL.value_row_stride)
    target += kv_head * load_long(p, CALL.value_head_stride)
    dim, num_bytes = load_long(p, LAYER.value_dim), load_long(p, CALL.value_bytes)
    read_block_values(p, record, scratch)
    for token in range(size):
        column = column_of(p, row, load_long(tokens, token))
        write_rows(p, scratch + 4 * token * dim, target + column * num_bytes, dim)


@native
def run_read(p: int) -> None:
    """Read sealed blocks, kv head by kv head, then tokens of open ones, until nothing is left."""
    counters = load_long(p, CALL.counters)
    scratch = load_long(p, CALL.scratch) + SCRATCH_BYTES * fetch_add(counters + 8)
    num_kv_heads, num_open = load_long(p, LAYER.num_kv_heads), load_long(p, CALL.num_open)
    num_sealed = load_long(p, CALL.num_sealed) * num_kv_heads
    num_units = num_sealed - (-num_open // TOKENS_AT_ONCE)
    while True:
        unit = fetch_add(counters)
        if unit >= num_units:
            break
        if unit < num_sealed:
            index, kv_head = divmod(unit, num_kv_heads)
            read_block(p, index, kv_head, scratch)
            continue
        first = (unit - num_sealed) * TOKENS_AT_ONCE
        for index in range(first, min(first + TOKENS_AT_ONCE, num_open)):
            read_token(p, index, scratch)


@cache
def read_worker() -> int:
    """The address of the worker, compiled when first asked for and kept on disk."""
    return int(worker(run_read_of).address)


def run_read_of(parameters: Any) -> None:
    run_read(address_of(parameters))


def read_stored(
    layer: LayerBlocks, places: StoredPlaces, target: DenseTokens, *, rotates_values: bool
) -> None:
    """As `eager.read.read_stored`."""
    keys, values, columns = target
    num_open, num_sealed = len(places.open_rows), len(places.sealed_ids)
    num_units = num_sealed * keys.shape[1] + num_open // TOKENS_AT_ONCE
    num_threads = min(torch.get_num_threads(), 1 + num_units // MIN_THREAD_UNITS)
    scratch = thread_scratch("read", num_threads, SCRATCH_BYTES)
    counters = ctypes.create_string_buffer(2 * 8)
    rotate = rotate_kernel(values.shape[3]).address if rotates_values else 0
    fields = CallFields(
        ctypes.addressof(counters),
        scratch.address,
        num_open,
        places.open_rows.data_ptr(),
        places.open_tokens.data_ptr(),
        places.open_slots.data_ptr(),
        num_sealed,
        places.sealed_rows.data_ptr(),
        places.sealed_tokens.data_ptr(),
        places.sealed_ids.data_ptr(),
        columns.data_ptr(),
        columns.shape[1],
        *strides_of(keys),
        *strides_of(values),
        affine_kernel(kind_of(keys)).address,
        *reading_kernels(layer),
        rotate,
    )
    record = ctypes.create_string_buffer(
        CALL_STRUCT.pack(*fields) + stored_layer(layer) + UNCHANGED_BYTES
    )
    run_worker(read_worker(), ctypes.addressof(record), num_threads)


def strides_of(tensor: Tensor) -> tuple[int, int, int, int]:
    """Of [N, H, L, D]: address, bytes from row to row, from head to head and of a token."""
    assert tensor.is_contiguous(), "rows are written one by one"
    row, head, token, _ = (stride * tensor.element_size() for stride in tensor.stride())
    return tensor.data_ptr(), row, head, token


def reading_kernels(layer: LayerBlocks) -> tuple[int, int, int]:
    """For keys, their wide channels, and values."""
    if layer.sealed is None:
        return 0, 0, 0
    keys = read_key_kernel(layer.key_bits, has_token_scales=layer.sealed.key_zero is None)
    wide = 0 if layer.wide_channels is None else read_wide_kernel(layer.key_bits).address
    has_zero = layer.sealed.value_zero is not None
    return keys.address, wide, read_value_kernel(layer.value_bits, has_zero=has_zero).address
