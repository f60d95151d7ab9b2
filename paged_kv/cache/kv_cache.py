"""The arena: every layer's blocks in memory, under typed views, and what they cost.

Knows tensors and block ids, nothing of requests or models. One uint8 arena per layer,
`[num_blocks, num_kv_heads, record_bytes]`; a block id names the same record in every layer, open
and sealed blocks are two readings of the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..blocks.block_manager import BlockManager
from ..blocks.block_tables import ragged_arange
from ..blocks.geometry import BlockGeometry, BlockIds
from ..blocks.step_plan import StepPlan
from ..errors import ConfigError, OutOfBlocksError
from ..kernels.block_views import LayerBlocks, SealedViews
from ..kernels.step_inputs import NO_WINDOW, StepInputs
from .backend import choose_backend
from .formats import KVFormat, RecordLayout, block_geometry

FULL_PRECISION_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """What one attention layer stores for each token."""

    kv_format: KVFormat
    num_kv_heads: int
    key_dim: int
    value_dim: int

    def __post_init__(self) -> None:
        if self.num_kv_heads < 1:
            raise ConfigError(f"num_kv_heads must be at least 1, got {self.num_kv_heads}")

    def record_layout(self, dtype: torch.dtype) -> RecordLayout:
        return RecordLayout(
            kv_format=self.kv_format,
            key_dim=self.key_dim,
            value_dim=self.value_dim,
            itemsize=dtype.itemsize,
        )


@dataclass(frozen=True, kw_only=True)
class MemoryStats:
    """Bytes over all layers. `allocated = used + wasted`, `total = allocated + free`.

    Blocks that several sequences share count once. `used` counts the records of sealed blocks and
    the tokens that open blocks hold; the rest of the open blocks' records is `wasted`. `cached`, a
    part of `free`, still holds prefixes that can be hit.
    """

    total: int
    free: int
    allocated: int
    used: int
    wasted: int
    head: int
    body: int
    tail: int
    cached: int


@dataclass(frozen=True)
class Step:
    """A plan on the cache's device, with what the layers share. Made by `PagedKVCache.begin`."""

    indices: StepInputs
    plan: Any  # the backend's own
    # Of a step with streams:
    is_stream: Tensor | None  # [T]
    head_shifts: Tensor | None  # [T] see `StepPlan.head_shifts`; None where all are 0


