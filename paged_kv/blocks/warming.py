"""Compile the loops of a block manager before anybody waits for them.

Knows how a manager is used, nothing of who uses it.
"""

from __future__ import annotations

from functools import cache
from typing import Final

import numpy as np

from .block_manager import BlockManager
from .geometry import BlockGeometry
from .sink_window import SinkWindow
from .step_arrays import StepArrays
from .table_replica import TableReplica

GEOMETRY: Final = BlockGeometry(
    block_size=4, open_block_size=2, num_head_tokens=2, min_tail_tokens=2
)
NUM_STEPS: Final = 12


@cache
def warm_up() -> None:
    """Let two sequences grow, seal, evict and end: every compiled loop is called.

    The loops take sizes as numbers, so one small geometry stands for all. Costs something once in a
    process.
    """
    manager = BlockManager(
        GEOMETRY, num_blocks=64, max_num_seqs=2, max_model_len=2 * NUM_STEPS, prefix_caching=True
    )
    replica = TableReplica(GEOMETRY)
    chains = [
        manager.chain_tokens(np.arange(12)),
        manager.chain_tokens(np.arange(50, 54), sink_window=SinkWindow(2, 4)),
    ]
    seq_ids = np.array([manager.add_sequence(chain) for chain in chains])
    counts = np.array([12, 4])
    for _ in range(NUM_STEPS):
        plan = manager.reserve(seq_ids, counts)
        assert plan is not None
        replica.apply(plan)
        StepArrays.from_plan(GEOMETRY, plan, replica)
        manager.commit(plan)
        counts = np.array([1, 1])
        manager.append_tokens(seq_ids, counts)
    for seq_id in seq_ids.tolist():
        manager.remove_sequence(seq_id)
