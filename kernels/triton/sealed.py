"""Triton: attention of query rows to the sealed body of their context, split over programs.

Codes are the left operand of both products (tokens or channels are rows, queries are columns), so
that few queries waste little and codes go from memory to the product without a detour; for many
queries there is `triton_chunk`. Scales and zero points never touch the codes: keys
`q . (c s + z) = (q s) . c + q . z`, values `sum p (c s + z) = sum (p s) c + sum p z`.

The weights `p s` that codes of values are multiplied with are fp16 numbers. They come from one
exponential, `2 ** (score + log2(s) - reference)`, and the softmax is kept relative to their
greatest: however large or small values are, what counts keeps its precision.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .codes import (
    CODE_UNIT,
    HEADROOM,
    LOG2_E,
    NO_REFERENCE,
    cap_scores,
    dot,
    fast_exp2,
    fast_inverse,
    fast_log2,
    load_padded,
    planes_of_codes,
    rounded_to,
    signed_codes,
)
from .rows import first_seen, load_queries, read_tile, store_part

LEAST_SCALE = tl.constexpr(2.0**-24)  # the least fp16 number; codes of a scale of 0 are all 0


@triton.jit
def attend_sealed(
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

    TILE rows of codes are taken at once; BLOCK_SIZE * BITS / 8 of them make a block. Strides are
    those of a row and of a channel.
    """
    tile, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sequence, token, num_new, context_len, first_row = read_tile(
        tile, tiles, query_start_loc, context_lens
    )
    rows = first_row + tl.arange(0, ROWS)
    part = (tile.to(tl.int64) * NUM_HEADS + head) * NUM_PARTS + NUM_PARTS - NUM_SPLITS + split
    first = tl.zeros([ROWS], tl.int32)
    if HIDES_CONTEXT:
        first = first_seen(
            context_len + rows // GROUP_SIZE, sequence, windows, sliding_window, attention_chunk,
            HAS_WINDOWS,
        )  # fmt: skip
    start_block, end_block = blocks_of_split(
        tl.load(num_sealed + sequence).to(tl.int32), split, first, BLOCK_SIZE, NUM_HEAD_TOKENS,
        NUM_SPLITS, MIN_SPLIT_BLOCKS, HIDES_CONTEXT,
    )  # fmt: skip

    PLANES: tl.constexpr = 8 // BITS
    ROWS_OF_CODES: tl.constexpr = BLOCK_SIZE // PLANES
    TILES: tl.constexpr = ROWS_OF_CODES // TILE  # of a block
    IS_KEY_PADDED: tl.constexpr = KEY_DIM != KEY_COLUMNS
    IS_VALUE_PADDED: tl.constexpr = VALUE_DIM != VALUE_COLUMNS
    channel = tl.arange(0, KEY_COLUMNS)
    value_channel = tl.arange(0, VALUE_COLUMNS)
    row = tl.arange(0, TILE)
    queries = load_queries(
        query, token, query_token_stride, query_head_stride, head, rows,
        num_new * GROUP_SIZE, channel, GROUP_SIZE, KEY_DIM, tl.float16, TRANSPOSED=0,
    )  # fmt: skip
    key_offsets = row[:, None] * KEY_STRIDES[0] + channel[None, :] * KEY_STRIDES[1]
    value_offsets = row[None, :] * VALUE_STRIDES[0] + value_channel[:, None] * VALUE_STRIDES[1]

    reference = tl.full([ROWS], NO_REFERENCE, tl.float32)
    totals = tl.zeros([TILE, ROWS], tl.float32)
    zero_part = tl.zeros([TILE, ROWS], tl.float32)
    output = tl.zeros([VALUE_COLUMNS, ROWS], tl.float32)
    none = tl.zeros([TILE, ROWS], tl.float32)
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
        first_code_row = index % TILES * TILE
        keys = load_padded(
            key_codes + record + first_code_row * KEY_STRIDES[0] + key_offsets,
            channel[None, :] < KEY_DIM, IS_KEY_PADDED,
        )  # fmt: skip
        values = load_padded(
            value_codes + record + first_code_row * VALUE_STRIDES[0] + value_offsets,
            value_channel[:, None] < VALUE_DIM, IS_VALUE_PADDED,
        )  # fmt: skip
        metadata = record // 2
        if BITS == 8:
            key_scales = tl.load(key_scale + metadata + first_code_row + row).to(tl.float32)
            scores = (dot(signed_codes(keys), queries, none) * (key_scales * factor)[:, None],)
        else:
            scores = score_planes(
                keys, queries, key_scale + metadata, key_zero + metadata, factor, none, channel,
                index % TILES, BITS, KEY_DIM, IS_KEY_PADDED, NUM_KEY_GROUPS, TILES,
            )  # fmt: skip

        # Exponents of the weights, and the factors that make sums of p and p * z of them.
        highest = reference + HEADROOM
        exponents = ()
        inverse_scales = ()
        for plane in tl.static_range(PLANES):
            plane_row = plane * ROWS_OF_CODES + first_code_row + row
            value_scales = tl.load(value_scale + metadata + plane_row).to(tl.float32)
            value_scales = tl.maximum(value_scales, LEAST_SCALE)
            plane_scores = cap_scores(scores[plane], softcap, HAS_SOFTCAP)
            plane_exponents = plane_scores + fast_log2(value_scales)[:, None]
            if HIDES_CONTEXT:
                position = NUM_HEAD_TOKENS + index // TILES * BLOCK_SIZE + plane_row
                is_visible = position[:, None] >= first[None, :]
                plane_exponents = tl.where(is_visible, plane_exponents, float("-inf"))
            highest = tl.maximum(highest, tl.max(plane_exponents, 0))
            exponents = exponents + (plane_exponents,)
            inverse_scales = inverse_scales + (fast_inverse(value_scales),)
        shrink = fast_exp2(reference + HEADROOM - highest)[None, :]
        reference = highest - HEADROOM
        totals = totals * shrink
        zero_part = zero_part * shrink
        output = output * shrink
        planes = planes_of_codes(values, BITS)
        for plane in tl.static_range(PLANES):
            weights = fast_exp2(exponents[plane] - reference[None, :])
            totals += weights * inverse_scales[plane][:, None]
            if BITS < 8:
                plane_row = plane * ROWS_OF_CODES + first_code_row + row
                zeros = tl.load(value_zero + metadata + plane_row).to(tl.float32)
                zero_part += weights * (inverse_scales[plane] * zeros)[:, None]
            # The codes of a plane are 2 ** (plane * BITS) times too large.
            if plane > 0:
                weights = weights * (1.0 / (1 << (plane * BITS)))
            output = dot(planes[plane], rounded_to(weights, tl.float16), output)
    if BITS < 8:
        output = output * (1.0 / CODE_UNIT) + tl.sum(zero_part, 0)[None, :]
    store_part(
        partial_outputs, partial_sums, part, output, reference, tl.sum(totals, 0),
        value_channel, VALUE_DIM, ROWS, TRANSPOSED=0,
    )  # fmt: skip


