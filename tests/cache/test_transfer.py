"""Exported sequences: they go on where they were, and nothing that was tampered with gets in."""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass, replace
from hashlib import sha256

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from paged_kv.blocks.token_chain import TokenChain, root_hash
from paged_kv.cache import transfer
from paged_kv.cache.backend import TORCH_BACKEND
from paged_kv.cache.block_views import layer_blocks
from paged_kv.cache.formats import INT2, INT4, INT8, NATIVE, KVFormat, RecordLayout
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
    reorder_records,
    sequence_fields,
    shared_fields,
)
from paged_kv.errors import InvalidStepError, OutOfBlocksError, TransferError
from paged_kv.kernels.block_views import LayerBlocks
from tests.support.helpers import FORMATS_BY_LABEL, Fleet, Stream, ids, make_stream

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


def small_layer(kv_format: KVFormat = INT2) -> LayerSpec:
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


def records_of(fleet: Fleet, seq_id: int) -> list[torch.Tensor]:
    """The bytes of every record of a sequence, by layer."""
    block_ids = torch.as_tensor(fleet.manager.block_ids(seq_id), dtype=torch.int64)
    return [arena[block_ids] for arena in fleet.cache.arenas]


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


# -- round trips --------------------------------------------------------------------------------


@DTYPES
@ALL_FORMATS
@pytest.mark.parametrize("prefix_caching", [False, True], ids=["plain", "prefix caching"])
def test_an_imported_sequence_goes_on_as_the_original(kv_format, dtype, prefix_caching):
    layers = layers_of(kv_format)
    options = {"dtype": dtype, "prefix_caching": prefix_caching}
    source = SharingFleet(layers, **options)
    target = SharingFleet(layers, num_blocks=333, max_num_seqs=3, max_model_len=900, **options)
    neighbour = make_stream(layers, 900, 9, dtype, gqa_group=2)
    other = target.add_tokens(neighbour, tokens_of(9, 900))
    target.step({other: 77})
    geometry = source.manager.geometry
    # In the head, at its end, tails that are partial and full, one and several sealed blocks.
    head, block, least = geometry.num_head_tokens, geometry.block_size, geometry.min_tail_tokens
    body = head + block + least
    for length in sorted({0, 1, head, head + 1, body - 1, body, body + 1, body + 2 * block + 5}):
        stream = make_stream(layers, length + 2 * block + 50, length, dtype, gqa_group=2)
        token_ids = tokens_of(length, len(stream))
        seq_id = source.add_tokens(stream, token_ids)
        if length:
            source.feed({seq_id: [length // 2, length - length // 2] if length > 1 else [1]})
        before = state_of(source)
        data = source.export(seq_id)
        assert state_of(source) == before
        copy = target.take(data, stream)
        source.manager.check_integrity()
        target.manager.check_integrity()
        for name in ("num_computed_tokens", "num_sealed", "num_tokens"):
            assert getattr(target.manager, name)[copy] == getattr(source.manager, name)[seq_id], (
                name
            )
        assert np.array_equal(target.manager.token_ids[copy, : len(stream)], token_ids)
        assert_equal(records_of(target, copy), records_of(source, seq_id))
        assert target.export(copy) == data
        for count in (1, 1, 40, 2 * block, 1):
            target.step({other: 1})  # by itself: batches of another shape round otherwise
            assert_equal(target.step({copy: count})[copy], source.step({seq_id: count})[seq_id])
        # Sealed records are equal to the last byte; open ones hold what their pool left in them.
        for layer in range(len(layers)):
            assert torch.equal(target.sealed_bytes(copy, layer), source.sealed_bytes(seq_id, layer))
        target.remove(copy)
        source.remove(seq_id)
    target.remove(other)
    target.manager.check_integrity()


def test_tokens_that_nobody_was_told_need_not_be_known():
    layer = small_layer()
    stream = make_stream([layer], 400, 1, torch.float32)
    source, target = Fleet([layer]), Fleet([layer])
    seq_id = source.add(stream)
    source.step({seq_id: 300})
    data = export_sequence(source.cache, source.manager, seq_id)
    assert parts_of(data)[0]["num_known_tokens"] == 0
    copy = import_sequence(target.cache, target.manager, data)
    target.streams[copy] = stream
    target.manager.check_integrity()
    assert_equal(records_of(target, copy), records_of(source, seq_id))
    assert_equal(target.step({copy: 100})[copy], source.step({seq_id: 100})[seq_id])


@pytest.mark.parametrize("kv_format", [NATIVE, INT2], ids=["native", "int2"])
def test_sequences_that_share_blocks(kv_format):
    layers = layers_of(kv_format)
    stream = make_stream(layers, 500, 3, torch.float32)
    source, target = SharingFleet(layers), SharingFleet(layers)
    parent = source.add_tokens(stream, tokens_of(3, 500))
    source.step({parent: 333})
    child = source.manager.fork(parent)
    source.streams[child] = stream
    data = source.export(parent)
    assert source.export(child) == data
    copies = [target.take(data, stream) for _ in range(2)]
    target.manager.check_integrity()
    assert not np.intersect1d(*map(target.manager.block_ids, copies)).size
    assert target.manager.pool.ref_counts.max() == 1
    source.step({parent: 1})
    expected = source.step({child: 60})[child]
    outputs = target.step(dict.fromkeys(copies, 60))
    for copy in copies:
        assert_equal(outputs[copy], expected)


def test_sequence_with_a_block_left_unsealed_by_kept_drafts():
    layer = small_layer()
    source, target = SharingFleet([layer]), SharingFleet([layer])
    stream = make_stream([layer], 700, 4, torch.float32)
    seq_id = source.add_tokens(stream, tokens_of(4, 700))
    geometry = source.manager.geometry
    first = geometry.num_head_tokens + geometry.min_tail_tokens + geometry.block_size - 1
    source.step({seq_id: first})
    plan = source.manager.reserve([seq_id], [129], [128])
    assert plan is not None
    source.run(plan)
    natural = int(geometry.num_sealed_blocks(ids(source.length(seq_id)))[0])
    assert source.manager.num_sealed[seq_id] == natural - 1
    copy = target.take(source.export(seq_id), stream)
    target.manager.check_integrity()
    for count in (1, 128, 200):
        assert_equal(target.step({copy: count})[copy], source.step({seq_id: count})[seq_id])


def test_sequence_that_took_over_more_sealed_blocks_than_it_would_have_sealed_so_far():
    layer = small_layer()
    source, target = (SharingFleet([layer], prefix_caching=True) for _ in range(2))
    stream, token_ids = make_stream([layer], 700, 4, torch.float32), tokens_of(4, 700)
    source.step({source.add_tokens(stream, token_ids): 500})
    seq_id = source.add_tokens(stream, token_ids)
    num_sealed = int(source.manager.num_sealed[seq_id])
    assert num_sealed > source.manager.geometry.num_sealed_blocks(ids(source.length(seq_id)))[0]
    copy = target.take(source.export(seq_id), stream)
    assert target.manager.num_sealed[copy] == num_sealed
    target.manager.check_integrity()
    for count in (1, 128, 100):
        assert_equal(target.step({copy: count})[copy], source.step({seq_id: count})[seq_id])


def test_any_buffer_serves():
    layer = small_layer()
    fleet = SharingFleet([layer])
    stream = make_stream([layer], 200, 1, torch.float32)
    seq_id = fleet.add_tokens(stream, tokens_of(1, 200))
    fleet.step({seq_id: 200})
    data = fleet.export(seq_id)
    assert type(data) is bytes
    for buffer in (bytearray(data), memoryview(data), np.frombuffer(data, np.uint8).data):
        assert_equal(records_of(fleet, fleet.take(buffer, stream)), records_of(fleet, seq_id))


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_whatever_steps_led_there(data):
    """Steps, drafts, shared prefixes and forks: every sequence exports, and imports as it is."""
    kv_format = data.draw(st.sampled_from([*FORMATS_BY_LABEL.values()]))
    layers = [small_layer(kv_format)]
    max_model_len = 600
    source = PagedKVCache(layers, num_blocks=400, dtype=torch.float32)
    target = PagedKVCache(layers, num_blocks=120, dtype=torch.float32)
    options = {"max_num_seqs": 6, "max_model_len": max_model_len, "prefix_caching": True}
    managers = source.new_manager(**options), target.new_manager(**options)
    manager, target_manager = managers
    tokens = tokens_of(1, max_model_len)
    for _ in range(data.draw(st.integers(1, 12))):
        seq_ids = manager.living_seq_ids.tolist()
        action = data.draw(st.sampled_from(["add", "step", "step", "step", "fork", "remove"]))
        if action == "add" and manager.num_free_seqs:
            manager.add_sequence(tokens[: data.draw(st.integers(0, max_model_len))])
        elif action == "fork" and seq_ids and manager.num_free_seqs:
            manager.fork(data.draw(st.sampled_from(seq_ids)))
        elif action == "remove" and seq_ids:
            manager.remove_sequence(data.draw(st.sampled_from(seq_ids)))
        elif action == "step" and seq_ids:
            seq_id = data.draw(st.sampled_from(seq_ids))
            room = int(manager.num_tokens[seq_id] - manager.num_computed_tokens[seq_id])
            if not room:
                continue
            count = data.draw(st.integers(1, room))
            drafts = data.draw(st.integers(0, min(count - 1, manager.geometry.block_size)))
            plan = manager.reserve([seq_id], [count], [drafts])
            if plan is not None:
                source.begin(plan)
                manager.commit(plan, [count - data.draw(st.integers(0, drafts))])
    for arena in source.arenas:
        arena.copy_(torch.randint(256, arena.shape, dtype=torch.uint8))
    for seq_id in manager.living_seq_ids.tolist():
        exported = export_sequence(source, manager, seq_id)
        copy = import_sequence(target, target_manager, exported)
        target_manager.check_integrity()
        assert export_sequence(target, target_manager, copy) == exported
        room = int(manager.num_tokens[seq_id] - manager.num_computed_tokens[seq_id])
        if room:
            plan = target_manager.reserve([copy], [room])
            assert plan is not None
            target_manager.commit(plan)
            target_manager.check_integrity()
        target_manager.remove_sequence(copy)


# -- the prefix cache ---------------------------------------------------------------------------


@ALL_FORMATS
def test_complete_links_can_be_hit_after_an_import(kv_format):
    layers = layers_of(kv_format)
    stream = make_stream(layers, 700, 5, torch.float32)
    token_ids = tokens_of(5, 700)
    source = SharingFleet(layers)  # need not cache prefixes itself
    target = SharingFleet(layers, prefix_caching=True)
    seq_id = source.add_tokens(stream, token_ids)
    source.step({seq_id: 600})
    copy = target.take(source.export(seq_id), stream)
    geometry, chain = target.manager.geometry, target.manager.chain_tokens(token_ids)
    num_sealed = int(target.manager.num_sealed[copy])
    expected = geometry.num_head_blocks + num_sealed if geometry.seals else 600 // 16
    match = target.manager.find_prefix(chain)
    assert (match.num_blocks, match.num_sealed) == (expected, num_sealed)
    assert match.num_tokens == geometry.link_end(expected)
    # Another sequence shares them, and so it does when the imported one has gone.
    sharer = target.add_tokens(stream, token_ids)
    assert target.length(sharer) == match.num_tokens
    target.remove(copy)
    target.step({sharer: 600 - match.num_tokens})
    target.remove(sharer)
    again = target.add_tokens(stream, token_ids)
    assert target.length(again) >= match.num_tokens
    target.step({again: 600 - target.length(again)})
    target.manager.check_integrity()
    for layer in range(len(layers)):
        assert torch.equal(target.sealed_bytes(again, layer), source.sealed_bytes(seq_id, layer))
    if not geometry.seals:
        assert_equal(target.step({again: 100})[again], source.step({seq_id: 100})[seq_id])


def test_links_completed_after_an_import_can_be_hit_too():
    layer = small_layer(NATIVE)
    stream, token_ids = make_stream([layer], 200, 5, torch.float32), tokens_of(5, 200)
    source, target = (SharingFleet([layer], prefix_caching=True) for _ in range(2))
    seq_id = source.add_tokens(stream, token_ids[:40])
    source.step({seq_id: 40})
    copy = target.take(source.export(seq_id), stream)
    for token in token_ids[40:120]:
        target.manager.append_tokens([copy], [token])
        target.step({copy: 1})
    target.manager.check_integrity()
    chain = target.manager.chain_tokens(token_ids)
    assert target.manager.find_prefix(chain).num_tokens == 112


def test_others_wait_for_links_that_an_imported_sequence_is_about_to_store():
    layer = small_layer()
    source = SharingFleet([layer])
    geometry, token_ids = source.manager.geometry, tokens_of(5, 700)
    stream = make_stream([layer], 700, 5, torch.float32)
    # The last complete link of so many tokens stays in the tail: nobody is to wait for it.
    complete = geometry.num_head_tokens + geometry.block_size + geometry.min_tail_tokens - 1
    for known, computed, is_pending in ((complete, complete, False), (500, 100, True)):
        seq_id = source.add_tokens(stream, token_ids[:known])
        source.step({seq_id: computed})
        target = SharingFleet([layer], prefix_caching=True)
        copy = target.take(source.export(seq_id), stream)
        chain = target.manager.chain_tokens(token_ids)
        match = target.manager.find_prefix(chain)
        assert (match.num_tokens, match.is_pending) == (geometry.num_head_tokens, is_pending)
        target.remove(copy)
        assert not target.manager.find_prefix(chain).is_pending


def test_a_second_import_keeps_the_blocks_that_can_be_hit():
    layer = small_layer(NATIVE)
    stream, token_ids = make_stream([layer], 200, 5, torch.float32), tokens_of(5, 200)
    fleet = SharingFleet([layer], prefix_caching=True)
    seq_id = fleet.add_tokens(stream, token_ids)
    fleet.step({seq_id: 100})
    data = fleet.export(seq_id)
    cached = fleet.manager.prefix_cache.find(fleet.manager.chain_tokens(token_ids).hashes)
    for _ in range(3):
        fleet.take(data, stream)
        fleet.manager.check_integrity()
    assert fleet.manager.num_cached_blocks == 6
    assert fleet.manager.prefix_cache.find(
        fleet.manager.chain_tokens(token_ids).hashes
    ) == cached  # fmt: skip


@pytest.mark.parametrize("prefix_caching", [False, True], ids=["plain", "prefix caching"])
def test_extra_keys_travel_and_have_to_be_named(prefix_caching):
    layer = small_layer(NATIVE)
    stream, token_ids = make_stream([layer], 200, 5, torch.float32), tokens_of(5, 200)
    source = SharingFleet([layer], prefix_caching=prefix_caching)
    target = SharingFleet([layer], prefix_caching=True)
    seq_id = source.manager.fork(source.add_tokens(stream, token_ids, ("adapter", 7)))
    source.streams[seq_id] = stream
    source.step({seq_id: 100})
    data = source.export(seq_id)
    for keys in ((), ("adapter",), ("adapter", "7"), ("adapter7",), (b"adapter", 7)):
        assert_refused(target, data, r"^header\.root is .* extra keys differ", extra_keys=keys)
    target.take(data, stream, extra_keys=("adapter", 7))
    target.manager.check_integrity()
    assert target.manager.find_prefix(target.manager.chain_tokens(token_ids)).num_tokens == 0
    chain = target.manager.chain_tokens(token_ids, ("adapter", 7))
    assert target.manager.find_prefix(chain).num_tokens == 96


def test_nobody_plants_blocks_under_another_prefix():
    """Neither by other hashes, nor by a root that is a hash of somebody's prefix."""
    layer = small_layer(NATIVE)
    stream, token_ids = make_stream([layer], 200, 5, torch.float32), tokens_of(5, 200)
    victim = SharingFleet([layer], prefix_caching=True)
    attacker = SharingFleet([layer], prefix_caching=True)
    seq_id = attacker.add_tokens(stream, token_ids[16:])
    attacker.step({seq_id: 100})
    header, body = parts_of(attacker.export(seq_id))
    secret = victim.manager.chain_tokens(token_ids, ("salt",))
    hashes = [link.hex() for link in secret.hashes]
    wanted = header | {"root": hashes[0], "link_hashes": hashes[1 : len(header["link_hashes"]) + 1]}
    wanted_root = header | {"root": secret.root.hex()}
    wanted_links = header | {"link_hashes": hashes[: len(header["link_hashes"])]}
    assert_refused(victim, forged(wanted, body), r"^header\.root is ")
    assert_refused(victim, forged(wanted_root, body), r"^header\.root is ")
    assert_refused(victim, forged(wanted_links, body), r"^header\.link_hashes\[0\] is ")
    for links in (header["link_hashes"][:-1], header["link_hashes"] + hashes[:1]):
        changed = header | {"link_hashes": links}
        assert_refused(victim, forged(changed, body), r"^header\.link_hashes has length ")
    changed_token = bytes([body[0] ^ 1]) + body[1:]
    assert_refused(victim, forged(header, changed_token), r"^header\.link_hashes\[0\] is ")
    assert victim.manager.num_cached_blocks == 0
    assert_refused(victim, forged(header, body)[:-1], "truncated")
    victim.take(forged(header, body), stream)


# -- what is refused ----------------------------------------------------------------------------


def exported(layers: list[LayerSpec], length: int = 300, **options) -> bytes:
    fleet = SharingFleet(layers, **options)
    seq_id = fleet.add_tokens(make_stream(layers, length, 1, torch.float32), tokens_of(1, length))
    fleet.step({seq_id: length})
    return fleet.export(seq_id)


@pytest.mark.parametrize("kv_format", [NATIVE.with_options(block_size=4), INT2, INT8],
                         ids=["native", "int2", "int8"])  # fmt: skip
def test_every_flipped_byte_is_refused(kv_format):
    layer = small_layer(kv_format)
    data = exported([layer], 8 if kv_format.is_native else 190)
    target = SharingFleet([layer], num_blocks=30, max_num_seqs=2, max_model_len=200)
    before = state_of(target)
    flipped = bytearray(data)
    for position in range(len(data)):
        for mask in (0x01, 0x80, 0xFF):
            flipped[position] = data[position] ^ mask
            with pytest.raises(TransferError):
                import_sequence(target.cache, target.manager, flipped)
        flipped[position] = data[position]
        if position % 500 == 0:
            assert state_of(target) == before
    assert state_of(target) == before
    import_sequence(target.cache, target.manager, flipped)


def test_every_truncation_and_extension_is_refused():
    layer = small_layer()
    data = exported([layer], 190)
    target = SharingFleet([layer], num_blocks=30, max_num_seqs=2, max_model_len=200)
    before = state_of(target)
    for length in range(len(data)):
        with pytest.raises(TransferError):
            import_sequence(target.cache, target.manager, data[:length])
    for extra in (b"\0", data[-1:], bytes(32), data):
        assert_refused(target, data + extra, r"^there are \d+ bytes .*: truncated or extended$")
    assert_refused(target, data[:-1], r"^there are \d+ bytes .*: truncated or extended$")
    assert_refused(target, data[1:], r"^an exported sequence begins with b'paged_kv', these data")
    assert_refused(target, b"", r"^0 bytes are too few for an exported sequence$")
    assert state_of(target) == before


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"kv_format": INT4}, r"^header\.layers\[1\]\.kv_format\.name is 'int4' .* 'int2' here$"),
        (
            {"kv_format": replace(INT2, key_clip=0.5)},
            r"^header\.layers\[1\]\.kv_format\.key_clip is 0\.5 in the data, 0\.75 here$",
        ),
        ({"kv_format": replace(INT2, key_group_size=32)}, r"kv_format\.key_group_size is 32 "),
        ({"num_kv_heads": 2}, r"^header\.layers\[1\]\.num_kv_heads is 2 in the data, 1 here$"),
        ({"key_dim": 16}, r"^header\.layers\[1\]\.key_dim is 16 in the data, 8 here$"),
        ({"value_dim": 16}, r"^header\.layers\[1\]\.value_dim is 16 in the data, 8 here$"),
    ],
    ids=["format", "clip", "group size", "heads", "key_dim", "value_dim"],
)
def test_other_layers_are_refused_by_name(changes, match):
    layer = small_layer()
    target = SharingFleet([layer, layer])
    assert_refused(target, exported([layer, replace(layer, **changes)]), match)


