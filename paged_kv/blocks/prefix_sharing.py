"""Which sequences share blocks that others computed, or offer theirs. Knows hashes, never bytes.

Groups of layers that let go of blocks need those alone that their next token sees, and the head: a
prefix can be shared where every group finds what it needs. `PrefixSharing` does it through a
`PrefixCache`; `NoPrefixSharing` is what a manager has instead where nothing is shared, and does
nothing.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np

from .block_pool import BlockPool
from .block_tables import BlockTables, StoredLengths
from .events import BlockStored, CacheEvent
from .geometry import NO_BLOCKS, BlockGeometry, BlockIds, IntArray
from .growth import find_complete_links
from .prefix_cache import PrefixCache, PublishedBlock, num_found, num_missing
from .retention import UNLIMITED
from .sequences import Sequences
from .token_chain import TokenChain

# Behind a hash; made once, because a step adds thousands of them.
GROUP_MARKS: Final = (b"", *(bytes([group]) for group in range(1, 256)))


class PrefixMatch(NamedTuple):
    """What the prefix cache has of a sequence that is not there yet."""

    num_tokens: int
    num_blocks: int  # of all groups of layers
    num_idle_blocks: int  # of these, blocks that count as free until they are shared
    lengths: tuple[StoredLengths, ...]  # what each group would store
    next_link: bytes | None  # the hash of the first that is missing
    is_pending: bool  # a living sequence is about to store it


class WantedBlock(NamedTuple):
    """A block that the prefix cache lacks, and that a sequence would share if it were there."""

    block_hash: bytes  # as the cache knows it
    group: int
    link: int
    is_sealed: bool


@dataclass(kw_only=True)
class PrefixStatistics:
    """Counted since the manager was made: a request's tokens when it starts, hit or not."""

    num_queries: int = 0
    num_query_tokens: int = 0
    num_hit_tokens: int = 0

    @property
    def hit_rate(self) -> float:
        return self.num_hit_tokens / max(self.num_query_tokens, 1)


class NoPrefixSharing:
    """Sequences that share blocks only with their forks."""

    cache: PrefixCache | None = None
    num_cached: int = 0  # blocks that can be found
    # Open blocks that end after so many tokens or before are links; those of the body are sealed.
    last_open_link: int = -1

    def __init__(self, sequences: Sequences, num_groups: int = 1) -> None:
        self.statistics: PrefixStatistics = PrefixStatistics()
        self._nothing = (StoredLengths(0, 0),) * num_groups
        # Tokens that each sequence may have computed.
        self.computable_tokens: IntArray = sequences.state["length_limit"]

    def hash(self, tokens: TokenChain) -> None:
        """Hash the links that a new sequence of these tokens may take over."""

    def find(self, tokens: TokenChain) -> PrefixMatch:
        """What `share` would take over."""
        return PrefixMatch(0, 0, 0, self._nothing, next_link=None, is_pending=False)

    def share(self, seq_id: int, tokens: TokenChain) -> None:
        """Fill a new sequence with the cached blocks of its tokens' first links."""

    def follow(self, seq_id: int, tokens: TokenChain, num_published: int) -> None:
        """Keep hashing a new sequence's tokens, hashed so far by `hash`.

        So many of its links can be found already.
        """

    def tokens_came(self, seq_ids: IntArray) -> None:
        """Sequences were told tokens beyond their `token_capacity`."""

    def forked(self, child: int) -> None:
        """A sequence is the copy of another: others may wait for its links too."""

    def ended(self, seq_id: int) -> None:
        """A sequence is about to be forgotten."""

    def publish(self, tables: BlockTables, seq_ids: IntArray) -> None:
        """Make the blocks of links that are complete by now findable, in one group of layers."""

    def stop(self, tables: BlockTables, seq_ids: IntArray) -> None:
        """These sequences' K/V in a group depend on what they let go: nobody finds them any more.
        What others wait for will not come."""

    def withdraw(self, seq_ids: IntArray) -> None:
        """Nobody finds the blocks of these sequences any more, nor any that they store later."""

    def lacked(self, tokens: TokenChain) -> list[bytes]:
        """Hashes of links that a new sequence of these tokens could share, and nobody can find."""
        return []

    def wanted(self, tokens: TokenChain, elsewhere: Container[bytes]) -> list[WantedBlock]:
        """What the cache lacks of the longest prefix that it and `elsewhere` could serve."""
        return []

    def hold(self, tokens: TokenChain, wanted: Sequence[WantedBlock]) -> list[BlockIds]:
        """The cached blocks, of each group, that go with those that are wanted."""
        return []

    def publish_copies(
        self, tokens: TokenChain, wanted: Sequence[WantedBlock], block_ids: BlockIds
    ) -> None:
        """Make blocks, which hold what is wanted, findable."""

    def reset(self) -> None:
        """Forget all cached blocks, of which no sequence uses any."""

    def take_events(self) -> list[CacheEvent]:
        """What was stored in and removed from the cache since the last call."""
        return []

    def check_integrity(self) -> None:
        """Assert that the hashes of living sequences are those of their tokens."""


