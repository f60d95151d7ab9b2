"""What all Triton kernels share: dot products, codes to numbers, what a query sees.

Knows tensors in registers, never addresses. Interpreted (TRITON_INTERPRET=1, on a CPU) there is no
inline assembly and a product of bfloat16 is wrong; both have a plain branch here, and only here.

Attention is written for matrices [tokens or channels, query rows]: K/V are the left operand of both
products. With TRANSPOSED = 1 every matrix is its transpose and queries are the left operand, which
is better for many of them; `TRANSPOSED` is then also the axis that a column lies along.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
CODE_UNIT = tl.constexpr(2.0**-24)  # the least fp16 number: codes are unpacked as multiples of it
LOG2_E = tl.constexpr(1.4426950408889634)
# Weights are 2 ** (score - reference), where the reference is so far below the greatest score that
# fp16, which ends at 65504, holds the greatest weights and loses none that count.
HEADROOM = tl.constexpr(14.0)
NO_REFERENCE = tl.constexpr(-1e30)  # before any score; finite, so that differences are numbers


@triton.jit
def dot(left, right, total):
    """`total + left @ right` with float32 sums, whatever the operands."""
    if INTERPRETED:
        return total + tl.dot(left.to(tl.float32), right.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(left, right, total, input_precision="ieee")


@triton.jit
def product(left, right, total, TRANSPOSED: tl.constexpr):
    """`total + left @ right`, all three perhaps transposed."""
    if TRANSPOSED:
        return dot(right, left, total)
    else:
        return dot(left, right, total)


@triton.jit
def as_column(vector, TRANSPOSED: tl.constexpr):
    return tl.expand_dims(vector, 1 - TRANSPOSED)


@triton.jit
def as_row(vector, TRANSPOSED: tl.constexpr):
    return tl.expand_dims(vector, TRANSPOSED)


@triton.jit
def zeros(LENGTH: tl.constexpr, WIDTH: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Columns of LENGTH numbers and rows of WIDTH."""
    if TRANSPOSED:
        return tl.zeros([WIDTH, LENGTH], tl.float32)
    else:
        return tl.zeros([LENGTH, WIDTH], tl.float32)


@triton.jit
def planes_of_codes(codes, BITS: tl.constexpr):
    """A tuple of all planes of packed codes as fp16, exact.

    The bits of a plane are left where they are, which makes a subnormal number of them:
    code * 2**(plane * BITS) * CODE_UNIT. Two instructions for four bytes, and, below 8 bits, one
    for two numbers.
    """
    if BITS == 8:
        return (whole_codes(codes),)
    elif BITS == 4:
        return planes_of_4_bits(codes)
    else:
        return planes_of_2_bits(codes)


@triton.jit
def signed_codes(codes):
    """A byte under 0x64 is the fp16 number 1024 + byte, and 0x6480 is 1152."""
    if INTERPRETED:
        return (codes.to(tl.float32) - 128.0).to(tl.float16)
    else:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 low, high, offset;
            mov.b32 offset, 0x64806480;
            prmt.b32 low, $2, 0x64646464, 0x4140;
            prmt.b32 high, $2, 0x64646464, 0x4342;
            sub.rn.f16x2 $0, low, offset;
            sub.rn.f16x2 $1, high, offset;
            }""",
            "=r,=r,r",
            [codes],
            dtype=tl.float16,
            is_pure=True,
            pack=4,
        )


@triton.jit
def whole_codes(codes):
    """A byte alone is the fp16 number code * CODE_UNIT."""
    if INTERPRETED:
        return plane_of_codes(codes, 0, 8)
    else:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $2, 0, 0x4140; prmt.b32 $1, $2, 0, 0x4342;",
            "=r,=r,r",
            [codes],
            dtype=tl.float16,
            is_pure=True,
            pack=4,
        )


@triton.jit
def codes_of_plane(codes, shift, BITS: tl.constexpr):
    """The bits of one plane, `shift` of which are below it, as whole fp16 numbers.

    8 bits: code - 128.
    """
    if BITS == 8:
        return signed_codes(codes)
    elif INTERPRETED:
        return ((codes >> shift) & ((1 << BITS) - 1)).to(tl.float16)
    else:
        MASK: tl.constexpr = (
            "0x0f0f0f0f" if BITS == 4 else ("0x03030303" if BITS == 2 else "0x01010101")
        )
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 kept, low, high, offset;
            shr.u32 kept, $2, $3;
            and.b32 kept, kept, """
            + MASK
            + """;
            mov.b32 offset, 0x64006400;
            prmt.b32 low, kept, 0x64646464, 0x4140;
            prmt.b32 high, kept, 0x64646464, 0x4342;
            sub.rn.f16x2 $0, low, offset;
            sub.rn.f16x2 $1, high, offset;
            }""",
            "=r,=r,r,r,r,r,r",
            [codes, shift],
            dtype=tl.float16,
            is_pure=True,
            pack=4,
        )


