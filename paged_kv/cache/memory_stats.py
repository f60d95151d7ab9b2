"""What a cache's memory is used for. Knows counts of blocks and tokens, never what they hold."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, NamedTuple

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

    def times(self, count: int) -> MemoryStats:
        """Of so many processes, each of which has as much."""
        return MemoryStats(**{each.name: count * getattr(self, each.name) for each in fields(self)})


def measure_memory(cache: PagedKVCache, manager: BlockManager) -> MemoryStats:
    """What the pool of `manager`, which hands out the blocks of `cache`, holds now."""
    groups = [measure_group(cache, manager, group) for group in range(len(manager.groups))]
    total = sum(memory.nbytes for memory in cache.memory)
    allocated = manager.pool.num_allocated * cache.block_bytes
    used = sum(each.used for each in groups)
    num_idle = 0 if manager.prefix_cache is None else manager.prefix_cache.num_idle
    return MemoryStats(
        total=total,
        free=total - allocated,
        allocated=allocated,
        used=used,
        wasted=allocated - used,
        head=sum(each.head for each in groups) * cache.block_bytes,
        body=sum(each.body for each in groups) * cache.block_bytes,
        tail=sum(each.tail for each in groups) * cache.block_bytes,
        cached=num_idle * cache.block_bytes,
    )


class GroupUse(NamedTuple):
    """Different blocks of a group's sequences, and bytes of them that are used."""

    head: int
    body: int
    tail: int
    used: int


def measure_group(cache: PagedKVCache, manager: BlockManager, group: int) -> GroupUse:
    geometry, tables, seq_ids = cache.geometry, manager.groups[group], manager.living_seq_ids
    table, num_head, num_places = (
        tables.ids,
        geometry.num_head_blocks,
        geometry.open_blocks_per_block,
    )
    lengths, sealed = tables.num_stored[seq_ids], tables.num_sealed[seq_ids]
    rows, indices = ragged_arange(sealed)
    num_sealed = len(np.unique(table[seq_ids[rows], num_head + indices * num_places]))
    rows, indices = ragged_arange(-(-lengths // geometry.open_block_size) - sealed * num_places)
    places = indices + np.where(indices < num_head, 0, sealed[rows] * num_places)
    open_ids, first = np.unique(table[seq_ids[rows], places], return_index=True)
    rows, places = rows[first], places[first]
    filled = lengths[rows] - places * geometry.open_block_size
    open_tokens = int(filled.clip(max=geometry.open_block_size).sum())
    num_head = int(np.count_nonzero(places < num_head))
    members = [cache.layers[layer] for layer in cache.groups.layers_of(group)]
    layouts = [(layer.num_kv_heads, layer.record_layout(cache.dtype)) for layer in members]
    token_bytes = sum(heads * layout.token_bytes for heads, layout in layouts)
    sealed_bytes = sum(heads * layout.record_bytes for heads, layout in layouts)
    return GroupUse(
        head=num_head,
        body=num_sealed,
        tail=len(open_ids) - num_head,
        used=num_sealed * sealed_bytes + open_tokens * token_bytes,
    )
