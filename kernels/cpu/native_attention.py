"""The attention worker of the CPU: walks over work items, tables and blocks, calls microkernels.

Knows addresses and counts, nothing of formats. One native function runs on every thread; the
threads draw items from a common counter. It is compiled once for all formats and shapes: what
depends on them is in the microkernels, whose addresses it is given.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from .microkernels import MAX_ROWS, ROW_STRIDE, TILE_TOKENS
from .native_code import (
    address_of,
    call,
    fetch_add,
    load_long,
    native,
    store_long,
    worker,
)
from .native_pairs import (
    attend_pairs,
    has_pairs,
    lay_floats,
    lay_open,
    lay_sealed,
    pair_queries,
)
from .native_rows import (
    finish_rows,
    kernel_for,
    load_queries,
    merge_parts,
    num_sinks_of,
    rows_of_tile,
    set_ranges,
    soften,
    start_rows,
    start_with_new_token,
    state_of_tile,
)
from .records import (
    CALL,
    FOLDED,
    LAYER,
    NEW_TOKEN_ROWS,
    NEXT_ITEM,
    NUM_TOKEN_SECTIONS,
    PAIR_BYTES,
    PAIR_PLACE,
    SCORES,
    SCRATCH_FLOATS,
    STEP,
    TOKEN_SCALES,
    ZERO_DOTS,
    Item,
    Kernel,
)


@native
def table_of(p: int, item: int) -> int:
    """The row of the item's sequence in the block table."""
    row = load_long(p, STEP.table_width) * load_long(item, Item.SEQUENCE)
    return load_long(p, STEP.block_table) + 8 * row


