"""Triton: attention of many query rows to the sealed body of their context.

Queries are the left operand of both products here, and codes become numbers on the way to the right
one: dozens of queries share that work. Tokens are taken in order, so that a tile lies in one plane
of a block: below 8 bits its bytes are read once for each plane, from the caches. (Planes unpacked
together, as few queries have them, take more registers than there are.) The algebra of values is
that of `triton_sealed`; so are parts, splits and references.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .codes import (
    HEADROOM,
    LOG2_E,
    NO_REFERENCE,
    cap_scores,
    codes_of_plane,
    dot,
    fast_exp2,
    fast_inverse,
    fast_log2,
    load_padded,
    rounded_to,
    signed_codes,
)
from .rows import first_seen, load_queries, read_tile, store_part
from .sealed import LEAST_SCALE, blocks_of_split


@triton.jit
def attend_prefill(
    query,
    query_token_stride,
    query_head_stride,
    key_codes,
    value_codes,
    key_scale,
    key_zero,
    value_scale,
    value_zero,
    tiles,
    query_start_loc,
    context_lens,
    num_sealed,
    block_table,
    table_width,
    windows,
    partial_outputs,
    partial_sums,
    scale,
    softcap,
    sliding_window,
    attention_chunk,
    BITS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_COLUMNS: tl.constexpr,
    VALUE_COLUMNS: tl.constexpr,
    KEY_STRIDES: tl.constexpr,
    VALUE_STRIDES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    OPEN_BLOCK_SIZE: tl.constexpr,
    NUM_KEY_GROUPS: tl.constexpr,
    NUM_HEAD_TOKENS: tl.constexpr,
    RECORD_BYTES: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    MIN_SPLIT_BLOCKS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HIDES_CONTEXT: tl.constexpr,
    HAS_WINDOWS: tl.constexpr,
):
    """One tile of query rows, one kv head, one split of the body: grid (tiles, heads, splits).

    TILE tokens are taken at once, which lie in one plane and one key group.
    """
    tile, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sequence, token, num_new, context_len, first_row = read_tile(
        tile, tiles, query_start_loc, context_lens
    )
    rows = first_row + tl.arange(0, ROWS)
    part = (tile.to(tl.int64) * NUM_HEADS + head) * NUM_PARTS + NUM_PARTS - NUM_SPLITS + split
    first = first_seen(
        context_len + rows // GROUP_SIZE, sequence, windows, sliding_window, attention_chunk,
        HAS_WINDOWS,
    )  # fmt: skip
    start_block, end_block = blocks_of_split(
        tl.load(num_sealed + sequence).to(tl.int32), split, first, BLOCK_SIZE, NUM_HEAD_TOKENS,
        NUM_SPLITS, MIN_SPLIT_BLOCKS, HIDES_CONTEXT,
    )  # fmt: skip

    TILES: tl.constexpr = BLOCK_SIZE // TILE  # of a block
    ROWS_OF_CODES: tl.constexpr = BLOCK_SIZE * BITS // 8
    IS_KEY_PADDED: tl.constexpr = KEY_DIM != KEY_COLUMNS
    IS_VALUE_PADDED: tl.constexpr = VALUE_DIM != VALUE_COLUMNS
    channel = tl.arange(0, KEY_COLUMNS)
    value_channel = tl.arange(0, VALUE_COLUMNS)
    row = tl.arange(0, TILE)
    queries = load_queries(
        query, token, query_token_stride, query_head_stride, head, rows,
        num_new * GROUP_SIZE, channel, GROUP_SIZE, KEY_DIM, tl.float16, TRANSPOSED=1,
    )  # fmt: skip
    key_offsets = row[None, :] * KEY_STRIDES[0] + channel[:, None] * KEY_STRIDES[1]
    value_offsets = row[:, None] * VALUE_STRIDES[0] + value_channel[None, :] * VALUE_STRIDES[1]

    reference = tl.full([ROWS], NO_REFERENCE, tl.float32)
    none = tl.zeros([ROWS, TILE], tl.float32)
    totals = tl.zeros([ROWS], tl.float32)
    zero_part = tl.zeros([ROWS], tl.float32)
    output = tl.zeros([ROWS, VALUE_COLUMNS], tl.float32)
    factor = scale if HAS_SOFTCAP else scale * LOG2_E
    # A sealed block stands in the first of the places that its tokens would have in open blocks.
    PLACES: tl.constexpr = BLOCK_SIZE // OPEN_BLOCK_SIZE
    table = block_table + sequence * table_width + NUM_HEAD_TOKENS // OPEN_BLOCK_SIZE
    start, end = start_block * TILES, end_block * TILES
    # The next block is looked up one turn ahead: what waits for another load is not pipelined.
    following = tl.load(table + start_block * PLACES, mask=start < end, other=0)
    for index in range(start, end):
        record = (following * NUM_HEADS + head) * RECORD_BYTES
        following = tl.load(table + tl.minimum(index + 1, end - 1) // TILES * PLACES)
        first_of_tile = index % TILES * TILE  # token of the block
        first_code_row = first_of_tile % ROWS_OF_CODES
        keys = load_padded(
            key_codes + record + first_code_row * KEY_STRIDES[0] + key_offsets,
            channel[:, None] < KEY_DIM, IS_KEY_PADDED,
        )  # fmt: skip
        values = load_padded(
            value_codes + record + first_code_row * VALUE_STRIDES[0] + value_offsets,
            value_channel[None, :] < VALUE_DIM, IS_VALUE_PADDED,
        )  # fmt: skip
        metadata = record // 2
        in_block = first_of_tile + row
        value_scales = tl.load(value_scale + metadata + in_block).to(tl.float32)
        value_scales = tl.maximum(value_scales, LEAST_SCALE)
        inverse_scales = fast_inverse(value_scales)
        if BITS == 8:
            key_scales = tl.load(key_scale + metadata + in_block).to(tl.float32)
            scores = dot(queries, signed_codes(keys), none) * (key_scales * factor)[None, :]
            values = signed_codes(values)
        else:
            shift = first_of_tile // ROWS_OF_CODES * BITS
            at = metadata + first_of_tile * NUM_KEY_GROUPS // BLOCK_SIZE * KEY_DIM + channel
            scales = load_padded(key_scale + at, channel < KEY_DIM, IS_KEY_PADDED)[:, None]
            zeros = load_padded(key_zero + at, channel < KEY_DIM, IS_KEY_PADDED)[:, None]
            codes = codes_of_plane(keys, shift, BITS)
            scales, zeros = (
                tl.broadcast_to(scales, codes.shape),
                tl.broadcast_to(zeros, codes.shape),
            )
            scores = dot(queries, tl.fma(codes, scales, zeros), none) * factor  # rounded once
            values = codes_of_plane(values, shift, BITS)

        exponents = cap_scores(scores, softcap, HAS_SOFTCAP) + fast_log2(value_scales)[None, :]
        if HIDES_CONTEXT:
            position = NUM_HEAD_TOKENS + index // TILES * BLOCK_SIZE + in_block
            is_visible = position[None, :] >= first[:, None]
            exponents = tl.where(is_visible, exponents, float("-inf"))
        new_reference = tl.maximum(reference, tl.max(exponents, 1) - HEADROOM)
        shrink = fast_exp2(reference - new_reference)
        reference = new_reference
        weights = fast_exp2(exponents - reference[:, None])
        totals = totals * shrink + tl.sum(weights * inverse_scales[None, :], 1)
        if BITS < 8:
            zeros = tl.load(value_zero + metadata + in_block).to(tl.float32) * inverse_scales
            zero_part = zero_part * shrink + tl.sum(weights * zeros[None, :], 1)
        output = dot(rounded_to(weights, tl.float16), values, output * shrink[:, None])
    if BITS < 8:
        output += zero_part[:, None]
    store_part(
        partial_outputs, partial_sums, part, output, reference, totals, value_channel, VALUE_DIM,
        ROWS, TRANSPOSED=1,
    )  # fmt: skip
