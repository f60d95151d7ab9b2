"""The block pool and the shape of a sequence. Knows block ids and token counts, never tensors.

A sequence is head | body | tail: the head's tokens stay in open blocks for life, the body is
sealed blocks in order, the tail is the newest tokens in open blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .errors import ConfigError, OutOfBlocksError

IntArray = NDArray[np.int64]
BlockIds = NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class BlockGeometry:
    """How many tokens go where; all sizes in tokens.

    Where `block_size == open_block_size` (the native format) blocks never seal, and a sequence is
    its tail alone.
    """

    block_size: int
    open_block_size: int
    num_head_tokens: int
    min_tail_tokens: int

    def __post_init__(self) -> None:
        if self.open_block_size < 1 or self.block_size % self.open_block_size:
            raise ConfigError(
                f"block_size ({self.block_size}) must be a multiple of open_block_size "
                f"({self.open_block_size})"
            )
        if self.num_head_tokens < 0 or self.num_head_tokens % self.open_block_size:
            raise ConfigError(
                "num_head_tokens must be whole open blocks of "
                f"{self.open_block_size} tokens, got {self.num_head_tokens}"
            )
        if self.min_tail_tokens < 0:
            raise ConfigError(f"min_tail_tokens must not be negative, got {self.min_tail_tokens}")

    @property
    def seals(self) -> bool:
        return self.block_size > self.open_block_size

    @property
    def num_head_blocks(self) -> int:
        return self.num_head_tokens // self.open_block_size

    @property
    def open_blocks_per_block(self) -> int:
        """Open blocks that hold as many tokens as one sealed block."""
        return self.block_size // self.open_block_size

    def num_sealed_blocks(self, num_tokens: IntArray) -> IntArray:
        """Blocks sealed once `num_tokens` are stored: the tail keeps at least `min_tail_tokens`."""
        if not self.seals:
            return np.zeros_like(num_tokens)
        sealable = num_tokens - self.num_head_tokens - self.min_tail_tokens
        return np.maximum(sealable // self.block_size, 0)

    def open_table_width(self, max_tokens: int) -> int:
        """Columns that the open blocks of one sequence of up to `max_tokens` need."""
        if not self.seals:
            return -(-max_tokens // self.open_block_size)
        longest_tail = self.block_size + self.min_tail_tokens
        return self.num_head_blocks + -(-longest_tail // self.open_block_size)

    def sealed_table_width(self, max_tokens: int) -> int:
        return int(self.num_sealed_blocks(np.array([max_tokens]))[0])

    def blocks_held(self, num_tokens: int) -> int:
        """Blocks of a sequence that stores `num_tokens`."""
        num_sealed = int(self.num_sealed_blocks(np.array([num_tokens]))[0])
        open_end = -(-num_tokens // self.open_block_size)
        return open_end - num_sealed * (self.open_blocks_per_block - 1)

    def max_blocks(self, num_tokens: int) -> int:
        """The most blocks that a sequence growing one token a step to `num_tokens` holds at once.

        A step that seals holds the new block and the open blocks it replaces together. Larger
        steps may need more at once; single-token steps are what always makes progress.
        """
        after = np.arange(max(num_tokens - 2 * self.block_size, 0), num_tokens) + 1
        sealed_before = self.num_sealed_blocks(after - 1)
        newly_sealed = self.num_sealed_blocks(after) - sealed_before
        # With no minimal tail the token that completes a block is sealed without being stored.
        stored = after - newly_sealed * (self.min_tail_tokens == 0)
        open_end = -(-stored // self.open_block_size)
        open_before_seal = open_end - sealed_before * self.open_blocks_per_block
        return int((sealed_before + newly_sealed + open_before_seal).max(initial=0))


class BlockAllocator:
    """A stack of free block ids: allocation and freeing are one slice each."""

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ConfigError(f"num_blocks must be at least 1, got {num_blocks}")
        self.num_blocks = num_blocks
        self._free_stack: BlockIds = np.arange(num_blocks - 1, -1, -1, dtype=np.int32)
        self._num_free = num_blocks
        self._is_allocated = np.zeros(num_blocks, dtype=np.bool_)
        self.peak_allocated = 0  # most blocks in use at once so far

    @property
    def num_free(self) -> int:
        return self._num_free

    @property
    def num_allocated(self) -> int:
        return self.num_blocks - self._num_free

    def allocate(self, count: int) -> BlockIds:
        """Take `count` blocks; raises `OutOfBlocksError` and takes none when fewer are free."""
        if count > self._num_free:
            raise OutOfBlocksError(f"{count} blocks asked for, {self._num_free} are free")
        start = self._num_free - count
        block_ids = self._free_stack[start : self._num_free][::-1].copy()
        self._num_free = start
        self._is_allocated[block_ids] = True
        self.peak_allocated = max(self.peak_allocated, self.num_allocated)
        return block_ids

    def free(self, block_ids: BlockIds) -> None:
        """Give blocks back; they are reused last in, first out."""
        assert len(np.unique(block_ids)) == len(block_ids), "a block was freed twice"
        assert self._is_allocated[block_ids].all(), "a block was freed twice"
        self._is_allocated[block_ids] = False
        end = self._num_free + len(block_ids)
        self._free_stack[self._num_free : end] = block_ids[::-1]
        self._num_free = end

    def check_integrity(self, owned: BlockIds) -> None:
        """Assert that `owned` are exactly the allocated blocks, each with one owner."""
        free = self._free_stack[: self._num_free]
        everything = np.sort(np.concatenate([free, owned]))
        assert np.array_equal(everything, np.arange(self.num_blocks)), (
            "free and owned blocks are not a partition of the pool"
        )
        assert self._is_allocated[owned].all()
        assert not self._is_allocated[free].any()
