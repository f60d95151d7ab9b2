"""One step as plain data: what it computes, takes, seals, copies and lets go.

Knows block ids and counts, never tensors or live tables: a plan can be pickled, and read after its
step has ended. It carries what changes; whoever runs the model keeps the tables themselves, in a
`TableReplica`, and makes the arrays that kernels want of both (`StepArrays`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import InvalidStepError
from .geometry import BlockGeometry, BlockIds, IntArray
from .retention import EVERYTHING, Retention
from .sequences import integer_array


@dataclass(eq=False, kw_only=True)
class TableUpdate:
    """Rows of block tables as they are before the step, where earlier plans do not tell them.

    They belong to sequences that are new, that evicted blocks or whose step was rolled back,
    whether they are part of this step or not. See `BlockTables` for their form.
    """

    seq_ids: IntArray  # [U]
    num_sealed: IntArray  # [U] body blocks
    block_table: BlockIds  # [U, W]


NO_UPDATE: Final = TableUpdate(
    seq_ids=np.empty(0, dtype=np.int64),
    num_sealed=np.empty(0, dtype=np.int64),
    block_table=np.empty((0, 0), dtype=np.int32),
)


@dataclass(frozen=True, kw_only=True)
class PlanSource:
    """Which manager makes plans, and what its block ids mean."""

    manager_id: bytes  # a random one
    geometry: BlockGeometry
    num_blocks: int
    retentions: tuple[Retention, ...] = EVERYTHING  # of groups of layers
    num_recoveries: int = 0  # it has been emptied so often: earlier blocks mean nothing


@dataclass(eq=False, kw_only=True)
class StepPlan:
    """N sequences, T new tokens in all, R sequences whose blocks change, S blocks to seal.

    The new tokens attend to the context, everything stored before the step, where it was, and to
    each other in full precision, wherever they are stored.

    Of several groups of layers each has a plan of its own for the same sequences and tokens; the
    first group's, which is the one that `reserve` returns, carries those of the `others`.
    """

    source: PlanSource
    number: int  # plans that its manager has committed before
    seq_ids: IntArray  # [N]
    num_scheduled_tokens: IntArray  # [N] new tokens
    num_draft_tokens: IntArray | None  # [N] of these, last ones that commit may drop
    context_lens: IntArray  # [N] tokens stored before the step
    num_evicted_tokens: IntArray | None  # [N] before the step; None where none can be
    # Of sequences with a window of their own; None where the step has none.
    num_sink_tokens: IntArray | None  # [N]
    window_sizes: IntArray | None  # [N] 0 where there is no such window
    changed_rows: IntArray  # [R] index among the N; the tables of the others stay as they are
    block_counts: IntArray  # [R, 4] new sealed, new open, leaving open blocks, copies
    new_block_ids: BlockIds  # taken from the pool: sealed, then open, then copies
    seal_block_ids: BlockIds  # [S] blocks to write, those of one sequence in order
    copy_sources: BlockIds  # [C] shared open blocks to copy before anything is written ...
    copy_targets: BlockIds  # [C] ... and where to
    freed_block_ids: BlockIds  # let go by commit, as often as they lose a user
    table_update: TableUpdate
    others: tuple[StepPlan, ...] = ()  # of the groups behind the first
    is_over: bool = False  # committed or rolled back; a copy elsewhere does not know

    @property
    def parts(self) -> tuple[StepPlan, ...]:
        """Of every group of layers, in order."""
        return (self, *self.others)

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
    def is_draft(self) -> NDArray[np.bool_] | None:
        """[T] whether a new token is a draft; None where none is."""
        if self.num_draft_tokens is None:
            return None
        first_drafts = self.query_start_loc[1:] - self.num_draft_tokens
        return np.arange(self.num_tokens) >= first_drafts[self.token_rows]

    @cached_property
    def positions(self) -> IntArray:
        """[T] position of each new token in its sequence."""
        if self.num_evicted_tokens is None:
            return self.cache_positions
        return self.cache_positions + self.num_evicted_tokens[self.token_rows]

    @property
    def is_windowed(self) -> NDArray[np.bool_] | None:
        """[T] whether a new token is a windowed sequence's; None where no sequence is one."""
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
        """[T] place of each new token among the tokens that its sequence stores."""
        if self.is_decode:
            return self.context_lens
        starts = self.query_start_loc[:-1] - self.context_lens
        return np.arange(self.num_tokens) - starts[self.token_rows]

    def kept_tokens(self, num_kept_tokens: ArrayLike | None) -> IntArray:
        """[N] new tokens that stay; raises `InvalidStepError` if any but drafts would be dropped.

        None keeps all.
        """
        num_new = self.num_scheduled_tokens
        if num_kept_tokens is None:
            return num_new
        num_kept = integer_array("num_kept_tokens", num_kept_tokens)
        num_draft = 0 if self.num_draft_tokens is None else self.num_draft_tokens
        fits = (
            num_kept.shape == num_new.shape
            and ((num_kept >= num_new - num_draft) & (num_kept <= num_new)).all()
        )
        if not fits:
            raise InvalidStepError(
                "a step may only drop its draft tokens: num_kept_tokens must be from "
                f"{(num_new - num_draft).tolist()} to {num_new.tolist()}, got {num_kept.tolist()}"
            )
        return num_kept
