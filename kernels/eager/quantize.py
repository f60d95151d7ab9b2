"""Quantize, pack, unpack and dequantize blocks of keys and values: the torch reference.

Knows numbers by tokens and channels, nothing of where blocks are.
Codes are computed once, in float32, from the original values and against the scale and zero point
as they are stored: rounded to fp16. Source of the 2-bit scheme, keys per channel in groups of
tokens and values per token: KIVI (Liu et al. 2024, arXiv:2402.02750).
"""

from __future__ import annotations

import torch
from torch import Tensor

FP16_MAX = 65504.0
INT8_OFFSET = 128
INT8_LIMIT = 127


def to_stored_metadata(values: Tensor) -> Tensor:
    """float32 to fp16, saturating instead of overflowing."""
    return values.clamp(-FP16_MAX, FP16_MAX).to(torch.float16)


def quantize_symmetric(values: Tensor) -> tuple[Tensor, Tensor]:
    """8-bit codes around 128 with one scale per row of the last dimension.

    `values` [..., D]; returns uint8 codes [..., D] and fp16 scales [...]. An all-zero row gets
    scale 0 and codes 128.
    """
    values = values.float()
    scale = to_stored_metadata(values.abs().amax(-1) / INT8_LIMIT)
    codes = divide_or_zero(values, scale.float()[..., None]).round()
    return (codes.clamp(-INT8_LIMIT, INT8_LIMIT) + INT8_OFFSET).to(torch.uint8), scale


def quantize_asymmetric(
    values: Tensor, dim: int, bits: int, clip: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes 0 .. 2**bits - 1 over the range of `values` along `dim`, shrunk by `clip`.

    Returns uint8 codes of the shape of `values`, and fp16 scale and zero point without `dim`; a
    value is `code * scale + zero`. A constant group gets scale 0 and is its zero point.
    """
    values = values.float()
    top_code = (1 << bits) - 1
    low, high = values.aminmax(dim=dim, keepdim=True)
    middle, half_range = (low + high) / 2, (high - low) / 2 * clip
    scale = to_stored_metadata(2 * half_range / top_code)
    zero = to_stored_metadata(middle - half_range)
    codes = divide_or_zero(values - zero.float(), scale.float()).round().clamp(0, top_code)
    return codes.to(torch.uint8), scale.squeeze(dim), zero.squeeze(dim)


def divide_or_zero(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient, and 0 where the denominator is 0 or the quotient is not a number."""
    safe = torch.where(denominator == 0, torch.inf, denominator)
    return (numerator / safe).nan_to_num(0.0)


def pack_planes(codes: Tensor, bits: int) -> Tensor:
    """Pack token planes, lowest bits first: uint8 [..., tokens, D] to [..., tokens * bits / 8, D].

    With R rows out, row t holds the codes of tokens t, t + R, t + 2R, ... at bits 0, bits,
    2 * bits, ...
    """
    planes = split_dim(codes, 8 // bits)
    packed = planes[..., 0, :, :].clone()
    for plane in range(1, 8 // bits):
        packed |= planes[..., plane, :, :] << (plane * bits)
    return packed


def split_dim(tokens: Tensor, parts: int) -> Tensor:
    """Tokens [..., n, D] as [..., parts, n / parts, D]."""
    return tokens.reshape(*tokens.shape[:-2], parts, -1, tokens.shape[-1])


def unpack_planes(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `pack_planes`: uint8 [..., R, D] to [..., R * 8 / bits, D]."""
    mask = (1 << bits) - 1
    planes = [packed >> (plane * bits) & mask for plane in range(8 // bits)]
    return torch.cat(planes, dim=-2)


def dequantize_symmetric(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`(codes - 128) * scale`: codes uint8 [..., D], scale fp16 [...]."""
    return codes.to(dtype).sub_(INT8_OFFSET).mul_(scale.to(dtype)[..., None])


def dequantize_keys(
    packed: Tensor, scale: Tensor, zero: Tensor | None, bits: int, dtype: torch.dtype
) -> Tensor:
    """Keys of sealed blocks: packed [..., R, D] to [..., block_size, D].

    8 bits: scale [..., block_size]. Below: scale and zero [..., G, D], one row for each group of
    block_size / G tokens.
    """
    if zero is None:
        return dequantize_symmetric(packed, scale, dtype)
    codes = split_dim(unpack_planes(packed, bits).to(dtype), scale.shape[-2])
    codes.mul_(scale.to(dtype)[..., None, :]).add_(zero.to(dtype)[..., None, :])
    return codes.flatten(-3, -2)


def dequantize_values(
    packed: Tensor, scale: Tensor, zero: Tensor | None, bits: int, dtype: torch.dtype
) -> Tensor:
    """Values of sealed blocks: packed [..., R, D], scale and zero [..., block_size]."""
    if zero is None:
        return dequantize_symmetric(packed, scale, dtype)
    codes = unpack_planes(packed, bits).to(dtype)
    return codes.mul_(scale.to(dtype)[..., None]).add_(zero.to(dtype)[..., None])
