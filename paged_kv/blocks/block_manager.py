"""How sequences take, share and give back blocks. Knows block ids and counts, never tensors.

`reserve` turns "these sequences compute so many new tokens" into a `StepPlan` of deltas; nothing
but the pool changes until `commit` makes it so or `rollback` undoes it. A decode step over
thousands of sequences is a few vector operations: `_capacity` holds for each sequence how long it
can grow before anything about its blocks changes, so one comparison finds those that need work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ..errors import ConfigError, InvalidStepError, OutOfBlocksError
from .block_pool import BlockPool
from .block_tables import BlockTables, ragged_arange
from .events import BlockStored, CacheEvent
from .geometry import BlockGeometry, BlockIds, IntArray
from .growth import (
    count_blocks,
    evict_blocks,
    find_complete_links,
    new_counts,
    place_blocks,
    take_effect,
)
from .host_blocks import SwappedSequence
from .prefix_cache import PrefixCache
from .sink_window import SinkWindow
from .step_plan import StepPlan
from .token_chain import (
    NO_LIMIT,
    ExtraKey,
    TokenChain,
    TokenIds,
    as_token_ids,
    root_hash,
)

NO_BLOCKS: BlockIds = np.empty(0, dtype=np.int32)
ENDLESS: Final = 1 << 40  # tokens of a stream


class PrefixMatch(NamedTuple):
    """What the prefix cache has of a sequence that is not there yet."""

    num_tokens: int
    num_blocks: int
    num_sealed: int  # of these, in the body
    num_idle_blocks: int  # of these, blocks that count as free until they are shared
    is_pending: bool  # a living sequence is about to store the next link


@dataclass(kw_only=True)
class PrefixStatistics:
    """Counted since the manager was made: a request's tokens when it starts, hit or not."""

    num_queries: int = 0
    num_query_tokens: int = 0
    num_hit_tokens: int = 0

    @property
    def hit_rate(self) -> float:
        return self.num_hit_tokens / max(self.num_query_tokens, 1)


def integer_array(name: str, values: ArrayLike) -> IntArray:
    """An array of integers as int64; anything else is refused by name."""
    array = np.asarray(values)
    if array.size and array.dtype.kind not in "iu":
        raise InvalidStepError(f"{name} must be integers, got {values!r}")
    return array.astype(np.int64)


class _Streams(NamedTuple):
    """Of a step's sequences [N]; all None where no sequence of the step is a stream."""

    num_evicted_tokens: IntArray | None
    num_sink_tokens: IntArray | None
    window_sizes: IntArray | None


NO_STREAMS: Final = _Streams(None, None, None)


