"""Windowed sequences: every step's output is what StreamingLLM defines, whatever was evicted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from paged_kv.blocks.sink_window import SinkWindow
from paged_kv.cache.attention import paged_attention
from paged_kv.cache.backend import choose_backend
from paged_kv.cache.formats import INT2, INT4, INT8, NATIVE
from paged_kv.errors import ConfigError
from paged_kv.kernels.cpu import plan as cpu_plan
from paged_kv.kernels.cpu.microkernels import TILE_TOKENS
from paged_kv.kernels.cpu.plan import WorkItems, plan_items
from paged_kv.kernels.cpu.records import Item
from paged_kv.kernels.new_tokens import NewTokens
from paged_kv.kernels.rules import ScoreRules
from tests.support import fleets
from tests.support.attention_oracle import layer_of, relative_error, tolerance
from tests.support.fleets import Fleet
from tests.support.token_streams import make_stream
from tests.support.windowed_oracle import (
    LIMITS,
    add_stream,
    check_step,
    expected_from_raw,
    rotated_stream,
    seen_positions,
    stored_context,
    two_query_output,
)

BACKENDS = ("torch", "cpu")

ON_EVERY_BACKEND = pytest.mark.parametrize("backend", BACKENDS)

FORMATS = pytest.mark.parametrize(
    "kv_format", [NATIVE, INT8, INT4, INT2], ids=lambda kv_format: kv_format.name
)


@ON_EVERY_BACKEND
def test_native_windowed_ones_equal_rerotated_keys(backend):
    """Token by token far beyond the window, in float32: 1e-5 of the definition's own oracle."""
    layer = layer_of(NATIVE)
    fleet = Fleet([layer], max_model_len=64, backend=backend)
    raw = make_stream([layer], 400, 3, torch.float32, gqa_group=2)
    sinks = fleet.manager.fitted_window(SinkWindow(4, 50))
    assert sinks == SinkWindow(16, 50)
    seq_id = fleet.add(rotated_stream(raw, sinks), sinks)
    for position in range(400):
        (output,) = fleet.step({seq_id: 1})[seq_id]
        assert relative_error(output[0], expected_from_raw(raw, sinks, position)) <= 1e-5
        stored = int(fleet.manager.num_computed_tokens[seq_id])
        assert stored <= sinks.num_visible_tokens + fleet.manager.geometry.block_size - 1
        fleet.manager.check_integrity()


@ON_EVERY_BACKEND
@pytest.mark.parametrize(
    "sinks", [SinkWindow(4, 130), SinkWindow(0, 200), SinkWindow(4, 128)], ids=str
)
@FORMATS
def test_windowed_ones_see_exactly_sinks_and_window(kv_format, sinks, backend):
    """Prefill in chunks, verify and decode beside an ordinary sequence."""
    fleet = Fleet([layer_of(kv_format)], max_model_len=1200, backend=backend)
    seq_ids, windows = [], {}
    for seed, wanted in enumerate([sinks, None, sinks]):
        seq_id, windows_of_seq_id = add_stream(fleet, wanted, 1100, seed)
        seq_ids.append(seq_id)
        windows[seq_id] = windows_of_seq_id
    limit = LIMITS[kv_format.name]
    chunks = [(100, 30, 1), (20, 200, 40), (100, 100, 100), (1, 1, 5), (120, 7, 100), (60, 1, 1)]
    for chunk in (*chunks, *[(1, 1, 1)] * 20, (130, 4, 90), *[(4, 3, 1)] * 5, (100, 9, 129)):
        check_step(fleet, dict(zip(seq_ids, chunk, strict=True)), windows, limit)
    assert (fleet.manager.num_evicted_tokens[seq_ids] > 0).tolist() == [True, False, True]


