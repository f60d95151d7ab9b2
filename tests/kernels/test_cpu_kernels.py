"""The CPU's attention kernels: vector widths, new tokens, what nobody wrote, error bounds."""

from __future__ import annotations

import ctypes
import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from paged_kv.cache.attention import paged_attention
from paged_kv.cache.formats import INT2, INT4, INT8, NATIVE
from paged_kv.kernels.cpu import attention as cpu_attention
from paged_kv.kernels.cpu import native_code as cpu_native
from paged_kv.kernels.cpu import plan as cpu_plan
from paged_kv.kernels.cpu import records as cpu_records
from paged_kv.kernels.cpu import store as cpu_store
from paged_kv.kernels.cpu.plan import WorkItems, plan_items
from tests.support import cpu_kernels, fleets
from tests.support.attention_oracle import expected_outputs, layer_of, ragged_fleet, relative_error
from tests.support.cpu_kernels import ALL_FORMATS, BASE_FORMATS, SINKS, check_step, limit_of
from tests.support.fleets import NAN_BYTE, Fleet
from tests.support.token_streams import make_stream

on_cpu_kernels = cpu_kernels.on_cpu_kernels
lanes = cpu_kernels.lanes
plans = cpu_kernels.plans


# -- vector widths --------------------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", [40, 128])
@ALL_FORMATS
def test_every_vector_width_matches_the_oracle(kv_format, head_dim, lanes):
    for kv_heads, gqa_group in ((2, 1), (1, 3), (2, 8), (1, 16)):
        layer = layer_of(kv_format, heads=kv_heads, key_dim=head_dim)
        fleet, slots = ragged_fleet(layer, (1, 63, 333), gqa_group=gqa_group)
        check_step(fleet, dict.fromkeys(slots, 1))
        check_step(fleet, dict.fromkeys(slots, 3), softcap=3.0)


@BASE_FORMATS
def test_every_vector_width_serves_keys_and_values_of_other_sizes(kv_format, lanes):
    for key_dim, value_dim in ((8, 256), (24, 8), (64, 96)):
        layer = layer_of(kv_format, key_dim=key_dim, value_dim=value_dim)
        fleet, slots = ragged_fleet(layer, (1, 333))
        check_step(fleet, dict.fromkeys(slots, 1))
        check_step(fleet, dict.fromkeys(slots, 7))


@pytest.mark.parametrize("gqa_group", [33, 71])
@BASE_FORMATS
def test_more_query_heads_than_an_item_has_rows(kv_format, gqa_group):
    fleet, slots = ragged_fleet(layer_of(kv_format, heads=1), (0, 1, 300), gqa_group=gqa_group)
    for num_new in (1, 3):
        check_step(fleet, dict.fromkeys(slots, num_new))


@pytest.mark.parametrize("block_size", [1, 2, 64, 256])
def test_native_blocks_of_any_size(block_size):
    """Of 1 token: vectors of one lane; of 256: more than the tokens whose scores are kept."""
    layer = layer_of(NATIVE.with_options(block_size=block_size))
    fleet = Fleet([layer], num_blocks=1200)
    slot = fleet.add(make_stream([layer], 1100, 1, torch.float32, gqa_group=2))
    for count in (5, 1, 150, 300, 1, 400, 1):
        check_step(fleet, {slot: count})


@BASE_FORMATS
def test_head_longer_than_a_tile_of_scores(kv_format):
    layer = layer_of(kv_format.with_options(num_sink_tokens=300))
    fleet = Fleet([layer])
    slot = fleet.add(make_stream([layer], 900, 1, torch.float32))
    for count in (200, 1, 120, 1, 300, 1):
        check_step(fleet, {slot: count})


# -- new tokens -----------------------------------------------------------------------------------


@pytest.mark.parametrize("num_new", range(2, 9))
@BASE_FORMATS
def test_verifying_several_tokens_matches_the_oracle(kv_format, num_new):
    fleet, slots = ragged_fleet(layer_of(kv_format), (0, 5, 77, 333), gqa_group=4)
    check_step(fleet, dict.fromkeys(slots, num_new))
    check_step(fleet, dict.fromkeys(slots[1:], num_new), sliding_window=4)


@ALL_FORMATS
def test_chunks_on_odd_contexts_beside_decodes_match_the_oracle(kv_format):
    fleet, slots = ragged_fleet(
        layer_of(kv_format), (0, 1, 17, 131, 257, 450, 399, 63), new_tokens=320
    )
    check_step(fleet, dict(zip(slots, (33, 1, 31, 32, 129, 1, 300, 1), strict=True)))
    check_step(fleet, dict.fromkeys(slots, 1))
    check_step(fleet, dict.fromkeys(slots[:3], 33), attention_chunk=48)


def heads_first(tensor: Tensor) -> Tensor:
    """As a model has it: [heads, T, D] in memory."""
    return tensor.transpose(0, 1).contiguous().transpose(0, 1)


def part_of_a_projection(tensor: Tensor) -> Tensor:
    """Heads of queries, keys and values beside each other; the others are NaN."""
    nan = torch.full_like(tensor, torch.nan)
    return torch.cat([nan, tensor, nan], dim=1)[:, tensor.shape[1] : 2 * tensor.shape[1]]


def every_other_element(tensor: Tensor) -> Tensor:
    nan = torch.full_like(tensor, torch.nan)
    return torch.stack([tensor, nan], dim=-1)[..., 0]


