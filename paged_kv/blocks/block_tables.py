"""The blocks of every sequence, in order. Knows ids and counts by seq_id, never how they change.

A structure of numpy arrays indexed by sequence *seq_id*, so that a step over thousands of sequences
is a few vector operations.
"""

from __future__ import annotations

import numpy as np

from ..code_cache import compiled
from .geometry import BlockGeometry, BlockIds, IntArray


def ragged_arange(counts: IntArray) -> tuple[IntArray, IntArray]:
    """Row and offset of every element of a ragged array: counts [2, 1] -> [0, 0, 1], [0, 1, 0]."""
    total = int(counts.sum())
    rows = counts.nonzero()[0]
    if len(rows) == total:  # nowhere more than one: what most steps are
        return rows, np.zeros(total, dtype=np.int64)
    rows = np.repeat(np.arange(len(counts)), counts)
    starts = np.cumsum(counts) - counts
    return rows, np.arange(total) - starts[rows]


@compiled
def join_ids(
    seq_id: int,
    open_table: BlockIds,
    sealed_table: BlockIds,
    num_open: IntArray,
    num_sealed: IntArray,
    num_head_blocks: int,
) -> BlockIds:
    """Head, body and tail of one sequence."""
    held, sealed = num_open[seq_id], num_sealed[seq_id]
    block_ids = np.empty(held + sealed, dtype=np.int32)
    num_head = min(num_head_blocks, held)
    block_ids[:num_head] = open_table[seq_id, :num_head]
    block_ids[num_head : num_head + sealed] = sealed_table[seq_id, :sealed]
    block_ids[num_head + sealed :] = open_table[seq_id, num_head:held]
    return block_ids


class BlockTables:
    """Lengths and block ids of up to `max_num_seqs` sequences of up to `max_model_len` tokens."""

    def __init__(self, geometry: BlockGeometry, *, max_num_seqs: int, max_model_len: int) -> None:
        self.geometry = geometry
        self.max_stored = max_model_len  # tokens that a row has room for
        self.num_computed_tokens: IntArray = np.zeros(max_num_seqs, dtype=np.int64)  # stored
        self.num_open: IntArray = np.zeros(max_num_seqs, dtype=np.int64)
        self.num_sealed: IntArray = np.zeros(max_num_seqs, dtype=np.int64)
        width = geometry.open_table_width(max_model_len)
        self.open: BlockIds = np.zeros((max_num_seqs, width), dtype=np.int32)  # head, then tail
        width = geometry.sealed_table_width(max_model_len)
        self.sealed: BlockIds = np.zeros((max_num_seqs, width), dtype=np.int32)

    def make_room(self, num_tokens: int) -> None:
        """Widen every row to sequences that store so many tokens."""
        if num_tokens <= self.max_stored:
            return
        geometry, (old_open, old_sealed) = self.geometry, (self.open, self.sealed)
        width = geometry.open_table_width(num_tokens)
        self.open = np.zeros((len(old_open), width), dtype=np.int32)
        self.open[:, : old_open.shape[1]] = old_open
        width = geometry.sealed_table_width(num_tokens)
        self.sealed = np.zeros((len(old_sealed), width), dtype=np.int32)
        self.sealed[:, : old_sealed.shape[1]] = old_sealed
        self.max_stored = num_tokens

    def head_and_tail_ids(self, seq_id: int) -> BlockIds:
        """Open blocks of a sequence in order: head, then tail."""
        return self.open[seq_id, : self.num_open[seq_id]].copy()

    def body_ids(self, seq_id: int) -> BlockIds:
        """Sealed blocks of a sequence in order."""
        return self.sealed[seq_id, : self.num_sealed[seq_id]].copy()

    def block_ids(self, seq_id: int) -> BlockIds:
        """Every block of a sequence, in the order of its tokens: head, body, tail."""
        return join_ids(
            seq_id,
            self.open,
            self.sealed,
            self.num_open,
            self.num_sealed,
            self.geometry.num_head_blocks,
        )

    def open_slots(
        self,
        table_rows: IntArray,
        num_columns: IntArray,
        num_open_ends: IntArray,
        positions: IntArray,
    ) -> IntArray:
        """Open token slots (block_id * open_block_size + offset) of tokens in head or tail.

        For each token: its row of the open table, how many columns of that row are filled, and how
        many open blocks the sequence would have had it never sealed: the last of these is the last
        column. The other arguments are one per token.
        """
        geometry = self.geometry
        index = positions // geometry.open_block_size
        columns = np.where(
            index < geometry.num_head_blocks, index, index - num_open_ends + num_columns
        )
        block_ids = self.open[table_rows, columns].astype(np.int64)
        seq_ids: IntArray = (
            block_ids * geometry.open_block_size + positions % geometry.open_block_size
        )
        return seq_ids
