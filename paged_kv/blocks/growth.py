"""How the blocks of sequences change when they grow. Knows rows of numbers, never the pool.

The sequences given are only those about whose blocks something changes, a small part of a step.
For each the same happens in three passes: count what it needs, place the new ids behind the blocks
that it has, and once the step is done let them take effect. Between the last two passes the
tables read as before, because every count is still the old one.
"""

from __future__ import annotations

import numpy as np

from ..code_cache import compiled
from .geometry import BlockIds, IntArray

# Columns of `counts` [R, 4]: sealed blocks to write, open blocks to add, tail blocks whose tokens
# are sealed, and 1 where the last open block is shared and must be copied before it is written.
NUM_COUNTS = 4


@compiled
def count_blocks(
    seq_ids: IntArray,  # [R]
    after: IntArray,  # [R] tokens once it has grown
    certain: IntArray,  # [R] of these, the first that may be sealed
    lengths: IntArray,  # by seq_id, as all that follow
    num_open: IntArray,
    num_sealed: IntArray,
    open_table: BlockIds,
    ref_counts: BlockIds,  # by block
    block_size: int,
    open_block_size: int,
    num_head_blocks: int,
    min_unsealed: int,
    counts: IntArray,  # [R, 4], written
) -> tuple[int, int, int, int]:
    """What each sequence needs, and the sums of `counts`.

    A shared block that is written counts one user less from here on, so that of the users that all
    write to it in one step the last keeps it.
    """
    per_block = block_size // open_block_size
    sum_sealed = sum_open = sum_leaving = sum_copies = 0
    for row in range(len(seq_ids)):
        seq_id = seq_ids[row]
        held, sealed, length = num_open[seq_id], num_sealed[seq_id], lengths[seq_id]
        new_sealed = 0
        if per_block > 1:
            new_sealed = max((certain[row] - min_unsealed) // block_size - sealed, 0)
        leaving = min(new_sealed * per_block, max(held - num_head_blocks, 0))
        open_end = -(-after[row] // open_block_size)
        counts[row, 0] = new_sealed
        counts[row, 1] = open_end - (sealed + new_sealed) * per_block - held + leaving
        counts[row, 2] = leaving
        counts[row, 3] = 0
        # The last block is written if it has room and is either in the head or in what stays.
        stays = held <= num_head_blocks or held - leaving > num_head_blocks
        if stays and length % open_block_size > 0:
            last = open_table[seq_id, held - 1]
            if ref_counts[last] > 1:
                ref_counts[last] -= 1
                counts[row, 3] = 1
        sum_sealed += counts[row, 0]
        sum_open += counts[row, 1]
        sum_leaving += counts[row, 2]
        sum_copies += counts[row, 3]
    return sum_sealed, sum_open, sum_leaving, sum_copies


@compiled
def place_blocks(
    seq_ids: IntArray,
    counts: IntArray,
    seal_ids: BlockIds,
    open_ids: BlockIds,
    num_open: IntArray,
    num_sealed: IntArray,
    open_table: BlockIds,
    sealed_table: BlockIds,
    num_head_blocks: int,
    freed_ids: BlockIds,  # written: the tail blocks whose tokens are sealed
) -> None:
    """Write new ids behind the blocks of each table, where nobody reads yet."""
    next_seal = next_open = next_freed = 0
    for row in range(len(seq_ids)):
        seq_id = seq_ids[row]
        for index in range(counts[row, 0]):
            sealed_table[seq_id, num_sealed[seq_id] + index] = seal_ids[next_seal]
            next_seal += 1
        for index in range(counts[row, 1]):
            open_table[seq_id, num_open[seq_id] + index] = open_ids[next_open]
            next_open += 1
        for index in range(counts[row, 2]):
            freed_ids[next_freed] = open_table[seq_id, num_head_blocks + index]
            next_freed += 1


@compiled
def take_effect(
    seq_ids: IntArray,
    counts: IntArray,
    after: IntArray,
    copy_ids: BlockIds,
    num_open: IntArray,
    num_sealed: IntArray,
    open_table: BlockIds,
    capacity: IntArray,
    block_size: int,
    open_block_size: int,
    num_head_blocks: int,
    min_unsealed: int,
    max_stored: int,
    unused_ids: BlockIds,  # written: open blocks that tokens would have needed that were dropped
) -> int:
    """Let the placed ids count. Returns how many unused ids there are."""
    next_copy = num_unused = 0
    per_block = block_size // open_block_size
    for row in range(len(seq_ids)):
        seq_id = seq_ids[row]
        if counts[row, 3]:
            open_table[seq_id, num_open[seq_id] - 1] = copy_ids[next_copy]
            next_copy += 1
        leaving = counts[row, 2]
        held = num_open[seq_id] + counts[row, 1] - leaving
        if leaving:
            for column in range(num_head_blocks, held):
                open_table[seq_id, column] = open_table[seq_id, column + leaving]
        sealed = num_sealed[seq_id] + counts[row, 0]
        open_end = -(-after[row] // open_block_size)
        for column in range(open_end - sealed * per_block, held):
            unused_ids[num_unused] = open_table[seq_id, column]
            num_unused += 1
        num_open[seq_id] = open_end - sealed * per_block
        num_sealed[seq_id] = sealed
        limit = min(open_end * open_block_size, max_stored)
        if per_block > 1:
            limit = min(limit, (sealed + 1) * block_size + min_unsealed - 1)
        capacity[seq_id] = limit
    return num_unused


@compiled
def evict_blocks(
    seq_ids: IntArray,  # [R]
    num_sink_tokens: IntArray,  # by seq_id, as all that follow
    window_sizes: IntArray,  # 0: keeps everything
    lengths: IntArray,
    num_open: IntArray,
    num_sealed: IntArray,
    open_table: BlockIds,
    sealed_table: BlockIds,
    num_evicted: IntArray,
    capacity: IntArray,
    block_size: int,
    open_block_size: int,
    num_head_blocks: int,
    evicted_ids: BlockIds,  # written
) -> int:
    """Close each stream's table over the blocks behind its sinks that no later token sees.

    Its length and its capacity are then those of a shorter sequence. Returns how many ids there
    are. With fewer than that of room the rest waits for the next step.
    """
    num_ids = 0
    for row in range(len(seq_ids)):
        seq_id = seq_ids[row]
        if window_sizes[seq_id] == 0:
            continue
        first_seen = lengths[seq_id] - window_sizes[seq_id] + 1  # by the next token
        if block_size > open_block_size:
            count = (first_seen - num_head_blocks * open_block_size) // block_size
            count = max(min(count, num_sealed[seq_id], len(evicted_ids) - num_ids), 0)
            for column in range(count):
                evicted_ids[num_ids + column] = sealed_table[seq_id, column]
            if count:
                for column in range(num_sealed[seq_id] - count):
                    sealed_table[seq_id, column] = sealed_table[seq_id, column + count]
            num_sealed[seq_id] -= count
        else:
            start = num_sink_tokens[seq_id] // open_block_size
            count = first_seen // open_block_size - start
            count = max(min(count, num_open[seq_id] - start, len(evicted_ids) - num_ids), 0)
            for column in range(start, start + count):
                evicted_ids[num_ids + column - start] = open_table[seq_id, column]
            if count:
                for column in range(start, num_open[seq_id] - count):
                    open_table[seq_id, column] = open_table[seq_id, column + count]
            num_open[seq_id] -= count
        num_ids += count
        lengths[seq_id] -= count * block_size
        capacity[seq_id] -= count * block_size
        num_evicted[seq_id] += count * block_size
    return num_ids


@compiled
def find_complete_links(
    seq_ids: IntArray,
    lengths: IntArray,
    num_tokens: IntArray,
    num_sealed: IntArray,
    open_table: BlockIds,
    sealed_table: BlockIds,
    num_published: IntArray,
    link_limits: IntArray,  # links that may ever be found
    block_size: int,
    open_block_size: int,
    num_head_blocks: int,
    links: IntArray,  # [L, 3], written: seq_id, link, block id
) -> int:
    """The links whose tokens are stored and known and which nobody can find yet; how many.

    They count as published from here on. With fewer than L of room the rest waits.
    """
    num_links = 0
    for row in range(len(seq_ids)):
        seq_id = seq_ids[row]
        # Draft tokens that were kept may be stored before they are known.
        complete = min(lengths[seq_id], num_tokens[seq_id]) // open_block_size
        if block_size > open_block_size:
            complete = min(complete, num_head_blocks) + num_sealed[seq_id]
        complete = min(complete, link_limits[seq_id])
        for link in range(num_published[seq_id], complete):
            if num_links == len(links):
                break
            in_body = block_size > open_block_size and link >= num_head_blocks
            links[num_links, 0] = seq_id
            links[num_links, 1] = link
            if in_body:
                links[num_links, 2] = sealed_table[seq_id, link - num_head_blocks]
            else:
                links[num_links, 2] = open_table[seq_id, link]
            num_links += 1
            num_published[seq_id] = link + 1
    return num_links


def new_counts(num_rows: int) -> IntArray:
    return np.empty((num_rows, NUM_COUNTS), dtype=np.int64)