class PagedKVCache:
    """Quantized K/V blocks of all layers of a model.

    `layers` are the attention layers in order; `dtype` is the precision of open blocks and of the
    native format. Size the pool by `num_blocks`, or by bytes with `num_blocks_for`. Sequences that
    a manager swaps out lie in `num_host_blocks` further blocks in host memory. `backend` is
    "torch", "cpu", "triton" or "xformers"; without it PAGED_KV_BACKEND decides, or else the device.
    """

    def __init__(
        self,
        layers: Sequence[LayerSpec],
        *,
        num_blocks: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        num_host_blocks: int = 0,
        backend: str | None = None,
    ) -> None:
        self.geometry = cache_geometry(layers, dtype)
        if num_blocks < 1:
            raise ConfigError(f"num_blocks must be at least 1, got {num_blocks}")
        self.layers = tuple(layers)
        self.num_blocks = num_blocks
        self.dtype = dtype
        self.device = torch.device(device)
        self.backend = choose_backend(self.device, backend)
        self.num_host_blocks = num_host_blocks
        self.arenas: list[Tensor] = []
        self.host_arenas: list[Tensor] = []
        self.records: list[LayerBlocks] = []
        for layer in layers:
            layout = layer.record_layout(dtype)
            shape = (num_blocks, layer.num_kv_heads, layout.record_bytes)
            arena = zeroed_bytes(shape, self.device)
            self.arenas.append(arena)
            if num_host_blocks:
                host_shape = (num_host_blocks, *shape[1:])
                is_pinned = self.device.type == "cuda"  # so that copies can be asynchronous
                host = torch.empty(host_shape, dtype=torch.uint8, pin_memory=is_pinned)
                self.host_arenas.append(host)
            self.records.append(layer_blocks(arena, layout, dtype, self.geometry.open_block_size))
        self.backend.warm_up(self.records)

    def new_manager(
        self,
        *,
        max_num_seqs: int,
        max_model_len: int,
        prefix_caching: bool = False,
        model_fingerprint: bytes = b"",
        record_events: bool = False,
    ) -> BlockManager:
        """A block manager that hands out this cache's blocks."""
        return BlockManager(
            self.geometry,
            num_blocks=self.num_blocks,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            prefix_caching=prefix_caching,
            fingerprint=self.fingerprint(model_fingerprint),
            record_events=record_events,
            num_host_blocks=self.num_host_blocks,
        )

    def fingerprint(self, model_fingerprint: bytes = b"") -> bytes:
        """32 bytes that differ when a token's stored K/V would: by model, format or precision."""
        description = repr((self.layers, self.dtype, self.geometry)).encode()
        return sha256(sha256(model_fingerprint).digest() + description).digest()

    def copy_blocks(self, sources: BlockIds, targets: BlockIds) -> None:
        """Copy whole blocks within the pool, in every layer."""
        if len(sources):
            source_ids, target_ids = self._ids(sources), self._ids(targets)
            for arena in self.arenas:
                words = arena.view(torch.int64)  # copies faster than bytes; records are aligned
                words[target_ids] = words[source_ids]

    def swap_out(self, device_block_ids: BlockIds, host_block_ids: BlockIds) -> None:
        """Copy blocks of the pool to host memory; on a GPU in the order of its stream."""
        device_ids = self._ids(device_block_ids)
        for arena, host in zip(self.arenas, self.host_arenas, strict=True):
            blocks = arena.view(torch.int64)[device_ids].view(torch.uint8)
            for start, end in runs_of(host_block_ids):
                first = int(host_block_ids[start])
                host[first : first + end - start].copy_(blocks[start:end], non_blocking=True)

    def swap_in(self, device_block_ids: BlockIds, host_block_ids: BlockIds) -> None:
        """Copy blocks from host memory into the pool; on a GPU in the order of its stream."""
        device_ids = self._ids(device_block_ids)
        for arena, host in zip(self.arenas, self.host_arenas, strict=True):
            blocks = arena.new_empty(len(device_block_ids), *arena.shape[1:])
            for start, end in runs_of(host_block_ids):
                first = int(host_block_ids[start])
                blocks[start:end].copy_(host[first : first + end - start], non_blocking=True)
            arena.view(torch.int64)[device_ids] = blocks.view(torch.int64)

    def _ids(self, block_ids: BlockIds) -> Tensor:
        return torch.from_numpy(block_ids.astype(np.int64)).to(self.device)

    def begin(self, plan: StepPlan) -> Step:
        """Copy shared blocks that are about to be written, and bring a plan's arrays to the device.

        Once for each step, before the plan is committed.
        """
        self.copy_blocks(plan.copy_sources, plan.copy_targets)

        def on_device(array: object) -> Tensor:
            return torch.as_tensor(array, dtype=torch.int64).to(self.device)

        stored = (plan.slot_mapping >= 0).nonzero()[0]
        sinks, windows = plan.num_sink_tokens, plan.window_sizes
        if windows is not None:
            windows = np.where(windows, windows, NO_WINDOW)
        indices = StepInputs(
            query_lens=tuple(plan.num_scheduled_tokens.tolist()),
            context_lens_host=tuple(plan.context_lens.tolist()),
            context_lens=on_device(plan.context_lens),
            query_start_loc=on_device(plan.query_start_loc),
            positions=on_device(plan.cache_positions),
            open_table=on_device(plan.open_table),
            sealed_table=on_device(plan.sealed_table),
            num_sealed=on_device(plan.num_sealed),
            stored_tokens=on_device(stored),
            stored_slots=on_device(plan.slot_mapping[stored]),
            seal_block_ids=on_device(plan.seal_block_ids),
            seal_sources=on_device(plan.seal_sources),
            block_size=self.geometry.block_size,
            open_block_size=self.geometry.open_block_size,
            num_head_tokens=self.geometry.num_head_tokens,
            num_sink_tokens=None if sinks is None else on_device(sinks),
            window_sizes=None if windows is None else on_device(windows),
        )
        is_stream, shifts = plan.is_stream, plan.head_shifts
        return Step(
            indices=indices,
            plan=self.backend.plan(indices),
            is_stream=None if is_stream is None else torch.from_numpy(is_stream).to(self.device),
            head_shifts=None if shifts is None else on_device(shifts),
        )

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers."""
        return block_bytes(self.layers, self.dtype)

    def bytes_per_token(self) -> float:
        """Bytes that one sealed token takes over all layers (native: one token)."""
        return self.block_bytes / self.geometry.block_size

    def memory_stats(self, manager: BlockManager) -> MemoryStats:
        """What the pool of `manager`, which hands out this cache's blocks, holds now."""
        geometry, tables, seq_ids = self.geometry, manager.tables, manager.living_seq_ids
        rows, columns = ragged_arange(tables.num_sealed[seq_ids])
        num_sealed = len(np.unique(tables.sealed[seq_ids[rows], columns]))
        rows, columns = ragged_arange(tables.num_open[seq_ids])
        rows = seq_ids[rows]
        open_ids, first = np.unique(tables.open[rows, columns], return_index=True)
        rows, columns = rows[first], columns[first]
        is_head = columns < geometry.num_head_blocks
        index = columns + np.where(
            is_head, 0, tables.num_sealed[rows] * geometry.open_blocks_per_block
        )
        filled = tables.num_computed_tokens[rows] - index * geometry.open_block_size
        open_tokens = int(filled.clip(max=geometry.open_block_size).sum())
        num_head = int(is_head.sum())
        token_bytes = sum(
            layer.num_kv_heads * layer.record_layout(self.dtype).token_bytes
            for layer in self.layers
        )
        allocated = manager.pool.num_allocated * self.block_bytes
        used = num_sealed * self.block_bytes + open_tokens * token_bytes
        total = sum(arena.nbytes for arena in self.arenas)
        num_idle = 0 if manager.prefix_cache is None else manager.prefix_cache.num_idle
        return MemoryStats(
            total=total,
            free=total - allocated,
            allocated=allocated,
            used=used,
            wasted=allocated - used,
            head=num_head * self.block_bytes,
            body=num_sealed * self.block_bytes,
            tail=(len(open_ids) - num_head) * self.block_bytes,
            cached=num_idle * self.block_bytes,
        )


