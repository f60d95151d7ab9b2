"""Write a step's new keys and values on a CPU: append to open blocks, seal full ones.

Knows a layer's blocks and a step's slots, nothing of sequences. Same signature and the same bytes
as `eager.store`. Nothing that is sealed is written in the same step, so that threads take seals
and appended tokens in any order.
"""

from __future__ import annotations

import ctypes
from functools import cache
from struct import Struct
from typing import Any, Final, NamedTuple

import torch

from ..block_views import LayerBlocks, SealedViews, as_rows
from ..eager.store import gather_blocks
from ..new_tokens import NewTokens
from ..step_inputs import StepInputs
from .microkernels import MAX_DIM
from .native_code import (
    address_of,
    address_or_0,
    call,
    fetch_add,
    kind_of,
    load_long,
    native,
    row_addresses,
    thread_scratch,
    worker,
)
from .per_layer import PerLayer
from .quantize import (
    KEY_ROW_BYTES,
    MAX_BLOCK_SIZE,
    VALUE_ROW_BYTES,
    channel_key_kernel,
    copy_kernel,
    symmetric_key_kernel,
    symmetric_value_kernel,
    value_kernel,
)
from .threads import run_worker

TOKENS_AT_ONCE: Final = 8  # appended by one thread before it asks for more
MIN_THREAD_UNITS: Final = 4  # seals and groups of tokens; fewer are not worth another thread


class CallFields(NamedTuple):
    """Of a call; names of arrays and rows are their addresses, strides are in bytes."""

    counters: int  # next unit of work, next thread
    scratch: int
    num_seals: int
    seal_block_ids: int
    seal_sources: int
    num_stored: int
    stored_tokens: int
    stored_slots: int
    key: int
    key_token_stride: int
    key_head_stride: int
    value: int
    value_token_stride: int
    value_head_stride: int


class LayerFields(NamedTuple):
    """Of a layer; names of views and of microkernels are their addresses, strides are in bytes."""

    num_kv_heads: int
    key_dim: int
    value_dim: int
    item_bytes: int  # of an element in open blocks
    block_stride: int
    kv_head_stride: int
    open_block_size: int
    open_keys: int
    open_values: int
    open_key_stride: int  # from channel to channel
    open_value_stride: int  # from token to token
    copy: int
    convert: int  # to float32
    # 0 in the native format:
    block_size: int = 0
    key_group_size: int = 0  # 0 where keys have a scale each
    key_codes: int = 0
    wide_codes: int = 0
    value_codes: int = 0
    upper_value_codes: int = 0
    key_scale: int = 0
    key_zero: int = 0
    value_scale: int = 0
    value_zero: int = 0
    num_wide: int = 0
    wide_channels: int = 0  # [kv heads, num_wide]
    feedback: int = 0  # [kv heads, key_dim, key_dim]
    seal_keys: int = 0
    seal_values: int = 0


class Clips(NamedTuple):
    """float32, behind the fields of a layer."""

    key: float
    wide_key: float
    value: float


NUM_CALL, NUM_LAYER = len(CallFields._fields), len(LayerFields._fields)
# Places in 64-bit integers from the start of the record.
CALL: Final = CallFields(*range(NUM_CALL))
LAYER: Final = LayerFields(*range(NUM_CALL, NUM_CALL + NUM_LAYER))
CLIPS: Final = NUM_CALL + NUM_LAYER
CALL_STRUCT: Final = Struct(f"={NUM_CALL}q")
LAYER_STRUCT: Final = Struct(f"={NUM_LAYER}q3f")

# A thread's scratch, in bytes from its start.
KEYS: Final = 0
VALUES: Final = KEYS + MAX_DIM * KEY_ROW_BYTES
CODES: Final = VALUES + MAX_BLOCK_SIZE * VALUE_ROW_BYTES
SCRATCH_BYTES: Final = CODES + MAX_BLOCK_SIZE * 4


@native
def append_token(p: int, index: int) -> None:
    """Copy one new token of all kv heads into its slot."""
    token = load_long(load_long(p, CALL.stored_tokens), index)
    size, item_bytes = load_long(p, LAYER.open_block_size), load_long(p, LAYER.item_bytes)
    block, offset = divmod(load_long(load_long(p, CALL.stored_slots), index), size)
    record = block * load_long(p, LAYER.block_stride)
    key = load_long(p, CALL.key) + token * load_long(p, CALL.key_token_stride)
    value = load_long(p, CALL.value) + token * load_long(p, CALL.value_token_stride)
    key_stride = load_long(p, LAYER.open_key_stride)
    key_target = load_long(p, LAYER.open_keys) + record + offset * item_bytes
    value_target = load_long(p, LAYER.open_values) + record
    value_target += offset * load_long(p, LAYER.open_value_stride)
    key_dim, value_dim = load_long(p, LAYER.key_dim), load_long(p, LAYER.value_dim)
    copy = load_long(p, LAYER.copy)
    for _ in range(load_long(p, LAYER.num_kv_heads)):
        call(copy, (key, item_bytes, key_target, key_stride, key_dim))
        call(copy, (value, item_bytes, value_target, item_bytes, value_dim))
        key += load_long(p, CALL.key_head_stride)
        value += load_long(p, CALL.value_head_stride)
        key_target += load_long(p, LAYER.kv_head_stride)
        value_target += load_long(p, LAYER.kv_head_stride)


