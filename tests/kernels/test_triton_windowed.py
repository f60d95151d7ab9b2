"""Windowed sequences on Triton's kernels, against the definition and the torch reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from paged_kv.blocks.sink_window import SinkWindow
from paged_kv.cache.formats import NATIVE
from tests.support import triton_fleet
from tests.support.attention_oracle import relative_error
from tests.support.token_streams import make_stream
from tests.support.triton_fleet import BASE_FORMATS, SINKS, Fleet, layer_of, limit_of, on_triton
from tests.support.windowed_oracle import (
    add_stream,
    check_step,
    seen_positions,
    stored_context,
    two_query_output,
)

poison = triton_fleet.poison
many_splits = triton_fleet.many_splits
pytestmark = triton_fleet.pytestmark


@pytest.mark.parametrize(("sinks", "splits"), [((4, 130), "many"), ((0, 200), "few")], ids=str)
@BASE_FORMATS
def test_windowed_ones_see_exactly_sinks_and_window(kv_format, sinks, splits, request):
    """Chunks, verify and decode of two windowed sequences beside an ordinary sequence."""
    if splits == "many":
        request.getfixturevalue("many_splits")
    layer = layer_of(kv_format, heads=1)
    fleet = Fleet([layer], max_model_len=1200)
    slots, windows = [], {}
    for seed, wanted in enumerate([SinkWindow(*sinks), None, SinkWindow(*sinks)]):
        slot, windows[slot] = add_stream(fleet, wanted, 700, seed)
        slots.append(slot)
    for chunk in ((130, 30, 1), (120, 200, 130), (100, 100, 100), (70, 7, 100)):
        fleet.step(dict(zip(slots, chunk, strict=True)))
    on_triton(fleet)
    limit = limit_of(kv_format, torch.float32)
    for chunk in ((1, 1, 1), (4, 1, 35), (1, 3, 5), (33, 1, 1), (1, 20, 1)):
        check_step(fleet, dict(zip(slots, chunk, strict=True)), windows, limit)
    assert (fleet.manager.num_evicted_tokens[slots] > 0).tolist() == [True, False, True]


@BASE_FORMATS
def test_sinks_inside_the_window_count_once(kv_format):
    """A young stream, which has not evicted anything."""
    fleet = Fleet([layer_of(kv_format, heads=1)], max_model_len=1200)
    slot, sinks = add_stream(fleet, SinkWindow(4, 140), 400, 1)
    on_triton(fleet)
    for count in (35, 1, 3, 20):
        check_step(fleet, {slot: count}, {slot: sinks}, limit_of(kv_format, torch.float32))
    assert fleet.manager.num_evicted_tokens[slot] == 0


def test_many_sinks_take_several_tiles(many_splits):
    """More than a tile of them, in native blocks, and a first step that stores some of them."""
    fleet = Fleet([layer_of(NATIVE, heads=1)], max_model_len=1200)
    slot, sinks = add_stream(fleet, SinkWindow(100, 64), 700, 1)
    on_triton(fleet)
    for count in (35, 1, 60, 50, 40, 1, 3, 20):
        check_step(fleet, {slot: count}, {slot: sinks}, limit_of(NATIVE, torch.float32))
    assert fleet.manager.num_evicted_tokens[slot] > 0


def test_a_layer_with_a_window_of_its_own_keeps_it():
    """Sinks are as far as in a sequence of just sinks and window."""
    fleet = Fleet([layer_of(NATIVE, heads=1)], max_model_len=600)
    slot, sinks = add_stream(fleet, SinkWindow(16, 64), 400, 1)
    assert sinks is not None
    fleet.step({slot: 80})
    fleet.step({slot: 20})
    on_triton(fleet)
    stream = fleet.streams[slot]
    for own_window in (1, 40, 64, 70, 79, 80, 500):
        for count in (1, 3):
            keys, values = stored_context(fleet, slot, count)
            expected = []
            for position in range(fleet.length(slot), fleet.length(slot) + count):
                seen = seen_positions(position, sinks)
                seen = seen[np.arange(len(seen))[::-1] < own_window]
                query, near = (
                    queries[0][position].double()
                    for queries in (stream.queries, stream.sink_queries)
                )
                is_sink = torch.from_numpy(seen < 16)
                expected.append(two_query_output(query, near, keys[seen], values[seen], is_sink))
            (output,) = fleet.step({slot: count}, sliding_window=own_window)[slot]
            assert relative_error(output, np.stack(expected)) <= 1e-5, (own_window, count)


@pytest.mark.parametrize("count", [1, 35])
@BASE_FORMATS
def test_rules_of_a_layer_go_with_windowed_ones_as_in_the_reference(kv_format, count):
    options = {"softcap": 5.0, "sink_logits": SINKS[:2].cpu(), "sliding_window": 150}
    outputs = []
    for is_triton in (False, True):
        fleet = Fleet([layer_of(kv_format, heads=1)], max_model_len=1200)
        slot, _ = add_stream(fleet, SinkWindow(4, 130), 700, 1)
        other = fleet.add(make_stream(fleet.cache.layers, 700, 2, torch.float32, gqa_group=2))
        for counts in ((130, 30), (120, 200), (100, 100)):
            fleet.step(dict(zip((slot, other), counts, strict=True)))
        if is_triton:
            on_triton(fleet)
        step_options = dict(options)
        step_options["sink_logits"] = options["sink_logits"].to(fleet.cache.device)
        outputs.append(fleet.step({slot: count, other: count}, **step_options))
    for sequence in (slot, other):
        expected = outputs[0][sequence][0].double().numpy()
        error = relative_error(outputs[1][sequence][0], expected)
        assert error <= limit_of(kv_format, torch.float32)
