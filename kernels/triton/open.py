"""Triton: attention of query rows to open blocks and to each other's tokens, in full precision.

The head and the tail of a quantized sequence, or all of a native one. Keys and values are the left
operands of both products, or queries are, as in `triton_sealed`. Sinks of streams lie here; they
come first, scored by a query of their own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .codes import (
    HEADROOM,
    LOG2_E,
    NO_REFERENCE,
    as_column,
    as_row,
    cap_scores,
    fast_exp2,
    first_visible,
    load_padded,
    product,
    rounded_to,
    zeros,
)
from .rows import first_seen, load_queries, read_tile, store_part


@triton.jit
def attend_open(
    query,
    query_token_stride,
    query_head_stride,
    sink_query,
    sink_query_token_stride,
    sink_query_head_stride,
    key,
    key_token_stride,
    key_head_stride,
    value,
    value_token_stride,
    value_head_stride,
    open_blocks,
    tiles,
    query_start_loc,
    context_lens,
    num_sealed,
    block_table,
    table_width,
    sink_counts,
    windows,
    partial_outputs,
    partial_sums,
    scale,
    softcap,
    sliding_window,
    attention_chunk,
    NUM_HEADS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_COLUMNS: tl.constexpr,
    VALUE_COLUMNS: tl.constexpr,
    KEY_STRIDES: tl.constexpr,
    RECORD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    OPEN_BLOCK_SIZE: tl.constexpr,
    NUM_HEAD_TOKENS: tl.constexpr,
    HAS_BODY: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    MIN_SPLIT_TILES: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HIDES_CONTEXT: tl.constexpr,
    HAS_WINDOWS: tl.constexpr,
    ATTENDS_NEW: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """One tile of query rows, one kv head, one split: grid (tiles, heads, splits).

    TILE tokens are taken at once. The last split may attend to the new tokens as well. A record of
    `open_blocks` is RECORD_SIZE elements; keys, with strides of a row and of a channel, and behind
    them values, token by token.
    """
    tile, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sequence, token, num_new, context_len, first_row = read_tile(
        tile, tiles, query_start_loc, context_lens
    )
    num_body_tokens = 0
    if HAS_BODY:
        num_body_tokens = tl.load(num_sealed + sequence).to(tl.int32) * BLOCK_SIZE
    num_entries = context_len - num_body_tokens
    rows = first_row + tl.arange(0, ROWS)
    row_tokens = rows // GROUP_SIZE
    part = (tile.to(tl.int64) * NUM_HEADS + head) * NUM_PARTS + split

    first = tl.zeros([ROWS], tl.int32)
    first_sink = tl.zeros([ROWS], tl.int32)
    least = 0
    num_sinks = 0
    if HIDES_CONTEXT:
        positions = context_len + row_tokens
        first = first_seen(
            positions, sequence, windows, sliding_window, attention_chunk, HAS_WINDOWS
        )
        least = tl.min(first, 0)
    num_tiles = tl.cdiv(num_entries, TILE)
    first_tile = 0
    if not HAS_BODY:
        first_tile = tl.minimum(least // TILE, num_tiles)
    if HAS_WINDOWS:
        # Sinks are as near as in a sequence of just sinks and window.
        num_sinks = tl.load(sink_counts + sequence).to(tl.int32)
        window = tl.load(windows + sequence).to(tl.int32)
        nearest = tl.minimum(positions, num_sinks + window - 1)
        first_sink = first_visible(nearest, sliding_window, attention_chunk)
        first_tile = tl.maximum(first_tile, num_sinks // TILE)
        least = tl.where(context_len < num_sinks, 0, least)
    share = tl.maximum(tl.cdiv(num_tiles - first_tile, NUM_SPLITS), MIN_SPLIT_TILES)
    start = tl.minimum(first_tile + split * share, num_tiles)
    end = tl.minimum(start + share, num_tiles)

    channel = tl.arange(0, KEY_COLUMNS)
    value_channel = tl.arange(0, VALUE_COLUMNS)
    entry_of_tile = tl.arange(0, TILE)
    reference = tl.full([ROWS], NO_REFERENCE, tl.float32)
    totals = zeros(TILE, ROWS, TRANSPOSED)
    output = zeros(VALUE_COLUMNS, ROWS, TRANSPOSED)
    factor = scale if HAS_SOFTCAP else scale * LOG2_E

    IS_KEY_PADDED: tl.constexpr = KEY_DIM != KEY_COLUMNS
    row = entry_of_tile % OPEN_BLOCK_SIZE  # in its block
    key_offsets = as_column(row * KEY_STRIDES[0], TRANSPOSED)
    key_offsets += as_row(channel * KEY_STRIDES[1], TRANSPOSED)
    value_offsets = as_row(row * VALUE_DIM, TRANSPOSED) + as_column(value_channel, TRANSPOSED)
    key_exists = as_row(channel < KEY_DIM, TRANSPOSED)
    value_exists = as_column(value_channel < VALUE_DIM, TRANSPOSED)
    VALUES: tl.constexpr = OPEN_BLOCK_SIZE * KEY_DIM  # behind the record's keys

    table = block_table + sequence * table_width
    body_places = num_body_tokens // OPEN_BLOCK_SIZE
    HEAD_BLOCKS: tl.constexpr = NUM_HEAD_TOKENS // OPEN_BLOCK_SIZE
    last_block = tl.cdiv(num_entries, OPEN_BLOCK_SIZE) - 1  # -1: there is none, perhaps no table
    if HAS_WINDOWS:
        if split == 0:
            sink_queries = load_queries(
                sink_query, token, sink_query_token_stride, sink_query_head_stride, head, rows,
                num_new * GROUP_SIZE, channel, GROUP_SIZE, KEY_DIM, query.dtype.element_ty,
                TRANSPOSED,
            )  # fmt: skip
            for index in range(tl.minimum(tl.cdiv(num_sinks, TILE), num_tiles)):
                blocks = blocks_of_tile(
                    table, index, last_block, body_places, TILE, OPEN_BLOCK_SIZE, HEAD_BLOCKS,
                    HAS_BODY,
                )  # fmt: skip
                first_key, first_value = rows_of_tile(
                    open_blocks, blocks, index, entry_of_tile, head, NUM_HEADS, RECORD_SIZE,
                    VALUES, VALUE_DIM, KEY_STRIDES, TILE, OPEN_BLOCK_SIZE,
                )  # fmt: skip
                entries = index * TILE + entry_of_tile
                exists = entries < num_entries
                at_keys = as_column(first_key, TRANSPOSED) + key_offsets
                at_values = as_row(first_value, TRANSPOSED) + value_offsets
                keys = load_padded(at_keys, key_exists, IS_KEY_PADDED)
                values = tl.load(at_values, mask=as_row(exists, TRANSPOSED) & value_exists, other=0)
                is_visible = as_column(exists & (entries < num_sinks), TRANSPOSED) & (
                    as_column(entries, TRANSPOSED) >= as_row(first_sink, TRANSPOSED)
                )
                output, reference, totals = attend_tile(
                    keys, values, sink_queries, is_visible, output, reference, totals, factor,
                    softcap, HAS_SOFTCAP, TRANSPOSED,
                )  # fmt: skip
    queries = load_queries(
        query, token, query_token_stride, query_head_stride, head, rows, num_new * GROUP_SIZE,
        channel, GROUP_SIZE, KEY_DIM, query.dtype.element_ty, TRANSPOSED,
    )  # fmt: skip
    # The next blocks are looked up one turn ahead: what waits for another load is not pipelined.
    following = blocks_of_tile(
        table, start, last_block, body_places, TILE, OPEN_BLOCK_SIZE, HEAD_BLOCKS, HAS_BODY
    )
    for index in range(start, end):
        first_key, first_value = rows_of_tile(
            open_blocks, following, index, entry_of_tile, head, NUM_HEADS, RECORD_SIZE, VALUES,
            VALUE_DIM, KEY_STRIDES, TILE, OPEN_BLOCK_SIZE,
        )  # fmt: skip
        following = blocks_of_tile(
            table, index + 1, last_block, body_places, TILE, OPEN_BLOCK_SIZE, HEAD_BLOCKS, HAS_BODY
        )
        at_keys = as_column(first_key, TRANSPOSED) + key_offsets
        at_values = as_row(first_value, TRANSPOSED) + value_offsets
        entries = index * TILE + entry_of_tile
        keys = load_padded(at_keys, key_exists, IS_KEY_PADDED)
        exists = entries < num_entries  # what does not may be anything, and 0 * NaN is NaN
        values = tl.load(at_values, mask=as_row(exists, TRANSPOSED) & value_exists, other=0)
        is_visible = tl.broadcast_to(as_column(exists, TRANSPOSED), totals.shape)
        if HIDES_CONTEXT:
            position = tl.where(entries < NUM_HEAD_TOKENS, entries, entries + num_body_tokens)
            is_visible = is_visible & (as_column(position, TRANSPOSED) >= as_row(first, TRANSPOSED))
        if HAS_WINDOWS:
            is_visible = is_visible & as_column(entries >= num_sinks, TRANSPOSED)
        output, reference, totals = attend_tile(
            keys, values, queries, is_visible, output, reference, totals, factor,
            softcap, HAS_SOFTCAP, TRANSPOSED,
        )  # fmt: skip

    if ATTENDS_NEW & (split == NUM_SPLITS - 1):
        last_token = tl.minimum((first_row + ROWS - 1) // GROUP_SIZE, num_new - 1)
        first_new = tl.maximum(least - context_len, 0) // TILE * TILE
        for new in range(first_new, last_token + 1, TILE):
            tokens = new + entry_of_tile
            exists = tokens < num_new
            at = token + tl.minimum(tokens, last_token)
            at_keys = as_column(at * key_token_stride + head * key_head_stride, TRANSPOSED)
            at_values = as_row(at * value_token_stride + head * value_head_stride, TRANSPOSED)
            keys = tl.load(key + at_keys + as_row(channel, TRANSPOSED), mask=key_exists, other=0)
            values = tl.load(
                value + at_values + as_column(value_channel, TRANSPOSED),
                mask=as_row(exists, TRANSPOSED) & value_exists, other=0,
            )  # fmt: skip
            is_visible = as_column(exists, TRANSPOSED) & (
                as_column(tokens, TRANSPOSED) <= as_row(row_tokens, TRANSPOSED)
            )
            if HIDES_CONTEXT:
                position = as_column(context_len + tokens, TRANSPOSED)
                seen = as_row(first, TRANSPOSED)
                if HAS_WINDOWS:
                    seen = tl.where(position < num_sinks, as_row(first_sink, TRANSPOSED), seen)
                is_visible = is_visible & (position >= seen)
            output, reference, totals = attend_tile(
                keys, values, queries, is_visible, output, reference, totals, factor,
                softcap, HAS_SOFTCAP, TRANSPOSED,
            )  # fmt: skip
    store_part(
        partial_outputs, partial_sums, part, output, reference, tl.sum(totals, TRANSPOSED),
        value_channel, VALUE_DIM, ROWS, TRANSPOSED,
    )  # fmt: skip


@triton.jit
def blocks_of_tile(
    table,
    tile,
    last_block,
    body_places,
    TILE: tl.constexpr,
    OPEN_BLOCK_SIZE: tl.constexpr,
    HEAD_BLOCKS: tl.constexpr,
    HAS_BODY: tl.constexpr,
):
    """Ids of the blocks that a tile of entries lies in, a tuple of numbers.

    Entries are the tokens of open blocks, head and tail; between these the body has its places.
    """
    blocks = ()
    for later in tl.static_range(max(TILE // OPEN_BLOCK_SIZE, 1)):
        index = tile * TILE // OPEN_BLOCK_SIZE + later
        index = tl.minimum(index, last_block)
        place = index
        if HAS_BODY:
            place = tl.where(index < HEAD_BLOCKS, index, index + body_places)
        blocks = blocks + (tl.load(table + place, mask=index >= 0, other=0),)
    return blocks


@triton.jit
def rows_of_tile(
    open_blocks,
    blocks,
    tile,
    entry_of_tile,
    head,
    NUM_HEADS: tl.constexpr,
    RECORD_SIZE: tl.constexpr,
    VALUES: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_STRIDES: tl.constexpr,
    TILE: tl.constexpr,
    OPEN_BLOCK_SIZE: tl.constexpr,
):
    """[TILE] where the keys and the values of a tile's blocks start, for each of its entries."""
    block = tl.zeros([TILE], tl.int64) + blocks[0]
    for later in tl.static_range(1, TILE // OPEN_BLOCK_SIZE):
        block = tl.where(entry_of_tile < later * OPEN_BLOCK_SIZE, block, blocks[later])
    records = open_blocks + (block * NUM_HEADS + head) * RECORD_SIZE
    first_key = records
    first_value = records + VALUES
    if OPEN_BLOCK_SIZE > TILE:
        first_of_block = tile * TILE % OPEN_BLOCK_SIZE
        first_key = records + first_of_block * KEY_STRIDES[0]
        first_value = records + VALUES + first_of_block * VALUE_DIM
    return first_key, first_value


@triton.jit
def attend_tile(
    keys,
    values,
    queries,
    is_visible,
    output,
    reference,
    totals,
    factor,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """Add keys [TILE, channels] and values [channels, TILE] to what rows have seen so far."""
    dtype: tl.constexpr = queries.dtype
    none = tl.zeros_like(totals)
    scores = product(keys.to(dtype), queries, none, TRANSPOSED) * factor
    scores = tl.where(is_visible, cap_scores(scores, softcap, HAS_SOFTCAP), float("-inf"))
    new_reference = tl.maximum(reference, tl.max(scores, TRANSPOSED) - HEADROOM)
    shrink = as_row(fast_exp2(reference - new_reference), TRANSPOSED)
    weights = fast_exp2(scores - as_row(new_reference, TRANSPOSED))
    totals = totals * shrink + weights
    rounded = rounded_to(weights, dtype)
    values = values.to(dtype)
    output = product(values, rounded, output * shrink, TRANSPOSED)
    if dtype == tl.bfloat16:  # has but 8 bits, and half of the error would be theirs
        rest = rounded_to(weights - rounded.to(tl.float32), dtype)
        output = product(values, rest, output, TRANSPOSED)
    return output, new_reference, totals
