"""The attention worker of the CPU: walks over work items, tables and blocks, calls microkernels.

Knows addresses and counts. One native function runs on every thread; the threads draw items from a
common counter. It is compiled once for all formats and shapes: what depends on them is in the
microkernels, whose addresses it is given.
"""

from __future__ import annotations

from enum import IntEnum, auto
from functools import cache
from typing import Any

import numpy as np

from .microkernels import (
    MASKED,
    MAX_KEY_GROUPS,
    MAX_ROWS,
    ROW_STRIDE,
    SCORE_STRIDE,
    STATE_LANES,
    TILE_TOKENS,
)
from .native_code import (
    address_of,
    call,
    fetch_add,
    load_float,
    load_long,
    native,
    store_float,
    store_long,
    worker,
)

MAX_ITEM_ROWS = 32  # query rows of one work item
NEW_TOKEN_ROWS = 32  # new tokens whose scores are computed at once
NUM_VARIANTS = 4  # microkernels for 1, 2, 4 and 8 query rows
NO_LIMIT = 1 << 62  # tokens


class Field(IntEnum):
    """Places in the array of 64-bit numbers that the worker reads."""

    # The step.
    NUM_ITEMS = 0
    ITEMS = auto()
    CONTEXT_LENS = auto()
    NUM_SEALED = auto()
    QUERY_START_LOC = auto()
    BLOCK_TABLE = auto()  # [N, TABLE_WIDTH]
    TABLE_WIDTH = auto()
    BLOCK_SIZE = auto()
    OPEN_BLOCK_SIZE = auto()
    NUM_HEAD_TOKENS = auto()
    GROUP_SIZE = auto()  # query heads of a kv head
    NUM_SINK_TOKENS = auto()  # [N] of streams; 0 in a step without any
    WINDOW_SIZES = auto()
    COUNTERS = auto()  # next item, next thread, then one for each split row
    PARTIALS = auto()
    STORED_STARTS = auto()  # [N + 1] where a sequence's stored tokens begin among all of them
    STORED_TOKENS = auto()
    STORED_SLOTS = auto()
    # The layer.
    KEY_DIM = auto()
    VALUE_DIM = auto()
    BLOCK_STRIDE = auto()
    HEAD_STRIDE = auto()
    OPEN_KEYS = auto()
    OPEN_VALUES = auto()
    OPEN_KEY_STRIDE = auto()
    OPEN_VALUE_STRIDE = auto()
    OPEN_PIECE = auto()  # tokens of an open block whose scores are computed at once
    KEY_CODES = auto()
    VALUE_CODES = auto()
    NUM_CODE_ROWS = auto()
    KEY_SCALE = auto()
    KEY_ZERO = auto()
    VALUE_SCALE = auto()
    VALUE_ZERO = auto()
    METADATA = auto()
    METADATA_BYTES = auto()
    NUM_KEY_GROUPS = auto()  # 0 where keys have one scale for each token
    GROUP_SHIFT = auto()
    KERNELS = auto()  # [Kernel.COUNT, NUM_VARIANTS] addresses
    FOLD = auto()
    AFFINE = auto()
    PREFETCH = auto()
    START = auto()
    SOFTMAX = auto()
    SOFTMAX_SEALED = auto()
    ITEM_BYTES = auto()  # of an element in open blocks
    ROUND = auto()  # from float32 to elements of open blocks
    # The call.
    QUERY = auto()
    QUERY_TOKEN_STRIDE = auto()
    QUERY_HEAD_STRIDE = auto()
    SINK_QUERY = auto()  # 0: as other tokens; strides follow as those of queries do
    SINK_QUERY_TOKEN_STRIDE = auto()
    SINK_QUERY_HEAD_STRIDE = auto()
    KEY = auto()
    KEY_TOKEN_STRIDE = auto()
    KEY_HEAD_STRIDE = auto()
    CHANNEL_MAJOR_KEYS = auto()  # [H, key_dim, padded T], where a sequence has several new tokens
    PADDED_TOKENS = auto()
    VALUE = auto()
    VALUE_TOKEN_STRIDE = auto()
    VALUE_HEAD_STRIDE = auto()
    OUTPUT = auto()
    NUM_QUERY_HEADS = auto()
    SLIDING_WINDOW = auto()  # 0: none
    ATTENTION_CHUNK = auto()
    SINK_LOGITS = auto()
    APPENDS = auto()  # whether new tokens are written to open blocks
    NUMBERS = auto()  # float32: shift of queries (0), their factor, softcap
    SCRATCH = auto()
    COUNT = auto()


