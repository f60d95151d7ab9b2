"""Blocks as entries of a store: the same bytes in another pool, or refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from paged_kv.blocks.geometry import BlockIds
from paged_kv.cache.block_entries import BlockEntries, Kind
from paged_kv.cache.formats import FORMATS
from paged_kv.cache.transfer import CHANNEL_MAJOR_VALUES
from paged_kv.errors import TransferError
from tests.support.exported_sequences import (
    ALL_FORMATS,
    DTYPES,
    SharingFleet,
    assert_equal,
    layers_of,
    tokens_of,
)
from tests.support.sharing_fleet import FORMATS as SHARED_FORMATS
from tests.support.sharing_fleet import layers_of as layers_of_two
from tests.support.token_streams import make_stream

LENGTH = 500


def entries_of(fleet: SharingFleet, entries: BlockEntries) -> dict[bytes, tuple[Kind, bytes]]:
    """What was published since it was last asked, by hash."""
    found = {}
    for copies in entries.copy(fleet.manager.prefix_cache.take_news().published):
        made = entries.entries_of(copies)
        for block_hash, (key, data) in zip(reversed(copies.block_hashes), made, strict=True):
            assert key == entries.key(block_hash)
            assert data is not None
            assert len(data) == entries.num_bytes(copies.kind)
            found[block_hash] = copies.kind, data
    return found


def adopt(fleet: SharingFleet, entries: BlockEntries, token_ids, found) -> bool:
    tokens = fleet.manager.chain_tokens(token_ids)
    wanted = fleet.manager.wanted(tokens, found)

    def write(block_ids: BlockIds) -> None:
        for each, block_id in zip(wanted, block_ids.tolist(), strict=True):
            kind, data = found[each.block_hash]
            assert kind == entries.kind_of(each.block_hash, each.is_sealed)
            payload = entries.payload(entries.key(each.block_hash), kind, data)
            stack, are_finite = entries.stacked(kind, [payload])
            assert are_finite == [True]
            entries.write(kind, stack, np.array([block_id], dtype=np.int32))

    return bool(wanted) and fleet.manager.adopt(tokens, wanted, write)


def check_round_trip(layers, dtype: torch.dtype) -> None:
    """A second fleet finds the blocks of the first, and goes on as one that found its own."""
    source, target = (SharingFleet(layers, dtype=dtype, prefix_caching=True) for _ in range(2))
    source.manager.prefix_cache.take_news()
    stream, token_ids = make_stream(layers, LENGTH, 3, dtype, gqa_group=2), tokens_of(3, LENGTH)
    entries = BlockEntries(source.cache, b"model")
    first = source.add_tokens(stream, token_ids)
    source.feed({first: [LENGTH]})
    found = entries_of(source, entries)
    assert not source.manager.prefix_cache.take_news().published
    own = BlockEntries(target.cache, b"model")
    assert adopt(target, own, token_ids, found)
    target.manager.check_integrity()
    assert target.manager.num_free_blocks == target.manager.num_blocks
    again, copied = (fleet.add_tokens(stream, token_ids) for fleet in (source, target))
    num_hit = source.manager.num_computed_tokens[again]
    assert num_hit > LENGTH // 2
    assert target.manager.num_computed_tokens[copied] == num_hit
    assert_equal(
        target.step({copied: LENGTH - num_hit})[copied],
        source.step({again: LENGTH - num_hit})[again],
    )
    target.manager.check_integrity()


@DTYPES
@ALL_FORMATS
def test_another_pool_goes_on_from_entries(kv_format, dtype):
    check_round_trip(layers_of(kv_format), dtype)


@pytest.mark.parametrize("kv_format", SHARED_FORMATS, ids=lambda f: f.name)
def test_layers_that_differ(kv_format):
    check_round_trip(layers_of_two(kv_format), torch.float32)


def test_keys_differ_where_bytes_would(monkeypatch):
    layers = layers_of(FORMATS["int8"])
    fleets = [
        SharingFleet(layers),
        SharingFleet(layers_of(FORMATS["int4"])),
        SharingFleet(layers, dtype=torch.bfloat16),
    ]
    keys = {BlockEntries(fleet.cache, b"model").key(bytes(32)) for fleet in fleets}
    same = BlockEntries(SharingFleet(layers, num_blocks=77).cache, b"model")
    assert same.key(bytes(32)) in keys
    keys |= {same.key(bytes(33)), same.key(bytes([1]) + bytes(31))}
    keys.add(BlockEntries(fleets[0].cache, b"other").key(bytes(32)))
    monkeypatch.setattr("paged_kv.cache.block_entries.record_order_of", lambda _: "other")
    keys.add(BlockEntries(fleets[0].cache, b"model").key(bytes(32)))
    assert CHANNEL_MAJOR_VALUES
    monkeypatch.undo()
    monkeypatch.setattr("paged_kv.cache.block_entries.__version__", "0.0.1")
    keys.add(BlockEntries(fleets[0].cache, b"model").key(bytes(32)))
    assert len(keys) == 8


def test_every_single_bit_and_byte_counts():
    layers = layers_of(FORMATS["int2"])
    fleet = SharingFleet(layers, prefix_caching=True)
    fleet.manager.prefix_cache.take_news()
    stream = make_stream(layers, LENGTH, 3, torch.float32, gqa_group=2)
    fleet.feed({fleet.add_tokens(stream, tokens_of(3, LENGTH)): [LENGTH]})
    entries = BlockEntries(fleet.cache, b"model")
    found = entries_of(fleet, entries)
    assert {kind.is_sealed for kind, _ in found.values()} == {False, True}
    for block_hash, (kind, data) in list(found.items())[::3]:
        key = entries.key(block_hash)
        entries.payload(key, kind, data)
        wrong = [data[:-1], data + b"\0", b"", data[:50], bytes(len(data))]
        for place in range(0, len(data), 97):
            flipped = bytearray(data)
            flipped[place] ^= 1 << place % 8
            wrong.append(bytes(flipped))
        for each in wrong:
            with pytest.raises(TransferError):
                entries.payload(key, kind, each)
        with pytest.raises(TransferError, match="another key"):
            entries.payload(bytes(32), kind, data)


# -- bringing blocks in ---------------------------------------------------------------------------


def two_fleets() -> tuple[SharingFleet, BlockEntries, dict[bytes, tuple[Kind, bytes]]]:
    """An empty fleet of 20 blocks, and entries of a sequence of 320 tokens."""
    layers = layers_of(FORMATS["native"])
    source = SharingFleet(layers, prefix_caching=True)
    source.manager.prefix_cache.take_news()
    stream = make_stream(layers, 320, 3, torch.float32, gqa_group=2)
    source.feed({source.add_tokens(stream, tokens_of(3, 320)): [320]})
    entries = BlockEntries(source.cache, b"model")
    target = SharingFleet(layers, num_blocks=20, max_num_seqs=4, prefix_caching=True)
    return target, entries, entries_of(source, entries)


def test_nothing_in_use_makes_room():
    target, _, found = two_fleets()
    manager, entries = target.manager, BlockEntries(target.cache, b"model")
    stream = make_stream(target.cache.layers, 100, 4, torch.float32, gqa_group=2)
    target.feed({target.add_tokens(stream, tokens_of(4, 100)): [100]})
    before = manager.num_free_blocks
    assert not adopt(target, entries, tokens_of(3, 320), found)
    assert (manager.num_free_blocks, manager.num_cached_blocks) == (before, 6)
    manager.check_integrity()
    assert adopt(target, entries, tokens_of(3, 200), found)
    assert manager.num_free_blocks == before
    manager.check_integrity()


def test_the_beginning_of_the_prefix_is_not_evicted_for_its_end():
    target, _, found = two_fleets()
    manager, entries = target.manager, BlockEntries(target.cache, b"model")
    assert adopt(target, entries, tokens_of(3, 100), found)
    stream = make_stream(target.cache.layers, 200, 4, torch.float32, gqa_group=2)
    other = target.add_tokens(stream, tokens_of(4, 200))
    target.feed({other: [200]})
    target.remove(other)  # idle since just now: later than the beginning
    assert adopt(target, entries, tokens_of(3, 320), found)
    assert manager.find_prefix(manager.chain_tokens(tokens_of(3, 320))).num_tokens == 304
    manager.check_integrity()


def test_a_copy_that_is_cut_off_is_found_by_nobody():
    target, _, found = two_fleets()
    manager = target.manager
    tokens = manager.chain_tokens(tokens_of(3, 320))

    def fail(block_ids: BlockIds) -> None:
        raise MemoryError

    with pytest.raises(MemoryError):
        manager.adopt(tokens, manager.wanted(tokens, found), fail)
    assert not manager.is_whole
    manager.recover()
    manager.check_integrity()
    assert manager.num_cached_blocks == 0
    assert manager.prefix_cache.news is None or not manager.prefix_cache.news.published
