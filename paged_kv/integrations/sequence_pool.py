"""Blocks for the sequences of a batch: how many, and what they hold. Knows sizes, never tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch

from ..blocks.block_manager import BlockManager
from ..blocks.sink_window import SinkWindow
from ..cache.device_memory import usual_kv_memory
from ..cache.kv_cache import PagedKVCache
from ..cache.layer_groups import num_blocks_for
from ..cache.layer_spec import LayerSpec, cache_geometry
from ..models.rotary import Rotation

MAX_BATCH_SIZE: Final = 1 << 10  # sequences, unless a batch begins with more


@dataclass(frozen=True)
class SequencePool:
    cache: PagedKVCache
    manager: BlockManager
    batch_size: int  # that it was made for


@dataclass(frozen=True, kw_only=True)
class PoolSettings:
    """What blocks hold and how many there are; without a number, as a batch needs.

    With a `sink_window` all sequences are windowed; `rotations`, by layer, then bring their sinks
    near.
    """

    layers: tuple[LayerSpec, ...]
    dtype: torch.dtype  # of open blocks
    device: torch.device
    max_cache_len: int
    num_blocks: int | None = None
    sink_window: SinkWindow | None = None
    rotations: Mapping[int, Rotation] | None = None

    def new_pool(self, batch_size: int) -> SequencePool:
        """Blocks for so many sequences; raises `ConfigError` where there is no memory for them."""
        cache = self.new_cache(batch_size)
        manager = cache.new_manager(
            max_num_seqs=max(MAX_BATCH_SIZE, batch_size), max_model_len=self.max_cache_len
        )
        return SequencePool(cache, manager, batch_size)

    def new_cache(self, batch_size: int) -> PagedKVCache:
        num_blocks = self.num_blocks
        if num_blocks is None:
            wanted = batch_size * self._blocks_of_a_sequence()
            most = num_blocks_for(usual_kv_memory(self.device), self.layers, self.dtype)
            num_blocks = min(wanted, most)
        return PagedKVCache(
            self.layers, num_blocks=num_blocks, dtype=self.dtype, device=self.device
        )

    def _blocks_of_a_sequence(self) -> int:
        """A step that seals holds new blocks beside all that it replaces."""
        geometry, longest = cache_geometry(self.layers, self.dtype), self.max_cache_len
        if self.sink_window is not None:
            longest = self.sink_window.fitted(geometry).max_stored(geometry)
        tail = geometry.table_width(geometry.block_size + geometry.min_tail_tokens)
        return geometry.max_blocks(longest) + tail
