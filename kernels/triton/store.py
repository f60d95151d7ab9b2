"""Write a step's new keys and values on a GPU: append to open blocks, seal full ones.

Knows a layer's blocks and a step's slots, nothing of sequences. Same signature and the same bytes
as `eager.store`.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from ..block_views import LayerBlocks, SealedViews, as_rows
from ..code_bits import WIDE_BITS, lower_bits, upper_bits
from ..eager.store import append, gather_blocks, gather_tokens
from ..new_tokens import NewTokens
from ..step_inputs import StepInputs
from .groups import Coding, Layout, NewKeysAndValues, OpenTokens, Rows, Seals, Sections, Shape
from .launch import seal_launch
from .seal import seal_blocks as seal_blocks_kernel

LEAST_WIDE_COLUMNS: Final = 32  # fewer codes would be shuffled on their way to the product


def power_of_2(number: int) -> int:
    """The least power of 2 that is not below a number: tensors of a kernel have such sizes."""
    return 1 << (number - 1).bit_length()


def rows_of(tensor: Tensor) -> Rows:
    """Of [T, heads, D] with contiguous rows."""
    token_stride, head_stride, _ = tensor.stride()
    return Rows(tensor, token_stride, head_stride)


def shape_of(key: Tensor, value: Tensor, num_query_heads: int) -> Shape:
    _, num_kv_heads, key_dim = key.shape
    value_dim = value.shape[2]
    return Shape(
        NUM_KV_HEADS=num_kv_heads,
        QUERY_GROUP_SIZE=num_query_heads // num_kv_heads,
        KEY_DIM=key_dim,
        VALUE_DIM=value_dim,
        KEY_COLUMNS=power_of_2(key_dim),
        VALUE_COLUMNS=power_of_2(value_dim),
    )


def open_tokens(layer: LayerBlocks) -> tuple[OpenTokens, OpenTokens]:
    """Keys and values of a layer's open blocks."""
    keys, values = (
        OpenTokens(
            blocks,
            row_stride=blocks.stride(2),
            channel_stride=blocks.stride(3),
            block_stride=blocks.stride(0),
            kv_head_stride=blocks.stride(1),
        )
        for blocks in (layer.open_keys, layer.open_values)
    )
    return keys, values


def open_layout(step: StepInputs, layer: LayerBlocks) -> Layout:
    """Of open blocks: an element is a number in full precision."""
    return Layout(
        BLOCK_SIZE=step.block_size,
        OPEN_BLOCK_SIZE=step.open_block_size,
        NUM_HEAD_TOKENS=step.num_head_tokens,
        HAS_BODY=layer.sealed is not None,
        RECORD_SIZE=layer.open_keys.stride(1),
        KEY_STRIDES=layer.open_keys.stride()[2:],
        VALUE_STRIDES=layer.open_values.stride()[2:],
    )


def sealed_layout(step: StepInputs, sealed: SealedViews, layer: LayerBlocks) -> Layout:
    """Of sealed blocks: an element is a byte of codes."""
    layout = Layout(
        BLOCK_SIZE=step.block_size,
        OPEN_BLOCK_SIZE=step.open_block_size,
        NUM_HEAD_TOKENS=step.num_head_tokens,
        HAS_BODY=True,
        RECORD_SIZE=sealed.key_codes.stride(1),
        KEY_STRIDES=sealed.key_codes.stride()[2:],
        VALUE_STRIDES=sealed.value_codes.stride()[2:],
        KEY_BITS=layer.key_bits,
        VALUE_BITS=layer.value_bits,
        LOWER_VALUE_BITS=lower_bits(layer.value_bits),
        LEAST_BITS=least_bits(layer),
        NUM_KEY_GROUPS=sealed.num_key_groups,
    )
    if sealed.upper_value_codes is not None:
        strides = sealed.upper_value_codes.stride()[2:]
        layout = layout._replace(UPPER_VALUE_STRIDES=strides)
    if sealed.wide_codes is None:
        return layout
    num_wide = sealed.wide_codes.shape[3]
    return layout._replace(
        NUM_WIDE=num_wide,
        WIDE_BITS=WIDE_BITS,
        WIDE_COLUMNS=max(power_of_2(num_wide), LEAST_WIDE_COLUMNS),
        WIDE_STRIDES=sealed.wide_codes.stride()[2:],
    )


def least_bits(layer: LayerBlocks) -> int:
    """The fewest bits that are packed together in any section of a layer's sealed blocks."""
    bits = {layer.key_bits, lower_bits(layer.value_bits), upper_bits(layer.value_bits)}
    if layer.wide_channels is not None:
        bits.add(WIDE_BITS)
    return min(bits - {0})


def rows_of_plane(layer: LayerBlocks, sealed: SealedViews) -> int:
    """Tokens of a plane, where all sections have as many planes as the one with most."""
    return sealed.block_size * least_bits(layer) // 8


def store_tokens(new: NewTokens, layer: LayerBlocks, step: StepInputs) -> None:
    """As `eager.store.store_tokens`."""
    if len(step.seal_block_ids):
        seal_blocks(new, layer, step)
    append(layer.open_keys, new.key, step)
    append(layer.open_values, new.value, step)


def seal_blocks(new: NewTokens, layer: LayerBlocks, step: StepInputs) -> None:
    """Quantize the blocks that a step seals: what `store_tokens` does but for appending."""
    sealed, sources = layer.sealed, step.seal_sources
    if sealed is None:
        gather_blocks(new, layer, step)
        return
    if step.seals_in_place:  # tile by tile a kernel would write over what it has yet to read
        new, sources = staged_sources(new, layer, step)
    keys, values = (as_rows(tensor, tensor.dtype) for tensor in (new.key, new.value))
    num_kv_heads, key_dim, value_dim = *keys.shape[1:], values.shape[2]
    launch = seal_launch(max(key_dim, value_dim))
    layout = sealed_layout(step, sealed, layer)
    seal_blocks_kernel[len(step.seal_block_ids), num_kv_heads](
        Seals(step.seal_block_ids, sources),
        NewKeysAndValues(rows_of(keys), rows_of(values)),
        *open_tokens(layer),
        Sections(*sealed, layer.wide_channels),
        Coding(layer.key_clip, layer.wide_key_clip, layer.value_clip, layer.feedback),
        SHAPE=shape_of(keys, values, num_kv_heads),
        LAYOUT=layout._replace(TILE=min(launch.tile, rows_of_plane(layer, sealed))),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        enable_fp_fusion=False,  # so that every operation is rounded as in the reference
    )


def staged_sources(
    new: NewTokens, layer: LayerBlocks, step: StepInputs
) -> tuple[NewTokens, Tensor]:
    """Copies of all tokens to be sealed, as if they were new, and where each is."""
    sources = step.seal_sources
    keys, values = (
        gather_tokens(blocks, tokens, sources).transpose(1, 2).flatten(0, 1).contiguous()
        for blocks, tokens in ((layer.open_keys, new.key), (layer.open_values, new.value))
    )
    places = torch.arange(sources.numel(), device=sources.device)
    return new._replace(key=keys, value=values), ~places.view(sources.shape)
