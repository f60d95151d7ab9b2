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

from .body import begin_body, load_block_id
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
from .rows import load_queries, store_part
from .sealed import LEAST_SCALE


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
    ROWS_OF_CODES: tl.constexpr = LAYOUT.BLOCK_SIZE * LAYOUT.BITS // 8
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
        record = (following * SHAPE.NUM_KV_HEADS + kv_head) * LAYOUT.RECORD_SIZE
        following = load_block_id(table, tl.minimum(index + 1, end - 1) // TILES, None, LAYOUT)
        first_of_tile = index % TILES * TILE  # token of the block
        first_code_row = first_of_tile % ROWS_OF_CODES
        keys = load_padded(
            sections.key_codes + record + first_code_row * LAYOUT.KEY_STRIDES[0] + key_offsets,
            channel[:, None] < SHAPE.KEY_DIM, IS_KEY_PADDED,
        )  # fmt: skip
        values = load_padded(
            sections.value_codes + record + first_code_row * LAYOUT.VALUE_STRIDES[0]
            + value_offsets,
            value_channel[None, :] < SHAPE.VALUE_DIM, IS_VALUE_PADDED,
        )  # fmt: skip
        metadata = record // 2
        in_block = first_of_tile + row
        value_scales = tl.load(sections.value_scale + metadata + in_block).to(tl.float32)
        value_scales = tl.maximum(value_scales, LEAST_SCALE)
        inverse_scales = fast_inverse(value_scales)
        if LAYOUT.BITS == 8:
            key_scales = tl.load(sections.key_scale + metadata + in_block).to(tl.float32)
            scores = dot(queries, signed_codes(keys), none) * (key_scales * factor)[None, :]
            values = signed_codes(values)
        else:
            shift = first_of_tile // ROWS_OF_CODES * LAYOUT.BITS
            at = (
                metadata
                + first_of_tile * LAYOUT.NUM_KEY_GROUPS // LAYOUT.BLOCK_SIZE * SHAPE.KEY_DIM
                + channel
            )
            scales = load_padded(sections.key_scale + at, channel < SHAPE.KEY_DIM, IS_KEY_PADDED)[
                :, None
            ]
            zeros = load_padded(sections.key_zero + at, channel < SHAPE.KEY_DIM, IS_KEY_PADDED)[
                :, None
            ]
            codes = codes_of_plane(keys, shift, LAYOUT.BITS)
            scales, zeros = (
                tl.broadcast_to(scales, codes.shape),
                tl.broadcast_to(zeros, codes.shape),
            )
            scores = dot(queries, tl.fma(codes, scales, zeros), none) * factor  # rounded once
            values = codes_of_plane(values, shift, LAYOUT.BITS)

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
        if LAYOUT.BITS < 8:
            zeros = (
                tl.load(sections.value_zero + metadata + in_block).to(tl.float32) * inverse_scales
            )
            zero_part = zero_part * shrink + tl.sum(weights * zeros[None, :], 1)
        output = dot(rounded_to(weights, tl.float16), values, output * shrink[:, None])
    if LAYOUT.BITS < 8:
        output += zero_part[:, None]
    store_part(parts, part, output, reference, totals, SHAPE, TRANSPOSED=1)