class PrefixSharing(NoPrefixSharing):
    """Blocks of complete links are findable by their tokens, all of which have to be known."""

    cache: PrefixCache

    def __init__(
        self,
        sequences: Sequences,
        groups: tuple[BlockTables, ...],
        pool: BlockPool,
        cache: PrefixCache,
    ) -> None:
        super().__init__(sequences, len(groups))
        self.computable_tokens: IntArray = sequences.num_tokens
        geometry = sequences.geometry
        self.geometry: BlockGeometry = geometry
        self.last_open_link: int = geometry.num_head_tokens if geometry.seals else UNLIMITED
        self.cache = cache
        self._sequences = sequences
        self._groups = groups
        self._pool = pool
        self._num_published: IntArray = groups[0].state["num_published"]
        self._num_expected: IntArray = sequences.state["num_expected"]
        self._link_limits: IntArray = sequences.state["link_limit"]
        self._complete_links: IntArray = np.empty((1024, 3), dtype=np.int64)

    @property
    def num_cached(self) -> int:  # type: ignore[override]
        return self.cache.num_cached

    # -- sequences that begin -------------------------------------------------------------------

    def hash(self, tokens: TokenChain) -> None:
        tokens.hash_links(self.geometry, tokens.num_shareable_links(self.geometry))

    def find(self, tokens: TokenChain) -> PrefixMatch:
        num_links, block_ids = self._find_links(tokens)
        limit = tokens.num_shareable_links(self.geometry)
        next_link = tokens.hashes[num_links] if num_links < limit else None
        ids = np.concatenate([NO_BLOCKS, *block_ids])
        return PrefixMatch(
            num_tokens=self.geometry.link_end(num_links),
            num_blocks=len(ids),
            num_idle_blocks=int(np.count_nonzero(self._pool.ref_counts[ids] == 0)),
            lengths=tuple(self._lengths(tables, tokens, num_links) for tables in self._groups),
            next_link=next_link,
            is_pending=next_link is not None and self.cache.is_expected(next_link),
        )

    def share(self, seq_id: int, tokens: TokenChain) -> None:
        num_links, block_ids = self._find_links(tokens)
        if num_links:
            for tables, ids in zip(self._groups, block_ids, strict=True):
                self._pool.share(ids)
                tables.place(seq_id, self._lengths(tables, tokens, num_links), ids)
        self.follow(seq_id, tokens, num_links)
        statistics = self.statistics
        statistics.num_queries += 1
        statistics.num_query_tokens += len(tokens.token_ids)
        statistics.num_hit_tokens += self.geometry.link_end(num_links)

    def follow(self, seq_id: int, tokens: TokenChain, num_published: int) -> None:
        limit = min(tokens.num_shareable_links(self.geometry), int(self._link_limits[seq_id]))
        if not num_published and self._groups[0].state[seq_id]["num_evicted_tokens"]:
            limit = 0  # it was placed without its first links
        for tables in self._groups:
            tables.state[seq_id]["num_published"] = num_published
        self._num_expected[seq_id] = limit
        self.cache.expect(tokens.hashes[num_published:limit])
        capacity = self._tokens_before_link(len(tokens.hashes), int(self._link_limits[seq_id]))
        length_limit = int(self._sequences.state[seq_id]["length_limit"])
        self._sequences.token_capacity[seq_id] = min(length_limit, capacity)

    def _find_links(self, tokens: TokenChain) -> tuple[int, list[BlockIds]]:
        """How many first links a sequence may share, and each group's cached blocks of those that
        it needs: the longest prefix that all groups can serve."""
        num_links = self._num_servable(tokens, self.cache.known)
        return num_links, [
            np.array(self.cache.find(self._needed(tables, tokens, num_links)), dtype=np.int32)
            for tables in self._groups
        ]

    def _num_servable(self, tokens: TokenChain, known: Container[bytes]) -> int:
        """How many first links a sequence may share where all that is known can be found."""
        limit = tokens.num_shareable_links(self.geometry)
        tokens.hash_links(self.geometry, limit)
        num_links, before = limit, -1
        while num_links != before:
            before = num_links
            for tables in self._groups:
                num_links = self._servable(tables, tokens, num_links, known)
        return num_links

    def _servable(
        self, tables: BlockTables, tokens: TokenChain, num_links: int, known: Container[bytes]
    ) -> int:
        """The most first links, up to so many, of which what a group needs is known."""
        if tables.retention.keeps_all:
            return num_found(group_hashes(tokens.hashes[:num_links], tables.group), known)
        num_head = self.geometry.num_head_blocks
        while num_links:
            needed = self._needed(tables, tokens, num_links)
            num_left = num_missing(needed, known)
            if not num_left:
                break
            # Whoever wants fewer links, but this one among them, needs it too.
            index = len(needed) - num_left
            num_links = index if index < num_head else num_links - num_left
        return num_links

    def _needed_links(self, tables: BlockTables, tokens: TokenChain, num_links: int) -> list[int]:
        """Those of a prefix's first links that a group stores."""
        num_head, first = self._gap(tables, tokens, num_links)
        return [*range(num_head), *range(first, num_links)]

    def _needed(self, tables: BlockTables, tokens: TokenChain, num_links: int) -> list[bytes]:
        """The same, as the cache knows them."""
        (num_head, first), hashes = self._gap(tables, tokens, num_links), tokens.hashes
        return group_hashes(hashes[:num_head] + hashes[first:num_links], tables.group)

    def _gap(self, tables: BlockTables, tokens: TokenChain, num_links: int) -> tuple[int, int]:
        """Between which of a prefix's first links a group has let go of some: how many come before,
        and the first behind."""
        gone = self._lengths(tables, tokens, num_links).num_evicted // self.geometry.block_size
        num_head = self.geometry.num_head_blocks if gone else 0
        return num_head, num_head + gone

    def _lengths(self, tables: BlockTables, tokens: TokenChain, num_links: int) -> StoredLengths:
        """What a group stores of a sequence's first links."""
        geometry, num_evicted = self.geometry, 0
        num_tokens = geometry.link_end(num_links)
        if not tables.retention.is_bounded_by(tokens.sink_window):
            num_evicted = tables.retention.num_evicted(geometry, num_tokens)
        num_sealed = 0
        if geometry.seals:
            num_sealed = max(num_links - geometry.num_head_blocks, 0)
            num_sealed -= num_evicted // geometry.block_size
        return StoredLengths(num_tokens - num_evicted, num_sealed, num_evicted)

    # -- sequences that grow --------------------------------------------------------------------

    def tokens_came(self, seq_ids: IntArray) -> None:
        geometry, sequences, chains = self.geometry, self._sequences, self._sequences.chains
        lengths = sequences.num_tokens[seq_ids].tolist()
        limits = self._link_limits[seq_ids].tolist()
        capacities = []
        for seq_id, length, limit in zip(seq_ids.tolist(), lengths, limits, strict=True):
            chain = chains[seq_id]
            assert chain is not None
            num_links = min(geometry.num_links(length), limit)
            chain.hash_links(geometry, num_links)
            capacities.append(self._tokens_before_link(num_links, limit))
        length_limits = sequences.state["length_limit"][seq_ids]
        sequences.token_capacity[seq_ids] = np.minimum(length_limits, capacities)

    def _tokens_before_link(self, num_links: int, limit: int) -> int:
        """Tokens that complete no link after so many, of which no more than `limit` count."""
        return UNLIMITED if num_links >= limit else self.geometry.link_end(num_links + 1) - 1

    def forked(self, child: int) -> None:
        self.cache.expect(self._unpublished_hashes(child))

    def ended(self, seq_id: int) -> None:
        self.cache.no_longer_expect(self._unpublished_hashes(seq_id))

    def stop(self, tables: BlockTables, seq_ids: IntArray) -> None:
        for seq_id in seq_ids.tolist():
            self.cache.no_longer_expect(self._unpublished_hashes(seq_id))
            self._num_expected[seq_id] = 0
        tables.state["link_limit"][seq_ids] = tables.state["num_published"][seq_ids]

    def withdraw(self, seq_ids: IntArray) -> None:
        for tables in self._groups:
            self.stop(tables, seq_ids)
            for seq_id in seq_ids.tolist():
                block_ids = tables.block_ids(seq_id)
                self.cache.withdraw_bad(block_ids[self.cache.is_cached[block_ids]].tolist())

    def _unpublished_hashes(self, seq_id: int) -> list[bytes]:
        """Of the links that others may wait for."""
        published, expected = self._num_published.item(seq_id), self._num_expected.item(seq_id)
        return self._sequences.chain(seq_id).hashes[published:expected]

    # -- blocks that are complete ---------------------------------------------------------------

    def publish(self, tables: BlockTables, seq_ids: IntArray) -> None:
        sequences, cache, found = self._sequences, self.cache, self._complete_links
        chains, mark = sequences.chains, GROUP_MARKS[tables.group]
        store, records_events, news = cache.store, cache.records_events, cache.news
        num_expected = self._num_expected.data  # reads one element faster than numpy does
        while True:
            num_links = find_complete_links(
                seq_ids,
                tables.num_stored,
                sequences.num_tokens,
                tables.num_sealed,
                tables.state,
                tables.ids,
                self.geometry.sizes,
                found,
            )
            for seq_id, link, block_id in found[:num_links].tolist():
                chain = chains[seq_id]
                assert chain is not None
                if link == len(chain.hashes):
                    chain.hash_links(self.geometry, link + 1)
                block_hash = chain.hashes[link]
                if mark:
                    block_hash += mark
                elif link < num_expected[seq_id]:
                    cache.forget_expected(block_hash)
                if store(block_hash, block_id):
                    if records_events:
                        cache.record(self._stored(tables.group, chain, link, block_id))
                    if news is not None:
                        is_sealed = self._is_sealed(link)
                        keys = chain.extra_keys
                        news.published.append(PublishedBlock(block_hash, block_id, is_sealed, keys))
            if cache.replaced:
                self._pool.take_replaced()
            if num_links < len(found):
                return

    def _is_sealed(self, link: int) -> bool:
        return self.geometry.seals and link >= self.geometry.num_head_blocks

    def _stored(self, group: int, chain: TokenChain, link: int, block_id: int) -> BlockStored:
        start, end = self.geometry.link_end(link), self.geometry.link_end(link + 1)
        return BlockStored(
            block_hash=chain.hashes[link],
            parent_hash=chain.hashes[link - 1] if link else chain.root,
            token_ids=tuple(chain.token_ids[start:end].tolist()),
            num_tokens_before=start,
            block_id=block_id,
            extra_keys=chain.extra_keys,
            group=group,
        )

    # -- copies from elsewhere ------------------------------------------------------------------

    def lacked(self, tokens: TokenChain) -> list[bytes]:
        limit, known = tokens.num_shareable_links(self.geometry), self.cache.known
        return [
            block_hash
            for tables in self._groups
            for block_hash in group_hashes(tokens.hashes[:limit], tables.group)
            if block_hash not in known
        ]

    def wanted(self, tokens: TokenChain, elsewhere: Container[bytes]) -> list[WantedBlock]:
        both = Either(self.cache.known, elsewhere)
        num_links = self._num_servable(tokens, both)
        return [
            WantedBlock(each, tables.group, link, self._is_sealed(link))
            for tables in self._groups
            for link in self._needed_links(tables, tokens, num_links)
            if (each := group_hashes([tokens.hashes[link]], tables.group)[0])
            not in self.cache.known
        ]

    def hold(self, tokens: TokenChain, wanted: Sequence[WantedBlock]) -> list[BlockIds]:
        both = Either(self.cache.known, {each.block_hash for each in wanted})
        num_links = self._num_servable(tokens, both)
        held = []
        for tables in self._groups:
            needed = self._needed(tables, tokens, num_links)
            ids = [n for each in needed for n in self.cache.find([each])]
            held.append(np.array(ids, dtype=np.int32))
        return held

    def publish_copies(
        self, tokens: TokenChain, wanted: Sequence[WantedBlock], block_ids: BlockIds
    ) -> None:
        for each, block_id in zip(wanted, block_ids.tolist(), strict=True):
            if self.cache.store(each.block_hash, block_id) and self.cache.records_events:
                self.cache.record(self._stored(each.group, tokens, each.link, block_id))

    # -- the cache as a whole -------------------------------------------------------------------

    def reset(self) -> None:
        self._pool.reset_cache()

    def take_events(self) -> list[CacheEvent]:
        return self.cache.take_events()

    def check_integrity(self) -> None:
        sequences = self._sequences
        for seq_id in sequences.living.tolist():
            chain = sequences.chain(seq_id)
            known = sequences.token_ids[seq_id, : sequences.num_tokens[seq_id]]
            fresh = TokenChain(known, chain.root)
            fresh.hash_links(self.geometry, len(chain.hashes))
            assert fresh.hashes == chain.hashes
            assert self._num_published[seq_id] <= len(chain.hashes)


class Either:
    """What is in one of two containers."""

    def __init__(self, first: Container[bytes], second: Container[bytes]) -> None:
        self._first = first
        self._second = second

    def __contains__(self, block_hash: object) -> bool:
        return block_hash in self._first or block_hash in self._second


def group_hashes(link_hashes: list[bytes], group: int) -> list[bytes]:
    mark = GROUP_MARKS[group]
    return [each + mark for each in link_hashes] if group else link_hashes
