"""The shape of a sequence: how many of its tokens lie in which blocks. Knows counts, never ids.

A sequence is head | body | tail: the head's tokens stay in open blocks for life, the body is
sealed blocks in order, the tail is the newest tokens in open blocks. A *link* is a stretch of
tokens whose block never changes once they are complete, and which sequences can therefore share:
each head block, each body block, and in the native format every full block.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError
from ..validation import MAX_COUNT, require_count

IntArray = NDArray[np.int64]
BlockIds = NDArray[np.int32]
NO_BLOCKS: Final[BlockIds] = np.empty(0, dtype=np.int32)

# Places in `BlockGeometry.sizes`: plain integers, because numba is slow to take records.
BLOCK_SIZE: Final = 0
OPEN_BLOCK_SIZE: Final = 1
PER_BLOCK: Final = 2  # open blocks that hold as many tokens as a sealed one
NUM_HEAD_BLOCKS: Final = 3
MIN_UNSEALED: Final = 4  # tokens that a sequence never seals: head and least tail


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
        for field in fields(self):
            size = require_count(field.name, getattr(self, field.name), -MAX_COUNT)
            object.__setattr__(self, field.name, size)
        is_multiple = self.open_block_size >= 1 and self.block_size >= 1
        if not is_multiple or self.block_size % self.open_block_size:
            raise ConfigError(
                f"block_size ({self.block_size}) must be a multiple of open_block_size "
                f"({self.open_block_size})"
            )
        if self.num_head_tokens < 0 or self.num_head_tokens % self.open_block_size:
            raise ConfigError(
                "num_head_tokens must be whole open blocks of "
                f"{self.open_block_size} tokens, got {self.num_head_tokens}"
            )
        require_count("min_tail_tokens", self.min_tail_tokens, least=0)

    @cached_property
    def sizes(self) -> IntArray:
        """[5] the same numbers as compiled loops take them."""
        numbers = (
            self.block_size,
            self.open_block_size,
            self.open_blocks_per_block,
            self.num_head_blocks,
            self.num_head_tokens + self.min_tail_tokens,
        )
        return np.array(numbers, dtype=np.int64)

    @cached_property
    def seals(self) -> bool:
        return self.block_size > self.open_block_size

    @cached_property
    def num_head_blocks(self) -> int:
        return self.num_head_tokens // self.open_block_size

    @cached_property
    def open_blocks_per_block(self) -> int:
        """Open blocks that hold as many tokens as one sealed block."""
        return self.block_size // self.open_block_size

    def num_sealed_blocks(self, num_tokens: IntArray) -> IntArray:
        """Blocks sealed once `num_tokens` are stored: the tail keeps at least `min_tail_tokens`."""
        if not self.seals:
            return np.zeros_like(num_tokens)
        sealable = num_tokens - self.num_head_tokens - self.min_tail_tokens
        return np.maximum(sealable // self.block_size, 0)

    def num_sealed_within(self, num_tokens: int, num_sealed: int) -> int | None:
        """Of a sequence's `num_sealed` blocks those among its first `num_tokens` tokens.

        None where these end within a sealed block.
        """
        in_body = max(num_tokens - self.num_head_tokens, 0)
        num_kept = min(in_body // self.block_size, num_sealed)
        return num_kept if num_kept == num_sealed or in_body % self.block_size == 0 else None

    def table_width(self, num_tokens: int) -> int:
        """Places in a block table of so many tokens."""
        return -(-num_tokens // self.open_block_size)

    def body_places(self, indices: IntArray) -> IntArray:
        """Where body blocks, counted from 0, stand in a block table."""
        return self.num_head_blocks + indices * self.open_blocks_per_block

    def is_place_needed(self, places: IntArray, num_tokens: int) -> NDArray[np.bool_]:
        """Which places of a block table hold a block once a step has stored `num_tokens`.

        Of a sealed block's places the first does; those behind are null, or may be given back.
        """
        indices = places - self.num_head_blocks
        body_end = self.num_sealed_blocks(np.array([num_tokens])) * self.open_blocks_per_block
        is_open = (indices < 0) | (indices >= body_end)
        needed: NDArray[np.bool_] = is_open | (indices % self.open_blocks_per_block == 0)
        return needed

    def num_done_places(self, num_tokens: int) -> int:
        """Places, from the first, whose tokens no later token of the sequence moves."""
        if not self.seals:
            return num_tokens // self.open_block_size
        head = min(num_tokens // self.open_block_size, self.num_head_blocks)
        num_sealed = int(self.num_sealed_blocks(np.array([num_tokens]))[0])
        return head + num_sealed * self.open_blocks_per_block

    def num_links(self, num_tokens: int) -> int:
        """Complete links among the first `num_tokens` tokens."""
        if not self.seals or num_tokens < self.num_head_tokens:
            return num_tokens // self.open_block_size
        return self.num_head_blocks + (num_tokens - self.num_head_tokens) // self.block_size

    def num_shareable_links(self, num_tokens: int) -> int:
        """Links that a new sequence of `num_tokens` may take over from others.

        At least one token is left to compute, for its logits, and no more blocks are sealed than
        the sequence would have sealed itself.
        """
        links = self.num_links(max(num_tokens - 1, 0))
        if not self.seals:
            return links
        sealable = num_tokens - self.num_head_tokens - self.min_tail_tokens
        return min(links, self.num_head_blocks + max(sealable // self.block_size, 0))

    def link_size(self, link: int) -> int:
        """Tokens in a link, given by its index."""
        is_open = not self.seals or link < self.num_head_blocks
        return self.open_block_size if is_open else self.block_size

    def link_end(self, num_links: int) -> int:
        """Tokens in the first `num_links` links."""
        if not self.seals or num_links <= self.num_head_blocks:
            return num_links * self.open_block_size
        return self.num_head_tokens + (num_links - self.num_head_blocks) * self.block_size

    def blocks_held(self, num_tokens: int) -> int:
        """Blocks of a sequence that stores `num_tokens`."""
        num_sealed = int(self.num_sealed_blocks(np.array([num_tokens]))[0])
        return self.count_blocks(num_tokens, num_sealed)

    def count_blocks(self, num_tokens: int, num_sealed: int) -> int:
        """Blocks of a sequence that stores `num_tokens`, of which exactly so many are sealed."""
        open_end = -(-num_tokens // self.open_block_size)
        return open_end - num_sealed * (self.open_blocks_per_block - 1)

    def blocks_to_grow(self, num_tokens: int, num_sealed: int, new_num_tokens: int) -> int:
        """Blocks that one step takes to lengthen a sequence that shares none of its open blocks.

        Those that it then gives back, because their tokens were sealed, are not deducted.
        """
        per_block = self.open_blocks_per_block
        num_open = -(-num_tokens // self.open_block_size) - num_sealed * per_block
        new_sealed = int(self.num_sealed_blocks(np.array([new_num_tokens]))[0]) - num_sealed
        new_sealed = max(new_sealed, 0)
        leaving = min(new_sealed * per_block, max(num_open - self.num_head_blocks, 0))
        open_end = -(-new_num_tokens // self.open_block_size)
        new_open = open_end - (num_sealed + new_sealed) * per_block - num_open + leaving
        return new_sealed + new_open

    def max_blocks(self, num_tokens: int, num_before: int = 0) -> int:
        """The most blocks that a sequence holds at once as it grows to `num_tokens`, one a step.

        It begins with `num_before` tokens; what it held until then does not count.
        A step that seals holds the new block and the open blocks it replaces together. Larger
        steps may need more at once; single-token steps are what always makes progress.
        """
        after = np.arange(max(num_tokens - 2 * self.block_size, num_before), num_tokens) + 1
        sealed_before = self.num_sealed_blocks(after - 1)
        newly_sealed = self.num_sealed_blocks(after) - sealed_before
        # With no minimal tail the token that completes a block is sealed without being stored.
        stored = after - newly_sealed * (self.min_tail_tokens == 0)
        open_end = -(-stored // self.open_block_size)
        open_before_seal = open_end - sealed_before * self.open_blocks_per_block
        return int((sealed_before + newly_sealed + open_before_seal).max(initial=0))


def ragged_arange(counts: IntArray) -> tuple[IntArray, IntArray]:
    """Row and offset of every element of a ragged array: counts [2, 1] -> [0, 0, 1], [0, 1, 0]."""
    total = int(counts.sum())
    rows = counts.nonzero()[0]
    if len(rows) == total:  # nowhere more than one: what most steps are
        return rows, np.zeros(total, dtype=np.int64)
    rows = np.repeat(np.arange(len(counts)), counts)
    starts = np.cumsum(counts) - counts
    return rows, np.arange(total) - starts[rows]
