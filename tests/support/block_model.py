"""A block manager's tables against a model that places one token after the other."""

from __future__ import annotations

import copy

import pytest

from paged_kv.blocks.block_manager import BlockManager
from paged_kv.blocks.geometry import BlockGeometry
from paged_kv.blocks.step_plan import StepPlan
from tests.support.arrays import ids
from tests.support.plan_reader import arrays_of

REAL_GEOMETRIES = {
    "native": (16, 16, 0, 0),
    "int8": (128, 64, 64, 0),
    "int4": (128, 32, 32, 32),
    "int2": (128, 16, 16, 32),
}

SMALL_GEOMETRIES = {
    "native": (4, 4, 0, 0),
    "native with a head": (4, 4, 4, 0),
    "int8-like": (8, 4, 4, 0),
    "int2-like": (16, 2, 4, 5),
    "no head": (16, 4, 0, 6),
    "no head, no tail": (8, 2, 0, 0),
    "tail longer than a block": (4, 2, 2, 9),
    "one token a block": (4, 1, 0, 0),
}


def geometry_of(
    block_size: int, open_block_size: int, num_head_tokens: int, min_tail_tokens: int
) -> BlockGeometry:
    return BlockGeometry(
        block_size=block_size,
        open_block_size=open_block_size,
        num_head_tokens=num_head_tokens,
        min_tail_tokens=min_tail_tokens,
    )


SMALL = pytest.mark.parametrize(
    "geometry", [geometry_of(*g) for g in SMALL_GEOMETRIES.values()], ids=SMALL_GEOMETRIES
)

REAL = pytest.mark.parametrize(
    "geometry", [geometry_of(*g) for g in REAL_GEOMETRIES.values()], ids=REAL_GEOMETRIES
)


def manager_of(
    geometry: BlockGeometry,
    num_blocks: int = 100,
    max_num_seqs: int = 4,
    max_model_len: int = 1000,
) -> BlockManager:
    return BlockManager(
        geometry, num_blocks=num_blocks, max_num_seqs=max_num_seqs, max_model_len=max_model_len
    )


def compute(manager: BlockManager, counts: dict[int, int]) -> StepPlan:
    """Reserve and commit a step that has to fit."""
    plan = manager.reserve(ids(*counts), ids(*counts.values()))
    assert plan is not None
    arrays_of(manager, plan)
    manager.commit(plan)
    return plan


def state_of(manager: BlockManager) -> dict[str, object]:
    """Everything that a caller can observe, the order of later allocations included."""
    seq_ids = manager.living_seq_ids.tolist()
    free = copy.deepcopy(manager.pool).allocate(manager.num_free_blocks)
    return {
        "lengths": {seq_id: int(manager.num_computed_tokens[seq_id]) for seq_id in seq_ids},
        "head and tail": {seq_id: manager.head_and_tail_ids(seq_id).tolist() for seq_id in seq_ids},
        "body": {seq_id: manager.body_ids(seq_id).tolist() for seq_id in seq_ids},
        "free, in order": free.tolist(),
        "free seq_ids": manager.num_free_seqs,
    }


def num_sealed(geometry: BlockGeometry, length: int) -> int:
    """Blocks sealed of a sequence: as many as leave `min_tail_tokens` behind them."""
    count = 0
    if geometry.block_size == geometry.open_block_size:
        return count
    while (
        geometry.num_head_tokens + (count + 1) * geometry.block_size + geometry.min_tail_tokens
        <= length
    ):
        count += 1
    return count


def logical_blocks(geometry: BlockGeometry, length: int) -> list[tuple[str, int]]:
    """The blocks that a sequence of that length needs, in the order of its tokens."""
    head, body = geometry.num_head_tokens, num_sealed(geometry, length)
    blocks = []
    for position in range(length):
        if head <= position < head + body * geometry.block_size:
            block = ("sealed", (position - head) // geometry.block_size)
        else:
            block = ("open", position // geometry.open_block_size)
        if not blocks or blocks[-1] != block:
            blocks.append(block)
    return blocks


def locations(manager: BlockManager, seq_id: int) -> list[tuple[str, int, int]]:
    """Where each token of a sequence is stored: open or sealed, block id, offset."""
    geometry = manager.geometry
    length = int(manager.num_computed_tokens[seq_id])
    blocks = logical_blocks(geometry, length)
    block_ids = manager.block_ids(seq_id).tolist()
    assert len(block_ids) == len(blocks)
    assert manager.body_ids(seq_id).tolist() == [
        block_id for block_id, (kind, _) in zip(block_ids, blocks, strict=True) if kind == "sealed"
    ]
    found = []
    for (kind, _), block_id in zip(blocks, block_ids, strict=True):
        size = geometry.block_size if kind == "sealed" else geometry.open_block_size
        found += [(kind, block_id, offset) for offset in range(size)]
    return found[:length]
