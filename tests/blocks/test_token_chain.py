"""Hashes of prefixes: equal for equal content only, whatever differs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from hashlib import sha256
from itertools import combinations

import numpy as np
import pytest
import torch

from paged_kv.blocks.geometry import BlockGeometry
from paged_kv.blocks.retention import Retention
from paged_kv.blocks.token_chain import ExtraKey, TokenChain, link_hash, root_hash
from paged_kv.cache.formats import INT2, INT4, INT8, NATIVE, KVFormat
from paged_kv.cache.kv_cache import PagedKVCache
from paged_kv.cache.layer_spec import LayerSpec
from tests.support.calibrations import calibrated
from tests.support.prefix_caching import (
    GEOMETRIES,
    N,
    compute,
    every_geometry,
    hits,
    manager_of,
    serve,
    start,
    tokens,
)


def hashes_of(
    token_ids: list[int],
    keys: Sequence[ExtraKey] = (),
    fingerprint: bytes = b"",
    geometry: BlockGeometry = N,
) -> list[bytes]:
    return manager_of(geometry, fingerprint=fingerprint).chain_tokens(token_ids, keys).hashes


def test_a_chain_is_sha_256_over_parent_and_little_endian_tokens():
    root = sha256(b"paged_kv prefix 1" + b"bytes:2:fp" + b"str:4:salt" + b"int:1:7").digest()
    first = sha256(root + b"".join(t.to_bytes(4, "little") for t in (5, 1, 300, 70000))).digest()
    second = sha256(first + b"".join(t.to_bytes(4, "little") for t in (2, 2, 2, 2))).digest()
    token_ids = [5, 1, 300, 70000, 2, 2, 2, 2, 9]
    assert hashes_of(token_ids, ("salt", 7), b"fp") == [first, second]


@every_geometry
@pytest.mark.parametrize("place", [0, 7, 23, 58])
def test_another_token_changes_its_link_and_every_later_one(geometry, place):
    token_ids = tokens(60)
    changed = [*token_ids[:place], 9999, *token_ids[place + 1 :]]
    before, after = (hashes_of(t, geometry=geometry) for t in (token_ids, changed))
    num_equal = geometry.num_links(place)
    num_equal = min(num_equal, len(before))
    assert before[:num_equal] == after[:num_equal]
    assert not set(before[num_equal:]) & set(after)


def test_the_same_tokens_in_another_place_have_another_hash():
    assert len(set(hashes_of([1, 2, 3, 4] * 5))) == 4
    assert link_hash(b"a" * 32, b"1234") != link_hash(b"b" * 32, b"1234")


def test_hashing_in_parts_gives_what_hashing_at_once_gives():
    for geometry in GEOMETRIES.values():
        whole = TokenChain(np.arange(70, dtype=np.int32), b"root")
        parts = TokenChain(np.arange(70, dtype=np.int32), b"root")
        num_links = geometry.num_links(70)
        whole.hash_links(geometry, num_links)
        for link in range(num_links + 1):
            parts.hash_links(geometry, link)
            parts.hash_links(geometry, max(link - 1, 0))  # fewer than are known changes nothing
        assert parts.hashes == whole.hashes
        assert len(set(whole.hashes)) == num_links


def test_a_copy_that_goes_on_leaves_the_hashes_of_the_first_alone():
    geometry = next(iter(GEOMETRIES.values()))
    first = TokenChain(np.arange(70, dtype=np.int32), b"root")
    first.hash_links(geometry, 1)
    copy = first.with_tokens(np.arange(70, dtype=np.int32))
    copy.hash_links(geometry, 2)
    assert first.hashes == copy.hashes[:1]


KEYS: list[tuple[ExtraKey, ...]] = [
    (),
    ("",),
    ("", ""),
    ("a",),
    ("b",),
    ("a", "b"),
    ("b", "a"),
    ("ab",),
    ("ab", "c"),
    ("a", "bc"),
    ("abc",),
    (1,),
    ("1",),
    (b"1",),
    (b"a",),
    (1, 1),
    (11,),
    (-1,),
    ("str:1:a",),
    (b"\x00",),
    (b"\x00\x00",),
]


def test_extra_keys_of_any_type_order_or_boundary_keep_sequences_apart():
    roots = [root_hash(fingerprint, keys) for keys in KEYS for fingerprint in (b"", b"a", b"1")]
    assert len(set(roots)) == len(roots)
    chains = [hashes_of(tokens(9), keys) for keys in KEYS]
    for one, other in combinations(chains, 2):
        assert not set(one) & set(other)
    assert hashes_of(tokens(9), ("a", 1)) == hashes_of(tokens(9), ("a", 1))


def test_sequences_of_different_salts_share_nothing():
    manager = manager_of()
    serve(manager, tokens(12), ("tenant a",))
    assert hits(manager, tokens(13), ("tenant a",)) == 12
    assert hits(manager, tokens(13), ("tenant b",)) == hits(manager, tokens(13)) == 0
    serve(manager, tokens(12), ("tenant b",))
    assert manager.num_cached_blocks == 6


def test_a_salt_holds_for_the_tokens_that_are_generated():
    manager = manager_of()
    for keys in ((), ("salt",)):
        seq_id = start(manager, tokens(3), keys)
        for token_id in range(3, 10):
            manager.append_tokens([seq_id], [token_id])
            compute(manager, seq_id)
        manager.remove_sequence(seq_id)
    assert manager.num_cached_blocks == 4
    assert hits(manager, tokens(10)) == hits(manager, tokens(10), ("salt",)) == 8


def test_managers_of_different_fingerprints_share_no_hash():
    assert not set(hashes_of(tokens(30))) & set(hashes_of(tokens(30), fingerprint=b"other"))


BASE = INT2.with_options(block_size=128, key_group_size=64, num_sink_tokens=6)

CHANGED_FORMATS = {
    "name": replace(BASE, name="another"),
    "key_bits": replace(BASE, key_bits=8, wide_key_share=0.0),
    "value_bits": replace(BASE, value_bits=4),
    "has_token_keys": replace(
        BASE,
        key_bits=8,
        wide_key_share=0.0,
        key_group_size=None,
        has_error_feedback=False,
        has_token_keys=True,
    ),
    "wide_key_share": replace(BASE, wide_key_share=0.5),
    "has_error_feedback": replace(BASE, has_error_feedback=False),
    "rotates_values": replace(BASE, rotates_values=False),
    "block_size": replace(BASE, block_size=64),
    "key_group_size": replace(BASE, key_group_size=32),
    "key_clip": replace(BASE, key_clip=0.9),
    "wide_key_clip": replace(BASE, wide_key_clip=0.9),
    "value_clip": replace(BASE, value_clip=0.9),
    "num_sink_tokens": replace(BASE, num_sink_tokens=5),
    "min_tail_tokens": replace(BASE, min_tail_tokens=33),
}

LAYER = LayerSpec(kv_format=BASE, num_kv_heads=2, key_dim=16, value_dim=8)


def cache_hashes(
    layers: list[LayerSpec], dtype: torch.dtype = torch.float32, model: bytes = b"model"
) -> set[bytes]:
    cache = PagedKVCache(layers, num_blocks=2, dtype=dtype)
    manager = cache.new_manager(
        max_num_seqs=1, max_model_len=600, prefix_caching=True, model_fingerprint=model
    )
    return set(manager.chain_tokens(tokens(600)).hashes)


def test_every_change_of_format_layers_precision_or_model_changes_every_hash():
    assert set(CHANGED_FORMATS) == {field.name for field in fields(KVFormat)}
    changed_layers = {
        "num_kv_heads": replace(LAYER, num_kv_heads=1),
        "key_dim": replace(LAYER, key_dim=8),
        "value_dim": replace(LAYER, value_dim=16),
        "calibration": calibrated(LAYER),
        "retention": replace(LAYER, retention=Retention(window_size=50)),
    }
    assert set(changed_layers) | {"kv_format"} == {field.name for field in fields(LayerSpec)}
    families = {
        "base": cache_hashes([LAYER] * 2),
        **{
            name: cache_hashes([replace(LAYER, kv_format=kv_format)] * 2)
            for name, kv_format in CHANGED_FORMATS.items()
        },
        **{name: cache_hashes([layer] * 2) for name, layer in changed_layers.items()},
        "one layer": cache_hashes([LAYER]),
        "three layers": cache_hashes([LAYER] * 3),
        "one layer differs": cache_hashes([LAYER, changed_layers["value_dim"]]),
        "the other layer differs": cache_hashes([changed_layers["value_dim"], LAYER]),
        "bfloat16": cache_hashes([LAYER] * 2, torch.bfloat16),
        "float16": cache_hashes([LAYER] * 2, torch.float16),
        "another calibration": cache_hashes([calibrated(LAYER, seed=1)] * 2),
        "another model": cache_hashes([LAYER] * 2, model=b"another"),
        "no model": cache_hashes([LAYER] * 2, model=b""),
        **{
            kv_format.name: cache_hashes([replace(LAYER, kv_format=kv_format)] * 2)
            for kv_format in (NATIVE, INT8, INT4, INT2)
        },
    }
    for (one, first), (other, second) in combinations(families.items(), 2):
        assert first
        assert not first & second, f"{one} and {other} share hashes"
    assert cache_hashes([LAYER] * 2) == families["base"]