@triton.jit
def planes_of_tiles(tiles, upper, BITS: tl.constexpr):
    """A tuple of the planes of all tiles, in the order of their tokens in a block.

    Tile i of n holds every n-th plane from the i-th on: where keys have more bits than values, or
    the other way round, several tiles of the one go with a tile of the other. `upper` is None, or
    the third bits that go with the only tile, of codes of 2, and where: see `planes_of_3_bits`.
    """
    planes_of_tile = ()
    for tile in tl.static_range(len(tiles)):
        if upper is None:
            planes_of_tile = planes_of_tile + (planes_of_codes(tiles[tile], BITS),)
        else:
            planes_of_tile = planes_of_tile + (planes_of_3_bits(tiles[tile], upper[0], upper[1]),)
    planes = ()
    for plane in tl.static_range(8 // BITS):
        for tile in tl.static_range(len(tiles)):
            planes = planes + (planes_of_tile[tile][plane],)
    return planes


@triton.jit
def plane_of_codes(codes, PLANE: tl.constexpr, BITS: tl.constexpr):
    kept = codes & (((1 << BITS) - 1) << (PLANE * BITS))
    return kept.to(tl.uint16).to(tl.float16, bitcast=True)


@triton.jit
def planes_of_4_bits(codes):
    if INTERPRETED:
        return plane_of_codes(codes, 0, 4), plane_of_codes(codes, 1, 4)
    else:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 low, high;
            prmt.b32 low, $4, 0, 0x4140;
            prmt.b32 high, $4, 0, 0x4342;
            and.b32 $0, low, 0x000f000f;
            and.b32 $1, high, 0x000f000f;
            and.b32 $2, low, 0x00f000f0;
            and.b32 $3, high, 0x00f000f0;
            }""",
            "=r,=r,=r,=r,r",
            [codes],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=4,
        )


@triton.jit
def planes_of_2_bits(codes):
    if INTERPRETED:
        return (
            plane_of_codes(codes, 0, 2),
            plane_of_codes(codes, 1, 2),
            plane_of_codes(codes, 2, 2),
            plane_of_codes(codes, 3, 2),
        )
    else:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 low, high;
            prmt.b32 low, $8, 0, 0x4140;
            prmt.b32 high, $8, 0, 0x4342;
            and.b32 $0, low, 0x00030003;
            and.b32 $1, high, 0x00030003;
            and.b32 $2, low, 0x000c000c;
            and.b32 $3, high, 0x000c000c;
            and.b32 $4, low, 0x00300030;
            and.b32 $5, high, 0x00300030;
            and.b32 $6, low, 0x00c000c0;
            and.b32 $7, high, 0x00c000c0;
            }""",
            "=r,=r,=r,=r,=r,=r,=r,=r,r",
            [codes],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=4,
        )


@triton.jit
def plane_of_3_bits(lower, upper, PLANE: tl.constexpr):
    kept = (lower.to(tl.uint16) & (3 << (2 * PLANE))) | (upper & (4 << (2 * PLANE)))
    return kept.to(tl.float16, bitcast=True)


