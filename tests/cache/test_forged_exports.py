"""Forged headers with checksums that are right: nothing that cannot go on gets in."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from paged_kv.cache.kv_cache import PagedKVCache
from paged_kv.cache.transfer import import_sequence
from paged_kv.errors import TransferError
from tests.support.arrays import ids
from tests.support.exported_sequences import (
    SharingFleet,
    forged,
    forged_sequence,
    frozen,
    parts_of,
    small_layer,
    state_of,
    tokens_of,
)
from tests.support.kv_formats import FORMATS_BY_LABEL
from tests.support.token_streams import make_stream

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
    if key == "num_computed_tokens" and type(target[key]) is int and target[key] > 0:
        # How full the last open block is only the exporter knows.
        width = fleet.manager.geometry.table_width
        is_same = width(target[key]) == width(original)
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
