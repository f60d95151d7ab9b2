"""A sequence that lies in host blocks while others use the pool. Knows block ids, never tensors."""

from __future__ import annotations

from dataclasses import dataclass

from .geometry import BlockIds
from .token_chain import TokenChain


@dataclass(frozen=True, kw_only=True)
class SwappedSequence:
    """Everything needed to go on: made by `BlockManager.swap_out`, ended by `swap_in`."""

    tokens: TokenChain
    num_computed_tokens: int  # of these, stored in blocks
    num_sealed: int
    num_evicted_tokens: int
    device_block_ids: BlockIds  # where its blocks were, in the order of its tokens
    host_block_ids: BlockIds