class BlockManager:
    """Block tables of up to `max_num_seqs` sequences over one pool of `num_blocks` blocks.

    With `prefix_caching`, blocks of complete links stay findable by their tokens; the manager is
    then told every token (`add_sequence`, `append_tokens`). `fingerprint` names whatever decides
    what K/V tokens become: model, format and its parameters; sequences of managers that differ in
    it share no hash. `record_events` keeps what happens to cached blocks for `take_events`.

    A sequence whose tokens carry a `SinkWindow` is a stream: `commit` lets go of blocks that no
    later token sees, and its tables are then those of a shorter sequence. `max_model_len` does not
    bound it.
    """

    def __init__(
        self,
        geometry: BlockGeometry,
        *,
        num_blocks: int,
        max_num_seqs: int,
        max_model_len: int,
        prefix_caching: bool = False,
        fingerprint: bytes = b"",
        record_events: bool = False,
        num_host_blocks: int = 0,
    ) -> None:
        for name, value in (("max_num_seqs", max_num_seqs), ("max_model_len", max_model_len)):
            if value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        self.geometry = geometry
        self.max_num_seqs = max_num_seqs
        self.max_model_len = max_model_len
        self.prefix_cache = (
            PrefixCache(num_blocks, record_events=record_events) if prefix_caching else None
        )
        self.prefix_statistics = PrefixStatistics()
        self.pool = BlockPool(num_blocks, self.prefix_cache)
        self.host_pool = BlockPool(num_host_blocks) if num_host_blocks else None
        self.tables = BlockTables(geometry, max_num_seqs=max_num_seqs, max_model_len=max_model_len)
        self.token_ids: TokenIds = np.zeros((max_num_seqs, max_model_len), dtype=np.int32)
        self.num_tokens: IntArray = np.zeros(max_num_seqs, dtype=np.int64)  # of those, known
        # The last of them, beside each other: what most steps compute.
        self.last_token_ids: TokenIds = np.zeros(max_num_seqs, dtype=np.int32)
        self._fingerprint = fingerprint
        self._root = root_hash(fingerprint)
        self._roots = [self._root] * max_num_seqs
        self._sink_windows: list[SinkWindow | None] = [None] * max_num_seqs
        self._num_streams = 0
        # Of streams; 0 in all other seq_ids.
        self.num_sink_tokens: IntArray = np.zeros(max_num_seqs, dtype=np.int64)
        self.window_sizes: IntArray = np.zeros(max_num_seqs, dtype=np.int64)
        self.num_evicted_tokens: IntArray = np.zeros(max_num_seqs, dtype=np.int64)
        self._max_stored: IntArray = np.full(max_num_seqs, ENDLESS, dtype=np.int64)
        self._evicted_ids: BlockIds = np.empty(1024, dtype=np.int32)
        self._link_limits: IntArray = np.full(max_num_seqs, NO_LIMIT, dtype=np.int64)
        self._min_unsealed = geometry.num_head_tokens + geometry.min_tail_tokens
        self._chains: list[TokenChain | None] = [None] * max_num_seqs
        self._next_link_end: IntArray = np.zeros(max_num_seqs, dtype=np.int64)
        self._num_published: IntArray = np.zeros(max_num_seqs, dtype=np.int64)
        # Links of the tokens that a sequence was added with: others may wait for these.
        self._num_expected: IntArray = np.zeros(max_num_seqs, dtype=np.int64)
        # Tokens that a sequence can store before its blocks change; -1 in seq_ids without one.
        self._capacity: IntArray = np.full(max_num_seqs, -1, dtype=np.int64)
        self._complete_links: IntArray = np.empty((1024, 3), dtype=np.int64)
        # Tokens that a sequence may have computed: those known, where tokens have to be known.
        self._length_limits: IntArray = np.zeros(max_num_seqs, dtype=np.int64)
        self._limits = self.num_tokens if prefix_caching else self._length_limits
        self._checked_seq_ids: IntArray | None = None  # a read-only array once found to be distinct
        # Zero where no sequence is; a memoryview writes one element faster than numpy does.
        self._counters = [
            counter.data
            for counter in (
                self.tables.num_computed_tokens,
                self.tables.num_open,
                self.tables.num_sealed,
                self.num_tokens,
                self._length_limits,
                self.num_sink_tokens,
                self.window_sizes,
                self.num_evicted_tokens,
            )
        ]
        self._free_seq_ids = list(range(max_num_seqs - 1, -1, -1))
        self._outstanding: StepPlan | None = None
        self._swapped: set[int] = set()  # identities of the sequences that lie in host blocks

    @property
    def num_computed_tokens(self) -> IntArray:
        """[max_num_seqs] tokens stored in blocks, by seq_id; those evicted do not count."""
        return self.tables.num_computed_tokens

    @property
    def num_sealed(self) -> IntArray:
        """[max_num_seqs] body blocks, by seq_id."""
        return self.tables.num_sealed

    @property
    def num_free_blocks(self) -> int:
        return self.pool.num_free

    @property
    def num_cached_blocks(self) -> int:
        """Blocks that can be hit, whether a sequence uses them or not."""
        return 0 if self.prefix_cache is None else self.prefix_cache.num_cached

    @property
    def num_blocks(self) -> int:
        return self.pool.num_blocks

    @property
    def num_free_seqs(self) -> int:
        return len(self._free_seq_ids)

    @property
    def living_seq_ids(self) -> IntArray:
        """SeqIds of the living sequences, ascending."""
        return np.flatnonzero(self._capacity >= 0)

    # -- sequences ------------------------------------------------------------------------------

    def chain_tokens(
        self,
        token_ids: ArrayLike,
        extra_keys: Sequence[ExtraKey] = (),
        sink_window: SinkWindow | None = None,
    ) -> TokenChain:
        """The tokens of a sequence to be, with the hashes of the links that it may share.

        `extra_keys` name whatever else its K/V depend on, such as an adapter, the hash of an image,
        or a salt that keeps tenants apart: sequences share nothing unless all keys are equal. With
        a `sink_window` the sequence is a stream; raises `ConfigError` for one that cannot be kept.
        """
        tokens = as_token_ids(token_ids)
        self._check_length(tokens, sink_window)
        if sink_window is not None:
            sink_window = self.fitted_window(sink_window)
        root = root_hash(self._fingerprint, extra_keys) if extra_keys else self._root
        chain = TokenChain(tokens, root, sink_window)
        if self.prefix_cache is not None:
            chain.hash_links(self.geometry, chain.num_shareable_links(self.geometry))
        return chain

    def fitted_window(self, sink_window: SinkWindow) -> SinkWindow:
        """With sinks in whole blocks; raises `ConfigError` for one that this pool cannot keep."""
        fitted = sink_window.fitted(self.geometry)
        num_blocks = fitted.max_blocks(self.geometry)
        if num_blocks > self.num_blocks:
            raise ConfigError(
                f"{sink_window} needs {num_blocks} blocks; the pool has {self.num_blocks}"
            )
        return fitted

    def find_prefix(self, tokens: TokenChain) -> PrefixMatch:
        """What `add_sequence(tokens)` would take over from the prefix cache."""
        cache = self.prefix_cache
        if cache is None:
            return PrefixMatch(0, 0, 0, 0, is_pending=False)
        block_ids = self._find_links(tokens, cache)
        num_links = len(block_ids)
        limit = tokens.num_shareable_links(self.geometry)
        return PrefixMatch(
            num_tokens=self.geometry.link_end(num_links),
            num_blocks=num_links,
            num_sealed=self._num_body(num_links),
            num_idle_blocks=int(np.count_nonzero(self.pool.ref_counts[block_ids] == 0)),
            is_pending=num_links < limit and cache.is_expected(tokens.hashes[num_links]),
        )

    def add_sequence(self, tokens: TokenChain | ArrayLike | None = None) -> int:
        """A seq_id for a new sequence; raises `OutOfBlocksError` when all are taken.

        Its first tokens are computed already (`num_computed_tokens`) as far as the prefix cache
        knows their blocks. Without `tokens` it starts empty.
        """
        if not isinstance(tokens, TokenChain):
            tokens = self.chain_tokens(() if tokens is None else tokens)
        self._check_length(tokens.token_ids, tokens.sink_window)
        seq_id = self._take_seq_id()
        self._write_tokens(seq_id, tokens)
        if self.prefix_cache is not None:
            self._share_prefix(seq_id, tokens, self.prefix_cache)
        self._capacity[seq_id] = self.num_computed_tokens[seq_id]
        return seq_id

    def _check_length(self, token_ids: TokenIds, sink_window: SinkWindow | None) -> None:
        """A stream may have any length."""
        if sink_window is None and len(token_ids) > self.max_model_len:
            raise InvalidStepError(
                f"a sequence of {len(token_ids)} tokens exceeds max_model_len {self.max_model_len}"
            )

    def _take_seq_id(self) -> int:
        if not self._free_seq_ids:
            raise OutOfBlocksError(f"all {self.max_num_seqs} sequence seq_ids are in use")
        seq_id = self._free_seq_ids.pop()
        self._length_limits[seq_id] = self.max_model_len
        return seq_id

    def _share_prefix(self, seq_id: int, tokens: TokenChain, cache: PrefixCache) -> None:
        """Fill a new seq_id with the cached blocks of its tokens' first links."""
        block_ids = self._find_links(tokens, cache)
        num_links = len(block_ids)
        num_hit_tokens = self.geometry.link_end(num_links)
        if num_links:
            shared_ids = np.array(block_ids, dtype=np.int32)
            self.pool.share(shared_ids)
            self._write_blocks(seq_id, shared_ids, num_hit_tokens, self._num_body(num_links))
        self._attach_chain(seq_id, tokens, num_links, cache)
        statistics = self.prefix_statistics
        statistics.num_queries += 1
        statistics.num_query_tokens += len(tokens.token_ids)
        statistics.num_hit_tokens += num_hit_tokens

    def _find_links(self, tokens: TokenChain, cache: PrefixCache) -> list[int]:
        """The cached blocks of the first links that a sequence may share."""
        limit = tokens.num_shareable_links(self.geometry)
        tokens.hash_links(self.geometry, limit)
        return cache.find(tokens.hashes[:limit])

    def _num_body(self, num_links: int) -> int:
        """Sealed blocks among so many links."""
        return max(num_links - self.geometry.num_head_blocks, 0) * self.geometry.seals

    def _write_tokens(self, seq_id: int, tokens: TokenChain) -> None:
        length = len(tokens.token_ids)
        self._make_room_for_tokens(length)
        self.token_ids[seq_id, :length] = tokens.token_ids
        self.num_tokens[seq_id] = length
        self._roots[seq_id] = tokens.root
        self._link_limits[seq_id] = tokens.link_limit(self.geometry)
        if length:
            self.last_token_ids[seq_id] = tokens.token_ids[-1]
        self._set_window(seq_id, tokens.sink_window)

    def _set_window(self, seq_id: int, sink_window: SinkWindow | None) -> None:
        """Make a new seq_id a stream, or not."""
        self._sink_windows[seq_id] = sink_window
        if sink_window is None:
            return
        self._num_streams += 1
        self.num_sink_tokens[seq_id] = sink_window.num_sink_tokens
        self.window_sizes[seq_id] = sink_window.window_size
        self._length_limits[seq_id] = ENDLESS
        self._max_stored[seq_id] = sink_window.max_stored(self.geometry)
        self.tables.make_room(int(self._max_stored[seq_id]))

    def _make_room_for_tokens(self, num_tokens: int) -> None:
        """Widen the rows of token ids for a stream that outgrows them."""
        old = self.token_ids
        if num_tokens <= old.shape[1]:
            return
        self.token_ids = np.zeros((len(old), max(num_tokens, 2 * old.shape[1])), dtype=np.int32)
        for seq_id in self.num_tokens.nonzero()[0].tolist():
            length = self.num_tokens[seq_id]
            self.token_ids[seq_id, :length] = old[seq_id, :length]
            chain = self._chains[seq_id]
            if chain is not None:
                self._chains[seq_id] = chain.with_tokens(self.token_ids[seq_id])

    def _write_blocks(
        self, seq_id: int, block_ids: BlockIds, num_computed_tokens: int, num_sealed: int
    ) -> None:
        """Give a new seq_id its blocks, in the order of its tokens: head, body, tail."""
        body_start = self.geometry.num_head_blocks if num_sealed else len(block_ids)
        body_end = body_start + num_sealed
        open_ids = np.concatenate([block_ids[:body_start], block_ids[body_end:]])
        self.tables.open[seq_id, : len(open_ids)] = open_ids
        self.tables.sealed[seq_id, :num_sealed] = block_ids[body_start:body_end]
        self.tables.num_open[seq_id] = len(open_ids)
        self.num_sealed[seq_id] = num_sealed
        self.num_computed_tokens[seq_id] = num_computed_tokens

    def _attach_chain(
        self, seq_id: int, tokens: TokenChain, num_published: int, cache: PrefixCache
    ) -> None:
        """Follow the hashes of a new seq_id's tokens, of which the first can be found already."""
        limit = min(tokens.num_shareable_links(self.geometry), int(self._link_limits[seq_id]))
        tokens.hash_links(self.geometry, limit)
        self._num_published[seq_id], self._num_expected[seq_id] = num_published, limit
        cache.expect(tokens.hashes[num_published:limit])
        self._chains[seq_id] = tokens.with_tokens(self.token_ids[seq_id])
        self._next_link_end[seq_id] = self._end_of_link(seq_id, len(tokens.hashes) + 1)

    def append_tokens(
        self, seq_ids: ArrayLike, token_ids: ArrayLike, counts: ArrayLike | None = None
    ) -> None:
        """One more token for each of these distinct sequences: `seq_ids` [M], `token_ids` [M].

        With `counts` [M], so many for each: `token_ids` are those of one sequence after another.
        """
        seq_ids = self._known_seq_ids(seq_ids)
        lengths = self.num_tokens[seq_ids]
        if counts is not None:
            counts = integer_array("counts", counts)
            if counts.shape != seq_ids.shape or np.count_nonzero(counts < 0):
                raise InvalidStepError(
                    f"counts must be {len(seq_ids)} numbers, got {counts.tolist()}"
                )
        token_ids = np.asarray(token_ids)
        if token_ids.dtype != np.int32:
            token_ids = as_token_ids(token_ids)
        num_expected = len(seq_ids) if counts is None else int(counts.sum())
        if token_ids.shape != (num_expected,):
            raise InvalidStepError(
                f"{num_expected} token ids expected, got an array of shape {token_ids.shape}"
            )
        new_lengths = lengths + (1 if counts is None else counts)
        if np.count_nonzero(new_lengths > self._length_limits[seq_ids]):
            self._require_living(seq_ids)
            raise InvalidStepError(
                f"a sequence would have {new_lengths.max()} tokens; max_model_len is "
                f"{self.max_model_len}"
            )
        if self._num_streams:
            self._make_room_for_tokens(int(new_lengths.max(initial=0)))
        if counts is None:
            self.token_ids[seq_ids, lengths] = token_ids
            self.last_token_ids[seq_ids] = token_ids
        else:
            rows, offsets = ragged_arange(counts)
            self.token_ids[seq_ids[rows], lengths[rows] + offsets] = token_ids
            self.last_token_ids[seq_ids] = self.token_ids[seq_ids, np.maximum(new_lengths - 1, 0)]
        self.num_tokens[seq_ids] = new_lengths
        if self.prefix_cache is not None:
            self._hash_links(seq_ids, new_lengths)

    def _end_of_link(self, seq_id: int, num_links: int) -> int:
        """Tokens in so many links of a sequence; more than there can be where they are too many."""
        if num_links > self._link_limits[seq_id]:
            return ENDLESS
        return self.geometry.link_end(num_links)

    def _hash_links(self, seq_ids: IntArray, lengths: IntArray) -> None:
        """Hash the links that the tokens of these sequences complete."""
        geometry = self.geometry
        rows = (lengths >= self._next_link_end[seq_ids]).nonzero()[0]
        for seq_id, length in zip(seq_ids[rows].tolist(), lengths[rows].tolist(), strict=True):
            chain = self._chains[seq_id]
            assert chain is not None
            num_links = min(geometry.num_links(length), int(self._link_limits[seq_id]))
            chain.hash_links(geometry, num_links)
            self._next_link_end[seq_id] = self._end_of_link(seq_id, num_links + 1)

    def fork(self, seq_id: int) -> int:
        """A seq_id for a copy of a sequence: it shares every block.

        Only the last open block, where it is not full, is copied, when the first of its users
        writes to it.
        """
        self.require_at_rest(seq_id)
        child = self._take_seq_id()
        self._set_window(child, self._sink_windows[seq_id])
        self.pool.share(self.tables.block_ids(seq_id))
        self.tables.open[child] = self.tables.open[seq_id]
        self.tables.sealed[child] = self.tables.sealed[seq_id]
        length = int(self.num_tokens[seq_id])
        self.token_ids[child, :length] = self.token_ids[seq_id, :length]
        for state in (
            self.num_computed_tokens,
            self.tables.num_open,
            self.num_sealed,
            self.num_tokens,
            self.last_token_ids,
            self._num_published,
            self._num_expected,
            self._next_link_end,
            self._link_limits,
            self.num_evicted_tokens,
        ):
            state[child] = state[seq_id]
        self._roots[child] = self._roots[seq_id]
        self._capacity[[seq_id, child]] = self.num_computed_tokens[seq_id]
        chain = self._chains[seq_id]
        if chain is not None:
            assert self.prefix_cache is not None
            self._chains[child] = chain.with_tokens(self.token_ids[child])
            expected = slice(self._num_published[seq_id], self._num_expected[seq_id])
            self.prefix_cache.expect(chain.hashes[expected])
        return child

    def remove_sequence(self, seq_id: int) -> None:
        """Give every block of a sequence back, and its seq_id."""
        self.require_at_rest(seq_id)
        self.pool.release_sequence(self.tables, seq_id)
        self._clear_seq_id(seq_id)

    def _clear_seq_id(self, seq_id: int) -> None:
        chain = self._chains[seq_id]
        if chain is not None:
            assert self.prefix_cache is not None
            self._no_longer_expect(seq_id, chain, self.prefix_cache)
            self._chains[seq_id] = None
        if self._sink_windows[seq_id] is not None:
            self._sink_windows[seq_id] = None
            self._max_stored[seq_id] = ENDLESS
            self._num_streams -= 1
        for counter in self._counters:
            counter[seq_id] = 0
        self._capacity[seq_id] = -1
        self._free_seq_ids.append(seq_id)

    def require_at_rest(self, seq_id: int) -> None:
        """Raise `InvalidStepError` where no sequence is, or while a step is outstanding."""
        self._require_no_step()
        if not 0 <= seq_id < self.max_num_seqs or self._capacity[seq_id] < 0:
            raise InvalidStepError(f"seq_id {seq_id} holds no sequence")

    def _require_living(self, seq_ids: IntArray) -> None:
        is_seq_id = (seq_ids >= 0) & (seq_ids < self.max_num_seqs)
        if not is_seq_id.all() or (self._capacity[seq_ids] < 0).any():
            raise InvalidStepError(f"seq_ids {seq_ids.tolist()} are not all living sequences")

    def head_and_tail_ids(self, seq_id: int) -> BlockIds:
        """Open blocks of a sequence in order: head, then tail."""
        return self.tables.head_and_tail_ids(seq_id)

    def body_ids(self, seq_id: int) -> BlockIds:
        """Sealed blocks of a sequence in order."""
        return self.tables.body_ids(seq_id)

    def block_ids(self, seq_id: int) -> BlockIds:
        """Every block of a sequence, in the order of its tokens: head, body, tail."""
        return self.tables.block_ids(seq_id)

    # -- steps ----------------------------------------------------------------------------------

    def blocks_needed(self, seq_ids: IntArray, num_new_tokens: IntArray) -> IntArray:
        """New blocks that each sequence would take from the pool to store its new tokens."""
        after = self.num_computed_tokens[seq_ids] + num_new_tokens
        rows = (after > self._capacity[seq_ids]).nonzero()[0]
        changed = seq_ids[rows]
        counts = new_counts(len(rows))
        self._count_blocks(changed, after[rows], after[rows], counts)
        self._forget_copies(changed, counts)
        needed = np.zeros(len(seq_ids), dtype=np.int64)
        needed[rows] = counts[:, 0] + counts[:, 1] + counts[:, 3]
        return needed

    def _count_blocks(
        self, seq_ids: IntArray, after: IntArray, certain: IntArray, counts: IntArray
    ) -> tuple[int, int, int, int]:
        tables, geometry = self.tables, self.geometry
        return count_blocks(
            seq_ids,
            after,
            certain,
            tables.num_computed_tokens,
            tables.num_open,
            tables.num_sealed,
            tables.open,
            self.pool.ref_counts,
            geometry.block_size,
            geometry.open_block_size,
            geometry.num_head_blocks,
            self._min_unsealed,
            counts,
        )

    def _forget_copies(self, seq_ids: IntArray, counts: IntArray) -> None:
        """Undo what `count_blocks` did to the user counts of shared blocks."""
        np.add.at(self.pool.ref_counts, self._copy_sources(seq_ids, counts), 1)

    def _copy_sources(self, seq_ids: IntArray, counts: IntArray) -> BlockIds:
        copied = seq_ids[counts[:, 3] > 0]
        return self.tables.open[copied, self.tables.num_open[copied] - 1]

    def reserve(
        self,
        seq_ids: ArrayLike,
        num_new_tokens: ArrayLike,
        num_draft_tokens: ArrayLike | None = None,
    ) -> StepPlan | None:
        """Take the blocks for one step, all or nothing; None, and nothing changed, when they lack.

        `seq_ids` [N] are distinct living sequences, `num_new_tokens` [N] at least 1 each. The last
        `num_draft_tokens` [N] of these may be dropped when the step is committed; they are fewer
        than the new tokens, and at most a block. Raises `InvalidStepError` where that does not
        hold, or while a step is neither committed nor rolled back.
        """
        self._require_no_step()
        num_new_tokens = integer_array("num_new_tokens", num_new_tokens)
        seq_ids = self._known_seq_ids(seq_ids)
        if seq_ids.shape != num_new_tokens.shape:
            raise InvalidStepError(
                f"seq_ids and num_new_tokens must be equally long, got shapes {seq_ids.shape} and "
                f"{num_new_tokens.shape}"
            )
        if np.count_nonzero(num_new_tokens > 0) < len(seq_ids):
            raise InvalidStepError(f"every sequence needs new tokens, got {num_new_tokens.min()}")
        if np.count_nonzero(num_new_tokens > self.max_model_len):
            raise InvalidStepError(
                f"{num_new_tokens.max()} new tokens exceed max_model_len {self.max_model_len}"
            )
        before = self.num_computed_tokens[seq_ids]
        after = before + num_new_tokens
        certain = after
        if num_draft_tokens is not None:
            num_draft_tokens = integer_array("num_draft_tokens", num_draft_tokens)
            self._check_drafts(num_draft_tokens, num_new_tokens)
            certain = after - num_draft_tokens
        streams = self._streams_of(seq_ids, before, after)
        end, certain_end = after, certain  # in the sequence, evicted tokens included
        if streams.num_evicted_tokens is not None:
            end, certain_end = (n + streams.num_evicted_tokens for n in (after, certain))
        if np.count_nonzero(certain_end > self._limits[seq_ids]) or num_draft_tokens is not None:
            self._check_lengths(seq_ids, end, certain_end)
        rows = (after > self._capacity[seq_ids]).nonzero()[0]
        changed, certain, after = seq_ids[rows], certain[rows], after[rows]
        counts = new_counts(len(rows))
        num_sealed, num_open, num_leaving, num_copies = self._count_blocks(
            changed, after, certain, counts
        )
        num_new = num_sealed + num_open + num_copies
        if num_new > self.pool.num_free:
            self._forget_copies(changed, counts)
            return None
        new_ids = self.pool.allocate(num_new)
        seal_ids, open_ids = new_ids[:num_sealed], new_ids[num_sealed : num_sealed + num_open]
        freed_ids = np.empty(num_leaving, dtype=np.int32)
        tables = self.tables
        place_blocks(
            changed,
            counts,
            seal_ids,
            open_ids,
            tables.num_open,
            tables.num_sealed,
            tables.open,
            tables.sealed,
            self.geometry.num_head_blocks,
            freed_ids,
        )
        self._outstanding = StepPlan(
            seq_ids=seq_ids,
            num_scheduled_tokens=num_new_tokens,
            num_draft_tokens=num_draft_tokens,
            context_lens=before,
            num_evicted_tokens=streams.num_evicted_tokens,
            num_sink_tokens=streams.num_sink_tokens,
            window_sizes=streams.window_sizes,
            changed_rows=rows,
            block_counts=counts,
            new_block_ids=new_ids,
            seal_block_ids=seal_ids,
            copy_sources=self._copy_sources(changed, counts) if num_copies else NO_BLOCKS,
            copy_targets=new_ids[num_sealed + num_open :],
            freed_block_ids=freed_ids,
            unended_tables=tables,
        )
        return self._outstanding

    def num_computable(self, seq_ids: IntArray) -> IntArray:
        """Tokens of each sequence that are known, not computed, and fit in one step.

        A stream has room for a chunk beyond its window; the step that stores its sinks computes
        nothing that would see them nearer than they are.
        """
        stored = self.num_computed_tokens[seq_ids]
        if not self._num_streams:
            left: IntArray = self.num_tokens[seq_ids] - stored
            return left
        left = self.num_tokens[seq_ids] - stored - self.num_evicted_tokens[seq_ids]
        room: IntArray = self._num_storable(seq_ids) - stored
        return left.clip(max=room)

    def _num_storable(self, seq_ids: IntArray) -> IntArray:
        """Tokens that each sequence may have stored at the end of the next step."""
        sinks, limits = self.num_sink_tokens[seq_ids], self._max_stored[seq_ids]
        has_sinks = self.num_computed_tokens[seq_ids] >= sinks
        return np.where(has_sinks, limits, np.minimum(limits, sinks + self.window_sizes[seq_ids]))

    def _streams_of(self, seq_ids: IntArray, before: IntArray, after: IntArray) -> _Streams:
        """Of a step; raises `InvalidStepError` for one that a stream has no room for."""
        if not self._num_streams or not np.count_nonzero(self.window_sizes[seq_ids]):
            return NO_STREAMS
        excess = after - self._num_storable(seq_ids)
        if np.count_nonzero(excess > 0):
            row = int(excess.argmax())
            raise InvalidStepError(
                f"seq_id {seq_ids[row]}, a stream of {self._sink_windows[seq_ids[row]]}, has "
                f"room for {after[row] - before[row] - excess[row]} new tokens in a step, got "
                f"{after[row] - before[row]}"
            )
        return _Streams(
            self.num_evicted_tokens[seq_ids],
            self.num_sink_tokens[seq_ids],
            self.window_sizes[seq_ids],
        )

    def commit(self, plan: StepPlan, num_kept_tokens: ArrayLike | None = None) -> BlockIds:
        """The step's writes are done: its tokens are stored, the blocks it replaced are let go.

        `num_kept_tokens` [N] keeps fewer tokens of sequences that had draft tokens. Returns the
        blocks that streams let go on top of `plan.freed_block_ids`.
        """
        self._require_step(plan)
        num_kept = plan.num_scheduled_tokens
        if num_kept_tokens is not None:
            num_kept = integer_array("num_kept_tokens", num_kept_tokens)
            self._check_kept(plan, num_kept)
        after = plan.context_lens + num_kept
        rows = plan.changed_rows
        seq_ids, after_changed = plan.seq_ids[rows], after[rows]
        tables, geometry = self.tables, self.geometry
        tables.num_computed_tokens[plan.seq_ids] = after
        unused_ids = np.empty(len(plan.new_block_ids), dtype=np.int32)
        num_unused = take_effect(
            seq_ids,
            plan.block_counts,
            after_changed,
            plan.copy_targets,
            tables.num_open,
            tables.num_sealed,
            tables.open,
            self._capacity,
            geometry.block_size,
            geometry.open_block_size,
            geometry.num_head_blocks,
            self._min_unsealed,
            tables.max_stored,
            unused_ids,
        )
        if num_unused:
            self.pool.release(unused_ids[:num_unused])
        if len(plan.freed_block_ids):
            self.pool.release(plan.freed_block_ids)
        if self.prefix_cache is not None:
            self._publish(seq_ids, self.prefix_cache)
        evicted_ids = NO_BLOCKS if plan.window_sizes is None else self._evict(plan.seq_ids)
        self._end_step(plan)
        return evicted_ids

    def _evict(self, seq_ids: IntArray) -> BlockIds:
        """Let go of the blocks of streams that no later token sees."""
        tables, geometry, before = self.tables, self.geometry, self.num_evicted_tokens[seq_ids]
        num_evicted = evict_blocks(
            seq_ids,
            self.num_sink_tokens,
            self.window_sizes,
            tables.num_computed_tokens,
            tables.num_open,
            tables.num_sealed,
            tables.open,
            tables.sealed,
            self.num_evicted_tokens,
            self._capacity,
            geometry.block_size,
            geometry.open_block_size,
            geometry.num_head_blocks,
            self._evicted_ids,
        )
        if not num_evicted:
            return NO_BLOCKS
        if self.prefix_cache is not None:
            for seq_id in seq_ids[self.num_evicted_tokens[seq_ids] > before].tolist():
                self._stop_sharing(seq_id, self.prefix_cache)
        evicted_ids = self._evicted_ids[:num_evicted].copy()
        self.pool.release(evicted_ids)
        return evicted_ids

    def _stop_sharing(self, seq_id: int, cache: PrefixCache) -> None:
        """Nothing past a gap is ever found: what others wait for will not come."""
        chain = self._chains[seq_id]
        assert chain is not None
        self._no_longer_expect(seq_id, chain, cache)
        self._num_expected[seq_id] = 0
        self._link_limits[seq_id] = self._num_published[seq_id]

    def _no_longer_expect(self, seq_id: int, chain: TokenChain, cache: PrefixCache) -> None:
        """Nobody has to wait for the links that a sequence was to publish."""
        published, expected = self._num_published.item(seq_id), self._num_expected.item(seq_id)
        if expected > published:
            cache.no_longer_expect(chain.hashes[published:expected])

    def _publish(self, seq_ids: IntArray, cache: PrefixCache) -> None:
        """Make the blocks of links that are complete by now findable."""
        geometry, tables = self.geometry, self.tables
        found = self._complete_links
        num_expected = self._num_expected.data  # reads one element faster than numpy does
        while True:
            num_links = find_complete_links(
                seq_ids,
                tables.num_computed_tokens,
                self.num_tokens,
                tables.num_sealed,
                tables.open,
                tables.sealed,
                self._num_published,
                self._link_limits,
                geometry.block_size,
                geometry.open_block_size,
                geometry.num_head_blocks,
                found,
            )
            for seq_id, link, block_id in found[:num_links].tolist():
                chain = self._chains[seq_id]
                assert chain is not None
                if link == len(chain.hashes):
                    chain.hash_links(geometry, link + 1)
                was_expected = link < num_expected[seq_id]
                is_new = cache.store(chain.hashes[link], block_id, was_expected=was_expected)
                if is_new and cache.records_events:
                    self._record_stored(seq_id, link, block_id, cache)
            if num_links < len(found):
                return

    def _record_stored(self, seq_id: int, link: int, block_id: int, cache: PrefixCache) -> None:
        chain = self._chains[seq_id]
        assert chain is not None
        start, end = self.geometry.link_end(link), self.geometry.link_end(link + 1)
        cache.record(
            BlockStored(
                block_hash=chain.hashes[link],
                parent_hash=chain.hashes[link - 1] if link else chain.root,
                token_ids=tuple(self.token_ids[seq_id, start:end].tolist()),
                block_id=block_id,
            )
        )

    def rollback(self, plan: StepPlan) -> None:
        """The step did not happen: the new blocks go back, nothing else has changed."""
        self._require_step(plan)
        self.pool.release(plan.new_block_ids)
        np.add.at(self.pool.ref_counts, plan.copy_sources, 1)
        self._end_step(plan)

    def _end_step(self, plan: StepPlan) -> None:
        plan.unended_tables = None
        self._outstanding = None

    def _require_no_step(self) -> None:
        if self._outstanding is not None:
            raise InvalidStepError("commit or roll back the step before")

    def _require_step(self, plan: StepPlan) -> None:
        if plan is not self._outstanding:
            raise InvalidStepError("this step is not the one that was reserved last")

    def _known_seq_ids(self, seq_ids: ArrayLike) -> IntArray:
        """Distinct seq_ids as an array; whether they hold sequences is for the caller to check.

        A read-only array that owns its data is taken not to change: the same one is checked once.
        """
        if self._checked_seq_ids is not None and seq_ids is self._checked_seq_ids:
            return self._checked_seq_ids
        checked = integer_array("seq_ids", seq_ids)
        if checked.ndim != 1:
            raise InvalidStepError(f"seq_ids must be one-dimensional, got shape {checked.shape}")
        if len(checked):
            if checked.min() < 0 or checked.max() >= self.max_num_seqs:
                raise InvalidStepError(f"seq_ids {checked.tolist()} are not all living sequences")
            if np.count_nonzero(np.bincount(checked)) < len(checked):
                raise InvalidStepError(f"seq_ids {checked.tolist()} name a sequence twice")
        if isinstance(seq_ids, np.ndarray) and seq_ids.dtype == np.int64:
            is_read_only = not seq_ids.flags.writeable and seq_ids.base is None
            self._checked_seq_ids = seq_ids if is_read_only else self._checked_seq_ids
        return checked

    def _check_lengths(self, seq_ids: IntArray, after: IntArray, certain: IntArray) -> None:
        """Sequences must live, keep within `max_model_len` and, with a cache, have known tokens."""
        self._require_living(seq_ids)
        if np.count_nonzero(after > self._length_limits[seq_ids]):
            raise InvalidStepError(
                f"a sequence would have {after.max()} tokens; max_model_len is {self.max_model_len}"
            )
        is_unknown = certain > self._limits[seq_ids]
        if np.count_nonzero(is_unknown):
            row = int(is_unknown.nonzero()[0][0])
            raise InvalidStepError(
                f"seq_id {seq_ids[row]} would have {certain[row]} tokens computed, of which "
                f"{self.num_tokens[seq_ids[row]]} are known: append_tokens comes first"
            )

    def _check_drafts(self, num_draft_tokens: IntArray, num_new_tokens: IntArray) -> None:
        fits = (
            num_draft_tokens.shape == num_new_tokens.shape
            and (
                (num_draft_tokens >= 0)
                & (num_draft_tokens < num_new_tokens)
                & (num_draft_tokens <= self.geometry.block_size)
            ).all()
        )
        if not fits:
            raise InvalidStepError(
                "num_draft_tokens must be from 0 to less than num_new_tokens and at most "
                f"{self.geometry.block_size}, got {num_draft_tokens.tolist()}"
            )

    def _check_kept(self, plan: StepPlan, num_kept: IntArray) -> None:
        num_new = plan.num_scheduled_tokens
        num_draft = 0 if plan.num_draft_tokens is None else plan.num_draft_tokens
        fits = (
            num_kept.shape == num_new.shape
            and ((num_kept >= num_new - num_draft) & (num_kept <= num_new)).all()
        )
        if not fits:
            raise InvalidStepError(
                "a step may only drop its draft tokens: num_kept_tokens must be from "
                f"{(num_new - num_draft).tolist()} to {num_new.tolist()}, got {num_kept.tolist()}"
            )

    # -- swap -----------------------------------------------------------------------------------

    def swap_out(self, seq_id: int) -> SwappedSequence | None:
        """Move a sequence to host blocks; None, and nothing changed, when too few are free.

        The caller copies `device_block_ids` to `host_block_ids` before anything is written to the
        pool again.
        """
        self.require_at_rest(seq_id)
        block_ids = self.tables.block_ids(seq_id)
        if self.host_pool is None or len(block_ids) > self.host_pool.num_free:
            return None
        chain = self.chain_of(seq_id)
        swapped = SwappedSequence(
            num_evicted_tokens=int(self.num_evicted_tokens[seq_id]),
            tokens=chain,
            num_computed_tokens=int(self.num_computed_tokens[seq_id]),
            num_sealed=int(self.num_sealed[seq_id]),
            device_block_ids=block_ids,
            host_block_ids=self.host_pool.allocate(len(block_ids)),
        )
        self.pool.release(block_ids)
        self._clear_seq_id(seq_id)
        self._swapped.add(id(swapped))
        return swapped

    def chain_of(self, seq_id: int) -> TokenChain:
        """A copy of a sequence's tokens and hashes, to add it again later."""
        tokens = self.token_ids[seq_id, : self.num_tokens[seq_id]].copy()
        chain = self._chains[seq_id]
        if chain is None:
            return TokenChain(tokens, self._roots[seq_id], self._sink_windows[seq_id])
        return chain.with_tokens(tokens)

    def swap_in(self, swapped: SwappedSequence) -> tuple[int, BlockIds] | None:
        """Bring a sequence back; None, and nothing changed, when too few blocks are free.

        Returns its seq_id and its new blocks, to which the caller copies `host_block_ids` before
        the next `swap_out`.
        """
        self._require_swapped(swapped)
        num_blocks = len(swapped.host_block_ids)
        if num_blocks > self.pool.num_free or not self._free_seq_ids:
            return None
        seq_id, block_ids = self.place_sequence(
            swapped.tokens,
            swapped.num_computed_tokens,
            swapped.num_sealed,
            swapped.num_evicted_tokens,
        )
        self.discard_swapped(swapped)
        return seq_id, block_ids

    def place_sequence(
        self,
        tokens: TokenChain,
        num_computed_tokens: int,
        num_sealed: int,
        num_evicted_tokens: int = 0,
    ) -> tuple[int, BlockIds]:
        """A seq_id, and new blocks in the order of its tokens, for a sequence computed elsewhere.

        It stores `num_computed_tokens` and has evicted some before them, if it is a stream.

        Raises `OutOfBlocksError`, and takes nothing, when either lacks. The caller writes the
        blocks; the next commit makes them findable, or `publish_sequence` does so at once.
        """
        self._require_no_step()
        self._check_length(tokens.token_ids, tokens.sink_window)
        num_blocks = self.geometry.count_blocks(num_computed_tokens, num_sealed)
        if num_blocks > self.pool.num_free:
            raise OutOfBlocksError(f"{num_blocks} blocks asked for, {self.pool.num_free} are free")
        seq_id = self._take_seq_id()
        block_ids = self.pool.allocate(num_blocks)
        self._write_tokens(seq_id, tokens)
        self._write_blocks(seq_id, block_ids, num_computed_tokens, num_sealed)
        self.num_evicted_tokens[seq_id] = num_evicted_tokens
        if num_evicted_tokens:
            self._link_limits[seq_id] = 0
        if self.prefix_cache is not None:
            self._attach_chain(seq_id, tokens, 0, self.prefix_cache)
        self._capacity[seq_id] = num_computed_tokens
        return seq_id, block_ids

    def publish_sequence(self, seq_id: int) -> None:
        """Make the complete links of a placed sequence, whose blocks are written, findable."""
        self.require_at_rest(seq_id)
        if self.prefix_cache is not None:
            self._publish(np.array([seq_id]), self.prefix_cache)

    def discard_swapped(self, swapped: SwappedSequence) -> None:
        """Give the host blocks of a sequence back."""
        self._require_swapped(swapped)
        assert self.host_pool is not None
        self.host_pool.release(swapped.host_block_ids)
        self._swapped.remove(id(swapped))

    def _require_swapped(self, swapped: SwappedSequence) -> None:
        if id(swapped) not in self._swapped:
            raise InvalidStepError("this sequence was swapped in or discarded before")

    # -- the prefix cache -----------------------------------------------------------------------

    def reset_prefix_cache(self) -> None:
        """Forget all cached blocks; raises `InvalidStepError` while a sequence lives."""
        if self.prefix_cache is None:
            return
        num_living = self.max_num_seqs - len(self._free_seq_ids)
        if num_living:
            raise InvalidStepError(f"the prefix cache is in use by {num_living} sequences")
        self.pool.reset_cache()

    def take_events(self) -> list[CacheEvent]:
        """What was stored in and removed from the prefix cache since the last call."""
        return [] if self.prefix_cache is None else self.prefix_cache.take_events()

    # -- invariants -----------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Assert every invariant; O(pool), for tests and debugging."""
        seq_ids = self.living_seq_ids
        used = [NO_BLOCKS, *(self.tables.block_ids(int(seq_id)) for seq_id in seq_ids)]
        if self._outstanding is not None:
            used.append(self._outstanding.new_block_ids)
            # Already counted as no longer used by those that copy them.
            np.add.at(self.pool.ref_counts, self._outstanding.copy_sources, 1)
        self.pool.check_integrity(np.concatenate(used))
        if self._outstanding is not None:
            np.subtract.at(self.pool.ref_counts, self._outstanding.copy_sources, 1)
        idle = np.setdiff1d(np.arange(self.max_num_seqs), seq_ids)
        assert sorted(self._free_seq_ids) == idle.tolist()
        for state in (self.num_computed_tokens, self.num_sealed, self.num_tokens):
            assert not state[idle].any()
        assert not self.window_sizes[idle].any()
        assert not self.num_evicted_tokens[self.window_sizes == 0].any()
        assert self._num_streams == np.count_nonzero(self.window_sizes)
        lengths, num_sealed = self.num_computed_tokens[seq_ids], self.num_sealed[seq_ids]
        geometry, num_open = self.geometry, self.tables.num_open[seq_ids]
        open_ends = -(-lengths // geometry.open_block_size)
        assert np.array_equal(num_open, open_ends - num_sealed * geometry.open_blocks_per_block)
        body_ends = geometry.num_head_tokens + num_sealed * geometry.block_size
        assert (lengths >= np.where(num_sealed, body_ends, 0)).all()
        assert (num_open <= self.tables.open.shape[1]).all()
        is_overdue = lengths > self._capacity[seq_ids]  # drafts were kept beyond the next seal
        assert (geometry.num_sealed_blocks(lengths) > num_sealed)[is_overdue].all()
        if self.prefix_cache is not None:
            for seq_id in seq_ids.tolist():
                self._check_chain(seq_id)

    def _check_chain(self, seq_id: int) -> None:
        """Assert that a sequence's hashes are those of its tokens."""
        chain = self._chains[seq_id]
        assert chain is not None
        fresh = TokenChain(self.token_ids[seq_id, : self.num_tokens[seq_id]], chain.root)
        fresh.hash_links(self.geometry, len(chain.hashes))
        assert fresh.hashes == chain.hashes
        assert self._num_published[seq_id] <= len(chain.hashes)
