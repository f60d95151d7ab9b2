"""Write a step's new keys and values on a CPU: append to open blocks, seal full ones.

Same signature and the same bytes as the torch reference in `store`. Nothing that is sealed is
written in the same step, so that threads take seals and appended tokens in any order.
"""

from __future__ import annotations

import ctypes
from enum import IntEnum, auto
from functools import cache
from struct import Struct
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..block_views import LayerBlocks, SealedViews, as_rows
from ..step_inputs import StepInputs
from .microkernels import MAX_DIM
from .native_code import (
    address_of,
    call,
    fetch_add,
    load_long,
    native,
    row_addresses,
    thread_scratch,
    worker,
)
from .quantize import (
    KEY_ROW_BYTES,
    MAX_BLOCK_SIZE,
    VALUE_ROW_BYTES,
    asymmetric_key_kernel,
    asymmetric_value_kernel,
    copy_kernel,
    symmetric_key_kernel,
    symmetric_value_kernel,
)
from .threads import run_worker

TOKENS_AT_ONCE: Final = 8  # appended by one thread before it asks for more
MIN_THREAD_UNITS: Final = 4  # seals and groups of tokens; fewer are not worth another thread


class Field(IntEnum):
    """Places in the array of 64-bit numbers that the worker reads."""

    # The call.
    COUNTERS = 0  # next unit of work, next thread
    SCRATCH = auto()
    NUM_SEALS = auto()
    SEAL_BLOCK_IDS = auto()
    SEAL_SOURCES = auto()
    NUM_STORED = auto()
    STORED_TOKENS = auto()
    STORED_SLOTS = auto()
    KEY = auto()
    KEY_TOKEN_STRIDE = auto()
    KEY_HEAD_STRIDE = auto()
    VALUE = auto()
    VALUE_TOKEN_STRIDE = auto()
    VALUE_HEAD_STRIDE = auto()
    # The layer.
    NUM_HEADS = auto()
    KEY_DIM = auto()
    VALUE_DIM = auto()
    ITEM_BYTES = auto()
    BLOCK_STRIDE = auto()
    HEAD_STRIDE = auto()
    OPEN_BLOCK_SIZE = auto()
    OPEN_KEYS = auto()
    OPEN_VALUES = auto()
    OPEN_KEY_STRIDE = auto()
    OPEN_VALUE_STRIDE = auto()
    COPY = auto()
    CONVERT = auto()
    BLOCK_SIZE = auto()
    IS_ASYMMETRIC = auto()
    KEY_GROUP_SIZE = auto()
    KEY_CODES = auto()
    VALUE_CODES = auto()
    KEY_SCALE = auto()
    KEY_ZERO = auto()
    VALUE_SCALE = auto()
    VALUE_ZERO = auto()
    KEY_CLIP = auto()  # address of a float
    VALUE_CLIP = auto()
    SEAL_KEYS = auto()
    SEAL_VALUES = auto()
    COUNT = auto()


# A thread's scratch, in bytes from its start.
KEYS: Final = 0
VALUES: Final = KEYS + MAX_DIM * KEY_ROW_BYTES
CODES: Final = VALUES + MAX_BLOCK_SIZE * VALUE_ROW_BYTES
SCRATCH_BYTES: Final = CODES + MAX_BLOCK_SIZE * 4


CALL: Final = Struct(f"={Field.NUM_HEADS}q")


@native
def append_token(p: int, index: int) -> None:
    """Copy one new token of all heads into its slot."""
    token = load_long(load_long(p, Field.STORED_TOKENS), index)
    size, item_bytes = load_long(p, Field.OPEN_BLOCK_SIZE), load_long(p, Field.ITEM_BYTES)
    block, offset = divmod(load_long(load_long(p, Field.STORED_SLOTS), index), size)
    record = block * load_long(p, Field.BLOCK_STRIDE)
    key = load_long(p, Field.KEY) + token * load_long(p, Field.KEY_TOKEN_STRIDE)
    value = load_long(p, Field.VALUE) + token * load_long(p, Field.VALUE_TOKEN_STRIDE)
    key_stride = load_long(p, Field.OPEN_KEY_STRIDE)
    key_target = load_long(p, Field.OPEN_KEYS) + record + offset * item_bytes
    value_target = load_long(p, Field.OPEN_VALUES) + record
    value_target += offset * load_long(p, Field.OPEN_VALUE_STRIDE)
    key_dim, value_dim = load_long(p, Field.KEY_DIM), load_long(p, Field.VALUE_DIM)
    copy = load_long(p, Field.COPY)
    for _ in range(load_long(p, Field.NUM_HEADS)):
        call(copy, (key, item_bytes, key_target, key_stride, key_dim))
        call(copy, (value, item_bytes, value_target, item_bytes, value_dim))
        key += load_long(p, Field.KEY_HEAD_STRIDE)
        value += load_long(p, Field.VALUE_HEAD_STRIDE)
        key_target += load_long(p, Field.HEAD_STRIDE)
        value_target += load_long(p, Field.HEAD_STRIDE)


