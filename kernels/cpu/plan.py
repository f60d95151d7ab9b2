"""Cut a step's attention into work items for the threads of a CPU.

Knows lengths and counts of heads, nothing of formats: a step is planned once for all its layers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from ..step_inputs import StepInputs
from .native_code import Scratch, address_of_array, thread_scratch
from .native_plan import PLAN_STRUCT, PlanFields, Totals, plan_worker
from .records import (
    CALL_BYTE,
    ITEM_ROWS,
    PAIR_BYTES,
    PAIR_ITEM_ROWS,
    PARTIAL_FLOATS,
    RECORD_BYTES,
    SCRATCH_FLOATS,
    STEP_STRUCT,
    CallFields,
    Item,
    StepFields,
)
from .threads import run_worker

MIN_SPLIT_TOKENS: Final = 1024  # a smaller part is not worth merging
MIN_THREAD_TOKENS: Final = 512  # of all kv heads; fewer are not worth waking another thread
MIN_LARGE_ITEMS: Final = 4  # for each thread; fewer would leave some of them waiting
Longs = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class WorkItems:
    """The items of a step for one number of kv heads and of query heads of each."""

    num_threads: int
    items: Longs  # [items, Item.COUNT], long ones first
    partials: NDArray[np.float32]  # [partials, ITEM_ROWS, PARTIAL_FLOATS]
    record: memoryview  # the attention worker's, the fields of the step filled in
    record_address: int
    call: CallFields  # a view of the record's fields of a call
    counters: memoryview  # [2 + rows in parts] 64-bit, to be zeroed before each call
    zeros: bytes
    memory: tuple[NDArray[np.generic], ...]  # that is kept for the record's addresses
    kept: list[object] = field(default_factory=list)  # what its fields of a call point to
    sources: list[object] = field(default_factory=list)  # and what they were filled from


class CpuPlan:
    """What the layers of a step share: work items, made when the first layer asks for them."""

    def __init__(self, step: StepInputs) -> None:
        self.step = step
        self.num_threads: int = torch.get_num_threads()
        self.scratch: Final = thread_scratch("attention", self.num_threads, 4 * SCRATCH_FLOATS)
        self.pair_scratch: Scratch | None = None
        self.has_prefills: bool = int(step.query_lens.max(initial=0)) > 1
        self._items: dict[tuple[int, int, bool], WorkItems] = {}

    def items(self, num_kv_heads: int, query_group_size: int, *, has_pairs: bool) -> WorkItems:
        """`has_pairs`: products are of pairs of bfloat16, where an item has rows enough."""
        key = num_kv_heads, query_group_size, has_pairs
        if key not in self._items:
            heads = num_kv_heads, query_group_size
            rows = self._pair_item_rows(*heads) if has_pairs else ITEM_ROWS
            work = plan_items(self.step, *heads, self.num_threads, item_rows=rows)
            if has_pairs:
                self.pair_scratch = thread_scratch("pairs", self.num_threads, PAIR_BYTES)
                work.call.pair_scratch = self.pair_scratch.address
            work.call.num_query_heads = num_kv_heads * query_group_size
            work.call.scratch = self.scratch.address
            self._items[key] = work
        return self._items[key]

    def _pair_item_rows(self, num_kv_heads: int, query_group_size: int) -> int:
        """Large items, where there are enough of them for all threads."""
        num_large = -(-self.step.query_lens * query_group_size // PAIR_ITEM_ROWS)
        is_enough = num_kv_heads * int(num_large.sum()) >= MIN_LARGE_ITEMS * self.num_threads
        return PAIR_ITEM_ROWS if is_enough else ITEM_ROWS


def plan_items(
    step: StepInputs,
    num_kv_heads: int,
    query_group_size: int,
    num_threads: int,
    *,
    item_rows: int = ITEM_ROWS,
) -> WorkItems:
    """Cut a step into items: by sequence, kv head, query rows, and long contexts into parts."""
    num_seqs = len(step.query_lens)
    first_total = 2 * num_seqs + 1
    first_field = first_total + len(Totals._fields)
    memory = np.empty(first_field + len(PlanFields._fields), dtype=np.int64)
    address = address_of_array(memory)
    fields = PlanFields(
        num_seqs=num_seqs,
        query_start_loc=step.query_start_loc.data_ptr(),
        context_lens=step.context_lens.data_ptr(),
        num_sealed=step.num_sealed.data_ptr(),
        stored_tokens=step.stored_tokens.data_ptr(),
        num_stored=len(step.stored_tokens),
        block_size=step.block_size,
        num_head_tokens=step.num_head_tokens,
        num_kv_heads=num_kv_heads,
        query_group_size=query_group_size,
        num_threads=num_threads,
        min_split_tokens=MIN_SPLIT_TOKENS,
        item_rows=item_rows,
        stored_starts=address,
        num_parts=address + 8 * (num_seqs + 1),
        totals=address + 8 * first_total,
        writes_items=0,
        items=0,
    )
    PLAN_STRUCT.pack_into(memory.data, 8 * first_field, *fields)
    run_worker(plan_worker(), address + 8 * first_field, 1)
    totals = Totals(*memory[first_total:first_field].tolist())
    items = np.empty((totals.num_items, Item.COUNT), dtype=np.int64)
    fields = fields._replace(writes_items=1, items=address_of_array(items))
    PLAN_STRUCT.pack_into(memory.data, 8 * first_field, *fields)
    run_worker(plan_worker(), address + 8 * first_field, 1)
    # Long ones first: the last ones fill the gaps.
    items = items[np.argsort(-items[:, Item.COST], kind="stable")]
    return with_record(step, items, totals, memory, num_threads, query_group_size)


def with_record(
    step: StepInputs,
    items: Longs,
    totals: Totals,
    memory: Longs,
    num_threads: int,
    query_group_size: int,
) -> WorkItems:
    """Items and the record that the attention worker reads; `memory` begins with stored starts."""
    counters = np.empty(2 + totals.num_partials, dtype=np.int64)
    partials = np.empty((totals.num_partials, ITEM_ROWS, PARTIAL_FLOATS), dtype=np.float32)
    record = np.zeros(-(-RECORD_BYTES // 8), dtype=np.int64)
    record_address = address_of_array(record)
    sinks, windows = step.num_sink_tokens, step.window_sizes
    fields = StepFields(
        num_items=len(items),
        items=address_of_array(items),
        context_lens=step.context_lens.data_ptr(),
        num_sealed=step.num_sealed.data_ptr(),
        query_start_loc=step.query_start_loc.data_ptr(),
        block_table=step.block_table.data_ptr(),
        table_width=step.block_table.stride(0),
        block_size=step.block_size,
        open_block_size=step.open_block_size,
        num_head_tokens=step.num_head_tokens,
        query_group_size=query_group_size,
        num_sink_tokens=0 if sinks is None else sinks.data_ptr(),
        window_sizes=0 if windows is None else windows.data_ptr(),
        counters=address_of_array(counters),
        partials=address_of_array(partials),
        stored_starts=address_of_array(memory),
        stored_tokens=step.stored_tokens.data_ptr(),
        stored_slots=step.stored_slots.data_ptr(),
    )
    record_bytes = record.data.cast("B")
    STEP_STRUCT.pack_into(record_bytes, 0, *fields)
    return WorkItems(
        num_threads=min(num_threads, len(items), 1 + totals.num_tokens // MIN_THREAD_TOKENS),
        items=items,
        partials=partials,
        record=record_bytes,
        record_address=record_address,
        call=CallFields.from_buffer(record_bytes, CALL_BYTE),
        counters=counters.data.cast("B"),
        zeros=bytes(counters.nbytes),
        memory=(memory, items, partials, counters, record),
    )
