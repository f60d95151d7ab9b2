"""What sequences store, read back as dense tensors: for attention that knows no blocks.

Knows a manager's tables and which layer reads how, never which attention reads what they hold.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..blocks.block_manager import BlockManager
from ..blocks.geometry import IntArray, ragged_arange
from ..kernels.eager.read import read_sealed
from ..kernels.stored_places import DenseTokens, StoredPlaces
from .kv_cache import PagedKVCache


@dataclass(frozen=True)
class StoredContext:
    """Where the stored tokens of N sequences lie and belong, for every layer of a cache."""

    places: StoredPlaces
    columns: Tensor  # [N, at least the longest]: of token j of sequence i

    @classmethod
    def of(
        cls, manager: BlockManager, seq_ids: IntArray, columns: IntArray, device: torch.device
    ) -> StoredContext:
        """All that these sequences store, before a step that is reserved."""
        geometry, table = manager.geometry, manager.tables.ids
        lengths, num_sealed = manager.num_computed_tokens[seq_ids], manager.num_sealed[seq_ids]
        rows, tokens = ragged_arange(lengths)
        body_ends = geometry.num_head_tokens + num_sealed * geometry.block_size
        is_open = (tokens < geometry.num_head_tokens) | (tokens >= body_ends[rows])
        rows, tokens = rows[is_open], tokens[is_open]
        places, offsets = np.divmod(tokens, geometry.open_block_size)
        slots = table[seq_ids[rows], places].astype(np.int64) * geometry.open_block_size + offsets
        sealed_rows, indices = ragged_arange(num_sealed)
        sealed_ids = table[seq_ids[sealed_rows], geometry.body_places(indices)].astype(np.int64)
        starts = geometry.num_head_tokens + indices * geometry.block_size
        sealed_tokens = starts[:, None] + np.arange(geometry.block_size)
        arrays = (rows, tokens, slots, sealed_rows, sealed_tokens, sealed_ids)
        found = (torch.from_numpy(array).to(device) for array in arrays)
        return cls(StoredPlaces(*found), torch.from_numpy(columns).to(device))

    def read(self, cache: PagedKVCache, layer: int, keys: Tensor, values: Tensor) -> None:
        """Write what a layer stores into `keys` and `values` [N, H, L, D], in their precision.

        Both are contiguous. Token j of sequence i goes to `columns[i, j]`.
        """
        cache.backend.read_stored(
            cache.records[layer],
            self.places,
            DenseTokens(keys, values, self.columns),
            rotates_values=cache.layers[layer].kv_format.rotates_values,
        )


def read_blocks(
    cache: PagedKVCache, layer: int, block_ids: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Keys and values [S, block_size, H, D] of sealed blocks, dequantized."""
    rotates_values = cache.layers[layer].kv_format.rotates_values
    rotate = cache.backend.rotate if rotates_values else None
    keys, values = read_sealed(cache.records[layer], block_ids, rotate)
    return keys.to(dtype), values.to(dtype)
