"""The arena: every layer's blocks in memory, under typed views, and what they cost.

Knows tensors and block ids, nothing of requests or models. One uint8 arena per layer,
`[num_blocks, num_kv_heads, record_bytes]`; a block id names the same record in every layer, open
and sealed blocks are two readings of the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import pairwise
from types import MappingProxyType
from typing import Final

import numpy as np
import torch
from torch import Tensor

from ..blocks.block_manager import BlockManager
from ..blocks.geometry import BlockIds, IntArray
from ..blocks.step_arrays import StepArrays
from ..blocks.step_plan import StepPlan
from ..blocks.table_replica import TableReplica
from ..errors import ConfigError
from ..kernels.block_views import LayerBlocks
from ..kernels.step_inputs import KernelPlan, StepInputs
from .backend import choose_backend
from .block_views import layer_blocks
from .layer_spec import LayerSpec, block_bytes, cache_geometry
from .memory_stats import MemoryStats, measure_memory
from .step_staging import StagedArray, stage

NO_NUMBERS: Final[IntArray] = np.empty(0, dtype=np.int64)
NO_ARRAYS: Final[Mapping[str, StagedArray]] = MappingProxyType({})


@dataclass(frozen=True)
class Step:
    """A plan on the cache's device, with what the layers share. Made by `PagedKVCache.begin`."""

    inputs: StepInputs
    plan: KernelPlan  # what the backend made of it
    token_ids: Tensor  # [T] those that `begin` was given
    positions: Tensor  # [T] of each token in its sequence
    logit_tokens: Tensor  # [M] those that `begin` was given
    extra: dict[str, Tensor]  # those and all others that `begin` was given
    # Of a step with windowed sequences:
    is_windowed: Tensor | None  # [T]
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
        self._tables = TableReplica(self.geometry)
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

    def _copy(self, source_ids: Tensor, target_ids: Tensor) -> None:
        """Copy whole blocks within the pool, in every layer."""
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

    def begin(
        self,
        plan: StepPlan,
        *,
        token_ids: IntArray = NO_NUMBERS,
        logit_tokens: IntArray = NO_NUMBERS,
        extra: Mapping[str, StagedArray] = NO_ARRAYS,
    ) -> Step:
        """Copy shared blocks that are about to be written, and bring a plan's arrays to the device.

        Once for each step and in the order of the plans, because the cache learns block tables from
        them alone, and before the next step is reserved. Whoever runs a model on it lets the step's
        `token_ids` [T], the places among them whose logits are wanted, `logit_tokens` [M], and any
        `extra` arrays travel along.
        """
        self._tables.apply(plan)
        arrays = StepArrays.from_plan(self.geometry, plan, self._tables)
        sent = {"token_ids": token_ids, "logit_tokens": logit_tokens, **extra}
        staged = stage(self.geometry, plan, arrays, sent, self.device)
        if len(plan.copy_sources):
            self._copy(staged.copy_sources, staged.copy_targets)
        return Step(
            inputs=staged.inputs,
            plan=self.backend.plan(staged.inputs),
            token_ids=staged.extra["token_ids"],
            positions=staged.positions,
            logit_tokens=staged.extra["logit_tokens"],
            extra=staged.extra,
            is_windowed=staged.is_windowed,
            head_shifts=staged.head_shifts,
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
        return measure_memory(self, manager)


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
