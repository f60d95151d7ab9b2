"""Draft tokens with real tensors: what is dropped leaves nothing behind."""

from __future__ import annotations

import pytest
import torch

from paged_kv.blocks.geometry import BlockGeometry
from paged_kv.cache.formats import NATIVE
from paged_kv.errors import InvalidStepError
from tests.support.arrays import ids
from tests.support.sharing_fleet import PLACES, Twins, branch, every_format, seal_length


def draft_starts(geometry: BlockGeometry) -> list[int]:
    """Lengths from which a few drafts cross the end of a block, and the place of a seal."""
    return [
        geometry.open_block_size - 3,
        seal_length(geometry) - 3,
        seal_length(geometry) - 1,
        seal_length(geometry) + 1,
    ]


def expected_blocks(geometry: BlockGeometry, length: int, num_sealed: int) -> int:
    open_end = -(-length // geometry.open_block_size)
    return open_end - num_sealed * (geometry.open_blocks_per_block - 1)


@every_format
@pytest.mark.parametrize(("num_drafts", "place"), [(4, 0), (4, 1), (4, 2), (4, 3), (1, 2)])
def test_dropped_drafts_leave_nothing_behind(kv_format, num_drafts, place):
    """For every number of kept drafts: what is stored in the end is what a plain decode stores."""
    for num_kept in range(num_drafts + 1):
        twins = Twins(kv_format)
        seq_id = twins.start(draft_starts(twins.geometry)[place])
        fleet, twin = twins.shared, twins.twin[seq_id]
        for turn in range(3):
            length = fleet.length(seq_id)
            right = fleet.streams[seq_id]
            drafts = branch(right, length + 1 + num_kept, 100 + turn, twins.layers)
            sealed_before = int(fleet.manager.num_sealed[seq_id])
            plan = fleet.step_with_drafts(seq_id, 1, drafts, num_drafts, num_kept)
            sealed = int(twins.geometry.num_sealed_blocks(ids(length + 1))[0])
            assert fleet.manager.num_sealed[seq_id] == sealed, "drafts are never sealed"
            assert len(plan.seal_block_ids) == sealed - sealed_before
            assert fleet.length(seq_id) == length + 1 + num_kept
            assert fleet.num_used == expected_blocks(twins.geometry, fleet.length(seq_id), sealed)
            for _ in range(1 + num_kept):
                twins.alone.step({twin: 1})
        twins.chunks[seq_id] = []
        outputs = fleet.step({seq_id: 1})
        expected = twins.alone.step({twin: 1})
        if not twins.geometry.seals:  # else the two may seal a step apart
            for output, twin_output in zip(outputs[seq_id], expected[twin], strict=True):
                torch.testing.assert_close(output, twin_output, rtol=0, atol=1e-6)
        twins.check()
        twins.step({seq_id: twins.geometry.block_size + 2})
        twins.check()
        twins.drain()


@every_format
@pytest.mark.parametrize("kept", [0, 1, 17, 100, 128])
def test_drafts_of_a_whole_block_may_be_kept_or_dropped(kv_format, kept):
    twins = Twins(kv_format)
    num_drafts = twins.geometry.block_size
    num_kept = min(kept, num_drafts)
    seq_id = twins.start(seal_length(twins.geometry) - 2)
    fleet = twins.shared
    for turn in range(2):
        length = fleet.length(seq_id)
        drafts = branch(fleet.streams[seq_id], length + 1 + num_kept, 50 + turn, twins.layers)
        fleet.step_with_drafts(seq_id, 1, drafts, num_drafts, num_kept)
        twins.alone.step({twins.twin[seq_id]: 1 + num_kept})
    fleet.step({seq_id: 1})
    twins.alone.step({twins.twin[seq_id]: 1})
    twins.check()
    assert fleet.num_used == twins.geometry.blocks_held(fleet.length(seq_id))


@every_format
def test_a_fork_drafts_on_a_shared_block(kv_format):
    twins = Twins(kv_format)
    parent = twins.start(PLACES[2].length(twins.geometry))
    child = twins.fork(parent, seed=1)
    fleet = twins.shared
    right = fleet.streams[child]
    drafts = branch(right, fleet.length(child) + 2, 9, twins.layers)
    used = fleet.num_used
    plan = fleet.step_with_drafts(child, 1, drafts, twins.geometry.open_block_size, 1)
    assert len(plan.copy_sources) == 1
    length = fleet.length(child)
    grown = twins.geometry.blocks_held(length) - twins.geometry.blocks_held(length - 2)
    assert fleet.num_used == used + 1 + grown  # the copy; the block for more drafts came back
    twins.alone.step({twins.twin[child]: 2})
    twins.check()
    twins.step({parent: 3, child: 3})
    twins.check()
    twins.drain()


@every_format
def test_a_step_with_drafts_may_be_rolled_back(kv_format):
    twins = Twins(kv_format)
    seq_id = twins.start(seal_length(twins.geometry) - 1)
    manager = twins.shared.manager
    used = twins.shared.num_used
    manager.rollback(manager.reserve(ids(seq_id), ids(6), ids(5)))
    manager.check_integrity()
    assert twins.shared.num_used == used
    twins.step({seq_id: 1})
    twins.check()


@pytest.mark.parametrize(
    ("num_new", "num_drafts"),
    [([2], [2]), ([2], [-1]), ([1], [1]), ([20], [17]), ([2], [1, 1]), ([2], [0.5])],
    ids=["no certain token", "negative", "only drafts", "more than a block", "shape", "float"],
)
def test_drafts_that_make_no_sense_are_refused(num_new, num_drafts):
    twins = Twins(NATIVE)
    seq_id = twins.start(5)
    manager = twins.shared.manager
    with pytest.raises(InvalidStepError, match="num_draft_tokens"):
        manager.reserve(ids(seq_id), num_new, num_drafts)
    assert twins.shared.num_used == 1
    twins.step({seq_id: 1})


@pytest.mark.parametrize("num_kept", [[0], [1], [5], [2, 2], [True]])
def test_only_drafts_may_be_dropped(num_kept):
    twins = Twins(NATIVE)
    seq_id = twins.start(5)
    manager = twins.shared.manager
    plan = manager.reserve(ids(seq_id), ids(4), ids(2))
    with pytest.raises(InvalidStepError, match="num_kept_tokens"):
        manager.commit(plan, num_kept)
    manager.commit(plan, [2])
    assert manager.num_computed_tokens[seq_id] == 7
