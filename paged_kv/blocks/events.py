"""What happened to cached blocks, as plain data: for routers and KV-transfer connectors.

Knows hashes, tokens and block ids, never what is stored in a block.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class BlockStored:
    """A block's content can be hit from now on.

    `parent_hash` is the hash of the link before it, or the root hash of its sequence's extra keys.
    """

    block_hash: bytes
    parent_hash: bytes
    token_ids: tuple[int, ...]
    block_id: int


@dataclass(frozen=True, kw_only=True)
class BlockRemoved:
    """A block's content was evicted."""

    block_hash: bytes
    block_id: int


@dataclass(frozen=True, kw_only=True)
class CacheCleared:
    """Nothing can be hit any more."""


CacheEvent = BlockStored | BlockRemoved | CacheCleared
