"""Which blocks are free, and how many users the others have. Knows ids, never sequences."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from ..code_cache import compiled
from ..errors import ConfigError, OutOfBlocksError
from .block_tables import BlockTables, join_ids
from .geometry import BlockIds, IntArray
from .prefix_cache import PrefixCache

SCRATCH: Final = 1024


@compiled
def drop_users(
    block_ids: BlockIds,
    ref_counts: BlockIds,
    is_cached: NDArray[np.bool_],
    free_stack: BlockIds,
    stack_size: int,
    idle_ids: BlockIds,  # written: cached blocks that lost their last user
) -> tuple[int, int]:
    """One user less for each block. Returns the stack's size and the number of idle ids, or -1."""
    num_idle = 0
    for index in range(len(block_ids) - 1, -1, -1):
        block_id = block_ids[index]
        ref_counts[block_id] -= 1
        if ref_counts[block_id] < 0:
            return stack_size, -1
        if ref_counts[block_id] > 0:
            continue
        if is_cached[block_id]:
            idle_ids[num_idle] = block_id
            num_idle += 1
        else:
            free_stack[stack_size] = block_id
            stack_size += 1
    return stack_size, num_idle


@compiled
def drop_sequence(
    seq_id: int,
    open_table: BlockIds,
    sealed_table: BlockIds,
    num_open: IntArray,
    num_sealed: IntArray,
    num_head_blocks: int,
    ref_counts: BlockIds,
    is_cached: NDArray[np.bool_],
    free_stack: BlockIds,
    stack_size: int,
    idle_ids: BlockIds,
) -> tuple[int, int]:
    """`drop_users` of all blocks of a sequence."""
    block_ids = join_ids(seq_id, open_table, sealed_table, num_open, num_sealed, num_head_blocks)
    return drop_users(block_ids, ref_counts, is_cached, free_stack, stack_size, idle_ids)


class BlockPool:
    """A stack of free block ids with user counts: allocating and freeing are one slice each.

    With a `prefix_cache`, cached blocks without users are free too, but they are taken last.
    """

    def __init__(self, num_blocks: int, prefix_cache: PrefixCache | None = None) -> None:
        if num_blocks < 1:
            raise ConfigError(f"num_blocks must be at least 1, got {num_blocks}")
        self.num_blocks = num_blocks
        self.ref_counts: NDArray[np.int32] = np.zeros(num_blocks, dtype=np.int32)
        self.prefix_cache = prefix_cache
        self.peak_allocated = 0  # most blocks in use at once so far
        self._is_cached = (
            np.zeros(num_blocks, dtype=np.bool_) if prefix_cache is None else prefix_cache.is_cached
        )
        self._scratch: BlockIds = np.empty(SCRATCH, dtype=np.int32)
        self._free_stack: BlockIds = np.arange(num_blocks - 1, -1, -1, dtype=np.int32)
        self._stack_size = num_blocks

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can hand out."""
        cache = self.prefix_cache
        return self._stack_size + (0 if cache is None else cache.num_idle)

    @property
    def num_allocated(self) -> int:
        return self.num_blocks - self.num_free

    def allocate(self, count: int) -> BlockIds:
        """Take `count` blocks; raises `OutOfBlocksError` and takes none when fewer are free."""
        if count > self.num_free:
            raise OutOfBlocksError(f"{count} blocks asked for, {self.num_free} are free")
        start = max(self._stack_size - count, 0)
        block_ids = self._free_stack[start : self._stack_size][::-1].copy()
        self._stack_size = start
        if len(block_ids) < count:
            assert self.prefix_cache is not None
            evicted = self.prefix_cache.evict(count - len(block_ids))
            block_ids = np.concatenate([block_ids, np.array(evicted, dtype=np.int32)])
        self.ref_counts[block_ids] = 1
        self._note_peak()
        return block_ids

    def _note_peak(self) -> None:
        num_allocated = self.num_allocated
        if num_allocated > self.peak_allocated:
            self.peak_allocated = num_allocated

    def share(self, block_ids: BlockIds) -> None:
        """One more user for each of these distinct blocks, which are in use or cached."""
        if self.prefix_cache is not None:
            self.prefix_cache.wake(block_ids[self.ref_counts[block_ids] == 0].tolist())
        self.ref_counts[block_ids] += 1
        self._note_peak()

    def release(self, block_ids: BlockIds) -> None:
        """One user less for each of these blocks, given in the order of their tokens.

        Blocks without users are free: cached ones are evicted last block first, so that what is
        left of a sequence stays a prefix; the others are reused first block first.
        """
        idle_ids = self._scratch if len(block_ids) <= SCRATCH else np.empty_like(block_ids)
        self._note_dropped(
            idle_ids,
            *drop_users(
                block_ids,
                self.ref_counts,
                self._is_cached,
                self._free_stack,
                self._stack_size,
                idle_ids,
            ),
        )

    def release_sequence(self, tables: BlockTables, seq_id: int) -> None:
        """Release every block of a sequence: `release(tables.block_ids(seq_id))` in one call."""
        idle_ids = self._scratch
        if tables.num_open[seq_id] + tables.num_sealed[seq_id] > SCRATCH:
            idle_ids = np.empty(tables.num_open[seq_id] + tables.num_sealed[seq_id], dtype=np.int32)
        self._note_dropped(
            idle_ids,
            *drop_sequence(
                seq_id,
                tables.open,
                tables.sealed,
                tables.num_open,
                tables.num_sealed,
                tables.geometry.num_head_blocks,
                self.ref_counts,
                self._is_cached,
                self._free_stack,
                self._stack_size,
                idle_ids,
            ),
        )

    def _note_dropped(self, idle_ids: BlockIds, stack_size: int, num_idle: int) -> None:
        assert num_idle >= 0, "a block was freed twice"
        self._stack_size = stack_size
        if num_idle:
            assert self.prefix_cache is not None
            self.prefix_cache.rest(idle_ids[:num_idle].tolist())

    def reset_cache(self) -> None:
        """Forget every cached block; none may be in use."""
        assert self.prefix_cache is not None
        block_ids = self.prefix_cache.clear()
        end = self._stack_size + len(block_ids)
        self._free_stack[self._stack_size : end] = block_ids
        self._stack_size = end

    def check_integrity(self, used: BlockIds) -> None:
        """Assert that `used`, a block as often as it has users, accounts for every block."""
        expected = np.bincount(used, minlength=self.num_blocks)
        assert np.array_equal(expected, self.ref_counts), "user counts are wrong"
        free = self._free_stack[: self._stack_size]
        if self.prefix_cache is not None:
            self.prefix_cache.check_integrity(self.ref_counts)
            assert not self.prefix_cache.is_cached[free].any()
            idle = np.flatnonzero(self.prefix_cache.is_cached & (self.ref_counts == 0))
            free = np.concatenate([free, idle.astype(np.int32)])
        assert np.array_equal(np.sort(free), np.flatnonzero(self.ref_counts == 0)), (
            "free and used blocks are not a partition of the pool"
        )
