"""Write a step's new keys and values by torch's operations: append to open blocks, seal full ones.

Knows a layer's blocks and a step's slots, nothing of sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..block_views import LayerBlocks, SealedViews
from ..code_bits import WIDE_BITS, lower_bits, upper_bits
from ..new_tokens import NewTokens
from ..step_inputs import StepInputs
from .quantize import (
    pack_planes,
    quantize_asymmetric,
    quantize_centred,
    quantize_keys,
    quantize_symmetric,
)


def store_tokens(new: NewTokens, layer: LayerBlocks, step: StepInputs) -> None:
    """Write one layer's new keys and values where the step says.

    Sealing reads open blocks as they were before the step, so it comes first; no block is read
    after it was written, because a step never reuses a block that it frees.
    """
    if len(step.seal_block_ids) and layer.sealed is None:
        gather_blocks(new, layer, step)
    elif len(step.seal_block_ids) and layer.sealed is not None:
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


def gather_blocks(new: NewTokens, layer: LayerBlocks, step: StepInputs) -> None:
    """Move tokens together that others seal: of steps as `kernels.full_precision` makes them."""
    size = step.open_block_size
    parts = torch.arange(step.seal_sources.shape[1] // size, device=step.device)
    ids = (step.seal_block_ids[:, None] + parts).flatten()
    for blocks, tokens in ((layer.open_keys, new.key), (layer.open_values, new.value)):
        gathered = gather_tokens(blocks, tokens, step.seal_sources)  # [S, H, block_size, D]
        by_token = gathered.transpose(1, 2).reshape(len(ids), size, *blocks.shape[1::2])
        blocks[ids] = by_token.transpose(1, 2)


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
    # Without masks, for which a GPU would have to be waited for.
    tokens = torch.where(is_new[:, None, None], tokens, stored)
    return tokens.reshape(num_blocks, block_size, *tokens.shape[1:]).transpose(1, 2)


def seal_keys(layer: LayerBlocks, sealed: SealedViews, keys: Tensor, block_ids: Tensor) -> None:
    """Quantize keys [S, H, block_size, D] into the blocks `block_ids` [S]."""
    if sealed.key_zero is None:
        sealed.key_codes[block_ids], sealed.key_scale[block_ids] = quantize_symmetric(keys)
        return
    bits, wide_channels, is_wide = layer.key_bits, layer.wide_channels, None
    if wide_channels is not None:
        is_wide = torch.zeros(keys.shape[1::2], dtype=torch.bool, device=keys.device)
        is_wide.scatter_(1, wide_channels, value=True)
    clips = layer.key_clip, layer.wide_key_clip
    codes, scale, zero = quantize_keys(
        keys, sealed.num_key_groups, bits, clips, is_wide, layer.feedback
    )
    if sealed.wide_codes is not None:
        assert wide_channels is not None
        wide = codes.gather(-1, wide_channels[:, None].expand(*codes.shape[:3], -1))
        sealed.wide_codes[block_ids] = pack_planes(wide >> bits, WIDE_BITS)
    lower = codes & (1 << bits) - 1
    sealed.key_codes[block_ids] = pack_planes(lower, bits)
    sealed.key_scale[block_ids] = scale
    sealed.key_zero[block_ids] = zero


def seal_values(layer: LayerBlocks, sealed: SealedViews, values: Tensor, block_ids: Tensor) -> None:
    """Quantize values [S, H, block_size, D] into the blocks `block_ids` [S]."""
    bits, clip = layer.value_bits, layer.value_clip
    if sealed.value_zero is not None:
        codes, scale, sealed.value_zero[block_ids] = quantize_asymmetric(values, -1, bits, clip)
    elif bits == 8:
        codes, scale = quantize_symmetric(values)
    else:
        codes, scale = quantize_centred(values, bits, clip)
    lower = lower_bits(bits)
    if sealed.upper_value_codes is not None:
        sealed.upper_value_codes[block_ids] = pack_planes(codes >> lower, upper_bits(bits))
    sealed.value_codes[block_ids] = pack_planes(codes & (1 << lower) - 1, lower)
    sealed.value_scale[block_ids] = scale