@native
def gather_block(p: int, seal: int, head: int, scratch: int) -> None:
    """The tokens of a block as float32: keys [key_dim, tokens], values [tokens, value_dim]."""
    block_size, size = load_long(p, Field.BLOCK_SIZE), load_long(p, Field.OPEN_BLOCK_SIZE)
    item_bytes, convert = load_long(p, Field.ITEM_BYTES), load_long(p, Field.CONVERT)
    key_dim, value_dim = load_long(p, Field.KEY_DIM), load_long(p, Field.VALUE_DIM)
    sources = load_long(p, Field.SEAL_SOURCES) + 8 * seal * block_size
    for token in range(block_size):
        source = load_long(sources, token)
        if source < 0:  # one of the step's own
            key_stride = item_bytes
            key = load_long(p, Field.KEY) + ~source * load_long(p, Field.KEY_TOKEN_STRIDE)
            key += head * load_long(p, Field.KEY_HEAD_STRIDE)
            value = load_long(p, Field.VALUE) + ~source * load_long(p, Field.VALUE_TOKEN_STRIDE)
            value += head * load_long(p, Field.VALUE_HEAD_STRIDE)
        else:
            block, offset = divmod(source, size)
            record = block * load_long(p, Field.BLOCK_STRIDE)
            record += head * load_long(p, Field.HEAD_STRIDE)
            key_stride = load_long(p, Field.OPEN_KEY_STRIDE)
            key = load_long(p, Field.OPEN_KEYS) + record + offset * item_bytes
            value = load_long(p, Field.OPEN_VALUES) + record
            value += offset * load_long(p, Field.OPEN_VALUE_STRIDE)
        call(convert, (key, key_stride, scratch + KEYS + 4 * token, KEY_ROW_BYTES, key_dim))
        target = scratch + VALUES + token * VALUE_ROW_BYTES
        call(convert, (value, item_bytes, target, 4, value_dim))


@native
def seal_block(p: int, seal: int, head: int, scratch: int) -> None:
    """Quantize one head of a block."""
    gather_block(p, seal, head, scratch)
    record = load_long(load_long(p, Field.SEAL_BLOCK_IDS), seal) * load_long(p, Field.BLOCK_STRIDE)
    record += head * load_long(p, Field.HEAD_STRIDE)
    keys, values, codes = scratch + KEYS, scratch + VALUES, scratch + CODES
    key_dim, value_dim = load_long(p, Field.KEY_DIM), load_long(p, Field.VALUE_DIM)
    size, group_size = load_long(p, Field.BLOCK_SIZE), load_long(p, Field.KEY_GROUP_SIZE)
    key_codes = load_long(p, Field.KEY_CODES) + record
    value_codes = load_long(p, Field.VALUE_CODES) + record
    key_scale = load_long(p, Field.KEY_SCALE) + record
    value_scale = load_long(p, Field.VALUE_SCALE) + record
    seal_keys, seal_values = load_long(p, Field.SEAL_KEYS), load_long(p, Field.SEAL_VALUES)
    if not load_long(p, Field.IS_ASYMMETRIC):
        call(seal_keys, (keys, key_dim, size, key_codes, key_scale))
        call(seal_values, (values, value_dim, size, value_codes, value_scale))
        return
    key_zero = load_long(p, Field.KEY_ZERO) + record
    value_zero = load_long(p, Field.VALUE_ZERO) + record
    clip = load_long(p, Field.KEY_CLIP)
    call(
        seal_keys,
        (keys, key_dim, size, group_size, key_codes, key_scale, key_zero, clip, codes),
    )
    clip = load_long(p, Field.VALUE_CLIP)
    call(seal_values, (values, value_dim, size, value_codes, value_scale, value_zero, clip))


