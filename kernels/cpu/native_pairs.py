"""Many query rows of a work item over a tile of tokens, by products of pairs of bfloat16.

Knows addresses and counts, nothing of formats. A tile is laid in pairs once for all rows. Compiled
into the attention worker.
"""

from __future__ import annotations

from typing import Final

from .microkernels import MAX_ROWS
from .native_code import call, load_long, native
from .native_rows import rows_of_tile, set_ranges, soften, state_of_tile
from .pair_kernels import FLOAT_KEY_BYTES, QUERY_BYTES
from .records import (
    CALL,
    CALL_NUMBERS,
    LAYER,
    PAIR,
    PAIR_FLOATS,
    PAIR_KEYS,
    PAIR_PLACE,
    PAIR_QUERIES,
    PAIR_VALUES,
    PAIR_WEIGHTS,
    SCORES,
    STEP,
    Item,
)

MIN_ROWS: Final = 32  # fewer are not worth laying keys and values


@native
def has_pairs(p: int, item: int) -> bool:
    """Whether an item is computed in pairs."""
    return load_long(p, CALL.pair_scratch) != 0 and load_long(item, Item.NUM_ROWS) >= MIN_ROWS


@native
def pairs_of(scratch: int) -> int:
    return load_long(scratch + 4 * PAIR_PLACE, 0)


@native
def pair_queries(p: int, item: int, scratch: int) -> None:
    """The item's queries, not scaled, in the thread's scratch for pairs."""
    dim, query_group_size = load_long(p, LAYER.key_dim), load_long(p, STEP.query_group_size)
    first_token = load_long(load_long(p, STEP.query_start_loc), load_long(item, Item.SEQUENCE))
    first_head = load_long(item, Item.KV_HEAD) * query_group_size
    target, first_row = pairs_of(scratch) + PAIR_QUERIES, load_long(item, Item.FIRST_ROW)
    for row in range(load_long(item, Item.NUM_ROWS)):
        token, query_head = divmod(first_row + row, query_group_size)
        source = load_long(p, CALL.query)
        source += (first_token + token) * load_long(p, CALL.query_token_stride)
        source += (first_head + query_head) * load_long(p, CALL.query_head_stride)
        call(load_long(p, PAIR.queries), (source, target + row * QUERY_BYTES, 1, dim))


@native
def lay_open(p: int, scratch: int, offset: int, keys: int, values: int, num_tokens: int) -> None:
    """Lay tokens of an open block `offset` tokens behind the start of the tile."""
    pairs = pairs_of(scratch)
    call(
        load_long(p, PAIR.open_keys),
        (keys, load_long(p, LAYER.open_key_stride), pairs + PAIR_KEYS + 4 * offset,
         load_long(p, LAYER.key_dim), num_tokens),
    )  # fmt: skip
    target = pairs + PAIR_VALUES + 2 * offset * load_long(p, LAYER.value_dim)
    stride = load_long(p, LAYER.open_value_stride)
    call(load_long(p, PAIR.open_values), (values, stride, target, num_tokens))


@native
def lay_floats(
    p: int, scratch: int, offset: int, keys: tuple[int, int], values: tuple[int, int], count: int
) -> None:
    """Lay `count` tokens whose keys and values are floats, given by address and stride."""
    pairs = pairs_of(scratch)
    call(
        load_long(p, PAIR.new_keys),
        (keys[0], keys[1], pairs + PAIR_KEYS + 4 * offset, load_long(p, LAYER.key_dim), count),
    )
    target = pairs + PAIR_VALUES + 2 * offset * load_long(p, LAYER.value_dim)
    call(load_long(p, PAIR.new_values), (values[0], values[1], target, count))


@native
def lay_sealed(p: int, item: int, scratch: int, offset: int, record: int) -> None:
    """Lay the sealed block of a record `offset` tokens behind the start of the tile."""
    pairs, num_tokens = pairs_of(scratch), load_long(p, STEP.block_size)
    floats, dim = pairs + PAIR_FLOATS, load_long(p, LAYER.key_dim)
    scale, zero = load_long(p, LAYER.key_scale) + record, load_long(p, LAYER.key_zero) + record
    codes, num_wide = load_long(p, LAYER.key_codes) + record, load_long(p, LAYER.num_wide)
    call(load_long(p, PAIR.float_keys), (codes, scale, zero, floats, dim))
    if num_wide:
        wide_channels = load_long(p, LAYER.wide_channels)
        wide_channels += 8 * load_long(item, Item.KV_HEAD) * num_wide
        codes = load_long(p, LAYER.wide_codes) + record
        call(load_long(p, PAIR.wide_keys), (codes, scale, floats, dim, wide_channels, num_wide))
    target = pairs + PAIR_KEYS + 4 * offset
    call(load_long(p, PAIR.new_keys), (floats, FLOAT_KEY_BYTES, target, dim, num_tokens))
    dim = load_long(p, LAYER.value_dim)
    scale, zero = load_long(p, LAYER.value_scale) + record, load_long(p, LAYER.value_zero) + record
    codes, num_rows = load_long(p, LAYER.value_codes) + record, load_long(p, LAYER.num_value_rows)
    call(load_long(p, PAIR.float_values), (codes, scale, zero, floats, num_rows))
    num_rows = load_long(p, LAYER.num_upper_rows)
    if num_rows:
        codes = load_long(p, LAYER.upper_value_codes) + record
        call(load_long(p, PAIR.upper_values), (codes, scale, zero, floats, num_rows))
    target = pairs + PAIR_VALUES + 2 * offset * dim
    call(load_long(p, PAIR.new_values), (floats, 4 * dim, target, num_tokens))


@native
def attend_pairs(p: int, item: int, scratch: int, position: int, num_tokens: int) -> None:
    """Attend to the tile that is laid, the tokens from `position` on."""
    pairs, dim = pairs_of(scratch), load_long(p, LAYER.key_dim)
    scores, weights = scratch + 4 * SCORES, pairs + PAIR_WEIGHTS
    for tile in range(-(-load_long(item, Item.NUM_ROWS) // MAX_ROWS)):
        if not set_ranges(p, item, scratch, tile, position, num_tokens):
            continue
        _, outputs, _, _ = state_of_tile(scratch, tile)
        queries = pairs + PAIR_QUERIES + tile * MAX_ROWS * QUERY_BYTES
        factor = p + 8 * CALL_NUMBERS + 4
        call(
            load_long(p, PAIR.scores),
            (queries, pairs + PAIR_KEYS, scores, dim // 2, num_tokens, factor),
        )
        soften(p, load_long(p, LAYER.softmax), item, scratch, tile, num_tokens, 0, 0)
        call(load_long(p, PAIR.weights), (scores, weights, rows_of_tile(item, tile), num_tokens))
        call(
            load_long(p, PAIR.sums),
            (weights, pairs + PAIR_VALUES, outputs, (num_tokens + 1) // 2),
        )