@ON_EVERY_BACKEND
def test_a_layer_with_a_window_of_its_own_keeps_it(backend):
    """Sinks are as far as in a sequence of just sinks and window."""
    fleet = Fleet([layer_of(NATIVE)], max_model_len=600, backend=backend)
    seq_id, sinks = add_stream(fleet, SinkWindow(16, 64), 300, 1)
    assert sinks is not None
    fleet.step({seq_id: 80})
    for own_window in (1, 40, 64, 70, 79, 80, 500):
        for count in (1, 3, 40):
            start = fleet.length(seq_id)
            if start + count > 300:
                break
            keys, values = stored_context(fleet, seq_id, count)
            expected = []
            for position in range(start, start + count):
                seen = seen_positions(position, sinks)
                distances = np.arange(len(seen))[::-1]
                seen = seen[distances < own_window]
                stream = fleet.streams[seq_id]
                expected.append(
                    two_query_output(
                        stream.queries[0][position].double(),
                        stream.sink_queries[0][position].double(),
                        keys[seen], values[seen], torch.from_numpy(seen < 16),
                    )
                )  # fmt: skip
            (output,) = fleet.step({seq_id: count}, sliding_window=own_window)[seq_id]
            assert relative_error(output, np.stack(expected)) <= 1e-5, (own_window, count)


