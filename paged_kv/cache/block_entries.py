"""Blocks as entries of a store: bytes under a key that says what they are. Knows no stores.

An entry is what the layers of one group have in the block of one link of a prefix. Integers are
little-endian:

    frame     magic, version (u32), 1 if it is sealed (u32), bytes of everything (u64)
    key       32 bytes
    records   layer by layer [kv heads, bytes that are used of a record], each padded to 8 bytes
    checksum  SHA-256 of everything before it

The key is a hash of the link and of everything that decides the bytes, the order of the device's
records included, so that an entry fits wherever its key is asked for. As with exported sequences
the checksum is integrity, not authenticity: take entries only from where you would take the
answers from.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from hashlib import sha256
from struct import Struct
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..blocks.geometry import BlockIds
from ..blocks.prefix_cache import HASH_BYTES, PublishedBlock
from ..errors import TransferError
from ..version import __version__
from .kv_cache import PagedKVCache
from .transfer import (
    CHANNEL_MAJOR_KEYS,
    DIGEST_BYTES,
    MAGIC,
    as_words,
    by_kv_head,
    by_small_block,
    on_device,
    record_order_of,
    shared_fields,
)
from .travelling_records import TravellingRecords

VERSION: Final = 1
FRAME: Final = Struct("<8sIIQ")
PADDING: Final = 8
OPENING_BYTES: Final = FRAME.size + HASH_BYTES


class Kind(NamedTuple):
    """What blocks have in common whose entries have the same parts."""

    group: int
    is_sealed: bool


class Part(NamedTuple):
    """Where a layer's records lie in an entry, counted from its first record."""

    layer: int
    start: int
    num_heads: int
    used_bytes: int  # of each head's record


class BlockCopies(NamedTuple):
    """Records of some blocks of a kind, out of their pool."""

    kind: Kind
    block_hashes: list[bytes]
    records: list[Tensor]  # of each layer of the group [blocks, kv heads, record_bytes]


