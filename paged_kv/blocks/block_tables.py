"""What one group of layers stores of every sequence, in which blocks. Knows no pool, no tokens.

With b = `open_block_size`, place i of a sequence's table is the block of its stored tokens
[i * b, (i + 1) * b). A sealed block stands in the first of its tokens' places; nobody reads the
others, nor what lies behind the last token. Stored tokens are counted without those that were
evicted, which lay behind the head: a table is that of a shorter sequence then.

`state[seq_id]` is one sequence, as in `Sequences`.
"""

from __future__ import annotations

from typing import Final, NamedTuple

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
from .retention import Retention
from .sequences import NO_ROWS, Sequences, StateArray, grown
from .sink_window import SinkWindow
from .step_plan import NO_UPDATE, TableUpdate

FIRST_WIDTH = 64  # blocks; tests begin with fewer
STORED: Final = np.dtype(
    [
        ("num_evicted_tokens", np.int64),
        # Of sequences that a window of their own bounds here; 0 in all others:
        ("num_sink_tokens", np.int64),
        ("window_size", np.int64),
        ("max_stored", np.int64),  # tokens stored at once, at the end of a step
        # Where prefixes are shared:
        ("link_limit", np.int64),  # links that others may ever find
        ("num_published", np.int64),  # links that others can find, or could
    ],
    align=True,
)


