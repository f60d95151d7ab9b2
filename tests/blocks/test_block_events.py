"""Events of blocks that are stored, removed and cleared."""

from __future__ import annotations

from paged_kv.blocks.events import BlockRemoved, BlockStored, CacheCleared
from paged_kv.blocks.token_chain import root_hash
from tests.support.prefix_caching import S, compute, manager_of, serve, start, tokens


def stored(block_hash, parent_hash, token_ids, *, num_tokens_before=0, block_id):
    return BlockStored(
        block_hash=block_hash,
        parent_hash=parent_hash,
        token_ids=token_ids,
        num_tokens_before=num_tokens_before,
        block_id=block_id,
    )


def test_events_of_store_evict_and_clear_come_in_order_with_what_they_mean():
    manager = manager_of(num_blocks=3, record_events=True, fingerprint=b"fp")
    root = root_hash(b"fp")
    first, second = manager.chain_tokens(tokens(9)).hashes
    serve(manager, tokens(9))
    assert manager.take_events() == [
        stored(first, root, (0, 1, 2, 3), block_id=0),
        stored(second, first, (4, 5, 6, 7), num_tokens_before=4, block_id=1),
    ]
    assert manager.take_events() == []
    serve(manager, tokens(5))  # a hit, stored before
    assert manager.take_events() == []
    (other,) = manager.chain_tokens(tokens(5, 50)).hashes
    serve(manager, tokens(5, 50))  # takes block 2 and evicts block 1
    assert manager.take_events() == [
        BlockRemoved(block_hash=second, block_id=1),
        stored(other, root, (50, 51, 52, 53), block_id=2),
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
    assert (head.num_tokens_before, body.num_tokens_before) == (0, 4)
    assert head.extra_keys == body.extra_keys == ("salt",)
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