class BlockEntries:
    """Makes entries of a cache's blocks, and blocks of entries.

    `model_fingerprint` has to differ wherever a model's K/V would: entries outlive the process.
    """

    def __init__(self, cache: PagedKVCache, model_fingerprint: bytes) -> None:
        self._cache = cache
        fields = shared_fields(cache, model_fingerprint) | {
            "entry_version": VERSION,
            "library": __version__,
            "record_order": record_order_of(cache),
        }
        self._root = sha256(json.dumps(fields, sort_keys=True).encode()).digest()
        self._parts = {kind: self._parts_of(kind) for kind in self._kinds()}

    def key(self, block_hash: bytes) -> bytes:
        """Under which a block is kept, whose hash is as the prefix cache knows it."""
        return sha256(self._root + block_hash).digest()

    def kind_of(self, block_hash: bytes, is_sealed: bool) -> Kind:
        return Kind(block_hash[HASH_BYTES] if len(block_hash) > HASH_BYTES else 0, is_sealed)

    def num_bytes(self, kind: Kind) -> int:
        """Of an entry."""
        return OPENING_BYTES + self._payload_bytes(kind) + DIGEST_BYTES

    # -- out of the pool ------------------------------------------------------------------------

    def copy(self, blocks: Sequence[PublishedBlock]) -> list[BlockCopies]:
        """Copies of blocks on their device, made in the order of its work."""
        by_kind: dict[Kind, list[PublishedBlock]] = {}
        for block in blocks:
            by_kind.setdefault(self.kind_of(block.block_hash, block.is_sealed), []).append(block)
        copies = []
        for kind, its in by_kind.items():
            ids = on_device(self._cache, np.array([n.block_id for n in its], dtype=np.int32))
            records = [
                as_words(self._cache.arenas[part.layer]).index_select(0, ids).view(torch.uint8)
                for part in self._parts[kind]
            ]
            copies.append(BlockCopies(kind, [block.block_hash for block in its], records))
        return copies

    def entries_of(self, copies: BlockCopies) -> Iterator[tuple[bytes, bytes | None]]:
        """The key of each block and its entry, or None for one that is not all finite.

        The last block comes first: whoever writes them in this order, and forgets the oldest, loses
        the end of a prefix before its beginning.
        """
        cache, kind = self._cache, copies.kind
        num_blocks = len(copies.block_hashes)
        payloads = np.empty((num_blocks, self._payload_bytes(kind)), dtype=np.uint8)
        for part, on_its_device in zip(self._parts[kind], copies.records, strict=True):
            records = on_its_device.cpu()
            if cache.has_small_blocks(cache.layers[part.layer]):
                records = by_kv_head(records, cache.geometry)
            self._of_part(payloads, part)[:] = records[..., : part.used_bytes].numpy()
        are_finite = self._clear_and_check(payloads, kind)
        for block_hash, payload, is_finite in zip(
            reversed(copies.block_hashes), payloads[::-1], reversed(are_finite), strict=True
        ):
            key = self.key(block_hash)
            yield key, self._framed(key, kind, payload) if is_finite else None

    def _framed(self, key: bytes, kind: Kind, payload: NDArray[np.uint8]) -> bytes:
        frame = FRAME.pack(MAGIC, VERSION, kind.is_sealed, self.num_bytes(kind))
        data = b"".join([frame, key, payload.data])
        return data + sha256(data).digest()

    # -- into the pool --------------------------------------------------------------------------

    def payload(self, key: bytes, kind: Kind, data: bytes) -> NDArray[np.uint8]:
        """The records of an entry; raises `TransferError` unless it is whole and is this one."""
        num_bytes = self.num_bytes(kind)
        if len(data) != num_bytes:
            raise TransferError(f"an entry of {len(data)} bytes, where {num_bytes} are expected")
        opening = FRAME.pack(MAGIC, VERSION, kind.is_sealed, num_bytes) + key
        if data[:OPENING_BYTES] != opening:
            raise TransferError("an entry of another key or version")
        if sha256(memoryview(data)[:-DIGEST_BYTES]).digest() != data[-DIGEST_BYTES:]:
            raise TransferError("the checksum of an entry differs: it is corrupt")
        return np.frombuffer(data, np.uint8, self._payload_bytes(kind), OPENING_BYTES)

    def stacked(
        self, kind: Kind, payloads: Sequence[NDArray[np.uint8]]
    ) -> tuple[NDArray[np.uint8], list[bool]]:
        """Payloads of a kind [blocks, bytes], what they do not use cleared; which are finite."""
        stack = np.stack(payloads)
        return stack, self._clear_and_check(stack, kind)

    def write(self, kind: Kind, stack: NDArray[np.uint8], block_ids: BlockIds) -> None:
        """Write payloads [blocks, bytes] into as many blocks."""
        cache, ids = self._cache, on_device(self._cache, block_ids)
        for part in self._parts[kind]:
            arena = cache.arenas[part.layer]
            records = torch.zeros((len(stack), *arena.shape[1:]), dtype=torch.uint8)
            records[..., : part.used_bytes] = torch.from_numpy(self._of_part(stack, part))
            if cache.has_small_blocks(cache.layers[part.layer]):
                records = by_small_block(records, cache.geometry)
            as_words(arena)[ids] = as_words(records.to(cache.device))

    # -- parts of an entry ----------------------------------------------------------------------

    def _kinds(self) -> Iterator[Kind]:
        seals = self._cache.geometry.seals
        for group in range(len(self._cache.groups.retentions)):
            yield from [Kind(group, False), *([Kind(group, True)] if seals else [])]

    def _parts_of(self, kind: Kind) -> list[Part]:
        cache, parts, start = self._cache, list[Part](), 0
        for layer, group in enumerate(cache.groups.group_of_layer):
            if group != kind.group:
                continue
            layout = cache.layers[layer].record_layout(cache.dtype)
            used = cache.geometry.open_block_size * layout.token_bytes
            if kind.is_sealed:
                used = sum(layout.section_bytes.values())
            num_heads, record_bytes = cache.record_shapes[layer]
            used = min(-(-used // PADDING) * PADDING, record_bytes)
            parts.append(Part(layer, start, num_heads, used))
            start += num_heads * used
        return parts

    def _payload_bytes(self, kind: Kind) -> int:
        last = self._parts[kind][-1]
        return last.start + last.num_heads * last.used_bytes

    def _of_part(self, payloads: NDArray[np.uint8], part: Part) -> NDArray[np.uint8]:
        """A view [blocks, kv heads, bytes] of what a layer has in payloads."""
        end = part.start + part.num_heads * part.used_bytes
        shape = (len(payloads), part.num_heads, part.used_bytes)
        return payloads[:, part.start : end].reshape(shape)  # splits an axis: no copy

    def _clear_and_check(self, payloads: NDArray[np.uint8], kind: Kind) -> list[bool]:
        """Zero, in place, what blocks do not use; which of them are all finite."""
        are_finite = True
        for part in self._parts[kind]:
            its = self._travelling(self._of_part(payloads, part), part, kind)
            its.clear_the_rest()
            are_finite = are_finite and its.are_finite()
        if are_finite:
            return [True] * len(payloads)
        return [
            all(
                self._travelling(self._of_part(each, part), part, kind).are_finite()
                for part in self._parts[kind]
            )
            for each in np.split(payloads, len(payloads))
        ]

    def _travelling(self, records: NDArray[np.uint8], part: Part, kind: Kind) -> TravellingRecords:
        cache, num_blocks = self._cache, len(records)
        geometry = cache.geometry
        size = geometry.block_size if kind.is_sealed else geometry.open_block_size
        return TravellingRecords(
            records=torch.from_numpy(records),
            layout=cache.layers[part.layer].record_layout(cache.dtype),
            dtype=cache.dtype,
            open_block_size=geometry.open_block_size,
            num_head_blocks=0,
            num_sealed=num_blocks if kind.is_sealed else 0,
            num_tokens=num_blocks * size,
            keys_are_channel_major=record_order_of(cache) == CHANNEL_MAJOR_KEYS,
        )
