"""Managers with a prefix cache over small geometries, and sequences served by them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from paged_kv.blocks.block_manager import BlockManager
from paged_kv.blocks.geometry import BlockGeometry
from paged_kv.blocks.prefix_sharing import PrefixMatch
from paged_kv.blocks.step_plan import StepPlan
from paged_kv.blocks.token_chain import ExtraKey, TokenChain
from tests.support.arrays import ids
from tests.support.plan_reader import arrays_of


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
    arrays_of(manager, plan)
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
