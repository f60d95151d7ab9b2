"""Exported sequences: they go on where they were, and their blocks are shared as before."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from paged_kv.cache.formats import INT2, NATIVE
from paged_kv.cache.kv_cache import PagedKVCache
from paged_kv.cache.transfer import export_sequence, import_sequence
from tests.support.arrays import ids
from tests.support.exported_sequences import (
    ALL_FORMATS,
    DTYPES,
    SharingFleet,
    assert_equal,
    assert_refused,
    forged,
    layers_of,
    parts_of,
    records_of,
    small_layer,
    state_of,
    tokens_of,
)
from tests.support.fleets import Fleet
from tests.support.kv_formats import FORMATS_BY_LABEL
from tests.support.token_streams import make_stream

# -- round trips ----------------------------------------------------------------------------------


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
        arena.copy_(torch.randint(60, arena.shape, dtype=torch.uint8))  # finite in every dtype
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


# -- the prefix cache -----------------------------------------------------------------------------


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
    assert (match.num_blocks, match.lengths[0].num_sealed) == (expected, num_sealed)
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
