"""The definition, held to the oracle of numpy, and every backend that runs here held to it."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from paged_kv.cache.backend import choose_backend
from paged_kv.cache.formats import INT2, INT3, INT4, INT8, NATIVE
from paged_kv.kernels import naive
from paged_kv.kernels.eager.rotation import rotate
from paged_kv.kernels.new_tokens import NewTokens
from paged_kv.kernels.rules import ScoreRules
from tests.support.attention_oracle import (
    expected_outputs,
    layer_of,
    ragged_fleet,
    relative_error,
)

SINKS = torch.tensor([-1.0, 0.5, 3.0, 20.0])
RULES = {
    "plain": {},
    "softcap": {"softcap": 2.0},
    "window": {"sliding_window": 100},
    "attention chunk": {"attention_chunk": 128},
    "sink logits": {"sink_logits": SINKS},
    "scale": {"scale": 0.3},
}
NAMES = ["torch", *(["cpu"] if find_spec("numba") else [])]


@pytest.mark.parametrize("options", RULES.values(), ids=RULES)
@pytest.mark.parametrize("kv_format", [NATIVE, INT8, INT4, INT3, INT2], ids=lambda each: each.name)
def test_naive_is_the_oracle_and_backends_are_naive(kv_format, options):
    layer = layer_of(kv_format, key_dim=32, value_dim=48)
    fleet, seq_ids = ragged_fleet(layer, (0, 5, 200, 450), backend="torch")
    counts = dict(zip(seq_ids, (3, 1, 12, 1), strict=True))
    expected = expected_outputs(fleet, counts, **options)
    plan = fleet.plan(counts)
    step = fleet.cache.begin(plan).inputs
    streams = [fleet.streams[seq_id] for seq_id in seq_ids]
    starts = [fleet.length(seq_id) for seq_id in seq_ids]
    new = NewTokens(
        *(
            torch.cat([
                tokens(stream)[0][start : start + count]
                for stream, start, count in zip(streams, starts, counts.values(), strict=True)
            ])
            for tokens in (lambda s: s.queries, lambda s: s.keys, lambda s: s.values)
        )
    )  # fmt: skip
    turned = rotate if kv_format.rotates_values else torch.clone  # kernels know nothing of it
    new = new._replace(value=turned(new.value))
    rules = ScoreRules(**({"scale": 32**-0.5} | options))
    blocks = fleet.cache.records[0]
    found = naive.attend(new, blocks, naive.NaivePlan(step), rules)
    parts = turned(found).split(list(counts.values()))
    # New values are rotated in float32.
    limit = 1e-6 if kv_format.rotates_values else 1e-12
    for seq_id, part in zip(seq_ids, parts, strict=True):
        assert relative_error(part, expected[seq_id]) <= limit
    for name in NAMES:
        backend = choose_backend(torch.device("cpu"), name)
        output = backend.attend(new, blocks, backend.plan(step), rules)
        limit = 1e-5 if kv_format.is_native or kv_format.has_token_keys else 1e-4
        assert relative_error(output, found.numpy()) <= limit
