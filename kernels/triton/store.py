"""Write a step's new keys and values on a GPU: append to open blocks, seal full ones.

Knows a layer's blocks and a step's slots, nothing of sequences. Same signature and the same bytes
as `eager.store`.
"""

from __future__ import annotations

from torch import Tensor

from ..block_views import LayerBlocks, as_rows
from ..eager.store import append
from ..new_tokens import NewTokens
from ..step_inputs import StepInputs
from .launch import seal_launch
from .seal import seal_blocks as seal_blocks_kernel


def power_of_2(number: int) -> int:
    """The least power of 2 that is not below a number: tensors of a kernel have such sizes."""
    return 1 << (number - 1).bit_length()


def open_strides(layer: LayerBlocks) -> tuple[Tensor | int, ...]:
    """What a kernel must know of open blocks.

    Keys with the strides of a row and of a channel; values with that of a row; those of blocks and
    heads.
    """
    keys, values = layer.open_keys, layer.open_values
    return keys, *keys.stride()[2:], values, values.stride(2), *keys.stride()[:2]


def store_tokens(new: NewTokens, layer: LayerBlocks, step: StepInputs) -> None:
    """As `eager.store.store_tokens`."""
    if len(step.seal_block_ids):
        seal_blocks(new, layer, step)
    append(layer.open_keys, new.key, step)
    append(layer.open_values, new.value, step)


def seal_blocks(new: NewTokens, layer: LayerBlocks, step: StepInputs) -> None:
    """Quantize the blocks that a step seals: what `store_tokens` does but for appending."""
    sealed = layer.sealed
    assert sealed is not None
    keys, values = (as_rows(tensor, tensor.dtype) for tensor in (new.key, new.value))
    _, num_heads, key_dim = keys.shape
    value_dim = values.shape[2]
    launch = seal_launch(max(key_dim, value_dim))
    seal_blocks_kernel[len(step.seal_block_ids), num_heads](
        step.seal_block_ids,
        step.seal_sources,
        keys,
        *keys.stride()[:2],
        values,
        *values.stride()[:2],
        *open_strides(layer),
        sealed.key_codes,
        *sealed.key_codes.stride()[2:],
        sealed.value_codes,
        *sealed.value_codes.stride()[2:],
        sealed.key_scale,
        sealed.key_zero,
        sealed.value_scale,
        sealed.value_zero,
        layer.key_clip,
        layer.value_clip,
        BITS=layer.bits,
        NUM_HEADS=num_heads,
        KEY_DIM=key_dim,
        VALUE_DIM=value_dim,
        KEY_COLUMNS=power_of_2(key_dim),
        VALUE_COLUMNS=power_of_2(value_dim),
        BLOCK_SIZE=step.block_size,
        OPEN_BLOCK_SIZE=step.open_block_size,
        NUM_KEY_GROUPS=sealed.num_key_groups,
        RECORD_BYTES=sealed.key_codes.stride(1),
        TILE=min(launch.tile, sealed.key_codes.shape[2]),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        enable_fp_fusion=False,  # so that every operation is rounded as in the reference
    )
