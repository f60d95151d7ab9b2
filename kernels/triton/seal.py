"""Triton: quantize whole blocks of keys and values, from open blocks and the step's own tokens.

Knows where tokens are and how codes lie, nothing of sequences. The codes and metadata are those of
`eager.quantize`, bit by bit: the same float32 operations in the same order, so kernels must be
launched with `enable_fp_fusion=False`.

Long because a kernel is one loop, and what it keeps in registers has to stay in sight.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .codes import rounded_to

FP16_MAX = tl.constexpr(65504.0)
INT8_LIMIT = tl.constexpr(127.0)
INT8_OFFSET = tl.constexpr(128.0)
ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2**23: a float32 plus this has no bits below 1


@triton.constexpr_function
def group_of(plane: int, tile: int, num_planes: int, num_tiles: int, num_groups: int) -> int:
    """The key group of a tile of a plane; a plane is `num_tiles` tiles of tokens, in order."""
    return (plane * num_tiles + tile) * num_groups // (num_planes * num_tiles)


@triton.jit
def greater(left, right):
    return tl.maximum(left, right, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def less(left, right):
    return tl.minimum(left, right, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def to_metadata(numbers):
    """float32 to fp16, saturating; what is not a number stays so."""
    return less(greater(numbers, -FP16_MAX), FP16_MAX).to(tl.float16)


@triton.jit
def to_codes(numbers, scale, low, high, OFFSET: tl.constexpr):
    """Quotients plus OFFSET, rounded to even and clamped.

    A quotient is 0 where the scale is 0 or there is no number.
    """
    quotient = tl.div_rn(numbers, tl.where(scale == 0, float("inf"), scale))
    quotient = tl.where(quotient == quotient, quotient, 0.0) + OFFSET
    quotient = tl.minimum(tl.maximum(quotient, low), high)
    return (quotient + ROUNDER) - ROUNDER


@triton.jit
def scale_and_zero(low, high, clip, top_code, BITS: tl.constexpr):
    """fp16 scale and zero point of a range that is shrunk about its middle.

    The zero point of 8 bits is the middle, that of fewer the lower end. Products halve exactly;
    `/` is a division that may be off by 2 ulp.
    """
    middle, half_range = (low + high) * 0.5, (high - low) * 0.5 * clip
    scale = to_metadata(tl.div_rn(2 * half_range, top_code + tl.zeros_like(low)))
    if BITS == 8:
        return scale, to_metadata(middle)
    else:
        return scale, to_metadata(middle - half_range)


@triton.jit
def asymmetric_codes(numbers, scale, zero, top_code, BITS: tl.constexpr):
    """Codes of `scale_and_zero`, as they count: those of 8 bits around 0."""
    if BITS == 8:
        return to_codes(numbers - zero, scale, -INT8_OFFSET, INT8_LIMIT, 0.0)
    else:
        return to_codes(numbers - zero, scale, 0.0, top_code, 0.0)


@triton.jit
def load_tokens(
    sources,
    kv_head,
    new,
    open_tokens,
    DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    OPEN_BLOCK_SIZE: tl.constexpr,
):
    """Tokens [TILE, channels] as float32, from open slots (source >= 0) or new ones (~index).

    New tokens are rounded to the stored precision, so that a sealed block does not depend on
    whether its tokens passed through an open block.
    """
    is_new = sources < 0
    channel = tl.arange(0, COLUMNS)
    exists = channel[None, :] < DIM
    at = (-1 - sources) * new.token_stride + kv_head * new.head_stride
    fresh = tl.load(
        new.rows + at[:, None] + channel[None, :], mask=is_new[:, None] & exists, other=0
    )  # fmt: skip
    slots = tl.where(is_new, 0, sources)
    at = slots // OPEN_BLOCK_SIZE * open_tokens.block_stride + kv_head * open_tokens.kv_head_stride
    at += slots % OPEN_BLOCK_SIZE * open_tokens.row_stride
    stored = tl.load(
        open_tokens.tokens + at[:, None] + channel[None, :] * open_tokens.channel_stride,
        mask=(sources >= 0)[:, None] & exists, other=0,
    )  # fmt: skip
    rounded = rounded_to(fresh, open_tokens.tokens.dtype.element_ty)
    return tl.where(is_new[:, None], rounded, stored).to(tl.float32)


@triton.jit
def seal_blocks(
    seals,
    new,
    open_keys,
    open_values,
    sections,
    coding,
    SHAPE: tl.constexpr,
    LAYOUT: tl.constexpr,
):
    """One kv head of one block: grid (blocks, kv heads). TILE rows of codes are made at once.

    `sources` [blocks, BLOCK_SIZE]: open slot, or ~index of a new token. There may be no block.
    """
    seal, kv_head = tl.program_id(0), tl.program_id(1)
    block_id = tl.load(seals.block_ids + seal)
    if block_id < 0:
        return
    record = (block_id * SHAPE.NUM_KV_HEADS + kv_head) * LAYOUT.RECORD_SIZE
    place = record, kv_head, seals.sources + seal * LAYOUT.BLOCK_SIZE
    if LAYOUT.NUM_KEY_GROUPS == 0:
        seal_token_keys(place, new.key, open_keys, sections, SHAPE, LAYOUT)
    elif coding.feedback is not None:
        seal_keys_in_turn(place, new.key, open_keys, sections, coding, SHAPE, LAYOUT)
    else:
        seal_keys(place, new.key, open_keys, sections, coding, SHAPE, LAYOUT)
    seal_values(place, new.value, open_values, sections, coding, SHAPE, LAYOUT)


@triton.jit
def seal_token_keys(
    place, new_keys, open_keys, sections, SHAPE: tl.constexpr, LAYOUT: tl.constexpr
):
    """Keys with a scale for each, of 8 bits: a row of codes is a token."""
    record, kv_head, sources = place
    row = tl.arange(0, LAYOUT.TILE)
    channel = tl.arange(0, SHAPE.KEY_COLUMNS)
    for tile in range(LAYOUT.BLOCK_SIZE // LAYOUT.TILE):
        token = tile * LAYOUT.TILE + row
        keys = load_tokens(
            tl.load(sources + token), kv_head, new_keys, open_keys, SHAPE.KEY_DIM,
            SHAPE.KEY_COLUMNS, LAYOUT.OPEN_BLOCK_SIZE,
        )  # fmt: skip
        codes, scale = symmetric_codes(keys)
        tl.store(sections.key_scale + record // 2 + token, scale)
        store_codes(
            sections.key_codes + record, codes, token, channel, channel < SHAPE.KEY_DIM,
            LAYOUT.KEY_STRIDES[0], LAYOUT.KEY_STRIDES[1],
        )  # fmt: skip


@triton.jit
def seal_keys(
    place, new_keys, open_keys, sections, coding, SHAPE: tl.constexpr, LAYOUT: tl.constexpr
):
    """Keys with scales and zero points of channels: a range over a group's tokens, then codes."""
    record, kv_head, sources = place
    KEY_COLUMNS: tl.constexpr = SHAPE.KEY_COLUMNS
    TILE: tl.constexpr = LAYOUT.TILE
    BITS: tl.constexpr = LAYOUT.KEY_BITS
    NUM_KEY_GROUPS: tl.constexpr = LAYOUT.NUM_KEY_GROUPS
    # As many as there are of upper bits, if there are any: several tiles of codes make them.
    PLANES: tl.constexpr = 8 // (LAYOUT.WIDE_BITS or BITS)
    PARTS: tl.constexpr = PLANES * BITS // 8
    ROWS_OF_PLANE: tl.constexpr = LAYOUT.BLOCK_SIZE // PLANES
    TILES_OF_BLOCK: tl.constexpr = ROWS_OF_PLANE // TILE
    TILES_OF_GROUP: tl.constexpr = LAYOUT.BLOCK_SIZE // NUM_KEY_GROUPS // TILE
    row = tl.arange(0, TILE)
    channel = tl.arange(0, KEY_COLUMNS)
    clip, top_code = limits_of_channels(channel, kv_head, sections, coding, SHAPE, LAYOUT)

    scales = ()
    zeros = ()
    for group in tl.static_range(NUM_KEY_GROUPS):
        low = tl.full([KEY_COLUMNS], float("inf"), tl.float32)
        high = tl.full([KEY_COLUMNS], float("-inf"), tl.float32)
        for tile in range(TILES_OF_GROUP):
            token = (group * TILES_OF_GROUP + tile) * TILE + row
            keys = load_tokens(
                tl.load(sources + token), kv_head, new_keys, open_keys, SHAPE.KEY_DIM,
                KEY_COLUMNS, LAYOUT.OPEN_BLOCK_SIZE,
            )  # fmt: skip
            low = less(low, tl.reduce(keys, 0, less))
            high = greater(high, tl.reduce(keys, 0, greater))
        scale, zero = scale_and_zero(low, high, clip, top_code, BITS)
        at = record // 2 + group * SHAPE.KEY_DIM + channel
        tl.store(sections.key_scale + at, scale, mask=channel < SHAPE.KEY_DIM)
        tl.store(sections.key_zero + at, zero, mask=channel < SHAPE.KEY_DIM)
        scales = scales + (scale.to(tl.float32),)
        zeros = zeros + (zero.to(tl.float32),)

    for tile in tl.static_range(TILES_OF_BLOCK):
        plane_row = tile * TILE + row
        upper = tl.zeros([TILE, KEY_COLUMNS], tl.int32)
        for part in tl.static_range(PARTS):
            packed = tl.zeros([TILE, KEY_COLUMNS], tl.int32)
            for plane in tl.static_range(part, PLANES, PARTS):
                token = plane * ROWS_OF_PLANE + plane_row
                keys = load_tokens(
                    tl.load(sources + token), kv_head, new_keys, open_keys, SHAPE.KEY_DIM,
                    KEY_COLUMNS, LAYOUT.OPEN_BLOCK_SIZE,
                )  # fmt: skip
                # An index of a tuple has to be known here: a variable would be a tensor.
                scale = scales[group_of(plane, tile, PLANES, TILES_OF_BLOCK, NUM_KEY_GROUPS)]
                zero = zeros[group_of(plane, tile, PLANES, TILES_OF_BLOCK, NUM_KEY_GROUPS)]
                codes = asymmetric_codes(keys, scale[None, :], zero[None, :], top_code, BITS)
                codes = stored_codes(codes, BITS)
                packed |= (codes & ((1 << BITS) - 1)) << (plane // PARTS * BITS)
                upper |= codes >> BITS << (plane * LAYOUT.WIDE_BITS)
            code_row = part * ROWS_OF_PLANE + plane_row
            store_key_codes(record, packed, code_row, sections, SHAPE, LAYOUT)
        if LAYOUT.NUM_WIDE > 0:
            store_wide_codes(record, upper, plane_row, kv_head, sections, SHAPE, LAYOUT)


@triton.jit
def seal_keys_in_turn(
    place, new_keys, open_keys, sections, coding, SHAPE: tl.constexpr, LAYOUT: tl.constexpr
):
    """As `seal_keys`, channel by channel: those behind take their share of each one's error.

    The block's keys are one tile; channels in it become codes as their turn comes.
    """
    record, kv_head, sources = place
    COLUMNS: tl.constexpr = SHAPE.KEY_COLUMNS
    BITS: tl.constexpr = LAYOUT.KEY_BITS
    GROUPS: tl.constexpr = LAYOUT.NUM_KEY_GROUPS
    BLOCK_SIZE: tl.constexpr = LAYOUT.BLOCK_SIZE
    token = tl.arange(0, BLOCK_SIZE)
    channel = tl.arange(0, COLUMNS)
    group = tl.arange(0, GROUPS)
    keys = load_tokens(
        tl.load(sources + token), kv_head, new_keys, open_keys, SHAPE.KEY_DIM,
        COLUMNS, LAYOUT.OPEN_BLOCK_SIZE,
    )  # fmt: skip
    for turn in range(SHAPE.KEY_DIM):
        is_turn = (channel == turn)[None, :]
        # As integers, of which all but one are 0: the sum is that one, even if it is -0.0 or NaN.
        numbers = tl.where(is_turn, keys.to(tl.int32, bitcast=True), 0)
        numbers = tl.sum(numbers, 1).to(tl.float32, bitcast=True)
        numbers = tl.reshape(numbers, [GROUPS, BLOCK_SIZE // GROUPS])
        clip, top_code = limits_of_channels(
            tl.full([1], turn, tl.int32), kv_head, sections, coding, SHAPE, LAYOUT
        )
        low, high = tl.reduce(numbers, 1, less), tl.reduce(numbers, 1, greater)
        scale, zero = scale_and_zero(low, high, clip, top_code, BITS)
        at = record // 2 + group * SHAPE.KEY_DIM + turn
        tl.store(sections.key_scale + at, scale)
        tl.store(sections.key_zero + at, zero)
        scale, zero = scale.to(tl.float32)[:, None], zero.to(tl.float32)[:, None]
        codes = asymmetric_codes(numbers, scale, zero, top_code, BITS)
        error = less(greater(numbers - (codes * scale + zero), -FP16_MAX), FP16_MAX)
        error = tl.reshape(error, [BLOCK_SIZE])[:, None]
        codes = tl.reshape(codes, [BLOCK_SIZE])[:, None]
        share = tl.load(
            coding.feedback + (kv_head * SHAPE.KEY_DIM + turn) * SHAPE.KEY_DIM + channel,
            mask=channel < SHAPE.KEY_DIM, other=0,
        )  # fmt: skip
        left = tl.where((channel > turn)[None, :], keys - error * share[None, :], keys)
        keys = tl.where(is_turn, codes, left)
    codes = stored_codes(keys, BITS)
    code_row = tl.arange(0, BLOCK_SIZE * BITS // 8)
    packed = pack_tokens(codes & ((1 << BITS) - 1), BITS)
    store_key_codes(record, packed, code_row, sections, SHAPE, LAYOUT)
    if LAYOUT.NUM_WIDE > 0:
        wide_row = tl.arange(0, BLOCK_SIZE * LAYOUT.WIDE_BITS // 8)
        upper = pack_tokens(codes >> BITS, LAYOUT.WIDE_BITS)
        store_wide_codes(record, upper, wide_row, kv_head, sections, SHAPE, LAYOUT)


@triton.jit
def pack_tokens(codes, BITS: tl.constexpr):
    """Codes [tokens, channels] of a block as byte rows."""
    PLANES: tl.constexpr = 8 // BITS
    codes = tl.reshape(codes, [PLANES, codes.shape[0] // PLANES, codes.shape[1]])
    shift = (tl.arange(0, PLANES) * BITS)[:, None, None]
    return tl.sum(codes << shift, 0)


@triton.jit
def stored_codes(codes, BITS: tl.constexpr):
    """Codes as they count, as the bytes that are packed."""
    if BITS == 8:
        codes += INT8_OFFSET
    return codes.to(tl.int32)


@triton.jit
def limits_of_channels(
    channel, kv_head, sections, coding, SHAPE: tl.constexpr, LAYOUT: tl.constexpr
):
    """The clips and the highest codes of some channels of keys."""
    clip = coding.key_clip
    top_code = tl.zeros(channel.shape, tl.float32) + ((1 << LAYOUT.KEY_BITS) - 1)
    if LAYOUT.NUM_WIDE > 0:
        is_wide, _ = places_of_wide(channel, kv_head, sections, SHAPE, LAYOUT)
        clip = tl.where(is_wide, coding.wide_key_clip, coding.key_clip)
        top_code = tl.where(is_wide, (1 << (LAYOUT.KEY_BITS + LAYOUT.WIDE_BITS)) - 1, top_code)
    return clip, top_code


@triton.jit
def places_of_wide(channel, kv_head, sections, SHAPE: tl.constexpr, LAYOUT: tl.constexpr):
    """Whether channels are wide, and how many wide ones are before them."""
    column = tl.arange(0, LAYOUT.WIDE_COLUMNS)
    at = sections.wide_channels + kv_head * LAYOUT.NUM_WIDE + column
    wide_channel = tl.load(at, mask=column < LAYOUT.NUM_WIDE, other=SHAPE.KEY_COLUMNS)[:, None]
    is_wide = tl.sum((wide_channel == channel[None, :]).to(tl.int32), 0) > 0
    return is_wide, tl.sum((wide_channel < channel[None, :]).to(tl.int32), 0)


@triton.jit
def store_key_codes(record, packed, code_row, sections, SHAPE: tl.constexpr, LAYOUT: tl.constexpr):
    channel = tl.arange(0, SHAPE.KEY_COLUMNS)
    store_codes(
        sections.key_codes + record, packed, code_row, channel, channel < SHAPE.KEY_DIM,
        LAYOUT.KEY_STRIDES[0], LAYOUT.KEY_STRIDES[1],
    )  # fmt: skip


@triton.jit
def store_wide_codes(
    record, upper, row, kv_head, sections, SHAPE: tl.constexpr, LAYOUT: tl.constexpr
):
    """Rows of the packed upper bits of wide channels, in columns of their own."""
    channel = tl.arange(0, SHAPE.KEY_COLUMNS)
    is_wide, column = places_of_wide(channel, kv_head, sections, SHAPE, LAYOUT)
    store_codes(
        sections.wide_codes + record, upper, row, column, is_wide,
        LAYOUT.WIDE_STRIDES[0], LAYOUT.WIDE_STRIDES[1],
    )  # fmt: skip


@triton.jit
def store_codes(
    codes, packed, row, channel, exists, ROW_STRIDE: tl.constexpr, CHANNEL_STRIDE: tl.constexpr
):
    at = row[:, None] * ROW_STRIDE + channel[None, :] * CHANNEL_STRIDE
    tl.store(codes + at, packed.to(tl.uint8), mask=exists[None, :])


@triton.jit
def seal_values(
    place, new_values, open_values, sections, coding, SHAPE: tl.constexpr, LAYOUT: tl.constexpr
):
    """Values with a scale for each: around 0, or with a zero point."""
    record, kv_head, sources = place
    metadata = record // 2
    TILE: tl.constexpr = LAYOUT.TILE
    COLUMNS: tl.constexpr = SHAPE.VALUE_COLUMNS
    BITS: tl.constexpr = LAYOUT.VALUE_BITS
    LOWER: tl.constexpr = LAYOUT.LOWER_VALUE_BITS
    # As many as there are of third bits, if there are any: two tiles of codes make them.
    PLANES: tl.constexpr = 8 // (LOWER if BITS == LOWER else BITS - LOWER)
    PARTS: tl.constexpr = PLANES * LOWER // 8
    ROWS_OF_PLANE: tl.constexpr = LAYOUT.BLOCK_SIZE // PLANES
    row = tl.arange(0, TILE)
    channel = tl.arange(0, COLUMNS)
    exists = channel < SHAPE.VALUE_DIM
    for tile in range(ROWS_OF_PLANE // TILE):
        plane_row = tile * TILE + row
        upper = tl.zeros([TILE, COLUMNS], tl.int32)
        for part in tl.static_range(PARTS):
            packed = tl.zeros([TILE, COLUMNS], tl.int32)
            for plane in tl.static_range(part, PLANES, PARTS):
                token = plane * ROWS_OF_PLANE + plane_row
                values = load_tokens(
                    tl.load(sources + token), kv_head, new_values, open_values, SHAPE.VALUE_DIM,
                    COLUMNS, LAYOUT.OPEN_BLOCK_SIZE,
                )  # fmt: skip
                codes, scale = value_codes(values, metadata + token, sections, coding, SHAPE, BITS)
                tl.store(sections.value_scale + metadata + token, scale)
                packed |= (codes & ((1 << LOWER) - 1)) << (plane // PARTS * LOWER)
                upper |= codes >> LOWER << plane
            store_codes(
                sections.value_codes + record, packed, part * ROWS_OF_PLANE + plane_row, channel,
                exists, LAYOUT.VALUE_STRIDES[0], LAYOUT.VALUE_STRIDES[1],
            )  # fmt: skip
        if BITS > LOWER:
            store_codes(
                sections.upper_value_codes + record, upper, plane_row, channel, exists,
                LAYOUT.UPPER_VALUE_STRIDES[0], LAYOUT.UPPER_VALUE_STRIDES[1],
            )  # fmt: skip


@triton.jit
def value_codes(values, at, sections, coding, SHAPE: tl.constexpr, BITS: tl.constexpr):
    """Codes of tokens [TILE, channels], and one fp16 scale a token; a zero point is stored."""
    TOP_CODE: tl.constexpr = (1 << BITS) - 1
    if BITS == 8:
        return symmetric_codes(values)
    elif sections.value_zero is None:
        return centred_codes(values, coding.value_clip, TOP_CODE)
    else:
        exists = (tl.arange(0, SHAPE.VALUE_COLUMNS) < SHAPE.VALUE_DIM)[None, :]
        low = tl.reduce(tl.where(exists, values, float("inf")), 1, less)
        high = tl.reduce(tl.where(exists, values, float("-inf")), 1, greater)
        scale, zero = scale_and_zero(low, high, coding.value_clip, TOP_CODE, BITS)
        tl.store(sections.value_zero + at, zero)
        codes = asymmetric_codes(
            values, scale.to(tl.float32)[:, None], zero.to(tl.float32)[:, None], TOP_CODE, BITS
        )
        return codes.to(tl.int32), scale


@triton.jit
def symmetric_codes(numbers):
    """Codes around 128 of tokens [TILE, channels], and one fp16 scale a token."""
    greatest = tl.reduce(tl.abs(numbers), 1, greater)
    scale = to_metadata(tl.div_rn(greatest, INT8_LIMIT + tl.zeros_like(greatest)))
    codes = to_codes(numbers, scale.to(tl.float32)[:, None], -INT8_LIMIT, INT8_LIMIT, 0.0)
    return (codes + INT8_OFFSET).to(tl.int32), scale


@triton.jit
def centred_codes(numbers, clip, TOP_CODE: tl.constexpr):
    """Codes around TOP_CODE / 2 of tokens [TILE, channels], and one fp16 scale a token."""
    greatest = tl.reduce(tl.abs(numbers), 1, greater)
    scale = to_metadata(tl.div_rn(2 * (greatest * clip), TOP_CODE + tl.zeros_like(greatest)))
    codes = to_codes(numbers, scale.to(tl.float32)[:, None], 0.0, TOP_CODE, 0.5 * TOP_CODE)
    return codes.to(tl.int32), scale
