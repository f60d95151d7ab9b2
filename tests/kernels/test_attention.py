"""`paged_attention` against plain dense attention in float64, over every format and option.

The oracle loops over tokens and heads and reads the sealed records with the tests' own decoder.
Blocks hold NaN before their first use and after they are freed, so whatever leaks shows.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from paged_kv.blocks.table_replica import TableReplica
from paged_kv.cache.attention import paged_attention
from paged_kv.cache.formats import INT2, INT4, INT8, NATIVE
from paged_kv.errors import ConfigError
from paged_kv.kernels.eager import attention, flat_attention
from tests.support.arrays import ids
from tests.support.attention_oracle import (
    FLOAT32_TOLERANCE,
    check_step,
    expected_outputs,
    layer_of,
    oracle,
    ragged_fleet,
    relative_error,
    tolerance,
)
from tests.support.fleets import Fleet
from tests.support.kv_formats import FORMATS_BY_LABEL, QUANTIZED_LABELS
from tests.support.step_inputs import step_of
from tests.support.token_streams import make_stream

CLEARLY_DIFFERENT = 1e-2  # a thousand times the tolerance
ALL_FORMATS = pytest.mark.parametrize("kv_format", FORMATS_BY_LABEL.values(), ids=FORMATS_BY_LABEL)
BASE_FORMATS = pytest.mark.parametrize(
    "kv_format", [NATIVE, INT8, INT4, INT2], ids=lambda kv_format: kv_format.name
)
TORCH_ONLY = pytest.mark.parametrize("backend", ["torch"], indirect=True)


@pytest.fixture(params=["cpu", "torch"], autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test runs on both sets of kernels."""
    if request.param == "cpu" and find_spec("numba") is None:
        pytest.skip("the CPU's kernels need numba")
    monkeypatch.setenv("PAGED_KV_BACKEND", request.param)
    return request.param


# -- the formats over ragged lengths ------------------------------------------------------------

