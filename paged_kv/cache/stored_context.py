"""What sequences store, read back as dense tensors: for attention that knows no blocks.

Knows a manager's tables and one layer's blocks, never which attention reads what they hold.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..blocks.block_manager import BlockManager
from ..blocks.geometry import BlockGeometry, BlockIds, IntArray, ragged_arange
from ..kernels.eager.quantize import dequantize_keys, dequantize_values
from .kv_cache import PagedKVCache, Step


@dataclass(frozen=True)
class StoredContext:
    """Where the stored tokens of N sequences lie, for every layer of a cache."""

    open_rows: Tensor  # [O] index among the N, of tokens in open blocks
    open_tokens: Tensor  # [O] their places in their sequences
    open_slots: Tensor  # [O] block_id * open_block_size + row
    sealed_rows: Tensor  # [S] index among the N, of sealed blocks
    sealed_tokens: Tensor  # [S, block_size] places of their tokens
    sealed_ids: Tensor  # [S]

    @classmethod
    def of(cls, manager: BlockManager, seq_ids: IntArray, device: torch.device) -> StoredContext:
        """All that these sequences store, before a step that is reserved."""
        lengths, num_sealed = manager.num_computed_tokens[seq_ids], manager.num_sealed[seq_ids]
        table = manager.tables.ids[seq_ids]
        return cls.of_table(manager.geometry, lengths, num_sealed, table, device)

    @classmethod
    def of_step(cls, cache: PagedKVCache, step: Step) -> list[StoredContext]:
        """What each sequence of a step stored before it: N of them, of one sequence each."""
        lengths = step.source.context_lens
        num_sealed = step.inputs.num_sealed.cpu().numpy()
        table = step.inputs.block_table.cpu().numpy()
        rows = [slice(row, row + 1) for row in range(len(lengths))]
        return [
            cls.of_table(cache.geometry, lengths[row], num_sealed[row], table[row], cache.device)
            for row in rows
        ]

    @classmethod
    def of_table(
        cls,
        geometry: BlockGeometry,
        lengths: IntArray,
        num_sealed: IntArray,
        table: BlockIds | IntArray,
        device: torch.device,
    ) -> StoredContext:
        """N sequences with so many tokens [N], body blocks [N] and block ids [N, W]."""
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
        return cls(*(torch.from_numpy(array).to(device) for array in arrays))

    def joined(
        self,
        cache: PagedKVCache,
        layer: int,
        key: Tensor,
        value: Tensor,
        columns: Tensor,
        length: int,
    ) -> tuple[Tensor, Tensor]:
        """What a layer stores, as by `read`, and behind `length` positions new ones."""
        keys, values = (
            new.new_zeros(*new.shape[:2], length + new.shape[2], new.shape[3])
            for new in (key, value)
        )
        self.read(cache, layer, keys, values, columns)
        keys[:, :, length:], values[:, :, length:] = key, value
        return keys, values

    def read(
        self, cache: PagedKVCache, layer: int, keys: Tensor, values: Tensor, columns: Tensor
    ) -> None:
        """Write what a layer stores into `keys` and `values` [N, H, L, D], in their precision.

        Token j of sequence i goes to `columns[i, j]`, [N, at least the longest].
        """
        blocks, size = cache.records[layer], cache.geometry.open_block_size
        open_ids, offsets = self.open_slots // size, self.open_slots % size
        open_columns = columns[self.open_rows, self.open_tokens]
        open_keys = blocks.open_keys[open_ids, :, offsets].to(keys.dtype)
        open_values = blocks.open_values[open_ids, :, offsets].to(values.dtype)
        keys[self.open_rows, :, open_columns] = open_keys
        values[self.open_rows, :, open_columns] = as_given(cache, layer, open_values)
        if len(self.sealed_ids):
            sealed_keys, sealed_values = read_sealed(cache, layer, self.sealed_ids, keys.dtype)
            rows = self.sealed_rows[:, None].expand_as(self.sealed_tokens)
            sealed_columns = columns[rows, self.sealed_tokens]
            keys[rows, :, sealed_columns] = sealed_keys
            values[rows, :, sealed_columns] = sealed_values


def read_sealed(
    cache: PagedKVCache, layer: int, block_ids: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Keys and values [S, block_size, H, D] of sealed blocks, dequantized."""
    blocks = cache.records[layer]
    assert blocks.sealed is not None
    sealed, exact = blocks.sealed.at(block_ids), torch.float32
    keys = dequantize_keys(sealed, blocks.key_bits, blocks.wide_channels, exact)
    values = dequantize_values(sealed, blocks.value_bits, exact)
    values = as_given(cache, layer, values)
    return keys.transpose(1, 2).to(dtype), values.transpose(1, 2).to(dtype)


def as_given(cache: PagedKVCache, layer: int, values: Tensor) -> Tensor:
    """Values [..., D] as they were before they were stored, where the format rotates them."""
    if not cache.layers[layer].kv_format.rotates_values or not values.numel():
        return values
    return cache.backend.rotate(values)
