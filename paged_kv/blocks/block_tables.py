"""The blocks of every sequence by their places. Knows ids and places, never how they change.

With b = `open_block_size`, place i of a sequence's table is the block of its stored tokens
[i * b, (i + 1) * b). A sealed block stands in the first of its tokens' places; nobody reads the
others, nor what lies behind the last token.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from ..code_cache import compiled
from .geometry import (
    NUM_HEAD_BLOCKS,
    OPEN_BLOCK_SIZE,
    PER_BLOCK,
    BlockGeometry,
    BlockIds,
    IntArray,
)
from .sequences import Sequences, grown
from .step_plan import NO_UPDATE, TableUpdate

FIRST_WIDTH: Final = 64  # blocks


@compiled
def block_places(num_tokens: int, num_sealed: int, sizes: IntArray) -> IntArray:
    """The places of a sequence's blocks, in the order of its tokens: head, body, tail."""
    open_block_size, num_head = sizes[OPEN_BLOCK_SIZE], sizes[NUM_HEAD_BLOCKS]
    per_block = sizes[PER_BLOCK]
    num_places = -(-num_tokens // open_block_size)
    places = np.empty(num_places - num_sealed * (per_block - 1), dtype=np.int64)
    for index in range(len(places)):
        in_body = min(max(index - num_head, 0), num_sealed)  # body blocks before this one
        places[index] = index + in_body * (per_block - 1)
    return places


class BlockTables:
    """The block ids of `sequences`, `ids` [max_num_seqs, W], and which rows are to be told.

    A plan tells by itself where its blocks go. What is left are the rows of sequences that are new,
    that evicted blocks, or whose step was rolled back: the next plan tells them whole.
    """

    def __init__(self, geometry: BlockGeometry, sequences: Sequences) -> None:
        self.geometry = geometry
        self._sequences = sequences
        self._usual_width = geometry.table_width(sequences.max_model_len)
        width = min(self._usual_width, FIRST_WIDTH)
        self.ids: BlockIds = np.zeros((sequences.max_num_seqs, width), dtype=np.int32)
        self._untold: list[IntArray] = []

    def make_room(self, num_tokens: int) -> None:
        """Widen every row to sequences that store so many tokens."""
        old, needed = self.ids, self.geometry.table_width(num_tokens)
        if needed <= old.shape[1]:
            return
        width = grown(old.shape[1], needed, self._usual_width)
        block_ids: BlockIds = np.zeros((len(old), width), dtype=np.int32)
        living = self._sequences.living
        block_ids[living, : old.shape[1]] = old[living]
        self.ids = block_ids

    # -- one sequence ---------------------------------------------------------------------------

    def block_ids(self, seq_id: int) -> BlockIds:
        """Every block of a sequence, in the order of its tokens: head, body, tail."""
        block_ids: BlockIds = self.ids[seq_id, self._places(seq_id)]
        return block_ids

    def head_and_tail_ids(self, seq_id: int) -> BlockIds:
        """Open blocks of a sequence in order: head, then tail."""
        start, end = self._body(seq_id)
        places = self._places(seq_id)
        block_ids: BlockIds = self.ids[seq_id, np.concatenate([places[:start], places[end:]])]
        return block_ids

    def body_ids(self, seq_id: int) -> BlockIds:
        """Sealed blocks of a sequence in order."""
        start, end = self._body(seq_id)
        block_ids: BlockIds = self.ids[seq_id, self._places(seq_id)[start:end]]
        return block_ids

    def last_ids(self, seq_ids: IntArray) -> BlockIds:
        """The last block of each of these sequences, none of which is empty."""
        lengths = self._sequences.num_computed_tokens[seq_ids]
        return self.ids[seq_ids, (lengths - 1) // self.geometry.open_block_size]

    def write(self, seq_id: int, block_ids: BlockIds) -> None:
        """Every block of a sequence whose lengths are set, in the order of its tokens."""
        self.make_room(int(self._sequences.num_computed_tokens[seq_id]))
        self.ids[seq_id, self._places(seq_id)] = block_ids

    def copy(self, seq_id: int, child: int) -> None:
        self.ids[child] = self.ids[seq_id]
        self.tell_later(np.array([child]))

    def _places(self, seq_id: int) -> IntArray:
        sequences = self._sequences
        return block_places(
            sequences.num_computed_tokens[seq_id],
            sequences.num_sealed[seq_id],
            self.geometry.sizes,
        )

    def _body(self, seq_id: int) -> tuple[int, int]:
        """Where the body starts and ends among a sequence's blocks."""
        start = self.geometry.num_head_blocks
        return start, start + int(self._sequences.num_sealed[seq_id])

    # -- telling --------------------------------------------------------------------------------

    def tell_later(self, seq_ids: IntArray) -> None:
        """These rows are not what plans have told; each one is named once."""
        if len(seq_ids):
            self._untold.append(seq_ids)

    def take_update(self) -> TableUpdate:
        """All rows that are still to be told."""
        if not self._untold:
            return NO_UPDATE
        several = len(self._untold) > 1
        seq_ids = np.unique(np.concatenate(self._untold)) if several else self._untold[0]
        self._untold.clear()
        longest = int(self._sequences.num_computed_tokens[seq_ids].max())
        return TableUpdate(
            seq_ids=seq_ids,
            num_sealed=self._sequences.num_sealed[seq_ids],
            block_table=self.ids[seq_ids, : self.geometry.table_width(longest)],
        )
