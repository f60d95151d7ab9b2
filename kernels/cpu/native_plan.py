"""The planning worker of the CPU: cuts a step into work items. Knows lengths, never blocks.

One native function, called twice for a step: to count items, and to write them.
"""

from __future__ import annotations

from functools import cache
from struct import Struct
from typing import Any, Final, NamedTuple

from .microkernels import TILE_TOKENS
from .native_code import address_of, load_long, native, store_long, worker
from .records import ITEM_ROWS, Item

ITEMS_PER_THREAD: Final = 8  # so that threads end at nearly the same time


class PlanFields(NamedTuple):
    """What the worker reads; names of arrays are their addresses."""

    num_seqs: int
    query_start_loc: int  # [N + 1]
    context_lens: int  # [N]
    num_sealed: int  # [N]
    stored_tokens: int  # [num_stored] in the order of the step
    num_stored: int
    block_size: int
    num_head_tokens: int
    num_kv_heads: int
    query_group_size: int
    num_threads: int
    min_split_tokens: int  # a smaller part is not worth merging
    item_rows: int  # query rows of an item at most
    stored_starts: int  # [N + 1] written by the first call, as are the next two
    num_parts: int  # [N] parts that a sequence's context is cut into
    totals: int  # [len(Totals)]
    writes_items: int  # 0 in the first call
    items: int  # [num_items, Item.COUNT] written by the second call


class Totals(NamedTuple):
    num_items: int
    num_partials: int
    num_tokens: int  # that all items attend to


PLAN: Final = PlanFields(*range(len(PlanFields._fields)))
TOTALS: Final = Totals(*range(len(Totals._fields)))
PLAN_STRUCT: Final = Struct(f"={len(PlanFields._fields)}q")


@native
def num_new_of(p: int, sequence: int) -> int:
    starts = load_long(p, PLAN.query_start_loc)
    return load_long(starts, sequence + 1) - load_long(starts, sequence)


@native
def num_rows_of(p: int, sequence: int) -> int:
    """Query rows of a kv head."""
    return num_new_of(p, sequence) * load_long(p, PLAN.query_group_size)


@native
def units_of(p: int, sequence: int) -> tuple[int, int]:
    """Where a context may be cut: tokens of a unit and number of units, behind the head.

    A unit is a sealed block, or a tile in the open blocks of a context without any.
    """
    num_sealed = load_long(load_long(p, PLAN.num_sealed), sequence)
    if num_sealed:
        return load_long(p, PLAN.block_size), num_sealed
    context_len = load_long(load_long(p, PLAN.context_lens), sequence)
    behind_head = max(context_len - load_long(p, PLAN.num_head_tokens), 0)
    return TILE_TOKENS, behind_head // TILE_TOKENS