@triton.jit
def planes_of_3_bits(lower, upper, shift):
    """As `planes_of_codes` of 2 bits, each with its third bit above it.

    Of `upper` the bit of plane j is bit 2 j + 2 once it is moved up by `shift`.
    """
    if INTERPRETED:
        moved = (upper.to(tl.int32) << shift).to(tl.uint16)
        return (
            plane_of_3_bits(lower, moved, 0),
            plane_of_3_bits(lower, moved, 1),
            plane_of_3_bits(lower, moved, 2),
            plane_of_3_bits(lower, moved, 3),
        )
    else:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 low, high, third, fourth, kept;
            prmt.b32 low, $8, 0, 0x4140;
            prmt.b32 high, $8, 0, 0x4342;
            prmt.b32 third, $9, 0, 0x4140;
            prmt.b32 fourth, $9, 0, 0x4342;
            shl.b32 third, third, $10;
            shl.b32 fourth, fourth, $10;
            and.b32 kept, third, 0x00040004;
            lop3.b32 $0, low, 0x00030003, kept, 0xea;
            and.b32 kept, fourth, 0x00040004;
            lop3.b32 $1, high, 0x00030003, kept, 0xea;
            and.b32 kept, third, 0x00100010;
            lop3.b32 $2, low, 0x000c000c, kept, 0xea;
            and.b32 kept, fourth, 0x00100010;
            lop3.b32 $3, high, 0x000c000c, kept, 0xea;
            and.b32 kept, third, 0x00400040;
            lop3.b32 $4, low, 0x00300030, kept, 0xea;
            and.b32 kept, fourth, 0x00400040;
            lop3.b32 $5, high, 0x00300030, kept, 0xea;
            and.b32 kept, third, 0x01000100;
            lop3.b32 $6, low, 0x00c000c0, kept, 0xea;
            and.b32 kept, fourth, 0x01000100;
            lop3.b32 $7, high, 0x00c000c0, kept, 0xea;
            }""",
            "=r,=r,=r,=r,=r,=r,=r,=r,r,r,r,r,r,r",
            [lower, upper, shift],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=4,
        )


@triton.jit
def rounded_once(left, right, total):
    """left * right + total of fp16; the interpreter would round the product too."""
    if INTERPRETED:
        exact = left.to(tl.float32) * right.to(tl.float32) + total.to(tl.float32)
        return exact.to(tl.float16)
    else:
        return tl.fma(left, right, total)


# Triton's own exp2, log2 and division care for subnormal numbers, which takes 3 to 20 instructions.


@triton.jit
def one_instruction(numbers, ASSEMBLY: tl.constexpr):
    return tl.inline_asm_elementwise(
        ASSEMBLY, "=f,f", [numbers], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def fast_exp2(numbers):
    """In one instruction, within 2 units of the last place."""
    if INTERPRETED:
        return tl.exp2(numbers)
    else:
        return one_instruction(numbers, "ex2.approx.ftz.f32 $0, $1;")


@triton.jit
def fast_log2(numbers):
    """In one instruction, within 1e-6."""
    if INTERPRETED:
        return tl.log2(numbers)
    else:
        return one_instruction(numbers, "lg2.approx.ftz.f32 $0, $1;")


@triton.jit
def fast_inverse(numbers):
    """In one instruction, within 1 unit of the last place."""
    if INTERPRETED:
        return 1.0 / numbers
    else:
        return one_instruction(numbers, "rcp.approx.ftz.f32 $0, $1;")


@triton.jit
def rounded_to(numbers, DTYPE: tl.constexpr):
    """float32 to a dtype of no more precision; the interpreter would cut bfloat16 off."""
    if INTERPRETED and DTYPE == tl.bfloat16:
        bits = numbers.to(tl.float32).to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return numbers.to(DTYPE)


@triton.jit
def load_padded(pointers, exists, IS_PADDED: tl.constexpr):
    """Load a tile, and 0 where nothing exists; masks cost instructions where all of it does."""
    if IS_PADDED:
        return tl.load(pointers, mask=exists, other=0)
    else:
        return tl.load(pointers)


@triton.jit
def cap_scores(scores, softcap, HAS_SOFTCAP: tl.constexpr):
    """Scores in units of `softcap` to its tanh, as powers of 2; without it they are already."""
    if HAS_SOFTCAP:
        growth = fast_exp2(scores * (2.0 * LOG2_E))
        return softcap * LOG2_E * (1.0 - 2.0 / (growth + 1.0))
    else:
        return scores


@triton.jit
def first_visible(positions, sliding_window, attention_chunk):
    """The first position that a query at `positions` sees; 0 switches a rule off."""
    first = tl.where(sliding_window > 0, positions - sliding_window + 1, 0)
    chunk = tl.maximum(attention_chunk, 1)
    start = tl.where(attention_chunk > 0, positions // chunk * chunk, 0)
    return tl.maximum(tl.maximum(first, start), 0)
