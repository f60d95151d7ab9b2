"""Cut a step's attention into work items for the threads of a CPU.

Knows lengths and counts of heads, nothing of formats: a step is planned once for all its layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from ..step_inputs import StepInputs
from .microkernels import TILE_TOKENS
from .native_attention import MAX_ITEM_ROWS, PARTIAL_FLOATS, SCRATCH_FLOATS, Field, Item
from .native_code import thread_scratch

MIN_SPLIT_TOKENS: Final = 1024  # a smaller part is not worth merging
ITEMS_PER_THREAD: Final = 8  # so that threads end at nearly the same time
MIN_THREAD_TOKENS: Final = 512  # of all kv heads; fewer are not worth waking another thread
FIRST_LAYER_FIELD: Final = Field.KEY_DIM
NUMBERS_LONGS: Final = 2  # room for four floats
Longs = NDArray[np.int64]


@dataclass(frozen=True)
class WorkItems:
    """The items of a step for one number of kv heads and of query heads of each."""

    num_threads: int
    fields: int  # address of the worker's fields, those of the step filled in
    buffer: memoryview  # the same, and behind them the numbers of a call
    counters: memoryview  # [2 + rows in parts] 64-bit, to be zeroed before each call
    zeros: bytes
    arrays: tuple[NDArray[np.generic], ...]  # whose memory all this is


class CpuPlan:
    """What the layers of a step share: work items, made when the first layer asks for them."""

    def __init__(self, step: StepInputs) -> None:
        self.step = step
        self.num_threads = torch.get_num_threads()
        self.scratch = thread_scratch("attention", self.num_threads, 4 * SCRATCH_FLOATS)
        self.has_chunks = int(step.query_lens.max(initial=0)) > 1
        self._items: dict[tuple[int, int], WorkItems] = {}

    def items(self, num_kv_heads: int, group_size: int) -> WorkItems:
        key = num_kv_heads, group_size
        if key not in self._items:
            self._items[key] = plan_items(self.step, num_kv_heads, group_size, self.num_threads)
        return self._items[key]


def plan_items(step: StepInputs, num_kv_heads: int, group_size: int, num_threads: int) -> WorkItems:
    """Cut a step into items: by sequence, kv head, query rows, and long contexts into parts."""
    context_lens = step.context_lens_host
    num_rows = step.query_lens * group_size
    num_row_tiles = -(-num_rows // MAX_ITEM_ROWS)
    unit_tokens, num_units = count_units(step, context_lens)
    num_parts = count_parts(context_lens, num_units, num_row_tiles, num_kv_heads, num_threads)
    counts = num_row_tiles * num_kv_heads * num_parts
    sequence = np.repeat(np.arange(len(counts)), counts)
    index = np.arange(len(sequence)) - np.repeat(np.cumsum(counts) - counts, counts)
    parts = num_parts[sequence]
    index, part = np.divmod(index, parts)
    row_tile, head = np.divmod(index, num_kv_heads)

    items = np.zeros((len(sequence), Item.COUNT), dtype=np.int64)
    items[:, Item.SEQUENCE] = sequence
    items[:, Item.KV_HEAD] = head
    items[:, Item.FIRST_ROW] = row_tile * MAX_ITEM_ROWS
    items[:, Item.NUM_ROWS] = np.minimum(
        num_rows[sequence] - row_tile * MAX_ITEM_ROWS, MAX_ITEM_ROWS
    )
    # The first part has the head too, the last one the rest.
    part_units, part_tokens = num_units[sequence], unit_tokens[sequence]
    start, end = (
        step.num_head_tokens + part_units * edge // parts * part_tokens for edge in (part, part + 1)
    )
    items[:, Item.START] = np.where(part == 0, 0, start)
    items[:, Item.END] = np.where(part + 1 == parts, context_lens[sequence], end)
    is_split = parts > 1
    items[:, Item.NUM_PARTS] = parts
    items[:, Item.PARTIAL] = np.where(is_split, np.cumsum(is_split) - 1, -1)
    items[:, Item.FIRST_PARTIAL] = items[:, Item.PARTIAL] - part
    items[:, Item.COUNTER] = 1 + np.cumsum(is_split & (part == 0))
    cost = (items[:, Item.END] - items[:, Item.START] + TILE_TOKENS) * items[:, Item.NUM_ROWS]
    items = items[np.argsort(-cost, kind="stable")]  # long ones first: the last ones fill the gaps
    num_partials = int(is_split.sum())
    counters = np.zeros(2 + num_partials, dtype=np.int64)
    partials = np.empty((num_partials, MAX_ITEM_ROWS, PARTIAL_FLOATS), dtype=np.float32)
    fields = np.zeros(Field.COUNT + NUMBERS_LONGS, dtype=np.int64)
    # The stored tokens are in the order of the step.
    stored_starts = np.searchsorted(step.stored_tokens.numpy(), step.query_start_loc.numpy())
    fields[:FIRST_LAYER_FIELD] = [
        *step_fields(step, items, group_size),
        counters.ctypes.data,
        partials.ctypes.data,
        stored_starts.ctypes.data,
        step.stored_tokens.data_ptr(),
        step.stored_slots.data_ptr(),
    ]
    num_new = step.query_lens[items[:, Item.SEQUENCE]]
    num_tokens = int((items[:, Item.END] - items[:, Item.START] + num_new).sum())
    return WorkItems(
        num_threads=min(num_threads, len(items), 1 + num_tokens // MIN_THREAD_TOKENS),
        fields=fields.ctypes.data,
        buffer=fields.data.cast("B"),
        counters=counters.data.cast("B"),
        zeros=bytes(counters.nbytes),
        arrays=(items, counters, partials, stored_starts, fields),
    )


def count_units(step: StepInputs, context_lens: Longs) -> tuple[Longs, Longs]:
    """Where contexts may be cut: tokens of a unit and number of units [N], behind the head.

    A unit is a sealed block, or a tile in the open blocks of a context without any.
    """
    num_sealed = step.num_sealed.numpy()
    has_body = num_sealed > 0
    behind_head = context_lens - np.minimum(step.num_head_tokens, context_lens)
    return (
        np.where(has_body, step.block_size, TILE_TOKENS),
        np.where(has_body, num_sealed, behind_head // TILE_TOKENS),
    )


def count_parts(
    context_lens: Longs,
    num_units: Longs,
    num_row_tiles: Longs,
    num_kv_heads: int,
    num_threads: int,
) -> Longs:
    """Into how many parts [N] each sequence's context is cut so that all threads have work."""
    if num_threads == 1:
        return np.ones_like(context_lens)
    total = int((context_lens * num_row_tiles).sum()) * num_kv_heads
    share = max(MIN_SPLIT_TOKENS, total // (ITEMS_PER_THREAD * num_threads))
    num_parts = np.minimum(-(-context_lens // share), num_units)
    return np.where(num_row_tiles == 1, np.maximum(num_parts, 1), 1)


def step_fields(step: StepInputs, items: Longs, group_size: int) -> list[int]:
    """The first fields of the worker, in order."""
    return [
        len(items),
        items.ctypes.data,
        step.context_lens.data_ptr(),
        step.num_sealed.data_ptr(),
        step.query_start_loc.data_ptr(),
        step.block_table.data_ptr(),
        step.block_table.stride(0),
        step.block_size,
        step.open_block_size,
        step.num_head_tokens,
        group_size,
        0 if step.num_sink_tokens is None else step.num_sink_tokens.data_ptr(),
        0 if step.window_sizes is None else step.window_sizes.data_ptr(),
    ]
