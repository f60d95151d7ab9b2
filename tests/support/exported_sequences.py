"""Fleets that export and import sequences, and data that was tampered with."""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass
from hashlib import sha256
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from paged_kv.blocks.token_chain import TokenChain, root_hash
from paged_kv.cache import transfer
from paged_kv.cache.formats import KVFormat
from paged_kv.cache.kv_cache import PagedKVCache
from paged_kv.cache.layer_spec import LayerSpec
from paged_kv.cache.transfer import (
    DIGEST_BYTES,
    FRAME,
    MAGIC,
    VERSION,
    SequenceData,
    export_sequence,
    import_sequence,
    sequence_fields,
    shared_fields,
)
from paged_kv.errors import TransferError
from tests.support.fleets import Fleet
from tests.support.kv_formats import FORMATS_BY_LABEL
from tests.support.token_streams import Stream, make_stream

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)

ALL_FORMATS = pytest.mark.parametrize("kv_format", FORMATS_BY_LABEL.values(), ids=FORMATS_BY_LABEL)

ORDERS = (transfer.CHANNEL_MAJOR_KEYS, transfer.CHANNEL_MAJOR_VALUES)


class SharingFleet(Fleet):
    """A fleet whose blocks may have several users, or lie in the prefix cache."""

    def __init__(self, layers, *, prefix_caching: bool = False, **options):
        super().__init__(layers, **options)
        self.manager = self.cache.new_manager(
            max_num_seqs=self.manager.max_num_seqs,
            max_model_len=self.manager.max_model_len,
            prefix_caching=prefix_caching,
        )

    def poison_blocks(self, block_ids):
        pool = self.manager.pool
        cached = pool.prefix_cache is not None and pool.prefix_cache.is_cached[block_ids]
        super().poison_blocks(block_ids[(pool.ref_counts[block_ids] == 0) & ~np.array(cached)])

    def add_tokens(self, stream: Stream, token_ids, extra_keys=()) -> int:
        seq_id = self.manager.add_sequence(self.manager.chain_tokens(token_ids, extra_keys))
        self.streams[seq_id] = stream
        return seq_id

    def take(self, data: bytes, stream: Stream, **options) -> int:
        seq_id = import_sequence(self.cache, self.manager, data, **options)
        self.streams[seq_id] = stream
        return seq_id

    def export(self, seq_id: int, **options) -> bytes:
        return export_sequence(self.cache, self.manager, seq_id, **options)


def layers_of(kv_format: KVFormat) -> list[LayerSpec]:
    """Two layers whose records differ in size."""
    return [
        LayerSpec(kv_format=kv_format, num_kv_heads=heads, key_dim=key_dim, value_dim=value_dim)
        for heads, key_dim, value_dim in ((2, 16, 24), (1, 32, 8))
    ]


# With a head of 16 tokens and blocks of 128 in records that are small.
SMALL_FORMAT = KVFormat(name="int2", key_bits=2, value_bits=2, key_clip=0.75, value_clip=0.8)


def small_layer(kv_format: KVFormat = SMALL_FORMAT) -> LayerSpec:
    return LayerSpec(kv_format=kv_format, num_kv_heads=1, key_dim=8, value_dim=8)


