"""Streams: every step's output is what StreamingLLM defines, whatever was evicted before.

The oracles know tokens, positions and the definition, nothing of block tables. Blocks are poisoned
as soon as a stream lets go of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from paged_kv.blocks.sink_window import SinkWindow
from paged_kv.cache.attention import paged_attention
from paged_kv.cache.backend import choose_backend
from paged_kv.cache.formats import INT2, INT4, INT8, NATIVE
from paged_kv.errors import ConfigError
from paged_kv.kernels.cpu import plan as cpu_plan
from paged_kv.kernels.cpu.microkernels import TILE_TOKENS
from paged_kv.kernels.cpu.native_attention import Item
from paged_kv.kernels.cpu.plan import WorkItems, plan_items
from tests.support import helpers
from tests.support.attention_oracle import layer_of, relative_error, tolerance
from tests.support.helpers import Fleet, Stream, dequantized_block, make_stream

BACKENDS = ("torch", "cpu")
ON_EVERY_BACKEND = pytest.mark.parametrize("backend", BACKENDS)
FORMATS = pytest.mark.parametrize(
    "kv_format", [NATIVE, INT8, INT4, INT2], ids=lambda kv_format: kv_format.name
)
LIMITS = {"native": 1e-5, "int8": 1e-5, "int4": 1e-4, "int2": 1e-4}
BASE = 10000.0


def rotated(tokens: Tensor, positions: NDArray[np.int64]) -> Tensor:
    """RoPE of tokens [T, H, D] in halves, with angles in float64."""
    half = tokens.shape[-1] // 2
    angles = np.outer(positions, BASE ** (-np.arange(half) / half))
    cos, sin = (torch.from_numpy(f(angles))[:, None] for f in (np.cos, np.sin))
    first, second = tokens.double().split(half, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def seen_positions(position: int, sinks: SinkWindow) -> NDArray[np.int64]:
    """Where the tokens are that one at `position` sees, by the definition."""
    all_positions = np.arange(position + 1)
    is_near = all_positions > position - sinks.window_size
    return all_positions[is_near | (all_positions < sinks.num_sink_tokens)]


def rotated_stream(raw: Stream, sinks: SinkWindow, offset: int = 0) -> Stream:
    """What a model would give for raw tokens: its rotary embedding at every position.

    From the second token behind sinks and window on, positions are `offset` more.
    """
    positions = np.arange(len(raw))
    evicted = np.maximum(positions + 1 - sinks.num_visible_tokens, 0)
    dtype = raw.keys[0].dtype
    return Stream(
        [rotated(query, positions).to(dtype) for query in raw.queries],
        [rotated(key, positions).to(dtype) for key in raw.keys],
        raw.values,
        [rotated(query, positions - evicted).to(dtype) for query in raw.queries],
    )


def expected_from_raw(raw: Stream, sinks: SinkWindow, position: int, layer: int = 0) -> NDArray:
    """Output [Hq, D] of one token: keys before RoPE, rotated to their place in the cache."""
    seen = seen_positions(position, sinks)
    keys = rotated(raw.keys[layer][seen], np.arange(len(seen)))
    query = rotated(raw.queries[layer][[position]], np.array([len(seen) - 1]))[0]
    return softmax_output(query, keys, raw.values[layer][seen].double())


def softmax_output(query: Tensor, keys: Tensor, values: Tensor, **rules: float) -> NDArray:
    """[Hq, D] of one query [Hq, D] over keys and values [K, H, D] that it sees."""
    keys = keys.repeat_interleave(query.shape[0] // keys.shape[1], 1)
    values = values.repeat_interleave(query.shape[0] // values.shape[1], 1)
    scores = torch.einsum("hd,khd->hk", query, keys) * query.shape[1] ** -0.5
    return torch.einsum("hk,khd->hd", scores.softmax(-1), values).numpy()


def stored_context(fleet: Fleet, seq_id: int, num_new: int) -> tuple[Tensor, Tensor]:
    """Keys and values [tokens, H, D] at their positions, those in the body as sealed blocks say."""
    stream, length = fleet.streams[seq_id], fleet.length(seq_id)
    keys, values = (t[0][: length + num_new].double() for t in (stream.keys, stream.values))
    manager = fleet.manager
    first = manager.geometry.num_head_tokens + int(manager.num_evicted_tokens[seq_id])
    for block_id in manager.body_ids(seq_id):
        end = first + manager.geometry.block_size
        block = dequantized_block(fleet.cache, 0, int(block_id))
        keys[first:end], values[first:end] = map(torch.from_numpy, block)
        first = end
    return keys, values


def check_step(
    fleet: Fleet, counts: dict[int, int], windows: dict[int, SinkWindow | None], limit: float
) -> None:
    """Run a step, and hold each token to what it sees of what is stored."""
    expected = {}
    for seq_id, count in counts.items():
        keys, values = stored_context(fleet, seq_id, count)
        stream, rows = fleet.streams[seq_id], []
        for position in range(fleet.length(seq_id), fleet.length(seq_id) + count):
            sinks = windows[seq_id] or SinkWindow(0, 1 << 30)
            seen = seen_positions(position, sinks)
            scored = keys[seen]
            query = stream.queries[0][position].double()
            if windows[seq_id] is not None:  # the difference of two queries on the sinks alone
                near = stream.sink_queries[0][position].double()
                is_sink = torch.from_numpy(seen < sinks.num_sink_tokens)
                rows.append(two_query_output(query, near, scored, values[seen], is_sink))
            else:
                rows.append(softmax_output(query, scored, values[seen]))
        expected[seq_id] = np.stack(rows)
    outputs = fleet.step(counts)
    for seq_id in counts:
        error = relative_error(outputs[seq_id][0], expected[seq_id])
        assert error <= limit, (seq_id, fleet.length(seq_id), error)
    fleet.manager.check_integrity()


def two_query_output(
    query: Tensor, sink_query: Tensor, keys: Tensor, values: Tensor, is_sink: Tensor
) -> NDArray:
    """As `softmax_output`, sinks scored by a query of their own."""
    group = query.shape[0] // keys.shape[1]
    keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    scores = torch.einsum("hd,khd->hk", query, keys)
    scores = torch.where(is_sink, torch.einsum("hd,khd->hk", sink_query, keys), scores)
    weights = (scores * query.shape[1] ** -0.5).softmax(-1)
    return torch.einsum("hk,khd->hd", weights, values).numpy()


def add_stream(
    fleet: Fleet, sinks: SinkWindow | None, length: int, seed: int
) -> tuple[int, SinkWindow | None]:
    raw = make_stream(fleet.cache.layers, length, seed, fleet.cache.dtype, gqa_group=2)
    if sinks is None:
        return fleet.add(raw), None
    sinks = fleet.manager.fitted_window(sinks)
    return fleet.add(rotated_stream(raw, sinks), sinks), sinks


@ON_EVERY_BACKEND
def test_native_streams_equal_rerotated_keys(backend):
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
def test_streams_see_exactly_sinks_and_window(kv_format, sinks, backend):
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


# -- the CPU's own kernels ----------------------------------------------------------------------


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Two threads; short contexts are cut too. Into how many parts the longest of each step is."""
    numbers: list[int] = []

    def plan(*args: Any) -> WorkItems:
        work = plan_items(*args)
        numbers.append(int(work.arrays[0][:, Item.NUM_PARTS].max()))
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
def test_streams_in_parts_on_two_threads(kv_format, num_sinks, parts):
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
def test_rules_of_a_layer_go_with_streams_as_in_the_reference(kv_format, rules, dtype, monkeypatch):
    """From the first sinks on, which come in two steps; second queries in another layout."""
    attention = helpers.paged_attention
    if not kv_format.is_native:
        kv_format = kv_format.with_options(num_sink_tokens=40)

    def attention_heads_first(*args: Any, sink_query: Tensor | None = None, **rules: Any) -> Tensor:
        if sink_query is not None:
            sink_query = sink_query.transpose(0, 1).contiguous().transpose(0, 1)
        return attention(*args, sink_query=sink_query, **rules)

    monkeypatch.setattr(helpers, "paged_attention", attention_heads_first)
    fleets = [Fleet([layer_of(kv_format)], dtype=dtype, backend=name) for name in ("torch", "cpu")]
    for fleet in fleets:
        for seed, wanted in enumerate([SinkWindow(30, 128), None, SinkWindow(16, 150)]):
            seq_id, _ = add_stream(fleet, wanted, 700, seed)
    counts = [(5, 1, 16), (100, 40, 1), (30, 1, 60), (130, 300, 130), (1, 1, 1), (100, 1, 130)]
    limit = 2 * tolerance(dtype) if dtype != torch.float32 else LIMITS[kv_format.name]
    for chunk in (*counts, (1, 1, 1), (4, 9, 3), (40, 1, 33)):
        outputs = [fleet.step(dict(zip(fleet.streams, chunk, strict=True)), **rules)
                   for fleet in fleets]  # fmt: skip
        for seq_id in outputs[0]:
            expected, found = (output[seq_id][0].double() for output in outputs)
            assert relative_error(found, expected.numpy()) <= limit
    evicted = fleets[1].manager.num_evicted_tokens[list(fleets[1].streams)] > 0
    assert evicted.tolist() == [True, False, True]


