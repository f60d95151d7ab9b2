"""Which block holds which token of which sequence. Knows block ids and counts, never tensors.

State is a structure of numpy arrays indexed by sequence *slot*, so that a step over thousands of
sequences is a few vector operations. `reserve` turns "these sequences compute so many new tokens"
into a `StepPlan` of deltas; `commit` or `rollback` ends it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .blocks import BlockAllocator, BlockGeometry, BlockIds, IntArray
from .errors import ConfigError, InvalidStepError, OutOfBlocksError


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """Where one step reads and writes. N sequences, T new tokens in all, S blocks to seal.

    The tables are as they were before the step: the context that the new tokens attend to. The new
    tokens themselves attend to each other in full precision, wherever they are stored.
    """

    slots: IntArray  # [N]
    num_scheduled_tokens: IntArray  # [N] new tokens
    context_lens: IntArray  # [N] tokens stored before the step
    query_start_loc: IntArray  # [N + 1] where each sequence's new tokens start among the T
    positions: IntArray  # [T] position of each new token in its sequence
    slot_mapping: IntArray  # [T] open token slot (block_id * open_block_size + offset), or -1
    open_table: BlockIds  # [N, C] head blocks, then tail blocks, before the step
    sealed_table: BlockIds  # [N, B] body blocks before the step
    num_sealed: IntArray  # [N] body blocks before the step
    seal_block_ids: BlockIds  # [S] blocks to write
    seal_sources: IntArray  # [S, block_size] open token slot, or ~index into the T new tokens
    new_block_ids: BlockIds  # blocks taken from the pool by this step
    freed_block_ids: BlockIds  # open blocks that are free once the step is committed

    @property
    def num_tokens(self) -> int:
        return int(self.query_start_loc[-1])


def ragged_arange(counts: IntArray) -> tuple[IntArray, IntArray]:
    """Row and offset of every element of a ragged array: counts [2, 1] -> [0, 0, 1], [0, 1, 0]."""
    rows = np.repeat(np.arange(len(counts)), counts)
    starts = np.cumsum(counts) - counts
    return rows, np.arange(len(rows)) - starts[rows]


def integer_array(name: str, values: ArrayLike) -> IntArray:
    """A copy of an array of integers; anything else is refused by name."""
    array = np.asarray(values)
    if array.size and array.dtype.kind not in "iu":
        raise InvalidStepError(f"{name} must be integers, got {values!r}")
    return array.astype(np.int64)


class BlockManager:
    """Block tables of up to `max_num_seqs` sequences over one pool of `num_blocks` blocks."""

    def __init__(
        self,
        geometry: BlockGeometry,
        *,
        num_blocks: int,
        max_num_seqs: int,
        max_model_len: int,
    ) -> None:
        for name, value in (("max_num_seqs", max_num_seqs), ("max_model_len", max_model_len)):
            if value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        self.geometry = geometry
        self.max_num_seqs = max_num_seqs
        self.max_model_len = max_model_len
        self.allocator = BlockAllocator(num_blocks)
        self.num_computed_tokens: IntArray = np.zeros(max_num_seqs, dtype=np.int64)
        self.num_sealed: IntArray = np.zeros(max_num_seqs, dtype=np.int64)
        width = geometry.open_table_width(max_model_len)
        self._open_table: BlockIds = np.zeros((max_num_seqs, width), dtype=np.int32)
        width = geometry.sealed_table_width(max_model_len)
        self._sealed_table: BlockIds = np.zeros((max_num_seqs, width), dtype=np.int32)
        self._is_active: NDArray[np.bool_] = np.zeros(max_num_seqs, dtype=np.bool_)
        self._free_slots = list(range(max_num_seqs - 1, -1, -1))
        self._outstanding: StepPlan | None = None

    @property
    def num_free_blocks(self) -> int:
        return self.allocator.num_free

    @property
    def num_blocks(self) -> int:
        return self.allocator.num_blocks

    @property
    def num_free_slots(self) -> int:
        return len(self._free_slots)

    @property
    def active_slots(self) -> IntArray:
        """Slots of the living sequences, ascending."""
        return np.flatnonzero(self._is_active)

    # -- sequences ------------------------------------------------------------------------------

    def add_sequence(self) -> int:
        """A slot for a new, empty sequence; raises `OutOfBlocksError` when all are taken."""
        if not self._free_slots:
            raise OutOfBlocksError(f"all {self.max_num_seqs} sequence slots are in use")
        slot = self._free_slots.pop()
        self._is_active[slot] = True
        return slot

    def remove_sequence(self, slot: int) -> None:
        """Free every block of a sequence and its slot."""
        self._require_no_step()
        if not 0 <= slot < self.max_num_seqs or not self._is_active[slot]:
            raise InvalidStepError(f"slot {slot} holds no sequence")
        self.allocator.free(self.block_ids(slot))
        self.num_computed_tokens[slot] = 0
        self.num_sealed[slot] = 0
        self._is_active[slot] = False
        self._free_slots.append(slot)

    def head_and_tail_ids(self, slot: int) -> BlockIds:
        """Open blocks of a sequence in order: head, then tail."""
        return self._open_table[slot, : self.num_open_blocks(np.array([slot]))[0]].copy()

    def body_ids(self, slot: int) -> BlockIds:
        """Sealed blocks of a sequence in order."""
        return self._sealed_table[slot, : self.num_sealed[slot]].copy()

    def block_ids(self, slot: int) -> BlockIds:
        """Every block of a sequence, in the order of its tokens: head, body, tail."""
        num_head = self.geometry.num_head_blocks
        open_ids = self.head_and_tail_ids(slot)
        return np.concatenate([open_ids[:num_head], self.body_ids(slot), open_ids[num_head:]])

    def num_open_blocks(self, slots: IntArray) -> IntArray:
        """Open blocks held: whole open blocks of all tokens, less those that were sealed."""
        open_end = -(-self.num_computed_tokens[slots] // self.geometry.open_block_size)
        return open_end - self.num_sealed[slots] * self.geometry.open_blocks_per_block

    # -- steps ----------------------------------------------------------------------------------

    def blocks_needed(self, slots: IntArray, num_new_tokens: IntArray) -> IntArray:
        """New blocks that each sequence would take from the pool to store its new tokens."""
        before = self.num_computed_tokens[slots]
        head, tail, sealed = self._new_block_counts(before, self.num_sealed[slots], num_new_tokens)
        return head + tail + sealed

    def _new_block_counts(
        self, before: IntArray, sealed_before: IntArray, num_new_tokens: IntArray
    ) -> tuple[IntArray, IntArray, IntArray]:
        """New head, tail and sealed blocks. Open blocks are counted from the sequence's start."""
        geometry = self.geometry
        after = before + num_new_tokens
        sealed_after = np.maximum(sealed_before, geometry.num_sealed_blocks(after))
        open_before = -(-before // geometry.open_block_size)
        open_after = -(-after // geometry.open_block_size)
        head_end = geometry.num_head_blocks
        head = np.minimum(open_after, head_end) - np.minimum(open_before, head_end)
        tail_start = head_end + sealed_after * geometry.open_blocks_per_block
        tail = np.maximum(open_after - np.maximum(open_before, tail_start), 0)
        return head, tail, sealed_after - sealed_before

    def reserve(self, slots: IntArray, num_new_tokens: IntArray) -> StepPlan | None:
        """Take the blocks for one step, all or nothing; None, and nothing changed, when they lack.

        `slots` [N] are distinct living sequences, `num_new_tokens` [N] at least 1 each. Raises
        `InvalidStepError` where they are not, or while a step is neither committed nor rolled back.
        """
        self._require_no_step()
        slots = integer_array("slots", slots)
        num_new_tokens = integer_array("num_new_tokens", num_new_tokens)
        self._check_step(slots, num_new_tokens)
        before = self.num_computed_tokens[slots]
        sealed_before = self.num_sealed[slots]
        after = before + num_new_tokens
        head, tail, sealed = self._new_block_counts(before, sealed_before, num_new_tokens)
        num_new_blocks = int((head + tail + sealed).sum())
        if num_new_blocks > self.num_free_blocks:
            return None
        new_ids = self.allocator.allocate(num_new_blocks)
        sealed_ids, open_ids = np.split(new_ids, [int(sealed.sum())])

        open_width = int(self.num_open_blocks(slots).max(initial=0))
        open_before = self._open_table[slots, :open_width]
        sealed_table = self._sealed_table[slots, : int(sealed_before.max(initial=0))]
        freed_ids = self._shift_out_sealed(slots, sealed)
        self._append_sealed(slots, sealed_before, sealed, sealed_ids)
        self._append_open(slots, before, sealed_before + sealed, after, head + tail, open_ids)

        query_start_loc = np.concatenate([[0], np.cumsum(num_new_tokens)])
        rows, offsets = ragged_arange(num_new_tokens)
        positions = before[rows] + offsets
        slot_mapping = self._open_slots(
            self._open_table, slots[rows], (sealed_before + sealed)[rows], positions
        )
        seal_rows, seal_offsets = ragged_arange(sealed)
        plan = StepPlan(
            slots=slots,
            num_scheduled_tokens=num_new_tokens,
            context_lens=before,
            query_start_loc=query_start_loc,
            positions=positions,
            slot_mapping=slot_mapping,
            open_table=open_before,
            sealed_table=sealed_table,
            num_sealed=sealed_before,
            seal_block_ids=sealed_ids,
            seal_sources=self._seal_sources(
                open_before, sealed_before, before, query_start_loc, seal_rows, seal_offsets
            ),
            new_block_ids=new_ids,
            freed_block_ids=freed_ids,
        )
        self.num_computed_tokens[slots] = after
        self.num_sealed[slots] += sealed
        self._outstanding = plan
        return plan

    def _require_no_step(self) -> None:
        if self._outstanding is not None:
            raise InvalidStepError("commit or roll back the step before")

    def _check_step(self, slots: IntArray, num_new_tokens: IntArray) -> None:
        if slots.shape != num_new_tokens.shape or slots.ndim != 1:
            raise InvalidStepError(
                f"slots and num_new_tokens must be one-dimensional and equally long, got shapes "
                f"{slots.shape} and {num_new_tokens.shape}"
            )
        is_slot = (slots >= 0) & (slots < self.max_num_seqs)
        if not is_slot.all() or not self._is_active[slots].all():
            raise InvalidStepError(f"slots {slots.tolist()} are not all living sequences")
        if np.bincount(slots, minlength=1).max() > 1:
            raise InvalidStepError(f"slots {slots.tolist()} name a sequence twice")
        if (num_new_tokens < 1).any():
            raise InvalidStepError(f"every sequence needs new tokens, got {num_new_tokens.min()}")
        longest = int((self.num_computed_tokens[slots] + num_new_tokens).max(initial=0))
        if longest > self.max_model_len:
            raise InvalidStepError(
                f"a sequence would have {longest} tokens; max_model_len is {self.max_model_len}"
            )

    def _require_step(self, plan: StepPlan) -> None:
        if plan is not self._outstanding:
            raise InvalidStepError("this step is not the one that was reserved last")

    def _shift_out_sealed(self, slots: IntArray, newly_sealed: IntArray) -> BlockIds:
        """Drop from the tails the open blocks whose tokens are being sealed; returns their ids."""
        head_end = self.geometry.num_head_blocks
        freed = [np.empty(0, dtype=np.int32)]
        for row in np.flatnonzero(newly_sealed):
            slot = slots[row]
            held = self.num_open_blocks(slots[row : row + 1])[0]
            leaving = int(newly_sealed[row]) * self.geometry.open_blocks_per_block
            tail = self._open_table[slot, head_end : max(held, head_end)].copy()
            freed.append(tail[:leaving])
            self._open_table[slot, head_end : head_end + len(tail[leaving:])] = tail[leaving:]
        return np.concatenate(freed)

    def _append_sealed(
        self, slots: IntArray, sealed_before: IntArray, newly_sealed: IntArray, ids: BlockIds
    ) -> None:
        rows, offsets = ragged_arange(newly_sealed)
        self._sealed_table[slots[rows], sealed_before[rows] + offsets] = ids

    def _append_open(
        self,
        slots: IntArray,
        before: IntArray,
        sealed_after: IntArray,
        after: IntArray,
        num_new: IntArray,
        ids: BlockIds,
    ) -> None:
        """Write new open ids behind the open blocks that stay: new ones are always the last."""
        geometry = self.geometry
        columns_after = (
            -(-after // geometry.open_block_size) - sealed_after * geometry.open_blocks_per_block
        )
        rows, offsets = ragged_arange(num_new)
        self._open_table[slots[rows], (columns_after - num_new)[rows] + offsets] = ids

    def _open_slots(
        self, open_table: BlockIds, rows: IntArray, num_sealed: IntArray, positions: IntArray
    ) -> IntArray:
        """Open token slot of each position, or -1 where the token is in the sealed body.

        `rows` are table rows and `num_sealed` body blocks, both one per position.
        """
        geometry = self.geometry
        body_end = geometry.num_head_tokens + num_sealed * geometry.block_size
        in_head = positions < geometry.num_head_tokens
        in_body = ~in_head & (positions < body_end)
        sealed_columns = num_sealed * geometry.open_blocks_per_block
        columns = positions // geometry.open_block_size - np.where(in_head, 0, sealed_columns)
        block_ids = open_table[rows, np.where(in_body, 0, columns)].astype(np.int64)
        slots = block_ids * geometry.open_block_size + positions % geometry.open_block_size
        return np.where(in_body, -1, slots)

    def _seal_sources(
        self,
        open_table: BlockIds,
        num_sealed: IntArray,
        context_lens: IntArray,
        query_start_loc: IntArray,
        rows: IntArray,
        offsets: IntArray,
    ) -> IntArray:
        """Where each token of each block being sealed comes from: an open slot or a new token."""
        geometry = self.geometry
        first = geometry.num_head_tokens + (num_sealed[rows] + offsets) * geometry.block_size
        positions = (first[:, None] + np.arange(geometry.block_size)).reshape(-1)
        token_rows = np.repeat(rows, geometry.block_size)
        stored = positions < context_lens[token_rows]
        new_index = query_start_loc[token_rows] + positions - context_lens[token_rows]
        sources = ~new_index
        stored_rows = token_rows[stored]
        sources[stored] = self._open_slots(
            open_table, stored_rows, num_sealed[stored_rows], positions[stored]
        )
        return sources.reshape(-1, geometry.block_size)

    def commit(self, plan: StepPlan) -> None:
        """The step's writes are done: the open blocks it replaced return to the pool."""
        self._require_step(plan)
        self.allocator.free(plan.freed_block_ids)
        self._outstanding = None

    def rollback(self, plan: StepPlan) -> None:
        """The step did not happen: restore every count and table, give the new blocks back."""
        self._require_step(plan)
        self.num_computed_tokens[plan.slots] = plan.context_lens
        self.num_sealed[plan.slots] = plan.num_sealed
        self._open_table[plan.slots, : plan.open_table.shape[1]] = plan.open_table
        self.allocator.free(plan.new_block_ids)
        self._outstanding = None

    # -- invariants -----------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Assert every invariant; O(pool), for tests and debugging."""
        slots = self.active_slots
        owned = [self.block_ids(int(slot)) for slot in slots]
        if self._outstanding is not None:
            owned.append(self._outstanding.freed_block_ids)
        self.allocator.check_integrity(np.concatenate([np.empty(0, dtype=np.int32), *owned]))
        idle = np.setdiff1d(np.arange(self.max_num_seqs), slots)
        assert sorted(self._free_slots) == idle.tolist()
        assert not self.num_computed_tokens[idle].any()
        assert not self.num_sealed[idle].any()
        lengths = self.num_computed_tokens[slots]
        assert np.array_equal(self.num_sealed[slots], self.geometry.num_sealed_blocks(lengths))
        assert (self.num_open_blocks(slots) <= self._open_table.shape[1]).all()