@triton.jit
def blocks_of_split(
    num_blocks,
    split,
    first,
    BLOCK_SIZE: tl.constexpr,
    NUM_HEAD_TOKENS: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    MIN_SPLIT_BLOCKS: tl.constexpr,
    HIDES_CONTEXT: tl.constexpr,
):
    """The first of a body's blocks that one split attends to, and the first that it does not."""
    first_block = 0
    if HIDES_CONTEXT:
        first_block = tl.maximum(tl.min(first, 0) - NUM_HEAD_TOKENS, 0) // BLOCK_SIZE
        first_block = tl.minimum(first_block, num_blocks)
    share = tl.maximum(tl.cdiv(num_blocks - first_block, NUM_SPLITS), MIN_SPLIT_BLOCKS)
    start_block = tl.minimum(first_block + split * share, num_blocks)
    return start_block, tl.minimum(start_block + share, num_blocks)


@triton.jit
def score_planes(
    keys,
    queries,
    key_scale,
    key_zero,
    factor,
    none,
    channel,
    tile,
    BITS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    IS_PADDED: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    TILES: tl.constexpr,
):
    """Scores of each plane of a tile of key codes, a tuple; a group has a scale for each channel.

    A group is several planes of a tile, or one, or a plane is several groups of a tile each.
    """
    PLANES: tl.constexpr = 8 // BITS
    PLANES_OF_GROUP: tl.constexpr = max(PLANES // NUM_GROUPS, 1)
    planes = planes_of_codes(keys, BITS)
    scores = ()
    for plane in tl.static_range(PLANES):
        if plane % PLANES_OF_GROUP == 0:
            group = (plane * TILES + tile) * NUM_GROUPS // (PLANES * TILES)
            at = group * KEY_DIM + channel
            scales = load_padded(key_scale + at, channel < KEY_DIM, IS_PADDED)
            zeros = load_padded(key_zero + at, channel < KEY_DIM, IS_PADDED)
            scaled = queries * scales[:, None]
            # The same sum for every token: a product is the cheapest way to have it in all rows.
            zeros = tl.broadcast_to(zeros[None, :], keys.shape)
            zero_scores = dot(zeros, queries, none) * factor
        unit = factor * (1.0 / CODE_UNIT / (1 << (plane * BITS)))
        scores = scores + (dot(planes[plane], scaled, none) * unit + zero_scores,)
    return scores
