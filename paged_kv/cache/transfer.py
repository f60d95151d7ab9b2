"""A sequence as bytes, to go on with it elsewhere: for disaggregated prefill and tiers on disk.

Knows the wire format, nothing of files or networks. Integers are little-endian:

    frame     magic, version (u32), bytes of the header (u32), bytes of everything (u64)
    header    JSON: what both sides must agree on, then what the sequence is
    tokens    the known token ids, 4 bytes each
    records   layer by layer [blocks, kv heads, record_bytes], blocks in the order of their tokens
    checksum  SHA-256 of everything before it

Records travel in the inner order of the device that they come from, which the header names; the
side that imports them brings them into its own.

The checksum is integrity, not authenticity: whoever can write the data can write the checksum, and
no check tells K/V that a model computed from K/V that somebody made up. Take data only from where
you would take the answers from. Records travel whole, but nothing of others travels with them: what
a sequence has not filled of its blocks is zeros, in the data and where they are imported.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from reprlib import repr as short_repr
from struct import Struct
from typing import Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..blocks.block_manager import BlockManager
from ..blocks.block_tables import StoredLengths
from ..blocks.geometry import BlockGeometry, BlockIds
from ..blocks.token_chain import ExtraKey, TokenChain, TokenIds
from ..errors import TransferError
from ..validation import MAX_COUNT, require_count, require_instance
from .block_views import KEY_CODES
from .formats import RecordLayout
from .kv_cache import PagedKVCache
from .layer_spec import LayerSpec
from .transfer_counts import JsonObject, read_count, read_counts, read_evicted
from .travelling_records import TravellingRecords

MAGIC: Final = b"paged_kv"
VERSION: Final = 4
FRAME: Final = Struct("<8sIIQ")
DIGEST_BYTES: Final = 32
TOKEN_DTYPE: Final = np.dtype("<i4")
# How records lie: on a CPU keys are channel-major, sealed and open; on a GPU sealed values.
CHANNEL_MAJOR_KEYS: Final = "channel-major keys"
CHANNEL_MAJOR_VALUES: Final = "channel-major values"


@dataclass(frozen=True, kw_only=True)
class SequenceData:
    """What an export says of its sequence, beside the bytes of its blocks."""

    tokens: TokenChain
    num_computed_tokens: int  # with those that were let go since
    num_sealed: int  # body blocks, likewise
    record_order: str
    num_evicted: tuple[int, ...] = (0,)  # tokens that each group of layers has let go

    def lengths(self, geometry: BlockGeometry) -> tuple[StoredLengths, ...]:
        """What each group of layers stores."""
        size = geometry.block_size
        return tuple(
            StoredLengths(
                self.num_computed_tokens - its, self.num_sealed - its // size * geometry.seals, its
            )
            for its in self.num_evicted
        )


def export_sequence(
    cache: PagedKVCache, manager: BlockManager, seq_id: int, *, model_fingerprint: bytes = b""
) -> bytes:
    """Everything that `import_sequence` needs to go on with a sequence, which stays as it is.

    `manager` hands out the blocks of `cache`; `model_fingerprint` is what it was made with. Raises
    `InvalidStepError` while a step is outstanding, or where no sequence is.
    """
    require_instance("cache", cache, PagedKVCache)
    require_all_heads(cache)
    cache.require_stored(manager)
    manager.require_at_rest(seq_id)
    tokens = manager.chain_of(seq_id)
    if tokens.sink_window is not None:
        raise TransferError(f"seq_id {seq_id} is windowed and cannot be exported")
    lengths, geometry = manager.stored_lengths(seq_id), cache.geometry
    first = lengths[0]
    sequence = SequenceData(
        tokens=tokens,
        num_computed_tokens=first.num_stored + first.num_evicted,
        num_sealed=first.num_sealed + first.num_evicted // geometry.block_size * geometry.seals,
        record_order=record_order_of(cache),
        num_evicted=tuple(its.num_evicted for its in lengths),
    )
    fields = shared_fields(cache, model_fingerprint) | sequence_fields(cache, sequence)
    header = json.dumps(fields, separators=(",", ":")).encode()
    ids = [on_device(cache, tables.block_ids(seq_id)) for tables in manager.groups]
    parts = [memoryview(header), tokens.token_ids.astype(TOKEN_DTYPE).data]
    for layer, arena in enumerate(cache.arenas):
        own_ids = ids[cache.groups.group_of_layer[layer]]
        records = as_words(arena).index_select(0, own_ids).cpu().view(torch.uint8)
        if cache.has_small_blocks(cache.layers[layer]):
            records = by_kv_head(records, cache.geometry)
        travelling(cache, layer, records, sequence).clear_the_rest()
        parts.append(records.numpy().data)
    num_bytes = FRAME.size + sum(part.nbytes for part in parts) + DIGEST_BYTES
    parts.insert(0, memoryview(FRAME.pack(MAGIC, VERSION, len(header), num_bytes)))
    checksum = sha256()
    for part in parts:
        checksum.update(part)
    return b"".join([*parts, checksum.digest()])


def import_sequence(
    cache: PagedKVCache,
    manager: BlockManager,
    data: bytes | bytearray | memoryview,
    *,
    model_fingerprint: bytes = b"",
    extra_keys: Sequence[ExtraKey] = (),
    vocab_size: int | None = None,
) -> int:
    """Bring in an exported sequence, whose seq_id this returns, in blocks of its own.

    With prefix caching its complete links can be hit at once. Their hashes are computed here, from
    the tokens and the `extra_keys` that the caller names as for `BlockManager.chain_tokens`; data
    that say otherwise are refused, so that nobody plants blocks under another prefix's hash.
    Token ids from `vocab_size` on, where it is given, and K/V that are not finite are refused too.

    Raises `TransferError` for data that are corrupt or do not fit, `OutOfBlocksError` if too few
    sequences or blocks are free, `InvalidStepError` while a step is outstanding; nothing has
    changed then.
    """
    require_instance("cache", cache, PagedKVCache)
    read = read_export(cache, manager, data, model_fingerprint, extra_keys, vocab_size)
    seq_id, _ = manager.place_sequence(read.tokens, read.lengths)
    try:
        cache.bind(manager)
        write_records(cache, read.records, [tables.block_ids(seq_id) for tables in manager.groups])
    except BaseException:
        manager.remove_sequence(seq_id)
        raise
    manager.publish_sequence(seq_id)
    return seq_id


def require_all_heads(cache: PagedKVCache) -> None:
    """Raise `TransferError` for a cache that has some of the kv heads, as others the rest."""
    if cache.num_parts > 1:
        raise TransferError(
            f"this cache holds its part of the kv heads of {cache.num_parts} processes "
            "(tensor_parallel_size): its sequences cannot be exported, nor others imported"
        )


class ExportedSequence(NamedTuple):
    """What exported data say, once they are known to fit: what each group of layers stores, and
    each layer's records in host memory."""

    tokens: TokenChain
    lengths: tuple[StoredLengths, ...]
    records: list[Tensor]