# -- the CPU's own kernels ------------------------------------------------------------------------


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Two threads; short contexts are cut too. Into how many parts the longest of each step is."""
    numbers: list[int] = []

    def plan(*args: Any, **options: Any) -> WorkItems:
        work = plan_items(*args, **options)
        numbers.append(int(work.items[:, Item.NUM_PARTS].max()))
        return work

    monkeypatch.setattr(cpu_plan, "MIN_SPLIT_TOKENS", TILE_TOKENS)
    monkeypatch.setattr(cpu_plan, "MIN_THREAD_TOKENS", 1)
    monkeypatch.setattr(cpu_plan, "plan_items", plan)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield numbers
    torch.set_num_threads(before)


@pytest.mark.parametrize("num_sinks", [0, 16, 208, 300])
@FORMATS
def test_windowed_ones_in_parts_on_two_threads(kv_format, num_sinks, parts):
    """Sinks that end within a part, fill several, or are but a piece of a long head."""
    if not kv_format.is_native:
        kv_format = kv_format.with_options(num_sink_tokens=300)
    fleet = Fleet([layer_of(kv_format)], num_blocks=400, backend="cpu")
    windows = {}
    for seed, wanted in enumerate([SinkWindow(num_sinks, 900), None]):
        seq_id, windows[seq_id] = add_stream(fleet, wanted, 1600, seed)
    stream, other = windows
    for counts in ((40, 1), (200, 3), (200, 700), *[(200, 1)] * 5):
        fleet.step({stream: counts[0], other: counts[1]})
    for count in (1, 1, 3, 12, 40, 1):
        check_step(fleet, {stream: count, other: 1}, windows, LIMITS[kv_format.name])
        assert (parts[-1] > 3) == (count < 16)  # more have several tiles of rows, and no parts
    assert fleet.manager.num_evicted_tokens[stream] > 0


RULES = {
    "plain": {},
    "softcap": {"softcap": 1.5},
    "sink logits": {"sink_logits": torch.tensor([-1.0, 0.5, 3.0, 20.0])},
    "both": {"softcap": 1.5, "sink_logits": torch.tensor([0.5, 1.0, 3.0, -2.0])},
    "window": {"softcap": 1.5, "sliding_window": 100},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@FORMATS
def test_rules_of_a_layer_go_with_windowed_ones_as_in_the_reference(
    kv_format, rules, dtype, monkeypatch
):
    """From the first sinks on, which come in two steps; second queries in another layout."""
    attention = fleets.paged_attention
    if not kv_format.is_native:
        kv_format = kv_format.with_options(num_sink_tokens=40)

    def attention_heads_first(*args: Any, sink_query: Tensor | None = None, **rules: Any) -> Tensor:
        if sink_query is not None:
            sink_query = sink_query.transpose(0, 1).contiguous().transpose(0, 1)
        return attention(*args, sink_query=sink_query, **rules)

    monkeypatch.setattr(fleets, "paged_attention", attention_heads_first)
    both = [Fleet([layer_of(kv_format)], dtype=dtype, backend=name) for name in ("torch", "cpu")]
    for fleet in both:
        for seed, wanted in enumerate([SinkWindow(30, 128), None, SinkWindow(16, 150)]):
            seq_id, _ = add_stream(fleet, wanted, 700, seed)
    counts = [(5, 1, 16), (100, 40, 1), (30, 1, 60), (130, 300, 130), (1, 1, 1), (100, 1, 130)]
    limit = 2 * tolerance(dtype) if dtype != torch.float32 else LIMITS[kv_format.name]
    for chunk in (*counts, (1, 1, 1), (4, 9, 3), (40, 1, 33)):
        outputs = [fleet.step(dict(zip(fleet.streams, chunk, strict=True)), **rules)
                   for fleet in both]  # fmt: skip
        for seq_id in outputs[0]:
            expected, found = (output[seq_id][0].double() for output in outputs)
            assert relative_error(found, expected.numpy()) <= limit
    evicted = both[1].manager.num_evicted_tokens[list(both[1].streams)] > 0
    assert evicted.tolist() == [True, False, True]


@pytest.mark.parametrize("own_window", [None, 25])
@pytest.mark.parametrize("num_stored", [0, 5, 90])
def test_new_sinks_are_sinks_beyond_the_window_too(num_stored, own_window):
    """More at once than the manager would let a windowed sequence have; kernels know only the
    definition.
    """
    fleet = Fleet([layer_of(NATIVE)], backend="cpu")
    seq_id, _ = add_stream(fleet, None, 400, 1)
    if num_stored:
        fleet.step({seq_id: num_stored})
    count, layer = 260, fleet.cache.records[0]
    step = replace(
        fleet.cache.begin(fleet.plan({seq_id: count})).inputs,
        num_sink_tokens=torch.tensor([144]),
        window_sizes=torch.tensor([20]),
    )
    stream = fleet.streams[seq_id]
    new = NewTokens(
        *(
            tokens[0][num_stored : num_stored + count]
            for tokens in (stream.queries, stream.keys, stream.values)
        )
    )
    rules = ScoreRules(scale=0.2, sliding_window=own_window)
    expected, found = (
        backend.attend(new, layer, backend.plan(step), rules)
        for backend in (choose_backend(torch.device("cpu"), name) for name in ("torch", "cpu"))
    )
    assert relative_error(found, expected.double().numpy()) <= 1e-5


# -- what must not go unnoticed -------------------------------------------------------------------


def test_no_second_query_is_seen():
    """Sinks at their true distance: not what the definition says."""
    fleet = Fleet([layer_of(NATIVE)], max_model_len=600, backend="torch")
    seq_id, sinks = add_stream(fleet, SinkWindow(16, 64), 300, 1)
    stream = fleet.streams[seq_id]
    fleet.step({seq_id: 80})
    fleet.step({seq_id: 100})
    stream.sink_queries = stream.queries
    raw = make_stream(fleet.cache.layers, 300, 1, torch.float32, gqa_group=2)
    assert sinks is not None
    (output,) = fleet.step({seq_id: 1})[seq_id]
    assert relative_error(output[0], expected_from_raw(raw, sinks, 180)) > 1e-3


def test_a_missing_sink_query_is_refused():
    fleet = Fleet([layer_of(NATIVE)], max_model_len=600, backend="torch")
    seq_id, _ = add_stream(fleet, SinkWindow(16, 64), 300, 1)
    fleet.step({seq_id: 80})
    plan = fleet.plan({seq_id: 1})
    new = torch.zeros(1, 2, 32)
    step = fleet.cache.begin(plan)
    with pytest.raises(ConfigError, match="sink_query is missing"):
        paged_attention(new, new, new, fleet.cache, 0, step)
    with pytest.raises(ConfigError, match="sink_query must be"):
        paged_attention(new, new, new, fleet.cache, 0, step, sink_query=new[:, :, :8])
    with pytest.raises(ConfigError, match="attention_chunk=64"):
        paged_attention(new, new, new, fleet.cache, 0, step, sink_query=new, attention_chunk=64)
