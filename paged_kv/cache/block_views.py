"""Typed views over an arena, in the order of its device. Knows bytes, never who uses them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.block_views import LayerBlocks, SealedViews
from .formats import RecordLayout


def layer_blocks(
    arena: Tensor, layout: RecordLayout, dtype: torch.dtype, open_block_size: int
) -> LayerBlocks:
    """Typed views over an arena [num_blocks, num_kv_heads, record_bytes].

    The inner order follows the device, the logical views are the same: on a GPU both dot products
    contract along memory (key codes [rows, D], value codes [D, rows]), on a CPU both accumulate
    vertically (keys, open ones too, [D, rows], values [rows, D]).
    """
    kv_format = layout.kv_format
    key_dim, value_dim, block_size = layout.key_dim, layout.value_dim, kv_format.block_size
    on_cpu = arena.device.type == "cpu"
    value_offset = open_block_size * key_dim * dtype.itemsize
    open_keys = matrix_view(arena, dtype, 0, (open_block_size, key_dim), on_cpu)
    open_values = record_view(arena, dtype, value_offset, (open_block_size, value_dim))
    if kv_format.is_native:
        return LayerBlocks(open_keys=open_keys, open_values=open_values, sealed=None)

    def codes(section: str, dim: int, channel_major: bool) -> Tensor:
        shape = (layout.num_code_rows, dim)
        return matrix_view(arena, torch.uint8, layout.offset(section), shape, channel_major)

    def metadata(section: str, *shape: int) -> Tensor:
        return record_view(arena, torch.float16, layout.offset(section), shape)

    asymmetric = kv_format.is_asymmetric
    key_shape = (kv_format.num_key_groups, key_dim) if asymmetric else (block_size,)
    sealed = SealedViews(
        key_codes=codes("key_codes", key_dim, on_cpu),
        value_codes=codes("value_codes", value_dim, not on_cpu),
        key_scale=metadata("key_scale", *key_shape),
        key_zero=metadata("key_zero", *key_shape) if asymmetric else None,
        value_scale=metadata("value_scale", block_size),
        value_zero=metadata("value_zero", block_size) if asymmetric else None,
    )
    assert kv_format.bits is not None
    return LayerBlocks(
        open_keys=open_keys,
        open_values=open_values,
        sealed=sealed,
        bits=kv_format.bits,
        key_clip=kv_format.key_clip,
        value_clip=kv_format.value_clip,
    )


def matrix_view(
    arena: Tensor,
    dtype: torch.dtype,
    byte_offset: int,
    shape: tuple[int, int],
    is_transposed: bool,
) -> Tensor:
    """A matrix in every record, [NB, H, *shape]; transposed, its rows are adjacent in memory."""
    if not is_transposed:
        return record_view(arena, dtype, byte_offset, shape)
    return record_view(arena, dtype, byte_offset, shape[::-1]).transpose(-1, -2)


def record_view(
    arena: Tensor, dtype: torch.dtype, byte_offset: int, inner_shape: tuple[int, ...]
) -> Tensor:
    """`inner_shape` elements of `dtype` at an offset of every record: [NB, H, *inner_shape]."""
    typed = arena.view(dtype)
    inner_strides = [1]
    for size in reversed(inner_shape[1:]):
        inner_strides.insert(0, inner_strides[0] * size)
    return typed.as_strided(
        (*typed.shape[:2], *inner_shape),
        (typed.stride(0), typed.stride(1), *inner_strides),
        byte_offset // dtype.itemsize,
    )
