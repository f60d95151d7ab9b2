"""A cache and its manager, twice: each pair goes on by itself from what both hold."""

from __future__ import annotations

import pytest
import torch

from paged_kv.cache.formats import INT8
from paged_kv.errors import InvalidStepError
from tests.support.arrays import ids
from tests.support.sharing_fleet import PLACES, Twins, every_format


@every_format
def test_a_duplicate_and_its_original_go_on_by_themselves(kv_format):
    """What it is asked for next it gives as the original does, which does not change by that."""
    twins = Twins(kv_format)
    seq_id = twins.start(PLACES[-1].length(twins.geometry))
    fleet = twins.shared
    child = fleet.fork(seq_id, fleet.streams[seq_id])
    original = fleet.cache, fleet.manager
    before = fleet.stored(seq_id)
    copied = fleet.cache.duplicate(fleet.manager)
    counts = {seq_id: twins.geometry.block_size + 3, child: 2}
    outputs = []
    for pair in (copied, original):
        fleet.cache, fleet.manager = pair
        outputs.append(fleet.step(counts))
        fleet.manager.check_integrity()
        fleet.cache, fleet.manager = original
        if pair is copied:
            assert all(map(torch.equal, fleet.stored(seq_id), before))
    for number in counts:
        for one, other in zip(outputs[0][number], outputs[1][number], strict=True):
            assert one.equal(other)


def test_what_is_outstanding_is_not_duplicated():
    twins = Twins(INT8)
    seq_id = twins.start(5)
    manager = twins.shared.manager
    plan = manager.reserve(ids(seq_id), ids(1))
    with pytest.raises(InvalidStepError, match="commit or roll back"):
        twins.shared.cache.duplicate(manager)
    manager.rollback(plan)