@pytest.mark.parametrize("own_window", [None, 25])
@pytest.mark.parametrize("num_stored", [0, 5, 90])
def test_new_sinks_are_sinks_beyond_the_window_too(num_stored, own_window):
    """More at once than the manager would let a stream have; kernels know only the definition."""
    fleet = Fleet([layer_of(NATIVE)], backend="cpu")
    seq_id, _ = add_stream(fleet, None, 400, 1)
    if num_stored:
        fleet.step({seq_id: num_stored})
    count, records = 260, fleet.cache.records[0]
    step = replace(
        fleet.cache.begin(fleet.plan({seq_id: count})).indices,
        num_sink_tokens=torch.tensor([144]),
        window_sizes=torch.tensor([20]),
    )
    stream = fleet.streams[seq_id]
    new = [tokens[0][num_stored : num_stored + count]
           for tokens in (stream.queries, stream.keys, stream.values)]  # fmt: skip
    expected, found = (
        backend.attend(*new, records, backend.plan(step), scale=0.2, sliding_window=own_window)
        for backend in (choose_backend(torch.device("cpu"), name) for name in ("torch", "cpu"))
    )
    assert relative_error(found, expected.double().numpy()) <= 1e-5


# -- what must not go unnoticed -----------------------------------------------------------------


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
