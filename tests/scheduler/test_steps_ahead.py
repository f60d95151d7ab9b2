"""Steps that are scheduled before the tokens of the one before are known."""

from __future__ import annotations

import numpy as np
import pytest

from paged_kv.blocks.block_manager import BlockManager
from paged_kv.blocks.retention import KEEPS_ALL
from paged_kv.scheduler.scheduler import Scheduler
from tests.support.scheduler_steps import TINY, make_request


@pytest.mark.parametrize("num_groups", [1, 4])
def test_whoever_goes_ahead_is_not_preempted(num_groups: int) -> None:
    """With few blocks left, whatever the number of block tables that a sequence has."""
    num_ahead = 0
    for num_blocks in range(12 * num_groups, 30 * num_groups, 3):
        manager = BlockManager(
            TINY,
            num_blocks=num_blocks,
            max_num_seqs=4,
            max_model_len=64,
            retentions=(KEEPS_ALL,) * num_groups,
        )
        scheduler = Scheduler(manager, token_budget=64, watermark=0, steps_ahead=0)
        for name in "abcd":
            scheduler.add(make_request(name, 5, max_tokens=12))
        while (step := scheduler.schedule()) is not None:
            if not scheduler.may_advance(step):
                tokens = np.ones(len(step.sampled_seq_ids), dtype=np.int64)
                over = scheduler.update(step, tokens)
            else:
                over = scheduler.advance(step)
                following = scheduler.schedule()
                assert following is None or not following.preempted
                num_ahead += 1
                if following is not None:
                    scheduler.cancel(following)
                scheduler.settle(
                    step.sampled_seq_ids, np.ones(len(step.sampled_seq_ids)).astype(int)
                )
            for request in over:
                scheduler.finish(request)
        scheduler.check_integrity()
    assert num_ahead
