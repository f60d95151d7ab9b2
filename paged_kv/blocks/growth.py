"""How the blocks of sequences change when they grow. Knows rows of numbers, never the pool.

The sequences given are only those about whose blocks something changes, a small part of a step.
For each the same happens in three passes: count what it needs, place new open blocks behind those
that it has, and once the step is done let all of it take effect. Between the last two passes a
table reads as before, because nobody reads behind the last stored token.

Many arguments because compiled loops take arrays and numbers faster than records.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np

from ..code_cache import compiled
from .block_tables import BlockTables
from .geometry import (
    BLOCK_SIZE,
    MIN_UNSEALED,
    NO_BLOCKS,
    NUM_HEAD_BLOCKS,
    OPEN_BLOCK_SIZE,
    PER_BLOCK,
    BlockIds,
    IntArray,
)
from .retention import UNLIMITED
from .sequences import Sequences, StateArray
from .step_plan import StepPlan

# Columns of `counts` [R, 4].
SEALED: Final = 0  # sealed blocks to write
OPENED: Final = 1  # open blocks to add
LEAVING: Final = 2  # tail blocks whose tokens are sealed
COPIED: Final = 3  # 1 where the last open block is shared and must be copied before it is written


class Needs(NamedTuple):
    """What R changing sequences need, and the sums over all of them."""

    counts: IntArray  # [R, 4]
    num_sealed: int
    num_opened: int
    num_copied: int

    @property
    def num_new_blocks(self) -> int:
        return self.num_sealed + self.num_opened + self.num_copied


NO_NEEDS: Final = Needs(np.empty((0, 4), dtype=np.int64), 0, 0, 0)


class Growth(NamedTuple):
    """How a step of N sequences changes the blocks of R of them in one group of layers."""

    before: IntArray  # [N] tokens stored
    rows: IntArray  # [R] index among the N
    changed: IntArray  # [R] their seq_ids
    after: IntArray  # [R] tokens stored if all drafts are kept
    needs: Needs


def count_needs(
    seq_ids: IntArray,
    after: IntArray,
    certain: IntArray,
    tables: BlockTables,
    ref_counts: BlockIds,
) -> Needs:
    """What R sequences need to store `after` tokens, of which the first `certain` may be sealed.

    Of the sequences that share an unfinished block all copy it to write to it; but where all of its
    users do so in one step, the last of them keeps it.
    """
    counts, num_sealed, num_opened, num_copied = count_blocks(
        seq_ids,
        after,
        certain,
        tables.num_stored,
        tables.num_sealed,
        tables.ids,
        ref_counts,
        tables.geometry.sizes,
    )
    if num_copied:
        rows = counts[:, COPIED].nonzero()[0]
        shared_ids = tables.last_ids(seq_ids[rows])
        block_ids, from_end, num_writers = np.unique(
            shared_ids[::-1], return_index=True, return_counts=True
        )
        last_writers = len(rows) - 1 - from_end[num_writers == ref_counts[block_ids]]
        counts[rows[last_writers], COPIED] = 0
        num_copied -= len(last_writers)
    return Needs(counts, num_sealed, num_opened, num_copied)


@compiled
def count_blocks(
    seq_ids: IntArray,  # [R]
    after: IntArray,  # [R] tokens once it has grown
    certain: IntArray,  # [R] of these, the first that may be sealed
    lengths: IntArray,  # by seq_id, as the next two
    num_sealed: IntArray,
    table: BlockIds,
    ref_counts: BlockIds,  # by block
    sizes: IntArray,
) -> tuple[IntArray, int, int, int]:
    """`counts` [R, 4] as if nobody else wrote to a shared block, and the sums over its columns."""
    block_size, open_block_size = sizes[BLOCK_SIZE], sizes[OPEN_BLOCK_SIZE]
    per_block, num_head = sizes[PER_BLOCK], sizes[NUM_HEAD_BLOCKS]
    min_unsealed = sizes[MIN_UNSEALED]
    counts = np.empty((len(seq_ids), 4), dtype=np.int64)
    sum_sealed = sum_opened = sum_copied = 0
    for row in range(len(seq_ids)):
        seq_id = seq_ids[row]
        sealed, length = num_sealed[seq_id], lengths[seq_id]
        new_sealed = 0
        if per_block > 1:
            new_sealed = max((certain[row] - min_unsealed) // block_size - sealed, 0)
        end, new_end = -(-length // open_block_size), -(-after[row] // open_block_size)  # places
        body_end = num_head + (sealed + new_sealed) * per_block
        leaving = min(max(end - num_head - sealed * per_block, 0), new_sealed * per_block)
        opened = new_end - end - (new_sealed * per_block - leaving)
        # The last block is written if it has room and is either in the head or in what stays.
        copied = 0
        if (end <= num_head or end > body_end) and length % open_block_size > 0:
            copied = int(ref_counts[table[seq_id, end - 1]] > 1)
        counts[row, 0] = new_sealed
        counts[row, 1] = opened
        counts[row, 2] = leaving
        counts[row, 3] = copied
        sum_sealed += new_sealed
        sum_opened += opened
        sum_copied += copied
    return counts, sum_sealed, sum_opened, sum_copied


@compiled
def place_blocks(
    seq_ids: IntArray,  # [R], as the next three
    before: IntArray,
    num_sealed: IntArray,
    counts: IntArray,
    open_ids: BlockIds,
    table: BlockIds,  # by seq_id, written behind the last stored token of each sequence
    sizes: IntArray,
) -> BlockIds:
    """Give new open blocks their places. Returns the open blocks whose tokens are sealed."""
    open_block_size, per_block = sizes[OPEN_BLOCK_SIZE], sizes[PER_BLOCK]
    num_head = sizes[NUM_HEAD_BLOCKS]
    freed_ids = np.empty(counts[:, 2].sum(), dtype=np.int32)
    next_open = next_freed = 0
    for row in range(len(seq_ids)):
        place = -(-before[row] // open_block_size)  # the first that is free
        body_start = num_head + num_sealed[row] * per_block  # of what is sealed now
        body_end = body_start + counts[row, 0] * per_block
        for _ in range(counts[row, 1]):
            if body_start <= place < body_end:
                place = body_end
            table[seq_ids[row], place] = open_ids[next_open]
            next_open += 1
            place += 1
        for place in range(body_start, body_start + counts[row, 2]):
            freed_ids[next_freed] = table[seq_ids[row], place]
            next_freed += 1
    return freed_ids


def grow(
    seq_ids: IntArray,
    after: IntArray,
    plan: StepPlan,
    sequences: Sequences,
    tables: BlockTables,
    last_open_link: int,
) -> BlockIds:
    """`take_effect` for the R changing sequences of a plan, of which each now stores `after`."""
    if not len(seq_ids):
        return NO_BLOCKS
    return take_effect(
        seq_ids,
        after,
        plan.block_counts,
        plan.new_block_ids,
        tables.num_stored,
        sequences.num_tokens,
        tables.num_sealed,
        tables.capacity,
        tables.state,
        tables.ids,
        tables.geometry.sizes,
        last_open_link,
    )


@compiled
def take_effect(
    seq_ids: IntArray,  # [R]
    after: IntArray,
    counts: IntArray,
    new_ids: BlockIds,  # sealed, then open, then copies
    lengths: IntArray,  # by seq_id, still without the new tokens
    num_tokens: IntArray,  # by seq_id
    num_sealed: IntArray,  # by seq_id; written, as the next two
    capacity: IntArray,
    state: StateArray,
    table: BlockIds,
    sizes: IntArray,
    last_open_link: int,  # open blocks that end after so many tokens or before are links
) -> BlockIds:
    """Put sealed blocks and copies in their places.

    A sequence's new `capacity` is what it can store before its blocks change again, less where a
    step before that completes a link. Returns the open blocks that are not used, because the tokens
    that would have needed them were dropped.
    """
    block_size, open_block_size = sizes[BLOCK_SIZE], sizes[OPEN_BLOCK_SIZE]
    per_block, num_head = sizes[PER_BLOCK], sizes[NUM_HEAD_BLOCKS]
    min_unsealed, num_evicted = sizes[MIN_UNSEALED], state["num_evicted_tokens"]
    unused_ids = np.empty(counts[:, 1].sum(), dtype=np.int32)
    next_sealed = num_unused = 0
    next_copy = len(new_ids) - counts[:, 3].sum()
    for row in range(len(seq_ids)):
        seq_id = seq_ids[row]
        end = -(-lengths[seq_id] // open_block_size)
        if counts[row, 3]:
            table[seq_id, end - 1] = new_ids[next_copy]
            next_copy += 1
        body_end = num_head + num_sealed[seq_id] * per_block
        for _ in range(counts[row, 0]):
            table[seq_id, body_end] = new_ids[next_sealed]
            next_sealed += 1
            body_end += per_block
        planned_end = end + counts[row, 1] - counts[row, 2] + counts[row, 0] * per_block
        new_end = -(-after[row] // open_block_size)
        for place in range(new_end, planned_end):
            unused_ids[num_unused] = table[seq_id, place]
            num_unused += 1
        num_sealed[seq_id] += counts[row, 0]
        room = new_end * open_block_size
        if after[row] < room <= last_open_link:
            room -= 1
        if per_block > 1:
            room = min(room, (num_sealed[seq_id] + 1) * block_size + min_unsealed - 1)
        # Drafts that were kept are stored before they are known: their links come a step later.
        if last_open_link >= 0 and num_tokens[seq_id] < after[row] + num_evicted[seq_id]:
            room = min(room, after[row])
        capacity[seq_id] = room
    return unused_ids[:num_unused]


@compiled
def evict_blocks(
    seq_ids: IntArray,  # [R]
    lengths: IntArray,  # by seq_id; written, as the next four
    capacity: IntArray,
    num_sealed: IntArray,
    state: StateArray,
    table: BlockIds,
    sizes: IntArray,
    rule: IntArray,  # of `Retention.numbers`
    evicted_ids: BlockIds,  # written
) -> int:
    """Close tables over the blocks behind sinks or head that no later token sees.

    Length and capacity are then those of a shorter sequence. Returns how many ids there are. With
    fewer than that of room the rest waits for the next step.
    """
    block_size, open_block_size = sizes[BLOCK_SIZE], sizes[OPEN_BLOCK_SIZE]
    per_block, num_head = sizes[PER_BLOCK], sizes[NUM_HEAD_BLOCKS]
    num_sinks, window_sizes = state["num_sink_tokens"], state["window_size"]
    num_evicted = state["num_evicted_tokens"]
    # Most sequences let nothing go in a step: what says so of them divides nothing.
    least = block_size + (num_head * open_block_size if per_block > 1 else 0)
    num_ids, steps_of_rule, has_chunks = 0, rule[2] // block_size, rule[1] < UNLIMITED
    for seq_id in seq_ids:
        length = lengths[seq_id]
        start = num_head
        if window_sizes[seq_id] > 0:  # its own
            if per_block == 1:
                start = num_sinks[seq_id] // open_block_size
            per_step = 1
            first_seen = length - window_sizes[seq_id] + 1  # by the next token
        else:
            per_step = steps_of_rule
            position = length + num_evicted[seq_id]
            first_seen = position - rule[0] + 1
            if has_chunks:
                first_seen = max(first_seen, position // rule[1] * rule[1])
            first_seen -= num_evicted[seq_id]
        if first_seen < least:
            continue
        end = -(-length // open_block_size)
        evictable = num_sealed[seq_id] if per_block > 1 else end - start
        count = (first_seen - start * open_block_size) // block_size
        count = max(min(count, evictable, len(evicted_ids) - num_ids), 0) // per_step * per_step
        if count == 0:
            continue
        for index in range(count):
            evicted_ids[num_ids + index] = table[seq_id, start + index * per_block]
        num_ids += count
        for place in range(start, end - count * per_block):
            table[seq_id, place] = table[seq_id, place + count * per_block]
        if per_block > 1:
            num_sealed[seq_id] -= count
        lengths[seq_id] -= count * block_size
        capacity[seq_id] -= count * block_size
        num_evicted[seq_id] += count * block_size
    return num_ids


@compiled
def find_complete_links(
    seq_ids: IntArray,  # [R]
    lengths: IntArray,  # by seq_id, as the next four
    num_tokens: IntArray,
    num_sealed: IntArray,
    state: StateArray,  # written: `num_published`
    table: BlockIds,
    sizes: IntArray,
    links: IntArray,  # [L, 3], written: seq_id, link, block id
) -> int:
    """The links whose tokens are stored and known and which nobody can find yet; how many.

    They count as published from here on. With fewer than L of room the rest waits.
    """
    open_block_size, per_block = sizes[OPEN_BLOCK_SIZE], sizes[PER_BLOCK]
    num_head = sizes[NUM_HEAD_BLOCKS]
    num_published, link_limits = state["num_published"], state["link_limit"]
    num_evicted = state["num_evicted_tokens"]
    num_links = 0
    for row in range(len(seq_ids)):
        seq_id = seq_ids[row]
        gone = num_evicted[seq_id] // (open_block_size * per_block)  # links, behind the head
        # Draft tokens that were kept may be stored before they are known.
        known = num_tokens[seq_id] - num_evicted[seq_id]
        complete = min(lengths[seq_id], known) // open_block_size
        if per_block > 1:
            complete = min(complete, num_head) + num_sealed[seq_id]
        complete = min(complete + gone, link_limits[seq_id])
        for link in range(num_published[seq_id], complete):
            if num_links == len(links):
                break
            if num_head <= link < num_head + gone:  # of a sequence that was placed
                num_published[seq_id] = link + 1
                continue
            stored = link if link < num_head else link - gone
            place = stored + max(stored - num_head, 0) * (per_block - 1)
            links[num_links, 0] = seq_id
            links[num_links, 1] = link
            links[num_links, 2] = table[seq_id, place]
            num_links += 1
            num_published[seq_id] = link + 1
    return num_links
