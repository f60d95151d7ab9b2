"""What routers are told of links: as blocks of vLLM's size, each with the one before it.

A link (a head block, a sealed block) is found by the hash of its last vLLM block alone, and vLLM
tells of no other: its parent is then a block that no router has heard of. Here its other blocks are
told of with it, and are gone with the last link that begins with them. Knows hashes and events,
never pages.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, Final
from weakref import WeakKeyDictionary

from vllm.distributed.kv_events import BlockRemoved
from vllm.v1.core.kv_cache_utils import (
    generate_block_hash_extra_keys,
    maybe_convert_block_hash,
    to_event_extra_keys,
)


class ToldLinks:
    """What routers have been told of one pool: of all groups of layers.

    Where routers were told that all is gone, the pool has made a new index.
    """

    def __init__(self, pool: Any) -> None:
        self.index: Final = pool.cached_block_hash_to_block
        self.blocks: Final[dict[tuple[int, Any], list[Any]]] = {}  # of a link, by its last block
        self.num_links: Final[Counter[tuple[int, Any]]] = Counter()  # that a block is part of

    def add(self, group: int, blocks: list[Any]) -> None:
        self.blocks[group, blocks[-1]] = blocks
        self.num_links.update((group, block) for block in blocks)

    def remove(self, group: int, last: Any) -> list[Any]:
        """One copy of a link; returns its blocks that are in no other."""
        blocks, gone = self.blocks.get((group, last), [last]), []
        for block in reversed(blocks):
            self.num_links[group, block] -= 1
            if self.num_links[group, block] <= 0:
                del self.num_links[group, block]
                gone.append(block)
        if last in gone:
            self.blocks.pop((group, last), None)
        return gone


_told: Final[WeakKeyDictionary[Any, ToldLinks]] = WeakKeyDictionary()  # by pool


def told_links(pool: Any) -> ToldLinks:
    told = _told.get(pool)
    if told is None or told.index is not pool.cached_block_hash_to_block:
        told = _told[pool] = ToldLinks(pool)
    return told


def tell_whole_link(pool: Any, request: Any, first: int, past: int, block_size: int) -> None:
    """Complete the newest event, of the link of `request` in the places [first, past)."""
    event = pool.kv_event_queue[-1]
    hashes = [maybe_convert_block_hash(one) for one in request.block_hashes[first:past]]
    told_links(pool).add(event.group_idx, hashes)
    extra_keys, media = [], 0
    for start in range(first * block_size, past * block_size, block_size):
        keys, media = generate_block_hash_extra_keys(request, start, start + block_size, media)
        extra_keys.append(keys)
    event.block_hashes = hashes
    event.parent_block_hash = (
        maybe_convert_block_hash(request.block_hashes[first - 1]) if first else None
    )
    event.token_ids = request.all_token_ids[first * block_size : past * block_size]
    event.extra_keys = to_event_extra_keys(extra_keys)


def tell_whole_removals(pool: Any, num_before: int) -> None:
    """Complete the events behind the first `num_before`, where links were evicted."""
    told, events = told_links(pool), pool.kv_event_queue[num_before:]
    for event in events:
        if isinstance(event, BlockRemoved):
            event.block_hashes = [
                block for last in event.block_hashes for block in told.remove(event.group_idx, last)
            ]
    pool.kv_event_queue[num_before:] = [
        event for event in events if not isinstance(event, BlockRemoved) or event.block_hashes
    ]
