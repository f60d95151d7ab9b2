"""Blocks that can be found by what they hold. Knows hashes and block ids, never tokens' places.

A cached block is *idle* while no sequence uses it: it stays until the pool needs it, and then the
least recently used goes first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .events import BlockRemoved, CacheCleared, CacheEvent
from .token_chain import ExtraKey

HASH_BYTES: Final = 32  # of a link; behind them stands which group of layers, but for the first


class PublishedBlock(NamedTuple):
    """A block that can be found since somebody computed it."""

    block_hash: bytes  # as the cache knows it
    block_id: int
    is_sealed: bool
    extra_keys: tuple[ExtraKey, ...]  # of whose tokens it is


class CacheNews:
    """For whoever keeps copies of blocks elsewhere: what has come and what turned out to be bad."""

    def __init__(self) -> None:
        self.published: list[PublishedBlock] = []
        self.withdrawn: list[bytes] = []  # hashes: what the blocks hold may not be trusted


class PrefixCache:
    """An index from hash to block, and the idle blocks in the order in which they are evicted."""

    def __init__(self, num_blocks: int, *, record_events: bool) -> None:
        self.is_cached: NDArray[np.bool_] = np.zeros(num_blocks, dtype=np.bool_)
        self._block_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        self.replaced: list[int] = []  # blocks that gave up their place, for the pool to take
        self._events: list[CacheEvent] | None = [] if record_events else None
        self.news: CacheNews | None = None  # what is new since it was last taken, if anybody asks
        # Hashes that living sequences are about to store, and how many sequences.
        self._pending: dict[bytes, int] = {}
        # Hashes of which somebody wants to know: each is dropped when it is stored, or when those
        # that were about to store it may have given up.
        self.awaited: set[bytes] = set()

    def emptied(self, num_blocks: int) -> PrefixCache:
        """One that knows nothing, in place of this one; its events go on with those of this one."""
        cache = PrefixCache(num_blocks, record_events=self.records_events)
        if self._events is not None:
            cache._events = [*self._events, CacheCleared()]
        cache.news = None if self.news is None else CacheNews()
        return cache

    @property
    def num_cached(self) -> int:
        return len(self._block_of)

    @property
    def num_idle(self) -> int:
        return len(self._idle)

    def find(self, hashes: Sequence[bytes]) -> list[int]:
        """Blocks of the longest cached run at the start of `hashes`."""
        found: list[int] = []
        for block_hash in hashes:
            block_id = self._block_of.get(block_hash)
            if block_id is None:
                break
            found.append(block_id)
        return found

    @property
    def known(self) -> Container[bytes]:
        """The hashes that can be found."""
        return self._block_of

    def take_news(self) -> CacheNews:
        """What is new since the last call, of it the published blocks that are still there."""
        news, block_of = self.news, self._block_of
        self.news = CacheNews()
        if news is None:
            return self.news
        news.published = [n for n in news.published if block_of.get(n.block_hash) == n.block_id]
        return news

    def store(self, block_hash: bytes, block_id: int) -> bool:
        """Make a block findable; False when another block of the same content already is.

        Such a one that nobody uses gives its place up: it would be evicted as what was needed long
        ago, though it was missed just now. It had to be computed again because other blocks of its
        prefix, or of another group of layers, were gone.
        """
        block_of, hash_of = self._block_of, self._hash_of
        if self.awaited:
            self.awaited.discard(block_hash)
        if block_id in hash_of:
            return False
        if block_hash in block_of:
            known = block_of[block_hash]
            if known not in self._idle:
                return False
            del self._idle[known]
            self.withdraw([known])
            self.replaced.append(known)
        block_of[block_hash] = block_id
        hash_of[block_id] = block_hash
        self.is_cached[block_id] = True
        return True

    def expect(self, hashes: Sequence[bytes]) -> None:
        """A sequence is about to store these."""
        pending = self._pending
        for block_hash in hashes:
            pending[block_hash] = pending.get(block_hash, 0) + 1

    def no_longer_expect(self, hashes: Sequence[bytes]) -> None:
        """The sequence ends without having stored these; others may still be about to."""
        self.awaited.difference_update(hashes)
        for block_hash in hashes:
            self.forget_expected(block_hash)

    def forget_expected(self, block_hash: bytes) -> None:
        """One sequence less is about to store this."""
        count = self._pending.pop(block_hash) - 1
        if count:
            self._pending[block_hash] = count

    def is_expected(self, block_hash: bytes) -> bool:
        return block_hash in self._pending

    def rest(self, block_ids: list[int]) -> None:
        """Cached blocks lost their last user; the first of them is evicted first."""
        for block_id in block_ids:
            self._idle[block_id] = None

    def wake(self, block_ids: list[int]) -> None:
        """Idle blocks are used again."""
        for block_id in block_ids:
            del self._idle[block_id]

    def evict(self, count: int) -> list[int]:
        """Forget the `count` least recently used idle blocks and return them."""
        next_idle, block_of, hash_of = self._idle.popitem, self._block_of, self._hash_of
        block_ids = [next_idle(last=False)[0] for _ in range(count)]
        block_hashes = [hash_of.pop(block_id) for block_id in block_ids]
        for block_hash in block_hashes:
            del block_of[block_hash]
        self.is_cached[block_ids] = False
        if self._events is not None:
            self._events += [
                removed(block_hash, block_id)
                for block_hash, block_id in zip(block_hashes, block_ids, strict=True)
            ]
        return block_ids

    def withdraw(self, block_ids: list[int]) -> None:
        """Let nobody find these cached blocks any more, which are not idle."""
        for block_id in block_ids:
            block_hash = self._hash_of.pop(block_id)
            del self._block_of[block_hash]
            self.record(removed(block_hash, block_id))
        self.is_cached[block_ids] = False

    def withdraw_bad(self, block_ids: list[int]) -> None:
        """The same of blocks that hold what may not be trusted."""
        if self.news is not None:
            self.news.withdrawn += [self._hash_of[block_id] for block_id in block_ids]
        self.withdraw(block_ids)

    def clear(self) -> list[int]:
        """Forget everything; returns the blocks, all of which must be idle."""
        assert len(self._idle) == len(self._block_of), "a cached block is in use"
        block_ids = list(self._idle)
        self.is_cached[block_ids] = False
        for index in (self._block_of, self._hash_of, self._idle):
            index.clear()
        self.record(CacheCleared())
        return block_ids

    def record(self, event: CacheEvent) -> None:
        if self._events is not None:
            self._events.append(event)

    @property
    def records_events(self) -> bool:
        return self._events is not None

    def take_events(self) -> list[CacheEvent]:
        """Events since the last call, oldest first."""
        if self._events is None:
            return []
        taken, self._events = self._events, []
        return taken

    def check_integrity(self, ref_counts: NDArray[np.int32]) -> None:
        """Assert that both indices agree and that the idle blocks are the unused ones."""
        assert {b: h for h, b in self._block_of.items()} == self._hash_of
        assert set(np.flatnonzero(self.is_cached).tolist()) == set(self._hash_of)
        unused = {block_id for block_id in self._hash_of if not ref_counts[block_id]}
        assert set(self._idle) == unused


def num_found(hashes: Sequence[bytes], known: Container[bytes]) -> int:
    """How many of `hashes`, from the first on, are known."""
    for index, block_hash in enumerate(hashes):
        if block_hash not in known:
            return index
    return len(hashes)


def num_missing(hashes: Sequence[bytes], known: Container[bytes]) -> int:
    """How many of `hashes` are left from the last one on that is not known; 0 if all are."""
    for index in range(len(hashes) - 1, -1, -1):
        if hashes[index] not in known:
            return len(hashes) - index
    return 0


def removed(block_hash: bytes, block_id: int) -> BlockRemoved:
    """Of a hash as the cache knows it, which tells of the group of layers behind its end."""
    group = block_hash[HASH_BYTES] if len(block_hash) > HASH_BYTES else 0
    return BlockRemoved(block_hash=block_hash[:HASH_BYTES], block_id=block_id, group=group)
