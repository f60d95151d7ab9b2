"""Which blocks are free, and how many users the others have. Knows ids, never sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ..code_cache import compiled
from ..errors import OutOfBlocksError
from ..validation import require_count
from .geometry import BlockIds
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


class BlockPool:
    """A stack of free block ids with user counts: allocating and freeing are one slice each.

    Nobody else writes `ref_counts`. Blocks without users that `prefix_cache` still knows are free
    too, but they are taken last.
    """

    def __init__(self, num_blocks: int, prefix_cache: PrefixCache | None = None) -> None:
        self.num_blocks: int = require_count("num_blocks", num_blocks)
        self.ref_counts: NDArray[np.int32] = np.zeros(self.num_blocks, dtype=np.int32)
        # Without one, one in which nothing is ever stored.
        self.prefix_cache: Final = prefix_cache or PrefixCache(num_blocks, record_events=False)
        self.peak_allocated: int = 0  # most blocks in use at once so far
        self._scratch: BlockIds = np.empty(SCRATCH, dtype=np.int32)
        self._free_stack: BlockIds = np.arange(num_blocks - 1, -1, -1, dtype=np.int32)
        self._stack_size = num_blocks

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can hand out."""
        return self._stack_size + self.prefix_cache.num_idle

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
                self.prefix_cache.is_cached,
                self._free_stack,
                self._stack_size,
                idle_ids,
            ),
        )

    def leave(self, block_ids: BlockIds) -> None:
        """One user less for each of these blocks, which keep at least one; named once per user."""
        np.subtract.at(self.ref_counts, block_ids, 1)

    def rejoin(self, block_ids: BlockIds) -> None:
        """Take back `leave`."""
        np.add.at(self.ref_counts, block_ids, 1)

    def _note_dropped(self, idle_ids: BlockIds, stack_size: int, num_idle: int) -> None:
        assert num_idle >= 0, "a block was freed twice"
        self._stack_size = stack_size
        if num_idle:
            self.prefix_cache.rest(idle_ids[:num_idle].tolist())

    def reset_cache(self) -> None:
        """Forget every cached block; none may be in use."""
        self._push(self.prefix_cache.clear())

    def take_replaced(self) -> None:
        """Idle blocks that gave up their place in the cache are free like any other."""
        replaced = self.prefix_cache.replaced
        self._push(replaced)
        replaced.clear()

    def _push(self, block_ids: list[int]) -> None:
        end = self._stack_size + len(block_ids)
        self._free_stack[self._stack_size : end] = block_ids
        self._stack_size = end

    def check_integrity(self, used: BlockIds, left: Sequence[int] | BlockIds = ()) -> None:
        """Assert that `used`, a block as often as it has users, accounts for every block.

        Users that `leave` took away are named by `left`.
        """
        expected = np.bincount(used, minlength=self.num_blocks)
        np.subtract.at(expected, np.asarray(left, dtype=np.int64), 1)
        assert np.array_equal(expected, self.ref_counts), "user counts are wrong"
        cache, free = self.prefix_cache, self._free_stack[: self._stack_size]
        cache.check_integrity(self.ref_counts)
        assert not cache.is_cached[free].any()
        idle = np.flatnonzero(cache.is_cached & (self.ref_counts == 0)).astype(np.int32)
        free = np.concatenate([free, idle])
        assert np.array_equal(np.sort(free), np.flatnonzero(self.ref_counts == 0)), (
            "free and used blocks are not a partition of the pool"
        )
