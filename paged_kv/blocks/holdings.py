"""What a block manager holds, to be read. Knows all of its parts, never how a step changes them.

Many arguments because a manager is made once, of all that it is to do.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import numpy as np

from ..change import Change
from ..errors import ConfigError, InvalidStepError
from ..free_memory import require_memory
from ..validation import is_integer, is_list_of, require, require_count, require_instance
from .block_pool import SCRATCH, BlockPool
from .block_tables import BlockTables, StoredLengths
from .geometry import NO_BLOCKS, BlockGeometry, BlockIds, IntArray
from .host_blocks import HostBlocks
from .prefix_cache import PrefixCache
from .prefix_sharing import NoPrefixSharing, PrefixSharing, PrefixStatistics
from .retention import EVERYTHING, UNLIMITED, Retention, longest_reach_first
from .sequences import Sequences
from .sink_window import SinkWindow
from .step_plan import PlanSource, StepPlan
from .token_chain import TokenIds, root_hash

MAX_NUM_SEQS: Final = 1 << 20
MAX_GROUPS: Final = 256  # of layers: a byte names one in the prefix cache
BYTES_PER_BLOCK: Final = 9  # of arrays of the pool and the prefix cache


class Holdings:
    """Sequences, their block tables, the pool, what is shared, and what lies in host blocks.

    The arguments are those of `BlockManager`.
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
        retentions: Sequence[Retention] = EVERYTHING,
    ) -> None:
        require_instance("geometry", geometry, BlockGeometry)
        require_instance("fingerprint", fingerprint, bytes)
        for name, flag in (("prefix_caching", prefix_caching), ("record_events", record_events)):
            require_instance(name, flag, bool)
        max_num_seqs = require_count("max_num_seqs", max_num_seqs, most=MAX_NUM_SEQS)
        max_model_len = require_count("max_model_len", max_model_len)
        num_blocks = require_count("num_blocks", num_blocks)
        num_host_blocks = require_count("num_host_blocks", num_host_blocks, least=0)
        num_bytes = (num_blocks + num_host_blocks) * BYTES_PER_BLOCK
        require_memory(f"a manager of {num_blocks} blocks", num_bytes)
        self.source: PlanSource = PlanSource(
            manager_id=os.urandom(16),
            geometry=geometry,
            num_blocks=num_blocks,
            retentions=checked_retentions(retentions),
        )
        self.geometry = geometry
        self.max_num_seqs = max_num_seqs
        self.max_model_len = max_model_len
        self.fingerprint: bytes = fingerprint
        self._root = root_hash(fingerprint)
        at_once = (each.step(geometry) // geometry.block_size for each in self.source.retentions)
        self._evicted_ids: BlockIds = np.empty(max(SCRATCH, *at_once), dtype=np.int32)
        self.num_committed = 0  # plans
        self._change = Change("block manager")
        cache = PrefixCache(num_blocks, record_events=record_events) if prefix_caching else None
        self._begin_empty(num_blocks, cache, num_host_blocks)

    def _begin_empty(
        self, num_blocks: int, cache: PrefixCache | None, num_host_blocks: int
    ) -> None:
        """Make everything that holds sequences or blocks, with none of them in use."""
        sequences = Sequences(
            self.geometry, max_num_seqs=self.max_num_seqs, max_model_len=self.max_model_len
        )
        groups = tuple(
            BlockTables(self.geometry, sequences, retention, group)
            for group, retention in enumerate(self.source.retentions)
        )
        pool = BlockPool(num_blocks, cache)
        self._sharing = (
            NoPrefixSharing(sequences, len(groups))
            if cache is None
            else PrefixSharing(sequences, groups, pool, cache)
        )
        self.sequences: Sequences = sequences
        self.groups: tuple[BlockTables, ...] = groups
        self.pool: BlockPool = pool
        self.tables: BlockTables = groups[0]
        self._host_blocks = HostBlocks(num_host_blocks)
        self._outstanding: StepPlan | None = None

    def recover(self) -> None:
        """Drop every sequence, swapped ones too, and forget all cached blocks.

        What comes after an exception that cut off a change, which the next one is refused for. It
        may itself be cut off, and called again. Plans go on in their order.
        """
        self._change.is_unfinished = True
        if self._outstanding is not None:
            self._outstanding.is_over = True
        statistics, cache, host_pool = self.prefix_statistics, self.prefix_cache, self.host_pool
        self._begin_empty(
            self.num_blocks,
            None if cache is None else cache.emptied(self.num_blocks),
            0 if host_pool is None else host_pool.num_blocks,
        )
        self._sharing.statistics = statistics
        self.source = replace(self.source, num_recoveries=self.source.num_recoveries + 1)
        self._change.is_unfinished = False

    @property
    def is_whole(self) -> bool:
        """Whether no exception has cut off a change: else `recover` comes first."""
        return not self._change.is_unfinished

    def require_at_rest(self, seq_id: int) -> None:
        """Raise `InvalidStepError` where no sequence is, or while a step is outstanding."""
        self.require_no_step()
        self.sequences.require(seq_id)

    def require_no_step(self) -> None:
        """Raise `InvalidStepError` while a step is outstanding."""
        if self._outstanding is not None:
            raise InvalidStepError("commit or roll back the step before")

    # -- what it holds --------------------------------------------------------------------------

    @property
    def num_tokens(self) -> IntArray:
        """[max_num_seqs] tokens known, by seq_id."""
        return self.sequences.num_tokens

    @property
    def num_computed_tokens(self) -> IntArray:
        """[max_num_seqs] tokens stored in blocks, by seq_id; those evicted do not count."""
        return self.tables.num_stored

    @property
    def num_sealed(self) -> IntArray:
        """[max_num_seqs] body blocks, by seq_id."""
        return self.tables.num_sealed

    @property
    def num_evicted_tokens(self) -> IntArray:
        """[max_num_seqs] tokens that were stored and are no more, by seq_id."""
        return self.tables.state["num_evicted_tokens"]

    @property
    def num_sink_tokens(self) -> IntArray:
        """[max_num_seqs] of windowed sequences, by seq_id; 0 of all others."""
        return self.tables.state["num_sink_tokens"]

    @property
    def window_sizes(self) -> IntArray:
        """[max_num_seqs] of windowed sequences, by seq_id; 0 of all others."""
        return self.tables.state["window_size"]

    @property
    def token_ids(self) -> TokenIds:
        """[max_num_seqs, L] known tokens, by seq_id."""
        return self.sequences.token_ids

    @property
    def last_token_ids(self) -> TokenIds:
        """[max_num_seqs] the last known token, by seq_id."""
        return self.sequences.last_token_ids

    @property
    def num_blocks(self) -> int:
        return self.pool.num_blocks

    @property
    def num_free_blocks(self) -> int:
        return self.pool.num_free

    @property
    def num_cached_blocks(self) -> int:
        """Blocks that can be hit, whether a sequence uses them or not."""
        return self._sharing.num_cached

    @property
    def num_free_seqs(self) -> int:
        return self.sequences.num_free

    @property
    def living_seq_ids(self) -> IntArray:
        """Ids of the living sequences, ascending."""
        return self.sequences.living

    @property
    def prefix_cache(self) -> PrefixCache | None:
        return self._sharing.cache

    @property
    def prefix_statistics(self) -> PrefixStatistics:
        return self._sharing.statistics

    @property
    def host_pool(self) -> BlockPool | None:
        return self._host_blocks.pool

    def block_ids(self, seq_id: int) -> BlockIds:
        """Every block of a sequence, in the order of its tokens: head, body, tail."""
        self.sequences.require(seq_id)
        return self.tables.block_ids(seq_id)

    def all_block_ids(self, seq_id: int) -> BlockIds:
        """The same of every group of layers, one behind the other."""
        self.sequences.require(seq_id)
        if len(self.groups) == 1:
            return self.tables.block_ids(seq_id)
        return np.concatenate([tables.block_ids(seq_id) for tables in self.groups])

    def stored_lengths(self, seq_id: int) -> tuple[StoredLengths, ...]:
        """What each group of layers stores of a sequence."""
        self.sequences.require(seq_id)
        return tuple(tables.lengths(seq_id) for tables in self.groups)

    def count_blocks(self, lengths: Sequence[StoredLengths]) -> int:
        """Blocks of a sequence of which the groups store so much."""
        return sum(self.geometry.count_blocks(its.num_stored, its.num_sealed) for its in lengths)

    def head_and_tail_ids(self, seq_id: int) -> BlockIds:
        """Open blocks of a sequence in order: head, then tail."""
        self.sequences.require(seq_id)
        return self.tables.head_and_tail_ids(seq_id)

    def body_ids(self, seq_id: int) -> BlockIds:
        """Sealed blocks of a sequence in order."""
        self.sequences.require(seq_id)
        return self.tables.body_ids(seq_id)

    def num_held(self, seq_ids: IntArray) -> tuple[IntArray, IntArray]:
        """Blocks of each of these sequences, and in how many groups it still takes more of them
        than it lets go as it grows."""
        geometry = self.geometry
        held = np.zeros(len(seq_ids), dtype=np.int64)
        growing = np.zeros(len(seq_ids), dtype=np.int64)
        for tables in self.groups:
            stored = tables.num_stored[seq_ids]
            held += -(-stored // geometry.open_block_size)
            held -= tables.num_sealed[seq_ids] * (geometry.open_blocks_per_block - 1)
            growing += stored < tables.retention.reach
        return held, growing

    def max_blocks(self, num_tokens: int, sink_window: SinkWindow | None = None) -> int:
        """The most blocks that a sequence holds as it grows to `num_tokens`, one a step."""
        retentions = self.source.retentions
        return sum(each.max_blocks(self.geometry, num_tokens, sink_window) for each in retentions)

    def blocks_to_grow(self, lengths: Sequence[StoredLengths], num_tokens: int, chunk: int) -> int:
        """Blocks at most that a sequence takes, of which groups store so much, as it computes so
        many more tokens, up to `chunk` a step."""
        return sum(
            tables.blocks_to_grow(its, num_tokens, chunk)
            for tables, its in zip(self.groups, lengths, strict=True)
        )

    def fitted_window(self, sink_window: SinkWindow) -> SinkWindow:
        """With sinks in whole blocks; raises `ConfigError` for one that this pool cannot keep."""
        require_instance("sink_window", sink_window, SinkWindow)
        fitted = sink_window.fitted(self.geometry)
        num_blocks = self.max_blocks(UNLIMITED, fitted)
        if num_blocks > self.num_blocks:
            raise ConfigError(
                f"{sink_window} needs {num_blocks} blocks; the pool has {self.num_blocks}"
            )
        return fitted

    def _checked_truncation(self, seq_id: int, num_tokens: int) -> list[StoredLengths]:
        """What each group keeps of a sequence; raises unless it can be cut there."""
        stored = int(self.num_computed_tokens[seq_id] + self.num_evicted_tokens[seq_id])
        if self.prefix_cache is not None or self.sequences.chain(seq_id).sink_window is not None:
            raise InvalidStepError(
                "a sequence that is windowed, or shared by a prefix cache, cannot be truncated"
            )
        if not (is_integer(num_tokens) and 0 <= num_tokens <= stored):
            raise InvalidStepError(f"num_tokens must be from 0 to {stored}, got {num_tokens!r}")
        lengths = [tables.cut_lengths(seq_id, int(num_tokens)) for tables in self.groups]
        known = [its for its in lengths if its is not None]
        if len(known) < len(lengths):
            raise InvalidStepError(
                f"the first {num_tokens} tokens end within a sealed block, or the token behind "
                "them sees what was let go"
            )
        return known

    # -- invariants -----------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Assert every invariant; O(pool), for tests and debugging."""
        self.sequences.check_integrity()
        for tables in self.groups:
            tables.check_integrity()
        first, seq_ids = self.tables, self.living_seq_ids
        positions = first.num_stored + first.state["num_evicted_tokens"]
        for tables in self.groups[1:]:
            theirs = tables.num_stored + tables.state["num_evicted_tokens"]
            assert np.array_equal(theirs, positions), "groups differ in what was computed"
        used, step = [self.all_block_ids(seq_id) for seq_id in seq_ids.tolist()], self._outstanding
        parts = () if step is None else step.parts
        left = [part.copy_sources for part in parts]
        used += [part.new_block_ids for part in parts]
        self.pool.check_integrity(
            np.concatenate([NO_BLOCKS, *used]), np.concatenate([NO_BLOCKS, *left])
        )
        self._sharing.check_integrity()


def checked_retentions(retentions: Sequence[Retention]) -> tuple[Retention, ...]:
    """Of at least one group; the first reaches as far as any."""
    is_known = is_list_of(retentions, lambda each: isinstance(each, Retention))
    is_valid = is_known and 1 <= len(retentions) <= MAX_GROUPS
    require("retentions", retentions, is_valid, f"a list of 1 to {MAX_GROUPS} Retention")
    checked = tuple(retentions)
    if checked != longest_reach_first(checked):
        raise ConfigError(f"the group that reaches farthest comes first, got {checked}")
    return checked