RAGGED = (1, 63, 1000, 16, 17, 200, 330)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@ALL_FORMATS
def test_ragged_decode_matches_the_oracle(kv_format, dtype):
    fleet, seq_ids = ragged_fleet(layer_of(kv_format), RAGGED, dtype=dtype)
    for _ in range(2):
        check_step(fleet, dict.fromkeys(seq_ids, 1), limit=tolerance(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@ALL_FORMATS
def test_chunks_beside_decodes_match_the_oracle(kv_format, dtype, backend):
    fleet, seq_ids = ragged_fleet(layer_of(kv_format), RAGGED, dtype=dtype, new_tokens=400)
    counts = dict(zip(seq_ids, (300, 1, 33, 1, 129, 1, 64), strict=True))
    # A CPU that multiplies pairs of bfloat16 rounds to it more than the output: test_pairs.py.
    is_paired = backend == "cpu" and dtype is torch.bfloat16
    check_step(fleet, counts, limit=tolerance(dtype) * (2 if is_paired else 1))
    check_step(fleet, dict.fromkeys(seq_ids, 5), limit=tolerance(dtype))


@ALL_FORMATS
def test_each_step_of_a_growing_sequence_matches_the_oracle(kv_format):
    layer = layer_of(kv_format, heads=1, key_dim=16)
    fleet = Fleet([layer])
    seq_id = fleet.add(make_stream([layer], 600, 5, torch.float32))
    for count in (1, 1, 14, 1, 30, 17, 64, 1, 31, 96, 5, 128, 1, 127, 60):
        check_step(fleet, {seq_id: count})


@ALL_FORMATS
def test_empty_context_is_plain_causal_attention(kv_format):
    layer = layer_of(kv_format)
    fleet = Fleet([layer])
    seq_ids = [fleet.add(make_stream([layer], 300, seed, torch.float32, 2)) for seed in range(3)]
    streams = [fleet.streams[seq_id] for seq_id in seq_ids]
    lengths = (300, 1, 77)
    outputs = fleet.step(dict(zip(seq_ids, lengths, strict=True)))
    for seq_id, stream, length in zip(seq_ids, streams, lengths, strict=True):
        exact = oracle(
            stream.queries[0][:length],
            stream.keys[0][:length].double().numpy(),
            stream.values[0][:length].double().numpy(),
        )
        assert relative_error(outputs[seq_id][0], exact) <= FLOAT32_TOLERANCE


@ALL_FORMATS
def test_decode_of_many_sequences_matches_the_oracle(kv_format):
    lengths = tuple(1 + 37 * index % 290 for index in range(64))
    fleet, seq_ids = ragged_fleet(layer_of(kv_format, heads=1), lengths)
    check_step(fleet, dict.fromkeys(seq_ids, 1))


@TORCH_ONLY
@pytest.mark.parametrize("scratch_runs", [1, 3])
@ALL_FORMATS
def test_reading_the_context_a_few_runs_at_a_time_matches_the_oracle(
    kv_format, scratch_runs, monkeypatch
):
    layer = layer_of(kv_format)
    run_bytes = layer.num_kv_heads * layer.key_dim * 4 * max(kv_format.block_size, 128)
    monkeypatch.setattr(flat_attention, "CPU_SCRATCH_BYTES", scratch_runs * run_bytes)
    fleet, seq_ids = ragged_fleet(layer, RAGGED)
    for num_new in (1, 3):
        check_step(fleet, dict.fromkeys(seq_ids, num_new))
        check_step(fleet, dict.fromkeys(seq_ids, num_new), sliding_window=90, sink_logits=SINKS)


@TORCH_ONLY
@BASE_FORMATS
def test_a_step_too_large_for_one_group_matches_the_oracle(kv_format, monkeypatch):
    monkeypatch.setattr(attention, "MAX_FLAT_SCORES", 1000)
    fleet, seq_ids = ragged_fleet(layer_of(kv_format), RAGGED)
    check_step(fleet, dict.fromkeys(seq_ids, 1))
    check_step(fleet, dict(zip(seq_ids, (1, 2, 8, 9, 2, 1, 3), strict=True)))


@TORCH_ONLY
@pytest.mark.parametrize("num_new", [1, 5, 9])
@ALL_FORMATS
def test_blocks_may_lie_in_memory_either_way(kv_format, num_new):
    """The views of a GPU: codes of keys token-major, of values channel-major."""
    fleet, seq_ids = ragged_fleet(layer_of(kv_format), RAGGED)
    counts = dict.fromkeys(seq_ids, num_new)
    expected = expected_outputs(fleet, counts)
    records = fleet.cache.records[0]
    sealed = records.sealed
    if sealed is not None:
        sealed = sealed._replace(
            key_codes=sealed.key_codes.contiguous(),
            value_codes=sealed.value_codes.mT.contiguous().mT,
        )
    fleet.cache.records[0] = replace(
        records, open_keys=records.open_keys.contiguous(), sealed=sealed
    )
    outputs = fleet.step(counts)
    for seq_id in seq_ids:
        assert relative_error(outputs[seq_id][0], expected[seq_id]) <= FLOAT32_TOLERANCE


@BASE_FORMATS
def test_result_does_not_depend_on_the_order_of_the_batch(kv_format):
    fleet, seq_ids = ragged_fleet(layer_of(kv_format), RAGGED)
    check_step(fleet, dict.fromkeys(reversed(seq_ids), 1))
    check_step(fleet, dict.fromkeys(seq_ids[::2], 3))
    check_step(fleet, dict.fromkeys(seq_ids[1::2], 2))


@pytest.mark.parametrize("label", QUANTIZED_LABELS)
def test_new_tokens_attend_to_each_other_unrounded(label):
    """Float32 keys over a bfloat16 cache: only what was stored is rounded."""
    layer = layer_of(FORMATS_BY_LABEL[label])
    fleet = Fleet([layer], dtype=torch.bfloat16)
    seq_id = fleet.add(make_stream([layer], 500, 1, torch.float32))
    check_step(fleet, {seq_id: 300})
    check_step(fleet, {seq_id: 150})
    check_step(fleet, {seq_id: 1})


def test_layers_of_different_formats_each_match_the_oracle():
    int8, int4 = (f.with_options(block_size=64, min_tail_tokens=24) for f in (INT8, INT4))
    layers = [
        layer_of(int8, heads=1, key_dim=64),
        layer_of(INT2, heads=2, key_dim=40, value_dim=24),
        layer_of(int4, heads=4, key_dim=16),
    ]
    fleet = Fleet(layers)
    seq_ids = [fleet.add(make_stream(layers, 500, seed, torch.float32, 2)) for seed in range(2)]
    for counts in ((400, 150), (1, 1), (50, 200), (1, 1)):
        check_step(fleet, dict(zip(seq_ids, counts, strict=True)))


# -- shapes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", [8, 16, 40, 64, 80, 96, 128, 256])
@BASE_FORMATS
def test_every_head_dim_matches_the_oracle(kv_format, head_dim):
    fleet, seq_ids = ragged_fleet(layer_of(kv_format, key_dim=head_dim), (1, 63, 333))
    check_step(fleet, dict.fromkeys(seq_ids, 1))
    check_step(fleet, dict.fromkeys(seq_ids, 9))


@pytest.mark.parametrize(("key_dim", "value_dim"), [(96, 64), (24, 128), (192, 128), (8, 256)])
@BASE_FORMATS
def test_values_may_have_another_size_than_keys(kv_format, key_dim, value_dim):
    layer = layer_of(kv_format, key_dim=key_dim, value_dim=value_dim)
    fleet, seq_ids = ragged_fleet(layer, (1, 63, 333))
    check_step(fleet, dict.fromkeys(seq_ids, 1))
    check_step(fleet, dict.fromkeys(seq_ids, 9))


@pytest.mark.parametrize(
    ("kv_heads", "gqa_group"), [(1, 1), (4, 1), (2, 2), (2, 3), (1, 5), (2, 8), (1, 16), (3, 16)]
)
@BASE_FORMATS
def test_query_heads_of_a_group_share_their_kv_head(kv_format, kv_heads, gqa_group):
    layer = layer_of(kv_format, heads=kv_heads, key_dim=24)
    fleet, seq_ids = ragged_fleet(layer, (1, 63, 333), gqa_group=gqa_group)
    check_step(fleet, dict.fromkeys(seq_ids, 1))
    check_step(fleet, dict.fromkeys(seq_ids, 4))


# -- options ------------------------------------------------------------------------------------

OPTIONS = {
    "window of 1": {"sliding_window": 1},
    "window of 100": {"sliding_window": 100},
    "window beyond the context": {"sliding_window": 5000},
    "chunk of 64": {"attention_chunk": 64},
    "chunk of 96": {"attention_chunk": 96},
    "softcap": {"softcap": 0.5},
    "scale": {"scale": 0.7},
    "scale of zero": {"scale": 0.0},
    "window, softcap and scale": {"sliding_window": 200, "softcap": 5.0, "scale": 1.0},
    "window and chunk": {"sliding_window": 70, "attention_chunk": 96},
    "chunk and softcap": {"attention_chunk": 128, "softcap": 2.0},
}
SINKS = torch.tensor([-1.0, 0.5, 3.0, 20.0])
SINK_OPTIONS = {
    "sink logits": {"sink_logits": SINKS},
    "no sink in effect": {"sink_logits": torch.full((4,), -torch.inf)},
    "sink logits, window": {"sink_logits": SINKS, "sliding_window": 50},
    "sink logits, softcap, chunk": {"sink_logits": SINKS, "softcap": 3.0, "attention_chunk": 100},
}


@pytest.mark.parametrize("options", (OPTIONS | SINK_OPTIONS).values(), ids=OPTIONS | SINK_OPTIONS)
@BASE_FORMATS
def test_every_option_matches_the_oracle(kv_format, options):
    fleet, seq_ids = ragged_fleet(layer_of(kv_format), (0, 63, 450), new_tokens=200)
    check_step(fleet, dict.fromkeys(seq_ids, 150), **options)
    check_step(fleet, dict.fromkeys(seq_ids, 1), **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [OPTIONS["softcap"], SINK_OPTIONS["sink logits, window"]])
def test_options_in_half_precision_match_the_oracle(options, dtype):
    fleet, seq_ids = ragged_fleet(layer_of(INT4), (63, 450), dtype=dtype)
    check_step(fleet, dict.fromkeys(seq_ids, 30), limit=tolerance(dtype), **options)
    check_step(fleet, dict.fromkeys(seq_ids, 1), limit=tolerance(dtype), **options)


@pytest.mark.parametrize("num_new", [1, 20])
def test_scores_of_thousands_do_not_overflow(num_new):
    fleet, seq_ids = ragged_fleet(layer_of(INT8), (63, 450))
    check_step(fleet, dict.fromkeys(seq_ids, num_new), scale=500.0)


# -- the oracle can tell ------------------------------------------------------------------------


def error_of_step(fleet: Fleet, seq_id: int, real: dict, assumed: dict, num_new: int = 1) -> float:
    """Error of a step with options `real` against an oracle with options `assumed`."""
    expected = expected_outputs(fleet, {seq_id: num_new}, **assumed)[seq_id]
    return relative_error(fleet.step({seq_id: num_new}, **real)[seq_id][0], expected)


@pytest.mark.parametrize("num_new", [1, 7])
@pytest.mark.parametrize(
    ("real", "assumed"),
    [
        pytest.param({"sliding_window": 16}, {"sliding_window": 17}, id="window one too long"),
        pytest.param({"sliding_window": 16}, {"sliding_window": 15}, id="window one too short"),
        pytest.param({"sliding_window": 200}, {}, id="window dropped"),
        pytest.param({"attention_chunk": 128}, {}, id="chunk dropped"),
        pytest.param({"softcap": 1.0}, {}, id="softcap dropped"),
        pytest.param({"sink_logits": SINKS}, {}, id="sink logits dropped"),
        pytest.param({"scale": 0.4}, {}, id="scale dropped"),
    ],
)
@BASE_FORMATS
def test_another_option_gives_a_clearly_different_output(kv_format, real, assumed, num_new):
    fleet, seq_ids = ragged_fleet(layer_of(kv_format), (450,))
    assert error_of_step(fleet, seq_ids[0], real, assumed, num_new) > CLEARLY_DIFFERENT


@pytest.mark.parametrize(
    ("kv_format", "kind"),
    [
        (NATIVE, "open"),
        (INT8, "open"),
        (INT8, "sealed"),
        (INT4, "sealed"),
        (INT2, "open"),
        (INT2, "sealed"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_sharing_a_block_by_mistake_gives_a_clearly_different_output(kv_format, kind, monkeypatch):
    fleet, seq_ids = ragged_fleet(layer_of(kv_format), (450, 460))
    counts = dict.fromkeys(seq_ids, 1)
    expected = expected_outputs(fleet, counts)
    geometry, true_rows = fleet.cache.geometry, TableReplica.rows

    def mistaken_rows(replica, plan):
        num_sealed, table = true_rows(replica, plan)
        body = 1 if kind == "sealed" else num_sealed[0]
        place = geometry.num_head_blocks + body * geometry.open_blocks_per_block
        table[1, place] = table[0, place]
        return num_sealed, table

    monkeypatch.setattr(TableReplica, "rows", mistaken_rows)
    outputs = fleet.step(counts)
    first, second = seq_ids
    assert relative_error(outputs[first][0], expected[first]) <= FLOAT32_TOLERANCE
    assert relative_error(outputs[second][0], expected[second]) > CLEARLY_DIFFERENT


@BASE_FORMATS
def test_a_block_that_was_freed_too_early_gives_a_clearly_different_output(kv_format):
    fleet, seq_ids = ragged_fleet(layer_of(kv_format), (450,))
    expected = expected_outputs(fleet, {seq_ids[0]: 1})
    fleet.poison_blocks(fleet.manager.block_ids(seq_ids[0])[1:2])
    output = fleet.step({seq_ids[0]: 1})[seq_ids[0]][0]
    assert relative_error(output, expected[seq_ids[0]]) > CLEARLY_DIFFERENT


# -- calling it ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("key", (4, 2, 32)),
        ("key", (3, 1, 32)),
        ("key", (3, 2, 16)),
        ("key", (3, 64)),
        ("value", (2, 2, 16)),
        ("value", (3, 4, 16)),
        ("value", (3, 2, 32)),
        ("query", (4, 4, 32)),
        ("query", (3, 3, 32)),
        ("query", (3, 4, 16)),
        ("query", (3, 128)),
        ("query", (1, 3, 4, 32)),
    ],
)
def test_bad_shape_is_refused_by_name_and_shape_before_anything_is_stored(name, shape):
    layer = layer_of(INT8, key_dim=32, value_dim=16)
    fleet = Fleet([layer])
    seq_id = fleet.add(make_stream([layer], 3, 0, torch.float32))
    step = fleet.cache.begin(fleet.plan({seq_id: 3}))
    tensors = {
        "query": torch.zeros(3, 4, 32),
        "key": torch.zeros(3, 2, 32),
        "value": torch.zeros(3, 2, 16),
    }
    tensors[name] = torch.zeros(shape)
    before = fleet.cache.arenas[0].clone()
    with pytest.raises(
        ValueError, match=rf"^{name} must have shape .*, got \({shape[0]}, "
    ) as info:
        paged_attention(**tensors, cache=fleet.cache, layer=0, step=step)
    assert str(shape) in str(info.value)
    assert torch.equal(fleet.cache.arenas[0], before)


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_mixed_dtypes_are_refused_before_anything_is_stored(name):
    layer = layer_of(INT8)
    fleet = Fleet([layer])
    step = fleet.cache.begin(fleet.plan({fleet.add(make_stream([layer], 3, 0, torch.float32)): 3}))
    tensors = {each: torch.zeros(3, 2, 32) for each in ("query", "key", "value")}
    tensors[name] = tensors[name].bfloat16()
    before = fleet.cache.arenas[0].clone()
    with pytest.raises(ConfigError, match=r"must have the same dtype, got .*torch\.bfloat16"):
        paged_attention(**tensors, cache=fleet.cache, layer=0, step=step)
    assert torch.equal(fleet.cache.arenas[0], before)


@pytest.mark.parametrize(
    ("masks", "named"),
    [
        ({"sliding_window": 0}, "sliding_window must be at least 1, got 0"),
        ({"attention_chunk": -3}, "attention_chunk must be at least 1, got -3"),
        ({"softcap": 0.0}, "softcap must be positive, got 0.0"),
        ({"softcap": float("nan")}, "softcap must be positive, got nan"),
        ({"sink_logits": torch.zeros(3)}, r"sink_logits must have shape \(4,\), got \(3,\)"),
    ],
)
def test_bad_mask_is_refused_before_anything_is_stored(masks, named):
    layer = layer_of(INT8, key_dim=32, value_dim=16)
    fleet = Fleet([layer])
    seq_id = fleet.add(make_stream([layer], 3, 0, torch.float32))
    step = fleet.cache.begin(fleet.plan({seq_id: 3}))
    before = fleet.cache.arenas[0].clone()
    with pytest.raises(ConfigError, match=named):
        paged_attention(
            torch.zeros(3, 4, 32),
            torch.zeros(3, 2, 32),
            torch.zeros(3, 2, 16),
            fleet.cache,
            0,
            step,
            **masks,
        )
    assert torch.equal(fleet.cache.arenas[0], before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_output_has_the_dtype_of_the_query_and_the_size_of_the_values(dtype):
    layer = layer_of(INT8, key_dim=32, value_dim=48)
    fleet = Fleet([layer], dtype=torch.bfloat16)
    seq_id = fleet.add(make_stream([layer], 10, 0, dtype, gqa_group=3))
    output = fleet.step({seq_id: 10})[seq_id][0]
    assert output.dtype == dtype
    assert output.shape == (10, 6, 48)


@pytest.mark.parametrize(
    ("query_lens", "context_len", "named"),
    [
        ((2, -1), 9, r"must not be negative and add up to the 1 positions, got \(2, -1\)"),
        ((2, 3), 9, r"add up to the 1 positions, got \(2, 3\)"),
        ((1, 0), 4000, "a context of 4000 tokens is beyond block tables for"),
    ],
)
def test_a_step_that_would_lead_kernels_astray_is_refused(query_lens, context_len, named):
    step = step_of([1, 0], [9, 9], [0, 0], num_head_tokens=0)
    with pytest.raises(ValueError, match=named):
        replace(step, query_lens=ids(*query_lens), context_lens_host=ids(context_len, 9))
