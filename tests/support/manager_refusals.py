"""Calls of a block manager that make no sense, or come too early. Needs no test framework."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from paged_kv.blocks.block_tables import StoredLengths
from paged_kv.blocks.token_chain import TokenChain
from paged_kv.errors import InvalidStepError
from tests.support.manager_pair import ManagerPair
from tests.support.reference_manager import Swapped
from tests.support.refused import refused


def refuse(pair: ManagerPair, which: int) -> None:
    """Calls that make no sense raise and change nothing, which `check` sees."""
    manager = pair.manager
    nothing = [StoredLengths(0, 0)] * len(manager.groups)
    too_long = TokenChain(np.zeros(pair.settings.max_model_len + 1, dtype=np.int32), b"")
    dead = (*pair.reference.free_seq_ids, pair.settings.max_num_seqs)[0]
    for call in (
        lambda: manager.remove_sequence(dead),
        lambda: manager.fork(dead),
        lambda: manager.swap_out(dead),
        lambda: manager.publish_sequence(dead),
        lambda: manager.append_tokens([dead], [1]),
        lambda: manager.add_sequence(too_long),
        lambda: manager.place_sequence(too_long, nothing),
        lambda: manager.place_sequence(manager.chain_tokens([1]), nothing[1:]),
        lambda: manager.place_sequence(manager.chain_tokens([1]), [*nothing, StoredLengths(0, 0)]),
        lambda: manager.reserve([dead], [1]),
        lambda: manager.reserve([-1], [1]),
    ):
        with refused(InvalidStepError):
            call()
    seq_id = pair.pick(which)
    if seq_id is None:
        return
    sequence = pair.reference.sequences[seq_id]
    size, limit = pair.shape.block_size, pair.settings.max_model_len
    calls: list[Callable[[], object]] = [
        lambda: manager.append_tokens([seq_id], [1, 2]),
        lambda: manager.append_tokens([seq_id], [1], [2]),
        lambda: manager.append_tokens([seq_id], [], [-1]),
        lambda: manager.reserve([seq_id], [0]),
        lambda: manager.reserve([seq_id], [limit - sequence.num_computed + 1]),
        lambda: manager.reserve([seq_id, seq_id], [1, 1]),
        lambda: manager.reserve([seq_id], [2], [2]),
        lambda: manager.reserve([seq_id], [size + 2], [size + 1]),
    ]
    if pair.settings.prefix_caching:
        too_many = max(sequence.num_known - sequence.num_computed, 0)
        too_many += pair.shape.open_block_size
        calls.append(lambda: manager.reserve([seq_id], [too_many]))
    for call in calls:
        with refused(InvalidStepError):
            call()


def refuse_under_way(pair: ManagerPair, which: int) -> None:
    """What has to wait for the end of a step."""
    seq_id = pair.pick(which)
    if seq_id is None:
        return
    manager = pair.manager
    nothing = [StoredLengths(0, 0)] * len(manager.groups)
    for call in (
        lambda: manager.remove_sequence(seq_id),
        lambda: manager.fork(seq_id),
        lambda: manager.swap_out(seq_id),
        lambda: manager.reserve([seq_id], [1]),
        lambda: manager.place_sequence(manager.chain_of(seq_id), nothing),
        lambda: manager.publish_sequence(seq_id),
    ):
        with refused(InvalidStepError):
            call()
    for swapped, expected in pair.swapped:
        if _fits(pair, expected):
            with refused(InvalidStepError):
                manager.swap_in(swapped)


def _fits(pair: ManagerPair, swapped: Swapped) -> bool:
    reference = pair.reference
    return len(swapped.host_ids) <= reference.num_free and bool(reference.free_seq_ids)
