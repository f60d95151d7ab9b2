"""Triton: query rows in, partial results out, and partial results to outputs.

A row is one query head of one new token; those of a kv head are in a row: token 0 with all its
heads, token 1, ... They are cut into tiles of equal size. A part is a tile's attention to some of
its context: an output that is not divided yet, the exponent that it is relative to, and the sum of
its weights.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .codes import (
    LOG2_E,
    NO_REFERENCE,
    as_column,
    as_row,
    first_visible,
    rounded_to,
)


@triton.jit
def read_tile(tile, tiles, query_start_loc, context_lens):
    """Of `tiles` [tiles, 2]: sequence, its first new token, how many, its context, first row."""
    sequence = tl.load(tiles + 2 * tile)
    first_row = tl.load(tiles + 2 * tile + 1).to(tl.int32)
    token = tl.load(query_start_loc + sequence)
    num_new = (tl.load(query_start_loc + sequence + 1) - token).to(tl.int32)
    context_len = tl.load(context_lens + sequence).to(tl.int32)
    return sequence, token, num_new, context_len, first_row


@triton.jit
def first_seen(
    positions, sequence, windows, sliding_window, attention_chunk, HAS_WINDOWS: tl.constexpr
):
    """The first position that queries at `positions` see, sinks of a stream aside."""
    first = first_visible(positions, sliding_window, attention_chunk)
    if HAS_WINDOWS:
        window = tl.load(windows + sequence).to(tl.int32)
        first = tl.maximum(first, positions - window + 1)
    return first


@triton.jit
def load_queries(
    query,
    token,
    token_stride,
    head_stride,
    head,
    rows,
    num_rows,
    channel,
    GROUP_SIZE: tl.constexpr,
    KEY_DIM: tl.constexpr,
    DTYPE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """Rows of one kv head as columns [channels, rows]; 0 beyond the last row and channel."""
    tokens = token + rows // GROUP_SIZE
    heads = head * GROUP_SIZE + rows % GROUP_SIZE
    at = as_row(tokens * token_stride + heads * head_stride, TRANSPOSED)
    at += as_column(channel, TRANSPOSED)
    exists = as_row(rows < num_rows, TRANSPOSED) & as_column(channel < KEY_DIM, TRANSPOSED)
    return tl.load(query + at, mask=exists, other=0).to(tl.float32).to(DTYPE)


@triton.jit
def store_part(
    partial_outputs,
    partial_sums,
    part,
    output,
    reference,
    total,
    channel,
    VALUE_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """One part: outputs [parts, ROWS, VALUE_DIM]; exponents and sums [parts, 2, ROWS]."""
    row = tl.arange(0, ROWS)
    at = as_row((part * ROWS + row) * VALUE_DIM, TRANSPOSED) + as_column(channel, TRANSPOSED)
    tl.store(partial_outputs + at, output, mask=as_column(channel < VALUE_DIM, TRANSPOSED))
    sums = partial_sums + part * (2 * ROWS) + row
    tl.store(sums, reference)
    tl.store(sums + ROWS, total)


@triton.jit
def merge_parts(
    partial_outputs,
    partial_sums,
    places,
    sink_logits,
    new_output,
    new_log_sums,
    num_new,
    output,
    output_token_stride,
    key,
    key_token_stride,
    key_head_stride,
    value,
    value_token_stride,
    value_head_stride,
    slots,
    open_keys,
    key_row_stride,
    key_channel_stride,
    open_values,
    value_row_stride,
    block_stride,
    head_stride,
    GROUP_SIZE: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_COLUMNS: tl.constexpr,
    VALUE_COLUMNS: tl.constexpr,
    OPEN_BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    PARTS_COLUMNS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_NEW_PART: tl.constexpr,
    APPENDS: tl.constexpr,
):
    """One query head of one token: grid (tokens, query heads).

    `places` [tokens, 3]: token, first tile of its sequence, its place among the new tokens of that.
    One more part may be attention to new tokens: `new_output` [num_new, heads, VALUE_DIM] and
    `new_log_sums` [heads, num_new].
    The program of the first query head of a kv head also appends the token's key and value.
    """
    index, query_head = tl.program_id(0), tl.program_id(1)
    head = query_head // GROUP_SIZE
    token = tl.load(places + 3 * index)
    row = tl.load(places + 3 * index + 2) * GROUP_SIZE + query_head % GROUP_SIZE
    tile = tl.load(places + 3 * index + 1) + row // ROWS
    row = row % ROWS
    parts = (tile * NUM_HEADS + head) * NUM_PARTS + tl.arange(0, PARTS_COLUMNS)
    exists = tl.arange(0, PARTS_COLUMNS) < NUM_PARTS
    sums = partial_sums + parts * (2 * ROWS) + row
    references = tl.load(sums, mask=exists, other=NO_REFERENCE)
    totals = tl.load(sums + ROWS, mask=exists, other=0.0)
    highest = tl.max(references, 0)
    if HAS_SINKS:
        sink = tl.load(sink_logits + query_head).to(tl.float32) * LOG2_E
        highest = tl.maximum(highest, sink)
    if HAS_NEW_PART:
        new_reference = tl.load(new_log_sums + query_head * num_new + token) * LOG2_E
        highest = tl.maximum(highest, new_reference)
    weights = tl.exp2(references - highest)
    total = tl.sum(weights * totals, 0)
    if HAS_SINKS:
        total += tl.exp2(sink - highest)
    if HAS_NEW_PART:
        total += tl.exp2(new_reference - highest)
    channel = tl.arange(0, VALUE_COLUMNS)
    at = (parts * ROWS + row)[:, None] * VALUE_DIM + channel[None, :]
    # What is not a part of anything was never written.
    is_written = (exists & (references > NO_REFERENCE))[:, None] & (channel[None, :] < VALUE_DIM)
    outputs = tl.load(partial_outputs + at, mask=is_written, other=0.0)
    merged = tl.sum(outputs * weights[:, None], 0)
    row = token * output_token_stride + query_head * VALUE_DIM
    if HAS_NEW_PART:
        numbers = tl.load(new_output + row + channel, mask=channel < VALUE_DIM, other=0)
        merged += numbers.to(tl.float32) * tl.exp2(new_reference - highest)
    merged /= total
    target = output + row + channel
    tl.store(target, rounded_to(merged, output.dtype.element_ty), mask=channel < VALUE_DIM)
    if APPENDS:
        slot = tl.load(slots + token)
        if (slot >= 0) & (query_head % GROUP_SIZE == 0):
            append_token(
                key + token * key_token_stride + head * key_head_stride,
                value + token * value_token_stride + head * value_head_stride,
                slot, head, open_keys, key_row_stride, key_channel_stride, open_values,
                value_row_stride, block_stride, head_stride, KEY_DIM, VALUE_DIM,
                KEY_COLUMNS, VALUE_COLUMNS, OPEN_BLOCK_SIZE,
            )  # fmt: skip


@triton.jit
def append_token(
    key,
    value,
    slot,
    head,
    open_keys,
    key_row_stride,
    key_channel_stride,
    open_values,
    value_row_stride,
    block_stride,
    head_stride,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_COLUMNS: tl.constexpr,
    VALUE_COLUMNS: tl.constexpr,
    OPEN_BLOCK_SIZE: tl.constexpr,
):
    """Copy the key and the value of one head of a token into their slot."""
    record = slot // OPEN_BLOCK_SIZE * block_stride + head * head_stride
    row = slot % OPEN_BLOCK_SIZE
    channel = tl.arange(0, KEY_COLUMNS)
    numbers = tl.load(key + channel, mask=channel < KEY_DIM, other=0)
    target = open_keys + record + row * key_row_stride + channel * key_channel_stride
    tl.store(target, rounded_to(numbers, open_keys.dtype.element_ty), mask=channel < KEY_DIM)
    channel = tl.arange(0, VALUE_COLUMNS)
    numbers = tl.load(value + channel, mask=channel < VALUE_DIM, other=0)
    target = open_values + record + row * value_row_stride + channel
    tl.store(target, rounded_to(numbers, open_values.dtype.element_ty), mask=channel < VALUE_DIM)