def test_other_geometry_dtype_layer_count_version_and_model_are_refused_by_name():
    layer = small_layer()
    target = SharingFleet([layer, layer])
    assert_refused(target, exported([layer]), r"^header\.layers has length 1 in the data, 2 here$")
    no_tail = small_layer(INT2.with_options(min_tail_tokens=0))
    assert_refused(target, exported([no_tail] * 2), r"kv_format\.min_tail_tokens is 0 .* 32 here$")
    data = exported([layer] * 2, dtype=torch.bfloat16)
    assert_refused(target, data, r"^header\.dtype is 'bfloat16' in the data, 'float32' here$")
    data = exported([layer] * 2)
    header, body = parts_of(data)
    assert_refused(target, forged(header, body, version=1), r"^version is 1 in the data, 2 here$")
    other = header | {"byte_order": "big"}
    assert_refused(target, forged(other, body), r"^header\.byte_order is 'big' in the data")
    other = header | {"geometry": header["geometry"] | {"num_head_tokens": 0}}
    assert_refused(
        target, forged(other, body), r"^header\.geometry\.num_head_tokens is 0 in the data, 16 here"
    )
    fingerprint = r"^header\.fingerprint is '.*' in the data, '.*' here$"
    assert_refused(target, data, fingerprint, model_fingerprint=b"another model")
    other = header | {"comment": "more"}
    assert_refused(target, forged(other, body), r"^header has \['comment'\] on one side only$")


