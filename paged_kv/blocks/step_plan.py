"""One step as data: what it takes, seals, copies and lets go, and on demand where each token goes.

Knows block ids and counts, never tensors. The deltas cost little and are always there; the index
arrays that kernels want are made when they are first read, which must be before the step ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidStepError
from .block_tables import BlockTables, ragged_arange
from .geometry import BlockIds, IntArray


@dataclass(eq=False, kw_only=True)
class StepPlan:
    """N sequences, T new tokens in all, R sequences whose blocks change, S blocks to seal.

    The tables are as they were before the step: the context that the new tokens attend to. The new
    tokens themselves attend to each other in full precision, wherever they are stored.
    """

    seq_ids: IntArray  # [N]
    num_scheduled_tokens: IntArray  # [N] new tokens
    num_draft_tokens: IntArray | None  # [N] of these, last ones that commit may drop
    context_lens: IntArray  # [N] tokens stored before the step
    num_evicted_tokens: IntArray | None  # [N] of streams, before the step; None where there is none
    num_sink_tokens: IntArray | None  # [N]
    window_sizes: IntArray | None  # [N] 0 where the sequence keeps everything
    changed_rows: IntArray  # [R] index among the N; the tables of the others stay as they are
    block_counts: IntArray  # [R, 4] new sealed, new open, leaving open blocks, copies
    new_block_ids: BlockIds  # taken from the pool: sealed, then open, then copies
    seal_block_ids: BlockIds  # [S] blocks to write, those of one sequence in order
    copy_sources: BlockIds  # [C] shared open blocks to copy before anything is written ...
    copy_targets: BlockIds  # [C] ... and where to
    freed_block_ids: BlockIds  # let go by commit, as often as they lose a user
    unended_tables: BlockTables | None  # None once the step is committed or rolled back

    @property
    def tables(self) -> BlockTables:
        if self.unended_tables is None:
            raise InvalidStepError("index arrays of a step must be read before it ends")
        return self.unended_tables

    @cached_property
    def num_tokens(self) -> int:
        return int(self.num_scheduled_tokens.sum())

    @cached_property
    def query_start_loc(self) -> IntArray:
        """[N + 1] where each sequence's new tokens start among the T."""
        starts = np.zeros(len(self.seq_ids) + 1, dtype=np.int64)
        np.cumsum(self.num_scheduled_tokens, out=starts[1:])
        return starts

    @property
    def is_decode(self) -> bool:
        """One new token for each sequence."""
        return self.num_tokens == len(self.seq_ids)

    @cached_property
    def token_rows(self) -> IntArray:
        """[T] index among the N of each new token's sequence."""
        rows = np.arange(len(self.seq_ids))
        return rows if self.is_decode else np.repeat(rows, self.num_scheduled_tokens)

    @cached_property
    def positions(self) -> IntArray:
        """[T] position of each new token in its sequence."""
        if self.num_evicted_tokens is None:
            return self.cache_positions
        return self.cache_positions + self.num_evicted_tokens[self.token_rows]

    @property
    def is_stream(self) -> NDArray[np.bool_] | None:
        """[T] whether a new token is a stream's; None where no sequence is one."""
        return None if self.window_sizes is None else self.window_sizes[self.token_rows] > 0

    @cached_property
    def head_shifts(self) -> IntArray | None:
        """[T] tokens that are evicted for each new token: it is so much nearer to its sinks.

        None where that is 0 for all. See `SinkWindow`.
        """
        if self.num_sink_tokens is None or self.window_sizes is None:
            return None
        has_sinks = self.num_sink_tokens > 0
        num_visible = self.num_sink_tokens + self.window_sizes
        shifts = np.maximum(self.positions + 1 - num_visible[self.token_rows], 0)
        shifts *= has_sinks[self.token_rows]
        return shifts if shifts.any() else None

    @cached_property
    def cache_positions(self) -> IntArray:
        """[T] position of each new token among the tokens that its sequence stores."""
        if self.is_decode:
            return self.context_lens
        starts = self.query_start_loc[:-1] - self.context_lens
        return np.arange(self.num_tokens) - starts[self.token_rows]

    @cached_property
    def num_sealed(self) -> IntArray:
        """[N] body blocks before the step."""
        return self.tables.num_sealed[self.seq_ids]

    @cached_property
    def open_table(self) -> BlockIds:
        """[N, C] head blocks, then tail blocks, before the step."""
        width = int(self.tables.num_open[self.seq_ids].max(initial=0))
        return self.tables.open[self.seq_ids, :width]

    @cached_property
    def sealed_table(self) -> BlockIds:
        """[N, B] body blocks before the step."""
        return self.tables.sealed[self.seq_ids, : int(self.num_sealed.max(initial=0))]

    @cached_property
    def slot_mapping(self) -> IntArray:
        """[T] open token slot (block_id * open_block_size + offset) of each new token.

        -1 where a token goes straight into a block that this step seals.
        """
        geometry, rows = self.tables.geometry, self.token_rows
        num_columns = self.tables.num_open[self.seq_ids]
        sealed_after = self.num_sealed.copy()
        sealed_after[self.changed_rows] += self.block_counts[:, 0]
        num_columns[self.changed_rows] += self.block_counts[:, 1]
        open_ends = -(-(self.context_lens + self.num_scheduled_tokens) // geometry.open_block_size)
        body_end = geometry.num_head_tokens + sealed_after * geometry.block_size
        positions = self.cache_positions
        in_body = (positions >= geometry.num_head_tokens) & (positions < body_end[rows])
        stored = np.flatnonzero(~in_body)
        stored_rows = rows[stored]
        mapping = np.full(len(positions), -1, dtype=np.int64)
        mapping[stored] = self.tables.open_slots(
            self.seq_ids[stored_rows],
            num_columns[stored_rows],
            open_ends[stored_rows],
            positions[stored],
        )
        self._redirect_copies(mapping)
        return mapping

    def _redirect_copies(self, mapping: IntArray) -> None:
        """Tokens for a shared block go to its copy, which the tables name only after commit."""
        open_block_size = self.tables.geometry.open_block_size
        copy_rows = self.changed_rows[self.block_counts[:, 3] > 0]
        for row, target in zip(copy_rows.tolist(), self.copy_targets.tolist(), strict=True):
            start, end = self.query_start_loc[row : row + 2]
            filled = int(self.context_lens[row]) % open_block_size
            end = min(end, start + open_block_size - filled)
            mapping[start:end] = target * open_block_size + filled + np.arange(end - start)

    @cached_property
    def seal_sources(self) -> IntArray:
        """[S, block_size] where each token to be sealed is: an open slot, or ~index of the T."""
        geometry = self.tables.geometry
        changed, offsets = ragged_arange(self.block_counts[:, 0])
        seal_rows = self.changed_rows[changed]
        first = geometry.num_head_tokens + (self.num_sealed[seal_rows] + offsets) * (
            geometry.block_size
        )
        positions = (first[:, None] + np.arange(geometry.block_size)).reshape(-1)
        rows = np.repeat(seal_rows, geometry.block_size)
        sources = ~(self.query_start_loc[rows] + positions - self.context_lens[rows])
        stored = np.flatnonzero(positions < self.context_lens[rows])
        rows = rows[stored]
        open_ends = -(-self.context_lens // geometry.open_block_size)
        sources[stored] = self.tables.open_slots(
            self.seq_ids[rows],
            self.tables.num_open[self.seq_ids][rows],
            open_ends[rows],
            positions[stored],
        )
        return sources.reshape(-1, geometry.block_size)
