"""Shared prefixes: what is found, what is evicted first, what is never found, and what it costs.

Pools here are small enough that every block id is computed by hand. N is a geometry of 4 tokens a
block that never seals; S has a head of 4 tokens, sealed blocks of 8 and a tail of at least 2.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import fields, replace
from hashlib import sha256
from itertools import combinations

import numpy as np
import pytest
import torch

from paged_kv.blocks.block_manager import BlockManager, PrefixMatch
from paged_kv.blocks.block_pool import BlockPool
from paged_kv.blocks.events import BlockRemoved, BlockStored, CacheCleared
from paged_kv.blocks.geometry import BlockGeometry
from paged_kv.blocks.prefix_cache import PrefixCache
from paged_kv.blocks.step_plan import StepPlan
from paged_kv.blocks.token_chain import ExtraKey, TokenChain, link_hash, root_hash
from paged_kv.cache.formats import INT2, INT4, INT8, NATIVE, KVFormat
from paged_kv.cache.kv_cache import PagedKVCache
from paged_kv.cache.layer_spec import LayerSpec
from paged_kv.errors import InvalidStepError, OutOfBlocksError
from tests.support.block_contents import BlockContents, prefix_values
from tests.support.helpers import ids


def geometry_of(block: int, open_block: int, head: int, min_tail: int) -> BlockGeometry:
    return BlockGeometry(
        block_size=block,
        open_block_size=open_block,
        num_head_tokens=head,
        min_tail_tokens=min_tail,
    )


N = geometry_of(4, 4, 0, 0)
S = geometry_of(8, 4, 4, 2)
WIDE_HEAD = geometry_of(16, 2, 4, 5)
GEOMETRIES = {
    "native": N,
    "sealed": S,
    "wide head": WIDE_HEAD,
    "no head, no tail": geometry_of(8, 2, 0, 0),
    "long tail": geometry_of(4, 2, 2, 9),
}
every_geometry = pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)


def manager_of(
    geometry: BlockGeometry = N, num_blocks: int = 40, max_num_seqs: int = 6, **options: object
) -> BlockManager:
    return BlockManager(
        geometry,
        num_blocks=num_blocks,
        max_num_seqs=max_num_seqs,
        max_model_len=200,
        **{"prefix_caching": True, **options},
    )


def tokens(count: int, start: int = 0) -> list[int]:
    return list(range(start, start + count))


def compute(manager: BlockManager, *seq_ids: int) -> StepPlan:
    """One step that computes all known tokens of these sequences."""
    remaining = manager.num_tokens[list(seq_ids)] - manager.num_computed_tokens[list(seq_ids)]
    plan = manager.reserve(ids(*seq_ids), remaining)
    assert plan is not None
    manager.commit(plan)
    manager.check_integrity()
    return plan


def start(manager: BlockManager, token_ids: list[int], keys: Sequence[ExtraKey] = ()) -> int:
    """A sequence with all its tokens computed."""
    seq_id = manager.add_sequence(manager.chain_tokens(token_ids, keys))
    compute(manager, seq_id)
    return seq_id


def serve(manager: BlockManager, token_ids: list[int], keys: Sequence[ExtraKey] = ()) -> list[int]:
    """A sequence from its start to its end; the blocks it had."""
    seq_id = start(manager, token_ids, keys)
    block_ids = manager.block_ids(seq_id).tolist()
    manager.remove_sequence(seq_id)
    return block_ids


def match(
    manager: BlockManager, token_ids: list[int], keys: Sequence[ExtraKey] = ()
) -> PrefixMatch:
    return manager.find_prefix(manager.chain_tokens(token_ids, keys))


def hits(manager: BlockManager, token_ids: list[int], keys: Sequence[ExtraKey] = ()) -> int:
    return match(manager, token_ids, keys).num_tokens


def take_all(manager: BlockManager) -> list[int]:
    """Every free block in the order in which it is handed out; the pool is empty afterwards."""
    return [int(manager.pool.allocate(1)[0]) for _ in range(manager.num_free_blocks)]


# -- the order in which blocks are taken --------------------------------------------------------


def test_blocks_nobody_can_find_are_taken_before_cached_ones():
    manager = manager_of(num_blocks=6)
    assert serve(manager, tokens(10)) == [0, 1, 2]  # block 2 is not full
    assert manager.num_free_blocks == 6
    assert take_all(manager) == [2, 3, 4, 5, 1, 0]


def test_one_allocation_takes_free_blocks_first_and_evicts_for_the_rest():
    manager = manager_of(num_blocks=6)
    serve(manager, tokens(10))
    assert manager.pool.allocate(5).tolist() == [2, 3, 4, 5, 1]
    assert hits(manager, tokens(10)) == 4


def test_the_last_block_of_a_sequence_is_evicted_first():
    manager = manager_of(num_blocks=4)
    serve(manager, tokens(16))
    found = []
    for _ in range(4):
        found.append(hits(manager, tokens(17)))
        manager.pool.allocate(1)
    assert found == [16, 12, 8, 4]
    assert hits(manager, tokens(17)) == 0


def test_the_last_block_of_a_sealed_sequence_is_evicted_first():
    manager = manager_of(S, num_blocks=5)
    seq_id = start(manager, tokens(22))
    assert manager.head_and_tail_ids(seq_id).tolist() == [2, 3]
    assert manager.body_ids(seq_id).tolist() == [0, 1]
    manager.remove_sequence(seq_id)
    assert take_all(manager) == [3, 4, 1, 0, 2]


def test_the_sequence_that_ended_first_is_evicted_first():
    manager = manager_of(num_blocks=4)
    a, b = start(manager, tokens(8)), start(manager, tokens(8, 100))
    manager.remove_sequence(b)
    manager.remove_sequence(a)
    assert take_all(manager) == [3, 2, 1, 0]


def test_a_hit_makes_blocks_the_last_to_be_evicted():
    manager = manager_of(num_blocks=4)
    serve(manager, tokens(8))
    serve(manager, tokens(8, 100))
    seq_id = manager.add_sequence(tokens(5))  # hits block 0 alone
    assert manager.block_ids(seq_id).tolist() == [0]
    manager.remove_sequence(seq_id)
    assert take_all(manager) == [1, 3, 2, 0]


def test_asking_what_is_cached_does_not_change_what_is_evicted():
    manager = manager_of(num_blocks=4)
    serve(manager, tokens(8))
    serve(manager, tokens(8, 100))
    assert hits(manager, tokens(9)) == 8
    assert take_all(manager) == [1, 0, 3, 2]


def test_a_shared_block_is_idle_only_when_its_last_user_has_left():
    manager = manager_of(num_blocks=4)
    a = start(manager, tokens(8))
    b = manager.add_sequence(tokens(9))
    manager.remove_sequence(a)
    assert manager.num_free_blocks == 2
    serve(manager, tokens(8, 100))
    manager.remove_sequence(b)
    assert take_all(manager) == [3, 2, 1, 0]


def test_blocks_freed_together_come_back_in_the_order_of_their_tokens():
    manager = manager_of(num_blocks=5, prefix_caching=False)
    seq_ids = [manager.add_sequence(tokens(8)) for _ in range(2)]
    compute(manager, *seq_ids)
    manager.remove_sequence(seq_ids[0])
    manager.remove_sequence(seq_ids[1])
    assert take_all(manager) == [2, 3, 0, 1, 4]


# -- hits under pressure ------------------------------------------------------------------------


def test_a_hit_is_never_evicted_by_its_own_allocation():
    """All four blocks are idle, the hit ones next to be evicted: the others go instead."""
    manager = manager_of(num_blocks=4)
    serve(manager, tokens(8))
    serve(manager, tokens(8, 100))
    seq_id = manager.add_sequence(tokens(16))
    plan = compute(manager, seq_id)
    assert plan.new_block_ids.tolist() == [3, 2]
    assert manager.block_ids(seq_id).tolist() == [0, 1, 3, 2]
    assert hits(manager, tokens(17)) == 16
    assert hits(manager, tokens(9, 100)) == 0


def test_a_hit_counts_as_taken_when_the_rest_does_not_fit():
    manager = manager_of(num_blocks=4)
    serve(manager, tokens(8))
    serve(manager, tokens(8, 100))
    seq_id = manager.add_sequence(tokens(17))
    assert manager.num_free_blocks == 2
    assert manager.reserve([seq_id], [9]) is None
    assert manager.block_ids(seq_id).tolist() == [0, 1]
    manager.remove_sequence(seq_id)
    assert hits(manager, tokens(9)) == hits(manager, tokens(9, 100)) == 8
    manager.check_integrity()


def test_two_new_sequences_share_what_neither_may_evict():
    manager = manager_of(num_blocks=4)
    serve(manager, tokens(8))
    a, b = manager.add_sequence(tokens(9)), manager.add_sequence(tokens(9))
    plan = compute(manager, a, b)
    assert plan.new_block_ids.tolist() == [2, 3]
    assert manager.pool.ref_counts.tolist() == [2, 2, 1, 1]
    assert manager.num_free_blocks == 0


def test_an_evicted_block_is_found_no_more_and_may_be_stored_again():
    manager = manager_of(num_blocks=3)
    serve(manager, tokens(12))
    assert serve(manager, tokens(4, 100)) == [2]
    assert hits(manager, tokens(13)) == 8
    assert hits(manager, tokens(5, 100)) == 4
    assert serve(manager, tokens(12)) == [0, 1, 2]
    assert hits(manager, tokens(13)) == 12
    assert hits(manager, tokens(5, 100)) == 0


def test_a_sequence_whose_first_block_is_gone_is_not_found_at_all():
    """Only an unused first block can go before later ones: here another sequence needed it."""
    manager = manager_of(num_blocks=3)
    a = start(manager, tokens(8))
    manager.remove_sequence(a)
    seq_id = manager.add_sequence(tokens(5))  # block 0 is young again, block 1 is the oldest
    manager.remove_sequence(seq_id)
    manager.pool.allocate(2)
    assert hits(manager, tokens(9)) == 4


# -- the same content twice ---------------------------------------------------------------------


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["first leaves first", "second first"])
@pytest.mark.parametrize("together", [True, False], ids=["one step", "two steps"])
def test_two_sequences_may_compute_the_same_content_side_by_side(order, together):
    manager = manager_of(num_blocks=6)
    seq_ids = [manager.add_sequence(tokens(9)), manager.add_sequence(tokens(9))]
    if together:
        compute(manager, *seq_ids)
    else:
        compute(manager, seq_ids[0])
        compute(manager, seq_ids[1])
    assert manager.num_cached_blocks == 2
    block_ids = [manager.block_ids(seq_id).tolist() for seq_id in seq_ids]
    assert not set(block_ids[0]) & set(block_ids[1])
    for index in order:
        manager.remove_sequence(seq_ids[index])
        manager.check_integrity()
    assert manager.num_free_blocks == 6
    found = manager.add_sequence(tokens(9))
    assert manager.block_ids(found).tolist() == block_ids[0][:2]  # those that were stored first
    assert manager.pool.ref_counts.sum() == 2


def test_the_second_copy_of_a_content_is_reused_before_the_cached_one():
    manager = manager_of(num_blocks=4)
    a, b = manager.add_sequence(tokens(8)), manager.add_sequence(tokens(8))
    compute(manager, a, b)
    manager.remove_sequence(a)
    manager.remove_sequence(b)
    assert take_all(manager) == [2, 3, 1, 0]


def test_the_same_sealed_content_twice_is_cached_once():
    manager = manager_of(S, num_blocks=10)
    a, b = manager.add_sequence(tokens(14)), manager.add_sequence(tokens(14))
    compute(manager, a, b)
    assert manager.num_cached_blocks == 2  # head and body
    manager.remove_sequence(b)
    manager.remove_sequence(a)
    assert manager.num_free_blocks == 10
    manager.check_integrity()


# -- how much is hit ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "expected"), [(1, 0), (4, 0), (5, 4), (8, 4), (9, 8), (12, 8), (13, 12), (50, 12)]
)
def test_one_token_at_least_is_left_to_compute(length, expected):
    manager = manager_of()
    serve(manager, tokens(12))
    seq_id = manager.add_sequence(tokens(length))
    assert manager.num_computed_tokens[seq_id] == expected
    assert len(manager.block_ids(seq_id)) == expected // 4


@pytest.mark.parametrize(
    ("length", "expected"),
    [(4, 0), (5, 4), (12, 4), (13, 4), (14, 12), (21, 12), (22, 20), (37, 28), (40, 36), (90, 36)],
)
def test_no_more_is_sealed_than_the_sequence_would_have_sealed_itself(length, expected):
    """Head 0-3, body 4-11, 12-19, 20-27 and 28-35, of which a tail of 2 has to be behind."""
    manager = manager_of(S)
    first = start(manager, tokens(40))
    seq_id = manager.add_sequence(tokens(length))
    assert manager.num_computed_tokens[seq_id] == expected
    assert manager.num_sealed[seq_id] == max(expected - 4, 0) // 8
    num_head = min(expected, 4) // 4
    assert (
        manager.head_and_tail_ids(seq_id).tolist()
        == (manager.head_and_tail_ids(first).tolist()[:num_head])
    )
    num_body = manager.num_sealed[seq_id]
    assert manager.body_ids(seq_id).tolist() == manager.body_ids(first).tolist()[:num_body]


@every_geometry
@pytest.mark.parametrize("length", range(1, 60, 3))
def test_a_sequence_ends_up_with_the_same_number_of_blocks_whatever_it_hit(geometry, length):
    manager = manager_of(geometry)
    serve(manager, tokens(60))
    seq_id = start(manager, tokens(length))
    assert manager.num_computed_tokens[seq_id] == length
    assert manager.num_sealed[seq_id] == geometry.num_sealed_blocks(ids(length))[0]
    assert len(manager.block_ids(seq_id)) == geometry.blocks_held(length)


def test_every_head_block_is_shared_on_its_own():
    manager = manager_of(WIDE_HEAD)
    first = start(manager, tokens(30))
    head = manager.head_and_tail_ids(first).tolist()[:2]
    assert hits(manager, tokens(2)) == 0
    assert hits(manager, [*tokens(2), 99]) == 2
    seq_id = manager.add_sequence([*tokens(4), 99])
    assert manager.head_and_tail_ids(seq_id).tolist() == head
    assert manager.pool.ref_counts[head].tolist() == [2, 2]


def test_the_open_tail_of_a_sealed_sequence_is_not_shared():
    manager = manager_of(S)
    start(manager, tokens(21))  # sealed to 12, and full open blocks 12-15 and 16-19
    assert manager.num_cached_blocks == 2
    assert hits(manager, tokens(50)) == 12


def test_what_is_hit_is_what_find_prefix_says():
    manager = manager_of(S)
    serve(manager, tokens(40))
    start(manager, tokens(14))
    found = match(manager, tokens(40))
    assert found == PrefixMatch(
        num_tokens=36, num_blocks=5, num_sealed=4, num_idle_blocks=3, is_pending=False
    )
    free = manager.num_free_blocks
    seq_id = manager.add_sequence(tokens(40))
    assert manager.num_computed_tokens[seq_id] == found.num_tokens
    assert len(manager.block_ids(seq_id)) == found.num_blocks
    assert manager.num_sealed[seq_id] == found.num_sealed
    assert free - manager.num_free_blocks == found.num_idle_blocks


def test_tokens_that_a_sequence_generates_are_found_too():
    manager = manager_of()
    seq_id = start(manager, tokens(3))
    for token_id in range(3, 10):
        manager.append_tokens([seq_id], [token_id])
        compute(manager, seq_id)
    manager.remove_sequence(seq_id)
    assert hits(manager, tokens(10)) == 8


def test_the_last_known_token_is_at_hand_whatever_made_the_sequence():
    manager = manager_of(num_host_blocks=9)
    seq_id = start(manager, tokens(9))
    assert manager.last_token_ids[seq_id] == 8
    manager.append_tokens([seq_id], [50])
    child = manager.fork(seq_id)
    assert manager.last_token_ids[child] == 50
    manager.append_tokens([child, seq_id], [60, 70, 80], [2, 1])
    assert manager.last_token_ids[[child, seq_id]].tolist() == [70, 80]
    back, _ = manager.swap_in(manager.swap_out(child))
    assert manager.last_token_ids[back] == 70
    assert manager.token_ids[back, :12].tolist() == [*tokens(9), 50, 60, 70]


def test_without_a_prefix_cache_nothing_is_hit():
    manager = manager_of(prefix_caching=False)
    serve(manager, tokens(12))
    assert match(manager, tokens(12)) == PrefixMatch(0, 0, 0, 0, is_pending=False)
    assert manager.num_cached_blocks == 0
    assert manager.take_events() == []
    manager.reset_prefix_cache()


def test_hits_need_as_many_blocks_as_are_left_after_them():
    manager = manager_of()
    serve(manager, tokens(12))
    seq_id = manager.add_sequence(tokens(21))
    assert manager.blocks_needed(ids(seq_id), ids(9)).tolist() == [3]


def test_fresh_sequences_and_hits_are_computed_in_one_step():
    manager = manager_of(num_blocks=20)
    assert serve(manager, tokens(9)) == [0, 1, 2]
    hit, fresh = manager.add_sequence(tokens(10)), manager.add_sequence(tokens(6, 100))
    plan = manager.reserve(ids(fresh, hit), ids(6, 2))
    assert plan is not None
    assert plan.context_lens.tolist() == [0, 8]
    assert plan.positions.tolist() == [0, 1, 2, 3, 4, 5, 8, 9]
    assert plan.new_block_ids.tolist() == [2, 3, 4]
    assert plan.slot_mapping.tolist() == [8, 9, 10, 11, 12, 13, 16, 17]
    assert plan.open_table.tolist()[1] == [0, 1]
    manager.commit(plan)
    assert manager.block_ids(fresh).tolist() == [2, 3]
    assert manager.block_ids(hit).tolist() == [0, 1, 4]


# -- chains -------------------------------------------------------------------------------------


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


BASE = INT4.with_options(key_group_size=64)
CHANGED_FORMATS = {
    "name": replace(BASE, name="another"),
    "bits": replace(BASE, bits=2),
    "block_size": replace(BASE, block_size=64),
    "key_group_size": replace(BASE, key_group_size=32),
    "key_clip": replace(BASE, key_clip=0.9),
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


# -- published when stored, and not before ------------------------------------------------------


@every_geometry
def test_a_link_is_found_after_commit_and_never_before(geometry):
    manager = manager_of(geometry)
    seq_id = manager.add_sequence(tokens(40))
    plan = manager.reserve([seq_id], [40])
    assert hits(manager, tokens(60)) == 0
    assert manager.num_cached_blocks == 0
    manager.commit(plan)
    expected = min(geometry.num_links(40), geometry.num_shareable_links(40) + 1)
    assert 0 < manager.num_cached_blocks <= expected
    assert hits(manager, tokens(60)) > 0


@every_geometry
def test_a_step_that_is_rolled_back_publishes_nothing(geometry):
    manager = manager_of(geometry, record_events=True)
    seq_id = manager.add_sequence(tokens(40))
    for _ in range(3):
        manager.rollback(manager.reserve([seq_id], [40]))
        manager.check_integrity()
        assert manager.num_cached_blocks == 0
        assert hits(manager, tokens(60)) == 0
    assert manager.take_events() == []
    assert manager.num_free_blocks == manager.num_blocks
    compute(manager, seq_id)
    assert hits(manager, tokens(60)) > 0


def test_a_link_is_found_as_soon_as_its_chunk_is_computed():
    manager = manager_of()
    seq_id = manager.add_sequence(tokens(11))
    found = []
    for _ in range(5):
        manager.commit(manager.reserve([seq_id], [2]))
        found.append(hits(manager, tokens(12)))
    assert found[-1] == 8
    assert found[1:3] == [0, 4]  # a block that its last token fills is found one step later
    assert found == sorted(found)


def test_tokens_that_are_not_known_cannot_be_computed():
    manager = manager_of()
    seq_id = manager.add_sequence(tokens(3))
    with pytest.raises(InvalidStepError, match=r"seq_id 0 .* 4 tokens .* 3 are known"):
        manager.reserve([seq_id], [4])
    assert manager.num_free_blocks == manager.num_blocks
    compute(manager, seq_id)


@pytest.mark.parametrize("told", ["before commit", "after commit"])
def test_draft_tokens_are_published_when_they_are_kept_and_known(told):
    manager = manager_of()
    seq_id = start(manager, tokens(3))
    manager.append_tokens([seq_id], [3])
    plan = manager.reserve([seq_id], [5], [4])  # token 3 and drafts of 4 to 7
    if told == "before commit":
        manager.append_tokens([seq_id], [4, 5], [2])
    manager.commit(plan, [3])
    if told == "after commit":
        manager.append_tokens([seq_id], [4, 5], [2])
    manager.check_integrity()
    assert hits(manager, tokens(9)) == 4
    assert manager.num_cached_blocks == 1
    manager.append_tokens([seq_id], [60, 70, 80], [3])
    compute(manager, seq_id)
    assert hits(manager, [0, 1, 2, 3, 4, 5, 60, 70, 80]) == 8
    assert hits(manager, tokens(9)) == 4


def test_draft_tokens_that_nobody_told_are_not_published_as_something_else():
    """Eleven tokens are computed and kept, four are known: the rest of the row is zeros."""
    manager = manager_of(geometry_of(8, 8, 0, 0))
    seq_id = start(manager, [1, 2, 3])
    manager.append_tokens([seq_id], [4])
    manager.commit(manager.reserve([seq_id], [8], [7]))
    assert hits(manager, [1, 2, 3, 4, 0, 0, 0, 0, 9]) == 0
    manager.check_integrity()
    manager.append_tokens([seq_id], range(5, 18), [13])
    compute(manager, seq_id)
    assert hits(manager, list(range(1, 18))) == 16
    assert manager.num_cached_blocks == 2


def test_a_tail_that_kept_drafts_beyond_where_it_is_sealed_is_no_corruption():
    """14 tokens would be sealed to 12, but drafts never are: 12 certain tokens and 4 drafts."""
    manager = manager_of(S, prefix_caching=False)
    seq_id = start(manager, tokens(11))
    manager.commit(manager.reserve([seq_id], [5], [4]))
    assert (manager.num_computed_tokens[seq_id], manager.num_sealed[seq_id]) == (16, 0)
    manager.check_integrity()
    manager.commit(manager.reserve([seq_id], [1]))
    assert manager.num_sealed[seq_id] == 1
    manager.commit(manager.reserve([seq_id], [6], [5]))
    manager.check_integrity()


# -- links that somebody is about to store ------------------------------------------------------


def is_pending(manager: BlockManager, token_ids: list[int], keys: Sequence[ExtraKey] = ()) -> bool:
    return match(manager, token_ids, keys).is_pending


@every_geometry
def test_a_prefix_is_pending_until_it_is_stored(geometry):
    manager = manager_of(geometry)
    assert not is_pending(manager, tokens(60))
    seq_id = manager.add_sequence(tokens(60))
    assert is_pending(manager, tokens(60))
    plan = manager.reserve([seq_id], [60])
    assert is_pending(manager, tokens(60))
    manager.commit(plan)
    assert not is_pending(manager, tokens(60))
    assert not manager.prefix_cache._pending


def test_a_prefix_stays_pending_when_its_step_is_rolled_back():
    manager = manager_of()
    seq_id = manager.add_sequence(tokens(9))
    manager.rollback(manager.reserve([seq_id], [9]))
    assert is_pending(manager, tokens(9))


def test_only_the_next_link_counts_as_pending():
    manager = manager_of()
    seq_id = manager.add_sequence(tokens(13))
    manager.commit(manager.reserve([seq_id], [6]))
    assert match(manager, tokens(13)).num_tokens == 4
    assert is_pending(manager, tokens(13))
    assert not is_pending(manager, [*tokens(4), 50, 51, 52, 53, 54])  # goes its own way
    assert not is_pending(manager, tokens(5))  # the one link that it may share is there
    assert not is_pending(manager, tokens(13), ("salt",))
    assert not is_pending(manager, tokens(4))


def test_a_prefix_is_not_pending_once_its_sequence_is_gone():
    manager = manager_of(num_host_blocks=9)
    seq_id = manager.add_sequence(tokens(9))
    manager.remove_sequence(seq_id)
    assert not is_pending(manager, tokens(9))
    seq_id = manager.add_sequence(tokens(13))
    manager.commit(manager.reserve([seq_id], [6]))
    assert is_pending(manager, tokens(13))
    assert manager.swap_out(seq_id) is not None
    assert not is_pending(manager, tokens(13))
    assert not manager.prefix_cache._pending


def test_links_that_a_sequence_only_may_share_are_not_pending():
    """What nobody computes now is never waited for: the last link of 12 tokens is hit by none."""
    manager = manager_of()
    manager.add_sequence(tokens(12))
    serve(manager, tokens(8))
    assert match(manager, tokens(13))[:1] == (8,)
    assert not is_pending(manager, tokens(13))


@pytest.mark.parametrize("leaving", [0, 1], ids=["the first leaves", "the second leaves"])
def test_a_prefix_is_pending_while_one_of_two_that_compute_it_lives(leaving):
    manager = manager_of()
    seq_ids = [manager.add_sequence(tokens(9)), manager.add_sequence(tokens(9))]
    manager.remove_sequence(seq_ids[leaving])
    assert is_pending(manager, tokens(9))
    manager.remove_sequence(seq_ids[1 - leaving])
    assert not is_pending(manager, tokens(9))


def test_a_prefix_is_pending_while_a_fork_of_the_one_that_computed_it_lives():
    manager = manager_of()
    seq_id = manager.add_sequence(tokens(13))
    manager.commit(manager.reserve([seq_id], [6]))
    child = manager.fork(seq_id)
    manager.remove_sequence(seq_id)
    assert is_pending(manager, tokens(13))
    compute(manager, child)
    assert not is_pending(manager, tokens(13))


# -- reset and statistics -----------------------------------------------------------------------


def test_reset_is_refused_while_a_sequence_lives_and_forgets_nothing():
    manager = manager_of()
    serve(manager, tokens(12))
    seq_id = manager.add_sequence(tokens(3))
    with pytest.raises(InvalidStepError, match="in use by 1 sequences"):
        manager.reset_prefix_cache()
    assert hits(manager, tokens(13)) == 12
    manager.remove_sequence(seq_id)
    manager.reset_prefix_cache()
    assert hits(manager, tokens(13)) == 0


@every_geometry
def test_after_a_reset_every_block_is_free_and_nothing_is_found(geometry):
    manager = manager_of(geometry, num_blocks=30)
    serve(manager, tokens(50))
    serve(manager, tokens(20, 100))
    assert manager.num_cached_blocks
    manager.reset_prefix_cache()
    manager.check_integrity()
    assert manager.num_cached_blocks == 0
    assert manager.prefix_cache.num_idle == 0
    assert manager.num_free_blocks == 30
    assert hits(manager, tokens(60)) == 0
    serve(manager, tokens(50))
    assert hits(manager, tokens(60)) > 0
    manager.check_integrity()


def test_statistics_count_the_tokens_that_were_asked_for_and_hit():
    manager = manager_of()
    statistics = manager.prefix_statistics
    assert (statistics.num_queries, statistics.hit_rate) == (0, 0.0)
    serve(manager, tokens(12))  # hits 0 of 12
    serve(manager, tokens(12))  # hits 8 of 12
    serve(manager, tokens(6))  # hits 4 of 6
    hits(manager, tokens(12))  # only asks
    assert (statistics.num_queries, statistics.num_query_tokens) == (3, 30)
    assert statistics.num_hit_tokens == 12
    assert statistics.hit_rate == pytest.approx(0.4)


def test_forks_and_swaps_are_no_queries():
    manager = manager_of(num_host_blocks=9)
    seq_id = start(manager, tokens(9))
    child = manager.fork(seq_id)
    manager.swap_in(manager.swap_out(child))
    assert manager.prefix_statistics.num_queries == 1


# -- events -------------------------------------------------------------------------------------


def test_events_of_store_evict_and_clear_come_in_order_with_what_they_mean():
    manager = manager_of(num_blocks=3, record_events=True, fingerprint=b"fp")
    root = root_hash(b"fp")
    first, second = manager.chain_tokens(tokens(9)).hashes
    serve(manager, tokens(9))
    assert manager.take_events() == [
        BlockStored(block_hash=first, parent_hash=root, token_ids=(0, 1, 2, 3), block_id=0),
        BlockStored(block_hash=second, parent_hash=first, token_ids=(4, 5, 6, 7), block_id=1),
    ]
    assert manager.take_events() == []
    serve(manager, tokens(5))  # a hit, stored before
    assert manager.take_events() == []
    (other,) = manager.chain_tokens(tokens(5, 50)).hashes
    serve(manager, tokens(5, 50))  # takes block 2 and evicts block 1
    assert manager.take_events() == [
        BlockRemoved(block_hash=second, block_id=1),
        BlockStored(block_hash=other, parent_hash=root, token_ids=(50, 51, 52, 53), block_id=2),
    ]
    manager.reset_prefix_cache()
    assert manager.take_events() == [CacheCleared()]


def test_events_name_head_and_body_in_the_order_of_their_tokens():
    manager = manager_of(S, record_events=True)
    start(manager, tokens(14), ("salt",))
    head, body = manager.take_events()
    assert (head.token_ids, body.token_ids) == (tuple(range(4)), tuple(range(4, 12)))
    assert head.parent_hash == root_hash(b"", ("salt",))
    assert body.parent_hash == head.block_hash
    assert [head.block_id, body.block_id] == [
        manager.head_and_tail_ids(0)[0],
        manager.body_ids(0)[0],
    ]


def test_the_same_content_twice_is_one_event():
    manager = manager_of(record_events=True)
    a, b = manager.add_sequence(tokens(9)), manager.add_sequence(tokens(9))
    compute(manager, a, b)
    assert len(manager.take_events()) == 2


def test_no_events_are_kept_unless_asked_for():
    manager = manager_of(num_blocks=3)
    serve(manager, tokens(9))
    serve(manager, tokens(9, 50))
    assert manager.take_events() == []


# -- nothing changes when it fails --------------------------------------------------------------


def frozen(value: object) -> object:
    """A deep copy of whatever an object holds, to compare; arrays as bytes."""
    if isinstance(value, np.ndarray):
        return (value.shape, value.dtype.str, value.tobytes())
    if isinstance(value, dict):
        return [(frozen(key), frozen(item)) for key, item in value.items()]  # in order
    if isinstance(value, (list, tuple, set)):
        return [frozen(item) for item in value]
    if isinstance(value, TokenChain):
        return (value.root, list(value.hashes), value.token_ids.tobytes())
    if isinstance(value, (BlockGeometry, StepPlan)):
        return id(value)
    if hasattr(value, "__dict__"):
        return frozen(vars(value))
    return value


def busy_manager(geometry: BlockGeometry) -> tuple[BlockManager, list[int]]:
    """Idle and shared cached blocks, a fork with a partial block, a new hit, swapped blocks."""
    manager = manager_of(geometry, num_blocks=40, num_host_blocks=40, record_events=True)
    serve(manager, tokens(30, 100))
    parent = start(manager, tokens(27))
    child = manager.fork(parent)
    manager.append_tokens([parent, child], [500, 501])
    swapped = start(manager, tokens(11, 300))
    manager.swap_out(swapped)
    hit = manager.add_sequence(tokens(26))
    return manager, [parent, child, hit]


@every_geometry
def test_a_reservation_that_does_not_fit_changes_nothing_at_all(geometry):
    manager, seq_ids = busy_manager(geometry)
    manager.pool.allocate(manager.num_free_blocks - 1)
    remaining = manager.num_tokens[seq_ids] - manager.num_computed_tokens[seq_ids]
    needed = manager.blocks_needed(ids(*seq_ids), remaining)
    assert needed.sum() > 1
    before = frozen(manager)
    assert manager.reserve(ids(*seq_ids), remaining) is None
    assert manager.reserve(ids(*seq_ids[::-1]), remaining[::-1], ids(0, 0, 0)) is None
    manager.blocks_needed(ids(*seq_ids), remaining)
    match(manager, tokens(60))
    assert frozen(manager) == before


@every_geometry
def test_a_refused_reservation_changes_nothing_at_all(geometry):
    manager, seq_ids = busy_manager(geometry)
    before = frozen(manager)
    for counts, drafts in (([60, 1, 1], None), ([1, 1, 0], None), ([2, 2, 2], [1, 2, 0])):
        with pytest.raises(InvalidStepError):
            manager.reserve(ids(*seq_ids), ids(*counts), drafts)
    assert frozen(manager) == before


@every_geometry
def test_a_rolled_back_step_leaves_every_user_count_and_table_as_it_was(geometry):
    manager, seq_ids = busy_manager(geometry)

    def state() -> object:
        return frozen(
            [
                manager.pool.ref_counts,
                manager.pool._free_stack[: manager.pool._stack_size],
                manager.prefix_cache,
                manager.num_computed_tokens,
                manager.num_sealed,
                [manager.block_ids(seq_id) for seq_id in seq_ids],
                manager._capacity,
            ]
        )

    before = state()
    remaining = manager.num_tokens[seq_ids] - manager.num_computed_tokens[seq_ids]
    for _ in range(2):
        plan = manager.reserve(ids(*seq_ids), remaining)
        assert len(plan.copy_sources) <= 1
        manager.check_integrity()
        manager.rollback(plan)
        assert state() == before
    manager.check_integrity()


@pytest.mark.parametrize("blocks", [0, 1, 5])
def test_swap_out_without_room_changes_nothing_at_all(blocks):
    manager = manager_of(num_host_blocks=blocks)
    seq_id = start(manager, tokens(22))
    before = frozen(manager)
    assert manager.swap_out(seq_id) is None
    assert frozen(manager) == before


def test_swap_in_without_room_changes_nothing_at_all():
    manager = manager_of(num_blocks=10, max_num_seqs=2, num_host_blocks=9)
    swapped = manager.swap_out(start(manager, tokens(22)))
    manager.pool.allocate(5)
    before = frozen(manager)
    assert manager.swap_in(swapped) is None
    assert frozen(manager) == before
    manager = manager_of(max_num_seqs=1, num_host_blocks=9)
    swapped = manager.swap_out(start(manager, tokens(22)))
    start(manager, tokens(3))
    before = frozen(manager)
    assert manager.swap_in(swapped) is None
    assert frozen(manager) == before


def test_a_swapped_sequence_ends_once():
    manager = manager_of(num_host_blocks=9)
    swapped = manager.swap_out(start(manager, tokens(9)))
    seq_id, _ = manager.swap_in(swapped)
    for end in (manager.swap_in, manager.discard_swapped):
        with pytest.raises(InvalidStepError, match="swapped in or discarded before"):
            end(swapped)
    swapped = manager.swap_out(seq_id)
    manager.discard_swapped(swapped)
    for end in (manager.swap_in, manager.discard_swapped):
        with pytest.raises(InvalidStepError, match="swapped in or discarded before"):
            end(swapped)
    assert manager.host_pool.num_free == 9
    manager.check_integrity()


# -- the pool and its memory --------------------------------------------------------------------


def test_sharing_and_releasing_count_users():
    pool = BlockPool(4, PrefixCache(4, record_events=False))
    block_ids = pool.allocate(3)
    pool.share(block_ids[:2])
    pool.release(block_ids)
    assert pool.ref_counts.tolist() == [1, 1, 0, 0]
    assert (pool.num_free, pool.num_allocated) == (2, 2)
    pool.release(block_ids[:2])
    assert pool.num_free == 4
    with pytest.raises(AssertionError, match="freed twice"):
        pool.release(block_ids[:1])


def test_more_than_free_and_idle_blocks_cannot_be_allocated():
    manager = manager_of(num_blocks=4)
    serve(manager, tokens(8))
    with pytest.raises(OutOfBlocksError, match=r"^5 blocks asked for, 4 are free"):
        manager.pool.allocate(5)
    assert hits(manager, tokens(9)) == 8


def test_the_peak_counts_shared_blocks_once_and_idle_ones_not():
    manager = manager_of()
    serve(manager, tokens(8))
    assert manager.pool.peak_allocated == 2
    serve(manager, tokens(8, 100))
    assert manager.pool.peak_allocated == 2
    a, b = manager.add_sequence(tokens(9)), manager.add_sequence(tokens(9))
    compute(manager, a, b)
    assert manager.pool.peak_allocated == 4


def test_the_peak_counts_idle_blocks_that_are_hit():
    manager = manager_of()
    serve(manager, tokens(8))
    serve(manager, tokens(8, 100))
    manager.add_sequence(tokens(9))
    assert manager.pool.peak_allocated == 2
    manager.add_sequence(tokens(9, 100))
    assert manager.pool.peak_allocated == 4


def test_a_pool_of_a_million_blocks_takes_at_most_40_bytes_a_block():
    num_blocks = 1_000_000
    cache = PrefixCache(num_blocks, record_events=False)
    pool = BlockPool(num_blocks, cache)
    arrays = {
        id(value): value
        for owner in (pool, cache)
        for value in vars(owner).values()
        if isinstance(value, np.ndarray)
    }
    assert sum(array.nbytes for array in arrays.values()) <= 40 * num_blocks
    assert pool.allocate(num_blocks)[-1] == num_blocks - 1


# -- everything at once -------------------------------------------------------------------------


class Driver:
    """Sequences over one manager; their tokens go through blocks whose contents are followed."""

    def __init__(self, geometry: BlockGeometry, seed: int) -> None:
        self.rng = random.Random(seed)
        self.manager = manager_of(
            geometry,
            num_blocks=self.rng.choice([14, 20, 40]),
            max_num_seqs=4,
            num_host_blocks=30,
            record_events=True,
        )
        self.contents = BlockContents(self.manager)
        self.salts: dict[int, int] = {}
        self.swapped: list[tuple[object, int]] = []
        self.index: dict[bytes, int] = {}  # what the events say

    def add(self) -> None:
        if not self.manager.num_free_seqs:
            return
        # Few different tokens and few openings, so that prefixes meet.
        opening = self.rng.choice([[0] * 30, [0] * 9 + [1] * 20, [1, 0] * 12])
        length = self.rng.randint(1, len(opening))
        rest = [self.rng.randrange(2) for _ in range(self.rng.randint(0, 8))]
        salt = self.rng.choice([0, 0, 1])
        chain = self.manager.chain_tokens(opening[:length] + rest, (str(salt),))
        self.salts[self.manager.add_sequence(chain)] = salt

    def step(self) -> None:
        manager, rng = self.manager, self.rng
        counts, drafts, unknown = {}, {}, {}
        for seq_id in rng.sample(list(self.salts), rng.randint(1, len(self.salts))):
            if manager.num_computed_tokens[seq_id] > 60:
                continue
            remaining = int(manager.num_tokens[seq_id] - manager.num_computed_tokens[seq_id])
            if not remaining:
                manager.append_tokens([seq_id], [rng.randrange(2)])
                remaining = 1
            counts[seq_id] = rng.choice([1, remaining, rng.randint(1, remaining)])
            drafts[seq_id] = 0
            if counts[seq_id] == remaining:
                drafts[seq_id] = rng.choice([0, rng.randint(0, manager.geometry.block_size)])
            unknown[seq_id] = [rng.randrange(2) for _ in range(drafts[seq_id])]
        if not counts:
            return
        num_new = ids(*counts.values()) + ids(*drafts.values())
        before = frozen(manager)
        plan = manager.reserve(ids(*counts), num_new, ids(*drafts.values()))
        if plan is None:
            assert frozen(manager) == before
            self.remove()
            return
        values = []
        for seq_id, begin, count in zip(
            counts, plan.context_lens.tolist(), num_new.tolist(), strict=True
        ):
            known = (
                manager.token_ids[seq_id, : manager.num_tokens[seq_id]].tolist() + unknown[seq_id]
            )
            values.append(prefix_values(known, self.salts[seq_id])[begin : begin + count])
        self.contents.apply(plan, np.concatenate(values))
        if rng.random() < 0.2:
            manager.rollback(plan)
            return
        kept = {seq_id: rng.randint(0, drafts[seq_id]) for seq_id in counts}
        for seq_id in counts:
            manager.append_tokens([seq_id], unknown[seq_id][: kept[seq_id]], [kept[seq_id]])
        manager.commit(plan, ids(*counts.values()) + ids(*kept.values()))

    def remove(self) -> None:
        seq_id = self.rng.choice(list(self.salts))
        self.manager.remove_sequence(seq_id)
        del self.salts[seq_id]

    def fork(self) -> None:
        if self.manager.num_free_seqs:
            seq_id = self.rng.choice(list(self.salts))
            self.salts[self.manager.fork(seq_id)] = self.salts[seq_id]

    def swap(self) -> None:
        if self.swapped and self.rng.random() < 0.6:
            swapped, salt = self.swapped[-1]
            found = self.manager.swap_in(swapped)
            if found is not None:
                self.swapped.pop()
                self.contents.swap_in(found[1], swapped.host_block_ids)
                self.salts[found[0]] = salt
            return
        seq_id = self.rng.choice(list(self.salts))
        swapped = self.manager.swap_out(seq_id)
        if swapped is not None:
            self.contents.swap_out(swapped.device_block_ids, swapped.host_block_ids)
            self.swapped.append((swapped, self.salts.pop(seq_id)))

    def check(self) -> None:
        manager = self.manager
        manager.check_integrity()
        self.contents.poison_free()
        for seq_id, salt in self.salts.items():
            self.contents.check(seq_id, salt)
        for event in manager.take_events():
            if isinstance(event, BlockStored):
                assert event.block_hash not in self.index
                assert event.block_id not in self.index.values()
                data = np.array(event.token_ids, dtype=np.int32).tobytes()
                assert link_hash(event.parent_hash, data) == event.block_hash
                self.index[event.block_hash] = event.block_id
            elif isinstance(event, BlockRemoved):
                assert self.index.pop(event.block_hash) == event.block_id
            else:
                self.index.clear()
        assert self.index == manager.prefix_cache._block_of

    def run(self, num_actions: int) -> None:
        for _ in range(num_actions):
            action = self.rng.choice(
                [self.add, self.fork, self.swap, self.remove] + [self.step] * 6
            )
            if self.salts or action == self.add:
                action()
            self.check()
        for seq_id in list(self.salts):
            self.manager.remove_sequence(seq_id)
        for swapped, _ in self.swapped:
            self.manager.discard_swapped(swapped)
        self.salts.clear()
        self.check()
        self.manager.reset_prefix_cache()
        self.check()
        assert self.manager.num_free_blocks == self.manager.num_blocks
        assert self.manager.host_pool.num_free == 30
        assert not self.index
        assert not self.manager.prefix_cache._pending


@every_geometry
@pytest.mark.parametrize("seed", range(4))
def test_random_hits_forks_drafts_and_swaps_keep_every_token_where_it_belongs(geometry, seed):
    """And the events, replayed, give the index of cached blocks after every action."""
    Driver(geometry, seed).run(120)
