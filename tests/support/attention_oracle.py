"""Dense attention in float64, and steps of a fleet held to it; what tests of attention share."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from paged_kv.cache.formats import KVFormat
from paged_kv.cache.layer_spec import LayerSpec
from tests.support.fleets import Fleet
from tests.support.token_streams import make_stream

FLOAT32_TOLERANCE = 1e-5


def tolerance(dtype: torch.dtype) -> float:
    """Scores and sums are float32 in any case; the output is rounded once to its dtype."""
    rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    return FLOAT32_TOLERANCE + rounding


def oracle(
    query: Tensor,
    keys: NDArray,
    values: NDArray,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    attention_chunk: int | None = None,
    sink_logits: Tensor | None = None,
) -> NDArray:
    """One sequence: `query` [L, Hq, D] are its newest tokens, keys and values [C + L, H, D] all."""
    queries = query.double().numpy()
    num_new, num_q_heads, dim = queries.shape
    num_kv_heads = keys.shape[1]
    output = np.zeros((num_new, num_q_heads, values.shape[2]))
    for token in range(num_new):
        position = len(keys) - num_new + token
        first = 0
        if sliding_window is not None:
            first = max(first, position - sliding_window + 1)
        if attention_chunk is not None:
            first = max(first, position - position % attention_chunk)
        for head in range(num_q_heads):
            kv_head = head * num_kv_heads // num_q_heads
            scores = keys[first : position + 1, kv_head] @ queries[token, head]
            scores *= dim**-0.5 if scale is None else scale
            if softcap is not None:
                scores = softcap * np.tanh(scores / softcap)
            top = scores.max()
            total = np.exp(scores - top).sum()
            if sink_logits is not None:
                total += np.exp(float(sink_logits[head]) - top)
            weights = np.exp(scores - top) / total
            output[token, head] = weights @ values[first : position + 1, kv_head]
    return output


def relative_error(output: Tensor, expected: NDArray) -> float:
    """Norm of the difference over the norm expected; infinite for any NaN."""
    assert tuple(output.shape) == expected.shape
    difference = np.linalg.norm(output.double().numpy() - expected)
    error = difference / np.linalg.norm(expected)
    return float(error) if np.isfinite(error) else float("inf")


def expected_outputs(
    fleet: Fleet, counts: dict[int, int], layer: int = 0, **options: object
) -> dict[int, NDArray]:
    """What the next step has to return for each sequence; to be called before the step."""
    expected = {}
    for seq_id, count in counts.items():
        start, stream = fleet.length(seq_id), fleet.streams[seq_id]
        keys, values = fleet.context(seq_id, layer)
        new_keys = stream.keys[layer][start : start + count].double().numpy()
        new_values = stream.values[layer][start : start + count].double().numpy()
        expected[seq_id] = oracle(
            stream.queries[layer][start : start + count],
            np.concatenate([keys, new_keys]),
            np.concatenate([values, new_values]),
            **options,
        )
    return expected


def check_step(
    fleet: Fleet, counts: dict[int, int], *, limit: float = FLOAT32_TOLERANCE, **options: object
) -> None:
    """Run one step over every sequence and layer, and hold it to the oracle."""
    layers = range(len(fleet.cache.layers))
    expected = [expected_outputs(fleet, counts, layer, **options) for layer in layers]
    outputs = fleet.step(counts, **options)
    for layer in layers:
        for seq_id in counts:
            error = relative_error(outputs[seq_id][layer], expected[layer][seq_id])
            assert error <= limit, (layer, seq_id, error)
    fleet.manager.check_integrity()


def layer_of(
    kv_format: KVFormat, *, heads: int = 2, key_dim: int = 32, value_dim: int | None = None
) -> LayerSpec:
    return LayerSpec(
        kv_format=kv_format,
        num_kv_heads=heads,
        key_dim=key_dim,
        value_dim=key_dim if value_dim is None else value_dim,
    )


def ragged_fleet(
    layer: LayerSpec,
    lengths: tuple[int, ...],
    *,
    dtype: torch.dtype = torch.float32,
    gqa_group: int = 2,
    new_tokens: int = 40,
    backend: str | None = None,
    device: str = "cpu",
) -> tuple[Fleet, list[int]]:
    """A fleet whose sequences store `lengths` tokens and have `new_tokens` more to come.

    The longer half arrives in two chunks, so that sealing reads open blocks and new tokens.
    """
    fleet = Fleet(
        [layer],
        dtype=dtype,
        num_blocks=sum(lengths) // 8 + 16 * len(lengths) + 64,
        max_num_seqs=len(lengths),
        max_model_len=max(2048, max(lengths) + new_tokens),
        backend=backend,
        device=device,
    )
    seq_ids = [
        fleet.add(make_stream([layer], length + new_tokens, seed, dtype, gqa_group))
        for seed, length in enumerate(lengths)
    ]
    first = {
        seq_id: -(-length // 2) for seq_id, length in zip(seq_ids, lengths, strict=True) if length
    }
    second = {
        seq_id: length - first[seq_id]
        for seq_id, length in zip(seq_ids, lengths, strict=True)
        if length > 1
    }
    for counts in (first, second):
        if counts:
            fleet.step(counts)
    return fleet, seq_ids