@native
def gather_block(p: int, seal: int, kv_head: int, scratch: int) -> None:
    """The tokens of a block as float32: keys [key_dim, tokens], values [tokens, value_dim]."""
    block_size, size = load_long(p, LAYER.block_size), load_long(p, LAYER.open_block_size)
    item_bytes, convert = load_long(p, LAYER.item_bytes), load_long(p, LAYER.convert)
    key_dim, value_dim = load_long(p, LAYER.key_dim), load_long(p, LAYER.value_dim)
    sources = load_long(p, CALL.seal_sources) + 8 * seal * block_size
    for token in range(block_size):
        source = load_long(sources, token)
        if source < 0:  # one of the step's own
            key_stride = item_bytes
            key = load_long(p, CALL.key) + ~source * load_long(p, CALL.key_token_stride)
            key += kv_head * load_long(p, CALL.key_head_stride)
            value = load_long(p, CALL.value) + ~source * load_long(p, CALL.value_token_stride)
            value += kv_head * load_long(p, CALL.value_head_stride)
        else:
            block, offset = divmod(source, size)
            record = block * load_long(p, LAYER.block_stride)
            record += kv_head * load_long(p, LAYER.kv_head_stride)
            key_stride = load_long(p, LAYER.open_key_stride)
            key = load_long(p, LAYER.open_keys) + record + offset * item_bytes
            value = load_long(p, LAYER.open_values) + record
            value += offset * load_long(p, LAYER.open_value_stride)
        call(convert, (key, key_stride, scratch + KEYS + 4 * token, KEY_ROW_BYTES, key_dim))
        target = scratch + VALUES + token * VALUE_ROW_BYTES
        call(convert, (value, item_bytes, target, 4, value_dim))


@native
def seal_block(p: int, seal: int, kv_head: int, scratch: int) -> None:
    """Quantize one kv head of a block."""
    gather_block(p, seal, kv_head, scratch)
    record = load_long(load_long(p, CALL.seal_block_ids), seal) * load_long(p, LAYER.block_stride)
    record += kv_head * load_long(p, LAYER.kv_head_stride)
    keys, values, codes = scratch + KEYS, scratch + VALUES, scratch + CODES
    key_dim, value_dim = load_long(p, LAYER.key_dim), load_long(p, LAYER.value_dim)
    size, group_size = load_long(p, LAYER.block_size), load_long(p, LAYER.key_group_size)
    key_codes = load_long(p, LAYER.key_codes) + record
    value_codes = load_long(p, LAYER.value_codes) + record
    key_scale = load_long(p, LAYER.key_scale) + record
    value_scale = load_long(p, LAYER.value_scale) + record
    seal_keys, seal_values = load_long(p, LAYER.seal_keys), load_long(p, LAYER.seal_values)
    value_zero = load_long(p, LAYER.value_zero) + record
    upper_values = load_long(p, LAYER.upper_value_codes) + record
    clip = p + 8 * CLIPS
    call(
        seal_values,
        (values, value_dim, size, value_codes, value_scale, value_zero, clip + 8, upper_values),
    )
    if not group_size:
        call(seal_keys, (keys, key_dim, size, key_codes, key_scale))
        return
    key_zero, num_wide = load_long(p, LAYER.key_zero) + record, load_long(p, LAYER.num_wide)
    wide_codes = load_long(p, LAYER.wide_codes) + record
    wide_channels = load_long(p, LAYER.wide_channels) + 8 * kv_head * num_wide
    feedback = load_long(p, LAYER.feedback) + 4 * kv_head * key_dim * key_dim
    call(
        seal_keys,
        (keys, key_dim, size, group_size, key_codes, key_scale, key_zero, clip, codes,
         wide_channels, num_wide, wide_codes, feedback),
    )  # fmt: skip


