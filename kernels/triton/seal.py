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
def to_codes(numbers, scale, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Quotients rounded to even and clamped; 0 where the scale is 0 or there is no number."""
    quotient = tl.div_rn(numbers, tl.where(scale == 0, float("inf"), scale))
    quotient = tl.where(quotient == quotient, quotient, 0.0)
    quotient = tl.minimum(tl.maximum(quotient, LOW), HIGH)
    return (quotient + ROUNDER) - ROUNDER


@triton.jit
def scale_and_zero(low, high, clip, TOP_CODE: tl.constexpr):
    """fp16 scale and zero point of a range that is shrunk about its middle."""
    middle, half_range = (low + high) / 2, (high - low) / 2 * clip
    return to_metadata(tl.div_rn(2 * half_range, TOP_CODE + tl.zeros_like(low))), to_metadata(
        middle - half_range
    )


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
    clips,
    SHAPE: tl.constexpr,
    LAYOUT: tl.constexpr,
):
    """One kv head of one block: grid (blocks, kv heads). TILE rows of codes are made at once.

    `sources` [blocks, BLOCK_SIZE]: open slot, or ~index of a new token.
    """
    KEY_COLUMNS: tl.constexpr = SHAPE.KEY_COLUMNS
    TILE: tl.constexpr = LAYOUT.TILE
    VALUE_COLUMNS: tl.constexpr = SHAPE.VALUE_COLUMNS
    seal, kv_head = tl.program_id(0), tl.program_id(1)
    record = (tl.load(seals.block_ids + seal) * SHAPE.NUM_KV_HEADS + kv_head) * LAYOUT.RECORD_SIZE
    metadata = record // 2
    sources = seals.sources + seal * LAYOUT.BLOCK_SIZE
    row = tl.arange(0, TILE)
    channel = tl.arange(0, KEY_COLUMNS)
    value_channel = tl.arange(0, VALUE_COLUMNS)
    NUM_KEY_GROUPS: tl.constexpr = LAYOUT.NUM_KEY_GROUPS
    PLANES: tl.constexpr = 8 // LAYOUT.BITS
    ROWS_OF_CODES: tl.constexpr = LAYOUT.BLOCK_SIZE // PLANES
    TILES_OF_BLOCK: tl.constexpr = ROWS_OF_CODES // TILE
    TOP_CODE: tl.constexpr = (1 << LAYOUT.BITS) - 1

    scales = ()
    zeros = ()
    if LAYOUT.BITS < 8:
        TILES_OF_GROUP: tl.constexpr = LAYOUT.BLOCK_SIZE // NUM_KEY_GROUPS // TILE
        for group in tl.static_range(NUM_KEY_GROUPS):
            low = tl.full([KEY_COLUMNS], float("inf"), tl.float32)
            high = tl.full([KEY_COLUMNS], float("-inf"), tl.float32)
            for tile in range(TILES_OF_GROUP):
                token = (group * TILES_OF_GROUP + tile) * TILE + row
                numbers = load_tokens(
                    tl.load(sources + token), kv_head, new.key, open_keys, SHAPE.KEY_DIM,
                    KEY_COLUMNS, LAYOUT.OPEN_BLOCK_SIZE,
                )  # fmt: skip
                low = less(low, tl.reduce(numbers, 0, less))
                high = greater(high, tl.reduce(numbers, 0, greater))
            scale, zero = scale_and_zero(low, high, clips.key, TOP_CODE)
            at = metadata + group * SHAPE.KEY_DIM + channel
            tl.store(sections.key_scale + at, scale, mask=channel < SHAPE.KEY_DIM)
            tl.store(sections.key_zero + at, zero, mask=channel < SHAPE.KEY_DIM)
            scales = scales + (scale.to(tl.float32),)
            zeros = zeros + (zero.to(tl.float32),)

    for part_of_block in tl.static_range(TILES_OF_BLOCK):
        code_row = part_of_block * TILE + row
        packed_keys = tl.zeros([TILE, KEY_COLUMNS], tl.int32)
        packed_values = tl.zeros([TILE, VALUE_COLUMNS], tl.int32)
        for plane in tl.static_range(PLANES):
            token = plane * ROWS_OF_CODES + code_row
            keys = load_tokens(
                    tl.load(sources + token), kv_head, new.key, open_keys, SHAPE.KEY_DIM,
                    KEY_COLUMNS, LAYOUT.OPEN_BLOCK_SIZE,
                )  # fmt: skip
            values = load_tokens(
                    tl.load(sources + token), kv_head, new.value, open_values, SHAPE.VALUE_DIM,
                    VALUE_COLUMNS, LAYOUT.OPEN_BLOCK_SIZE,
                )  # fmt: skip
            if LAYOUT.BITS == 8:
                packed_keys, scale = symmetric_codes(keys)
                tl.store(sections.key_scale + metadata + token, scale)
                packed_values, scale = symmetric_codes(values)
                tl.store(sections.value_scale + metadata + token, scale)
            else:
                # An index of a tuple has to be known here: a variable would be a tensor.
                scale = scales[
                    group_of(plane, part_of_block, PLANES, TILES_OF_BLOCK, NUM_KEY_GROUPS)
                ]
                zero = zeros[group_of(plane, part_of_block, PLANES, TILES_OF_BLOCK, NUM_KEY_GROUPS)]
                codes = to_codes(keys - zero[None, :], scale[None, :], 0.0, TOP_CODE)
                packed_keys |= codes.to(tl.int32) << (plane * LAYOUT.BITS)
                exists = value_channel[None, :] < SHAPE.VALUE_DIM
                low = tl.reduce(tl.where(exists, values, float("inf")), 1, less)
                high = tl.reduce(tl.where(exists, values, float("-inf")), 1, greater)
                scale, zero = scale_and_zero(low, high, clips.value, TOP_CODE)
                tl.store(sections.value_scale + metadata + token, scale)
                tl.store(sections.value_zero + metadata + token, zero)
                codes = to_codes(
                    values - zero.to(tl.float32)[:, None], scale.to(tl.float32)[:, None], 0.0,
                    TOP_CODE,
                )  # fmt: skip
                packed_values |= codes.to(tl.int32) << (plane * LAYOUT.BITS)
        tl.store(
            sections.key_codes + record + code_row[:, None] * LAYOUT.KEY_STRIDES[0]
            + channel[None, :] * LAYOUT.KEY_STRIDES[1],
            packed_keys.to(tl.uint8), mask=channel[None, :] < SHAPE.KEY_DIM,
        )  # fmt: skip
        tl.store(
            sections.value_codes + record + code_row[:, None] * LAYOUT.VALUE_STRIDES[0]
            + value_channel[None, :] * LAYOUT.VALUE_STRIDES[1],
            packed_values.to(tl.uint8), mask=value_channel[None, :] < SHAPE.VALUE_DIM,
        )  # fmt: skip


@triton.jit
def symmetric_codes(numbers):
    """Codes around 128 of tokens [TILE, channels], and one fp16 scale a token."""
    greatest = tl.reduce(tl.abs(numbers), 1, greater)
    scale = to_metadata(tl.div_rn(greatest, INT8_LIMIT + tl.zeros_like(greatest)))
    codes = to_codes(numbers, scale.to(tl.float32)[:, None], -INT8_LIMIT, INT8_LIMIT)
    return (codes + INT8_OFFSET).to(tl.int32), scale
