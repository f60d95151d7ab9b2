"""The arena: every layer's blocks in memory, under typed views, and what they cost.

Knows tensors and block ids, nothing of requests or models. One uint8 arena per layer,
`[num_blocks, num_kv_heads, record_bytes]`; a block id names the same record in every layer of a
group, and layers of different groups may share their memory, because a block is one group's (see
`layer_groups`). Open and sealed blocks are two readings of the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from itertools import pairwise
from reprlib import repr as short_repr
from types import MappingProxyType
from typing import Final

import numpy as np
import torch
from torch import Tensor

from ..blocks.block_manager import BlockManager
from ..blocks.geometry import BlockIds, IntArray
from ..blocks.step_arrays import StepArrays
from ..blocks.step_plan import PlanSource, StepPlan
from ..blocks.table_replica import TableReplica
from ..errors import ConfigError, InvalidStepError
from ..free_memory import require_memory
from ..kernels.block_views import LayerBlocks
from ..kernels.full_precision import in_full_precision
from ..kernels.step_inputs import KernelPlan, StepInputs
from ..validation import require, require_count, require_instance
from .backend import choose_backend
from .block_views import layer_blocks
from .decode_tables import DecodeBatch, DecodeTables, Drawn
from .device_memory import free_memory, require_device
from .layer_groups import find_groups, token_bytes
from .layer_spec import LayerSpec, cache_geometry
from .memory_stats import MemoryStats, measure_memory
from .step_staging import StagedArray, StagedStep, stage

NO_NUMBERS: Final[IntArray] = np.empty(0, dtype=np.int64)
NO_ARRAYS: Final[Mapping[str, StagedArray]] = MappingProxyType({})


@dataclass(frozen=True)
class Step:
    """A plan on the cache's device, with what the layers share. Made by `PagedKVCache.begin`."""

    source: StepPlan
    inputs: StepInputs  # of the first group of layers
    plan: KernelPlan  # what the backend made of it
    layer_plans: tuple[KernelPlan, ...]  # what each layer's kernels read of the step
    token_ids: Tensor  # [T] those that `begin` was given
    positions: Tensor  # [T] of each token in its sequence
    logit_tokens: Tensor  # [M] those that `begin` was given
    extra: dict[str, Tensor]  # those and all others that `begin` was given
    # Of a step with windowed sequences:
    is_windowed: Tensor | None  # [T] 0 or 1
    head_shifts: Tensor | None  # [T] see `StepPlan.head_shifts`; None where all are 0
    stored_layers: set[int] = field(default_factory=set)  # whose tokens are stored

    def plan_of(self, layer: int) -> KernelPlan:
        """What a layer's kernels read of the step."""
        return self.layer_plans[layer]


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
        self.geometry: Final = cache_geometry(layers, dtype)
        self.layers: Final = tuple(layers)
        self.num_blocks: int = require_count("num_blocks", num_blocks)
        self.num_host_blocks: int = require_count("num_host_blocks", num_host_blocks, least=0)
        self.dtype = dtype
        self.device: torch.device = require_device(device)
        self.backend: Final = choose_backend(self.device, backend)
        self.groups: Final = find_groups(self.layers, dtype)
        self._require_memory()
        try:
            self.memory: list[Tensor] = [  # of each slot of a block
                zeroed_bytes((self.num_blocks, size), self.device)
                for size in self.groups.slot_bytes
            ]
            self.host_memory: list[Tensor] = self._host_memory()
        except (MemoryError, RuntimeError) as error:  # torch's own are RuntimeErrors
            raise ConfigError(
                f"a pool of {num_blocks} blocks of {self.block_bytes} bytes, and {num_host_blocks} "
                f"in host memory, cannot be allocated: {error}"
            ) from error
        self.arenas: list[Tensor] = [
            records_of(self.memory[slot], shape)
            for slot, shape in zip(self.groups.slot_of_layer, self.record_shapes, strict=True)
        ]
        self.records: list[LayerBlocks] = [
            layer_blocks(arena, layer, dtype, self.geometry.open_block_size)
            for arena, layer in zip(self.arenas, self.layers, strict=True)
        ]
        self._tables = [TableReplica(self.geometry) for _ in self.groups.retentions]
        self.num_parts: int = 1  # processes that share the kv heads, of which this holds its own
        self._source: PlanSource | None = None  # the manager whose plans are begun here
        self._step: Step | None = None  # begun last
        self.backend.warm_up(self.records)

    @property
    def record_shapes(self) -> list[tuple[int, int]]:
        """Of each layer, `(num_kv_heads, record_bytes)` of a block."""
        return [
            (layer.num_kv_heads, layer.record_layout(self.dtype).record_bytes)
            for layer in self.layers
        ]

    def _require_memory(self) -> None:
        """Raise `ConfigError` for more blocks than there is memory for."""
        pool, host = (count * self.block_bytes for count in (self.num_blocks, self.num_host_blocks))
        what = f"a pool of {self.num_blocks} blocks"
        if self.device.type == "cpu" and host:
            pool, what = pool + host, f"{what} and {self.num_host_blocks} host blocks (swap space)"
        elif host:
            require_memory(f"swap space of {self.num_host_blocks} host blocks", host)
        require_memory(what, pool, free_memory(self.device), str(self.device))

    def _host_memory(self) -> list[Tensor]:
        if not self.num_host_blocks:
            return []
        is_pinned = self.device.type == "cuda"  # so that copies can be asynchronous
        return [
            torch.empty((self.num_host_blocks, size), dtype=torch.uint8, pin_memory=is_pinned)
            for size in self.groups.slot_bytes
        ]

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
            retentions=self.groups.retentions,
        )

    def duplicate(self, manager: BlockManager) -> tuple[PagedKVCache, BlockManager]:
        """A cache and a manager with blocks of their own that hold what these hold.

        Both pairs go on from here by themselves. Raises `InvalidStepError` while a step of the
        manager is outstanding, `ConfigError` where there is no memory for as large a pool.
        """
        self.require_stored(manager)
        manager.require_no_step()
        copied = PagedKVCache(
            self.layers,
            num_blocks=self.num_blocks,
            dtype=self.dtype,
            device=self.device,
            num_host_blocks=self.num_host_blocks,
            backend=self.backend.name,
        )
        pool = manager.pool
        is_used = (pool.ref_counts > 0) | pool.prefix_cache.is_cached
        ids = self._ids(np.flatnonzero(is_used).astype(np.int32))
        for source, target in zip(self.memory, copied.memory, strict=True):
            target.view(torch.int64)[ids] = source.view(torch.int64)[ids]
        for source, target in zip(self.host_memory, copied.host_memory, strict=True):
            target.copy_(source)
        copied._tables = deepcopy(self._tables)
        return copied, deepcopy(manager)

    def fingerprint(self, model_fingerprint: bytes = b"") -> bytes:
        """32 bytes that differ when a token's stored K/V would: by model, format or precision."""
        require_instance("model_fingerprint", model_fingerprint, bytes)
        description = repr((self.layers, self.dtype, self.geometry))
        return sha256(sha256(model_fingerprint).digest() + description.encode()).digest()

    def _copy(self, source_ids: Tensor, target_ids: Tensor) -> None:
        """Copy whole blocks within the pool, in every layer."""
        for memory in self.memory:
            words = memory.view(torch.int64)  # copies faster than bytes; records are aligned
            words[target_ids] = words[source_ids]

    def swap_out(self, device_block_ids: BlockIds, host_block_ids: BlockIds) -> None:
        """Copy blocks of the pool to host memory; on a GPU in the order of its stream."""
        self._require_block_ids(device_block_ids, host_block_ids)
        device_ids = self._ids(device_block_ids)
        for memory, host in zip(self.memory, self.host_memory, strict=True):
            blocks = memory.view(torch.int64)[device_ids].view(torch.uint8)
            for start, end in runs_of(host_block_ids):
                first = int(host_block_ids[start])
                host[first : first + end - start].copy_(blocks[start:end], non_blocking=True)

    def swap_in(self, device_block_ids: BlockIds, host_block_ids: BlockIds) -> None:
        """Copy blocks from host memory into the pool; on a GPU in the order of its stream."""
        self._require_block_ids(device_block_ids, host_block_ids)
        device_ids = self._ids(device_block_ids)
        for memory, host in zip(self.memory, self.host_memory, strict=True):
            blocks = memory.new_empty(len(device_block_ids), memory.shape[1])
            for start, end in runs_of(host_block_ids):
                first = int(host_block_ids[start])
                blocks[start:end].copy_(host[first : first + end - start], non_blocking=True)
            memory.view(torch.int64)[device_ids] = blocks.view(torch.int64)

    def _require_block_ids(self, device_block_ids: BlockIds, host_block_ids: BlockIds) -> None:
        """Raise `ConfigError` for blocks that are not there, or not as many on both sides."""
        for name, ids, limit in (
            ("device_block_ids", device_block_ids, self.num_blocks),
            ("host_block_ids", host_block_ids, self.num_host_blocks),
        ):
            fits = isinstance(ids, np.ndarray) and ids.ndim == 1 and ids.dtype.kind in "iu"
            fits = fits and len(ids) == len(device_block_ids)
            fits = fits and ids.min(initial=0) >= 0 and ids.max(initial=-1) < limit
            require(name, short_repr(ids), bool(fits), f"equally many ids of {limit} blocks")

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
        them alone, and before it is committed. Whoever runs a model on it lets the step's
        `token_ids` [T], the places among them whose logits are wanted, `logit_tokens` [M], and any
        `extra` arrays travel along. Raises `InvalidStepError`, changing nothing, for a plan that is
        over, out of turn, or of another manager than the plans before.
        """
        self._take_over(plan)
        arrays = [
            StepArrays.from_plan(self.geometry, part, tables)
            for part, tables in zip(plan.parts, self._tables, strict=True)
        ]
        sent = {"token_ids": token_ids, "logit_tokens": logit_tokens, **extra}
        staged = stage(self.geometry, plan, arrays, sent, self.device)
        plans = [self.backend.plan(inputs) for inputs in staged.inputs]
        tokens, places = staged.extra["token_ids"], staged.extra["logit_tokens"]
        return self._begin(plan, staged, plans, tokens, places)

    @cached_property
    def has_several_tables(self) -> bool:
        """Whether layers read different tables: of several groups, or of small blocks."""
        is_mixed = any(self.has_small_blocks(layer) for layer in self.layers)
        return is_mixed or len(self.groups.retentions) > 1

    def has_small_blocks(self, layer: LayerSpec) -> bool:
        """Whether a layer keeps full precision while others seal: see `kernels.full_precision`."""
        return self.geometry.seals and layer.kv_format.is_native

    def _begin(
        self,
        plan: StepPlan,
        staged: StagedStep,
        plans: Sequence[KernelPlan],
        token_ids: Tensor,
        logit_tokens: Tensor,
    ) -> Step:
        """Copy what has to be before anything is written; from here on the step is the last."""
        if len(staged.copy_sources):
            self._copy(staged.copy_sources, staged.copy_targets)
        self._step = Step(
            source=plan,
            inputs=staged.inputs[0],
            plan=plans[0],
            layer_plans=self._layer_plans(plans),
            token_ids=token_ids,
            positions=staged.positions,
            logit_tokens=logit_tokens,
            extra=staged.extra,
            is_windowed=staged.is_windowed,
            head_shifts=staged.head_shifts,
        )
        return self._step

    def _layer_plans(self, plans: Sequence[KernelPlan]) -> tuple[KernelPlan, ...]:
        """Of each layer, from those of the groups."""
        small: dict[int, KernelPlan] = {}  # of layers in full precision where others seal, by group
        found: list[KernelPlan] = []
        for layer, group in zip(self.layers, self.groups.group_of_layer, strict=True):
            if not self.has_small_blocks(layer):
                found.append(plans[group])
                continue
            if group not in small:
                small[group] = self.backend.plan(in_full_precision(plans[group].step))
            found.append(small[group])
        return tuple(found)

    def decode_tables(self, manager: BlockManager) -> DecodeTables:
        """Block tables on the device for `begin_decode`; any that were made before are stale.

        Raises `ConfigError` where some layers read other tables, which are made on the host.
        """
        self.require_manager(manager)
        if self.has_several_tables:
            raise ConfigError(
                "layers in full precision beside quantized ones, and groups of layers, have no "
                "decode tables"
            )
        self._tables[0].note_changes()
        return DecodeTables(
            self.geometry,
            self.device,
            max_num_seqs=manager.max_num_seqs,
            max_model_len=manager.max_model_len,
        )

    def drop_decode_tables(self) -> None:
        """No step will begin by `begin_decode` any more."""
        self._tables[0].note_nothing()

    def begin_decode(
        self,
        plan: StepPlan,
        batch: DecodeBatch,
        *,
        token_ids: IntArray,
        drawn: Drawn | None = None,
        extra: Mapping[str, StagedArray] = NO_ARRAYS,
    ) -> Step:
        """As `begin`, for a plan of a batch's kind that `DecodeTables.holds`.

        Of tokens that are `drawn` the host has no `token_ids` [N]. The step has the batch's rows,
        all of whose logits are wanted, and is whole once `batch.step.refresh` has run. Batches are
        made of this cache's `decode_tables`.
        """
        self._take_over(plan)
        staged = batch.send(plan, self._tables[0], token_ids, drawn, extra)
        step = batch.step
        return self._begin(plan, staged, [step.plan], step.token_ids, batch.logit_tokens)

    def _take_over(self, plan: StepPlan) -> None:
        """A plan begins: from here on no earlier step can go on."""
        self._require_own(plan)
        self._require_whole_step(plan.source, plan.number)
        for tables, part in zip(self._tables, plan.parts, strict=True):
            tables.apply(part)
        self._source, self._step = plan.source, None

    def _require_own(self, plan: StepPlan) -> None:
        """Raise `InvalidStepError` for what is no plan, is over, or of another manager."""
        if not isinstance(plan, StepPlan):
            raise InvalidStepError(f"a StepPlan was expected, got {short_repr(plan)}")
        if plan.is_over:
            raise InvalidStepError(f"step {plan.number} was committed or rolled back before")
        self.require_blocks_of(plan.source)

    def require_manager(self, manager: BlockManager) -> None:
        """Raise unless this is the manager that hands out the blocks."""
        require_instance("manager", manager, BlockManager)
        self.require_blocks_of(manager.source)

    def bind(self, manager: BlockManager) -> None:
        """From now on this manager alone hands out the blocks, as if a plan of it had begun."""
        self.require_manager(manager)
        self._source = manager.source

    def require_stored(self, manager: BlockManager) -> None:
        """Raise `InvalidStepError` where this manager committed a step that lacks layers."""
        self.require_manager(manager)
        self._require_whole_step(manager.source, manager.num_committed)

    def require_blocks_of(self, source: PlanSource) -> None:
        """Raise `InvalidStepError` unless it is this manager that hands out the blocks."""
        if source is self._source:
            return
        if self._source is not None and source.manager_id != self._source.manager_id:
            raise InvalidStepError(
                "another block manager's steps were begun on this cache: it has one"
            )
        if source.geometry != self.geometry or source.num_blocks > self.num_blocks:
            raise InvalidStepError(
                f"a manager of {source.num_blocks} blocks of {source.geometry} cannot hand out "
                f"this cache's {self.num_blocks} of {self.geometry}"
            )
        if source.retentions != self.groups.retentions:
            raise InvalidStepError(
                f"a manager of groups of layers {source.retentions} cannot hand out blocks of "
                f"{self.groups.retentions}: make it by new_manager, or with these retentions"
            )

    def _require_whole_step(self, source: PlanSource, num_committed: int) -> None:
        """Raise `InvalidStepError` where the step before was committed and lacks layers.

        Its blocks hold what was there before them: whoever uses them, now or by the prefix cache,
        gets it. Only a manager that forgets them all, by `recover`, may go on. A step that stored
        nothing at all is no mistake: simulated models do not.
        """
        step = self._step
        if step is None or num_committed == step.source.number or not step.stored_layers:
            return
        if source.num_recoveries != step.source.source.num_recoveries:
            return
        missing = [n for n in range(len(self.layers)) if n not in step.stored_layers]
        if missing:
            raise InvalidStepError(
                f"step {step.source.number} was committed, but nothing was stored in layers "
                f"{missing}: paged_attention has to be called for each layer, or the step rolled "
                "back; manager.recover() forgets its blocks"
            )

    def require_step(self, step: Step, layer: int) -> None:
        """Raise unless a layer's tokens of this step are to be computed and stored now."""
        if step is not self._step or step.source.is_over:
            if not isinstance(step, Step):
                raise InvalidStepError(
                    f"a Step of `PagedKVCache.begin` was expected, got {short_repr(step)}"
                )
            raise InvalidStepError(
                f"step {step.source.number} is over, or was not the last to begin on this cache"
            )
        if not (type(layer) is int and 0 <= layer < len(self.layers)):  # the quick way first
            require_count("layer", layer, least=0, most=len(self.layers) - 1)
        if layer in step.stored_layers:
            raise InvalidStepError(
                f"layer {layer} has stored the tokens of step {step.source.number} before"
            )

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers of a group."""
        return self.groups.block_bytes

    def bytes_per_token(self) -> float:
        """Bytes that one sealed token takes over all layers (native: one token)."""
        return token_bytes(self.layers, self.dtype)

    def memory_stats(self, manager: BlockManager) -> MemoryStats:
        """What the pool of `manager`, which hands out this cache's blocks, holds now."""
        self.require_manager(manager)
        return measure_memory(self, manager)


def records_of(memory: Tensor, shape: tuple[int, int]) -> Tensor:
    """The records of one layer [num_blocks, num_kv_heads, record_bytes] in a slot of blocks."""
    return memory.as_strided((len(memory), *shape), (memory.stride(0), shape[1], 1))


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
