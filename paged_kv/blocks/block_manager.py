"""How sequences take, share and give back blocks. Knows block ids and counts, never tensors.

`reserve` turns "these sequences compute so many new tokens" into a `StepPlan`; nothing but the pool
changes until `commit` makes it so or `rollback` undoes it. A decode step over thousands of
sequences is a few vector operations: a sequence's `capacity` says how long it can grow before
anything about its blocks changes, so one comparison finds those that need work.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from ..errors import InvalidRequestError, InvalidStepError, OutOfBlocksError
from ..validation import require_instance
from .events import CacheEvent
from .geometry import NO_BLOCKS, BlockIds, IntArray
from .growth import (
    COPIED,
    NO_NEEDS,
    Needs,
    count_needs,
    evict_blocks,
    grow,
    place_blocks,
)
from .holdings import Holdings
from .host_blocks import SwappedSequence
from .prefix_sharing import PrefixMatch
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
        root = self._root if is_plain else root_hash(self._fingerprint, extra_keys)
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
            self.tables.tell_later(np.array([seq_id]))
            self.sequences.capacity[seq_id] = self.num_computed_tokens[seq_id]
        return seq_id

    def place_sequence(
        self,
        tokens: TokenChain,
        num_computed_tokens: int,
        num_sealed: int,
        num_evicted_tokens: int = 0,
    ) -> tuple[int, BlockIds]:
        """The seq_id and, in the order of its tokens, the new blocks of a sequence that was
        computed elsewhere.

        It stores `num_computed_tokens`; a windowed one has evicted `num_evicted_tokens` before.
        Raises `OutOfBlocksError`, taking nothing, if all seq_ids are taken or too few blocks free.
        The caller writes the blocks; the next commit makes them findable, or `publish_sequence`
        does so at once.
        """
        self.require_no_step()
        num_blocks = self.geometry.count_blocks(num_computed_tokens, num_sealed)
        if num_blocks > self.pool.num_free:
            raise OutOfBlocksError(f"{num_blocks} blocks asked for, {self.pool.num_free} are free")
        self._check_start(tokens)
        with self._change:
            return self._place(
                tokens, num_blocks, num_computed_tokens, num_sealed, num_evicted_tokens
            )

    def _place(
        self,
        tokens: TokenChain,
        num_blocks: int,
        num_computed_tokens: int,
        num_sealed: int,
        num_evicted_tokens: int,
    ) -> tuple[int, BlockIds]:
        seq_id = self._start(tokens)
        block_ids = self.pool.allocate(num_blocks)
        state = self.sequences.state[seq_id]
        state["num_evicted_tokens"] = num_evicted_tokens
        if num_evicted_tokens:
            state["link_limit"] = 0
        self.num_sealed[seq_id] = num_sealed
        self.num_computed_tokens[seq_id] = num_computed_tokens
        self.sequences.capacity[seq_id] = num_computed_tokens
        self.tables.write(seq_id, block_ids)
        self.tables.tell_later(np.array([seq_id]))
        self._sharing.follow(seq_id, tokens, 0)
        return seq_id, block_ids

    def _check_start(self, tokens: TokenChain) -> None:
        """Raise before anything has changed unless a sequence of these tokens can begin."""
        self.sequences.check_length(tokens)
        self.sequences.require_free()
        self._sharing.hash(tokens)

    def _start(self, tokens: TokenChain) -> int:
        seq_id = self.sequences.start(tokens)
        if tokens.sink_window is not None:
            self.tables.make_room(tokens.sink_window.max_stored(self.geometry))
        return seq_id

    def publish_sequence(self, seq_id: int) -> None:
        """Make the complete links of a placed sequence, whose blocks are written, findable."""
        self.require_at_rest(seq_id)
        with self._change:
            self._sharing.publish(np.array([seq_id]))

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
            self.pool.share(self.tables.block_ids(seq_id))
            self.tables.copy(seq_id, child)
            self._sharing.forked(child)
        return child

    def truncate(self, seq_id: int, num_tokens: int) -> None:
        """Keep the first `num_tokens` that a sequence stores, and give back the blocks behind them.

        Raises `InvalidStepError`, changing nothing, where it stores fewer or they end within a
        sealed block, for a windowed sequence, and with a prefix cache, which may know the rest.
        """
        self.require_at_rest(seq_id)
        num_tokens, num_sealed = self._checked_truncation(seq_id, num_tokens)
        num_kept = self.geometry.count_blocks(num_tokens, num_sealed)
        with self._change:
            self.pool.release(self.tables.block_ids(seq_id)[num_kept:])
            self.sequences.truncate(seq_id, num_tokens, num_sealed)
            self.tables.tell_later(np.array([seq_id]))

    def remove_sequence(self, seq_id: int) -> None:
        """Give every block of a sequence back, and its seq_id."""
        self.require_at_rest(seq_id)
        with self._change:
            self._remove(seq_id, self.tables.block_ids(seq_id))

    def _remove(self, seq_id: int, block_ids: BlockIds) -> None:
        self.pool.release(block_ids)
        self._sharing.ended(seq_id)
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
        block_ids = self.tables.block_ids(seq_id)
        if not self._host_blocks.has_room(len(block_ids)):
            return None
        with self._change:
            swapped = SwappedSequence(
                tokens=self.chain_of(seq_id),
                num_computed_tokens=int(self.num_computed_tokens[seq_id]),
                num_sealed=int(self.num_sealed[seq_id]),
                num_evicted_tokens=int(self.num_evicted_tokens[seq_id]),
                device_block_ids=block_ids,
                host_block_ids=self._host_blocks.allocate(len(block_ids)),
            )
            self._remove(seq_id, block_ids)
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
            placed = self._place(
                swapped.tokens,
                num_blocks,
                swapped.num_computed_tokens,
                swapped.num_sealed,
                swapped.num_evicted_tokens,
            )
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

    # -- steps ----------------------------------------------------------------------------------

    def num_computable(self, seq_ids: IntArray) -> IntArray:
        """Tokens of each sequence that are known, not computed, and fit in one step.

        A windowed sequence has room for a chunk beyond its window; the step that stores its sinks
        computes nothing that would see them nearer than they are.
        """
        stored = self.num_computed_tokens[seq_ids]
        left: IntArray = self.num_tokens[seq_ids] - stored
        rows = self.sequences.windowed_rows(seq_ids)
        if len(rows):
            left -= self.num_evicted_tokens[seq_ids]
            room = self.sequences.num_storable(seq_ids[rows]) - stored[rows]
            left[rows] = np.minimum(left[rows], room)
        return left

    def blocks_needed(self, seq_ids: IntArray, num_new_tokens: IntArray) -> IntArray:
        """New blocks that each sequence would take from the pool to store its new tokens."""
        after = self.num_computed_tokens[seq_ids] + num_new_tokens
        rows = (after > self.sequences.capacity[seq_ids]).nonzero()[0]
        counts = self._needs(seq_ids[rows], after[rows], after[rows]).counts
        needed = np.zeros(len(seq_ids), dtype=np.int64)
        needed[rows] = counts[:, 0] + counts[:, 1] + counts[:, 3]
        return needed

    def _needs(self, seq_ids: IntArray, after: IntArray, certain: IntArray) -> Needs:
        if not len(seq_ids):
            return NO_NEEDS
        ref_counts = self.pool.ref_counts
        return count_needs(seq_ids, after, certain, self.sequences, self.tables, ref_counts)

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
            self._sharing.computable_tokens,
            seq_ids,
            num_new_tokens,
            num_draft_tokens,
        )
        rows = (request.after > self.sequences.capacity[request.seq_ids]).nonzero()[0]
        changed = request.seq_ids[rows]
        needs = self._needs(changed, request.after[rows], request.certain[rows])
        if needs.num_new_blocks > self.pool.num_free:
            return None
        if needs.num_opened:
            self.tables.make_room(int(request.after[rows].max()))
        with self._change:
            self._outstanding = self._take_blocks(request, rows, changed, needs)
        return self._outstanding

    def _take_blocks(
        self, request: StepRequest, rows: IntArray, changed: IntArray, needs: Needs
    ) -> StepPlan:
        """The plan of a step, of whose N sequences those in `rows`, `changed`, need blocks."""
        new_ids = self.pool.allocate(needs.num_new_blocks)
        open_end = needs.num_sealed + needs.num_opened
        seal_ids, open_ids = new_ids[: needs.num_sealed], new_ids[needs.num_sealed : open_end]
        num_sealed = self.num_sealed[changed]
        table, sizes = self.tables.ids, self.geometry.sizes
        before, counts = request.before[rows], needs.counts
        freed_ids = NO_BLOCKS
        if len(rows):
            freed_ids = place_blocks(changed, before, num_sealed, counts, open_ids, table, sizes)
        copy_sources = NO_BLOCKS
        if needs.num_copied:
            copy_sources = self.tables.last_ids(changed[counts[:, COPIED] > 0])
            self.pool.leave(copy_sources)
        return StepPlan(
            source=self.source,
            number=self.num_committed,
            seq_ids=request.seq_ids,
            num_scheduled_tokens=request.num_new_tokens,
            num_draft_tokens=request.num_draft_tokens,
            context_lens=request.before,
            num_evicted_tokens=request.num_evicted_tokens,
            num_sink_tokens=request.num_sink_tokens,
            window_sizes=request.window_sizes,
            changed_rows=rows,
            block_counts=counts,
            new_block_ids=new_ids,
            seal_block_ids=seal_ids,
            copy_sources=copy_sources,
            copy_targets=new_ids[open_end:],
            freed_block_ids=freed_ids,
            table_update=self.tables.take_update(),
        )

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
        after = plan.context_lens + plan.kept_tokens(num_kept_tokens)
        with self._change:
            evicted_ids = self._store(plan, after, spoilt_seq_ids)
            plan.is_over = True
            self.num_committed += 1
            self._outstanding = None
        return evicted_ids

    def _store(self, plan: StepPlan, after: IntArray, spoilt_seq_ids: IntArray) -> BlockIds:
        changed = plan.seq_ids[plan.changed_rows]
        sequences = self.sequences
        lengths, last_open_link = after[plan.changed_rows], self._sharing.last_open_link
        unused_ids = grow(changed, lengths, plan, sequences, self.tables, last_open_link)
        sequences.num_computed_tokens[plan.seq_ids] = after
        for block_ids in (unused_ids, plan.freed_block_ids):
            if len(block_ids):
                self.pool.release(block_ids)
        if len(spoilt_seq_ids):
            self._sharing.withdraw(spoilt_seq_ids)
        if len(changed):
            self._sharing.publish(changed)
        return NO_BLOCKS if plan.window_sizes is None else self._evict(plan.seq_ids)

    def _evict(self, seq_ids: IntArray) -> BlockIds:
        """Let go of the blocks of windowed sequences that no later token sees."""
        before = self.num_evicted_tokens[seq_ids]
        num_evicted = evict_blocks(
            seq_ids,
            self.num_computed_tokens,
            self.sequences.capacity,
            self.num_sealed,
            self.sequences.state,
            self.tables.ids,
            self.geometry.sizes,
            self._evicted_ids,
        )
        if not num_evicted:
            return NO_BLOCKS
        evicting = seq_ids[self.num_evicted_tokens[seq_ids] > before]
        self.tables.tell_later(evicting)
        self._sharing.stop(evicting)
        evicted_ids = self._evicted_ids[:num_evicted].copy()
        self.pool.release(evicted_ids)
        return evicted_ids

    def rollback(self, plan: StepPlan) -> None:
        """The step did not happen: the new blocks go back, nothing else has changed."""
        self._require_step(plan)
        with self._change:
            self.pool.release(plan.new_block_ids)
            self.pool.rejoin(plan.copy_sources)
            self.tables.tell_later(plan.table_update.seq_ids)
            self.tables.tell_later(plan.seq_ids[plan.changed_rows])
            plan.is_over = True
            self._outstanding = None

    def _require_step(self, plan: StepPlan) -> None:
        if plan is None or plan is not self._outstanding:
            raise InvalidStepError("this step is not the one that was reserved last")