def runs_of(block_ids: BlockIds) -> list[tuple[int, int]]:
    """Where ids that follow each other start and end: they can be copied at once."""
    breaks = np.flatnonzero(np.diff(block_ids) != 1) + 1
    bounds = [0, *breaks.tolist(), len(block_ids)]
    return list(pairwise(bounds)) if len(block_ids) else []


def zeroed_bytes(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """An arena; on a CPU from numpy, which asks for huge pages: random blocks read up to twice as
    fast."""
    if device.type == "cpu":
        return torch.from_numpy(np.zeros(shape, dtype=np.uint8))
    return torch.zeros(shape, dtype=torch.uint8, device=device)


def cache_geometry(layers: Sequence[LayerSpec], dtype: torch.dtype) -> BlockGeometry:
    """The block geometry that these layers share; what a `BlockManager` is made with."""
    if not layers:
        raise ConfigError("a cache needs at least one layer, got none")
    if dtype not in FULL_PRECISION_DTYPES:
        raise ConfigError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
    return block_geometry([layer.record_layout(dtype) for layer in layers])


def block_bytes(layers: Sequence[LayerSpec], dtype: torch.dtype) -> int:
    """Bytes of one block over all layers."""
    return sum(layer.num_kv_heads * layer.record_layout(dtype).record_bytes for layer in layers)


def sequence_bytes(layers: Sequence[LayerSpec], dtype: torch.dtype, num_tokens: int) -> int:
    """Bytes of all blocks that a sequence of `num_tokens` holds: head, body and tail."""
    geometry = cache_geometry(layers, dtype)
    return geometry.blocks_held(num_tokens) * block_bytes(layers, dtype)


def num_blocks_for(memory_bytes: int, layers: Sequence[LayerSpec], dtype: torch.dtype) -> int:
    """Blocks that fit in `memory_bytes`; raises `OutOfBlocksError` when not even one does."""
    size = block_bytes(layers, dtype)
    if memory_bytes < size:
        raise OutOfBlocksError(f"{memory_bytes} bytes hold no block; one takes {size} bytes")
    return memory_bytes // size


def layer_blocks(
    arena: Tensor, layout: RecordLayout, dtype: torch.dtype, open_block_size: int
) -> LayerBlocks:
    """Typed views over an arena [num_blocks, num_kv_heads, record_bytes].

    The inner order follows the device, the logical views are the same: on a GPU both dot products
    contract along memory (key codes [rows, D], value codes [D, rows]), on a CPU both accumulate
    vertically (keys, open ones too, [D, rows], values [rows, D]).
    """
    kv_format = layout.kv_format
    key_dim, value_dim, block_size = layout.key_dim, layout.value_dim, kv_format.block_size
    on_cpu = arena.device.type == "cpu"
    value_offset = open_block_size * key_dim * dtype.itemsize
    open_keys = matrix_view(arena, dtype, 0, (open_block_size, key_dim), on_cpu)
    open_values = record_view(arena, dtype, value_offset, (open_block_size, value_dim))
    if kv_format.is_native:
        return LayerBlocks(open_keys=open_keys, open_values=open_values, sealed=None)

    def codes(section: str, dim: int, channel_major: bool) -> Tensor:
        shape = (layout.num_code_rows, dim)
        return matrix_view(arena, torch.uint8, layout.offset(section), shape, channel_major)

    def metadata(section: str, *shape: int) -> Tensor:
        return record_view(arena, torch.float16, layout.offset(section), shape)

    asymmetric = kv_format.is_asymmetric
    key_shape = (kv_format.num_key_groups, key_dim) if asymmetric else (block_size,)
    sealed = SealedViews(
        key_codes=codes("key_codes", key_dim, on_cpu),
        value_codes=codes("value_codes", value_dim, not on_cpu),
        key_scale=metadata("key_scale", *key_shape),
        key_zero=metadata("key_zero", *key_shape) if asymmetric else None,
        value_scale=metadata("value_scale", block_size),
        value_zero=metadata("value_zero", block_size) if asymmetric else None,
    )
    assert kv_format.bits is not None
    return LayerBlocks(
        open_keys=open_keys,
        open_values=open_values,
        sealed=sealed,
        bits=kv_format.bits,
        key_clip=kv_format.key_clip,
        value_clip=kv_format.value_clip,
    )


def matrix_view(
    arena: Tensor,
    dtype: torch.dtype,
    byte_offset: int,
    shape: tuple[int, int],
    is_transposed: bool,
) -> Tensor:
    """A matrix in every record, [NB, H, *shape]; transposed, its rows are adjacent in memory."""
    if not is_transposed:
        return record_view(arena, dtype, byte_offset, shape)
    return record_view(arena, dtype, byte_offset, shape[::-1]).transpose(-1, -2)


def record_view(
    arena: Tensor, dtype: torch.dtype, byte_offset: int, inner_shape: tuple[int, ...]
) -> Tensor:
    """`inner_shape` elements of `dtype` at an offset of every record: [NB, H, *inner_shape]."""
    typed = arena.view(dtype)
    inner_strides = [1]
    for size in reversed(inner_shape[1:]):
        inner_strides.insert(0, inner_strides[0] * size)
    return typed.as_strided(
        (*typed.shape[:2], *inner_shape),
        (typed.stride(0), typed.stride(1), *inner_strides),
        byte_offset // dtype.itemsize,
    )