def test_a_manager_for_another_model_is_refused_by_its_root():
    layer = small_layer()
    source, target = SharingFleet([layer]), SharingFleet([layer])
    source.manager = source.cache.new_manager(
        max_num_seqs=1, max_model_len=100, model_fingerprint=b"one"
    )
    seq_id = source.manager.add_sequence([1, 2, 3])
    assert_refused(target, source.export(seq_id), r"^header\.root is ")
    data = source.export(seq_id, model_fingerprint=b"one")
    assert_refused(target, data, r"^header\.fingerprint is ")
    target.manager = target.cache.new_manager(
        max_num_seqs=1, max_model_len=100, model_fingerprint=b"one"
    )
    import_sequence(target.cache, target.manager, data, model_fingerprint=b"one")


def test_unknown_tokens_are_refused_where_prefixes_are_cached():
    layer = small_layer()
    source = SharingFleet([layer])
    seq_id = source.add(make_stream([layer], 300, 1, torch.float32))
    source.step({seq_id: 300})
    target = SharingFleet([layer], prefix_caching=True)
    assert_refused(target, source.export(seq_id), r"^of 300 computed tokens 0 are known; ")


def test_max_model_len_is_kept():
    layer = small_layer()
    for length, computed in ((300, 300), (300, 1)):
        source = SharingFleet([layer])
        seq_id = source.add_tokens(
            make_stream([layer], 300, 1, torch.float32), tokens_of(1, length)
        )
        source.step({seq_id: computed})
        data = source.export(seq_id)
        short = SharingFleet([layer], max_model_len=299)
        assert_refused(short, data, r"^the sequence has 300 tokens; max_model_len is 299 here$")
        target = SharingFleet([layer], max_model_len=300)
        copy = import_sequence(target.cache, target.manager, data)
        target.manager.check_integrity()
        if computed == length:
            with pytest.raises(InvalidStepError):
                target.manager.reserve([copy], [1])


