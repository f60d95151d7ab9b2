"""The tuner of launches: its candidates, how it ranks them, and its timing on tiny layers."""

from __future__ import annotations

import pytest
import torch
import triton
from tools import tune
from tools.kernel_launches import META
from tools.tune import (
    KEYS,
    Key,
    candidates,
    instructions,
    rows_of_best,
    time_on_gpu,
    unmeasured,
)

from paged_kv.kernels.triton.launch import NARROW_LAUNCHES, WIDE_LAUNCHES, Launch, sealed_launch

IS_INTERPRETED = triton.knobs.runtime.interpret
needs_compiler = pytest.mark.skipif(IS_INTERPRETED, reason="kernels are interpreted")
runs_kernels = pytest.mark.skipif(
    not IS_INTERPRETED and not torch.cuda.is_available(), reason="needs TRITON_INTERPRET=1 or a GPU"
)
# What NumPy says of the interpreter's own scalars and of infinities that kernels mean.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
INT8, INT2 = Key(8, 8, 128), Key(2, 8, 128)
MARGIN = 1.15  # instructions of a table's launch over the fewest: they are not all that counts


def test_keys_are_the_tables_entries_for_decoding():
    for head_dim, table in ((128, NARROW_LAUNCHES), (256, WIDE_LAUNCHES)):
        keys = {(key.bits, key.rows) for key in KEYS if key.head_dim == head_dim}
        assert keys == table.keys()


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_candidates_differ_and_the_tables_launch_is_one(key):
    launches = candidates(key)
    assert len(set(launches)) == len(launches)
    assert key.present in launches


def test_no_tile_is_larger_than_a_block():
    tiles = {bits: {each.tile for each in candidates(Key(bits, 8, 128))} for bits in (8, 4, 2)}
    assert tiles == {8: {16, 32, 64, 128}, 4: {16, 32, 64}, 2: {16, 32}}


def test_a_launch_is_forced_for_a_while():
    before, forced = INT2.present, Launch(16, 8, 4)
    with INT2.launching(forced):
        assert sealed_launch(2, 8, 128, META) == forced
    assert INT2.present == before


@needs_compiler
@pytest.mark.parametrize("key", [INT8, INT2], ids=str)
def test_the_tables_launch_is_near_the_best(key):
    """Of those that take as many rows of codes and stages."""
    present = key.present
    found = [instructions(key, launch) for launch in candidates(key) if launch[::2] == present[::2]]
    assert instructions(key, present) <= MARGIN * min(filter(None, found))


@needs_compiler
def test_what_spills_is_no_candidate():
    wide = Key(4, 8, 256)
    assert instructions(wide, Launch(64, 1, 3)) is None


@runs_kernels
def test_timing_keeps_what_runs_and_reports_the_best(monkeypatch, capsys):
    monkeypatch.setattr(tune, "SHAPES", ((1, 300), (1, 400)))
    monkeypatch.setattr(tune, "seconds_of", lambda attend: INT8.present.tile)  # the forced one
    times = time_on_gpu(INT8, [Launch(64, 2, 3), Launch(24, 2, 3)])  # 24 is no power of two
    assert times == {INT8.present: [128e6, 128e6], Launch(64, 2, 3): [64e6, 64e6]}
    assert "Launch(tile=24" in capsys.readouterr().out
    rows = rows_of_best(INT8, times, "decode us", "us")
    assert [(row.value, row.ratio) for row in rows] == [(64e6, 2), (64e6, 2)]
    assert unmeasured([INT8, INT2], rows) == [INT2]
    assert capsys.readouterr().out.startswith("    (8, 8): Launch(64, 2, 3),  # NARROW_LAUNCHES")


@runs_kernels
def test_a_wrong_output_is_dropped(monkeypatch):
    monkeypatch.setattr(tune, "SHAPES", ((1, 300),))
    monkeypatch.setattr(tune, "seconds_of", lambda attend: 1e-6)
    monkeypatch.setattr(tune, "MAX_ERROR", 0.0)
    assert time_on_gpu(INT8, [Launch(64, 2, 3)]) == {}
