"""The block tables as the runner of a model knows them: from plans alone. Knows no pool, no torch.

It may run in another process than the block manager, or some steps behind it.
"""

from __future__ import annotations

import numpy as np

from ..errors import InvalidStepError
from .geometry import BlockGeometry, BlockIds, IntArray, ragged_arange
from .growth import COPIED, SEALED, place_blocks
from .step_plan import StepPlan


class TableReplica:
    """One row for each sequence, in the form of `BlockTables`; grows as plans need it.

    Every plan of one manager that is committed has to be applied, in order, and no later than the
    next one; another order is refused. A plan that is rolled back may be applied too: the next one
    tells its rows again.
    """

    def __init__(self, geometry: BlockGeometry) -> None:
        self._geometry = geometry
        self._num_sealed: IntArray = np.zeros(0, dtype=np.int64)
        self._block_table: BlockIds = np.zeros((0, 0), dtype=np.int32)
        self._num_applied = 0  # plans, of those rolled back none or the last
        self._sealing: StepPlan | None = None  # whose seals take effect before the next plan

    def apply(self, plan: StepPlan) -> None:
        """Take over what the step before sealed, and what the plan tells.

        New open blocks and copies get their places at once: the context does not reach as far, and
        a copy is made before anything is read or written. The same plan again changes nothing.
        Raises `InvalidStepError`, changing nothing, for a plan that does not come next.
        """
        if plan.number not in (self._num_applied - 1, self._num_applied):
            raise InvalidStepError(
                f"step {plan.number} cannot begin here: {self._num_applied} steps were begun, and "
                "each that is committed has to be, in order"
            )
        self._num_applied = plan.number + 1
        if self._sealing is not None and self._sealing is not plan:
            self._seal(self._sealing)
        self._sealing = plan if len(plan.seal_block_ids) else None
        update = plan.table_update
        if len(update.seq_ids):
            width = update.block_table.shape[1]
            self._make_room(int(update.seq_ids.max()) + 1, width)
            self._num_sealed[update.seq_ids] = update.num_sealed
            self._block_table[update.seq_ids, :width] = update.block_table
        rows = plan.changed_rows
        if not len(rows):
            return
        seq_ids, before = plan.seq_ids[rows], plan.context_lens[rows]
        after = before + plan.num_scheduled_tokens[rows]
        self._make_room(0, self._geometry.table_width(int(after.max())))
        num_sealed, num_seals = self._num_sealed[seq_ids], len(plan.seal_block_ids)
        open_ids = plan.new_block_ids[num_seals : len(plan.new_block_ids) - len(plan.copy_targets)]
        table, sizes = self._block_table, self._geometry.sizes
        place_blocks(seq_ids, before, num_sealed, plan.block_counts, open_ids, table, sizes)
        if len(plan.copy_targets):
            is_copied = plan.block_counts[:, COPIED] > 0
            last_places = (before[is_copied] - 1) // self._geometry.open_block_size
            table[seq_ids[is_copied], last_places] = plan.copy_targets

    def _seal(self, plan: StepPlan) -> None:
        geometry, counts = self._geometry, plan.block_counts[:, SEALED]
        seq_ids = plan.seq_ids[plan.changed_rows]
        rows, offsets = ragged_arange(counts)
        places = geometry.body_places(self._num_sealed[seq_ids[rows]] + offsets)
        self._block_table[seq_ids[rows], places] = plan.seal_block_ids
        self._num_sealed[seq_ids] += counts

    def rows(self, plan: StepPlan) -> tuple[IntArray, IntArray]:
        """Copies for the N sequences of a plan: `num_sealed` [N] and `block_table` [N, W].

        W covers the context and the new tokens of each.
        """
        longest = int((plan.context_lens + plan.num_scheduled_tokens).max(initial=0))
        block_table = self._block_table[plan.seq_ids, : self._geometry.table_width(longest)]
        return self._num_sealed[plan.seq_ids], block_table.astype(np.int64)

    def _make_room(self, num_rows: int, width: int) -> None:
        old = self._block_table
        if num_rows <= old.shape[0] and width <= old.shape[1]:
            return
        num_rows = max(2 * num_rows, old.shape[0]) if num_rows > old.shape[0] else old.shape[0]
        width = max(2 * width, old.shape[1]) if width > old.shape[1] else old.shape[1]
        self._block_table = np.zeros((num_rows, width), dtype=np.int32)
        self._block_table[: old.shape[0], : old.shape[1]] = old
        old_sealed = self._num_sealed
        self._num_sealed = np.zeros(num_rows, dtype=np.int64)
        self._num_sealed[: len(old_sealed)] = old_sealed
