"""What a windowed sequence attends to, by StreamingLLM's definition, in float64."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from paged_kv.blocks.sink_window import SinkWindow
from tests.support.attention_oracle import relative_error
from tests.support.fleets import Fleet, dequantized_block
from tests.support.token_streams import Stream, make_stream

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


def expected_of_windows(
    fleet: Fleet, counts: dict[int, int], windows: dict[int, SinkWindow | None]
) -> dict[int, NDArray]:
    """What the next step has to return for each sequence: each token, of what it sees."""
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
    return expected


def check_step(
    fleet: Fleet, counts: dict[int, int], windows: dict[int, SinkWindow | None], limit: float
) -> None:
    """Run a step, and hold each token to what it sees of what is stored."""
    expected = expected_of_windows(fleet, counts, windows)
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
