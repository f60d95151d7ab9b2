"""Triton's kernels against the oracle: interpreted where there is no GPU, on one where there is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from paged_kv.cache.attention import paged_attention
from paged_kv.cache.backend import TORCH_BACKEND, choose_backend
from paged_kv.cache.formats import INT2, INT4, INT8, KIVI2
from paged_kv.cache.layer_spec import LayerSpec
from paged_kv.kernels.new_tokens import NewTokens
from paged_kv.kernels.rules import ScoreRules
from paged_kv.kernels.triton import codes as triton_codes
from paged_kv.kernels.triton.launch import tile_rows
from paged_kv.kernels.triton.plan import FEW_ROWS, TritonPlan, plan_rows
from tests.support import attention_oracle, triton_fleet
from tests.support.calibrations import calibrated
from tests.support.step_inputs import step_of
from tests.support.token_streams import in_float32_only, make_stream, tokens_of_every_kind
from tests.support.triton_fleet import (
    ALL_FORMATS,
    BASE_FORMATS,
    DEVICE,
    SINKS,
    Cache,
    Fleet,
    check_step,
    layer_of,
    on_triton,
    ragged_fleet,
)

pytestmark = triton_fleet.pytestmark
poison = triton_fleet.poison
many_splits = triton_fleet.many_splits


# -- what is read ---------------------------------------------------------------------------------


@ALL_FORMATS
def test_ragged_decode_and_verify_match_the_oracle(kv_format, dtype):
    fleet, slots = ragged_fleet(
        layer_of(kv_format, heads=1), (1, 63, 600, 16, 17, 330), gqa_group=2, dtype=dtype
    )
    for count in (1, 3):
        check_step(fleet, dict.fromkeys(slots, count))


@ALL_FORMATS
def test_chunks_beside_decodes_match_the_oracle(kv_format, dtype):
    layer = layer_of(kv_format, heads=1)
    fleet, slots = ragged_fleet(layer, (63, 300, 17), gqa_group=3, dtype=dtype, new_tokens=90)
    check_step(fleet, dict(zip(slots, (1, 25, 67), strict=True)))  # of two and of four tiles


@pytest.mark.parametrize("dims", [(32, 32), (40, 64), (80, 96), (128, 128), (192, 128), (256, 256)])
@BASE_FORMATS
def test_every_head_dim_matches_the_oracle(kv_format, dims):
    layer = layer_of(kv_format, heads=1, key_dim=dims[0], value_dim=dims[1])
    fleet, slots = ragged_fleet(layer, (1, 333), gqa_group=2)
    check_step(fleet, dict.fromkeys(slots, 1))


@pytest.mark.parametrize("gqa_group", [1, 3, 4, 8, 12, 16])
@BASE_FORMATS
def test_every_group_of_query_heads_matches_the_oracle(kv_format, gqa_group):
    fleet, slots = ragged_fleet(layer_of(kv_format, heads=1), (1, 300), gqa_group=gqa_group)
    check_step(fleet, dict.fromkeys(slots, 1))
    check_step(fleet, dict.fromkeys(slots, 2))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"softcap": 3.0},
        {"sliding_window": 100},
        {"sliding_window": 1},
        {"attention_chunk": 64},
        {"sliding_window": 90, "attention_chunk": 256, "softcap": 5.0, "scale": 0.3},
        {"sink_logits": SINKS},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
@BASE_FORMATS
def test_every_rule_matches_the_oracle(kv_format, options, many_splits):
    layer = layer_of(kv_format, heads=1)
    fleet, slots = ragged_fleet(layer, (1, 63, 600), gqa_group=4, new_tokens=80)
    check_step(fleet, dict(zip(slots, (1, 18, 4), strict=True)), **options)
    check_step(fleet, dict(zip(slots, (18, 1, 18), strict=True)), **options)


@BASE_FORMATS
def test_large_and_small_values_keep_their_precision(kv_format):
    """Weights times value scales are fp16: scales from 2**-22 to 2**9, in one sequence."""
    layer = layer_of(kv_format, heads=1)
    stream = make_stream([layer], 500, 3, torch.float32)
    powers = torch.arange(500) * 7 % 32 - 18.0
    stream.values[0].mul_(torch.exp2(powers)[:, None, None])
    stream.values[0][:20] *= 1e-3
    fleet = Fleet([layer])
    slot = fleet.add(stream)
    fleet.step({slot: 400})
    check_step(fleet, {slot: 1})


@BASE_FORMATS
def test_a_dominant_token_with_a_tiny_value_is_no_harm(kv_format):
    """A sink: nearly all weight, nearly no value; what the others say is the output."""
    kv_format = kv_format if kv_format.is_native else kv_format.with_options(num_sink_tokens=0)
    layer = layer_of(kv_format, heads=1)
    stream = make_stream([layer], 500, 3, torch.float32)
    stream.queries[0].copy_(stream.queries[0].bfloat16())  # scores as large as these magnify errors
    stream.keys[0][5] = stream.queries[0][400, :1] * 2.0
    stream.values[0][5] *= 1e-4
    fleet = Fleet([layer])
    slot = fleet.add(stream)
    fleet.step({slot: 400})
    check_step(fleet, {slot: 1})


@pytest.mark.parametrize("count", [1, 40])
def test_8_bit_keys_keep_their_precision_beside_large_biases(count):
    """As of models whose keys have biases: fp16 has no room for such a key, but for its codes."""
    layer = layer_of(INT8, heads=1)
    stream = make_stream([layer], 500, 3, torch.float32)
    stream.queries[0].copy_(stream.queries[0].bfloat16())  # as above
    stream.keys[0][:, :, ::11] += torch.tensor([100.0, -300.0, 200.0])
    fleet = Fleet([layer])
    slot = fleet.add(stream)
    fleet.step({slot: 400})
    check_step(fleet, {slot: count})


def test_layers_of_different_formats_share_a_step():
    same = {"block_size": 64, "min_tail_tokens": 32}
    int8, int4, int2 = (each.with_options(**same) for each in (INT8, INT4, INT2))
    layers = [layer_of(int8), layer_of(int2, heads=2, key_dim=64), layer_of(int4, heads=3)]
    fleet = Fleet(layers)
    slots = [fleet.add(make_stream(layers, 400, seed, torch.float32)) for seed in range(2)]
    fleet.step(dict(zip(slots, (50, 340), strict=True)))
    check_step(fleet, dict.fromkeys(slots, 1))
    check_step(fleet, dict(zip(slots, (1, 35), strict=True)))


@BASE_FORMATS
def test_query_and_new_tokens_may_be_views(kv_format):
    layer = LayerSpec(kv_format=kv_format, num_kv_heads=2, key_dim=32, value_dim=32)
    outputs = []
    for backend in ("triton", "torch"):
        cache = Cache([layer], num_blocks=8, dtype=torch.float32, backend=backend)
        manager = cache.new_manager(max_num_seqs=1, max_model_len=64)
        plan = manager.reserve(np.array([manager.add_sequence()]), np.array([5]))
        fused = torch.randn(5, 8 * 32, generator=torch.Generator().manual_seed(0))
        fused = fused.view(5, 8, 32).to(DEVICE)
        query, key, value = fused.split([4, 2, 2], dim=1)
        value = value.transpose(1, 2).contiguous().transpose(1, 2)
        outputs.append(paged_attention(query, key, value, cache, 0, cache.begin(plan)))
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-6)


def test_a_step_without_tokens_is_empty():
    cache = Cache([layer_of(INT8)], num_blocks=2, dtype=torch.float32, backend="triton")
    manager = cache.new_manager(max_num_seqs=1, max_model_len=64)
    nobody = np.zeros(0, dtype=np.int64)
    plan = manager.reserve(nobody, nobody)
    assert plan is not None
    none = torch.zeros(0, 2, 32, device=DEVICE)
    output = paged_attention(none, none, none, cache, 0, cache.begin(plan))
    assert output.shape == (0, 2, 32)


def test_sequences_without_new_tokens_are_left_out():
    step = step_of([1, 0, 40], [10, 20, 30], [0, 0, 0], num_head_tokens=0)
    few, many = plan_rows(step, 1, 2, tile_rows(8, 64, torch.device("cpu")))
    assert few.tiles.tolist() == [[0, 0]]
    assert few.places.tolist() == [[0, 0, 0]]
    assert many.tiles.tolist() == [[2, 0], [2, 64]]
    assert many.places[:, 0].tolist() == list(range(1, 41))


@pytest.mark.parametrize("columns", [128, 256])
@pytest.mark.parametrize("group_size", [1, 3, 8, 16])
def test_every_row_has_one_place_in_one_tile(group_size, columns):
    query_lens = [1, 5, 0, 40, 2, 100, 1]
    step = step_of(query_lens, [9] * 7, [0] * 7, num_head_tokens=0)
    seen = []
    for group in plan_rows(step, 2, group_size, tile_rows(8, columns, torch.device("cpu"))):
        for token, first_tile, index in group.places.tolist():
            for head in range(group_size):
                row = index * group_size + head
                sequence, first_row = group.tiles[first_tile + row // group.tile_rows].tolist()
                assert 0 <= row - first_row < group.tile_rows
                assert token == sum(query_lens[:sequence]) + index
                seen.append((token, head))
        rows = [query_lens[sequence] * group_size for sequence, _ in group.tiles.tolist()]
        assert max(rows) <= FEW_ROWS or min(rows) > FEW_ROWS
    assert sorted(seen) == [(t, h) for t in range(sum(query_lens)) for h in range(group_size)]


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@BASE_FORMATS
def test_a_captured_graph_follows_lengths_and_queries(kv_format):
    """Replayed on shorter contexts and other queries, it gives what a new call gives."""
    fleet, slots = ragged_fleet(layer_of(kv_format), (500, 900), gqa_group=4)
    step = on_triton(fleet).cache.begin(fleet.plan(dict.fromkeys(slots, 1)))
    new = torch.randn(2, 2, 32, device=DEVICE)
    query = torch.randn(2, 8, 32, device=DEVICE)
    rest = fleet.cache.records[0], step.plan, ScoreRules(scale=1.0)
    attend = partial(fleet.cache.backend.attend, NewTokens(query, new, new))
    attend(*rest)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = attend(*rest)
    for shorter_by in (0, 5):
        step.inputs.context_lens.sub_(shorter_by)
        query.normal_()
        graph.replay()
        assert torch.equal(replayed, attend(rest[0], TritonPlan(step.inputs), rest[2]))


# -- what is written ------------------------------------------------------------------------------


def store_on_both(
    layer: LayerSpec, dtype: torch.dtype, tokens: tuple[Tensor, Tensor], counts: list[list[int]]
) -> int:
    """Hold the arena after each step to that of the reference; how many blocks were sealed."""
    caches = [
        Cache([layer], num_blocks=120, dtype=dtype, backend=backend)
        for backend in ("torch", "triton")
    ]
    manager = caches[0].new_manager(max_num_seqs=4, max_model_len=4096)
    slots = np.array([manager.add_sequence() for _ in counts[0]])
    start = num_sealed = 0
    for count in counts:
        plan = manager.reserve(slots, np.array(count))
        assert plan is not None
        new_keys, new_values = (part[start : start + sum(count)].to(DEVICE) for part in tokens)
        new = NewTokens(new_keys, new_keys, new_values)
        for kv_cache in caches:
            step = kv_cache.begin(plan)
            backend, blocks = kv_cache.backend, kv_cache.records[0]
            if sum(count) > 8:
                backend.store_tokens(new, blocks, step.inputs)
            else:  # attention of many tokens takes the interpreter a while
                backend.attend_and_store(new, blocks, step.plan, ScoreRules(scale=1.0))
        manager.commit(plan)
        start, num_sealed = start + sum(count), num_sealed + len(plan.seal_block_ids)
        assert torch.equal(caches[0].arenas[0], caches[1].arenas[0])
    return num_sealed


@ALL_FORMATS
def test_stored_bytes_are_those_of_the_reference(kv_format, dtype):
    """Single tokens and chunks; blocks sealed from open blocks, from new tokens, from both."""
    generator = torch.Generator().manual_seed(0)
    tokens = (
        torch.randn(500, 2, 24, generator=generator),
        torch.randn(500, 2, 40, generator=generator),
    )
    counts = [[150, 1, 33], [1, 1, 1], [130, 100, 7], [1, 1, 1], [3, 2, 1]]
    layer = layer_of(kv_format, key_dim=24, value_dim=40)
    num_sealed = store_on_both(layer, dtype, tokens, counts)
    assert num_sealed or kv_format.is_native or kv_format.min_tail_tokens == 128
    if layer.calibration is not None:
        store_on_both(replace(layer, calibration=None), dtype, tokens, counts[:1])


@BASE_FORMATS
def test_unusual_numbers_are_stored_as_by_the_reference(kv_format):
    """Constants, zeros, outliers, ties, subnormal and saturating scales, a block of each."""
    kv_format = kv_format.with_options(num_sink_tokens=0, min_tail_tokens=0)
    size = kv_format.block_size
    for kind in (tokens_of_every_kind, in_float32_only):
        keys, values = (kind(size, 2, dim, dim) for dim in (16, 24))
        tokens = keys.flatten(0, 1), values.flatten(0, 1)
        layer = attention_oracle.layer_of(kv_format, key_dim=16, value_dim=24)
        for spec in (layer, calibrated(layer)):
            num_sealed = store_on_both(spec, torch.float32, tokens, [[len(tokens[0])]])
            assert num_sealed == len(keys) or kv_format.is_native


def test_what_is_not_finite_stays_so():
    """NaN spreads to all that shares its scale, and nowhere else."""
    plain = attention_oracle.layer_of(INT2, heads=1, key_dim=16)
    for layer in (layer_of(INT8, heads=1, key_dim=16), plain, calibrated(plain)):
        keys = torch.randn(400, 1, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE)
        keys[100, 0, 3] = torch.nan
        metadata = []
        for backend in ("torch", "triton"):
            cache = Cache([layer], num_blocks=40, dtype=torch.float32, backend=backend)
            manager = cache.new_manager(max_num_seqs=1, max_model_len=400)
            plan = manager.reserve(np.array([manager.add_sequence()]), np.array([400]))
            indices = cache.begin(plan).inputs
            cache.backend.store_tokens(NewTokens(keys, keys, keys), cache.records[0], indices)
            sealed = cache.records[0].sealed
            metadata.append((sealed.key_scale[plan.seal_block_ids].isnan(),
                             sealed.value_scale[plan.seal_block_ids].isnan()))  # fmt: skip
        for expected, stored in zip(*metadata, strict=True):
            assert expected.any()
            assert torch.equal(stored, expected)


def test_attention_alone_stores_nothing():
    fleet, slots = ragged_fleet(layer_of(INT8), (70, 200), gqa_group=1)
    step = on_triton(fleet).cache.begin(fleet.plan(dict.fromkeys(slots, 1)))
    before = fleet.cache.arenas[0].clone()
    new = torch.randn(2, 2, 32, device=DEVICE)
    layer, rules = fleet.cache.records[0], ScoreRules(scale=1.0)
    fleet.cache.backend.attend(NewTokens(new, new, new), layer, step.plan, rules)
    assert torch.equal(fleet.cache.arenas[0], before)


# -- codes ----------------------------------------------------------------------------------------


@triton.jit
def unpack_bytes(codes, out, BITS: tl.constexpr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    planes = triton_codes.planes_of_codes(tl.load(codes + at), BITS)
    for plane in tl.static_range(8 // BITS):
        tl.store(out + plane * SIZE + at, planes[plane])


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_every_byte_is_unpacked_exactly(bits):
    """On a GPU these are the hand-written instructions, else the plain branch."""
    codes = torch.arange(1024, dtype=torch.int32).to(DEVICE, torch.uint8)
    planes = 8 // bits
    out = torch.empty(planes, 1024, dtype=torch.float16, device=DEVICE)
    unpack_bytes[(1,)](codes, out, BITS=bits, SIZE=1024)
    for plane in range(planes):
        kept = codes.cpu().int() & (((1 << bits) - 1) << (plane * bits))
        assert torch.equal(out[plane].double().cpu(), kept.double() * 2.0**-24)


# -- tests that can fail --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"), [("LEAST_SCALE", 1.0), ("CODE_UNIT", 2.0**-23), ("LOG2_E", 1.0)]
)
def test_a_wrong_constant_is_seen(name, value, monkeypatch):
    """Where weights of fp16 have no headroom, and where units are wrong, the oracle disagrees."""
    from paged_kv.kernels.triton import sealed as triton_sealed

    monkeypatch.setattr(triton_sealed, name, tl.constexpr(value))
    if not triton.knobs.runtime.interpret:
        pytest.skip("compiled kernels keep their constants")
    checks: dict[str, Callable[[], None]] = {
        "LEAST_SCALE": lambda: test_large_and_small_values_keep_their_precision(KIVI2),
        "CODE_UNIT": lambda: test_every_head_dim_matches_the_oracle(INT2, (32, 32)),
        "LOG2_E": lambda: test_every_head_dim_matches_the_oracle(INT8, (32, 32)),
    }
    with pytest.raises(AssertionError):
        checks[name]()


def test_the_reference_is_still_the_reference():
    """Else all of the above would hold the reference to itself."""
    assert TORCH_BACKEND.attend is not choose_backend(torch.device(DEVICE), "triton").attend
