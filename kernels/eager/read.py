"""Read stored tokens back as dense tensors: the torch reference. Knows one layer's blocks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..block_views import LayerBlocks
from ..stored_places import DenseTokens, StoredPlaces
from .quantize import dequantize_keys, dequantize_values

Rotate = Callable[[Tensor], Tensor]


def read_stored(
    layer: LayerBlocks, places: StoredPlaces, target: DenseTokens, rotate: Rotate | None
) -> None:
    """Write all that these places hold; `rotate` is what values are turned back by, if they are."""
    keys, values, columns = target
    size = layer.open_keys.shape[2]
    ids, offsets = places.open_slots // size, places.open_slots % size
    open_keys, open_values = layer.open_keys[ids, :, offsets], layer.open_values[ids, :, offsets]
    if rotate is not None and open_values.numel():
        open_values = rotate(open_values.float())
    open_columns = columns[places.open_rows, places.open_tokens]
    keys[places.open_rows, :, open_columns] = open_keys.to(keys.dtype)
    values[places.open_rows, :, open_columns] = open_values.to(values.dtype)
    if len(places.sealed_ids):
        sealed_keys, sealed_values = read_sealed(layer, places.sealed_ids, rotate)
        rows = places.sealed_rows[:, None].expand_as(places.sealed_tokens)
        sealed_columns = columns[rows, places.sealed_tokens]
        keys[rows, :, sealed_columns] = sealed_keys.to(keys.dtype)
        values[rows, :, sealed_columns] = sealed_values.to(values.dtype)


def read_sealed(
    layer: LayerBlocks, block_ids: Tensor, rotate: Rotate | None
) -> tuple[Tensor, Tensor]:
    """Keys and values [S, block_size, H, D] of sealed blocks, dequantized, float32."""
    assert layer.sealed is not None
    sealed = layer.sealed.at(block_ids)
    keys = dequantize_keys(sealed, layer.key_bits, layer.wide_channels, torch.float32)
    values = dequantize_values(sealed, layer.value_bits, torch.float32)
    if rotate is not None and values.numel():
        values = rotate(values)
    return keys.transpose(1, 2), values.transpose(1, 2)


def read_small(layer: LayerBlocks, block_ids: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Keys and values [S, block_size, H, D] of blocks that others seal, see `full_precision`."""
    size = layer.open_keys.shape[2]
    parts = torch.arange(block_size // size, device=block_ids.device)
    ids = block_ids[:, None] * len(parts) + parts
    keys, values = (
        blocks[ids].transpose(2, 3).flatten(1, 2) for blocks in (layer.open_keys, layer.open_values)
    )
    return keys, values
