"""The prefix cache as its events tell it, beside those of the reference."""

from __future__ import annotations

from paged_kv.blocks.events import BlockRemoved, BlockStored, CacheCleared, CacheEvent
from paged_kv.blocks.prefix_cache import PrefixCache
from paged_kv.blocks.prefix_sharing import group_hashes
from tests.support.reference_manager import Content, Event, Shape, links


class Mirror:
    """Which block of which group holds what."""

    def __init__(self) -> None:
        self.blocks: dict[tuple[bytes, int], int] = {}  # by hash and group
        # Hashes and contents name each other, whether cached or not.
        self.hash_of: dict[Content, bytes] = {}
        self.content_of: dict[bytes, Content] = {}

    def name(self, content: Content, block_hash: bytes) -> None:
        assert self.hash_of.setdefault(content, block_hash) == block_hash
        assert self.content_of.setdefault(block_hash, content) == content

    def follow(self, taken: list[CacheEvent], expected: list[Event], shape: Shape) -> None:
        """The events are those that the reference expects."""
        assert len(taken) == len(expected)
        for event, (kind, content, block_id, group) in zip(taken, expected, strict=True):
            if isinstance(event, CacheCleared):
                assert kind == "cleared"
                self.blocks.clear()
                continue
            assert content is not None
            assert (event.block_id, event.group) == (block_id, group)
            self.name(content, event.block_hash)
            if isinstance(event, BlockRemoved):
                assert kind == "removed"
                assert self.blocks.pop((event.block_hash, group)) == block_id
                continue
            assert isinstance(event, BlockStored)
            assert kind == "stored"
            root, tokens = content
            start = len(tokens) - len(event.token_ids)
            assert [link.end for link in links(shape, len(tokens))][-2:] in (
                [len(tokens)], [start, len(tokens)]
            )  # fmt: skip
            assert event.token_ids == tokens[start:]
            self.name((root, tokens[:start]), event.parent_hash)
            assert (event.block_hash, group) not in self.blocks
            self.blocks[event.block_hash, group] = event.block_id

    def check(self, cache: PrefixCache) -> None:
        """The cache is what its events told."""
        assert cache.num_cached == len(self.blocks)
        for (block_hash, group), block_id in self.blocks.items():
            assert cache.find(group_hashes([block_hash], group)) == [block_id]