def read_export(
    cache: PagedKVCache,
    manager: BlockManager,
    data: bytes | bytearray | memoryview,
    model_fingerprint: bytes,
    extra_keys: Sequence[ExtraKey],
    vocab_size: int | None,
) -> ExportedSequence:
    """Everything in exported data, which is refused as by `import_sequence`; changes nothing."""
    require_all_heads(cache)
    cache.require_manager(manager)
    sequence, layer_data = read_sequence(cache, manager, data, model_fingerprint, extra_keys)
    require_token_ids(sequence.tokens.token_ids, vocab_size)
    records = read_records(cache, sequence, layer_data)
    return ExportedSequence(sequence.tokens, sequence.lengths(cache.geometry), records)


def tokens_of_export(data: bytes | bytearray | memoryview) -> tuple[TokenIds, int]:
    """The known tokens of exported data, whatever cache they fit, and how many are computed.

    Raises `TransferError` for data that are corrupt, or of which this cannot be known.
    """
    header, body = open_frame(as_bytes(data))
    num_computed = read_count(header, "num_computed_tokens")
    num_bytes = read_count(header, "num_known_tokens") * TOKEN_DTYPE.itemsize
    if num_bytes > len(body):
        raise TransferError(f"{num_bytes} bytes of tokens, and {len(body)} in the data")
    return np.array(body[:num_bytes]).view(TOKEN_DTYPE).astype(np.int32), num_computed


def on_device(cache: PagedKVCache, block_ids: BlockIds) -> Tensor:
    return torch.from_numpy(block_ids.astype(np.int64)).to(cache.device)


def as_words(records: Tensor) -> Tensor:
    """Records in pieces of 8 bytes, which torch copies several times as fast as single ones."""
    return records.view(torch.int64)


