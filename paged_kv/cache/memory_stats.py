"""What a cache's memory is used for. Knows counts of blocks and tokens, never what they hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..blocks.block_manager import BlockManager
from ..blocks.geometry import ragged_arange

if TYPE_CHECKING:
    from .kv_cache import PagedKVCache


@dataclass(frozen=True, kw_only=True)
class MemoryStats:
    """Bytes over all layers. `allocated = used + wasted`, `total = allocated + free`.

    Blocks that several sequences share count once. `used` counts the records of sealed blocks and
    the tokens that open blocks hold; the rest of the open blocks' records is `wasted`. `cached`, a
    part of `free`, still holds prefixes that can be hit. Beside the pool are `decode_graphs`, what
    a GPU's captured decode steps take, and the `recurrent_states` of sequences.
    """

    total: int
    free: int
    allocated: int
    used: int
    wasted: int
    head: int
    body: int
    tail: int
    cached: int
    decode_graphs: int = 0
    recurrent_states: int = 0


def measure_memory(cache: PagedKVCache, manager: BlockManager) -> MemoryStats:
    """What the pool of `manager`, which hands out the blocks of `cache`, holds now."""
    geometry, table, seq_ids = cache.geometry, manager.tables.ids, manager.living_seq_ids
    num_head, num_places = geometry.num_head_blocks, geometry.open_blocks_per_block
    lengths, sealed = manager.num_computed_tokens[seq_ids], manager.num_sealed[seq_ids]
    rows, indices = ragged_arange(sealed)
    num_sealed = len(np.unique(table[seq_ids[rows], num_head + indices * num_places]))
    rows, indices = ragged_arange(-(-lengths // geometry.open_block_size) - sealed * num_places)
    places = indices + np.where(indices < num_head, 0, sealed[rows] * num_places)
    open_ids, first = np.unique(table[seq_ids[rows], places], return_index=True)
    rows, places = rows[first], places[first]
    filled = lengths[rows] - places * geometry.open_block_size
    open_tokens = int(filled.clip(max=geometry.open_block_size).sum())
    num_head = int(np.count_nonzero(places < num_head))
    token_bytes = sum(
        layer.num_kv_heads * layer.record_layout(cache.dtype).token_bytes for layer in cache.layers
    )
    allocated = manager.pool.num_allocated * cache.block_bytes
    used = num_sealed * cache.block_bytes + open_tokens * token_bytes
    total = sum(arena.nbytes for arena in cache.arenas)
    num_idle = 0 if manager.prefix_cache is None else manager.prefix_cache.num_idle
    return MemoryStats(
        total=total,
        free=total - allocated,
        allocated=allocated,
        used=used,
        wasted=allocated - used,
        head=num_head * cache.block_bytes,
        body=num_sealed * cache.block_bytes,
        tail=(len(open_ids) - num_head) * cache.block_bytes,
        cached=num_idle * cache.block_bytes,
    )
