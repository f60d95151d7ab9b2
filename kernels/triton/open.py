"""Triton: attention of query rows to open blocks and to each other's tokens, in full precision.

Knows head and tail of quantized sequences, and all of native ones; no codes. Keys and values are
the left operands of both products, or queries are, as in `sealed` and `prefill`. Sinks of windowed
sequences lie here; they come first, scored by a query of their own.

Long because a kernel is one loop, and what it keeps in registers has to stay in sight.
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
    new,
    open_blocks,
    step,
    parts,
    rules,
    SHAPE: tl.constexpr,
    LAYOUT: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """One tile of query rows, one kv head, one split: grid (tiles, heads, splits).

    TILE tokens are taken at once. The last split may attend to the new tokens as well. A record of
    `open_blocks` is RECORD_SIZE elements; keys, with strides of a row and of a channel, and behind
    them values, token by token.
    """
    ROWS: tl.constexpr = SPLIT.ROWS
    TILE: tl.constexpr = SPLIT.TILE
    TRANSPOSED: tl.constexpr = SPLIT.TRANSPOSED
    tile, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sequence, token, num_new, context_len, first_row = read_tile(tile, step)
    num_body_tokens = 0
    if LAYOUT.HAS_BODY:
        num_body_tokens = tl.load(step.num_sealed + sequence).to(tl.int32) * LAYOUT.BLOCK_SIZE
    num_entries = context_len - num_body_tokens
    rows = first_row + tl.arange(0, ROWS)
    row_tokens = rows // SHAPE.QUERY_GROUP_SIZE
    part = (tile.to(tl.int64) * SHAPE.NUM_KV_HEADS + kv_head) * SPLIT.NUM_PARTS + split

    first = tl.zeros([ROWS], tl.int32)
    first_sink = tl.zeros([ROWS], tl.int32)
    least = 0
    num_sinks = 0
    if SPLIT.HIDES_CONTEXT:
        positions = context_len + row_tokens
        first = first_seen(positions, sequence, step, rules, SPLIT.HAS_WINDOWS)
        least = tl.min(first, 0)
    num_tiles = tl.cdiv(num_entries, TILE)
    first_tile = 0
    if not LAYOUT.HAS_BODY:
        first_tile = tl.minimum(least // TILE, num_tiles)
    if SPLIT.HAS_WINDOWS:
        # Sinks are as near as in a sequence of just sinks and window.
        num_sinks = tl.load(step.num_sink_tokens + sequence).to(tl.int32)
        window = tl.load(step.window_sizes + sequence).to(tl.int32)
        nearest = tl.minimum(positions, num_sinks + window - 1)
        first_sink = first_visible(nearest, rules.sliding_window, rules.attention_chunk)
        first_tile = tl.maximum(first_tile, num_sinks // TILE)
        least = tl.where(context_len < num_sinks, 0, least)
    share = tl.maximum(tl.cdiv(num_tiles - first_tile, SPLIT.NUM_SPLITS), SPLIT.MIN_SPLIT)
    start = tl.minimum(first_tile + split * share, num_tiles)
    end = tl.minimum(start + share, num_tiles)

    channel = tl.arange(0, SHAPE.KEY_COLUMNS)
    value_channel = tl.arange(0, SHAPE.VALUE_COLUMNS)
    entry_of_tile = tl.arange(0, TILE)
    reference = tl.full([ROWS], NO_REFERENCE, tl.float32)
    totals = zeros(TILE, ROWS, TRANSPOSED)
    output = zeros(SHAPE.VALUE_COLUMNS, ROWS, TRANSPOSED)
    factor = rules.scale if SPLIT.HAS_SOFTCAP else rules.scale * LOG2_E
    units = factor, rules.softcap
    num_rows = num_new * SHAPE.QUERY_GROUP_SIZE
    DTYPE: tl.constexpr = new.query.rows.dtype.element_ty

    IS_KEY_PADDED: tl.constexpr = SHAPE.KEY_DIM != SHAPE.KEY_COLUMNS
    row = entry_of_tile % LAYOUT.OPEN_BLOCK_SIZE  # in its block
    key_offsets = as_column(row * LAYOUT.KEY_STRIDES[0], TRANSPOSED)
    key_offsets += as_row(channel * LAYOUT.KEY_STRIDES[1], TRANSPOSED)
    value_offsets = as_row(row * SHAPE.VALUE_DIM, TRANSPOSED) + as_column(value_channel, TRANSPOSED)
    key_exists = as_row(channel < SHAPE.KEY_DIM, TRANSPOSED)
    value_exists = as_column(value_channel < SHAPE.VALUE_DIM, TRANSPOSED)

    table = step.block_table + sequence * step.table_width
    body_places = num_body_tokens // LAYOUT.OPEN_BLOCK_SIZE
    # -1: there is none, perhaps no table.
    last_block = tl.cdiv(num_entries, LAYOUT.OPEN_BLOCK_SIZE) - 1
    if SPLIT.HAS_WINDOWS:
        if split == 0:
            sink_queries = load_queries(
                new.sink_query, token, kv_head, rows, num_rows, SHAPE, DTYPE, TRANSPOSED
            )
            for index in range(tl.minimum(tl.cdiv(num_sinks, TILE), num_tiles)):
                blocks = blocks_of_tile(table, index, last_block, body_places, LAYOUT, TILE)
                first_key, first_value = rows_of_tile(
                    open_blocks, blocks, index, kv_head, SHAPE, LAYOUT, TILE
                )
                entries = index * TILE + entry_of_tile
                exists = entries < num_entries
                at_keys = as_column(first_key, TRANSPOSED) + key_offsets
                at_values = as_row(first_value, TRANSPOSED) + value_offsets
                keys = load_padded(at_keys, key_exists, IS_KEY_PADDED)
                values = tl.load(at_values, mask=as_row(exists, TRANSPOSED) & value_exists, other=0)
                is_visible = as_column(exists & (entries < num_sinks), TRANSPOSED) & (
                    as_column(entries, TRANSPOSED) >= as_row(first_sink, TRANSPOSED)
                )
                state = output, reference, totals
                output, reference, totals = attend_tile(
                    keys,
                    values,
                    sink_queries,
                    is_visible,
                    state,
                    units,
                    SPLIT.HAS_SOFTCAP,
                    TRANSPOSED,
                )
    queries = load_queries(new.query, token, kv_head, rows, num_rows, SHAPE, DTYPE, TRANSPOSED)
    # The next blocks are looked up one turn ahead: what waits for another load is not pipelined.
    following = blocks_of_tile(table, start, last_block, body_places, LAYOUT, TILE)
    for index in range(start, end):
        first_key, first_value = rows_of_tile(
            open_blocks, following, index, kv_head, SHAPE, LAYOUT, TILE
        )
        following = blocks_of_tile(table, index + 1, last_block, body_places, LAYOUT, TILE)
        at_keys = as_column(first_key, TRANSPOSED) + key_offsets
        at_values = as_row(first_value, TRANSPOSED) + value_offsets
        entries = index * TILE + entry_of_tile
        keys = load_padded(at_keys, key_exists, IS_KEY_PADDED)
        exists = entries < num_entries  # what does not may be anything, and 0 * NaN is NaN
        values = tl.load(at_values, mask=as_row(exists, TRANSPOSED) & value_exists, other=0)
        is_visible = tl.broadcast_to(as_column(exists, TRANSPOSED), totals.shape)
        if SPLIT.HIDES_CONTEXT:
            position = tl.where(
                entries < LAYOUT.NUM_HEAD_TOKENS, entries, entries + num_body_tokens
            )
            is_visible = is_visible & (as_column(position, TRANSPOSED) >= as_row(first, TRANSPOSED))
        if SPLIT.HAS_WINDOWS:
            is_visible = is_visible & as_column(entries >= num_sinks, TRANSPOSED)
        state = output, reference, totals
        output, reference, totals = attend_tile(
            keys, values, queries, is_visible, state, units, SPLIT.HAS_SOFTCAP, TRANSPOSED
        )

    if SPLIT.ATTENDS_NEW & (split == SPLIT.NUM_SPLITS - 1):
        last_token = tl.minimum((first_row + ROWS - 1) // SHAPE.QUERY_GROUP_SIZE, num_new - 1)
        first_new = tl.maximum(least - context_len, 0) // TILE * TILE
        for first_of_tile in range(first_new, last_token + 1, TILE):
            tokens = first_of_tile + entry_of_tile
            exists = tokens < num_new
            at = token + tl.minimum(tokens, last_token)
            at_keys = as_column(
                at * new.key.token_stride + kv_head * new.key.head_stride, TRANSPOSED
            )
            at_values = as_row(
                at * new.value.token_stride + kv_head * new.value.head_stride, TRANSPOSED
            )
            keys = tl.load(
                new.key.rows + at_keys + as_row(channel, TRANSPOSED), mask=key_exists, other=0
            )
            values = tl.load(
                new.value.rows + at_values + as_column(value_channel, TRANSPOSED),
                mask=as_row(exists, TRANSPOSED) & value_exists, other=0,
            )  # fmt: skip
            is_visible = as_column(exists, TRANSPOSED) & (
                as_column(tokens, TRANSPOSED) <= as_row(row_tokens, TRANSPOSED)
            )
            if SPLIT.HIDES_CONTEXT:
                position = as_column(context_len + tokens, TRANSPOSED)
                seen = as_row(first, TRANSPOSED)
                if SPLIT.HAS_WINDOWS:
                    seen = tl.where(position < num_sinks, as_row(first_sink, TRANSPOSED), seen)
                is_visible = is_visible & (position >= seen)
            state = output, reference, totals
            output, reference, totals = attend_tile(
                keys, values, queries, is_visible, state, units, SPLIT.HAS_SOFTCAP, TRANSPOSED
            )
    total = tl.sum(totals, TRANSPOSED)
    store_part(parts, part, output, reference, total, SHAPE, TRANSPOSED)


@triton.jit
def blocks_of_tile(table, tile, last_block, body_places, LAYOUT: tl.constexpr, TILE: tl.constexpr):
    """Ids of the blocks that a tile of entries lies in, a tuple of numbers.

    Entries are the tokens of open blocks, head and tail; between these the body has its places.
    """
    HEAD_BLOCKS: tl.constexpr = LAYOUT.NUM_HEAD_TOKENS // LAYOUT.OPEN_BLOCK_SIZE
    blocks = ()
    for later in tl.static_range(max(TILE // LAYOUT.OPEN_BLOCK_SIZE, 1)):
        index = tl.minimum(tile * TILE // LAYOUT.OPEN_BLOCK_SIZE + later, last_block)
        place = index
        if LAYOUT.HAS_BODY:
            place = tl.where(index < HEAD_BLOCKS, index, index + body_places)
        blocks = blocks + (tl.load(table + place, mask=index >= 0, other=0),)
    return blocks


@triton.jit
def rows_of_tile(
    open_blocks,
    blocks,
    tile,
    kv_head,
    SHAPE: tl.constexpr,
    LAYOUT: tl.constexpr,
    TILE: tl.constexpr,
):
    """[TILE] where the keys and the values of a tile's blocks start, for each of its entries."""
    VALUES: tl.constexpr = LAYOUT.OPEN_BLOCK_SIZE * SHAPE.KEY_DIM  # behind the record's keys
    entry_of_tile = tl.arange(0, TILE)
    block = tl.zeros([TILE], tl.int64) + blocks[0]
    for later in tl.static_range(1, TILE // LAYOUT.OPEN_BLOCK_SIZE):
        block = tl.where(entry_of_tile < later * LAYOUT.OPEN_BLOCK_SIZE, block, blocks[later])
    records = open_blocks + (block * SHAPE.NUM_KV_HEADS + kv_head) * LAYOUT.RECORD_SIZE
    first_key = records
    first_value = records + VALUES
    if LAYOUT.OPEN_BLOCK_SIZE > TILE:
        first_of_block = tile * TILE % LAYOUT.OPEN_BLOCK_SIZE
        first_key = records + first_of_block * LAYOUT.KEY_STRIDES[0]
        first_value = records + VALUES + first_of_block * SHAPE.VALUE_DIM
    return first_key, first_value


@triton.jit
def attend_tile(
    keys,
    values,
    queries,
    is_visible,
    state,
    units,
    HAS_SOFTCAP: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """Add keys [TILE, channels] and values [channels, TILE] to what rows have seen so far.

    That `state` is output, reference and totals; `units` are the factor of scores and the softcap.
    """
    output, reference, totals = state
    factor, softcap = units
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