# -- the header ---------------------------------------------------------------------------------


def shared_fields(cache: PagedKVCache, model_fingerprint: bytes) -> JsonObject:
    """What both sides must agree on."""
    return {
        "groups": "; ".join(str(each) for each in cache.groups.retentions),
        "layers": [layer_fields(layer) for layer in cache.layers],
        "dtype": str(cache.dtype).removeprefix("torch."),
        "geometry": asdict(cache.geometry),
        "byte_order": sys.byteorder,
        "fingerprint": cache.fingerprint(model_fingerprint).hex(),
    }


def layer_fields(layer: LayerSpec) -> JsonObject:
    calibration = None if layer.calibration is None else layer.calibration.digest
    fields = asdict(replace(layer, calibration=None)) | {"calibration": calibration}
    del fields["retention"]  # which the groups tell
    return fields


def sequence_fields(cache: PagedKVCache, sequence: SequenceData) -> JsonObject:
    """What the sequence is, with the hashes of all its complete links."""
    tokens = sequence.tokens.with_tokens(sequence.tokens.token_ids)
    tokens.hash_links(cache.geometry, cache.geometry.num_links(len(tokens.token_ids)))
    token_bytes, *layer_bytes = section_sizes(cache, sequence)
    evicted = (
        {"num_evicted_tokens": list(sequence.num_evicted)} if any(sequence.num_evicted) else {}
    )
    return evicted | {
        "num_computed_tokens": sequence.num_computed_tokens,
        "num_known_tokens": len(tokens.token_ids),
        "num_sealed": sequence.num_sealed,
        "root": tokens.root.hex(),
        "link_hashes": [link_hash.hex() for link_hash in tokens.hashes],
        "record_order": sequence.record_order,
        "token_bytes": token_bytes,
        "layer_bytes": layer_bytes,
    }


def record_order_of(cache: PagedKVCache) -> str:
    """How records lie in this cache; open keys and sealed codes never differ in it."""
    open_keys = cache.records[0].open_keys
    return CHANNEL_MAJOR_KEYS if open_keys.stride(-2) == 1 else CHANNEL_MAJOR_VALUES


# -- reading what nobody has checked ------------------------------------------------------------


def read_sequence(
    cache: PagedKVCache,
    manager: BlockManager,
    data: bytes | bytearray | memoryview,
    model_fingerprint: bytes,
    extra_keys: Sequence[ExtraKey],
) -> tuple[SequenceData, list[memoryview]]:
    """The sequence and each layer's records; raises `TransferError` unless they fit here."""
    header, body = open_frame(as_bytes(data))
    shared = shared_fields(cache, model_fingerprint)
    require_equal("header", {name: header.get(name) for name in shared}, shared)
    num_computed, num_known, num_sealed = read_counts(header, manager)
    sequence = SequenceData(
        tokens=TokenChain(np.zeros(num_known, dtype=np.int32), b""),
        num_computed_tokens=num_computed,
        num_sealed=num_sealed,
        record_order=read_record_order(header),
        num_evicted=read_evicted(header, manager, num_computed, num_sealed),
    )
    sections = split(body, section_sizes(cache, sequence))
    token_ids = np.array(sections[0]).view(TOKEN_DTYPE).astype(np.int32)
    require_token_ids(token_ids, None)
    tokens = manager.chain_tokens(token_ids, extra_keys)
    if header.get("root") != tokens.root.hex():
        raise TransferError(
            f"header.root is {short_repr(header.get('root'))} in the data, {tokens.root.hex()} "
            "here: the extra keys differ, or what the managers were made for"
        )
    sequence = replace(sequence, tokens=tokens)
    require_equal("header", header, shared | sequence_fields(cache, sequence))
    return sequence, sections[1:]


def as_bytes(data: object) -> memoryview:
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise TransferError(f"an exported sequence is bytes, got {short_repr(data)}")
    try:
        return memoryview(data).cast("B")
    except (TypeError, ValueError) as error:  # a view with gaps, or one that was released
        raise TransferError(f"an exported sequence is contiguous bytes: {error}") from error


