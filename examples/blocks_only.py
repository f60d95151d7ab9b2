"""The block manager alone, with numpy and nothing else, for an engine with kernels of its own.

    python examples/blocks_only.py

It prints where tokens go; nothing is stored.
"""

import numpy as np

from paged_kv import BlockGeometry, BlockManager
from paged_kv.blocks.step_arrays import StepArrays
from paged_kv.blocks.step_plan import StepPlan
from paged_kv.blocks.table_replica import TableReplica

# Sealed blocks of 128 tokens, open ones of 64; the first 64 tokens are never quantized.
geometry = BlockGeometry(block_size=128, open_block_size=64, num_head_tokens=64, min_tail_tokens=0)
manager = BlockManager(
    geometry, num_blocks=64, max_num_seqs=8, max_model_len=2048, prefix_caching=True
)
tables = TableReplica(geometry)  # kept by whoever runs the model, in this process or another


def arrays_of(plan: StepPlan) -> StepArrays:
    """What kernels need; every plan is applied, in order."""
    tables.apply(plan)
    return StepArrays.from_plan(geometry, plan, tables)


prompt = np.random.default_rng(0).integers(32_000, size=500)

first = manager.add_sequence(prompt)
plan = manager.reserve([first], [500])  # None if the pool had too few free blocks
arrays = arrays_of(plan)
print("seal into", plan.seal_block_ids, "from tokens", ~arrays.seal_sources[:, 0], "and on")
print("store the last tokens at", arrays.stored_slots[-3:])
manager.commit(plan)  # once the K/V are written

second = manager.add_sequence(prompt)  # finds the first one's blocks
print("computed already:", manager.num_computed_tokens[second], "tokens")
plan = manager.reserve([second], [500 - manager.num_computed_tokens[second]])
arrays_of(plan)
manager.commit(plan)

third = manager.fork(second)  # shares everything, the unfinished block too
manager.append_tokens([first, second, third], [11, 12, 13])
plan = manager.reserve([first, second, third], [1, 1, 1])
slots = arrays_of(plan).stored_slots
print("copy block", plan.copy_sources, "to", plan.copy_targets, "then write", slots)
manager.commit(plan)

for seq_id in (first, second, third):
    manager.remove_sequence(seq_id)
print("free again:", manager.num_free_blocks, "of", manager.num_blocks)
