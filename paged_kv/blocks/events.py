"""What happened to cached blocks, as plain data: for routers and KV-transfer connectors.

Knows hashes, tokens and block ids, never what is stored in a block.
"""

from __future__ import annotations

from dataclasses import dataclass

from .token_chain import ExtraKey


@dataclass(frozen=True, kw_only=True)
class BlockStored:
    """A block's content can be hit from now on, by sequences of the same extra keys.

    `parent_hash` is the hash of the link before it, or the root hash of its sequence's extra keys
    where it is the first: where it has no tokens before it.
    """

    block_hash: bytes
    parent_hash: bytes
    token_ids: tuple[int, ...]
    num_tokens_before: int
    block_id: int
    extra_keys: tuple[ExtraKey, ...] = ()
    group: int = 0  # of layers whose K/V the block holds


@dataclass(frozen=True, kw_only=True)
class BlockRemoved:
    """A block's content was evicted."""

    block_hash: bytes
    block_id: int
    group: int = 0


@dataclass(frozen=True, kw_only=True)
class CacheCleared:
    """Nothing can be hit any more."""


CacheEvent = BlockStored | BlockRemoved | CacheCleared