@native
def run_store(p: int) -> None:
    """Seal blocks, head by head, then append tokens, until nothing is left."""
    counters = load_long(p, Field.COUNTERS)
    scratch = load_long(p, Field.SCRATCH) + SCRATCH_BYTES * fetch_add(counters + 8)
    num_heads, num_stored = load_long(p, Field.NUM_HEADS), load_long(p, Field.NUM_STORED)
    num_sealed = load_long(p, Field.NUM_SEALS) * num_heads
    num_units = num_sealed - (-num_stored // TOKENS_AT_ONCE)
    while True:
        unit = fetch_add(counters)
        if unit >= num_units:
            break
        if unit < num_sealed:
            seal, head = divmod(unit, num_heads)
            seal_block(p, seal, head, scratch)
            continue
        first = (unit - num_sealed) * TOKENS_AT_ONCE
        for index in range(first, min(first + TOKENS_AT_ONCE, num_stored)):
            append_token(p, index)


@cache
def store_worker() -> int:
    """The address of the worker, compiled when first asked for and kept on disk."""
    return int(worker(run_store_of).address)


def run_store_of(parameters: Any) -> None:
    run_store(address_of(parameters))


def store_tokens(records: LayerBlocks, keys: Tensor, values: Tensor, step: StepInputs) -> None:
    """As `store.store_tokens`."""
    run_store_worker(records, keys, values, step, num_stored=len(step.stored_tokens))


def seal_blocks(records: LayerBlocks, keys: Tensor, values: Tensor, step: StepInputs) -> None:
    """What is left of `store_tokens` where attention has appended."""
    run_store_worker(records, keys, values, step, num_stored=0)


def run_store_worker(
    records: LayerBlocks, keys: Tensor, values: Tensor, step: StepInputs, *, num_stored: int
) -> None:
    dtype = records.open_keys.dtype
    keys, values = as_rows(keys, dtype), as_rows(values, dtype)
    num_units = len(step.seal_block_ids) * keys.shape[1] + num_stored // TOKENS_AT_ONCE
    num_threads = min(torch.get_num_threads(), 1 + num_units // MIN_THREAD_UNITS)
    scratch = thread_scratch("store", num_threads, SCRATCH_BYTES)
    counters = ctypes.create_string_buffer(2 * 8)
    fields = CALL.pack(
        ctypes.addressof(counters),
        scratch.address,
        len(step.seal_block_ids),
        step.seal_block_ids.data_ptr(),
        step.seal_sources.data_ptr(),
        num_stored,
        step.stored_tokens.data_ptr(),
        step.stored_slots.data_ptr(),
        *row_addresses(keys),
        *row_addresses(values),
    )
    parameters = ctypes.create_string_buffer(fields + layer_fields(records))
    run_worker(store_worker(), ctypes.addressof(parameters), num_threads)


def layer_fields(records: LayerBlocks) -> bytes:
    """The worker's fields that describe a layer."""
    key = "cpu store"
    if key not in records.derived:
        clips = np.array([records.key_clip, records.value_clip], dtype=np.float32)
        fields = np.array(make_layer_fields(records, clips), dtype=np.int64)
        records.derived[key] = fields.tobytes(), clips
    fields_bytes: bytes = records.derived[key][0]
    return fields_bytes


def make_layer_fields(records: LayerBlocks, clips: NDArray[np.float32]) -> list[int]:
    keys, values = records.open_keys, records.open_values
    assert keys.stride(2) == 1, "open keys are channel-major on a CPU"
    size, dtype = keys.element_size(), str(keys.dtype).removeprefix("torch.")
    fields = [
        keys.shape[1],
        keys.shape[3],
        values.shape[3],
        size,
        keys.stride(0) * size,
        keys.stride(1) * size,
        keys.shape[2],
        keys.data_ptr(),
        values.data_ptr(),
        keys.stride(3) * size,
        values.stride(2) * size,
        copy_kernel(dtype, dtype).address,
        copy_kernel(dtype, "float32").address,
    ]
    if records.sealed is None:
        fields += [0] * (Field.COUNT - Field.BLOCK_SIZE)
    else:
        fields += sealed_fields(records.sealed, records.bits, clips)
    return fields


def sealed_fields(sealed: SealedViews, bits: int, clips: NDArray[np.float32]) -> list[int]:
    """How and where to seal."""
    is_asymmetric = sealed.num_key_groups > 0
    sections = (
        sealed.key_codes,
        sealed.value_codes,
        sealed.key_scale,
        sealed.key_zero,
        sealed.value_scale,
        sealed.value_zero,
    )
    if is_asymmetric:
        kernels = [asymmetric_key_kernel(bits), asymmetric_value_kernel(bits)]
    else:
        kernels = [symmetric_key_kernel(), symmetric_value_kernel()]
    return [
        sealed.block_size,
        int(is_asymmetric),
        sealed.block_size // sealed.num_key_groups if is_asymmetric else 0,
        *(0 if section is None else section.data_ptr() for section in sections),
        clips[0:].ctypes.data,
        clips[1:].ctypes.data,
        *(kernel.address for kernel in kernels),
    ]
