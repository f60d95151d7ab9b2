"""Triton: query rows in, partial results out, and partial results to outputs.

Knows the new tokens and how a step is cut, nothing of formats. A row is one query head of one new
token; those of a kv head are in a row: token 0 with all its heads, token 1, ... They are cut into
tiles of equal size. A part is a tile's attention to some of its context: an output that is not
divided yet, the exponent that it is relative to, and the sum of its weights.

Long because a kernel is one function, and what it keeps in registers has to stay in sight.
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
def read_tile(tile, step):
    """A tile's sequence, its first new token, how many, its context, first row."""
    sequence = tl.load(step.tiles + 2 * tile)
    first_row = tl.load(step.tiles + 2 * tile + 1).to(tl.int32)
    token = tl.load(step.query_start_loc + sequence)
    num_new = (tl.load(step.query_start_loc + sequence + 1) - token).to(tl.int32)
    context_len = tl.load(step.context_lens + sequence).to(tl.int32)
    return sequence, token, num_new, context_len, first_row


@triton.jit
def first_seen(positions, sequence, step, rules, HAS_WINDOWS: tl.constexpr):
    """The first position that queries at `positions` see, sinks of a windowed sequence aside."""
    first = first_visible(positions, rules.sliding_window, rules.attention_chunk)
    if HAS_WINDOWS:
        window = tl.load(step.window_sizes + sequence).to(tl.int32)
        first = tl.maximum(first, positions - window + 1)
    return first


