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

from .body import begin_body, load_block_id, record_of
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
    planes_of_tiles,
    rounded_once,
    rounded_to,
)
from .rows import load_channels, load_queries, store_part

MIDDLE_CODE = tl.constexpr(128.0)  # of 8 bits, which stands for a zero point
SMALL = tl.constexpr(2.0**-6)  # of a query's product with a zero point, fp16 holds 2 ** 22
LEAST_SCALE = tl.constexpr(2.0**-24)  # the least fp16 number; codes of a scale of 0 are all 0


@triton.constexpr_function
def bits_below(plane: int, num_tiles: int, bits: int) -> int:
    """Those of other planes in the bytes of a plane, of tiles with so many bits a code."""
    return plane // num_tiles * bits


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

    TILE rows of each plane are taken at once. All sections of codes have as many planes as the one
    with the fewest bits; of what has more bits, several tiles make them. Third bits of values have
    twice as many: two turns take half of the planes each.
    """
    ROWS: tl.constexpr = SPLIT.ROWS
    TILE: tl.constexpr = SPLIT.TILE
    VALUE_COLUMNS: tl.constexpr = SHAPE.VALUE_COLUMNS
    kv_head, token, num_rows, rows, first, part, table, start_block, end_block = begin_body(
        step, rules, SHAPE, LAYOUT, SPLIT
    )

    PLANES: tl.constexpr = 8 // max(LAYOUT.LEAST_BITS, 2)
    ROWS_OF_PLANE: tl.constexpr = LAYOUT.BLOCK_SIZE // PLANES
    TILES: tl.constexpr = ROWS_OF_PLANE // TILE  # of a block
    KEY_TILES: tl.constexpr = PLANES * LAYOUT.KEY_BITS // 8  # that make as many planes
    WIDE_TILES: tl.constexpr = PLANES * LAYOUT.WIDE_BITS // 8
    VALUE_TILES: tl.constexpr = PLANES * LAYOUT.LOWER_VALUE_BITS // 8
    ROWS_OF_UPPER: tl.constexpr = LAYOUT.BLOCK_SIZE // 8
    IS_KEY_PADDED: tl.constexpr = SHAPE.KEY_DIM != SHAPE.KEY_COLUMNS
    IS_VALUE_PADDED: tl.constexpr = SHAPE.VALUE_DIM != VALUE_COLUMNS
    HAS_VALUE_ZEROS: tl.constexpr = sections.value_zero is not None
    channel = tl.arange(0, SHAPE.KEY_COLUMNS)
    value_channel = tl.arange(0, VALUE_COLUMNS)
    row = tl.arange(0, TILE)
    queries = load_queries(query, token, kv_head, rows, num_rows, SHAPE, tl.float16, TRANSPOSED=0)
    key_offsets = row[:, None] * LAYOUT.KEY_STRIDES[0] + channel[None, :] * LAYOUT.KEY_STRIDES[1]
    key_exists = channel[None, :] < SHAPE.KEY_DIM
    value_offsets = (
        row[None, :] * LAYOUT.VALUE_STRIDES[0] + value_channel[:, None] * LAYOUT.VALUE_STRIDES[1]
    )
    value_exists = value_channel[:, None] < SHAPE.VALUE_DIM
    if LAYOUT.VALUE_BITS == 3:
        upper_offsets = row[None, :] * LAYOUT.UPPER_VALUE_STRIDES[0]
        upper_offsets += value_channel[:, None] * LAYOUT.UPPER_VALUE_STRIDES[1]
    wide = ()
    if LAYOUT.NUM_WIDE > 0:
        wide = load_wide_queries(query, sections, (token, kv_head, rows, num_rows), SHAPE, LAYOUT)
        wide_column = tl.arange(0, LAYOUT.WIDE_COLUMNS)
        wide_offsets = row[:, None] * LAYOUT.WIDE_STRIDES[0]
        wide_offsets += wide_column[None, :] * LAYOUT.WIDE_STRIDES[1]

    highest = tl.full([ROWS], NO_REFERENCE, tl.float32)  # exponent, see HEADROOM
    totals = tl.zeros([TILE, ROWS], tl.float32)
    zero_part = tl.zeros([TILE, ROWS], tl.float32)
    no_output = tl.zeros([VALUE_COLUMNS, ROWS], tl.float32)
    output = no_output
    middle_codes = tl.full([VALUE_COLUMNS, TILE], MIDDLE_CODE * CODE_UNIT, tl.float16)
    factor = rules.scale if SPLIT.HAS_SOFTCAP else rules.scale * LOG2_E
    start, end = start_block * TILES, end_block * TILES
    # The next block is looked up one turn ahead: what waits for another load is not pipelined.
    following = load_block_id(table, start_block, start < end, LAYOUT)
    near = ()
    base = tl.zeros([ROWS], tl.float32)
    # More rows, channels, key groups, third bits or rules leave no registers for it: their zero
    # points are exact, in more moves.
    HAS_RULES: tl.constexpr = SPLIT.HAS_SOFTCAP or SPLIT.HIDES_CONTEXT
    IS_SMALL: tl.constexpr = ROWS == 8 and SHAPE.KEY_COLUMNS <= 128 and LAYOUT.VALUE_BITS != 3
    if LAYOUT.NUM_KEY_GROUPS == 1 and IS_SMALL and not HAS_RULES:
        products = multiply_zeros(queries, sections, following, kv_head, start < end, SHAPE, LAYOUT)
        base = tl.sum(products.to(tl.float32), 0) * (factor / SMALL)
        near = (products,)
    for index in range(start, end):
        record = record_of(following, kv_head, SHAPE, LAYOUT)
        following = load_block_id(table, tl.minimum(index + 1, end - 1) // TILES, None, LAYOUT)
        first_row = index % TILES * TILE  # of every plane
        keys = load_tiles(
            sections.key_codes + record + first_row * LAYOUT.KEY_STRIDES[0] + key_offsets,
            ROWS_OF_PLANE * LAYOUT.KEY_STRIDES[0], KEY_TILES, key_exists, IS_KEY_PADDED,
        )  # fmt: skip
        wide_keys = ()
        if LAYOUT.NUM_WIDE > 0:
            wide_keys = load_tiles(
                sections.wide_codes + record + first_row * LAYOUT.WIDE_STRIDES[0] + wide_offsets,
                ROWS_OF_PLANE * LAYOUT.WIDE_STRIDES[0], WIDE_TILES, None, IS_PADDED=False,
            )  # fmt: skip
        values = load_tiles(
            sections.value_codes + record + first_row * LAYOUT.VALUE_STRIDES[0] + value_offsets,
            ROWS_OF_PLANE * LAYOUT.VALUE_STRIDES[0], VALUE_TILES, value_exists, IS_VALUE_PADDED,
        )  # fmt: skip
        upper_values = None
        if LAYOUT.VALUE_BITS == 3:
            upper_row = first_row % ROWS_OF_UPPER * LAYOUT.UPPER_VALUE_STRIDES[0]
            upper_at = sections.upper_value_codes + record + upper_row + upper_offsets
            upper_values = (
                load_padded(upper_at, value_exists, IS_VALUE_PADDED),
                2 - first_row // ROWS_OF_UPPER,
            )
        metadata = record // 2
        if LAYOUT.NUM_KEY_GROUPS == 0:
            scales = sections.key_scale + metadata + first_row
            scores = score_token_keys(keys, queries, scales, factor, LAYOUT)
        else:
            scales = (sections.key_scale + metadata, sections.key_zero + metadata) + near
            scores = score_planes(
                (keys, wide_keys), queries, wide, scales, factor, index % TILES, SHAPE, LAYOUT
            )

        # Exponents of the weights, and the factors that make sums of p and p * z of them.
        before = highest
        position = LAYOUT.NUM_HEAD_TOKENS + index // TILES * LAYOUT.BLOCK_SIZE + first_row
        first_of_tile = first - position
        exponents = ()
        inverse_scales = ()
        for plane in tl.static_range(PLANES):
            plane_row = plane * ROWS_OF_PLANE + first_row + row
            value_scales = tl.load(sections.value_scale + metadata + plane_row).to(tl.float32)
            value_scales = tl.maximum(value_scales, LEAST_SCALE)
            plane_scores = cap_scores(scores[plane], rules.softcap, SPLIT.HAS_SOFTCAP)
            plane_exponents = plane_scores + fast_log2(value_scales)[:, None]
            if SPLIT.HIDES_CONTEXT:
                is_visible = row[:, None] >= first_of_tile[None, :] - plane * ROWS_OF_PLANE
                plane_exponents = tl.where(is_visible, plane_exponents, float("-inf"))
            highest = tl.maximum(highest, tl.max(plane_exponents, 0))
            exponents = exponents + (plane_exponents,)
            inverse_scales = inverse_scales + (fast_inverse(value_scales),)
        shrink = fast_exp2(before - highest)[None, :]
        reference = highest - HEADROOM
        totals = totals * shrink
        zero_part = zero_part * shrink
        output = output * shrink
        planes = planes_of_tiles(values, upper_values, LAYOUT.LOWER_VALUE_BITS)
        for plane in tl.static_range(PLANES):
            weights = fast_exp2(exponents[plane] - reference[None, :])
            totals += weights * inverse_scales[plane][:, None]
            if HAS_VALUE_ZEROS:
                plane_row = plane * ROWS_OF_PLANE + first_row + row
                zeros = tl.load(sections.value_zero + metadata + plane_row).to(tl.float32)
                zero_part += weights * (inverse_scales[plane] * zeros)[:, None]
            elif LAYOUT.VALUE_BITS < 8:
                zero_part += weights
            # The codes of a plane are 2 ** (bits below it) times too large.
            if plane >= VALUE_TILES:
                below = bits_below(plane, VALUE_TILES, LAYOUT.LOWER_VALUE_BITS)
                weights = weights * (1.0 / (1 << below))
            weights = rounded_to(weights, tl.float16)
            if LAYOUT.VALUE_BITS == 8:  # tile by tile: in long sums, 128 would leave few digits
                output = output - dot(middle_codes, weights, no_output)
            output = dot(planes[plane], weights, output)
    output = output * (1.0 / CODE_UNIT)
    if LAYOUT.VALUE_BITS < 8:
        zeros = tl.sum(zero_part, 0)
        if not HAS_VALUE_ZEROS:  # codes lie around 0
            zeros = zeros * (-0.5 * ((1 << LAYOUT.VALUE_BITS) - 1))
        output += zeros[None, :]
    reference = highest - HEADROOM + base
    store_part(parts, part, output, reference, tl.sum(totals, 0), SHAPE, TRANSPOSED=0)


@triton.jit
def load_tiles(pointers, step, NUM_TILES: tl.constexpr, exists, IS_PADDED: tl.constexpr):
    """A tuple of tiles of codes, `step` bytes from one to the next."""
    tiles = ()
    for tile in tl.static_range(NUM_TILES):
        tiles = tiles + (load_padded(pointers + tile * step, exists, IS_PADDED),)
    return tiles


@triton.jit
def multiply_zeros(
    queries, sections, block_id, kv_head, exists, SHAPE: tl.constexpr, LAYOUT: tl.constexpr
):
    """SMALL times queries times zero points of a block, which those of other blocks are near to.

    What all have in common is summed once in float32; the loop in fp16 has only differences.
    """
    channel = tl.arange(0, SHAPE.KEY_COLUMNS)
    at = sections.key_zero + record_of(block_id, kv_head, SHAPE, LAYOUT) // 2 + channel
    zeros = tl.load(at, mask=exists & (channel < SHAPE.KEY_DIM), other=0)
    return queries * (zeros * SMALL)[:, None]


@triton.jit
def load_wide_channels(sections, kv_head, LAYOUT: tl.constexpr):
    """[WIDE_COLUMNS] channels of one kv head, 0 behind the last, and whether there is one."""
    column = tl.arange(0, LAYOUT.WIDE_COLUMNS)
    exists = column < LAYOUT.NUM_WIDE
    at = sections.wide_channels + kv_head * LAYOUT.NUM_WIDE + column
    return tl.load(at, mask=exists, other=0).to(tl.int32), exists


@triton.jit
def load_wide_queries(query, sections, where, SHAPE: tl.constexpr, LAYOUT: tl.constexpr):
    """What goes with wide codes: queries of their channels times what a code counts; channels.

    Behind the last of them, queries are 0 and codes are other bytes of the record.
    """
    channel, exists = load_wide_channels(sections, where[1], LAYOUT)
    queries = load_channels(query, where, channel, exists, SHAPE, tl.float16, TRANSPOSED=0)
    return queries * (1 << LAYOUT.KEY_BITS), channel


@triton.jit
def score_token_keys(keys, queries, scales, factor, LAYOUT: tl.constexpr):
    """Scores of each plane of tiles of 8-bit codes of keys, which have one scale for each."""
    row = tl.arange(0, keys[0].shape[0])
    middle = tl.sum(queries.to(tl.float32), 0) * (-MIDDLE_CODE * CODE_UNIT)
    middle = tl.broadcast_to(middle[None, :], [keys[0].shape[0], queries.shape[1]])
    planes = planes_of_tiles(keys, None, 8)
    scores = ()
    for plane in tl.static_range(len(keys)):
        at = scales + plane * (LAYOUT.BLOCK_SIZE // len(keys)) + row
        key_scales = tl.load(at).to(tl.float32) * (factor * (1.0 / CODE_UNIT))
        scores = scores + (dot(planes[plane], queries, middle) * key_scales[:, None],)
    return scores


@triton.jit
def score_planes(
    codes,
    queries,
    wide,
    scales_and_zeros,  # and what is left out, see `multiply_zeros`
    factor,
    tile,
    SHAPE: tl.constexpr,
    LAYOUT: tl.constexpr,
):
    """Scores of each plane of tiles of key codes, a tuple; a group has a scale for each channel.

    A group is several planes of a tile, or one, or a plane is several groups of a tile each.
    """
    keys, wide_keys = codes
    TILE: tl.constexpr = keys[0].shape[0]
    KEY_TILES: tl.constexpr = len(keys)
    PLANES: tl.constexpr = 8 // LAYOUT.KEY_BITS * KEY_TILES
    TILES: tl.constexpr = LAYOUT.BLOCK_SIZE // PLANES // TILE
    PLANES_OF_GROUP: tl.constexpr = max(PLANES // LAYOUT.NUM_KEY_GROUPS, 1)
    IS_PADDED: tl.constexpr = SHAPE.KEY_DIM != SHAPE.KEY_COLUMNS
    channel = tl.arange(0, SHAPE.KEY_COLUMNS)
    exists = channel < SHAPE.KEY_DIM
    none = tl.zeros([TILE, queries.shape[1]], tl.float32)
    IS_WIDE: tl.constexpr = SHAPE.KEY_COLUMNS > 128  # where a sum that waits takes fewer registers
    planes = planes_of_tiles(keys, None, LAYOUT.KEY_BITS)
    if LAYOUT.NUM_WIDE > 0:
        wide_queries, wide_channel = wide
        wide_planes = planes_of_tiles(wide_keys, None, LAYOUT.WIDE_BITS)
        WIDE_TILES: tl.constexpr = len(wide_keys)
        WIDE_UNIT: tl.constexpr = 1.0 / (1 << LAYOUT.WIDE_BITS)
    scores = ()
    for plane in tl.static_range(PLANES):
        if plane % PLANES_OF_GROUP == 0:
            group = (plane * TILES + tile) * LAYOUT.NUM_KEY_GROUPS // (PLANES * TILES)
            at = group * SHAPE.KEY_DIM + channel
            scales = load_padded(scales_and_zeros[0] + at, exists, IS_PADDED)
            zeros = load_padded(scales_and_zeros[1] + at, exists, IS_PADDED)
            scaled = queries * scales[:, None]
            # The same sum for every token: a product is the cheapest way to have it in all rows.
            if len(scales_and_zeros) == 2:
                zeros = tl.broadcast_to(zeros[None, :], keys[0].shape)
                zero_products = dot(zeros, queries, none) * CODE_UNIT
            else:
                zeros = tl.broadcast_to((zeros * SMALL)[:, None], queries.shape)
                zeros = rounded_once(queries, zeros, -scales_and_zeros[2])
                units = tl.full(keys[0].shape, CODE_UNIT / SMALL, tl.float16)
                zero_products = dot(units, zeros, none)
            if LAYOUT.KEY_BITS == 8:
                middle = tl.full(keys[0].shape, -MIDDLE_CODE * CODE_UNIT, tl.float16)
                zero_products = dot(middle, scaled, zero_products)
            if LAYOUT.NUM_WIDE > 0:
                scales = tl.load(scales_and_zeros[0] + group * SHAPE.KEY_DIM + wide_channel)
                wide_scaled = wide_queries * scales[:, None]
        below = 1 << bits_below(plane, KEY_TILES, LAYOUT.KEY_BITS)
        products = dot(planes[plane], scaled, none if IS_WIDE else zero_products * below)
        if LAYOUT.NUM_WIDE > 0:
            # Wide codes of a plane may have more bits below them than its codes.
            if plane % KEY_TILES >= WIDE_TILES:
                products = dot(wide_planes[plane], wide_scaled * WIDE_UNIT, products)
            else:
                products = dot(wide_planes[plane], wide_scaled, products)
        if IS_WIDE:
            products += zero_products * below
        scores = scores + (products * (factor * (1.0 / (CODE_UNIT * below))),)
    return scores