class Kernel(IntEnum):
    """Microkernels that come in variants by query rows."""

    SCORE_OPEN = 0
    SCORE_SEALED = auto()
    SCORE_NEW = auto()
    VALUE_OPEN = auto()
    VALUE_SEALED = auto()
    VALUE_NEW = auto()
    COUNT = auto()


class Item(IntEnum):
    """Places in a work item: some query rows of one kv head over a part of its context."""

    SEQUENCE = 0
    KV_HEAD = auto()
    FIRST_ROW = auto()
    NUM_ROWS = auto()
    START = auto()  # context tokens [start, end); the new ones follow where end is the last
    END = auto()
    PARTIAL = auto()  # index of the first partial result; -1: the item is the whole row
    NUM_PARTS = auto()
    COUNTER = auto()
    FIRST_PARTIAL = auto()  # of all parts of the row
    COUNT = auto()


# A thread's scratch, in floats from its start; sums and states are kept by tiles of MAX_ROWS rows.
NUM_TILES = MAX_ITEM_ROWS // MAX_ROWS
QUERIES = 0
OUTPUTS = QUERIES + MAX_ITEM_ROWS * ROW_STRIDE
FOLDED = OUTPUTS + MAX_ITEM_ROWS * ROW_STRIDE
ZERO_DOTS = FOLDED + MAX_KEY_GROUPS * MAX_ROWS * ROW_STRIDE
SCORES = ZERO_DOTS + MAX_KEY_GROUPS * MAX_ROWS
SUMS = SCORES + MAX_ROWS * SCORE_STRIDE
MAXIMA = SUMS + NUM_TILES * 2 * MAX_ROWS * STATE_LANES
NUMBERS = MAXIMA + MAX_ITEM_ROWS
RANGES = NUMBERS + 4  # [2][MAX_ROWS] 64-bit: first visible token and one past the last
NEXT_ITEM = RANGES + 4 * MAX_ROWS  # 64-bit address
SCRATCH_FLOATS = -(-(NEXT_ITEM + 2) // 1024) * 1024
PARTIAL_FLOATS = ROW_STRIDE  # output, then maximum and sum behind it
PARTIAL_MAXIMUM = ROW_STRIDE - 2
PARTIAL_SUM = ROW_STRIDE - 1


@native
def kernel_for(p: int, kind: int, num_rows: int) -> int:
    """The microkernel of a kind that takes so many query rows: 1, 2, 4 or 8."""
    variant = 3
    if num_rows <= 2:
        variant = num_rows - 1
    elif num_rows <= 4:
        variant = 2
    return load_long(load_long(p, Field.KERNELS), kind * NUM_VARIANTS + variant)


@native
def rows_of_tile(item: int, tile: int) -> int:
    return min(load_long(item, Item.NUM_ROWS) - tile * MAX_ROWS, MAX_ROWS)


@native
def state_of_tile(scratch: int, tile: int) -> tuple[int, int, int, int]:
    """Addresses of a tile's queries, outputs, maxima and sums."""
    rows = 4 * tile * MAX_ROWS
    return (
        scratch + 4 * QUERIES + rows * ROW_STRIDE,
        scratch + 4 * OUTPUTS + rows * ROW_STRIDE,
        scratch + 4 * MAXIMA + rows,
        scratch + 4 * SUMS + rows * 2 * STATE_LANES,
    )


@native
def load_queries(p: int, item: int, scratch: int, source: int) -> None:
    """Scale the item's queries into scratch; `source` is the address of the fields of a query."""
    dim, group_size = load_long(p, Field.KEY_DIM), load_long(p, Field.GROUP_SIZE)
    first_token = load_long(load_long(p, Field.QUERY_START_LOC), load_long(item, Item.SEQUENCE))
    first_head = load_long(item, Item.KV_HEAD) * group_size
    first_row, num_rows = load_long(item, Item.FIRST_ROW), load_long(item, Item.NUM_ROWS)
    affine, numbers = load_long(p, Field.AFFINE), load_long(p, Field.NUMBERS)
    query, token_stride = load_long(source, 0), load_long(source, 1)
    head_stride = load_long(source, 2)
    queries, _, _, _ = state_of_tile(scratch, 0)
    for row in range(num_rows):
        token, head = divmod(first_row + row, group_size)
        address = query + (first_token + token) * token_stride + (first_head + head) * head_stride
        call(affine, (address, queries + row * ROW_STRIDE * 4, dim, numbers))


@native
def start_rows(p: int, item: int, scratch: int) -> None:
    """Start with no context at all."""
    dim, value_dim = load_long(p, Field.KEY_DIM), load_long(p, Field.VALUE_DIM)
    num_rows = load_long(item, Item.NUM_ROWS)
    queries, outputs, maxima, sums = state_of_tile(scratch, 0)
    for row in range(num_rows):
        store_float(maxima, row, np.float32(MASKED))
        for channel in range(-(-value_dim // 16) * 16):
            store_float(outputs, row * ROW_STRIDE + channel, np.float32(0))
    for row in range(num_rows, -(-num_rows // MAX_ROWS) * MAX_ROWS):  # rows that nobody reads
        for channel in range(-(-dim // 16) * 16):
            store_float(queries, row * ROW_STRIDE + channel, np.float32(0))
    for index in range(-(-num_rows // MAX_ROWS) * 2 * MAX_ROWS * STATE_LANES):
        store_float(sums, index, np.float32(0))


@native
def start_with_new_token(p: int, item: int, scratch: int) -> None:
    """The only new token of a sequence sees itself."""
    token = load_long(load_long(p, Field.QUERY_START_LOC), load_long(item, Item.SEQUENCE))
    head = load_long(item, Item.KV_HEAD)
    key = (
        load_long(p, Field.KEY)
        + token * load_long(p, Field.KEY_TOKEN_STRIDE)
        + head * load_long(p, Field.KEY_HEAD_STRIDE)
    )
    value = (
        load_long(p, Field.VALUE)
        + token * load_long(p, Field.VALUE_TOKEN_STRIDE)
        + head * load_long(p, Field.VALUE_HEAD_STRIDE)
    )
    key_dim, value_dim = load_long(p, Field.KEY_DIM), load_long(p, Field.VALUE_DIM)
    softcap = load_long(p, Field.NUMBERS) + 8
    start = load_long(p, Field.START)
    for tile in range(-(-load_long(item, Item.NUM_ROWS) // MAX_ROWS)):
        queries, outputs, maxima, sums = state_of_tile(scratch, tile)
        rows = rows_of_tile(item, tile)
        call(
            start,
            (queries, rows, key, key_dim, value, value_dim, maxima, sums, outputs, softcap),
        )


@native
def num_sinks_of(p: int, item: int) -> int:
    """Tokens that the item's sequence sees whatever its window, if it is a stream."""
    sinks = load_long(p, Field.NUM_SINK_TOKENS)
    return load_long(sinks, load_long(item, Item.SEQUENCE)) if sinks else 0


@native
def set_ranges(p: int, item: int, scratch: int, tile: int, position: int, num_tokens: int) -> bool:
    """Which of the tokens from `position` on each row of a tile sees; False if none sees any.

    All of them are sinks or none is, so that what a row sees has no gap; see `ScoreRules.visible`.
    """
    group_size = load_long(p, Field.GROUP_SIZE)
    context_len = load_long(load_long(p, Field.CONTEXT_LENS), load_long(item, Item.SEQUENCE))
    window, chunk = load_long(p, Field.SLIDING_WINDOW), load_long(p, Field.ATTENTION_CHUNK)
    first_row = load_long(item, Item.FIRST_ROW) + tile * MAX_ROWS
    ranges = scratch + 4 * RANGES
    stream_window, farthest = NO_LIMIT, NO_LIMIT
    windows = load_long(p, Field.WINDOW_SIZES)
    if windows:
        num_sinks = num_sinks_of(p, item)
        stream_window = load_long(windows, load_long(item, Item.SEQUENCE))
        if position < num_sinks:
            farthest = num_sinks + stream_window - 1  # where queries seem to be, seen from a sink
            stream_window = NO_LIMIT
    is_any_visible = False
    for row in range(rows_of_tile(item, tile)):
        query_position = context_len + (first_row + row) // group_size
        first = query_position - stream_window + 1
        if window:
            first = max(first, min(query_position, farthest) - window + 1)
        if chunk:
            first = max(first, query_position // chunk * chunk)
        first = max(first - position, 0)
        past = min(query_position + 1 - position, num_tokens)
        store_long(ranges, row, first)
        store_long(ranges, MAX_ROWS + row, past)
        is_any_visible |= first < past
    return is_any_visible


@native
def soften(
    p: int, kernel: int, item: int, scratch: int, tile: int, num_tokens: int, record: int
) -> None:
    """Scores of a tile of tokens to weights."""
    _, outputs, maxima, sums = state_of_tile(scratch, tile)
    call(
        kernel,
        (
            scratch + 4 * SCORES,
            rows_of_tile(item, tile),
            -(-num_tokens // 16) * 16,
            scratch + 4 * RANGES,
            scratch + 4 * RANGES + 8 * MAX_ROWS,
            maxima,
            sums,
            outputs,
            load_long(p, Field.VALUE_DIM),
            load_long(p, Field.NUMBERS) + 8,
            load_long(p, Field.KEY_SCALE) + record,
            load_long(p, Field.VALUE_SCALE) + record,
            load_long(p, Field.VALUE_ZERO) + record,
            scratch + 4 * ZERO_DOTS,
            load_long(p, Field.GROUP_SHIFT),
        ),
    )


@native
def table_of(p: int, item: int) -> int:
    """The row of the item's sequence in the block table."""
    row = load_long(p, Field.TABLE_WIDTH) * load_long(item, Item.SEQUENCE)
    return load_long(p, Field.BLOCK_TABLE) + 8 * row


@native
def ahead_of(p: int, item: int, scratch: int, position: int, wants_values: bool) -> int:
    """Where the keys or values of a context token lie; beyond the item's end, in the next item."""
    if position >= load_long(item, Item.END):
        position -= load_long(item, Item.END)
        item = load_long(scratch + 4 * NEXT_ITEM, 0)
        position += load_long(item, Item.START)
    sequence = load_long(item, Item.SEQUENCE)
    head = load_long(item, Item.KV_HEAD) * load_long(p, Field.HEAD_STRIDE)
    num_head_tokens, size = load_long(p, Field.NUM_HEAD_TOKENS), load_long(p, Field.BLOCK_SIZE)
    num_body_tokens = load_long(load_long(p, Field.NUM_SEALED), sequence) * size
    if num_head_tokens <= position < num_head_tokens + num_body_tokens:
        position -= (position - num_head_tokens) % size  # where its block stands in the table
        address = load_long(p, Field.VALUE_CODES if wants_values else Field.KEY_CODES)
    else:
        address = load_long(p, Field.OPEN_VALUES if wants_values else Field.OPEN_KEYS)
    width = load_long(p, Field.TABLE_WIDTH)
    index = min(position // load_long(p, Field.OPEN_BLOCK_SIZE), width - 1)
    block = load_long(table_of(p, item), index)
    return address + block * load_long(p, Field.BLOCK_STRIDE) + head


@native
def fetch_tail(p: int, item: int, scratch: int, position: int, wants_values: bool) -> None:
    """Fetch a tile of open blocks that follows a sealed one, but for its first block.

    A microkernel fetches ahead at one address, and they lie at many.
    """
    size, end = load_long(p, Field.OPEN_BLOCK_SIZE), load_long(item, Item.END)
    num_bytes = load_long(p, Field.OPEN_KEY_STRIDE) * load_long(p, Field.KEY_DIM)
    if wants_values:
        num_bytes = load_long(p, Field.OPEN_VALUE_STRIDE) * size
    for ahead in range(position + size, min(end, position + TILE_TOKENS), size):
        address = ahead_of(p, item, scratch, ahead, wants_values)
        call(load_long(p, Field.PREFETCH), (address, num_bytes))


@native
def attend_open(p: int, item: int, scratch: int, position: int, num_tokens: int) -> None:
    """Attend to `num_tokens` tokens of open blocks, which follow each other in the table."""
    size, piece = load_long(p, Field.OPEN_BLOCK_SIZE), load_long(p, Field.OPEN_PIECE)
    table = table_of(p, item)
    block_stride = load_long(p, Field.BLOCK_STRIDE)
    head = load_long(item, Item.KV_HEAD) * load_long(p, Field.HEAD_STRIDE)
    keys, values = load_long(p, Field.OPEN_KEYS) + head, load_long(p, Field.OPEN_VALUES) + head
    key_stride = load_long(p, Field.OPEN_KEY_STRIDE)
    value_stride = load_long(p, Field.OPEN_VALUE_STRIDE)
    key_dim = load_long(p, Field.KEY_DIM)
    num_pieces = -(-num_tokens // piece)
    for tile in range(-(-load_long(item, Item.NUM_ROWS) // MAX_ROWS)):
        if not set_ranges(p, item, scratch, tile, position, num_tokens):
            continue
        queries, outputs, _, _ = state_of_tile(scratch, tile)
        rows = rows_of_tile(item, tile)
        score = kernel_for(p, Kernel.SCORE_OPEN, rows)
        for index in range(num_pieces):
            block, offset = divmod(position + index * piece, size)
            record = load_long(table, block) * block_stride
            at_key = keys + record + offset * (key_stride // size)
            scores = scratch + 4 * (SCORES + index * piece)
            ahead = ahead_of(p, item, scratch, position + num_tokens + index * piece, False)
            call(score, (at_key, queries, scores, key_dim, key_stride, 0, ahead))
        soften(p, load_long(p, Field.SOFTMAX), item, scratch, tile, num_tokens, 0)
        add = kernel_for(p, Kernel.VALUE_OPEN, rows)
        for index in range(num_pieces):
            block, offset = divmod(position + index * piece, size)
            at_value = values + load_long(table, block) * block_stride + offset * value_stride
            weights = scratch + 4 * (SCORES + index * piece)
            count = min(num_tokens - index * piece, piece)
            ahead = ahead_of(p, item, scratch, position + num_tokens + index * piece, True)
            call(add, (at_value, weights, outputs, count, 0, value_stride, ahead))


@native
def attend_sealed(p: int, item: int, scratch: int, position: int) -> None:
    """Attend to one sealed block, that of the tokens from `position` on."""
    num_tokens, num_rows = load_long(p, Field.BLOCK_SIZE), load_long(p, Field.NUM_CODE_ROWS)
    block = load_long(table_of(p, item), position // load_long(p, Field.OPEN_BLOCK_SIZE))
    record = block * load_long(p, Field.BLOCK_STRIDE)
    record += load_long(item, Item.KV_HEAD) * load_long(p, Field.HEAD_STRIDE)
    keys = load_long(p, Field.KEY_CODES) + record
    values = load_long(p, Field.VALUE_CODES) + record
    key_dim, value_dim = load_long(p, Field.KEY_DIM), load_long(p, Field.VALUE_DIM)
    num_groups, group_shift = load_long(p, Field.NUM_KEY_GROUPS), load_long(p, Field.GROUP_SHIFT)
    end = position + num_tokens
    num_sealed = load_long(load_long(p, Field.NUM_SEALED), load_long(item, Item.SEQUENCE))
    is_last = end == load_long(p, Field.NUM_HEAD_TOKENS) + num_sealed * num_tokens
    keys_ahead = ahead_of(p, item, scratch, end, False)
    values_ahead = ahead_of(p, item, scratch, end, True)
    # The codes ahead are fetched by the microkernels as they go, scales and zero points here.
    metadata_ahead = keys_ahead + load_long(p, Field.METADATA) - load_long(p, Field.KEY_CODES)
    call(load_long(p, Field.PREFETCH), (metadata_ahead, load_long(p, Field.METADATA_BYTES)))
    for tile in range(-(-load_long(item, Item.NUM_ROWS) // MAX_ROWS)):
        if not set_ranges(p, item, scratch, tile, position, num_tokens):
            continue
        queries, outputs, _, _ = state_of_tile(scratch, tile)
        rows = rows_of_tile(item, tile)
        if num_groups:
            folded, dots = scratch + 4 * FOLDED, scratch + 4 * ZERO_DOTS
            scale, zero = load_long(p, Field.KEY_SCALE), load_long(p, Field.KEY_ZERO)
            call(
                load_long(p, Field.FOLD),
                (queries, rows, key_dim, num_groups, scale + record, zero + record, folded, dots),
            )
            queries = folded
        scores = scratch + 4 * SCORES
        if is_last and tile == 0:
            fetch_tail(p, item, scratch, end, False)
        score = kernel_for(p, Kernel.SCORE_SEALED, rows)
        call(score, (keys, queries, scores, key_dim, num_rows, group_shift, keys_ahead))
        softmax = load_long(p, Field.SOFTMAX_SEALED)
        soften(p, softmax, item, scratch, tile, num_tokens, record)
        if is_last and tile == 0:
            fetch_tail(p, item, scratch, end, True)
        add = kernel_for(p, Kernel.VALUE_SEALED, rows)
        call(add, (values, scores, outputs, num_rows, num_rows, value_dim, values_ahead))


@native
def attend_new(p: int, item: int, scratch: int, start: int, num_tokens: int) -> None:
    """Attend to some of the sequence's own new tokens, from `start` among them on."""
    sequence, head = load_long(item, Item.SEQUENCE), load_long(item, Item.KV_HEAD)
    token = load_long(load_long(p, Field.QUERY_START_LOC), sequence) + start
    position = load_long(load_long(p, Field.CONTEXT_LENS), sequence) + start
    key_dim, padded = load_long(p, Field.KEY_DIM), load_long(p, Field.PADDED_TOKENS)
    keys = load_long(p, Field.CHANNEL_MAJOR_KEYS) + 4 * (head * key_dim * padded + token)
    value_stride = load_long(p, Field.VALUE_TOKEN_STRIDE)
    values = (
        load_long(p, Field.VALUE)
        + token * value_stride
        + head * load_long(p, Field.VALUE_HEAD_STRIDE)
    )
    for tile in range(-(-load_long(item, Item.NUM_ROWS) // MAX_ROWS)):
        if not set_ranges(p, item, scratch, tile, position, num_tokens):
            continue
        queries, outputs, _, _ = state_of_tile(scratch, tile)
        rows = rows_of_tile(item, tile)
        score = kernel_for(p, Kernel.SCORE_NEW, rows)
        for offset in range(0, num_tokens, NEW_TOKEN_ROWS):
            target = scratch + 4 * (SCORES + offset)
            call(
                score,
                (keys + 4 * offset, queries, target, key_dim, 4 * padded, 0, keys + 4 * offset),
            )
        soften(p, load_long(p, Field.SOFTMAX), item, scratch, tile, num_tokens, 0)
        call(
            kernel_for(p, Kernel.VALUE_NEW, rows),
            (values, scratch + 4 * SCORES, outputs, num_tokens, 0, value_stride, values),
        )


@native
def attend_sinks(p: int, item: int, scratch: int, end: int) -> None:
    """Attend to the item's sinks before `end`: tiles of their own, a query of their own.

    They are in open blocks at the very start of the table.
    """
    if load_long(p, Field.SINK_QUERY):
        load_queries(p, item, scratch, p + 8 * Field.SINK_QUERY)
    for position in range(load_long(item, Item.START), end, TILE_TOKENS):
        attend_open(p, item, scratch, position, min(end - position, TILE_TOKENS))
    if load_long(p, Field.SINK_QUERY):
        load_queries(p, item, scratch, p + 8 * Field.QUERY)


@native
def attend_context(p: int, item: int, scratch: int) -> None:
    """Attend to the item's part of head, body and tail."""
    sequence = load_long(item, Item.SEQUENCE)
    context_len = load_long(load_long(p, Field.CONTEXT_LENS), sequence)
    num_sealed = load_long(load_long(p, Field.NUM_SEALED), sequence)
    start, end = load_long(item, Item.START), load_long(item, Item.END)
    head_end = min(load_long(p, Field.NUM_HEAD_TOKENS), context_len)
    block_size = load_long(p, Field.BLOCK_SIZE)
    body_end = head_end + num_sealed * block_size
    sinks_end = min(end, num_sinks_of(p, item))
    if start < sinks_end:
        attend_sinks(p, item, scratch, sinks_end)
        start = sinks_end
    for position in range(start, min(end, head_end), TILE_TOKENS):
        attend_open(p, item, scratch, position, min(head_end - position, TILE_TOKENS))
    if num_sealed:
        # Parts of a context begin and end between blocks.
        for position in range(max(start, head_end), min(end, body_end), block_size):
            attend_sealed(p, item, scratch, position)
    for position in range(max(start, body_end), end, TILE_TOKENS):
        attend_open(p, item, scratch, position, min(end - position, TILE_TOKENS))


@native
def total_of(sums: int, row: int) -> np.float32:
    total = np.float32(0)
    for lane in range(STATE_LANES):
        total += load_float(sums, row * STATE_LANES + lane)
    return total


@native
def write_output(
    p: int,
    item: int,
    scratch: int,
    row: int,
    source: int,
    shift: np.float32,
    top: np.float32,
    total: np.float32,
) -> None:
    """One row: divide by the sum of its weights, that of its sink among them."""
    group_size = load_long(p, Field.GROUP_SIZE)
    token, head = divmod(load_long(item, Item.FIRST_ROW) + row, group_size)
    token += load_long(load_long(p, Field.QUERY_START_LOC), load_long(item, Item.SEQUENCE))
    head += load_long(item, Item.KV_HEAD) * group_size
    sinks, factor = load_long(p, Field.SINK_LOGITS), np.float32(1)
    if sinks:
        sink = load_float(sinks, head)  # in units of the softmax
        highest = max(top, sink)
        factor = np.float32(2) ** (top - highest)
        total = total * factor + np.float32(2) ** (sink - highest)
    numbers = scratch + 4 * NUMBERS
    store_float(numbers, 0, shift)
    store_float(numbers, 1, factor / total)
    dim = load_long(p, Field.VALUE_DIM)
    num_heads = load_long(p, Field.NUM_QUERY_HEADS)
    target = load_long(p, Field.OUTPUT) + 4 * dim * (token * num_heads + head)
    call(load_long(p, Field.AFFINE), (source, target, dim, numbers))


@native
def finish_rows(p: int, item: int, scratch: int) -> None:
    """Write an item's rows to the output, or as one part of them."""
    partial = load_long(item, Item.PARTIAL)
    dim = load_long(p, Field.VALUE_DIM)
    for row in range(load_long(item, Item.NUM_ROWS)):
        tile, row_of_tile = divmod(row, MAX_ROWS)
        _, outputs, maxima, sums = state_of_tile(scratch, tile)
        source = outputs + 4 * row_of_tile * ROW_STRIDE
        top, total = load_float(maxima, row_of_tile), total_of(sums, row_of_tile)
        shift = total_of(sums, MAX_ROWS + row_of_tile)
        if partial < 0:
            write_output(p, item, scratch, row, source, shift, top, total)
            continue
        place = partial * MAX_ITEM_ROWS + row
        target = load_long(p, Field.PARTIALS) + 4 * place * PARTIAL_FLOATS
        for channel in range(dim):
            store_float(target, channel, load_float(source, channel) + shift)
        store_float(target, PARTIAL_MAXIMUM, top)
        store_float(target, PARTIAL_SUM, total)


@native
def merge_parts(p: int, item: int, scratch: int) -> None:
    """Put the parts of the item's rows together; the thread that ends the last part does it."""
    dim, num_parts = load_long(p, Field.VALUE_DIM), load_long(item, Item.NUM_PARTS)
    first = load_long(item, Item.FIRST_PARTIAL) * MAX_ITEM_ROWS
    merged = scratch + 4 * OUTPUTS
    for row in range(load_long(item, Item.NUM_ROWS)):
        parts = load_long(p, Field.PARTIALS) + 4 * (first + row) * PARTIAL_FLOATS
        part_stride = MAX_ITEM_ROWS * PARTIAL_FLOATS
        top, total = np.float32(MASKED), np.float32(0)
        for part in range(num_parts):
            top = max(top, load_float(parts, part * part_stride + PARTIAL_MAXIMUM))
        for channel in range(dim):
            store_float(merged, channel, np.float32(0))
        for part in range(num_parts):
            start = part * part_stride
            weight = np.float32(2) ** (load_float(parts, start + PARTIAL_MAXIMUM) - top)
            total += weight * load_float(parts, start + PARTIAL_SUM)
            for channel in range(dim):
                value = load_float(merged, channel)
                value += weight * load_float(parts, start + channel)
                store_float(merged, channel, value)
        write_output(p, item, scratch, row, merged, np.float32(0), top, total)


@native
def append_tokens(p: int, item: int) -> None:
    """Copy the sequence's new tokens of one head into their slots.

    Right behind attention to the tail: a token's key is one element of as many cache lines as
    it has channels, and now they are at hand.
    """
    sequence, head = load_long(item, Item.SEQUENCE), load_long(item, Item.KV_HEAD)
    size, item_bytes = load_long(p, Field.OPEN_BLOCK_SIZE), load_long(p, Field.ITEM_BYTES)
    key = load_long(p, Field.KEY) + head * load_long(p, Field.KEY_HEAD_STRIDE)
    value = load_long(p, Field.VALUE) + head * load_long(p, Field.VALUE_HEAD_STRIDE)
    key_stride = load_long(p, Field.OPEN_KEY_STRIDE)
    value_stride = load_long(p, Field.OPEN_VALUE_STRIDE)
    starts, round_to = load_long(p, Field.STORED_STARTS), load_long(p, Field.ROUND)
    for index in range(load_long(starts, sequence), load_long(starts, sequence + 1)):
        token = load_long(load_long(p, Field.STORED_TOKENS), index)
        block, offset = divmod(load_long(load_long(p, Field.STORED_SLOTS), index), size)
        record = block * load_long(p, Field.BLOCK_STRIDE) + head * load_long(p, Field.HEAD_STRIDE)
        source = key + token * load_long(p, Field.KEY_TOKEN_STRIDE)
        target = load_long(p, Field.OPEN_KEYS) + record + offset * item_bytes
        call(round_to, (source, 4, target, key_stride, load_long(p, Field.KEY_DIM)))
        source = value + token * load_long(p, Field.VALUE_TOKEN_STRIDE)
        target = load_long(p, Field.OPEN_VALUES) + record + offset * value_stride
        call(round_to, (source, 4, target, item_bytes, load_long(p, Field.VALUE_DIM)))


@native
def run_item(p: int, item: int, scratch: int) -> None:
    sequence = load_long(item, Item.SEQUENCE)
    starts = load_long(p, Field.QUERY_START_LOC)
    num_new = load_long(starts, sequence + 1) - load_long(starts, sequence)
    context_len = load_long(load_long(p, Field.CONTEXT_LENS), sequence)
    is_last_part = load_long(item, Item.END) == context_len
    load_queries(p, item, scratch, p + 8 * Field.QUERY)
    start_rows(p, item, scratch)
    if is_last_part and num_new == 1:
        start_with_new_token(p, item, scratch)
    attend_context(p, item, scratch)
    if is_last_part and num_new > 1:
        last_row = load_long(item, Item.FIRST_ROW) + load_long(item, Item.NUM_ROWS) - 1
        num_seen = last_row // load_long(p, Field.GROUP_SIZE) + 1
        num_sinks = min(max(num_sinks_of(p, item) - context_len, 0), num_seen)
        for start in range(0, num_sinks, TILE_TOKENS):
            attend_new(p, item, scratch, start, min(num_sinks - start, TILE_TOKENS))
        for start in range(num_sinks, num_seen, TILE_TOKENS):
            attend_new(p, item, scratch, start, min(num_seen - start, TILE_TOKENS))
    if is_last_part and load_long(item, Item.FIRST_ROW) == 0 and load_long(p, Field.APPENDS):
        append_tokens(p, item)
    finish_rows(p, item, scratch)
    if load_long(item, Item.PARTIAL) >= 0:
        counter = load_long(p, Field.COUNTERS) + 8 * load_long(item, Item.COUNTER)
        if fetch_add(counter) == load_long(item, Item.NUM_PARTS) - 1:
            merge_parts(p, item, scratch)


@native
def run_items(p: int) -> None:
    """Work off items until none is left."""
    counters = load_long(p, Field.COUNTERS)
    thread = fetch_add(counters + 8)
    scratch = load_long(p, Field.SCRATCH) + 4 * SCRATCH_FLOATS * thread
    items, num_items = load_long(p, Field.ITEMS), load_long(p, Field.NUM_ITEMS)
    index = fetch_add(counters)
    while index < num_items:
        # The next item is drawn before this one runs, so that its first keys can be fetched ahead.
        following = fetch_add(counters)
        next_item = items + 8 * Item.COUNT * min(following, num_items - 1)
        store_long(scratch + 4 * NEXT_ITEM, 0, next_item)
        run_item(p, items + 8 * Item.COUNT * index, scratch)
        index = following


@cache
def attention_worker() -> int:
    """The address of the worker, compiled when first asked for and kept on disk."""
    return int(worker(run_items_of).address)


def run_items_of(parameters: Any) -> None:
    run_items(address_of(parameters))
