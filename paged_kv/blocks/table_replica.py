"""The block tables as the runner of a model knows them: from plans alone. Knows no pool, no torch.

It may run in another process than the block manager, or some steps behind it.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np

from ..errors import InvalidStepError
from .geometry import BlockGeometry, BlockIds, IntArray, ragged_arange
from .growth import COPIED, SEALED, place_blocks
from .step_plan import StepPlan

NO_CHANGES: Final = (
    np.empty(0, dtype=np.int64),
    np.empty(0, dtype=np.int64),
    np.empty(0, dtype=np.int32),
)


class _Seals(NamedTuple):
    """Sealed blocks of a step, and how many body blocks its sequences have then."""

    seq_ids: IntArray  # [R]
    num_sealed: IntArray  # [R]
    block_seq_ids: IntArray  # [S], as the next two
    places: IntArray
    block_ids: BlockIds


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
        self._seals: _Seals | None = None  # of the last of these; they take effect with the next
        self._changed: list[tuple[IntArray, IntArray]] | None = None  # rows and places

    def apply(self, plan: StepPlan) -> None:
        """Take over what the step before sealed, and what the plan tells.

        New open blocks and copies get their places at once: the context does not reach as far, and
        a copy is made before anything is read or written. The same plan again changes nothing.
        Raises `InvalidStepError`, changing nothing, for a plan that does not come next. Interrupted
        anywhere, it can be applied again, or another one in its place.
        """
        if plan.number not in (self._num_applied - 1, self._num_applied):
            raise InvalidStepError(
                f"step {plan.number} cannot begin here: {self._num_applied} steps were begun, and "
                "each that is committed has to be, in order"
            )
        if plan.number == self._num_applied:  # the step before is over
            self._seal()
        update = plan.table_update
        if len(update.seq_ids):
            width = update.block_table.shape[1]
            self._make_room(int(update.seq_ids.max()) + 1, width)
            places = np.tile(np.arange(width), len(update.seq_ids))
            self._note(np.repeat(update.seq_ids, width), places)
            self._num_sealed[update.seq_ids] = update.num_sealed
            self._block_table[update.seq_ids, :width] = update.block_table
        seals = None
        if len(plan.changed_rows):
            seals = self._place(plan)
        self._seals, self._num_applied = seals, plan.number + 1

    def _place(self, plan: StepPlan) -> _Seals | None:
        """Give new open blocks and copies their places; what the step seals has them later."""
        geometry, rows, counts = self._geometry, plan.changed_rows, plan.block_counts
        seq_ids, before = plan.seq_ids[rows], plan.context_lens[rows]
        after = before + plan.num_scheduled_tokens[rows]
        self._make_room(0, geometry.table_width(int(after.max())))
        num_sealed, num_seals = self._num_sealed[seq_ids], len(plan.seal_block_ids)
        self._note_new_places(seq_ids, before, after)
        open_ids = plan.new_block_ids[num_seals : len(plan.new_block_ids) - len(plan.copy_targets)]
        table = self._block_table
        place_blocks(seq_ids, before, num_sealed, counts, open_ids, table, geometry.sizes)
        if len(plan.copy_targets):
            is_copied = counts[:, COPIED] > 0
            last_places = (before[is_copied] - 1) // geometry.open_block_size
            self._note(seq_ids[is_copied], last_places)
            table[seq_ids[is_copied], last_places] = plan.copy_targets
        if not num_seals:
            return None
        sealing, offsets = ragged_arange(counts[:, SEALED])
        places = geometry.body_places(num_sealed[sealing] + offsets)
        num_sealed += counts[:, SEALED]
        return _Seals(seq_ids, num_sealed, seq_ids[sealing], places, plan.seal_block_ids)

    def _seal(self) -> None:
        """Let what the step before sealed take effect; twice is as good as once."""
        seals = self._seals
        if seals is not None:
            self._note(seals.block_seq_ids, seals.places)
            self._num_sealed[seals.seq_ids] = seals.num_sealed
            self._block_table[seals.block_seq_ids, seals.places] = seals.block_ids

    # -- another replica ------------------------------------------------------------------------

    def note_changes(self) -> None:
        """From now on `changes` tells what changed, and all that there is to begin with."""
        num_rows, width = self._block_table.shape
        every_row, every_place = np.divmod(np.arange(num_rows * width), max(width, 1))
        self._changed = [(every_row, every_place)]

    def note_nothing(self) -> None:
        """Nobody asks for changes any more."""
        self._changed = None

    def changes(self) -> tuple[IntArray, IntArray, BlockIds]:
        """Rows, places and ids that differ, or may, from what was told before `forget_changes`."""
        assert self._changed is not None, "nobody asked for changes to be noted"
        if not self._changed:
            return NO_CHANGES
        rows, places = (np.concatenate(parts) for parts in zip(*self._changed, strict=True))
        return rows, places, self._block_table[rows, places]

    def forget_changes(self) -> None:
        """They were told, and arrived."""
        self._changed = []

    def _note(self, rows: IntArray, places: IntArray) -> None:
        """Before it changes: an exception later leaves too much noted, never too little."""
        if self._changed is not None:
            self._changed.append((rows, places))

    def _note_new_places(self, seq_ids: IntArray, before: IntArray, after: IntArray) -> None:
        """Those that hold no token yet."""
        if self._changed is not None:
            size = self._geometry.open_block_size
            first = -(-before // size)
            rows, offsets = ragged_arange(-(-after // size) - first)
            self._note(seq_ids[rows], first[rows] + offsets)

    # -------------------------------------------------------------------------------------------

    def num_sealed(self, plan: StepPlan) -> IntArray:
        """[N] body blocks of a plan's sequences."""
        return self._num_sealed[plan.seq_ids]

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
        table: BlockIds = np.zeros((num_rows, width), dtype=np.int32)
        table[: old.shape[0], : old.shape[1]] = old
        num_sealed: IntArray = np.zeros(num_rows, dtype=np.int64)
        num_sealed[: old.shape[0]] = self._num_sealed
        self._block_table, self._num_sealed = table, num_sealed
