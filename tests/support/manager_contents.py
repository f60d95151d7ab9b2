"""What a block manager's blocks hold, as its plans, copies and swaps say."""

from __future__ import annotations

from typing import NamedTuple

from paged_kv.blocks.step_arrays import StepArrays
from paged_kv.blocks.step_plan import StepPlan
from tests.support.plan_reader import slot_mapping
from tests.support.reference_manager import Sequence, Shape


class Cell(NamedTuple):
    """What a group's layers computed for a token: it depends on the history that ends with it."""

    group: int
    history: int


class Contents:
    """What each block holds: open or sealed, and a cell for each token."""

    def __init__(self, num_blocks: int) -> None:
        self.kinds: list[str | None] = [None] * num_blocks
        self.cells: list[list[Cell | None]] = [[] for _ in range(num_blocks)]

    def put(self, block_id: int, kind: str | None, cells: list[Cell | None]) -> None:
        self.kinds[block_id], self.cells[block_id] = kind, cells

    def move(self, block_ids: list[int], other: Contents, other_ids: list[int]) -> None:
        for block_id, other_id in zip(block_ids, other_ids, strict=True):
            other.put(other_id, self.kinds[block_id], self.cells[block_id].copy())

    def apply(
        self, plan: StepPlan, arrays: StepArrays, new_cells: list[Cell], open_block_size: int
    ) -> None:
        """Do the writes of a group's plan, of whose new tokens `new_cells` are computed.

        What is sealed and what is written may come in any order: no cell is part of both.
        """
        for block_id in plan.new_block_ids.tolist():
            self.put(block_id, None, [])  # whatever it held must not be read again
        self.move(plan.copy_sources.tolist(), self, plan.copy_targets.tolist())
        read = set()
        num_sealed_new = 0
        for block_id, sources in zip(
            plan.seal_block_ids.tolist(), arrays.seal_sources.tolist(), strict=True
        ):
            cells: list[Cell | None] = []
            for source in sources:
                if source < 0:
                    cells.append(new_cells[~source])
                    num_sealed_new += 1
                    continue
                source_id, offset = divmod(source, open_block_size)
                assert self.kinds[source_id] == "open", "a block is sealed from a sealed one"
                cells.append(self.cells[source_id][offset])
                read.add(source)
            self.put(block_id, "sealed", cells)
        targets = slot_mapping(arrays).tolist()
        written = [target for target in targets if target >= 0]
        assert len(targets) == len(new_cells)
        assert len(targets) - len(written) == num_sealed_new, "a new token has two places or none"
        assert len(set(written)) == len(written), "two tokens are written to one cell"
        assert not read & set(written), "a cell is sealed and written in one step"
        for target, cell in zip(targets, new_cells, strict=True):
            if target < 0:
                continue
            block_id, offset = divmod(target, open_block_size)
            if self.kinds[block_id] is None:
                self.put(block_id, "open", [None] * open_block_size)
            assert self.kinds[block_id] == "open", "a sealed block is written"
            self.cells[block_id][offset] = cell

    def context(
        self, arrays: StepArrays, row: int, shape: Shape, num_gone: int
    ) -> dict[int, Cell | None]:
        """What a sequence of a step finds in its table, by position; so many behind the head are
        gone."""
        found = {}
        body_end = shape.num_head + int(arrays.num_sealed[row]) * shape.block_size
        for index in range(int(arrays.context_lens[row])):
            first, kind = index // shape.open_block_size * shape.open_block_size, "open"
            if shape.num_head <= index < body_end:
                in_body = index - shape.num_head
                first = shape.num_head + in_body // shape.block_size * shape.block_size
                kind = "sealed"
            block_id = int(arrays.block_table[row, first // shape.open_block_size])
            assert self.kinds[block_id] == kind
            position = index if index < shape.num_head else index + num_gone
            found[position] = self.cells[block_id][index - first]
        return found

    def check(self, sequence: Sequence, group: int) -> None:
        """Every block of a group holds what its user computed."""
        computed = sequence.histories[: sequence.num_computed]
        for stretch, block_id in sequence.groups[group].blocks.items():
            cells = self.cells[block_id]
            histories = computed[stretch.start :][: len(cells)]
            assert self.kinds[block_id] == stretch.kind
            assert cells[: len(histories)] == [Cell(group, history) for history in histories], (
                f"block {block_id} holds other tokens"
            )
