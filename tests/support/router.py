"""A router that subscribes to cache events: what it decodes, and what it then knows of a server.

Written from what vLLM publishes of its messages, and from nothing in paged_kv.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import zmq

END = (1 << 64) - 1


class EventBatch(msgspec.Struct, array_like=True, omit_defaults=True):
    ts: float
    events: list[Any]
    data_parallel_rank: int | None = None


class Event(msgspec.Struct, omit_defaults=True, tag=True, forbid_unknown_fields=True):
    pass


class BlockStored(Event):
    block_hashes: list[int | bytes]
    parent_block_hash: int | bytes | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: list[tuple[Any, ...] | None] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: int | None = None


class BlockRemoved(Event):
    block_hashes: list[int | bytes]
    medium: str | None
    group_idx: int | None = None


class AllBlocksCleared(Event):
    pass


class KVEventBatch(EventBatch):
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]


decode = msgspec.msgpack.Decoder(KVEventBatch).decode


class RouterIndex:
    """What a server has: blocks by the block before them and their tokens."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.by_content: dict[tuple[Any, ...], int | bytes] = {}
        self.contents: dict[int | bytes, tuple[Any, ...]] = {}

    def apply(self, payload: bytes) -> None:
        for event in decode(payload).events:
            if isinstance(event, AllBlocksCleared):
                self.by_content.clear()
                self.contents.clear()
            elif isinstance(event, BlockRemoved):
                for block_hash in event.block_hashes:
                    del self.by_content[self.contents.pop(block_hash)]
            else:
                self.store(event)

    def store(self, event: BlockStored) -> None:
        size = event.block_size
        assert size == self.block_size
        assert len(event.token_ids) == size * len(event.block_hashes)
        assert event.extra_keys is not None
        assert len(event.extra_keys) == len(event.block_hashes)
        parent: Any = event.parent_block_hash
        if parent is None:
            parent = ("root", event.extra_keys[0])
        for index, block_hash in enumerate(event.block_hashes):
            content = (parent, *event.token_ids[index * size : (index + 1) * size])
            assert block_hash not in self.contents, "a block is told of twice"
            assert content not in self.by_content, "the same content under two names"
            self.contents[block_hash] = content
            self.by_content[content] = parent = block_hash

    def num_tokens(self, token_ids: Sequence[int], keys: tuple[str, ...] | None = None) -> int:
        """Tokens of a prompt in blocks that the server has, from its beginning."""
        parent: Any = ("root", keys)
        for start in range(0, len(token_ids) - self.block_size + 1, self.block_size):
            block_hash = self.by_content.get((parent, *token_ids[start : start + self.block_size]))
            if block_hash is None:
                return start
            parent = block_hash
        return len(token_ids) // self.block_size * self.block_size


class Subscriber:
    """Sockets of one who reads events and asks for those that it missed."""

    def __init__(self, endpoint: str, replay_endpoint: str | None = None, topic: str = "") -> None:
        self.context = zmq.Context()
        self.events = self.context.socket(zmq.SUB)
        self.events.setsockopt_string(zmq.SUBSCRIBE, topic)
        self.events.connect(endpoint)
        self.replays = self.context.socket(zmq.DEALER)
        if replay_endpoint is not None:
            self.replays.connect(replay_endpoint)

    def __enter__(self) -> Subscriber:
        return self

    def __exit__(self, *exception: object) -> None:
        self.context.destroy(linger=0)

    def receive(self, timeout_ms: int = 5000) -> tuple[bytes, int, bytes]:
        """Topic, sequence number and payload of the next batch."""
        assert self.events.poll(timeout_ms), "no batch came"
        topic, number, payload = self.events.recv_multipart()
        assert len(number) == 8
        return topic, int.from_bytes(number, "big"), payload

    def replay(self, first: int) -> list[tuple[int, bytes]]:
        """Sequence numbers and payloads from this one on."""
        self.replays.send_multipart([b"", first.to_bytes(8, "big")])
        batches = []
        while True:
            assert self.replays.poll(5000), "no end of the replay came"
            _, _, number, payload = self.replays.recv_multipart()
            if int.from_bytes(number, "big") == END:
                assert payload == b""
                return batches
            batches.append((int.from_bytes(number, "big"), payload))