def frozen(value: object) -> object:
    """A value as something that can be compared, with everything that it refers to."""
    if isinstance(value, np.ndarray):
        return (str(value.dtype), value.shape, value.tobytes())
    if isinstance(value, torch.Tensor):
        return frozen(value.numpy())
    if isinstance(value, dict):
        return [(frozen(key), frozen(item)) for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return [frozen(item) for item in value]
    if isinstance(value, TokenChain):
        return frozen([value.token_ids, value.root, value.hashes])
    if is_dataclass(value):  # without what it has worked out from its fields since
        names = [field.name for field in fields(value)]
        return (type(value).__name__, [(name, frozen(getattr(value, name))) for name in names])
    if hasattr(value, "__dict__"):
        return (type(value).__name__, frozen(vars(value)))
    return value


def state_of(fleet: Fleet) -> object:
    """Everything inside the manager, and every byte of the cache."""
    return frozen([fleet.manager, fleet.cache.arenas])


def moved_view(view: torch.Tensor | None, records: torch.Tensor) -> torch.Tensor | None:
    """The same view of other records."""
    if view is None:
        return None
    shape = len(records), *view.shape[1:]
    return records.view(view.dtype).as_strided(shape, view.stride(), view.storage_offset())


def records_of(fleet: Fleet, seq_id: int) -> list[torch.Tensor]:
    """What a sequence has written of its records, by layer; zeros elsewhere."""
    cache, manager = fleet.cache, fleet.manager
    block_ids = torch.as_tensor(manager.block_ids(seq_id), dtype=torch.int64)
    geometry, num_tokens = cache.geometry, int(manager.num_computed_tokens[seq_id])
    is_open = torch.ones(len(block_ids), dtype=torch.bool)
    is_open[geometry.num_head_blocks :][: int(manager.num_sealed[seq_id])] = False
    copies = []
    for layer, arena in enumerate(cache.arenas):
        written = torch.zeros(len(block_ids), *arena.shape[1:], dtype=torch.uint8)
        sources = cache.records[layer]
        targets = SimpleNamespace(
            open_keys=moved_view(sources.open_keys, written),
            open_values=moved_view(sources.open_values, written),
            sealed=[moved_view(view, written) for view in sources.sealed or ()],
        )
        for row, block_id in enumerate(block_ids.tolist()):
            if not is_open[row]:
                for target, source in zip(targets.sealed, sources.sealed, strict=True):
                    if target is not None:
                        target[row] = source[block_id]
                continue
            num_filled = num_tokens - int(is_open[:row].sum()) * geometry.open_block_size
            num_filled -= int((~is_open[:row]).sum()) * geometry.block_size
            for name in ("open_keys", "open_values"):
                target, source = getattr(targets, name), getattr(sources, name)
                target[row, :, :num_filled] = source[block_id, :, :num_filled]
        copies.append(written)
    return copies


def assert_equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    assert len(ours) == len(theirs)
    for our, their in zip(ours, theirs, strict=True):
        assert torch.equal(our, their)


def assert_close(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    """Equal but for the order in which two backends add up."""
    assert len(ours) == len(theirs)
    for our, their in zip(ours, theirs, strict=True):
        assert our.dtype == their.dtype == torch.float32
        assert float((our - their).norm() / their.norm()) <= 1e-5


def assert_refused(
    fleet: Fleet, data: bytes, match: str, error: type[Exception] = TransferError, **options
) -> None:
    before = state_of(fleet)
    with pytest.raises(error, match=match):
        import_sequence(fleet.cache, fleet.manager, data, **options)
    assert state_of(fleet) == before


def parts_of(data: bytes) -> tuple[dict, bytes]:
    """Header and body of an export."""
    _, _, header_bytes, _ = FRAME.unpack_from(data)
    end = FRAME.size + header_bytes
    return json.loads(data[FRAME.size : end]), data[end:-DIGEST_BYTES]


def forged(header: object, body: bytes, *, version: int = VERSION, header_bytes=None) -> bytes:
    """An export with a correct checksum, as anybody can make it."""
    header_data = header if isinstance(header, bytes) else json.dumps(header).encode()
    total = FRAME.size + len(header_data) + len(body) + DIGEST_BYTES
    length = len(header_data) if header_bytes is None else header_bytes
    data = FRAME.pack(MAGIC, version, length, total) + header_data + body
    return data + sha256(data).digest()


def num_blocks_of(data: bytes, layer: LayerSpec) -> int:
    """How many blocks an export of that one layer has."""
    header, _ = parts_of(data)
    record_bytes = layer.record_layout(torch.float32).record_bytes
    return header["layer_bytes"][0] // (layer.num_kv_heads * record_bytes)


def tokens_of(seed: int, length: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 50_000, length).astype(np.int32)


def forged_sequence(
    cache: PagedKVCache, num_computed: int, num_known: int, num_sealed: int
) -> bytes:
    """A sequence with these counts, whose hashes and sizes agree with them."""
    tokens = TokenChain(tokens_of(1, num_known), root_hash(cache.fingerprint()))
    sequence = SequenceData(
        tokens=tokens,
        num_computed_tokens=num_computed,
        num_sealed=num_sealed,
        record_order=transfer.record_order_of(cache),
    )
    header = shared_fields(cache, b"") | sequence_fields(cache, sequence)
    body = tokens.token_ids.tobytes() + bytes(max(sum(header["layer_bytes"]), 0))
    return forged(header, body)


def exported(layers: list[LayerSpec], length: int = 300, **options) -> bytes:
    fleet = SharingFleet(layers, **options)
    seq_id = fleet.add_tokens(make_stream(layers, length, 1, torch.float32), tokens_of(1, length))
    fleet.step({seq_id: length})
    return fleet.export(seq_id)
