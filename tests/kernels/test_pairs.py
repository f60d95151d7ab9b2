"""Many query rows by products of pairs of bfloat16, held to the oracle."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch

pytest.importorskip("numba")

from paged_kv.cache.formats import INT4, INT8, NATIVE, KVFormat
from paged_kv.kernels.cpu import native_code
from paged_kv.kernels.cpu.dense_kernels import HAS_PAIRS
from paged_kv.kernels.cpu.records import PAIR_BYTES, PAIR_ITEM_ROWS, Item
from tests.support import attention_oracle, cpu_kernels
from tests.support.attention_oracle import layer_of, ragged_fleet
from tests.support.cpu_kernels import ALL_FORMATS, SINKS
from tests.support.fleets import NAN_BYTE, Fleet

on_cpu_kernels = cpu_kernels.on_cpu_kernels
plans = cpu_kernels.plans
two_threads = cpu_kernels.two_threads

pytestmark = pytest.mark.skipif(not HAS_PAIRS, reason="this processor multiplies no pairs")

LENGTHS = (0, 1, 63, 130, 500)
# Keys, values and weights are rounded to 8 bits, which the oracle does not do; then the output.
TOLERANCE = 8e-3


def check(fleet: Fleet, counts: dict[int, int], plans: list[Any], **options: object) -> None:
    attention_oracle.check_step(fleet, counts, limit=TOLERANCE, **options)
    assert plans[-1].call.pair_scratch
    assert plans[-1].items[:, Item.NUM_ROWS].max() > 31


@ALL_FORMATS
def test_every_format(kv_format, plans, two_threads):
    """Chunks of many tokens beside single ones, three times, so that what they store is read."""
    fleet, slots = ragged_fleet(layer_of(kv_format), LENGTHS, dtype=torch.bfloat16, new_tokens=400)
    for counts in ((100, 33, 1, 16, 130), (1, 200, 17, 64, 3), (90, 1, 100, 1, 1)):
        check(fleet, dict(zip(slots, counts, strict=True)), plans)


@pytest.mark.parametrize("kv_format", [NATIVE, INT8, INT4], ids=lambda each: each.name)
@pytest.mark.parametrize("dim", [32, 48, 64, 80, 96, 128, 256])
def test_every_dim(kv_format, dim, plans):
    fleet, slots = ragged_fleet(
        layer_of(kv_format, key_dim=dim), LENGTHS, dtype=torch.bfloat16, new_tokens=80
    )
    check(fleet, dict.fromkeys(slots, 77), plans)


@pytest.mark.parametrize("group", [1, 3, 8, 16])
def test_every_group_of_queries(group, plans):
    fleet, slots = ragged_fleet(
        layer_of(INT8), LENGTHS, dtype=torch.bfloat16, new_tokens=80, gqa_group=group
    )
    check(fleet, dict.fromkeys(slots, 67), plans)


@pytest.mark.parametrize(
    "options",
    [
        {"sliding_window": 50},
        {"attention_chunk": 70, "sink_logits": SINKS},
        {"softcap": 2.0, "scale": 0.3},
    ],
    ids=str,
)
@pytest.mark.parametrize("kv_format", [NATIVE, INT8], ids=lambda each: each.name)
def test_every_rule(kv_format, options, plans):
    fleet, slots = ragged_fleet(layer_of(kv_format), LENGTHS, dtype=torch.bfloat16, new_tokens=160)
    for count in (77, 80):
        check(fleet, dict.fromkeys(slots, count), plans, **options)


def test_scratch_may_hold_anything(plans, monkeypatch):
    address = native_code.thread_scratch("pairs", torch.get_num_threads(), PAIR_BYTES).address
    fleet, slots = ragged_fleet(layer_of(INT4), LENGTHS, dtype=torch.bfloat16, new_tokens=80)
    for count in (33, 40):
        ctypes.memset(address, NAN_BYTE, torch.get_num_threads() * PAIR_BYTES)
        check(fleet, dict.fromkeys(slots, count), plans)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_precisions_are_not_rounded(dtype, plans):
    fleet, slots = ragged_fleet(layer_of(INT8), LENGTHS, dtype=dtype, new_tokens=80)
    fleet.step(dict.fromkeys(slots, 70))
    assert not plans[-1].call.pair_scratch


def test_channels_that_fill_no_vector_are_not_paired(plans):
    fleet, slots = ragged_fleet(
        layer_of(INT8, key_dim=40), LENGTHS, dtype=torch.bfloat16, new_tokens=80
    )
    fleet.step(dict.fromkeys(slots, 70))
    assert not plans[-1].call.pair_scratch


def test_items_are_as_large_as_scratch_has_room_for(plans):
    fleet, slots = ragged_fleet(layer_of(INT8), (0,), dtype=torch.bfloat16, new_tokens=700)
    check(fleet, {slots[0]: 650}, plans)
    assert plans[-1].items[:, Item.NUM_ROWS].max() == PAIR_ITEM_ROWS


def test_few_rows_are_cut_into_small_items_for_all_threads(plans, two_threads):
    fleet, slots = ragged_fleet(layer_of(INT8), (500,), dtype=torch.bfloat16, new_tokens=60)
    check(fleet, {slots[0]: 48}, plans)
    assert plans[-1].items[:, Item.NUM_ROWS].max() == 32


def test_pairs_and_floats_give_the_same(monkeypatch):
    """Within what rounding to bfloat16 does, at one scale of keys: an error of 2**-9 of each."""
    outputs = []
    for has_pairs in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if not has_pairs:
                patch.setattr(cpu_kernels.cpu_attention, "is_paired", lambda *_: False)
            fleet, slots = ragged_fleet(
                layer_of(KVFormat(name="any", key_bits=8, value_bits=8)),
                LENGTHS,
                dtype=torch.bfloat16,
                new_tokens=80,
            )
            results = fleet.step(dict.fromkeys(slots, 70))
            outputs.append(torch.cat([results[slot][0] for slot in slots]).double())
    difference = (outputs[0] - outputs[1]).norm() / outputs[1].norm()
    assert 0 < difference < 2**-7
