"""Triton: attention of many query rows to the sealed body of their context.

Knows codes and their metadata, no open blocks and no new tokens.

Queries are the left operand of both products here, and codes become numbers on the way to the right
one: dozens of queries share that work. Tokens are taken in order, so that a tile lies in one plane
of a block: below 8 bits its bytes are read once for each plane, from the caches. (Planes unpacked
together, as few queries have them, take more registers than there are.) The algebra of values is
that of `sealed`; so are parts, splits and references.

Long because a kernel is one loop, and what it keeps in registers has to stay in sight.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .body import begin_body, load_block_id, record_of
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
)
from .rows import load_channels, load_queries, store_part
from .sealed import LEAST_SCALE, load_wide_channels


@triton.jit
def attend_prefill(
    query,
    sections,
    step,
    parts,
    rules,
    SHAPE: tl.constexpr,
    LAYOUT: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """One tile of query rows, one kv head, one split of the body; see `begin_body`.

    TILE tokens are taken at once, which lie in one plane and one key group.
    """
    ROWS: tl.constexpr = SPLIT.ROWS
    TILE: tl.constexpr = SPLIT.TILE
    VALUE_COLUMNS: tl.constexpr = SHAPE.VALUE_COLUMNS
    kv_head, token, num_rows, rows, first, part, table, start_block, end_block = begin_body(
        step, rules, SHAPE, LAYOUT, SPLIT
    )

    TILES: tl.constexpr = LAYOUT.BLOCK_SIZE // TILE  # of a block
    ROWS_OF_KEYS: tl.constexpr = LAYOUT.BLOCK_SIZE * LAYOUT.KEY_BITS // 8
    ROWS_OF_WIDE: tl.constexpr = LAYOUT.BLOCK_SIZE * LAYOUT.WIDE_BITS // 8
    ROWS_OF_VALUES: tl.constexpr = LAYOUT.BLOCK_SIZE * LAYOUT.LOWER_VALUE_BITS // 8
    ROWS_OF_UPPER: tl.constexpr = LAYOUT.BLOCK_SIZE // 8
    HAS_VALUE_ZEROS: tl.constexpr = sections.value_zero is not None
    IS_KEY_PADDED: tl.constexpr = SHAPE.KEY_DIM != SHAPE.KEY_COLUMNS
    IS_VALUE_PADDED: tl.constexpr = SHAPE.VALUE_DIM != VALUE_COLUMNS
    channel = tl.arange(0, SHAPE.KEY_COLUMNS)
    value_channel = tl.arange(0, VALUE_COLUMNS)
    row = tl.arange(0, TILE)
    queries = load_queries(query, token, kv_head, rows, num_rows, SHAPE, tl.float16, TRANSPOSED=1)
    key_offsets = row[None, :] * LAYOUT.KEY_STRIDES[0] + channel[:, None] * LAYOUT.KEY_STRIDES[1]
    value_offsets = (
        row[:, None] * LAYOUT.VALUE_STRIDES[0] + value_channel[None, :] * LAYOUT.VALUE_STRIDES[1]
    )
    if LAYOUT.VALUE_BITS == 3:
        upper_offsets = row[:, None] * LAYOUT.UPPER_VALUE_STRIDES[0]
        upper_offsets += value_channel[None, :] * LAYOUT.UPPER_VALUE_STRIDES[1]

    if LAYOUT.NUM_WIDE > 0:
        wide_channel, wide_exists = load_wide_channels(sections, kv_head, LAYOUT)
        where = token, kv_head, rows, num_rows
        wide_queries = load_channels(
            query, where, wide_channel, wide_exists, SHAPE, tl.float16, TRANSPOSED=1
        )
        wide_column = tl.arange(0, LAYOUT.WIDE_COLUMNS)
        wide_offsets = row[None, :] * LAYOUT.WIDE_STRIDES[0]
        wide_offsets += wide_column[:, None] * LAYOUT.WIDE_STRIDES[1]

    reference = tl.full([ROWS], NO_REFERENCE, tl.float32)
    none = tl.zeros([ROWS, TILE], tl.float32)
    totals = tl.zeros([ROWS], tl.float32)
    zero_part = tl.zeros([ROWS], tl.float32)
    output = tl.zeros([ROWS, VALUE_COLUMNS], tl.float32)
    factor = rules.scale if SPLIT.HAS_SOFTCAP else rules.scale * LOG2_E
    start, end = start_block * TILES, end_block * TILES
    # The next block is looked up one turn ahead: what waits for another load is not pipelined.
    following = load_block_id(table, start_block, start < end, LAYOUT)
    for index in range(start, end):
        record = record_of(following, kv_head, SHAPE, LAYOUT)
        following = load_block_id(table, tl.minimum(index + 1, end - 1) // TILES, None, LAYOUT)
        first_of_tile = index % TILES * TILE  # token of the block
        key_row = first_of_tile % ROWS_OF_KEYS
        value_row = first_of_tile % ROWS_OF_VALUES
        keys = load_padded(
            sections.key_codes + record + key_row * LAYOUT.KEY_STRIDES[0] + key_offsets,
            channel[:, None] < SHAPE.KEY_DIM, IS_KEY_PADDED,
        )  # fmt: skip
        metadata = record // 2
        in_block = first_of_tile + row
        shift = first_of_tile // ROWS_OF_KEYS * LAYOUT.KEY_BITS
        codes = codes_of_plane(keys, shift, LAYOUT.KEY_BITS)
        if LAYOUT.NUM_KEY_GROUPS == 0:
            key_scales = tl.load(sections.key_scale + metadata + in_block).to(tl.float32)
            scores = dot(queries, codes, none) * (key_scales * factor)[None, :]
        else:
            group = first_of_tile * LAYOUT.NUM_KEY_GROUPS // LAYOUT.BLOCK_SIZE
            group_scales = sections.key_scale + metadata + group * SHAPE.KEY_DIM
            at = metadata + group * SHAPE.KEY_DIM + channel
            key_exists = channel < SHAPE.KEY_DIM
            scales = load_padded(group_scales + channel, key_exists, IS_KEY_PADDED)[:, None]
            zeros = load_padded(sections.key_zero + at, key_exists, IS_KEY_PADDED)[:, None]
            scales = tl.broadcast_to(scales, codes.shape)
            zeros = tl.broadcast_to(zeros, codes.shape)
            scores = none
            if LAYOUT.KEY_BITS == 8:  # fp16 has no room for 8 bits beside a large zero point
                scores = dot(queries, codes * scales, scores)
                scores = dot(queries, zeros, scores)
            else:
                scores = dot(queries, tl.fma(codes, scales, zeros), scores)  # rounded once
            if LAYOUT.NUM_WIDE > 0:
                upper = sections.wide_codes + record
                upper += first_of_tile % ROWS_OF_WIDE * LAYOUT.WIDE_STRIDES[0]
                upper = tl.load(upper + wide_offsets)
                shift = first_of_tile // ROWS_OF_WIDE * LAYOUT.WIDE_BITS
                upper = codes_of_plane(upper, shift, LAYOUT.WIDE_BITS) * (1 << LAYOUT.KEY_BITS)
                wide_scales = tl.load(group_scales + wide_channel)
                scores = dot(wide_queries, upper * wide_scales[:, None], scores)
            scores = scores * factor
        value_scales = tl.load(sections.value_scale + metadata + in_block).to(tl.float32)
        value_scales = tl.maximum(value_scales, LEAST_SCALE)
        inverse_scales = fast_inverse(value_scales)
        exponents = (
            cap_scores(scores, rules.softcap, SPLIT.HAS_SOFTCAP) + fast_log2(value_scales)[None, :]
        )
        if SPLIT.HIDES_CONTEXT:
            position = LAYOUT.NUM_HEAD_TOKENS + index // TILES * LAYOUT.BLOCK_SIZE + in_block
            is_visible = position[None, :] >= first[:, None]
            exponents = tl.where(is_visible, exponents, float("-inf"))
        new_reference = tl.maximum(reference, tl.max(exponents, 1) - HEADROOM)
        shrink = fast_exp2(reference - new_reference)
        reference = new_reference
        weights = fast_exp2(exponents - reference[:, None])
        totals = totals * shrink + tl.sum(weights * inverse_scales[None, :], 1)
        if HAS_VALUE_ZEROS:
            zeros = (
                tl.load(sections.value_zero + metadata + in_block).to(tl.float32) * inverse_scales
            )
            zero_part = zero_part * shrink + tl.sum(weights * zeros[None, :], 1)
        values = load_padded(
            sections.value_codes + record + value_row * LAYOUT.VALUE_STRIDES[0] + value_offsets,
            value_channel[None, :] < SHAPE.VALUE_DIM, IS_VALUE_PADDED,
        )  # fmt: skip
        shift = first_of_tile // ROWS_OF_VALUES * LAYOUT.LOWER_VALUE_BITS
        values = codes_of_plane(values, shift, LAYOUT.LOWER_VALUE_BITS)
        if LAYOUT.VALUE_BITS == 3:
            upper = sections.upper_value_codes + record
            upper += first_of_tile % ROWS_OF_UPPER * LAYOUT.UPPER_VALUE_STRIDES[0]
            upper = load_padded(
                upper + upper_offsets, value_channel[None, :] < SHAPE.VALUE_DIM, IS_VALUE_PADDED
            )
            values += codes_of_plane(upper, first_of_tile // ROWS_OF_UPPER, 1) * 4
        if LAYOUT.VALUE_BITS < 8 and not HAS_VALUE_ZEROS:
            values = values - 0.5 * ((1 << LAYOUT.VALUE_BITS) - 1)  # codes lie around 0
        output = dot(rounded_to(weights, tl.float16), values, output * shrink[:, None])
    if HAS_VALUE_ZEROS:
        output += zero_part[:, None]
    store_part(parts, part, output, reference, totals, SHAPE, TRANSPOSED=1)