@triton.jit
def load_queries(
    query,
    token,
    kv_head,
    rows,
    num_rows,
    SHAPE: tl.constexpr,
    DTYPE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """Rows of one kv head as columns [channels, rows]; 0 beyond the last row and channel."""
    channel = tl.arange(0, SHAPE.KEY_COLUMNS)
    where = token, kv_head, rows, num_rows
    return load_channels(query, where, channel, channel < SHAPE.KEY_DIM, SHAPE, DTYPE, TRANSPOSED)


@triton.jit
def load_channels(
    query,
    where,
    channel,
    exists,
    SHAPE: tl.constexpr,
    DTYPE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """As `load_queries`, these channels; `where` are its arguments from `token` to `num_rows`."""
    token, kv_head, rows, num_rows = where
    tokens = token + rows // SHAPE.QUERY_GROUP_SIZE
    heads = kv_head * SHAPE.QUERY_GROUP_SIZE + rows % SHAPE.QUERY_GROUP_SIZE
    at = as_row(tokens * query.token_stride + heads * query.head_stride, TRANSPOSED)
    at += as_column(channel, TRANSPOSED)
    exists = as_row(rows < num_rows, TRANSPOSED) & as_column(exists, TRANSPOSED)
    return tl.load(query.rows + at, mask=exists, other=0).to(tl.float32).to(DTYPE)


@triton.jit
def store_part(
    parts, part, output, reference, total, SHAPE: tl.constexpr, TRANSPOSED: tl.constexpr
):
    """One part of all rows."""
    ROWS: tl.constexpr = reference.shape[0]
    row = tl.arange(0, ROWS)
    channel = tl.arange(0, SHAPE.VALUE_COLUMNS)
    at = as_row((part * ROWS + row) * SHAPE.VALUE_DIM, TRANSPOSED)
    at += as_column(channel, TRANSPOSED)
    tl.store(parts.outputs + at, output, mask=as_column(channel < SHAPE.VALUE_DIM, TRANSPOSED))
    sums = parts.sums + part * (2 * ROWS) + row
    tl.store(sums, reference)
    tl.store(sums + ROWS, total)


@triton.jit
def merge_parts(
    parts,
    others,
    places,
    new,
    open_blocks,
    output,
    SHAPE: tl.constexpr,
    MERGE: tl.constexpr,
):
    """One query head of one token: grid (tokens, query heads).

    `places` [tokens, 3]: token, first tile of its sequence, its place among the new tokens of that.
    One more part may be attention to new tokens: `new_output` [num_new, heads, VALUE_DIM] and
    `new_log_sums` [heads, num_new].
    The program of the first query head of a kv head also appends the token's key and value.
    """
    index, query_head = tl.program_id(0), tl.program_id(1)
    kv_head = query_head // SHAPE.QUERY_GROUP_SIZE
    token = tl.load(places + 3 * index)
    row = (
        tl.load(places + 3 * index + 2) * SHAPE.QUERY_GROUP_SIZE
        + query_head % SHAPE.QUERY_GROUP_SIZE
    )
    tile = tl.load(places + 3 * index + 1) + row // MERGE.ROWS
    row = row % MERGE.ROWS
    part = (tile * SHAPE.NUM_KV_HEADS + kv_head) * MERGE.NUM_PARTS + tl.arange(
        0, MERGE.PARTS_COLUMNS
    )
    exists = tl.arange(0, MERGE.PARTS_COLUMNS) < MERGE.NUM_PARTS
    sums = parts.sums + part * (2 * MERGE.ROWS) + row
    references = tl.load(sums, mask=exists, other=NO_REFERENCE)
    totals = tl.load(sums + MERGE.ROWS, mask=exists, other=0.0)
    highest = tl.max(references, 0)
    if MERGE.HAS_SINKS:
        sink = tl.load(others.sink_logits + query_head).to(tl.float32) * LOG2_E
        highest = tl.maximum(highest, sink)
    if MERGE.HAS_NEW_PART:
        new_reference = tl.load(others.new_log_sums + query_head * others.num_new + token) * LOG2_E
        highest = tl.maximum(highest, new_reference)
    weights = tl.exp2(references - highest)
    total = tl.sum(weights * totals, 0)
    if MERGE.HAS_SINKS:
        total += tl.exp2(sink - highest)
    if MERGE.HAS_NEW_PART:
        total += tl.exp2(new_reference - highest)
    channel = tl.arange(0, SHAPE.VALUE_COLUMNS)
    at = (part * MERGE.ROWS + row)[:, None] * SHAPE.VALUE_DIM + channel[None, :]
    # What is not a part of anything was never written.
    is_written = (exists & (references > NO_REFERENCE))[:, None] & (
        channel[None, :] < SHAPE.VALUE_DIM
    )
    outputs = tl.load(parts.outputs + at, mask=is_written, other=0.0)
    merged = tl.sum(outputs * weights[:, None], 0)
    row = token * output.token_stride + query_head * SHAPE.VALUE_DIM
    if MERGE.HAS_NEW_PART:
        numbers = tl.load(
            others.new_output + row + channel, mask=channel < SHAPE.VALUE_DIM, other=0
        )
        merged += numbers.to(tl.float32) * tl.exp2(new_reference - highest)
    merged /= total
    target = output.rows + row + channel
    tl.store(
        target, rounded_to(merged, output.rows.dtype.element_ty), mask=channel < SHAPE.VALUE_DIM
    )
    if MERGE.APPENDS:
        slot = tl.load(open_blocks.slots + token)
        if (slot >= 0) & (query_head % SHAPE.QUERY_GROUP_SIZE == 0):
            append_token(
                new.key.rows + token * new.key.token_stride + kv_head * new.key.head_stride,
                new.value.rows + token * new.value.token_stride + kv_head * new.value.head_stride,
                slot, kv_head, open_blocks, SHAPE, MERGE.OPEN_BLOCK_SIZE,
            )  # fmt: skip


@triton.jit
def append_token(
    key, value, slot, kv_head, open_blocks, SHAPE: tl.constexpr, OPEN_BLOCK_SIZE: tl.constexpr
):
    """Copy the key and the value of one kv head of a token into their slot."""
    block, row = slot // OPEN_BLOCK_SIZE, slot % OPEN_BLOCK_SIZE
    append_row(key, open_blocks.key, block, row, kv_head, SHAPE.KEY_DIM, SHAPE.KEY_COLUMNS)
    append_row(value, open_blocks.value, block, row, kv_head, SHAPE.VALUE_DIM, SHAPE.VALUE_COLUMNS)


@triton.jit
def append_row(source, target, block, row, kv_head, DIM: tl.constexpr, COLUMNS: tl.constexpr):
    channel = tl.arange(0, COLUMNS)
    exists = channel < DIM
    numbers = tl.load(source + channel, mask=exists, other=0)
    at = block * target.block_stride + kv_head * target.kv_head_stride + row * target.row_stride
    rounded = rounded_to(numbers, target.tokens.dtype.element_ty)
    tl.store(target.tokens + at + channel * target.channel_stride, rounded, mask=exists)
