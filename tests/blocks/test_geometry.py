"""The arithmetic of blocks: counts, peaks, and impossible geometries."""

from __future__ import annotations

import numpy as np
import pytest

from paged_kv.blocks.geometry import BlockGeometry, ragged_arange
from paged_kv.errors import ConfigError
from tests.support.arrays import ids
from tests.support.block_model import (
    REAL,
    SMALL,
    geometry_of,
    logical_blocks,
    manager_of,
    num_sealed,
)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((8, 0, 0, 0), r"block_size \(8\) .* open_block_size \(0\)"),
        ((8, -4, 0, 0), r"open_block_size \(-4\)"),
        ((8, 3, 0, 0), r"block_size \(8\) .* open_block_size \(3\)"),
        ((8, 16, 0, 0), r"block_size \(8\) .* open_block_size \(16\)"),
        ((8, 4, 6, 0), r"num_head_tokens .* blocks of 4 tokens, got 6$"),
        ((8, 4, -4, 0), r"num_head_tokens .* got -4$"),
        ((8, 4, 4, -1), r"min_tail_tokens must not be negative, got -1$"),
    ],
)
def test_impossible_geometry_is_refused_with_its_values(sizes, message):
    with pytest.raises(ConfigError, match=message):
        geometry_of(*sizes)


@pytest.mark.parametrize("setting", ["max_num_seqs", "max_model_len"])
@pytest.mark.parametrize("value", [0, -3])
def test_manager_refuses_empty_limits(setting, value):
    with pytest.raises(ConfigError, match=rf"{setting} must be at least 1, got {value}$"):
        manager_of(geometry_of(4, 4, 0, 0), **{setting: value})


@SMALL
def test_counts_of_every_length_agree_with_the_model(geometry):
    for length in range(6 * geometry.block_size):
        blocks = logical_blocks(geometry, length)
        assert geometry.num_sealed_blocks(ids(length))[0] == num_sealed(geometry, length)
        assert geometry.blocks_held(length) == len(blocks)
        num_open = sum(kind == "open" for kind, _ in blocks)
        num_sealed_places = num_sealed(geometry, length) * geometry.open_blocks_per_block
        assert geometry.table_width(length) == num_open + num_sealed_places


@SMALL
def test_blocks_to_grow_is_what_a_step_takes(geometry):
    for before in range(3 * geometry.block_size):
        for after in range(before + 1, before + 2 * geometry.block_size + 2):
            manager = manager_of(geometry, num_blocks=100, max_model_len=200)
            seq_id = ids(manager.add_sequence())
            manager.append_tokens(seq_id, np.arange(after), [after])
            if before:
                plan = manager.reserve(seq_id, ids(before))
                assert plan is not None
                manager.commit(plan)
            needed = int(manager.blocks_needed(seq_id, ids(after - before))[0])
            num_sealed = int(manager.num_sealed[seq_id[0]])
            assert geometry.blocks_to_grow(before, num_sealed, after) == needed


def most_blocks_at_once(geometry: BlockGeometry, num_tokens: int) -> list[int]:
    """For each length up to `num_tokens`: the peak of a growth by single tokens up to there."""
    peaks = [0]
    for length in range(1, num_tokens + 1):
        before = set(logical_blocks(geometry, length - 1))
        held = len(before | set(logical_blocks(geometry, length)))
        peaks.append(max(peaks[-1], held))
    return peaks


@SMALL
def test_max_blocks_is_the_exact_peak_of_growth_by_single_tokens(geometry):
    length = 7 * geometry.block_size + geometry.num_head_tokens + geometry.min_tail_tokens
    peaks = most_blocks_at_once(geometry, length)
    assert [geometry.max_blocks(n) for n in range(length + 1)] == peaks


@REAL
def test_pool_of_max_blocks_is_just_enough_to_grow_by_single_tokens(geometry):
    length = 460
    enough = geometry.max_blocks(length)

    def longest(num_blocks: int) -> int:
        manager = manager_of(geometry, num_blocks=num_blocks, max_model_len=length)
        seq_id = manager.add_sequence()
        for reached in range(length):
            plan = manager.reserve(ids(seq_id), ids(1))
            if plan is None:
                return reached
            manager.commit(plan)
        return length

    assert longest(enough) == length
    assert longest(enough - 1) < length


def test_ragged_arange_counts_within_each_row():
    rows, offsets = ragged_arange(ids(2, 0, 3, 1))
    assert rows.tolist() == [0, 0, 2, 2, 2, 3]
    assert offsets.tolist() == [0, 1, 0, 1, 2, 0]
    assert [len(part) for part in ragged_arange(ids())] == [0, 0]
