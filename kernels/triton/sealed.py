"""Triton: attention of few query rows to the sealed body of their context, split over programs.

Knows codes and their metadata, no open blocks and no new tokens.

Codes are the left operand of both products (tokens or channels are rows, queries are columns), so
that few queries waste little and codes go from memory to the product without a detour; for many
queries there is `prefill`. Scales and zero points never touch the codes: keys
`q . (c s + z) = (q s) . c + q . z`, values `sum p (c s + z) = sum (p s) c + sum p z`.

The weights `p s` that codes of values are multiplied with are fp16 numbers. They come from one
exponential, `2 ** (score + log2(s) - reference)`, and the softmax is kept relative to their
greatest: however large or small values are, what counts keeps its precision.

Long because a kernel is one loop, and what it keeps in registers has to stay in sight.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .body import begin_body, load_block_id
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
from .rows import load_queries, store_part

LEAST_SCALE = tl.constexpr(2.0**-24)  # the least fp16 number; codes of a scale of 0 are all 0


@triton.jit
def attend_sealed(
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

    TILE rows of codes are taken at once; BLOCK_SIZE * BITS / 8 of them make a block.
    """
    ROWS: tl.constexpr = SPLIT.ROWS
    TILE: tl.constexpr = SPLIT.TILE
    VALUE_COLUMNS: tl.constexpr = SHAPE.VALUE_COLUMNS
    kv_head, token, num_rows, rows, first, part, table, start_block, end_block = begin_body(
        step, rules, SHAPE, LAYOUT, SPLIT
    )

    PLANES: tl.constexpr = 8 // LAYOUT.BITS
    ROWS_OF_CODES: tl.constexpr = LAYOUT.BLOCK_SIZE // PLANES
    TILES: tl.constexpr = ROWS_OF_CODES // TILE  # of a block
    IS_KEY_PADDED: tl.constexpr = SHAPE.KEY_DIM != SHAPE.KEY_COLUMNS
    IS_VALUE_PADDED: tl.constexpr = SHAPE.VALUE_DIM != VALUE_COLUMNS
    channel = tl.arange(0, SHAPE.KEY_COLUMNS)
    value_channel = tl.arange(0, VALUE_COLUMNS)
    row = tl.arange(0, TILE)
    queries = load_queries(query, token, kv_head, rows, num_rows, SHAPE, tl.float16, TRANSPOSED=0)
    key_offsets = row[:, None] * LAYOUT.KEY_STRIDES[0] + channel[None, :] * LAYOUT.KEY_STRIDES[1]
    value_offsets = (
        row[None, :] * LAYOUT.VALUE_STRIDES[0] + value_channel[:, None] * LAYOUT.VALUE_STRIDES[1]
    )

    reference = tl.full([ROWS], NO_REFERENCE, tl.float32)
    totals = tl.zeros([TILE, ROWS], tl.float32)
    zero_part = tl.zeros([TILE, ROWS], tl.float32)
    output = tl.zeros([VALUE_COLUMNS, ROWS], tl.float32)
    none = tl.zeros([TILE, ROWS], tl.float32)
    factor = rules.scale if SPLIT.HAS_SOFTCAP else rules.scale * LOG2_E
    start, end = start_block * TILES, end_block * TILES
    # The next block is looked up one turn ahead: what waits for another load is not pipelined.
    following = load_block_id(table, start_block, start < end, LAYOUT)
    for index in range(start, end):
        record = (following * SHAPE.NUM_KV_HEADS + kv_head) * LAYOUT.RECORD_SIZE
        following = load_block_id(table, tl.minimum(index + 1, end - 1) // TILES, None, LAYOUT)
        first_code_row = index % TILES * TILE
        keys = load_padded(
            sections.key_codes + record + first_code_row * LAYOUT.KEY_STRIDES[0] + key_offsets,
            channel[None, :] < SHAPE.KEY_DIM, IS_KEY_PADDED,
        )  # fmt: skip
        values = load_padded(
            sections.value_codes + record + first_code_row * LAYOUT.VALUE_STRIDES[0]
            + value_offsets,
            value_channel[:, None] < SHAPE.VALUE_DIM, IS_VALUE_PADDED,
        )  # fmt: skip
        metadata = record // 2
        if LAYOUT.BITS == 8:
            key_scales = tl.load(sections.key_scale + metadata + first_code_row + row).to(
                tl.float32
            )
            scores = (dot(signed_codes(keys), queries, none) * (key_scales * factor)[:, None],)
        else:
            scales = sections.key_scale + metadata, sections.key_zero + metadata
            scores = score_planes(
                keys, queries, scales, factor, index % TILES, SHAPE, LAYOUT, TILES
            )

        # Exponents of the weights, and the factors that make sums of p and p * z of them.
        highest = reference + HEADROOM
        exponents = ()
        inverse_scales = ()
        for plane in tl.static_range(PLANES):
            plane_row = plane * ROWS_OF_CODES + first_code_row + row
            value_scales = tl.load(sections.value_scale + metadata + plane_row).to(tl.float32)
            value_scales = tl.maximum(value_scales, LEAST_SCALE)
            plane_scores = cap_scores(scores[plane], rules.softcap, SPLIT.HAS_SOFTCAP)
            plane_exponents = plane_scores + fast_log2(value_scales)[:, None]
            if SPLIT.HIDES_CONTEXT:
                position = LAYOUT.NUM_HEAD_TOKENS + index // TILES * LAYOUT.BLOCK_SIZE + plane_row
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
        planes = planes_of_codes(values, LAYOUT.BITS)
        for plane in tl.static_range(PLANES):
            weights = fast_exp2(exponents[plane] - reference[None, :])
            totals += weights * inverse_scales[plane][:, None]
            if LAYOUT.BITS < 8:
                plane_row = plane * ROWS_OF_CODES + first_code_row + row
                zeros = tl.load(sections.value_zero + metadata + plane_row).to(tl.float32)
                zero_part += weights * (inverse_scales[plane] * zeros)[:, None]
            # The codes of a plane are 2 ** (plane * LAYOUT.BITS) times too large.
            if plane > 0:
                weights = weights * (1.0 / (1 << (plane * LAYOUT.BITS)))
            output = dot(planes[plane], rounded_to(weights, tl.float16), output)
    if LAYOUT.BITS < 8:
        output = output * (1.0 / CODE_UNIT) + tl.sum(zero_part, 0)[None, :]
    store_part(parts, part, output, reference, tl.sum(totals, 0), SHAPE, TRANSPOSED=0)


@triton.jit
def score_planes(
    keys,
    queries,
    scales_and_zeros,
    factor,
    tile,
    SHAPE: tl.constexpr,
    LAYOUT: tl.constexpr,
    TILES: tl.constexpr,
):
    """Scores of each plane of a tile of key codes, a tuple; a group has a scale for each channel.

    A group is several planes of a tile, or one, or a plane is several groups of a tile each.
    """
    PLANES: tl.constexpr = 8 // LAYOUT.BITS
    PLANES_OF_GROUP: tl.constexpr = max(PLANES // LAYOUT.NUM_KEY_GROUPS, 1)
    IS_PADDED: tl.constexpr = SHAPE.KEY_DIM != SHAPE.KEY_COLUMNS
    channel = tl.arange(0, SHAPE.KEY_COLUMNS)
    exists = channel < SHAPE.KEY_DIM
    none = tl.zeros([keys.shape[0], queries.shape[1]], tl.float32)
    planes = planes_of_codes(keys, LAYOUT.BITS)
    scores = ()
    for plane in tl.static_range(PLANES):
        if plane % PLANES_OF_GROUP == 0:
            group = (plane * TILES + tile) * LAYOUT.NUM_KEY_GROUPS // (PLANES * TILES)
            at = group * SHAPE.KEY_DIM + channel
            scales = load_padded(scales_and_zeros[0] + at, exists, IS_PADDED)
            zeros = load_padded(scales_and_zeros[1] + at, exists, IS_PADDED)
            scaled = queries * scales[:, None]
            # The same sum for every token: a product is the cheapest way to have it in all rows.
            zeros = tl.broadcast_to(zeros[None, :], keys.shape)
            zero_scores = dot(zeros, queries, none) * factor
        unit = factor * (1.0 / CODE_UNIT / (1 << (plane * LAYOUT.BITS)))
        scores = scores + (dot(planes[plane], scaled, none) * unit + zero_scores,)
    return scores
