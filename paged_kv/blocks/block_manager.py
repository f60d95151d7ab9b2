"""How sequences take, share and give back blocks. Knows block ids and counts, never tensors.

`reserve` turns "these sequences compute so many new tokens" into a `StepPlan`; nothing but the pool
changes until `commit` makes it so or `rollback` undoes it. A decode step over thousands of
sequences is a few vector operations: a sequence's `capacity` says how long it can grow before
anything about its blocks changes, so one comparison finds those that need work.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence

import numpy as np
from numpy.typing import ArrayLike

from ..errors import InvalidRequestError, InvalidStepError, OutOfBlocksError
from ..validation import require_instance
from .block_tables import BlockTables, StoredLengths
from .events import CacheEvent
from .geometry import NO_BLOCKS, BlockIds, IntArray
from .growth import Growth, evict_blocks, grow
from .holdings import Holdings
from .host_blocks import SwappedSequence
from .planning import PlanOrigin, find_growth, make_plan
from .prefix_sharing import PrefixMatch, WantedBlock
from .sequences import NO_ROWS, integer_array
from .sink_window import SinkWindow
from .step_plan import StepPlan
from .step_request import StepRequest, checked_request
from .token_chain import ExtraKey, TokenChain, TokenIds, as_token_ids, root_hash


class BlockManager(Holdings):
    """Block tables of up to `max_num_seqs` sequences over one pool of `num_blocks` blocks.

    With `prefix_caching`, blocks of complete links stay findable by their tokens; the manager is
    then told every token (`add_sequence`, `append_tokens`). `fingerprint` names whatever decides
    what K/V tokens become: model, format and its parameters; sequences of managers that differ in
    it share no hash. `record_events` keeps what happens to cached blocks for `take_events`.

    A sequence whose tokens carry a `SinkWindow` is *windowed*: `commit` lets go of blocks that no
    later token sees, and its table is then that of a shorter sequence. `max_model_len` does not
    bound it.

    Layers that need different tokens form groups, one for each of `retentions`: every group has a
    table of its own for every sequence, all over the one pool, and a block belongs to one of them.
    Where nothing else is said of a group, it is the first that is meant. The first of them has to
    reach as far as any.
    """

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
        a `sink_window` the sequence is windowed; raises `ConfigError` for one that cannot be kept.
        """
        is_plain = isinstance(extra_keys, tuple) and not extra_keys
        root = self._root if is_plain else root_hash(self.fingerprint, extra_keys)
        chain = TokenChain(as_token_ids(token_ids), root, sink_window, tuple(extra_keys))
        self.sequences.check_length(chain)
        if sink_window is not None:
            chain.sink_window = self.fitted_window(sink_window)
        self._sharing.hash(chain)
        return chain

    def find_prefix(self, tokens: TokenChain) -> PrefixMatch:
        """What `add_sequence(tokens)` would take over from the prefix cache."""
        require_instance("tokens", tokens, TokenChain, InvalidRequestError)
        return self._sharing.find(tokens)

    def add_sequence(self, tokens: TokenChain | ArrayLike | None = None) -> int:
        """The seq_id of a new sequence; raises `OutOfBlocksError` when all are taken.

        Its first tokens are computed already (`num_computed_tokens`) as far as the prefix cache
        knows their blocks. Without `tokens` it starts empty.
        """
        if not isinstance(tokens, TokenChain):
            tokens = self.chain_tokens(() if tokens is None else tokens)
        self._check_start(tokens)
        with self._change:
            seq_id = self._start(tokens)
            self._sharing.share(seq_id, tokens)
            for tables in self.groups:
                tables.tell_later(np.array([seq_id]))
        return seq_id

    def place_sequence(
        self, tokens: TokenChain, lengths: Sequence[StoredLengths]
    ) -> tuple[int, BlockIds]:
        """The seq_id and the new blocks of a sequence that was computed elsewhere.

        `lengths` say what each group of layers stores of it. Its blocks are in the order of its
        tokens, those of one group behind those of another. Raises `OutOfBlocksError`, taking
        nothing, if all seq_ids are taken or too few blocks free. The caller writes the blocks; the
        next commit makes them findable, or `publish_sequence` does so at once.
        """
        self.require_no_step()
        num_positions = {its.num_stored + its.num_evicted for its in lengths}
        if len(lengths) != len(self.groups) or len(num_positions) != 1:
            raise InvalidStepError(
                f"lengths must be of {len(self.groups)} groups of layers that have computed the "
                f"same tokens, got {lengths}"
            )
        num_blocks = self.count_blocks(lengths)
        if num_blocks > self.pool.num_free:
            raise OutOfBlocksError(f"{num_blocks} blocks asked for, {self.pool.num_free} are free")
        self._check_start(tokens)
        with self._change:
            return self._place(tokens, lengths)

    def _place(self, tokens: TokenChain, lengths: Sequence[StoredLengths]) -> tuple[int, BlockIds]:
        seq_id = self._start(tokens)
        block_ids = self.pool.allocate(self.count_blocks(lengths))
        start = 0
        for tables, its in zip(self.groups, lengths, strict=True):
            end = start + self.geometry.count_blocks(its.num_stored, its.num_sealed)
            tables.place(seq_id, its, block_ids[start:end])
            if its.num_evicted and tables.state[seq_id]["window_size"]:
                tables.state[seq_id]["link_limit"] = 0
            tables.tell_later(np.array([seq_id]))
            start = end
        self._sharing.follow(seq_id, tokens, 0)
        return seq_id, block_ids

    def _check_start(self, tokens: TokenChain) -> None:
        """Raise before anything has changed unless a sequence of these tokens can begin."""
        self.sequences.check_length(tokens)
        self.sequences.require_free()
        self._sharing.hash(tokens)

    def _start(self, tokens: TokenChain) -> int:
        seq_id = self.sequences.start(tokens)
        link_limit = int(self.sequences.state[seq_id]["link_limit"])
        for tables in self.groups:
            tables.start(seq_id, tokens.sink_window, link_limit)
        return seq_id

    def publish_sequence(self, seq_id: int) -> None:
        """Make the complete links of a placed sequence, whose blocks are written, findable."""
        self.require_at_rest(seq_id)
        with self._change:
            for tables in self.groups:
                self._sharing.publish(tables, np.array([seq_id]))

    def append_tokens(
        self, seq_ids: ArrayLike, token_ids: ArrayLike | None, counts: ArrayLike | None = None
    ) -> None:
        """One more token for each of these distinct sequences: `seq_ids` [M], `token_ids` [M].

        With `counts` [M], so many for each: `token_ids` are those of one sequence after another.
        None are not known yet: the step that computes them may begin, `settle_tokens` has to come
        before it is committed. A sequence that ends before that ends with 0.
        """
        sequences = self.sequences
        seq_ids = sequences.distinct(seq_ids)
        lengths = sequences.num_tokens[seq_ids]
        num_expected, new_lengths = len(seq_ids), lengths + 1
        if counts is not None:
            counts = integer_array("counts", counts)
            if counts.shape != seq_ids.shape or np.count_nonzero(counts < 0):
                raise InvalidStepError(
                    f"counts must be {len(seq_ids)} numbers, got {counts.tolist()}"
                )
            num_expected, new_lengths = int(counts.sum()), lengths + counts
        is_known = token_ids is not None
        token_ids = np.asarray(token_ids) if is_known else np.zeros(num_expected, dtype=np.int32)
        if token_ids.dtype != np.int32 or np.count_nonzero(token_ids < 0):
            token_ids = as_token_ids(token_ids)
        if token_ids.shape != (num_expected,):
            raise InvalidStepError(
                f"{num_expected} token ids expected, got an array of shape {token_ids.shape}"
            )
        rows = (new_lengths > sequences.token_capacity[seq_ids]).nonzero()[0]
        if len(rows):
            sequences.check_new_lengths(seq_ids[rows], new_lengths[rows])
        with self._change:
            sequences.write_tokens(seq_ids, lengths, new_lengths, token_ids, counts)
            if len(rows) and is_known:
                self._sharing.tokens_came(seq_ids[rows])

    def settle_tokens(self, seq_ids: IntArray, token_ids: TokenIds) -> None:
        """The last tokens [M] of sequences, which were appended before they were known."""
        sequences, lengths = self.sequences, self.num_tokens[seq_ids]
        rows = (lengths > sequences.token_capacity[seq_ids]).nonzero()[0]
        with self._change:
            sequences.write_tokens(seq_ids, lengths - 1, lengths, token_ids, None)
            if len(rows):
                self._sharing.tokens_came(seq_ids[rows])

    def fork(self, seq_id: int) -> int:
        """The seq_id of a copy of a sequence: it shares every block.

        Only the last open block, where it is not full, is copied, when the first of its users
        writes to it.
        """
        self.require_at_rest(seq_id)
        self.sequences.require_free()
        with self._change:
            child = self.sequences.fork(seq_id)
            for tables in self.groups:
                self.pool.share(tables.block_ids(seq_id))
                tables.fork(seq_id, child)
            self._sharing.forked(child)
        return child

    def truncate(self, seq_id: int, num_tokens: int) -> None:
        """Keep the first `num_tokens` that a sequence stores, and give back the blocks behind them.

        Raises `InvalidStepError`, changing nothing, where it stores fewer, they end within a
        sealed block or the next token would see what was let go, for a windowed sequence, and with
        a prefix cache, which may know the rest.
        """
        self.require_at_rest(seq_id)
        lengths = self._checked_truncation(seq_id, num_tokens)
        with self._change:
            for tables, its in zip(self.groups, lengths, strict=True):
                num_kept = self.geometry.count_blocks(its.num_stored, its.num_sealed)
                self.pool.release(tables.block_ids(seq_id)[num_kept:])
                tables.truncate(seq_id, its.num_stored, its.num_sealed)
            self.sequences.truncate(seq_id, int(num_tokens))

    def remove_sequence(self, seq_id: int) -> None:
        """Give every block of a sequence back, and its seq_id."""
        self.require_at_rest(seq_id)
        with self._change:
            self._remove(seq_id)

    def _remove(self, seq_id: int) -> None:
        block_ids = [tables.block_ids(seq_id) for tables in self.groups]
        for each in reversed(block_ids):  # what the first group holds is reused first
            self.pool.release(each)
        self._sharing.ended(seq_id)
        for tables in self.groups:
            tables.end(seq_id)
        self.sequences.end(seq_id)

    def chain_of(self, seq_id: int) -> TokenChain:
        """A copy of a sequence's tokens and hashes, to add it again later."""
        self.sequences.require(seq_id)
        tokens = self.token_ids[seq_id, : self.num_tokens[seq_id]].copy()
        return self.sequences.chain(seq_id).with_tokens(tokens)

    # -- swap -----------------------------------------------------------------------------------

    def swap_out(self, seq_id: int) -> SwappedSequence | None:
        """Move a sequence to host blocks; None, changing nothing, if too few are free.

        The caller copies `device_block_ids` to `host_block_ids` before anything is written to the
        pool again.
        """
        self.require_at_rest(seq_id)
        block_ids = self.all_block_ids(seq_id)
        if not self._host_blocks.has_room(len(block_ids)):
            return None
        with self._change:
            swapped = SwappedSequence(
                tokens=self.chain_of(seq_id),
                lengths=self.stored_lengths(seq_id),
                device_block_ids=block_ids,
                host_block_ids=self._host_blocks.allocate(len(block_ids)),
            )
            self._remove(seq_id)
            return self._host_blocks.keep(swapped)

    def swap_in(self, swapped: SwappedSequence) -> tuple[int, BlockIds] | None:
        """Bring a sequence back; None, changing nothing, if too few blocks or no sequence is free.

        Returns its seq_id and its new blocks, to which the caller copies `host_block_ids` before
        the next `swap_out`.
        """
        self.require_no_step()
        self._host_blocks.require(swapped)
        num_blocks = len(swapped.host_block_ids)
        if num_blocks > self.pool.num_free or not self.num_free_seqs:
            return None
        self._check_start(swapped.tokens)
        with self._change:
            placed = self._place(swapped.tokens, swapped.lengths)
            self._host_blocks.discard(swapped)
        return placed

    def discard_swapped(self, swapped: SwappedSequence) -> None:
        """Give the host blocks of a sequence back."""
        self._host_blocks.require(swapped)
        with self._change:
            self._host_blocks.discard(swapped)

    # -- the prefix cache -----------------------------------------------------------------------

    def reset_prefix_cache(self) -> None:
        """Forget all cached blocks; raises `InvalidStepError` while a sequence lives."""
        num_living = len(self.living_seq_ids)
        if self.prefix_cache is not None and num_living:
            raise InvalidStepError(f"the prefix cache is in use by {num_living} sequences")
        with self._change:
            self._sharing.reset()

    def take_events(self) -> list[CacheEvent]:
        """What was stored in and removed from the prefix cache since the last call."""
        return self._sharing.take_events()

    # -- copies from elsewhere ------------------------------------------------------------------

    def lacked(self, tokens: TokenChain) -> list[bytes]:
        """Hashes, as `wanted` takes them, that a new sequence could use and the cache lacks."""
        return self._sharing.lacked(tokens)

    def wanted(self, tokens: TokenChain, elsewhere: Container[bytes]) -> list[WantedBlock]:
        """What the cache lacks of the longest prefix that it and `elsewhere` could serve."""
        return self._sharing.wanted(tokens, elsewhere)

    def adopt(
        self,
        tokens: TokenChain,
        wanted: Sequence[WantedBlock],
        write: Callable[[BlockIds], None],
    ) -> bool:
        """Make blocks that are `wanted` findable, by a copy that `write` makes of each; they and
        the blocks before them are then the last to be evicted. False where too few are free.
        """
        self.require_no_step()
        held, pool = self._sharing.hold(tokens, wanted), self.pool
        num_idle = sum(int(np.count_nonzero(pool.ref_counts[ids] == 0)) for ids in held)
        if len(wanted) > pool.num_free - num_idle:
            return False
        with self._change:
            for ids in held:
                pool.share(ids)
            block_ids = pool.allocate(len(wanted))
            write(block_ids)
            self._sharing.publish_copies(tokens, wanted, block_ids)
            pool.release(block_ids)
            for ids in reversed(held):
                pool.release(ids)
        return True

    # -- steps ----------------------------------------------------------------------------------

    def num_computable(self, seq_ids: IntArray) -> IntArray:
        """Tokens of each sequence that are known, not computed, and fit in one step.

        A windowed sequence has room for a chunk beyond its window; the step that stores its sinks
        computes nothing that would see them nearer than they are.
        """
        left: IntArray = self.num_tokens[seq_ids] - self.num_computed_tokens[seq_ids]
        if self.tables.evicts:
            left -= self.num_evicted_tokens[seq_ids]
        for tables in self.groups:
            rows = tables.windowed_rows(seq_ids)
            if len(rows):
                windowed = seq_ids[rows]
                room = tables.num_storable(windowed) - tables.num_stored[windowed]
                left[rows] = np.minimum(left[rows], room)
        return left

    def blocks_needed(self, seq_ids: IntArray, num_new_tokens: IntArray) -> IntArray:
        """New blocks that each sequence would take from the pool to store its new tokens."""
        needed = np.zeros(len(seq_ids), dtype=np.int64)
        before = self.num_computed_tokens[seq_ids]
        request = StepRequest(seq_ids, num_new_tokens, None, before, before + num_new_tokens)
        for tables in self.groups:
            growth = find_growth(tables, request, self.pool)
            counts = growth.needs.counts
            needed[growth.rows] += counts[:, 0] + counts[:, 1] + counts[:, 3]
        return needed

    def reserve(
        self,
        seq_ids: ArrayLike,
        num_new_tokens: ArrayLike,
        num_draft_tokens: ArrayLike | None = None,
    ) -> StepPlan | None:
        """Take the blocks for one step; None, changing nothing, if too few are free.

        `seq_ids` [N] are distinct living sequences, `num_new_tokens` [N] at least 1 each. The last
        `num_draft_tokens` [N] of these may be dropped when the step is committed; they are fewer
        than the new tokens, and at most a block. Raises `InvalidStepError` where that does not
        hold, or while a step is neither committed nor rolled back.
        """
        self.require_no_step()
        request = checked_request(
            self.sequences,
            self.groups,
            self._sharing.computable_tokens,
            seq_ids,
            num_new_tokens,
            num_draft_tokens,
        )
        growths: list[Growth] = []
        num_new_blocks = 0
        for tables in self.groups:
            growths.append(find_growth(tables, request, self.pool))
            num_new_blocks += growths[-1].needs.num_new_blocks
        if num_new_blocks > self.pool.num_free:
            return None
        for tables, growth in zip(self.groups, growths, strict=True):
            if growth.needs.num_new_blocks:
                tables.make_room(int(growth.after.max()))
        with self._change:
            new_ids = self.pool.allocate(num_new_blocks)
            origin = PlanOrigin(self.source, self.num_committed, request)
            self._outstanding = make_plan(origin, self.groups, growths, new_ids, self.pool)
        return self._outstanding

    def commit(
        self,
        plan: StepPlan,
        num_kept_tokens: ArrayLike | None = None,
        *,
        spoilt_seq_ids: IntArray = NO_ROWS,
    ) -> BlockIds:
        """The step's writes are done: its tokens are stored, the blocks it replaced are let go.

        `num_kept_tokens` [N] keeps fewer tokens of sequences that had draft tokens. Of sequences
        whose results are not finite, `spoilt_seq_ids`, nothing can be found by others any more,
        neither what they stored nor what they share. Returns the blocks that windowed sequences let
        go on top of `plan.freed_block_ids`.
        """
        self._require_step(plan)
        num_kept = plan.kept_tokens(num_kept_tokens)
        with self._change:
            for tables, part in zip(self.groups, plan.parts, strict=True):
                self._store(tables, part, part.context_lens + num_kept)
            if len(spoilt_seq_ids):
                self._sharing.withdraw(spoilt_seq_ids)
            evicted_ids = [
                self._publish_and_evict(tables, part)
                for tables, part in zip(self.groups, plan.parts, strict=True)
            ]
            plan.is_over = True
            self.num_committed += 1
            self._outstanding = None
        return evicted_ids[0] if len(evicted_ids) == 1 else np.concatenate(evicted_ids)

    def _store(self, tables: BlockTables, part: StepPlan, after: IntArray) -> None:
        lengths, last_open_link = after[part.changed_rows], self._sharing.last_open_link
        changed = part.seq_ids[part.changed_rows]
        unused_ids = grow(changed, lengths, part, self.sequences, tables, last_open_link)
        tables.num_stored[part.seq_ids] = after
        for block_ids in (unused_ids, part.freed_block_ids):
            if len(block_ids):
                self.pool.release(block_ids)

    def _publish_and_evict(self, tables: BlockTables, part: StepPlan) -> BlockIds:
        """What is complete can be found; what no later token of its sequence sees is let go."""
        if len(part.changed_rows):
            self._sharing.publish(tables, part.seq_ids[part.changed_rows])
        return NO_BLOCKS if part.num_evicted_tokens is None else self._evict(tables, part)

    def _evict(self, tables: BlockTables, part: StepPlan) -> BlockIds:
        num_ids = evict_blocks(
            part.seq_ids,
            tables.num_stored,
            tables.capacity,
            tables.num_sealed,
            tables.state,
            tables.ids,
            self.geometry.sizes,
            tables.rule,
            self._evicted_ids,
        )
        if not num_ids:
            return NO_BLOCKS
        assert part.num_evicted_tokens is not None
        has_evicted = tables.state["num_evicted_tokens"][part.seq_ids] > part.num_evicted_tokens
        evicting = part.seq_ids[has_evicted]
        tables.tell_later(evicting)
        windowed = evicting[tables.windowed_rows(evicting)]
        if len(windowed):
            self._sharing.stop(tables, windowed)
        evicted_ids = self._evicted_ids[:num_ids].copy()
        self.pool.release(evicted_ids)
        return evicted_ids

    def rollback(self, plan: StepPlan) -> None:
        """The step did not happen: the new blocks go back, nothing else has changed."""
        self._require_step(plan)
        with self._change:
            for tables, part in zip(self.groups, plan.parts, strict=True):
                self.pool.release(part.new_block_ids)
                self.pool.rejoin(part.copy_sources)
                tables.tell_later(part.table_update.seq_ids)
                tables.tell_later(part.seq_ids[part.changed_rows])
            plan.is_over = True
            self._outstanding = None

    def _require_step(self, plan: StepPlan) -> None:
        if plan is None or plan is not self._outstanding:
            raise InvalidStepError("this step is not the one that was reserved last")
