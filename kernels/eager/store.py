"""Write a step's new keys and values: append to open blocks, seal full ones. Torch reference."""

from __future__ import annotations

from torch import Tensor

from ..block_views import LayerBlocks, SealedViews
from ..step_inputs import StepInputs
from .quantize import (
    pack_planes,
    quantize_asymmetric,
    quantize_symmetric,
    split_dim,
)


def store_tokens(records: LayerBlocks, keys: Tensor, values: Tensor, step: StepInputs) -> None:
    """Write one layer's new tokens where the step says.

    `keys` [T, H, key_dim] and `values` [T, H, value_dim] are the step's new tokens. Sealing reads
    open blocks as they were before the step, so it comes first; no block is read after it was
    written, because a step never reuses a block that it frees.
    """
    if len(step.seal_block_ids):
        assert records.sealed is not None
        block_keys = gather_tokens(records.open_keys, keys, step.seal_sources)
        block_values = gather_tokens(records.open_values, values, step.seal_sources)
        seal_keys(records, records.sealed, block_keys, step.seal_block_ids)
        seal_values(records, records.sealed, block_values, step.seal_block_ids)
    append(records.open_keys, keys, step)
    append(records.open_values, values, step)


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


def seal_keys(records: LayerBlocks, sealed: SealedViews, keys: Tensor, block_ids: Tensor) -> None:
    """Quantize keys [S, H, block_size, D] into the blocks `block_ids` [S]."""
    if sealed.key_zero is None:
        sealed.key_codes[block_ids], sealed.key_scale[block_ids] = quantize_symmetric(keys)
        return
    groups = split_dim(keys, sealed.key_zero.shape[2])
    codes, scale, zero = quantize_asymmetric(groups, 3, records.bits, records.key_clip)
    sealed.key_codes[block_ids] = pack_planes(codes.flatten(2, 3), records.bits)
    sealed.key_scale[block_ids] = scale
    sealed.key_zero[block_ids] = zero


def seal_values(
    records: LayerBlocks, sealed: SealedViews, values: Tensor, block_ids: Tensor
) -> None:
    """Quantize values [S, H, block_size, D] into the blocks `block_ids` [S]."""
    if sealed.value_zero is None:
        sealed.value_codes[block_ids], sealed.value_scale[block_ids] = quantize_symmetric(values)
        return
    codes, scale, zero = quantize_asymmetric(values, -1, records.bits, records.value_clip)
    sealed.value_codes[block_ids] = pack_planes(codes, records.bits)
    sealed.value_scale[block_ids] = scale
    sealed.value_zero[block_ids] = zero
