"""What every block holds, token by token: obeys plans and copies as a cache of tensors would.

A token's K/V depend on all tokens before it, so it is stored as a number that stands for its whole
prefix: a block that is shared under the wrong parent is found out, not only one of wrong tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from paged_kv.blocks.block_manager import BlockManager
from paged_kv.blocks.geometry import NO_BLOCKS, BlockIds
from paged_kv.blocks.step_arrays import StepArrays
from paged_kv.blocks.step_plan import StepPlan
from tests.support.plan_reader import PlanReader, open_ids, sealed_ids

UNWRITTEN = -1
OVERWRITTEN = -2
FREE = -3
MODULUS = (1 << 31) - 1


def prefix_values(token_ids: Sequence[int], salt: int = 0) -> NDArray[np.int64]:
    """For each token a number that stands for it and everything before it."""
    values, value = [], salt + 1
    for token_id in token_ids:
        value = (value * 48_271 + token_id + 1) % MODULUS
        values.append(value)
    return np.array(values, dtype=np.int64)


class BlockContents:
    """The open and the sealed reading of every block of a manager's pool, and of its host pool."""

    def __init__(self, manager: BlockManager) -> None:
        self.manager = manager
        geometry = manager.geometry
        num_host = 0 if manager.host_pool is None else manager.host_pool.num_blocks
        sizes = (geometry.open_block_size, geometry.block_size)
        self.reader = PlanReader(geometry)
        self.pool = [np.full((manager.num_blocks, size), UNWRITTEN) for size in sizes]
        self.host = [np.full((num_host, size), UNWRITTEN) for size in sizes]

    def apply(self, plan: StepPlan, values: NDArray[np.int64]) -> None:
        """Do what a plan orders, `values` [T] being its new tokens. Before the step ends."""
        self.store(plan, self.begin(plan), values)

    def begin(self, plan: StepPlan) -> StepArrays:
        """Copy what a plan orders to copy; its arrays, by which contexts can be read then."""
        opened, _ = self.pool
        assert (self.manager.pool.ref_counts[plan.copy_targets] == 1).all()
        opened[plan.copy_targets] = opened[plan.copy_sources]
        return self.reader.read(plan)

    def context(self, arrays: StepArrays, row: int) -> NDArray[np.int64]:
        """What a sequence of a step finds in its blocks before the step writes."""
        opened, sealed = self.pool
        geometry, length = self.manager.geometry, int(arrays.context_lens[row])
        open_row = opened[open_ids(geometry, arrays, row)]
        if not arrays.num_sealed[row]:
            return open_row.reshape(-1)[:length]
        num_head = geometry.num_head_blocks
        body = sealed[sealed_ids(geometry, arrays, row)]
        parts = [open_row[:num_head].reshape(-1), body.reshape(-1), open_row[num_head:].reshape(-1)]
        return np.concatenate(parts)[:length]

    def store(self, plan: StepPlan, arrays: StepArrays, values: NDArray[np.int64]) -> None:
        """Write the new tokens [T] of a plan that has begun."""
        opened, sealed = self.pool
        cells = opened.reshape(-1)
        sources = arrays.seal_sources
        blocks = np.where(sources >= 0, cells[sources.clip(min=0)], values[(~sources).clip(min=0)])
        opened[plan.seal_block_ids] = OVERWRITTEN
        sealed[plan.seal_block_ids] = blocks
        targets = arrays.stored_slots
        block_ids = np.unique(targets // opened.shape[1])
        self._check_may_be_written(np.concatenate([block_ids, plan.seal_block_ids]))
        sealed[block_ids] = OVERWRITTEN
        cells[targets] = values[arrays.stored_tokens]

    def _check_may_be_written(self, block_ids: NDArray[np.int64]) -> None:
        """A block that is written has one user, and nobody can find it."""
        assert (self.manager.pool.ref_counts[block_ids] == 1).all(), "a shared block is written"
        cache = self.manager.prefix_cache
        assert cache is None or not cache.is_cached[block_ids].any(), "a cached block is written"

    def swap_out(self, device_ids: NDArray[np.int32], host_ids: NDArray[np.int32]) -> None:
        for pool, host in zip(self.pool, self.host, strict=True):
            host[host_ids] = pool[device_ids]

    def swap_in(self, device_ids: NDArray[np.int32], host_ids: NDArray[np.int32]) -> None:
        for pool, host in zip(self.pool, self.host, strict=True):
            pool[device_ids] = host[host_ids]

    def poison_free(self, kept: BlockIds = NO_BLOCKS) -> None:
        """Lose what free blocks hold, host blocks too, unless they are cached or `kept`."""
        is_free = self.manager.pool.ref_counts == 0
        if self.manager.prefix_cache is not None:
            is_free = is_free & ~self.manager.prefix_cache.is_cached
        is_free[kept] = False
        for pool in self.pool:
            pool[is_free] = FREE
        if self.manager.host_pool is not None:
            for host in self.host:
                host[self.manager.host_pool.ref_counts == 0] = FREE

    def stored(self, seq_id: int) -> NDArray[np.int64]:
        """What the blocks of a sequence hold, in the order of its tokens."""
        manager = self.manager
        opened, sealed = self.pool
        row = opened[manager.head_and_tail_ids(seq_id)]
        num_head = manager.geometry.num_head_blocks if manager.num_sealed[seq_id] else 0
        body = sealed[manager.body_ids(seq_id)]
        parts = [row[:num_head].reshape(-1), body.reshape(-1), row[num_head:].reshape(-1)]
        return np.concatenate(parts)[: int(self.manager.num_computed_tokens[seq_id])]

    def check(self, seq_id: int, salt: int = 0) -> None:
        """Every stored token of a sequence is where its tables say."""
        length = int(self.manager.num_computed_tokens[seq_id])
        expected = prefix_values(self.manager.token_ids[seq_id, :length].tolist(), salt)
        np.testing.assert_array_equal(self.stored(seq_id), expected)