def require_token_ids(token_ids: TokenIds, vocab_size: int | None) -> None:
    """Raise `TransferError` for a token id that no model knows, or not one of so many tokens."""
    limit = MAX_COUNT if vocab_size is None else require_count("vocab_size", vocab_size)
    wrong = (token_ids < 0) | (token_ids >= limit)
    if wrong.any():
        raise TransferError(
            f"token id {token_ids[wrong.argmax()]} is outside a vocabulary of {limit}"
        )


def open_frame(data: memoryview) -> tuple[JsonObject, memoryview]:
    """The header, and the bytes between it and the checksum."""
    if len(data) < FRAME.size + DIGEST_BYTES:
        raise TransferError(f"{len(data)} bytes are too few for an exported sequence")
    magic, version, header_bytes, num_bytes = FRAME.unpack_from(data)
    if magic != MAGIC:
        raise TransferError(
            f"an exported sequence begins with {MAGIC!r}, these data with {magic!r}"
        )
    require_equal("version", version, VERSION)
    if num_bytes != len(data):
        raise TransferError(
            f"there are {len(data)} bytes of data where they say {num_bytes}: truncated or extended"
        )
    header_end = FRAME.size + header_bytes
    if header_end > len(data) - DIGEST_BYTES:
        raise TransferError(f"a header of {header_bytes} bytes exceeds the {len(data)} of the data")
    if sha256(data[:-DIGEST_BYTES]).digest() != data[-DIGEST_BYTES:]:
        raise TransferError("the checksum differs: the data are corrupt")
    try:
        header = json.loads(str(data[FRAME.size : header_end], "utf-8"))
    except (ValueError, RecursionError) as error:
        raise TransferError(f"the header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise TransferError(f"the header is not a JSON object but {short_repr(header)}")
    return header, data[header_end:-DIGEST_BYTES]


def require_equal(name: str, theirs: object, ours: object) -> None:
    """Raise `TransferError` naming the first part in which two JSON values differ."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        if ours.keys() != theirs.keys():
            names = sorted(ours.keys() ^ theirs.keys())
            raise TransferError(f"{name} has {short_repr(names)} on one side only")
        for key, value in ours.items():
            require_equal(f"{name}.{key}", theirs[key], value)
    elif isinstance(ours, list) and isinstance(theirs, list):
        if len(ours) != len(theirs):
            raise TransferError(f"{name} has length {len(theirs)} in the data, {len(ours)} here")
        for index, value in enumerate(ours):
            require_equal(f"{name}[{index}]", theirs[index], value)
    elif theirs != ours:
        raise TransferError(f"{name} is {short_repr(theirs)} in the data, {short_repr(ours)} here")


def read_record_order(header: JsonObject) -> str:
    """The order in which the records of the data lie: either one can be read."""
    order = header.get("record_order")
    if order not in (CHANNEL_MAJOR_KEYS, CHANNEL_MAJOR_VALUES):
        raise TransferError(f"header.record_order is {short_repr(order)}, which nobody can read")
    return order


def section_sizes(cache: PagedKVCache, sequence: SequenceData) -> list[int]:
    """Bytes of the token ids, then of each layer's records."""
    lengths = sequence.lengths(cache.geometry)
    counts = [cache.geometry.count_blocks(its.num_stored, its.num_sealed) for its in lengths]
    num_blocks = [counts[group] for group in cache.groups.group_of_layer]
    record_bytes = [heads * size for heads, size in cache.record_shapes]
    token_bytes = len(sequence.tokens.token_ids) * TOKEN_DTYPE.itemsize
    return [token_bytes, *(n * size for n, size in zip(num_blocks, record_bytes, strict=True))]


def split(body: memoryview, sizes: list[int]) -> list[memoryview]:
    """Consecutive parts of these sizes, which have to be all of `body`."""
    if sum(sizes) != len(body):
        raise TransferError(
            f"the data hold {len(body)} bytes of tokens and records; a sequence as in their header "
            f"has {sum(sizes)}"
        )
    ends = np.cumsum(sizes).tolist()
    return [body[end - size : end] for size, end in zip(sizes, ends, strict=True)]


# -- records ------------------------------------------------------------------------------------


def travelling(
    cache: PagedKVCache, layer: int, records: Tensor, sequence: SequenceData
) -> TravellingRecords:
    its = sequence.lengths(cache.geometry)[cache.groups.group_of_layer[layer]]
    return TravellingRecords(
        records=records,
        layout=cache.layers[layer].record_layout(cache.dtype),
        dtype=cache.dtype,
        open_block_size=cache.geometry.open_block_size,
        num_head_blocks=cache.geometry.num_head_blocks,
        num_sealed=its.num_sealed,
        num_tokens=its.num_stored,
        keys_are_channel_major=sequence.record_order == CHANNEL_MAJOR_KEYS,
    )


def read_records(
    cache: PagedKVCache, sequence: SequenceData, layer_data: Sequence[memoryview]
) -> list[Tensor]:
    """Each layer's records in host memory, in the order of the device, with nothing but the
    sequence's own; raises `TransferError` unless all of it is finite."""
    is_reordered = sequence.record_order != record_order_of(cache)
    all_records: list[Tensor] = []
    for layer, data in enumerate(layer_data):
        array = np.array(data).reshape(-1, *cache.record_shapes[layer])
        records = torch.from_numpy(array)
        own = travelling(cache, layer, records, sequence)
        own.clear_the_rest()
        if not own.are_finite():
            raise TransferError(f"the K/V of layer {layer} are not all finite")
        if is_reordered:
            reorder_records(cache, layer, records, sequence)
        all_records.append(records)
    return all_records


def write_records(
    cache: PagedKVCache, all_records: Sequence[Tensor], block_ids: Sequence[BlockIds]
) -> None:
    """Copy each layer's records into the blocks of its group."""
    ids = [on_device(cache, its) for its in block_ids]
    for layer, records in enumerate(all_records):
        if cache.has_small_blocks(cache.layers[layer]):
            records = by_small_block(records, cache.geometry)
        own_ids = ids[cache.groups.group_of_layer[layer]]
        as_words(cache.arenas[layer])[own_ids] = as_words(records.to(cache.device))


def by_kv_head(records: Tensor, geometry: BlockGeometry) -> Tensor:
    """Records [blocks, kv heads, record_bytes] of a layer whose small blocks lie one behind the
    other in its arena, each with all kv heads (see `kernels.full_precision`)."""
    num_small = geometry.open_blocks_per_block
    small = records.view(len(records), num_small, records.shape[1], -1)
    return small.transpose(1, 2).reshape(records.shape)


def by_small_block(records: Tensor, geometry: BlockGeometry) -> Tensor:
    """The inverse of `by_kv_head`."""
    num_small = geometry.open_blocks_per_block
    small = records.view(*records.shape[:2], num_small, -1)
    return small.transpose(1, 2).reshape(records.shape)


def reorder_records(
    cache: PagedKVCache, place: int, records: Tensor, sequence: SequenceData
) -> None:
    """A sequence's records of a layer, in place: from the order they lie in to the other one."""
    body_start, layer = cache.geometry.num_head_blocks, cache.layers[place]
    its = sequence.lengths(cache.geometry)[cache.groups.group_of_layer[place]]
    head, body, tail = records.tensor_split((body_start, body_start + its.num_sealed))
    keys_are_channel_major = sequence.record_order == CHANNEL_MAJOR_KEYS
    open_keys = (cache.geometry.open_block_size, layer.key_dim)
    for open_records in (head, tail):
        transpose(open_records, cache.dtype, 0, open_keys, keys_are_channel_major)
    if cache.has_small_blocks(layer):
        small = body.view(*body.shape[:2], cache.geometry.open_blocks_per_block, -1)
        transpose(small, cache.dtype, 0, open_keys, keys_are_channel_major)
    elif its.num_sealed:
        reorder_codes(body, layer.record_layout(cache.dtype), keys_are_channel_major)


def reorder_codes(records: Tensor, layout: RecordLayout, keys_are_channel_major: bool) -> None:
    """Sealed records [..., record_bytes], in place: their codes into the other order."""
    for section, shape in layout.code_shapes.items():
        is_channel_major = keys_are_channel_major == (section in KEY_CODES)
        transpose(records, torch.uint8, layout.offset(section), shape, is_channel_major)


def transpose(
    records: Tensor,
    dtype: torch.dtype,
    byte_offset: int,
    shape: tuple[int, int],
    is_channel_major: bool,
) -> None:
    """A matrix [rows, dim] in every record, in place: from channel-major to row-major, or back."""
    end = byte_offset + shape[0] * shape[1] * dtype.itemsize
    elements = records[..., byte_offset:end].view(dtype)
    matrices = elements.view(*elements.shape[:-1], *(shape[::-1] if is_channel_major else shape))
    elements.copy_(matrices.transpose(-1, -2).flatten(-2))