def test_sizes_and_counts_that_cannot_be_are_refused_by_name():
    layer = small_layer()
    target = SharingFleet([layer], max_model_len=400)
    geometry = target.manager.geometry
    header, body = parts_of(exported([layer]))
    size = len(body)
    for other in (body[:-16], body + bytes(16), b"", body * 2):
        match = rf"^the data hold {len(other)} bytes of tokens .* as in their header has {size}$"
        assert_refused(target, forged(header, other), match)
    too_long = forged(header, body, header_bytes=2**32 - 1)
    assert_refused(target, too_long, r"^a header of 4294967295 bytes exceeds the \d+ of the data$")
    for name in ("num_computed_tokens", "num_known_tokens", "num_sealed"):
        for value in (-1, True, False, 1.0, None, "1", [1], {}):
            changed = forged(header | {name: value}, body)
            assert_refused(target, changed, rf"^header\.{name} must be a count, got ")
    for num_sealed in (2, 3, 10**6, 10**30):
        changed = forged(header | {"num_sealed": num_sealed}, body)
        match = r"^header\.num_sealed is .*; with 300 of 300 tokens computed it is 0 to 1$"
        assert_refused(target, changed, match)
    # As many as there are whole blocks, which leaves no tail: the tables have no room for it.
    length = geometry.num_head_tokens + 2 * geometry.block_size
    target = SharingFleet([layer], max_model_len=length)
    assert_refused(target, forged_sequence(target.cache, length, length, 2), r"it is 0 to 1$")
    target.manager.remove_sequence(
        import_sequence(
            target.cache, target.manager, forged_sequence(target.cache, length, length, 1)
        )
    )


