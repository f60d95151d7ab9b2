"""Write a step's new keys and values by torch's operations: append to open blocks, seal full ones.

Knows a layer's blocks and a step's slots, nothing of sequences.
"""

from __future__ import annotations

from torch import Tensor

from ..block_views import LayerBlocks, SealedViews
from ..new_tokens import NewTokens
from ..step_inputs import StepInputs
from .quantize import (
    pack_planes,
    quantize_asymmetric,
    quantize_symmetric,
    split_dim,
)


def store_tokens(new: NewTokens, layer: LayerBlocks, step: StepInputs) -> None:
    """Write one layer's new keys and values where the step says.

    Sealing reads open blocks as they were before the step, so it comes first; no block is read
    after it was written, because a step never reuses a block that it frees.
    """
    if len(step.seal_block_ids):
        assert layer.sealed is not None
        block_keys = gather_tokens(layer.open_keys, new.key, step.seal_sources)
        block_values = gather_tokens(layer.open_values, new.value, step.seal_sources)
        seal_keys(layer, layer.sealed, block_keys, step.seal_block_ids)
        seal_values(layer, layer.sealed, block_values, step.seal_block_ids)
    append(layer.open_keys, new.key, step)
    append(layer.open_values, new.value, step)


def append(open_blocks: Tensor, new_tokens: Tensor, step: StepInputs) -> None:
    """Copy new tokens [T, H, D] into their slots of the open blocks [NB, H, open_block_size, D]."""
    block_ids = step.stored_slots // step.open_block_size
    offsets = step.stored_slots % step.open_block_size
    open_blocks[block_ids, :, offsets] = new_tokens[step.stored_tokens].to(open_blocks.dtype)


def gather_tokens(open_blocks: Tensor, new_tokens: Tensor, sources: Tensor) -> Tensor:
    """Collect [S, H, block_size, D] from open slots (source >= 0) and new tokens (~index)."""
    num_blocks, block_size = sources.shape
    sources = sources.reshape(-1)
    is_new = sources < 0
    # New tokens are rounded to the stored precision, so that a sealed block does not depend on
    # whether its tokens passed through an open block.
    tokens = new_tokens[(~sources).clamp(min=0)].to(open_blocks.dtype)
    slots = sources.clamp(min=0)
    open_block_size = open_blocks.shape[2]
    stored = open_blocks[slots // open_block_size, :, slots % open_block_size]
    tokens[~is_new] = stored[~is_new]
    return tokens.reshape(num_blocks, block_size, *tokens.shape[1:]).transpose(1, 2)


def seal_keys(layer: LayerBlocks, sealed: SealedViews, keys: Tensor, block_ids: Tensor) -> None:
    """Quantize keys [S, H, block_size, D] into the blocks `block_ids` [S]."""
    if sealed.key_zero is None:
        sealed.key_codes[block_ids], sealed.key_scale[block_ids] = quantize_symmetric(keys)
        return
    groups = split_dim(keys, sealed.key_zero.shape[2])
    codes, scale, zero = quantize_asymmetric(groups, 3, layer.bits, layer.key_clip)
    sealed.key_codes[block_ids] = pack_planes(codes.flatten(2, 3), layer.bits)
    sealed.key_scale[block_ids] = scale
    sealed.key_zero[block_ids] = zero


def seal_values(layer: LayerBlocks, sealed: SealedViews, values: Tensor, block_ids: Tensor) -> None:
    """Quantize values [S, H, block_size, D] into the blocks `block_ids` [S]."""
    if sealed.value_zero is None:
        sealed.value_codes[block_ids], sealed.value_scale[block_ids] = quantize_symmetric(values)
        return
    codes, scale, zero = quantize_asymmetric(values, -1, layer.bits, layer.value_clip)
    sealed.value_codes[block_ids] = pack_planes(codes, layer.bits)
    sealed.value_scale[block_ids] = scale
    sealed.value_zero[block_ids] = zero
