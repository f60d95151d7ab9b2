"""Cache events as routers read them: vLLM's messages, of blocks that all have one size.

Knows links, hashes and tokens; never sockets, nor who reads.

The field names are those of `vllm.distributed.kv_events` in vLLM 0.32 and 0.33: a batch is an
array, its events are maps with their name under "type".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Final

import msgspec
import numpy as np

from ...blocks.events import BlockRemoved, BlockStored, CacheEvent
from ...blocks.token_chain import link_hash
from ...engine.intake import is_nobody_elses

# What vLLM calls the pool that it computes on, also in its CPU build: the best tier of a router.
MEDIUM: Final = "GPU"
FULL_ATTENTION: Final = "full_attention"
HASH_BYTES: Final = 8  # the last ones of a hash, big-endian, are what vLLM tells of it


class StoredMessage(msgspec.Struct, tag="BlockStored", omit_defaults=True):
    """Blocks of one sequence, one after another, can be hit from now on."""

    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: list[tuple[str, ...] | None]
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None


class RemovedMessage(msgspec.Struct, tag="BlockRemoved", omit_defaults=True):
    """Blocks that cannot be hit any more."""

    block_hashes: list[int]
    medium: str | None
    group_idx: int | None = None


class ClearedMessage(msgspec.Struct, tag="AllBlocksCleared"):
    """No block can be hit any more."""


Message = StoredMessage | RemovedMessage | ClearedMessage


class MessageBatch(msgspec.Struct, array_like=True):
    """What happened in one step, at `ts` seconds since 1970."""

    ts: float
    events: list[Message]
    data_parallel_rank: int = 0


class UniformBlocks:
    """Links, whose sizes differ, as blocks of `block_size` tokens, which is all that routers know.

    The size is that of an open block: of each link a whole number of them. The last block of a link
    has its hash; those before it have that of the link as far as they go, which links that begin
    alike have in common: such a block is there as long as any of them.
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self._blocks: dict[bytes, list[bytes]] = {}  # of each link
        self._num_links: Counter[bytes] = Counter()  # of each block

    def clear(self) -> None:
        """No link is there any more."""
        self._blocks.clear()
        self._num_links.clear()

    def messages(self, events: Iterable[CacheEvent]) -> list[Message]:
        """What a router is told of these events; nothing of links that nobody else can hit.

        Of groups of layers it is told of the first, which needs the longest part of a prefix.
        """
        messages: list[Message] = []
        for event in events:
            if isinstance(event, (BlockStored, BlockRemoved)) and event.group:
                continue
            if isinstance(event, BlockStored):
                if not is_nobody_elses(event.extra_keys):
                    self._store(event, messages)
            elif isinstance(event, BlockRemoved):
                self._remove(event, messages)
            else:
                self.clear()
                messages.append(ClearedMessage())
        return messages

    def _store(self, event: BlockStored, messages: list[Message]) -> None:
        """Add a message, or make the last one longer where the link goes on from it."""
        blocks = self._blocks[event.block_hash] = self._blocks_of(event)
        num_known = sum(block in self._num_links for block in blocks)  # the first ones
        self._num_links.update(blocks)
        is_first = not num_known and not event.num_tokens_before
        parent = wire_hash(blocks[num_known - 1] if num_known else event.parent_hash)
        message = self._stored(event, [wire_hash(block) for block in blocks[num_known:]])
        message.parent_block_hash = None if is_first else parent
        last = messages[-1] if messages else None
        if isinstance(last, StoredMessage) and last.block_hashes[-1] == message.parent_block_hash:
            last.block_hashes += message.block_hashes
            last.token_ids += message.token_ids
            last.extra_keys += message.extra_keys
        else:
            messages.append(message)

    def _blocks_of(self, event: BlockStored) -> list[bytes]:
        """The hashes of a link's blocks."""
        step = 4 * self.block_size
        data = np.array(event.token_ids, dtype=np.int32).tobytes()
        ends = range(step, len(data), step)
        return [*(link_hash(event.parent_hash, data[:end]) for end in ends), event.block_hash]

    def _stored(self, event: BlockStored, block_hashes: list[int]) -> StoredMessage:
        """The last blocks of a link."""
        names = [key.decode(errors="replace") for key in event.extra_keys if isinstance(key, bytes)]
        lora_name = "+".join(names) or None
        every = None if lora_name is None else (lora_name,)
        extra_keys: list[tuple[str, ...] | None] = [every] * len(block_hashes)
        if not event.num_tokens_before:  # as vLLM does, a salt is told with a sequence's first one
            salts = [text_of(key) for key in event.extra_keys if not isinstance(key, bytes)]
            extra_keys[0] = (*(every or ()), *salts) or None
        return StoredMessage(
            block_hashes=block_hashes,
            parent_block_hash=None,
            token_ids=list(event.token_ids[-len(block_hashes) * self.block_size :]),
            block_size=self.block_size,
            lora_id=None,
            medium=MEDIUM,
            lora_name=lora_name,
            extra_keys=extra_keys,
            group_idx=0,
            kv_cache_spec_kind=FULL_ATTENTION,
        )

    def _remove(self, event: BlockRemoved, messages: list[Message]) -> None:
        gone = []
        for block in self._blocks.pop(event.block_hash, ()):  # or a router was not told of it
            self._num_links[block] -= 1
            if not self._num_links[block]:
                del self._num_links[block]
                gone.append(wire_hash(block))
        if gone:
            messages.append(RemovedMessage(block_hashes=gone, medium=MEDIUM, group_idx=0))


def text_of(key: str | int) -> str:
    """A key as text that can be sent."""
    return str(key).encode(errors="replace").decode()


def wire_hash(block_hash: bytes) -> int:
    return int.from_bytes(block_hash[-HASH_BYTES:], "big")