@pytest.mark.parametrize("prefix_caching", [False, True], ids=["plain", "prefix caching"])
def test_too_few_blocks_or_seq_ids(prefix_caching):
    layer = small_layer()
    stream = make_stream([layer], 500, 1, torch.float32)
    data = exported([layer], 400)
    needed = num_blocks_of(data, layer)
    options = {"max_num_seqs": 2, "prefix_caching": prefix_caching}
    fleet = SharingFleet([layer], num_blocks=needed, **options)
    seq_id = fleet.add_tokens(stream, tokens_of(2, 500))
    fleet.step({seq_id: 1})
    match = rf"^{needed} blocks asked for, {needed - 1} are free$"
    assert_refused(fleet, data, match, OutOfBlocksError)
    fleet.remove(seq_id)
    copy = fleet.take(data, stream)
    assert fleet.manager.num_free_blocks == 0
    fleet.remove(copy)
    assert fleet.manager.num_free_blocks == needed
    copy = fleet.take(data, stream)  # now in blocks that were cached
    fleet.manager.check_integrity()
    fleet = SharingFleet([layer], max_num_seqs=1, prefix_caching=prefix_caching)
    fleet.take(data, stream)
    assert_refused(fleet, data, r"^all 1 sequence seq_ids are in use$", OutOfBlocksError)


def test_outstanding_steps_and_seq_ids_without_a_sequence():
    layer = small_layer()
    fleet = SharingFleet([layer])
    stream = make_stream([layer], 300, 1, torch.float32)
    seq_id = fleet.add_tokens(stream, tokens_of(1, 300))
    fleet.step({seq_id: 200})
    data = fleet.export(seq_id)
    plan = fleet.plan({seq_id: 1})
    before = state_of(fleet)
    with pytest.raises(InvalidStepError, match="commit or roll back"):
        fleet.export(seq_id)
    assert state_of(fleet) == before
    assert_refused(fleet, data, "commit or roll back", InvalidStepError)
    fleet.manager.rollback(plan)
    for wrong in (-1, 7, 8, 1000):
        with pytest.raises(InvalidStepError, match=f"seq_id {wrong} holds no sequence"):
            fleet.export(wrong)
    assert fleet.export(seq_id) == data


def test_a_copy_that_fails_leaves_nothing_behind(monkeypatch):
    layer = small_layer()
    data = exported([layer])
    target = SharingFleet([layer], prefix_caching=True)
    assert target.manager.pool.peak_allocated == 0
    before = frozen([target.manager.tables.num_open, target.manager.num_free_blocks])

    def fail(*arguments: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(transfer, "write_records", fail)
        with pytest.raises(MemoryError):
            import_sequence(target.cache, target.manager, data)
    target.manager.check_integrity()
    assert frozen([target.manager.tables.num_open, target.manager.num_free_blocks]) == before
    assert target.manager.num_free_seqs == target.manager.max_num_seqs
    assert target.manager.num_cached_blocks == 0
    import_sequence(target.cache, target.manager, data)


# -- forged headers, with checksums that are right ----------------------------------------------

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-3, 400)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from([2**31, 2**63, 2**64, 10**30, -1, 1e999]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)
FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def victim() -> tuple[SharingFleet, bytes]:
    layer = small_layer()
    fleet = SharingFleet([layer], num_blocks=40, max_num_seqs=3, max_model_len=400,
                         prefix_caching=True)  # fmt: skip
    seq_id = fleet.add_tokens(make_stream([layer], 300, 1, torch.float32), tokens_of(1, 300))
    fleet.step({seq_id: 250})
    return fleet, fleet.export(seq_id)


