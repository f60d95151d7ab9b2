"""Attention of new tokens over paged context on a CPU: plans the work, sets the worker's fields.

Same signatures as the torch reference in `attention`. The work of a step is cut into items once,
for all layers; a call sets a few addresses and starts the worker on torch's threads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .cpu_microkernels import (
    MAX_ROWS,
    TILE_TOKENS,
    affine_kernel,
    fold_kernel,
    prefetch_kernel,
    score_kernel,
    softmax_kernel,
    start_kernel,
    value_kernel,
)
from .cpu_native import thread_scratch
from .cpu_threads import run_worker
from .cpu_vectors import host_width
from .cpu_worker import (
    MAX_ITEM_ROWS,
    NEW_TOKEN_ROWS,
    NUM_VARIANTS,
    PARTIAL_FLOATS,
    SCRATCH_FLOATS,
    Field,
    Item,
    attention_worker,
)
from .records import LayerRecords, SealedViews, StepIndices

LOG2_E: Final = 1.4426950408889634
MIN_SPLIT_TOKENS: Final = 1024  # a smaller part is not worth merging
ITEMS_PER_THREAD: Final = 8  # so that threads end at nearly the same time
ROW_VARIANTS: Final = (1, 2, 4, MAX_ROWS)
FIRST_LAYER_FIELD: Final = Field.KEY_DIM
FIRST_CALL_FIELD: Final = Field.START
Longs = NDArray[np.int64]
# Beside a layer's fields, the addresses that they point to.
_layer_fields: WeakKeyDictionary[LayerRecords, tuple[Longs, Longs]] = WeakKeyDictionary()


@dataclass(frozen=True)
class WorkItems:
    """The items of a step for one number of kv heads and of query heads of each."""

    items: Longs  # [num_items, Item.COUNT]
    counters: Longs  # [2 + rows in parts]
    partials: NDArray[np.float32]  # [parts, MAX_ITEM_ROWS, PARTIAL_FLOATS]
    fields: Longs  # the worker's fields, those of the step filled in


class CpuPlan:
    """What the layers of a step share: work items, made when the first layer asks for them."""

    def __init__(self, step: StepIndices) -> None:
        self.step = step
        self.num_threads = torch.get_num_threads()
        self.has_chunks = max(step.query_lens, default=0) > 1
        self._items: dict[tuple[int, int], WorkItems] = {}

    def items(self, num_kv_heads: int, group_size: int) -> WorkItems:
        key = num_kv_heads, group_size
        if key not in self._items:
            self._items[key] = plan_items(self.step, num_kv_heads, group_size, self.num_threads)
        return self._items[key]


def plan_items(
    step: StepIndices, num_kv_heads: int, group_size: int, num_threads: int
) -> WorkItems:
    """Cut a step into items: by sequence, kv head, query rows, and long contexts into parts."""
    context_lens = np.array(step.context_lens_host, dtype=np.int64)
    num_rows = np.array(step.query_lens, dtype=np.int64) * group_size
    num_row_tiles = -(-num_rows // MAX_ITEM_ROWS)
    num_parts = count_parts(context_lens, num_row_tiles, num_kv_heads, num_threads)
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
    items[:, Item.START] = part_start(step, context_lens, sequence, part, parts)
    items[:, Item.END] = part_start(step, context_lens, sequence, part + 1, parts)
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
    fields = np.zeros(Field.COUNT, dtype=np.int64)
    fields[:FIRST_LAYER_FIELD] = step_fields(step, items, counters, partials, group_size)
    return WorkItems(items, counters, partials, fields)


def count_parts(
    context_lens: Longs, num_row_tiles: Longs, num_kv_heads: int, num_threads: int
) -> Longs:
    """Into how many parts [N] each sequence's context is cut so that all threads have work."""
    if num_threads == 1:
        return np.ones_like(context_lens)
    total = int((context_lens * num_row_tiles).sum()) * num_kv_heads
    share = max(MIN_SPLIT_TOKENS, total // (ITEMS_PER_THREAD * num_threads))
    return np.where(num_row_tiles == 1, np.maximum(-(-context_lens // share), 1), 1)


def part_start(
    step: StepIndices, context_lens: Longs, sequence: Longs, part: Longs, parts: Longs
) -> Longs:
    """Where a part of a context begins: at a sealed block's edge, or at a tile's in open blocks."""
    num_sealed = step.num_sealed.numpy()[sequence]
    context_len = context_lens[sequence]
    head = np.minimum(step.num_head_tokens, context_len)
    has_body = num_sealed > 0
    unit = np.where(has_body, step.block_size, TILE_TOKENS)
    num_units = np.where(has_body, num_sealed, (context_len - head) // TILE_TOKENS)
    start = head + num_units * part // parts * unit
    return np.where(part == 0, 0, np.where(part == parts, context_len, start))


def step_fields(
    step: StepIndices,
    items: Longs,
    counters: Longs,
    partials: NDArray[np.float32],
    group_size: int,
) -> list[int]:
    """The first fields of the worker, in order."""
    return [
        len(items),
        items.ctypes.data,
        step.context_lens.data_ptr(),
        step.num_sealed.data_ptr(),
        step.query_start_loc.data_ptr(),
        step.open_table.data_ptr(),
        step.open_table.shape[1],
        step.sealed_table.data_ptr(),
        step.sealed_table.shape[1],
        step.block_size,
        step.open_block_size,
        step.num_head_tokens,
        group_size,
        counters.ctypes.data,
        partials.ctypes.data,
    ]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    records: LayerRecords,
    plan: CpuPlan,
    *,
    scale: float,
    softcap: float | None = None,
    sliding_window: int | None = None,
    attention_chunk: int | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """As `attention.attend`; sums are float32 whatever the dtype of the query."""
    num_tokens, num_query_heads, _ = query.shape
    num_kv_heads = key.shape[1]
    output = torch.empty(num_tokens, num_query_heads, value.shape[-1], dtype=torch.float32)
    if not num_tokens:
        return output.to(query.dtype)
    work = plan.items(num_kv_heads, num_query_heads // num_kv_heads)
    rows, keys, values = (as_float_rows(tensor) for tensor in (query, key, value))
    channel_major = channel_major_keys(keys) if plan.has_chunks else keys
    # With a softcap, scores are bounded in units of the softcap and then turned into powers of 2.
    factor = scale * LOG2_E if softcap is None else scale / softcap
    numbers = np.array([0.0, factor, (softcap or 0.0) * LOG2_E], dtype=np.float32)
    sinks = None if sink_logits is None else sink_logits.float() * LOG2_E
    start, softmax, softmax_sealed = softmax_kernels(records, softcap is not None)
    work.counters[:] = 0
    fields = work.fields
    fields[FIRST_LAYER_FIELD:FIRST_CALL_FIELD] = layer_fields(records)
    fields[FIRST_CALL_FIELD:] = [
        start,
        softmax,
        softmax_sealed,
        *addresses(rows),
        *addresses(keys),
        channel_major.data_ptr(),
        channel_major.shape[-1],
        *addresses(values),
        output.data_ptr(),
        num_query_heads,
        sliding_window or 0,
        attention_chunk or 0,
        0 if sinks is None else sinks.data_ptr(),
        numbers.ctypes.data,
        thread_scratch("attention", plan.num_threads, 4 * SCRATCH_FLOATS),
    ]
    run_worker(attention_worker(), fields.ctypes.data, plan.num_threads)
    return output if query.dtype == torch.float32 else output.to(query.dtype)


def as_float_rows(tensor: Tensor) -> Tensor:
    """float32 with contiguous rows."""
    tensor = tensor.float()
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def addresses(tensor: Tensor) -> tuple[int, int, int]:
    """Of float32 [T, heads, D]: address, bytes from token to token and from head to head."""
    return tensor.data_ptr(), 4 * tensor.stride(0), 4 * tensor.stride(1)


def channel_major_keys(keys: Tensor) -> Tensor:
    """New keys [T, H, key_dim] as [H, key_dim, T and some]: a kernel reads whole vectors."""
    num_tokens, num_heads, dim = keys.shape
    padded = torch.empty(num_heads, dim, num_tokens + NEW_TOKEN_ROWS)
    padded[:, :, :num_tokens] = keys.permute(1, 2, 0)
    return padded


def softmax_kernels(records: LayerRecords, has_softcap: bool) -> tuple[int, int, int]:
    """Microkernels that depend on the softcap: start, and softmax over open and sealed blocks."""
    scaling = "none"
    if records.sealed is not None:
        scaling = "symmetric" if records.sealed.key_zero is None else "asymmetric"
    return (
        start_kernel(has_softcap).address,
        softmax_kernel("none", has_softcap, host_width()).address,
        softmax_kernel(scaling, has_softcap, host_width()).address,
    )


def layer_fields(records: LayerRecords) -> Longs:
    """The worker's fields that describe a layer: sizes, addresses, microkernels."""
    if records not in _layer_fields:
        kernels = np.array(row_kernels(records), dtype=np.int64)
        _layer_fields[records] = make_layer_fields(records, kernels), kernels
    return _layer_fields[records][0]


def make_layer_fields(records: LayerRecords, kernels: Longs) -> Longs:
    keys, values = records.open_keys, records.open_values
    itemsize = keys.element_size()
    fields = [
        keys.shape[3],
        values.shape[3],
        keys.stride(0) * itemsize,
        keys.stride(1) * itemsize,
        keys.data_ptr(),
        values.data_ptr(),
        keys.stride(3) * itemsize,
        values.stride(2) * itemsize,
        open_piece(records),
        *sealed_fields(records.sealed),
        kernels.ctypes.data,
        fold_kernel().address,
        affine_kernel().address,
        prefetch_kernel().address,
    ]
    return np.array(fields, dtype=np.int64)


def open_piece(records: LayerRecords) -> int:
    """Tokens of an open block whose scores are computed at once."""
    return min(records.open_keys.shape[2], TILE_TOKENS)


def row_kernels(records: LayerRecords) -> list[list[int]]:
    """Addresses of the microkernels [Kernel.COUNT][NUM_VARIANTS]; 0 where there is no such."""
    sealed, value_dim = records.sealed, records.open_values.shape[3]
    dtype, code = str(records.open_keys.dtype).removeprefix("torch."), f"int{records.bits}"
    none = [0] * NUM_VARIANTS
    score_sealed, value_sealed = none, none
    if sealed is not None:
        is_grouped = sealed.key_zero is not None and sealed.key_zero.shape[2] > 1
        score_sealed = score_kernels(code, sealed.key_codes.shape[2], is_grouped=is_grouped)
        value_sealed = value_kernels(code, value_dim)
    return [
        score_kernels(dtype, open_piece(records), is_grouped=False),
        score_sealed,
        score_kernels("float32", NEW_TOKEN_ROWS, is_grouped=False),
        value_kernels(dtype, value_dim),
        value_sealed,
        value_kernels("float32", value_dim),
    ]


def sealed_fields(sealed: SealedViews | None) -> list[int]:
    """Where the sections of sealed blocks are."""
    if sealed is None:
        return [0] * (Field.KERNELS - Field.KEY_CODES)
    key_zero, value_zero = sealed.key_zero, sealed.value_zero
    sections = [sealed.key_scale, key_zero, sealed.value_scale, value_zero]
    present = [section for section in sections if section is not None]
    start = min(section.data_ptr() for section in present)
    size = sum(section[0, 0].nbytes for section in present)
    block_size = sealed.value_scale.shape[2]
    num_groups = 0 if key_zero is None else key_zero.shape[2]
    return [
        sealed.key_codes.data_ptr(),
        sealed.value_codes.data_ptr(),
        sealed.key_codes.shape[2],
        *(0 if section is None else section.data_ptr() for section in sections),
        start,
        size,
        num_groups,
        (block_size // max(num_groups, 1)).bit_length() - 1,
    ]


def score_kernels(kind: str, num_token_rows: int, *, is_grouped: bool) -> list[int]:
    """Addresses by number of query rows."""
    return [
        score_kernel(kind, rows, num_token_rows, is_grouped, host_width()).address
        for rows in ROW_VARIANTS
    ]


def value_kernels(kind: str, value_dim: int) -> list[int]:
    return [value_kernel(kind, rows, value_dim, host_width()).address for rows in ROW_VARIANTS]