@native
def run_store(p: int) -> None:
    """Seal blocks, kv head by kv head, then append tokens, until nothing is left."""
    counters = load_long(p, CALL.counters)
    scratch = load_long(p, CALL.scratch) + SCRATCH_BYTES * fetch_add(counters + 8)
    num_kv_heads, num_stored = load_long(p, LAYER.num_kv_heads), load_long(p, CALL.num_stored)
    num_sealed = load_long(p, CALL.num_seals) * num_kv_heads
    num_units = num_sealed - (-num_stored // TOKENS_AT_ONCE)
    while True:
        unit = fetch_add(counters)
        if unit >= num_units:
            break
        if unit < num_sealed:
            seal, kv_head = divmod(unit, num_kv_heads)
            seal_block(p, seal, kv_head, scratch)
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


def store_tokens(new: NewTokens, layer: LayerBlocks, step: StepInputs) -> None:
    """As `eager.store.store_tokens`."""
    num_seals = len(step.seal_block_ids)
    if num_seals and layer.sealed is None:
        gather_blocks(new, layer, step)
        num_seals = 0
    run_store_worker(new, layer, step, num_seals=num_seals, num_stored=len(step.stored_tokens))


def seal_blocks(new: NewTokens, layer: LayerBlocks, step: StepInputs) -> None:
    """What is left of `store_tokens` where attention has appended."""
    if layer.sealed is None:
        gather_blocks(new, layer, step)
    else:
        num_seals = len(step.seal_block_ids)
        run_store_worker(new, layer, step, num_seals=num_seals, num_stored=0)


def run_store_worker(
    new: NewTokens, layer: LayerBlocks, step: StepInputs, *, num_seals: int, num_stored: int
) -> None:
    dtype = layer.open_keys.dtype
    keys, values = as_rows(new.key, dtype), as_rows(new.value, dtype)
    num_units = num_seals * keys.shape[1] + num_stored // TOKENS_AT_ONCE
    num_threads = min(torch.get_num_threads(), 1 + num_units // MIN_THREAD_UNITS)
    scratch = thread_scratch("store", num_threads, SCRATCH_BYTES)
    counters = ctypes.create_string_buffer(2 * 8)
    key, key_token_stride, key_head_stride = row_addresses(keys)
    value, value_token_stride, value_head_stride = row_addresses(values)
    fields = CallFields(
        counters=ctypes.addressof(counters),
        scratch=scratch.address,
        num_seals=num_seals,
        seal_block_ids=step.seal_block_ids.data_ptr(),
        seal_sources=step.seal_sources.data_ptr(),
        num_stored=num_stored,
        stored_tokens=step.stored_tokens.data_ptr(),
        stored_slots=step.stored_slots.data_ptr(),
        key=key,
        key_token_stride=key_token_stride,
        key_head_stride=key_head_stride,
        value=value,
        value_token_stride=value_token_stride,
        value_head_stride=value_head_stride,
    )
    record = ctypes.create_string_buffer(CALL_STRUCT.pack(*fields) + stored_layer(layer))
    run_worker(store_worker(), ctypes.addressof(record), num_threads)


def layer_bytes(layer: LayerBlocks) -> bytes:
    """The part of the worker's record that describes a layer."""
    keys, values = layer.open_keys, layer.open_values
    assert keys.stride(2) == 1, "open keys are channel-major on a CPU"
    size, dtype = keys.element_size(), kind_of(keys)
    fields = LayerFields(
        num_kv_heads=keys.shape[1],
        key_dim=keys.shape[3],
        value_dim=values.shape[3],
        item_bytes=size,
        block_stride=keys.stride(0) * size,
        kv_head_stride=keys.stride(1) * size,
        open_block_size=keys.shape[2],
        open_keys=keys.data_ptr(),
        open_values=values.data_ptr(),
        open_key_stride=keys.stride(3) * size,
        open_value_stride=values.stride(2) * size,
        copy=copy_kernel(dtype, dtype).address,
        convert=copy_kernel(dtype, "float32").address,
    )
    if layer.sealed is not None:
        fields = with_sealed(fields, layer, layer.sealed)
    clips = Clips(layer.key_clip, layer.wide_key_clip, layer.value_clip)
    return LAYER_STRUCT.pack(*fields, *clips)


stored_layer: Final = PerLayer(layer_bytes)


def with_sealed(fields: LayerFields, layer: LayerBlocks, sealed: SealedViews) -> LayerFields:
    """The fields with how and where to seal."""
    wide_channels, feedback = layer.wide_channels, layer.feedback
    num_groups = sealed.num_key_groups
    seal_keys, seal_values = symmetric_key_kernel(), symmetric_value_kernel()
    if num_groups:
        seal_keys = channel_key_kernel(
            layer.key_bits,
            has_wide=wide_channels is not None,
            has_feedback=feedback is not None,
        )
    if layer.value_bits < 8:
        seal_values = value_kernel(layer.value_bits, has_zero=sealed.value_zero is not None)
    return fields._replace(
        block_size=sealed.block_size,
        key_group_size=sealed.block_size // num_groups if num_groups else 0,
        **{name: address_or_0(section) for name, section in sealed._asdict().items()},
        num_wide=0 if wide_channels is None else wide_channels.shape[1],
        wide_channels=address_or_0(wide_channels),
        feedback=address_or_0(feedback),
        seal_keys=seal_keys.address,
        seal_values=seal_values.address,
    )
