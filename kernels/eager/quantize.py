"""Quantize, pack, unpack and dequantize blocks of keys and values: the torch reference.

Knows numbers by tokens and channels, nothing of where blocks are.
Codes are computed once, in float32, from the original values and against the scale and zero point
as they are stored: rounded to fp16. Source of the 2-bit scheme, keys per channel in groups of
tokens and values per token: KIVI (Liu et al. 2024, arXiv:2402.02750).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..block_views import SealedViews
from ..code_bits import WIDE_BITS, lower_bits, upper_bits

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


def quantize_centred(values: Tensor, bits: int, clip: float) -> tuple[Tensor, Tensor]:
    """Codes 0 .. 2**bits - 1 of fewer than 8 bits around 0, with one scale per row [..., D].

    A value is `(code - centre(bits)) * scale`, with no code for 0 itself. Returns uint8 codes
    [..., D] and fp16 scales [...].
    """
    values, top_code = values.float(), (1 << bits) - 1
    scale = to_stored_metadata(2 * (values.abs().amax(-1) * clip) / top_code)
    codes = divide_or_zero(values, scale.float()[..., None]).add_(centre(bits)).round()
    return codes.clamp(0, top_code).to(torch.uint8), scale


def centre(bits: int) -> float:
    """The code that 0 would have, where codes lie around 0."""
    return INT8_OFFSET if bits == 8 else ((1 << bits) - 1) / 2


def code_offset(bits: int) -> int:
    """The code of the zero point: the middle one of 8 bits, the lowest of fewer."""
    return INT8_OFFSET if bits == 8 else 0


def quantize_asymmetric(
    values: Tensor,
    dim: int,
    bits: int,
    clip: float | Tensor,
    top_code: float | Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes 0 .. 2**bits - 1 over the range of `values` along `dim`, shrunk by `clip`.

    Returns uint8 codes of the shape of `values`, and fp16 scale and zero point without `dim`; a
    value is `(code - code_offset(bits)) * scale + zero`. A constant group gets scale 0 and is its
    zero point. `clip` and another `top_code` than that of `bits` may differ by group: tensors like
    `values`, of size 1 in `dim`.
    """
    values, offset = values.float(), code_offset(bits)
    if top_code is None:
        top_code = (1 << bits) - 1
    low, high = values.aminmax(dim=dim, keepdim=True)
    middle, half_range = (low + high) / 2, (high - low) / 2 * clip
    scale = to_stored_metadata(2 * half_range / top_code)
    zero = to_stored_metadata(middle if offset else middle - half_range)
    codes = divide_or_zero(values - zero.float(), scale.float()).round()
    codes = torch.clamp(
        codes + offset, torch.zeros_like(codes), torch.as_tensor(top_code).to(codes)
    )
    return codes.to(torch.uint8), scale.squeeze(dim), zero.squeeze(dim)


def quantize_keys(
    keys: Tensor,
    num_groups: int,
    bits: int,
    clips: tuple[float, float],
    is_wide: Tensor | None = None,
    feedback: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of keys [S, H, B, D] per channel, in groups of B / G tokens.

    Channels where `is_wide` [H, D] have WIDE_BITS more and the second of the `clips`. With
    `feedback` [H, D, D] channels are coded in turn, and what the error of one asks of those behind
    it is taken from them. Returns uint8 codes [S, H, B, D], fp16 scales and zero points
    [S, H, G, D].
    Source of the rule: GPTQ (Frantar et al. 2022, arXiv:2210.17323), there for weights.
    """
    top_code: Tensor = torch.full(keys.shape[1::2], float((1 << bits) - 1), device=keys.device)
    clip = torch.full_like(top_code, clips[0])
    if is_wide is not None:
        top_code = top_code.masked_fill(is_wide, float((1 << bits + WIDE_BITS) - 1))
        clip = clip.masked_fill(is_wide, clips[1])

    def quantize(channels: slice) -> tuple[Tensor, Tensor, Tensor]:
        groups = split_dim(keys[..., channels], num_groups)  # [S, H, G, tokens, channels]
        limits = (bound[:, None, None, channels] for bound in (clip, top_code))
        codes, scale, zero = quantize_asymmetric(groups, 3, bits, *limits)
        return codes.flatten(2, 3), scale, zero

    if feedback is None:
        return quantize(slice(None))
    keys, parts = keys.float().clone(), []
    for channel in range(keys.shape[3]):
        part = codes, scale, zero = quantize(slice(channel, channel + 1))
        parts.append(part)
        read = read_codes(codes, scale, zero, bits)
        # Finite where keys are: what no scale can hold is not made up for.
        error = (keys[..., channel : channel + 1] - read).clamp(-FP16_MAX, FP16_MAX)
        keys[..., channel + 1 :] -= error * feedback[:, channel, None, channel + 1 :]
    codes, scale, zero = (torch.cat(part, -1) for part in zip(*parts, strict=True))
    return codes, scale, zero


def read_codes(codes: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Keys [..., B, D] of codes as of `quantize_keys`, in float32."""
    offset = code_offset(bits)
    groups = split_dim(codes.float() - offset, scale.shape[-2])
    return (groups * scale.float()[..., None, :] + zero.float()[..., None, :]).flatten(-3, -2)


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


def dequantize_symmetric(codes: Tensor, scale: Tensor, dtype: torch.dtype, bits: int = 8) -> Tensor:
    """`(codes - centre) * scale`: codes uint8 [..., D], scale fp16 [...]."""
    return codes.to(dtype).sub_(centre(bits)).mul_(scale.to(dtype)[..., None])


def dequantize_keys(
    sealed: SealedViews, bits: int, wide_channels: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Keys [..., H, B, D] of gathered sealed blocks, see `SealedViews.at`; `bits` of their codes.

    `wide_channels` [H, W] where they have any.
    """
    if sealed.key_zero is None:
        return dequantize_symmetric(sealed.key_codes, sealed.key_scale, dtype)
    codes = unpack_planes(sealed.key_codes, bits).to(dtype)
    if sealed.wide_codes is not None:
        assert wide_channels is not None
        upper = unpack_planes(sealed.wide_codes, WIDE_BITS).to(dtype) * (1 << bits)
        codes.scatter_add_(-1, wide_channels.unsqueeze(-2).expand_as(upper), upper)
    codes = split_dim(codes.sub_(code_offset(bits)), sealed.key_scale.shape[-2])
    codes.mul_(sealed.key_scale.to(dtype).unsqueeze(-2))
    codes.add_(sealed.key_zero.to(dtype).unsqueeze(-2))
    return codes.flatten(-3, -2)


def dequantize_values(sealed: SealedViews, bits: int, dtype: torch.dtype) -> Tensor:
    """Values [..., H, B, D] of gathered sealed blocks; `bits` of their codes."""
    codes = unpack_planes(sealed.value_codes, lower_bits(bits))
    if sealed.upper_value_codes is not None:
        upper = unpack_planes(sealed.upper_value_codes, upper_bits(bits))
        codes |= upper << lower_bits(bits)
    if sealed.value_zero is None:
        return dequantize_symmetric(codes, sealed.value_scale, dtype, bits)
    codes = codes.to(dtype)
    codes.mul_(sealed.value_scale.to(dtype).unsqueeze(-1))
    return codes.add_(sealed.value_zero.to(dtype).unsqueeze(-1))