def try_import(fleet: SharingFleet, data: bytes) -> bool:
    """Whether it gets in; if so the sequence is sound, if not it is a `TransferError`."""
    before = state_of(fleet)
    try:
        seq_id = import_sequence(fleet.cache, fleet.manager, data)
    except TransferError:
        assert state_of(fleet) == before
        return False
    fleet.manager.check_integrity()
    fleet.manager.remove_sequence(seq_id)
    return True


@FUZZ
@given(data=st.data())
def test_changed_headers_are_refused(victim, data):
    fleet, export = victim
    header, body = parts_of(export)
    target = header
    while True:  # any value, however deep
        key = data.draw(st.sampled_from(sorted(target) if isinstance(target, dict)
                                        else range(len(target))))  # fmt: skip
        if isinstance(target[key], (dict, list)) and target[key] and data.draw(st.booleans()):
            target = target[key]
            continue
        original = target[key]
        target[key] = data.draw(JSON)
        break
    is_same = target[key] == original
    if str(key).startswith("num_") and target is header:  # True and 1.0 are no counts
        is_same = is_same and type(target[key]) is int
    assert try_import(fleet, forged(header, body)) == is_same


@FUZZ
@given(data=st.data())
def test_other_sets_of_fields_are_refused(victim, data):
    fleet, export = victim
    header, body = parts_of(export)
    changes = data.draw(st.dictionaries(st.text(max_size=8), JSON, max_size=3))
    for name in data.draw(st.lists(st.sampled_from(sorted(header)), max_size=3, unique=True)):
        del header[name]
    merged = header | changes
    accepted = try_import(fleet, forged(merged, body))
    assert accepted == (merged == parts_of(export)[0])


@FUZZ
@given(header=JSON | st.binary(max_size=200) | st.text().map(str.encode), body=st.binary())
def test_headers_of_any_kind_are_refused(victim, header, body):
    fleet, _ = victim
    assert not try_import(fleet, forged(header, body))


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 100_000,
        b'{"layers":' * 100_000,
        b"[" * 900 + b"]" * 900,
        b'{"layers":' * 900 + b"1" + b"}" * 900,
        b"1" * 10_000,
        b'{"num_sealed":' + b"9" * 4000 + b"}",
        b"\xff\xfe{\0}\0",
        b"\xef\xbb\xbf{}",
        b"",
        b"NaN",
    ],
    ids=["deep", "deep dict", "nested", "nested dict", "number", "digits", "utf-16", "bom", "none",
         "nan"],
)  # fmt: skip
def test_hostile_json_is_refused(victim, header):
    fleet, export = victim
    assert not try_import(fleet, forged(header, parts_of(export)[1]))


@pytest.mark.parametrize("depth", [10, 900, 100_000])
@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_deep_values_in_every_field_are_refused(victim, depth, opening):
    fleet, export = victim
    header, body = parts_of(export)
    closing = "]" if opening == "[" else "}"
    deep = opening * depth + "1" + closing * depth
    for name in header:
        text = json.dumps(header | {name: "HERE"}).replace('"HERE"', deep)
        assert not try_import(fleet, forged(text.encode(), body)), name
    for name in header["layers"][0]:
        layers = [header["layers"][0] | {name: "HERE"}]
        text = json.dumps(header | {"layers": layers}).replace('"HERE"', deep)
        assert not try_import(fleet, forged(text.encode(), body)), name


@FUZZ
@given(header_bytes=st.integers(0, 2**32 - 1) | st.integers(0, 10_000))
def test_wrong_header_lengths_are_refused(victim, header_bytes):
    fleet, export = victim
    header, body = parts_of(export)
    right = len(json.dumps(header).encode())
    data = forged(header, body, header_bytes=header_bytes)
    assert try_import(fleet, data) == (header_bytes == right)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    kv_format=st.sampled_from([*FORMATS_BY_LABEL.values()]),
    lengths=st.tuples(st.integers(0, 620), st.integers(0, 620)),
    num_sealed=st.integers(0, 6),
    prefix_caching=st.booleans(),
    data=st.data(),
)
def test_forged_sequences_get_in_only_where_they_can_go_on(
    kv_format, lengths, num_sealed, prefix_caching, data
):
    """Whatever counts a header has, with hashes and sizes that agree with them."""
    layers = [small_layer(kv_format)]
    cache = PagedKVCache(layers, num_blocks=150, dtype=torch.float32)
    manager = cache.new_manager(max_num_seqs=1, max_model_len=600, prefix_caching=prefix_caching)
    num_known, num_computed = lengths
    forgery = forged_sequence(cache, num_computed, num_known, num_sealed)
    before = frozen([manager, cache.arenas])
    try:
        seq_id = import_sequence(cache, manager, forgery)
    except TransferError:
        assert frozen([manager, cache.arenas]) == before
        natural = int(cache.geometry.num_sealed_blocks(ids(num_computed))[0])
        assert num_sealed != natural or max(lengths) > 600 or prefix_caching
        return
    manager.check_integrity()
    while (length := int(manager.num_computed_tokens[seq_id])) < 600:
        room = 600 - length
        count = data.draw(st.integers(1, room))
        drafts = data.draw(st.integers(0, min(count - 1, cache.geometry.block_size)))
        while manager.num_tokens[seq_id] < length + count:
            manager.append_tokens([seq_id], [5])
        plan = manager.reserve([seq_id], [count], [drafts])
        assert plan is not None
        cache.begin(plan)
        manager.commit(plan)
    manager.remove_sequence(seq_id)
    manager.check_integrity()


# -- the order of the records -------------------------------------------------------------------


def views_in_order(cache: PagedKVCache, arenas: list[torch.Tensor], order: str) -> list:
    """Views of `layer_blocks` over records that lie in the given order, whatever the device."""
    found = []
    for layer, arena in zip(cache.layers, arenas, strict=True):
        layout = layer.record_layout(cache.dtype)
        views = layer_blocks(arena, layout, cache.dtype, cache.geometry.open_block_size)
        found.append(with_order(views, arena, layout, order == transfer.CHANNEL_MAJOR_KEYS))
    return found