class StoredLengths(NamedTuple):
    """How much a group stores of a sequence."""

    num_stored: int  # tokens
    num_sealed: int  # body blocks
    num_evicted: int = 0  # tokens


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

    The layers of group number `group` still need what its `retention` says.

    A plan tells by itself where its blocks go. What is left are the rows of sequences that are new,
    that evicted blocks, or whose step was rolled back: the next plan tells them whole.
    """

    def __init__(
        self, geometry: BlockGeometry, sequences: Sequences, retention: Retention, group: int = 0
    ) -> None:
        self.geometry = geometry
        self.retention = retention
        self.group = group
        self.rule: Final = retention.numbers(geometry)
        max_num_seqs = sequences.max_num_seqs
        self.state: StateArray = np.zeros(max_num_seqs, dtype=STORED)
        self.num_stored: IntArray = np.zeros(max_num_seqs, dtype=np.int64)  # tokens
        self.num_sealed: IntArray = np.zeros(max_num_seqs, dtype=np.int64)  # body blocks
        # Tokens that a sequence can store before its blocks change.
        self.capacity: IntArray = np.zeros(max_num_seqs, dtype=np.int64)
        self._arrays = (self.state, self.num_stored, self.num_sealed, self.capacity)
        self.num_windowed: int = 0  # sequences that a window of their own bounds here
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

    # -- beginning and end ----------------------------------------------------------------------

    def start(self, seq_id: int, sink_window: SinkWindow | None, link_limit: int) -> None:
        """A sequence that stores nothing yet. Its own window counts where it reaches less far."""
        state = self.state[seq_id]
        state["link_limit"] = link_limit
        if sink_window is not None and self.retention.is_bounded_by(sink_window):
            self.num_windowed += 1
            state["num_sink_tokens"] = sink_window.num_sink_tokens
            state["window_size"] = sink_window.window_size
            state["max_stored"] = sink_window.max_stored(self.geometry)
            self.make_room(sink_window.max_stored(self.geometry))

    def fork(self, seq_id: int, child: int) -> None:
        """A copy of a sequence, of whose blocks both have to be looked at anew."""
        for array in self._arrays:
            array[child] = array[seq_id]
        self.capacity[[seq_id, child]] = self.num_stored[seq_id]
        self.num_windowed += bool(self.state[seq_id]["window_size"])
        self.ids[child] = self.ids[seq_id]
        self.tell_later(np.array([child]))

    def truncate(self, seq_id: int, num_stored: int, num_sealed: int) -> None:
        """Keep the first tokens; the last block is looked at anew."""
        self.num_stored[seq_id] = self.capacity[seq_id] = num_stored
        self.num_sealed[seq_id] = num_sealed
        self.tell_later(np.array([seq_id]))

    def end(self, seq_id: int) -> None:
        self.num_windowed -= bool(self.state[seq_id]["window_size"])
        for array in self._arrays:
            array[seq_id] = 0

    # -- one sequence ---------------------------------------------------------------------------

    def lengths(self, seq_id: int) -> StoredLengths:
        return StoredLengths(
            int(self.num_stored[seq_id]),
            int(self.num_sealed[seq_id]),
            int(self.state[seq_id]["num_evicted_tokens"]),
        )

    def place(self, seq_id: int, lengths: StoredLengths, block_ids: BlockIds) -> None:
        """A sequence that stores so much, in these blocks in the order of its tokens."""
        self.num_stored[seq_id] = self.capacity[seq_id] = lengths.num_stored
        self.num_sealed[seq_id] = lengths.num_sealed
        self.state[seq_id]["num_evicted_tokens"] = lengths.num_evicted
        self.make_room(lengths.num_stored)
        self.ids[seq_id, self._places(seq_id)] = block_ids

    def cut_lengths(self, seq_id: int, num_tokens: int) -> StoredLengths | None:
        """What is left of a sequence cut to its first `num_tokens`; None where that cannot be.

        They may end within a sealed block, or the next token may see what was let go.
        """
        _, num_sealed, num_evicted = self.lengths(seq_id)
        left = num_tokens - num_evicted
        num_head = self.geometry.num_head_tokens
        if num_evicted and self.retention.first_seen(num_tokens) < num_head + num_evicted:
            return None
        kept = self.geometry.num_sealed_within(left, num_sealed)
        return None if kept is None else StoredLengths(left, kept, num_evicted)

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
        lengths = self.num_stored[seq_ids]
        return self.ids[seq_ids, (lengths - 1) // self.geometry.open_block_size]

    def _places(self, seq_id: int) -> IntArray:
        return block_places(self.num_stored[seq_id], self.num_sealed[seq_id], self.geometry.sizes)

    def _body(self, seq_id: int) -> tuple[int, int]:
        """Where the body starts and ends among a sequence's blocks."""
        start = self.geometry.num_head_blocks
        return start, start + int(self.num_sealed[seq_id])

    def blocks_to_grow(self, lengths: StoredLengths, num_tokens: int, chunk: int) -> int:
        """Blocks at most that a sequence takes for so many more tokens, up to `chunk` a step."""
        after = lengths.num_stored + num_tokens
        if num_tokens > chunk:
            end = after + lengths.num_evicted
            after = min(after, self.retention.most_stored(self.geometry, end, chunk))
        return self.geometry.blocks_to_grow(lengths.num_stored, lengths.num_sealed, after)

    # -- windows --------------------------------------------------------------------------------

    @property
    def evicts(self) -> bool:
        """Whether some sequence may let go of blocks as it grows."""
        return self.num_windowed > 0 or not self.retention.keeps_all

    def windowed_rows(self, seq_ids: IntArray) -> IntArray:
        """Which of these sequences a window of their own bounds here, by index."""
        if not self.num_windowed:
            return NO_ROWS
        rows: IntArray = self.state["window_size"][seq_ids].nonzero()[0]
        return rows

    def num_storable(self, seq_ids: IntArray) -> IntArray:
        """Tokens that each of these windowed sequences may store at the end of its next step.

        The step that stores its sinks computes nothing that would see them nearer than they are.
        """
        state = self.state[seq_ids]
        sinks, limits = state["num_sink_tokens"], state["max_stored"]
        has_sinks = self.num_stored[seq_ids] >= sinks
        return np.where(has_sinks, limits, np.minimum(limits, sinks + state["window_size"]))

    # -- checks ---------------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Assert that lengths agree with each other, and that nothing is known of no sequence."""
        living = self._sequences.living
        idle = np.setdiff1d(np.arange(len(self.state)), living)
        for array in self._arrays:
            assert (array[idle] == np.zeros(1, dtype=array.dtype)).all()
        window_sizes, num_evicted = self.state["window_size"], self.state["num_evicted_tokens"]
        assert self.num_windowed == np.count_nonzero(window_sizes)
        if self.retention.keeps_all:
            assert not num_evicted[window_sizes == 0].any()
        assert not (num_evicted % self.geometry.block_size).any()
        lengths, num_sealed = self.num_stored[living], self.num_sealed[living]
        width = self.geometry.table_width(int(lengths.max(initial=0)))
        assert width <= self.ids.shape[1], "a sequence is longer than its row"
        body_ends = self.geometry.num_head_tokens + num_sealed * self.geometry.block_size
        assert (lengths >= np.where(num_sealed, body_ends, 0)).all()
        is_overdue = lengths > self.capacity[living]  # drafts were kept beyond a seal
        assert (self.geometry.num_sealed_blocks(lengths) > num_sealed)[is_overdue].all()

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
        longest = int(self.num_stored[seq_ids].max())
        return TableUpdate(
            seq_ids=seq_ids,
            num_sealed=self.num_sealed[seq_ids],
            block_table=self.ids[seq_ids, : self.geometry.table_width(longest)],
        )