@native
def split_tokens(p: int) -> int:
    """Tokens of context in a part, so that all threads have work."""
    context_lens, total = load_long(p, PLAN.context_lens), 0
    for sequence in range(load_long(p, PLAN.num_seqs)):
        num_row_tiles = -(-num_rows_of(p, sequence) // load_long(p, PLAN.item_rows))
        total += load_long(context_lens, sequence) * num_row_tiles
    total *= load_long(p, PLAN.num_kv_heads)
    num_wanted = ITEMS_PER_THREAD * load_long(p, PLAN.num_threads)
    return max(load_long(p, PLAN.min_split_tokens), total // num_wanted)


@native
def count_items(p: int) -> None:
    """Parts of each context, and the totals."""
    share = split_tokens(p)
    num_kv_heads = load_long(p, PLAN.num_kv_heads)
    can_split = load_long(p, PLAN.num_threads) > 1
    num_items, num_partials, num_tokens = 0, 0, 0
    for sequence in range(load_long(p, PLAN.num_seqs)):
        context_len = load_long(load_long(p, PLAN.context_lens), sequence)
        num_row_tiles = -(-num_rows_of(p, sequence) // load_long(p, PLAN.item_rows))
        num_parts = 1
        if can_split and num_rows_of(p, sequence) <= ITEM_ROWS:
            _, num_units = units_of(p, sequence)
            num_parts = max(min(-(-context_len // share), num_units), 1)
        store_long(load_long(p, PLAN.num_parts), sequence, num_parts)
        num_rows = num_row_tiles * num_kv_heads
        num_items += num_rows * num_parts
        if num_parts > 1:
            num_partials += num_rows * num_parts
        num_tokens += num_rows * (context_len + num_parts * num_new_of(p, sequence))
    totals = load_long(p, PLAN.totals)
    store_long(totals, TOTALS.num_items, num_items)
    store_long(totals, TOTALS.num_partials, num_partials)
    store_long(totals, TOTALS.num_tokens, num_tokens)


@native
def find_stored_starts(p: int) -> None:
    """Where each sequence's stored tokens begin among all of them."""
    num_stored, num_seqs = load_long(p, PLAN.num_stored), load_long(p, PLAN.num_seqs)
    starts, index = load_long(p, PLAN.stored_starts), 0
    for sequence in range(num_seqs + 1):
        token = load_long(load_long(p, PLAN.query_start_loc), sequence)
        while index < num_stored and load_long(load_long(p, PLAN.stored_tokens), index) < token:
            index += 1
        store_long(starts, sequence, index)


@native
def write_range(p: int, item: int, sequence: int, part: int) -> None:
    """The item's context tokens: the first part has the head too, the last one the rest."""
    num_parts = load_long(load_long(p, PLAN.num_parts), sequence)
    unit_tokens, num_units = units_of(p, sequence)
    num_head_tokens = load_long(p, PLAN.num_head_tokens)
    start, end = 0, load_long(load_long(p, PLAN.context_lens), sequence)
    if part > 0:
        start = num_head_tokens + num_units * part // num_parts * unit_tokens
    if part + 1 < num_parts:
        end = num_head_tokens + num_units * (part + 1) // num_parts * unit_tokens
    store_long(item, Item.START, start)
    store_long(item, Item.END, end)


@native
def write_items(p: int) -> None:
    """By sequence, query rows, kv head, and part of the context."""
    item, num_partials, counter = load_long(p, PLAN.items), 0, 1
    item_rows = load_long(p, PLAN.item_rows)
    for sequence in range(load_long(p, PLAN.num_seqs)):
        num_rows = num_rows_of(p, sequence)
        num_parts = load_long(load_long(p, PLAN.num_parts), sequence)
        is_split = num_parts > 1
        for first_row in range(0, num_rows, item_rows):
            for kv_head in range(load_long(p, PLAN.num_kv_heads)):
                first_partial = num_partials
                if is_split:
                    counter += 1
                for part in range(num_parts):
                    store_long(item, Item.SEQUENCE, sequence)
                    store_long(item, Item.KV_HEAD, kv_head)
                    store_long(item, Item.FIRST_ROW, first_row)
                    store_long(item, Item.NUM_ROWS, min(num_rows - first_row, item_rows))
                    write_range(p, item, sequence, part)
                    store_long(item, Item.PARTIAL, num_partials)
                    store_long(item, Item.NUM_PARTS, num_parts)
                    store_long(item, Item.COUNTER, counter)
                    store_long(item, Item.FIRST_PARTIAL, first_partial)
                    tokens = load_long(item, Item.END) - load_long(item, Item.START) + TILE_TOKENS
                    store_long(item, Item.COST, tokens * load_long(item, Item.NUM_ROWS))
                    if is_split:
                        num_partials += 1
                    item += 8 * Item.COUNT


@cache
def plan_worker() -> int:
    """The address of the worker, compiled when first asked for and kept on disk."""
    return int(worker(plan_step_of).address)


def plan_step_of(parameters: Any) -> None:
    p = address_of(parameters)
    if load_long(p, PLAN.writes_items):
        write_items(p)
    else:
        count_items(p)
        find_stored_starts(p)
