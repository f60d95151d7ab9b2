"""Decode steps that a device makes of its own block tables, against the arrays of their plans."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import triton

from paged_kv.blocks.geometry import BlockGeometry
from paged_kv.blocks.sink_window import SinkWindow
from paged_kv.blocks.token_chain import TokenChain
from paged_kv.cache.decode_tables import DecodeTables
from paged_kv.kernels.step_inputs import NO_WINDOW
from tests.support.arrays import ids
from tests.support.block_model import REAL, SMALL, manager_of
from tests.support.device_tables import Device, decode

pytestmark = [
    pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="needs TRITON_INTERPRET=1"),
    # What NumPy says of the interpreter's own scalars.
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]
CPU = torch.device("cpu")


@SMALL
def test_steps_of_all_kinds_between_decode_steps(geometry: BlockGeometry) -> None:
    """Prompts, rolled back steps, sequences that end and forks change tables behind the device."""
    generator = random.Random(geometry.block_size * 10 + geometry.open_block_size)
    manager = manager_of(geometry, num_blocks=1000, max_model_len=120)
    device = Device(manager)
    num_seals = 0
    for turn in range(120):
        living = manager.living_seq_ids.tolist()
        if len(living) < 3 or (turn % 9 == 8 and len(living) < 4):
            shared = living and turn % 2
            manager.fork(generator.choice(living)) if shared else manager.add_sequence()
            living = manager.living_seq_ids.tolist()
        lengths = manager.num_computed_tokens
        for seq_id in living:
            if lengths[seq_id] >= 110:
                manager.remove_sequence(seq_id)
        chosen = [n for n in manager.living_seq_ids.tolist() if generator.random() < 0.8]
        counts = [generator.choice([1, 1, 5, 9]) if turn % 5 == 4 else 1 for _ in chosen]
        plan = manager.reserve(ids(*chosen), ids(*counts))
        assert plan is not None
        arrays = device.run(plan)
        num_seals += len(arrays.seal_block_ids)
        if turn % 11 == 10:
            manager.rollback(plan)
        else:
            manager.commit(plan)
    assert num_seals or not geometry.seals


@REAL
def test_a_block_is_sealed_by_one_token(geometry: BlockGeometry) -> None:
    manager = manager_of(geometry, max_model_len=400)
    device = Device(manager)
    first, second = manager.add_sequence(), manager.add_sequence()
    length = geometry.num_head_tokens + geometry.min_tail_tokens + geometry.block_size
    plan = manager.reserve(ids(first, second), ids(length - 2, 3))
    assert plan is not None
    device.run(plan)
    manager.commit(plan)
    seals = [len(decode(manager, device, second, first).seal_block_ids) for _ in range(4)]
    assert seals == [0, int(geometry.seals), 0, 0]


def test_a_windowed_sequence_evicts_between_two_steps() -> None:
    geometry = BlockGeometry(block_size=16, open_block_size=4, num_head_tokens=4, min_tail_tokens=4)
    manager = manager_of(geometry, num_blocks=1000)
    device = Device(manager)
    window = SinkWindow(num_sink_tokens=4, window_size=20)
    chain = TokenChain(ids(), root=b"", sink_window=window)
    windowed, plain = manager.add_sequence(chain), manager.add_sequence()
    for _ in range(90):
        decode(manager, device, plain, windowed)
    (batch,) = {kind: batch for kind, batch in device.batches.items() if not kind.seals}.values()
    step = batch.step.plan.step
    assert step.window_sizes is not None
    assert step.num_sink_tokens is not None
    assert step.window_sizes.tolist() == [NO_WINDOW, 20, NO_WINDOW]
    assert step.num_sink_tokens.tolist() == [0, 4, 0]
    assert int(manager.num_evicted_tokens[windowed]) > 0


def test_what_no_table_holds_is_left_to_other_steps() -> None:
    geometry = BlockGeometry(block_size=16, open_block_size=4, num_head_tokens=0, min_tail_tokens=0)
    manager = manager_of(geometry, num_blocks=1000, max_model_len=100)
    seq_id = manager.add_sequence()
    narrow = DecodeTables(geometry, CPU, max_num_seqs=1, max_model_len=8)
    held = []
    for count in (2, 1, 5, 1):
        plan = manager.reserve(ids(seq_id), ids(count))
        assert plan is not None
        held.append(narrow.holds(plan))
        manager.commit(plan)
    assert held == [False, True, False, False]


def test_changes_that_did_not_arrive_are_told_again() -> None:
    geometry = BlockGeometry(block_size=4, open_block_size=4, num_head_tokens=0, min_tail_tokens=0)
    manager = manager_of(geometry)
    device = Device(manager)
    seq_id = manager.add_sequence()
    plan = manager.reserve(ids(seq_id), ids(9))
    assert plan is not None
    device.replica.apply(plan)
    first = device.replica.changes()
    manager.commit(plan)
    plan = manager.reserve(ids(seq_id), ids(1))
    assert plan is not None
    device.replica.apply(plan)
    rows, places, block_ids = device.replica.changes()
    assert len(first[0]) == len(rows) - len(plan.table_update.seq_ids) > 0
    assert set(zip(first[0].tolist(), first[1].tolist(), strict=True)) <= set(
        zip(rows.tolist(), places.tolist(), strict=True)
    )
    device.replica.forget_changes()
    assert [len(part) for part in device.replica.changes()] == [0, 0, 0]
    assert block_ids.dtype == np.int32