@native
def ahead_of(p: int, item: int, scratch: int, position: int, wants_values: bool) -> int:
    """Where the keys or values of a context token lie; beyond the item's end, in the next item."""
    if position >= load_long(item, Item.END):
        position -= load_long(item, Item.END)
        item = load_long(scratch + 4 * NEXT_ITEM, 0)
        position += load_long(item, Item.START)
    sequence = load_long(item, Item.SEQUENCE)
    in_record = load_long(item, Item.KV_HEAD) * load_long(p, LAYER.kv_head_stride)
    num_head_tokens, size = load_long(p, STEP.num_head_tokens), load_long(p, STEP.block_size)
    num_body_tokens = load_long(load_long(p, STEP.num_sealed), sequence) * size
    if num_head_tokens <= position < num_head_tokens + num_body_tokens:
        position -= (position - num_head_tokens) % size  # where its block stands in the table
        address = load_long(p, LAYER.value_codes if wants_values else LAYER.key_codes)
    else:
        address = load_long(p, LAYER.open_values if wants_values else LAYER.open_keys)
    width = load_long(p, STEP.table_width)
    index = min(position // load_long(p, STEP.open_block_size), width - 1)
    block = load_long(table_of(p, item), index)
    return address + block * load_long(p, LAYER.block_stride) + in_record


@native
def fetch_tail(p: int, item: int, scratch: int, position: int, wants_values: bool) -> None:
    """Fetch a tile of open blocks that follows a sealed one, but for its first block.

    A microkernel fetches ahead at one address, and they lie at many.
    """
    size, end = load_long(p, STEP.open_block_size), load_long(item, Item.END)
    num_bytes = load_long(p, LAYER.open_key_stride) * load_long(p, LAYER.key_dim)
    if wants_values:
        num_bytes = load_long(p, LAYER.open_value_stride) * size
    for ahead in range(position + size, min(end, position + TILE_TOKENS), size):
        address = ahead_of(p, item, scratch, ahead, wants_values)
        call(load_long(p, LAYER.prefetch), (address, num_bytes))


@native
def attend_open(p: int, item: int, scratch: int, position: int, num_tokens: int) -> None:
    """Attend to `num_tokens` tokens of open blocks, which follow each other in the table."""
    size, piece = load_long(p, STEP.open_block_size), load_long(p, LAYER.open_piece)
    table = table_of(p, item)
    block_stride = load_long(p, LAYER.block_stride)
    in_record = load_long(item, Item.KV_HEAD) * load_long(p, LAYER.kv_head_stride)
    keys, values = (
        load_long(p, LAYER.open_keys) + in_record,
        load_long(p, LAYER.open_values) + in_record,
    )
    key_stride = load_long(p, LAYER.open_key_stride)
    value_stride = load_long(p, LAYER.open_value_stride)
    key_dim = load_long(p, LAYER.key_dim)
    num_pieces = -(-num_tokens // piece)
    if has_pairs(p, item):
        for index in range(num_pieces):
            block, offset = divmod(position + index * piece, size)
            record = load_long(table, block) * block_stride
            at_key = keys + record + offset * (key_stride // size)
            at_value = values + record + offset * value_stride
            num_laid = min(num_tokens - index * piece, piece)
            lay_open(p, scratch, index * piece, at_key, at_value, num_laid)
        attend_pairs(p, item, scratch, position, num_tokens)
        return
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
        soften(p, load_long(p, LAYER.softmax), item, scratch, tile, num_tokens, 0, 0)
        add = kernel_for(p, Kernel.VALUE_OPEN, rows)
        for index in range(num_pieces):
            block, offset = divmod(position + index * piece, size)
            at_value = values + load_long(table, block) * block_stride + offset * value_stride
            weights = scratch + 4 * (SCORES + index * piece)
            count = min(num_tokens - index * piece, piece)
            ahead = ahead_of(p, item, scratch, position + num_tokens + index * piece, True)
            call(add, (at_value, weights, outputs, count, 0, value_stride, ahead))


@native
def sealed_record(p: int, item: int, position: int) -> int:
    """Where in every section the record of the sealed block of a context token lies."""
    block = load_long(table_of(p, item), position // load_long(p, STEP.open_block_size))
    in_record = load_long(item, Item.KV_HEAD) * load_long(p, LAYER.kv_head_stride)
    return block * load_long(p, LAYER.block_stride) + in_record


@native
def score_sealed(
    p: int, item: int, scratch: int, tile: int, record: int, index: int, keys_ahead: int
) -> None:
    """Score the block of a record, the `index`th of those that are softened together."""
    queries, _, _, _ = state_of_tile(scratch, tile)
    rows, key_dim = rows_of_tile(item, tile), load_long(p, LAYER.key_dim)
    num_groups, num_wide = load_long(p, LAYER.num_key_groups), load_long(p, LAYER.num_wide)
    if num_groups:
        first = index * num_groups * MAX_ROWS
        folded, dots = scratch + 4 * (FOLDED + first * ROW_STRIDE), scratch + 4 * ZERO_DOTS
        scale, zero = load_long(p, LAYER.key_scale), load_long(p, LAYER.key_zero)
        call(
            load_long(p, LAYER.fold),
            (queries, rows, key_dim, num_groups, scale + record, zero + record, folded,
             dots + 4 * first),
        )  # fmt: skip
        queries = folded
        if num_wide:
            wide_channels = load_long(p, LAYER.wide_channels)
            wide_channels += 8 * load_long(item, Item.KV_HEAD) * num_wide
            call(
                load_long(p, LAYER.widen),
                (folded, rows, key_dim, num_groups, wide_channels, num_wide),
            )
    codes, scores = load_long(p, LAYER.key_codes), scratch + 4 * SCORES
    scores += 4 * index * load_long(p, STEP.block_size)
    num_rows, group_shift = load_long(p, LAYER.num_key_rows), load_long(p, LAYER.key_group_shift)
    call(
        kernel_for(p, Kernel.SCORE_SEALED, rows),
        (codes + record, queries, scores, key_dim, num_rows, group_shift, keys_ahead),
    )
    if num_wide:
        wide_codes, num_rows = load_long(p, LAYER.wide_codes), load_long(p, LAYER.num_wide_rows)
        call(
            kernel_for(p, Kernel.SCORE_WIDE, rows),
            (wide_codes + record, queries + 4 * key_dim, scores, num_wide, num_rows, group_shift,
             keys_ahead + wide_codes - codes),
        )  # fmt: skip


@native
def gather_scales(p: int, scratch: int, record: int, index: int) -> None:
    """Lay what a block has for each token behind that of the blocks softened with it."""
    num_tokens = load_long(p, STEP.block_size)
    for section in range(NUM_TOKEN_SECTIONS):
        source = load_long(p, LAYER.key_scale + section)
        if source and section != 1 and not (section == 0 and load_long(p, LAYER.num_key_groups)):
            target = scratch + 4 * TOKEN_SCALES + 2 * (section * TILE_TOKENS + index * num_tokens)
            for word in range(num_tokens // 4):
                store_long(target, word, load_long(source + record, word))


@native
def attend_sealed(p: int, item: int, scratch: int, position: int, num_blocks: int) -> None:
    """Attend to sealed blocks, those of the tokens from `position` on; a tile of tokens at most."""
    num_tokens = load_long(p, STEP.block_size)
    end = position + num_blocks * num_tokens
    num_sealed = load_long(load_long(p, STEP.num_sealed), load_long(item, Item.SEQUENCE))
    is_last = end == load_long(p, STEP.num_head_tokens) + num_sealed * num_tokens
    metadata = load_long(p, LAYER.metadata) - load_long(p, LAYER.key_codes)
    codes, value_dim = load_long(p, LAYER.value_codes), load_long(p, LAYER.value_dim)
    num_value_rows = load_long(p, LAYER.num_value_rows)
    num_upper_rows = load_long(p, LAYER.num_upper_rows)
    if has_pairs(p, item):
        for index in range(num_blocks):
            record = sealed_record(p, item, position + index * num_tokens)
            lay_sealed(p, item, scratch, index * num_tokens, record)
        attend_pairs(p, item, scratch, position, end - position)
        return
    for tile in range(-(-load_long(item, Item.NUM_ROWS) // MAX_ROWS)):
        if not set_ranges(p, item, scratch, tile, position, end - position):
            continue
        if is_last and tile == 0:
            fetch_tail(p, item, scratch, end, False)
        record = 0
        for index in range(num_blocks):
            start = position + index * num_tokens
            record = sealed_record(p, item, start)
            ahead = ahead_of(p, item, scratch, start + end - position, False)
            # Codes ahead are fetched by microkernels as they go, scales and zero points here.
            fetched = (ahead + metadata, load_long(p, LAYER.metadata_bytes))
            call(load_long(p, LAYER.prefetch), fetched)
            score_sealed(p, item, scratch, tile, record, index, ahead)
            if num_blocks > 1:
                gather_scales(p, scratch, record, index)
        softmax = load_long(p, LAYER.softmax_sealed)
        if num_blocks > 1:
            scales = scratch + 4 * TOKEN_SCALES
            soften(p, softmax, item, scratch, tile, end - position, scales, 2 * TILE_TOKENS)
        else:
            soften(p, softmax, item, scratch, tile, end - position, record, 0)
        if is_last and tile == 0:
            fetch_tail(p, item, scratch, end, True)
        _, outputs, _, _ = state_of_tile(scratch, tile)
        rows = rows_of_tile(item, tile)
        for index in range(num_blocks):
            start = position + index * num_tokens
            ahead = ahead_of(p, item, scratch, start + end - position, True)
            record = sealed_record(p, item, start)
            weights = scratch + 4 * (SCORES + index * num_tokens)
            call(
                kernel_for(p, Kernel.VALUE_SEALED, rows),
                (codes + record, weights, outputs, num_value_rows, num_value_rows, value_dim,
                 ahead),
            )  # fmt: skip
            if num_upper_rows:
                upper = load_long(p, LAYER.upper_value_codes)
                call(
                    kernel_for(p, Kernel.VALUE_UPPER, rows),
                    (upper + record, weights, outputs, num_upper_rows, num_upper_rows, value_dim,
                     ahead + upper - codes),
                )  # fmt: skip


@native
def attend_new(p: int, item: int, scratch: int, start: int, num_tokens: int) -> None:
    """Attend to some of the sequence's own new tokens, from `start` among them on."""
    sequence, kv_head = load_long(item, Item.SEQUENCE), load_long(item, Item.KV_HEAD)
    token = load_long(load_long(p, STEP.query_start_loc), sequence) + start
    position = load_long(load_long(p, STEP.context_lens), sequence) + start
    key_dim, padded = load_long(p, LAYER.key_dim), load_long(p, CALL.padded_tokens)
    keys = load_long(p, CALL.channel_major_keys) + 4 * (kv_head * key_dim * padded + token)
    value_stride = load_long(p, CALL.value_token_stride)
    values = (
        load_long(p, CALL.value)
        + token * value_stride
        + kv_head * load_long(p, CALL.value_head_stride)
    )
    if has_pairs(p, item):
        lay_floats(p, scratch, 0, (keys, 4 * padded), (values, value_stride), num_tokens)
        attend_pairs(p, item, scratch, position, num_tokens)
        return
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
        soften(p, load_long(p, LAYER.softmax), item, scratch, tile, num_tokens, 0, 0)
        call(
            kernel_for(p, Kernel.VALUE_NEW, rows),
            (values, scratch + 4 * SCORES, outputs, num_tokens, 0, value_stride, values),
        )


@native
def attend_sinks(p: int, item: int, scratch: int, end: int) -> None:
    """Attend to the item's sinks before `end`: tiles of their own, a query of their own.

    They are in open blocks at the very start of the table.
    """
    if load_long(p, CALL.sink_query):
        load_queries(p, item, scratch, p + 8 * CALL.sink_query)
    for position in range(load_long(item, Item.START), end, TILE_TOKENS):
        attend_open(p, item, scratch, position, min(end - position, TILE_TOKENS))
    if load_long(p, CALL.sink_query):
        load_queries(p, item, scratch, p + 8 * CALL.query)


@native
def attend_context(p: int, item: int, scratch: int) -> None:
    """Attend to the item's part of head, body and tail."""
    sequence = load_long(item, Item.SEQUENCE)
    context_len = load_long(load_long(p, STEP.context_lens), sequence)
    num_sealed = load_long(load_long(p, STEP.num_sealed), sequence)
    start, end = load_long(item, Item.START), load_long(item, Item.END)
    head_end = min(load_long(p, STEP.num_head_tokens), context_len)
    block_size = load_long(p, STEP.block_size)
    body_end = head_end + num_sealed * block_size
    sinks_end = min(end, num_sinks_of(p, item))
    if start < sinks_end:
        attend_sinks(p, item, scratch, sinks_end)
        start = sinks_end
    for position in range(start, min(end, head_end), TILE_TOKENS):
        attend_open(p, item, scratch, position, min(head_end - position, TILE_TOKENS))
    if num_sealed:
        # Parts of a context begin and end between blocks.
        sealed_end, tile = min(end, body_end), max(TILE_TOKENS, block_size)
        for position in range(max(start, head_end), sealed_end, tile):
            num_blocks = min(sealed_end - position, tile) // block_size
            attend_sealed(p, item, scratch, position, num_blocks)
    for position in range(max(start, body_end), end, TILE_TOKENS):
        attend_open(p, item, scratch, position, min(end - position, TILE_TOKENS))


@native
def append_tokens(p: int, item: int) -> None:
    """Copy the sequence's new tokens of one kv head into their slots.

    Right behind attention to the tail: a token's key is one element of as many cache lines as
    it has channels, and now they are at hand.
    """
    sequence, kv_head = load_long(item, Item.SEQUENCE), load_long(item, Item.KV_HEAD)
    size, item_bytes = load_long(p, STEP.open_block_size), load_long(p, LAYER.item_bytes)
    key = load_long(p, CALL.key) + kv_head * load_long(p, CALL.key_head_stride)
    value = load_long(p, CALL.value) + kv_head * load_long(p, CALL.value_head_stride)
    key_stride = load_long(p, LAYER.open_key_stride)
    value_stride = load_long(p, LAYER.open_value_stride)
    starts, round_to = load_long(p, STEP.stored_starts), load_long(p, LAYER.round_to_open)
    for index in range(load_long(starts, sequence), load_long(starts, sequence + 1)):
        token = load_long(load_long(p, STEP.stored_tokens), index)
        block, offset = divmod(load_long(load_long(p, STEP.stored_slots), index), size)
        record = block * load_long(p, LAYER.block_stride) + kv_head * load_long(
            p, LAYER.kv_head_stride
        )
        source = key + token * load_long(p, CALL.key_token_stride)
        target = load_long(p, LAYER.open_keys) + record + offset * item_bytes
        call(round_to, (source, 4, target, key_stride, load_long(p, LAYER.key_dim)))
        source = value + token * load_long(p, CALL.value_token_stride)
        target = load_long(p, LAYER.open_values) + record + offset * value_stride
        call(round_to, (source, 4, target, item_bytes, load_long(p, LAYER.value_dim)))


@native
def run_item(p: int, item: int, scratch: int) -> None:
    sequence = load_long(item, Item.SEQUENCE)
    starts = load_long(p, STEP.query_start_loc)
    num_new = load_long(starts, sequence + 1) - load_long(starts, sequence)
    context_len = load_long(load_long(p, STEP.context_lens), sequence)
    is_last_part = load_long(item, Item.END) == context_len
    load_queries(p, item, scratch, p + 8 * CALL.query)
    start_rows(p, item, scratch)
    if has_pairs(p, item):
        pair_queries(p, item, scratch)
    if is_last_part and num_new == 1:
        start_with_new_token(p, item, scratch)
    attend_context(p, item, scratch)
    if is_last_part and num_new > 1:
        last_row = load_long(item, Item.FIRST_ROW) + load_long(item, Item.NUM_ROWS) - 1
        num_seen = last_row // load_long(p, STEP.query_group_size) + 1
        num_sinks = min(max(num_sinks_of(p, item) - context_len, 0), num_seen)
        for start in range(0, num_sinks, TILE_TOKENS):
            attend_new(p, item, scratch, start, min(num_sinks - start, TILE_TOKENS))
        for start in range(num_sinks, num_seen, TILE_TOKENS):
            attend_new(p, item, scratch, start, min(num_seen - start, TILE_TOKENS))
    if is_last_part and load_long(item, Item.FIRST_ROW) == 0 and load_long(p, CALL.appends):
        append_tokens(p, item)
    finish_rows(p, item, scratch)
    if load_long(item, Item.NUM_PARTS) > 1:
        counter = load_long(p, STEP.counters) + 8 * load_long(item, Item.COUNTER)
        if fetch_add(counter) == load_long(item, Item.NUM_PARTS) - 1:
            merge_parts(p, item, scratch)


@native
def run_items(p: int) -> None:
    """Work off items until none is left."""
    counters = load_long(p, STEP.counters)
    thread = fetch_add(counters + 8)
    scratch = load_long(p, CALL.scratch) + 4 * SCRATCH_FLOATS * thread
    store_long(scratch + 4 * PAIR_PLACE, 0, load_long(p, CALL.pair_scratch) + PAIR_BYTES * thread)
    items, num_items = load_long(p, STEP.items), load_long(p, STEP.num_items)
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
