"""Query rows of a work item in a thread's scratch: how they start, what they see, how they end.

Knows addresses and counts, nothing of blocks. Compiled into the attention worker.
"""

from __future__ import annotations

import numpy as np

from .microkernels import MASKED, MAX_ROWS, ROW_STRIDE, STATE_LANES
from .native_code import call, load_float, load_long, native, store_float, store_long
from .records import (
    CALL,
    CALL_NUMBERS,
    ITEM_ROWS,
    KERNELS,
    LAYER,
    MAXIMA,
    NUM_VARIANTS,
    NUMBERS,
    OUTPUTS,
    PARTIAL_FLOATS,
    PARTIAL_MAXIMUM,
    PARTIAL_SUM,
    QUERIES,
    RANGES,
    SCORES,
    STEP,
    SUMS,
    ZERO_DOTS,
    Item,
)


@native
def kernel_for(p: int, kind: int, num_rows: int) -> int:
    """The microkernel of a kind that takes so many query rows: 1, 2, 4 or 8."""
    variant = 3
    if num_rows <= 2:
        variant = num_rows - 1
    elif num_rows <= 4:
        variant = 2
    return load_long(p, KERNELS + kind * NUM_VARIANTS + variant)


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
    dim, query_group_size = load_long(p, LAYER.key_dim), load_long(p, STEP.query_group_size)
    first_token = load_long(load_long(p, STEP.query_start_loc), load_long(item, Item.SEQUENCE))
    first_head = load_long(item, Item.KV_HEAD) * query_group_size
    first_row, num_rows = load_long(item, Item.FIRST_ROW), load_long(item, Item.NUM_ROWS)
    affine, numbers = load_long(p, LAYER.affine), p + 8 * CALL_NUMBERS
    query, token_stride = load_long(source, 0), load_long(source, 1)
    head_stride = load_long(source, 2)
    queries, _, _, _ = state_of_tile(scratch, 0)
    for row in range(num_rows):
        token, query_head = divmod(first_row + row, query_group_size)
        address = (
            query + (first_token + token) * token_stride + (first_head + query_head) * head_stride
        )
        call(affine, (address, queries + row * ROW_STRIDE * 4, dim, numbers))