def with_order(
    views: LayerBlocks, arena: torch.Tensor, layout: RecordLayout, keys_are_channel_major: bool
) -> LayerBlocks:
    def strided(view: torch.Tensor, byte_offset: int, is_channel_major: bool) -> torch.Tensor:
        typed, (rows, dim) = arena.view(view.dtype), view.shape[2:]
        strides = (*typed.stride()[:2], *((1, rows) if is_channel_major else (dim, 1)))
        return typed.as_strided(view.shape, strides, byte_offset // view.itemsize)

    views = replace(views, open_keys=strided(views.open_keys, 0, keys_are_channel_major))
    if views.sealed is None:
        return views
    sealed = views.sealed._replace(
        key_codes=strided(
            views.sealed.key_codes, layout.offset("key_codes"), keys_are_channel_major
        ),
        value_codes=strided(
            views.sealed.value_codes, layout.offset("value_codes"), not keys_are_channel_major
        ),
    )
    return replace(views, sealed=sealed)


def ordered_views(views: LayerBlocks) -> dict[str, torch.Tensor]:
    """The views whose inner order follows the device."""
    found = {"open_keys": views.open_keys}
    if views.sealed is not None:
        found |= {name: getattr(views.sealed, name) for name in ("key_codes", "value_codes")}
    return found


def gpu_like_fleet(layers: list[LayerSpec], **options) -> SharingFleet:
    """Stands for a fleet on a GPU: its views are those of one, its kernels take either order."""
    fleet = SharingFleet(layers, **options)
    cache = fleet.cache
    cache.backend = TORCH_BACKEND
    cache.records = views_in_order(cache, cache.arenas, transfer.CHANNEL_MAJOR_VALUES)
    return fleet


@ALL_FORMATS
def test_the_cpus_views_are_one_of_the_two_orders(kv_format):
    cache = PagedKVCache(layers_of(kv_format), num_blocks=3, dtype=torch.bfloat16)
    assert transfer.record_order_of(cache) == transfer.CHANNEL_MAJOR_KEYS
    for own, views, others in zip(
        cache.records,
        *(views_in_order(cache, cache.arenas, order) for order in ORDERS),
        strict=True,
    ):
        for name, view in ordered_views(views).items():
            own_view, other = ordered_views(own)[name], ordered_views(others)[name]
            assert own_view.data_ptr() == view.data_ptr() == other.data_ptr()
            assert own_view.shape == view.shape == other.shape
            assert own_view.stride() == view.stride() != other.stride()


@ALL_FORMATS
@pytest.mark.parametrize("order", ORDERS)
def test_reordered_records_read_the_same_and_come_back_the_same(kv_format, order):
    """Random bytes as the records of a sequence: head blocks, three of the body, two of the tail.

    Some are NaNs when read as numbers, so what they are made of is compared.
    """
    other = next(name for name in ORDERS if name != order)
    layers = layers_of(kv_format)
    start = PagedKVCache(layers, num_blocks=1, dtype=torch.bfloat16).geometry.num_head_blocks
    num_sealed = 0 if kv_format.is_native else 3
    cache = PagedKVCache(layers, num_blocks=start + num_sealed + 2, dtype=torch.bfloat16)
    is_sealed = torch.zeros(cache.num_blocks, dtype=torch.bool)
    is_sealed[start : start + num_sealed] = True
    generator = torch.Generator().manual_seed(1)
    arenas = [
        torch.randint(256, arena.shape, dtype=torch.uint8, generator=generator)
        for arena in cache.arenas
    ]

    def reordered(records: list[torch.Tensor], record_order: str) -> list[torch.Tensor]:
        turned = [record.clone() for record in records]
        sequence = SequenceData(
            tokens=TokenChain(tokens_of(1, 0), root_hash(cache.fingerprint())),
            num_computed_tokens=0,
            num_sealed=num_sealed,
            record_order=record_order,
        )
        for layer, record in zip(layers, turned, strict=True):
            reorder_records(cache, layer, record, sequence)
        return turned

    turned = reordered(arenas, order)
    assert_equal(reordered(turned, other), arenas)
    for before, after in zip(arenas, turned, strict=True):
        assert not torch.equal(before[is_sealed], after[is_sealed]) or not num_sealed
        assert not torch.equal(before[~is_sealed], after[~is_sealed])
    for before, after in zip(
        views_in_order(cache, arenas, order), views_in_order(cache, turned, other), strict=True
    ):
        pairs = [
            (before.open_keys[~is_sealed], after.open_keys[~is_sealed]),
            (before.open_values[~is_sealed], after.open_values[~is_sealed]),
        ]
        if num_sealed:
            pairs += [
                (view[is_sealed], other_view[is_sealed])
                for view, other_view in zip(before.sealed, after.sealed, strict=True)
                if view is not None
            ]
        for pair in pairs:
            assert torch.equal(*(view.contiguous().view(torch.uint8) for view in pair))


@DTYPES
@ALL_FORMATS
def test_import_from_a_device_with_the_other_order(kv_format, dtype):
    layers = layers_of(kv_format)
    stream = make_stream(layers, 900, 6, torch.float32)  # outputs of more digits than are stored
    on_cpu, back = (SharingFleet(layers, dtype=dtype) for _ in range(2))
    gpu_like, moved_on = (gpu_like_fleet(layers, dtype=dtype) for _ in range(2))
    assert transfer.record_order_of(gpu_like.cache) == transfer.CHANNEL_MAJOR_VALUES
    seq_id = on_cpu.add_tokens(stream, tokens_of(6, 900))
    on_cpu.step({seq_id: 500})
    data = on_cpu.export(seq_id)
    moved = gpu_like.take(data, stream)
    for ours, theirs in zip(records_of(gpu_like, moved), records_of(on_cpu, seq_id), strict=True):
        assert not torch.equal(ours, theirs)
    if not kv_format.is_native:
        assert not torch.equal(gpu_like.sealed_bytes(moved), on_cpu.sealed_bytes(seq_id))
    returned = back.take(gpu_like.export(moved), stream)
    assert_equal(records_of(back, returned), records_of(on_cpu, seq_id))
    assert back.export(returned) == data
    further = moved_on.take(gpu_like.export(moved), stream)
    for count in (1, 300, 1):
        expected = on_cpu.step({seq_id: count})[seq_id]
        assert_equal(back.step({returned: count})[returned], expected)
        outputs = gpu_like.step({moved: count})[moved]
        assert_close(outputs, expected)
        assert_equal(moved_on.step({further: count})[further], outputs)


def open_tokens(fleet: SharingFleet, seq_id: int, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [tokens, heads, dim] that the open blocks of a sequence hold."""
    manager, records = fleet.manager, fleet.cache.records[layer]
    block_ids = torch.as_tensor(manager.tables.head_and_tail_ids(seq_id), dtype=torch.int64)
    sealed_tokens = int(manager.num_sealed[seq_id]) * manager.geometry.block_size
    num_tokens = fleet.length(seq_id) - sealed_tokens
    return tuple(
        view[block_ids].transpose(1, 2).flatten(0, 1)[:num_tokens]
        for view in (records.open_keys, records.open_values)
    )


@DTYPES
@pytest.mark.parametrize(
    "kv_format",
    [*FORMATS_BY_LABEL.values(), NATIVE.with_options(block_size=1)],
    ids=[*FORMATS_BY_LABEL, "native-block1"],
)
def test_open_tokens_read_the_same_on_a_device_with_the_other_order(kv_format, dtype):
    """In the head, in a tail without a body, in head and tail: the stream's own tokens."""
    layers = layers_of(kv_format)
    on_cpu, back = (SharingFleet(layers, dtype=dtype, num_blocks=600) for _ in range(2))
    gpu_like = gpu_like_fleet(layers, dtype=dtype, num_blocks=600)
    num_head = on_cpu.manager.geometry.num_head_tokens
    for length in (3, 50, 500):
        stream = make_stream(layers, length, length, dtype)
        seq_id = on_cpu.add_tokens(stream, tokens_of(length, length))
        on_cpu.step({seq_id: length})
        moved = gpu_like.take(on_cpu.export(seq_id), stream)
        returned = back.take(gpu_like.export(moved), stream)
        num_sealed = int(on_cpu.manager.num_sealed[seq_id])
        positions = torch.arange(length)
        body_end = num_head + num_sealed * on_cpu.manager.geometry.block_size
        is_open = (positions < num_head) | (positions >= body_end)
        for layer in range(len(layers)):
            expected = [stream.keys[layer][is_open], stream.values[layer][is_open]]
            for fleet, its_seq_id in ((on_cpu, seq_id), (gpu_like, moved), (back, returned)):
                assert_equal([*open_tokens(fleet, its_seq_id, layer)], expected)


@pytest.mark.parametrize("kv_format", [NATIVE, INT2], ids=["native", "int2"])
def test_unknown_order_is_refused(kv_format):
    layer = small_layer(kv_format)
    header, body = parts_of(exported([layer]))
    assert header["record_order"] == transfer.CHANNEL_MAJOR_KEYS
    target = SharingFleet([layer])
    for order in ("rows first", None, 1, [transfer.CHANNEL_MAJOR_KEYS]):
        changed = forged(header | {"record_order": order}, body)
        assert_refused(target, changed, r"^header\.record_order is .*, which nobody can read$")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kv_format", [NATIVE, INT8, INT4, INT2], ids=lambda f: f.name)
def test_between_a_cpu_and_a_gpu(kv_format):
    layers = layers_of(kv_format)
    source = SharingFleet(layers)
    seq_id = source.add_tokens(make_stream(layers, 500, 6, torch.float32), tokens_of(6, 500))
    source.step({seq_id: 500})
    data = source.export(seq_id)
    cache = PagedKVCache(layers, num_blocks=100, dtype=torch.float32, device="cuda")
    manager = cache.new_manager(max_num_seqs=2, max_model_len=600)
    on_gpu = import_sequence(cache, manager, data)
    target = SharingFleet(layers)
    returned = import_sequence(
        target.cache, target.manager, export_sequence(cache, manager, on_gpu)
    )
    assert_equal(records_of(target, returned), records_of(source, seq_id))
    own_ids = torch.as_tensor(source.manager.block_ids(seq_id), dtype=torch.int64)
    gpu_ids = torch.as_tensor(manager.block_ids(on_gpu), dtype=torch.int64).cuda()
    start = source.manager.geometry.num_head_blocks
    body = slice(start, start + int(manager.num_sealed[on_gpu]))
    is_open = torch.ones(len(own_ids), dtype=torch.bool)
    is_open[body] = False
    for own, views in zip(source.cache.records, cache.records, strict=True):
        # Behind its tokens the last block holds what its pool left there: bits, not numbers.
        pair = views.open_keys[gpu_ids].cpu()[is_open], own.open_keys[own_ids][is_open]
        assert torch.equal(*(keys.contiguous().view(torch.uint8) for keys in pair))
        if views.sealed is not None:
            for name in ("key_codes", "value_codes"):
                codes = getattr(views.sealed, name)[gpu_ids[body]].cpu()
                assert torch.equal(codes, getattr(own.sealed, name)[own_ids[body]])


def test_nothing_refers_to_the_data_after_an_import():
    layer = small_layer()
    data = bytearray(exported([layer]))
    target = SharingFleet([layer], prefix_caching=True)
    seq_id = import_sequence(target.cache, target.manager, data)
    before = state_of(target)
    data[:] = bytes(len(data))
    data.clear()  # raises BufferError while something still looks into it
    assert state_of(target) == before
    assert target.length(seq_id) == 300
