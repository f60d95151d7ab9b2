"""Triton: which query rows a program has, and which sealed blocks. Knows lengths, never contents.

What attention to the body has in common, whether few rows or many attend.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .rows import first_seen, read_tile


@triton.jit
def begin_body(step, rules, SHAPE: tl.constexpr, LAYOUT: tl.constexpr, SPLIT: tl.constexpr):
    """One tile of query rows, one kv head, one split of the body: grid (tiles, kv heads, splits).

    Returns the tile's kv head, first new token and number of query rows; its rows [ROWS] and the
    first position that each sees; which part the program makes; the sequence's body in the block
    table; the first of its blocks that this split attends to, and the first that it does not.
    """
    ROWS: tl.constexpr = SPLIT.ROWS
    tile, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sequence, token, num_new, context_len, first_row = read_tile(tile, step)
    rows = first_row + tl.arange(0, ROWS)
    part = (tile.to(tl.int64) * SHAPE.NUM_KV_HEADS + kv_head) * SPLIT.NUM_PARTS
    part += SPLIT.NUM_PARTS - SPLIT.NUM_SPLITS + split
    first = tl.zeros([ROWS], tl.int32)
    if SPLIT.HIDES_CONTEXT:
        positions = context_len + rows // SHAPE.QUERY_GROUP_SIZE
        first = first_seen(positions, sequence, step, rules, SPLIT.HAS_WINDOWS)
        lowest = context_len + first_row // SHAPE.QUERY_GROUP_SIZE
        lowest = first_seen(lowest, sequence, step, rules, SPLIT.HAS_WINDOWS)
    else:
        lowest = 0
    num_blocks = tl.load(step.num_sealed + sequence).to(tl.int32)
    start_block, end_block = blocks_of_split(num_blocks, split, lowest, LAYOUT, SPLIT)
    table = step.block_table + sequence * step.table_width
    table += LAYOUT.NUM_HEAD_TOKENS // LAYOUT.OPEN_BLOCK_SIZE
    num_rows = num_new * SHAPE.QUERY_GROUP_SIZE
    return kv_head, token, num_rows, rows, first, part, table, start_block, end_block


@triton.jit
def blocks_of_split(num_blocks, split, first, LAYOUT: tl.constexpr, SPLIT: tl.constexpr):
    """The first of a body's blocks that one split attends to, and the first that it does not."""
    first_block = 0
    if SPLIT.HIDES_CONTEXT:
        behind_head = tl.maximum(first - LAYOUT.NUM_HEAD_TOKENS, 0)
        first_block = tl.minimum(behind_head // LAYOUT.BLOCK_SIZE, num_blocks)
    share = tl.maximum(tl.cdiv(num_blocks - first_block, SPLIT.NUM_SPLITS), SPLIT.MIN_SPLIT)
    start_block = tl.minimum(first_block + split * share, num_blocks)
    return start_block, tl.minimum(start_block + share, num_blocks)


@triton.jit
def load_block_id(table, block, exists, LAYOUT: tl.constexpr):
    """A sealed block stands in the first of the places that its tokens have in open blocks.

    Without `exists`, which costs an instruction, it has to.
    """
    PLACES: tl.constexpr = LAYOUT.BLOCK_SIZE // LAYOUT.OPEN_BLOCK_SIZE
    if exists is None:
        return tl.load(table + block * PLACES).to(tl.int32)
    else:
        return tl.load(table + block * PLACES, mask=exists, other=0).to(tl.int32)


@triton.jit
def record_of(block_id, kv_head, SHAPE: tl.constexpr, LAYOUT: tl.constexpr):
    """Where in the arena, which has fewer than 2**31 of them, a block's record of a kv head is."""
    return (block_id * SHAPE.NUM_KV_HEADS + kv_head).to(tl.int64) * LAYOUT.RECORD_SIZE