@native
def start_rows(p: int, item: int, scratch: int) -> None:
    """Start with no context at all."""
    dim, value_dim = load_long(p, LAYER.key_dim), load_long(p, LAYER.value_dim)
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
    token = load_long(load_long(p, STEP.query_start_loc), load_long(item, Item.SEQUENCE))
    kv_head = load_long(item, Item.KV_HEAD)
    key = (
        load_long(p, CALL.key)
        + token * load_long(p, CALL.key_token_stride)
        + kv_head * load_long(p, CALL.key_head_stride)
    )
    value = (
        load_long(p, CALL.value)
        + token * load_long(p, CALL.value_token_stride)
        + kv_head * load_long(p, CALL.value_head_stride)
    )
    key_dim, value_dim = load_long(p, LAYER.key_dim), load_long(p, LAYER.value_dim)
    softcap = p + 8 * CALL_NUMBERS + 8
    start = load_long(p, LAYER.start)
    for tile in range(-(-load_long(item, Item.NUM_ROWS) // MAX_ROWS)):
        queries, outputs, maxima, sums = state_of_tile(scratch, tile)
        rows = rows_of_tile(item, tile)
        call(
            start,
            (queries, rows, key, key_dim, value, value_dim, maxima, sums, outputs, softcap),
        )


@native
def num_sinks_of(p: int, item: int) -> int:
    """Tokens that the item's sequence sees whatever its window, if it is windowed."""
    sinks = load_long(p, STEP.num_sink_tokens)
    return load_long(sinks, load_long(item, Item.SEQUENCE)) if sinks else 0


@native
def set_ranges(p: int, item: int, scratch: int, tile: int, position: int, num_tokens: int) -> bool:
    """Which of the tokens from `position` on each row of a tile sees; False if none sees any.

    All of them are sinks or none is, so that what a row sees has no gap; see `ScoreRules.visible`.
    """
    query_group_size = load_long(p, STEP.query_group_size)
    sequence = load_long(item, Item.SEQUENCE)
    context_len = load_long(load_long(p, STEP.context_lens), sequence)
    window, chunk = load_long(p, CALL.sliding_window), load_long(p, CALL.attention_chunk)
    first_row = load_long(item, Item.FIRST_ROW) + tile * MAX_ROWS
    ranges = scratch + 4 * RANGES
    windows = load_long(p, STEP.window_sizes)
    num_sinks = num_sinks_of(p, item)
    own_window = load_long(windows, sequence) if windows else 0
    if position + num_tokens <= context_len and not (windows or window or chunk):
        for row in range(rows_of_tile(item, tile)):  # the usual case, without a division
            store_long(ranges, row, 0)
            store_long(ranges, MAX_ROWS + row, num_tokens)
        return num_tokens > 0
    is_any_visible = False
    for row in range(rows_of_tile(item, tile)):
        query_position = context_len + (first_row + row) // query_group_size
        first, nearest = position, query_position
        if windows:
            if position < num_sinks:  # where queries seem to be, seen from a sink
                nearest = min(query_position, num_sinks + own_window - 1)
            else:
                first = query_position - own_window + 1
        if window:
            first = max(first, nearest - window + 1)
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
    p: int,
    kernel: int,
    item: int,
    scratch: int,
    tile: int,
    num_tokens: int,
    scales: int,
    section_bytes: int,
) -> None:
    """Scores of a tile of tokens to weights.

    What there is for each token lies in a record, of which `scales` is the place, or gathered from
    `scales` on, a section `section_bytes` behind the one before.
    """
    key_scale, value_scale, value_zero = scales, scales, scales
    if section_bytes:
        value_scale += 2 * section_bytes
        value_zero += 3 * section_bytes
    else:
        key_scale += load_long(p, LAYER.key_scale)
        value_scale += load_long(p, LAYER.value_scale)
        value_zero += load_long(p, LAYER.value_zero)
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
            load_long(p, LAYER.value_dim),
            p + 8 * CALL_NUMBERS + 8,
            key_scale,
            value_scale,
            value_zero,
            scratch + 4 * ZERO_DOTS,
            load_long(p, LAYER.key_group_shift),
        ),
    )


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
    query_group_size = load_long(p, STEP.query_group_size)
    token, query_head = divmod(load_long(item, Item.FIRST_ROW) + row, query_group_size)
    token += load_long(load_long(p, STEP.query_start_loc), load_long(item, Item.SEQUENCE))
    query_head += load_long(item, Item.KV_HEAD) * query_group_size
    sinks, factor = load_long(p, CALL.sink_logits), np.float32(1)
    if sinks:
        sink = load_float(sinks, query_head)  # in units of the softmax
        highest = max(top, sink)
        factor = np.float32(2) ** (top - highest)
        total = total * factor + np.float32(2) ** (sink - highest)
    numbers = scratch + 4 * NUMBERS
    store_float(numbers, 0, shift)
    store_float(numbers, 1, factor / total)
    dim = load_long(p, LAYER.value_dim)
    num_heads = load_long(p, CALL.num_query_heads)
    row_bytes = dim * load_long(p, CALL.output_bytes)
    target = load_long(p, CALL.output) + row_bytes * (token * num_heads + query_head)
    call(load_long(p, CALL.write), (source, target, dim, numbers))


@native
def finish_rows(p: int, item: int, scratch: int) -> None:
    """Write an item's rows to the output, or as one part of them."""
    is_whole, partial = load_long(item, Item.NUM_PARTS) == 1, load_long(item, Item.PARTIAL)
    dim = load_long(p, LAYER.value_dim)
    for row in range(load_long(item, Item.NUM_ROWS)):
        tile, row_of_tile = divmod(row, MAX_ROWS)
        _, outputs, maxima, sums = state_of_tile(scratch, tile)
        source = outputs + 4 * row_of_tile * ROW_STRIDE
        top, total = load_float(maxima, row_of_tile), total_of(sums, row_of_tile)
        shift = total_of(sums, MAX_ROWS + row_of_tile)
        if is_whole:
            write_output(p, item, scratch, row, source, shift, top, total)
            continue
        place = partial * ITEM_ROWS + row
        target = load_long(p, STEP.partials) + 4 * place * PARTIAL_FLOATS
        for channel in range(dim):
            store_float(target, channel, load_float(source, channel) + shift)
        store_float(target, PARTIAL_MAXIMUM, top)
        store_float(target, PARTIAL_SUM, total)


@native
def merge_parts(p: int, item: int, scratch: int) -> None:
    """Put the parts of the item's rows together; the thread that ends the last part does it."""
    dim, num_parts = load_long(p, LAYER.value_dim), load_long(item, Item.NUM_PARTS)
    first = load_long(item, Item.FIRST_PARTIAL) * ITEM_ROWS
    merged = scratch + 4 * OUTPUTS
    for row in range(load_long(item, Item.NUM_ROWS)):
        parts = load_long(p, STEP.partials) + 4 * (first + row) * PARTIAL_FLOATS
        part_stride = ITEM_ROWS * PARTIAL_FLOATS
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
