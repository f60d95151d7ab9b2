"""Sequences that are cut short: what stays is stored as before, and their blocks are free again."""

from __future__ import annotations

import pytest
import torch

from paged_kv.blocks.block_manager import BlockManager
from paged_kv.blocks.sink_window import SinkWindow
from paged_kv.cache.formats import INT2, NATIVE
from paged_kv.errors import InvalidStepError
from tests.support.sharing_fleet import PLACES, Twins, every_format, every_place


def cuts(twins: Twins, length: int) -> list[int]:
    """Lengths at which a sequence of `length` tokens can be cut: ends of blocks, and around."""
    geometry = twins.geometry
    sealed = int(geometry.num_sealed_blocks(twins.shared.manager.num_computed_tokens)[0])
    body_end = geometry.num_head_tokens + sealed * geometry.block_size
    ends = [geometry.num_head_tokens + n * geometry.block_size for n in range(sealed + 1)]
    wanted = {0, 1, geometry.open_block_size, *ends, body_end + 1, length - 1, length}
    return sorted(n for n in wanted if n <= length and (n in ends or n > body_end or n < ends[0]))


@every_format
@every_place
def test_a_cut_sequence_goes_on_as_if_the_rest_had_never_been(kv_format, place):
    for num_kept in cuts(Twins(kv_format), place.length(Twins(kv_format).geometry)):
        twins = Twins(kv_format)
        seq_id = twins.start(place.length(twins.geometry))
        manager = twins.shared.manager
        if manager.geometry.num_sealed_within(num_kept, int(manager.num_sealed[seq_id])) is None:
            continue
        sealed_bytes = [rows.clone() for rows in twins.shared.stored(seq_id)[:2]]
        manager.truncate(seq_id, num_kept)
        manager.check_integrity()
        twins.shared.poison_unused()
        sealed = int(manager.num_sealed[seq_id])
        assert manager.num_computed_tokens[seq_id] == num_kept
        assert twins.shared.num_used == manager.geometry.count_blocks(num_kept, sealed)
        for rows, old in zip(twins.shared.stored(seq_id), sealed_bytes, strict=False):
            assert rows.equal(old[:sealed])
        alone = twins.alone.add(twins.shared.streams[seq_id])
        if num_kept:
            twins.alone.step({alone: num_kept})
        is_alike = sealed == twins.alone.manager.num_sealed[alone]
        for count in (3, manager.geometry.block_size + 5):
            outputs = twins.shared.step({seq_id: count})[seq_id]
            for output, expected in zip(
                outputs, twins.alone.step({alone: count})[alone], strict=True
            ):
                assert output.isfinite().all()
                if is_alike:  # else one has sealed what the other keeps open
                    torch.testing.assert_close(output, expected, rtol=0, atol=1e-6)
        manager.check_integrity()


@every_format
def test_a_fork_is_not_changed_by_what_its_cut_parent_writes(kv_format):
    twins = Twins(kv_format)
    parent = twins.start(PLACES[2].length(twins.geometry))
    child = twins.fork(parent, seed=1)
    manager, length = twins.shared.manager, twins.shared.length(parent)
    before = [rows.clone() for rows in twins.shared.stored(child)]
    manager.truncate(parent, length - 1)
    twins.shared.step({parent: 2})
    manager.check_integrity()
    for rows, old in zip(twins.shared.stored(child), before, strict=True):
        assert rows.equal(old)
    twins.shared.step({child: 4})


def test_what_cannot_be_cut_is_refused_and_stays():
    twins = Twins(INT2)
    seq_id = twins.start(twins.geometry.num_head_tokens + 2 * twins.geometry.block_size + 60)
    manager = twins.shared.manager
    length, inside = twins.shared.length(seq_id), twins.geometry.num_head_tokens + 5
    for num_tokens, message in (
        (inside, "end within a sealed block"),
        (length + 1, f"num_tokens must be from 0 to {length}, got {length + 1}"),
        (-1, "got -1"),
        (1.5, r"got 1\.5"),
    ):
        with pytest.raises(InvalidStepError, match=message):
            manager.truncate(seq_id, num_tokens)
    assert manager.num_computed_tokens[seq_id] == length
    manager.check_integrity()


@pytest.mark.parametrize("kind", ["prefix cache", "window"])
def test_sequences_that_others_may_share_or_that_evict_are_not_cut(kind):
    geometry = Twins(NATIVE).geometry
    manager = BlockManager(
        geometry,
        num_blocks=99,
        max_num_seqs=2,
        max_model_len=99,
        prefix_caching=kind == "prefix cache",
    )
    window = SinkWindow(4, 64) if kind == "window" else None
    seq_id = manager.add_sequence(manager.chain_tokens([1, 2, 3], sink_window=window))
    with pytest.raises(InvalidStepError, match="windowed, or shared by a prefix cache"):
        manager.truncate(seq_id, 0)
