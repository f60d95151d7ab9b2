"""What sequences store, read back as dense tensors: for attention that knows no blocks.

Knows a manager's tables and which layer reads how, never which attention reads what they hold.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ..blocks.block_manager import BlockManager
from ..blocks.geometry import BlockGeometry, BlockIds, IntArray, ragged_arange
from ..kernels.eager.read import read_sealed, read_small
from ..kernels.full_precision import places_in_full_precision
from ..kernels.stored_places import DenseTokens, StoredPlaces
from .kv_cache import PagedKVCache, Step


@dataclass(frozen=True)
class StoredContext:
    """Where the stored tokens of N sequences lie and belong, for every layer of a cache."""

    places: StoredPlaces
    columns: Tensor  # [N, at least the longest]: of token j of sequence i
    open_block_size: int

    @cached_property
    def _small_places(self) -> StoredPlaces:
        """The same for layers in full precision where others seal."""
        return places_in_full_precision(self.places, self.open_block_size)

    @classmethod
    def of(
        cls, manager: BlockManager, seq_ids: IntArray, columns: IntArray, device: torch.device
    ) -> StoredContext:
        """All that these sequences store, before a step that is reserved."""
        lengths, num_sealed = manager.num_computed_tokens[seq_ids], manager.num_sealed[seq_ids]
        table = manager.tables.ids[seq_ids]
        return cls.of_table(manager.geometry, lengths, num_sealed, table, columns, device)

    @classmethod
    def of_step(cls, cache: PagedKVCache, step: Step) -> list[StoredContext]:
        """What each sequence of a step stored before it: N of them, of one sequence each."""
        lengths = step.source.context_lens
        num_sealed = step.inputs.num_sealed.cpu().numpy()
        table = step.inputs.block_table.cpu().numpy()
        rows = [slice(row, row + 1) for row in range(len(lengths))]
        return [
            cls.of_table(
                cache.geometry,
                lengths[row],
                num_sealed[row],
                table[row],
                np.arange(lengths[row].item())[None],
                cache.device,
            )
            for row in rows
        ]

    @classmethod
    def of_table(
        cls,
        geometry: BlockGeometry,
        lengths: IntArray,
        num_sealed: IntArray,
        table: BlockIds | IntArray,
        columns: IntArray,
        device: torch.device,
    ) -> StoredContext:
        """N sequences with so many tokens [N], body blocks [N] and block ids [N, W].

        Token j of sequence i belongs at `columns[i, j]`.
        """
        rows, tokens = ragged_arange(lengths)
        body_ends = geometry.num_head_tokens + num_sealed * geometry.block_size
        is_open = (tokens < geometry.num_head_tokens) | (tokens >= body_ends[rows])
        rows, tokens = rows[is_open], tokens[is_open]
        places, offsets = np.divmod(tokens, geometry.open_block_size)
        slots = table[rows, places].astype(np.int64) * geometry.open_block_size + offsets
        sealed_rows, indices = ragged_arange(num_sealed)
        sealed_ids = table[sealed_rows, geometry.body_places(indices)].astype(np.int64)
        starts = geometry.num_head_tokens + indices * geometry.block_size
        sealed_tokens = starts[:, None] + np.arange(geometry.block_size)
        arrays = (rows, tokens, slots, sealed_rows, sealed_tokens, sealed_ids)
        found = (torch.from_numpy(array).to(device) for array in arrays)
        columns_there = torch.from_numpy(columns).to(device)
        return cls(StoredPlaces(*found), columns_there, geometry.open_block_size)

    def joined(
        self,
        cache: PagedKVCache,
        layer: int,
        new: tuple[Tensor, Tensor],
        length: int,
        *,
        is_padded: bool,
    ) -> tuple[Tensor, Tensor]:
        """What a layer stores in `length` columns, and behind them new keys and values.

        With `is_padded` some of the columns are nobody's, and zero.
        """
        keys, values = (
            each.new_empty(*each.shape[:2], length + each.shape[2], each.shape[3]) for each in new
        )
        for whole, each in zip((keys, values), new, strict=True):
            if is_padded:
                whole[:, :, :length] = 0
            whole[:, :, length:] = each
        self.read(cache, layer, keys, values)
        return keys, values

    def read(self, cache: PagedKVCache, layer: int, keys: Tensor, values: Tensor) -> None:
        """Write what a layer stores into `keys` and `values` [N, H, L, D], in their precision.

        Both are contiguous. Token j of sequence i goes to `columns[i, j]`.
        """
        is_small = cache.has_small_blocks(cache.layers[layer])
        cache.backend.read_stored(
            cache.records[layer],
            self._small_places if is_small else self.places,
            DenseTokens(keys, values, self.columns),
            rotates_values=cache.layers[layer].kv_format.rotates_values,
        )


def read_blocks(
    cache: PagedKVCache, layer: int, block_ids: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Keys and values [S, block_size, H, D] of sealed blocks, dequantized."""
    if cache.has_small_blocks(cache.layers[layer]):
        keys, values = read_small(cache.records[layer], block_ids, cache.geometry.block_size)
    else:
        rotates_values = cache.layers[layer].kv_format.rotates_values
        rotate = cache.backend.rotate if rotates_values else None
        keys, values = read_sealed(cache.records[layer], block_ids, rotate)
    return keys.to(dtype), values.to(dtype)