@pytest.mark.parametrize("view", [heads_first, part_of_a_projection, every_other_element])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_new_tokens_may_be_views_in_any_precision(view, dtype, stored, monkeypatch):
    def attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
        return paged_attention(view(query), view(key), view(value), *args, **options)

    monkeypatch.setattr(fleets, "paged_attention", attention)
    layer = layer_of(INT4, key_dim=40, value_dim=24)
    fleet = Fleet([layer], dtype=stored)
    slots = [fleet.add(make_stream([layer], 400, seed, dtype, gqa_group=2)) for seed in range(2)]
    for counts in ((200, 3), (1, 1), (1, 190), (5, 1)):
        check_step(fleet, dict(zip(slots, counts, strict=True)), dtype=dtype)


def test_options_of_one_call_do_not_stay_for_the_next():
    fleet, slots = ragged_fleet(layer_of(INT2), (63, 450))
    for options in ({"softcap": 2.0}, {}, {"sink_logits": SINKS}, {"sliding_window": 20}, {}):
        check_step(fleet, dict.fromkeys(slots, 2), **options)


def test_layers_of_one_shape_and_different_formats_share_a_plan():
    layers = [
        layer_of(INT8.with_options(min_tail_tokens=24), key_dim=24),
        layer_of(INT4.with_options(block_size=64, min_tail_tokens=24), key_dim=24),
        layer_of(INT2, key_dim=64, value_dim=8),
        layer_of(INT2.with_options(key_group_size=32), key_dim=24),
    ]
    fleet = Fleet(layers)
    slots = [fleet.add(make_stream(layers, 400, seed, torch.float32, 2)) for seed in range(2)]
    for counts in ((300, 10), (1, 1), (1, 9)):
        check_step(fleet, dict(zip(slots, counts, strict=True)))


# -- what nobody wrote ----------------------------------------------------------------------------


@pytest.mark.parametrize("num_threads", [1, 2])
@ALL_FORMATS
def test_scratch_may_hold_anything(kv_format, num_threads, monkeypatch, plans):
    """NaN in scratch, in partial results and in new tensors; Fleet fills unused blocks with it."""

    def poisoned_plan(*args: Any, **options: Any) -> WorkItems:
        work = plan_items(*args, **options)
        work.partials.fill(np.nan)
        return work

    def poison_scratch() -> None:
        for name, size in (
            ("attention", 4 * cpu_records.SCRATCH_FLOATS),
            ("store", cpu_store.SCRATCH_BYTES),
        ):
            address = cpu_native.thread_scratch(name, num_threads, size).address
            ctypes.memset(address, NAN_BYTE, num_threads * size)

    def empty(*shape: int, **options: Any) -> Tensor:
        return torch.full(shape, torch.nan, **options)

    monkeypatch.setattr(cpu_plan, "plan_items", poisoned_plan)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        fleet, slots = ragged_fleet(layer_of(kv_format, key_dim=40), (1, 63, 700), gqa_group=3)
        for num_new, options in ((1, {}), (1, {"softcap": 4.0}), (5, {"sliding_window": 90})):
            expected = expected_outputs(fleet, {slots[2]: num_new}, **options)
            poison_scratch()
            with monkeypatch.context() as patch:
                patch.setattr(cpu_attention.torch, "empty", empty)
                outputs = fleet.step(dict.fromkeys(slots, num_new), **options)
            assert relative_error(outputs[slots[2]][0], expected[slots[2]]) <= limit_of(kv_format)
            assert all(torch.isfinite(output).all() for (output,) in outputs.values())
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("num_new", [1, 3, 40])
@pytest.mark.parametrize("where", ["keys", "values"])
@pytest.mark.parametrize("position", [5, 60, 200, 300, 332])
@ALL_FORMATS
def test_what_is_not_a_number_comes_through(kv_format, position, where, num_new):
    """One NaN, in head, body, tail or a new token: it shows in whatever sees it, nowhere else."""
    length = 332
    layer = layer_of(kv_format)
    fleet = Fleet([layer])
    slots = [fleet.add(make_stream([layer], 400, seed, torch.float32, 2)) for seed in range(2)]
    getattr(fleet.streams[slots[0]], where)[0][position, 0, 3] = torch.nan
    fleet.step(dict.fromkeys(slots, length))
    outputs = fleet.step(dict.fromkeys(slots, num_new))
    assert torch.isfinite(outputs[slots[1]][0]).all()
    bad, good = outputs[slots[0]][0].split(2, dim=1)  # query heads of the first kv head
    assert bad.isnan().any(-1).all()
    assert torch.isfinite(good).all()


# -- error bounds ---------------------------------------------------------------------------------


@BASE_FORMATS
def test_error_stays_small_as_the_context_grows(kv_format):
    """Against float64 on the dequantized cache: what the arithmetic of the kernels adds."""
    layer = layer_of(kv_format, key_dim=128)
    fleet = Fleet([layer], num_blocks=4200 // kv_format.block_size * 9, max_model_len=8192)
    slot = fleet.add(make_stream([layer], 4200, 0, torch.float32, gqa_group=4))
    for length in (1, 63, 1000, 4096):
        fleet.step({slot: length - fleet.length(slot)}, sliding_window=1)
        check_step(fleet, {slot: 1})


# -- memory ---------------------------------------------------------------------------------------


@BASE_FORMATS
def test_a_cache_is_freed_with_all_that_kernels_made_of_it(kv_format):
    fleet, slots = ragged_fleet(layer_of(kv_format), (1, 300))
    fleet.step(dict.fromkeys(slots, 2), softcap=1.0, sink_logits=SINKS)
    layer = fleet.cache.records[0]
    made = (cpu_attention.plain_layer, cpu_attention.capped_layer, cpu_store.stored_layer)
    assert all(layer in each._made for each in made)
    references = [weakref.ref(layer), weakref.ref(fleet.cache.arenas[0])]
    del layer, fleet
    gc.collect()
    assert [reference() for reference in references] == [None, None]
