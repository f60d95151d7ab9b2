"""Typed views over an arena, in the order of its device. Knows bytes, never who uses them."""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..kernels.block_views import LayerBlocks, SealedViews
from .layer_spec import LayerSpec

KEY_CODES: Final = ("key_codes", "wide_codes")


def layer_blocks(
    arena: Tensor, layer: LayerSpec, dtype: torch.dtype, open_block_size: int
) -> LayerBlocks:
    """Typed views over an arena [num_blocks, num_kv_heads, record_bytes].

    The inner order follows the device, the logical views are the same: on a GPU both dot products
    contract along memory (key codes [rows, D], value codes [D, rows]), on a CPU both accumulate
    vertically (keys, open ones too, [D, rows], values [rows, D]).

    A layer in full precision has small blocks of open_block_size tokens: those of a whole block,
    where others seal, lie behind each other, see `kernels.full_precision`.
    """
    layout, kv_format = layer.record_layout(dtype), layer.kv_format
    if kv_format.is_native:
        arena = arena.view(-1, layer.num_kv_heads, open_block_size * layout.token_bytes)
    on_cpu = arena.device.type == "cpu"
    value_offset = open_block_size * layout.key_dim * dtype.itemsize
    open_keys = matrix_view(arena, dtype, 0, (open_block_size, layout.key_dim), on_cpu)
    open_values = record_view(arena, dtype, value_offset, (open_block_size, layout.value_dim))
    if kv_format.key_bits is None or kv_format.value_bits is None:
        return LayerBlocks(open_keys=open_keys, open_values=open_values, sealed=None)
    views: dict[str, Tensor | None] = dict.fromkeys(SealedViews._fields)
    for section, shape in layout.code_shapes.items():
        is_channel_major = on_cpu if section in KEY_CODES else not on_cpu
        offset = layout.offset(section)
        views[section] = matrix_view(arena, torch.uint8, offset, shape, is_channel_major)
    for section, sizes in layout.metadata_shapes.items():
        views[section] = record_view(arena, torch.float16, layout.offset(section), sizes)
    return LayerBlocks(
        open_keys=open_keys,
        open_values=open_values,
        sealed=SealedViews(**views),  # type: ignore[arg-type]
        key_bits=kv_format.key_bits,
        value_bits=kv_format.value_bits,
        key_clip=kv_format.key_clip,
        wide_key_clip=kv_format.wide_key_clip,
        value_clip=kv_format.value_clip,
        wide_channels=on_device(layer.wide_channels, arena.device),
        feedback=on_device(layer.feedback, arena.device),
    )


def on_device(
    array: NDArray[np.int64] | NDArray[np.float32] | None, device: torch.device
) -> Tensor | None:
    return None if array is None else torch.from_numpy(array).to(device)


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
        typed.storage_offset() + byte_offset // dtype.itemsize,  # an arena may be a part of more
    )
