"""Sequences that lie in host blocks while others use the pool. Knows block ids, never tensors."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import InvalidStepError
from .block_pool import BlockPool
from .block_tables import StoredLengths
from .geometry import BlockIds
from .token_chain import TokenChain


@dataclass(frozen=True, kw_only=True)
class SwappedSequence:
    """Everything needed to go on: made by `BlockManager.swap_out`, ended by `swap_in`."""

    tokens: TokenChain
    lengths: tuple[StoredLengths, ...]  # of each group of layers
    device_block_ids: BlockIds  # where its blocks were: in the order of its tokens, by group
    host_block_ids: BlockIds


class HostBlocks:
    """A pool of host blocks, none where there is no such memory, and who lies in it."""

    def __init__(self, num_blocks: int) -> None:
        self.pool: BlockPool | None = BlockPool(num_blocks) if num_blocks else None
        self._swapped: set[int] = set()  # identities of the sequences

    def has_room(self, num_blocks: int) -> bool:
        return self.pool is not None and num_blocks <= self.pool.num_free

    def allocate(self, num_blocks: int) -> BlockIds:
        """So many host blocks, for which there has to be room."""
        assert self.pool is not None
        return self.pool.allocate(num_blocks)

    def keep(self, swapped: SwappedSequence) -> SwappedSequence:
        """From here on until `discard` it may be swapped in."""
        self._swapped.add(id(swapped))
        return swapped

    def require(self, swapped: SwappedSequence) -> None:
        """Raise `InvalidStepError` unless this sequence still lies in host blocks."""
        if id(swapped) not in self._swapped:
            raise InvalidStepError("this sequence was swapped in or discarded before")

    def discard(self, swapped: SwappedSequence) -> None:
        """Give the host blocks of a sequence, which still lies in them, back."""
        assert self.pool is not None
        self.pool.release(swapped.host_block_ids)
        self._swapped.remove(id(swapped))
