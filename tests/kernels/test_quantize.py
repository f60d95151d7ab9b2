"""Packing bit by bit, the bytes of a sealed record, and the error of quantizing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from paged_kv.cache.block_views import layer_blocks
from paged_kv.cache.formats import INT8_TOKEN, KVFormat
from paged_kv.cache.key_calibration import KeyCalibration
from paged_kv.cache.kv_cache import PagedKVCache
from paged_kv.cache.layer_spec import LayerSpec
from paged_kv.kernels.block_views import SealedViews
from paged_kv.kernels.eager.quantize import (
    dequantize_keys,
    dequantize_values,
    pack_planes,
    quantize_asymmetric,
    quantize_centred,
    quantize_keys,
    quantize_symmetric,
    unpack_planes,
)
from paged_kv.kernels.eager.store import seal_keys, seal_values
from tests.support.fleets import dequantized_block

FP16_EPS = 2.0**-11  # relative error of rounding to fp16
BITS_AND_GROUP = [(8, 128), (4, 128), (4, 64), (4, 32), (2, 128), (2, 64), (2, 32)]


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def format_of(bits: int, group: int = 128) -> KVFormat:
    if bits == 8:
        return INT8_TOKEN
    return KVFormat(name="plain", key_bits=bits, value_bits=bits, key_group_size=group)


# -- packing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("tokens", [64, 128])
def test_every_bit_of_a_code_lies_in_its_token_plane_lowest_bit_first(bits, tokens):
    codes = torch.randint(0, 1 << bits, (tokens, 5), dtype=torch.uint8, generator=rng())
    packed = pack_planes(codes, bits).tolist()
    rows = tokens * bits // 8
    assert len(packed) == rows
    for token in range(tokens):
        row, plane = token % rows, token // rows
        for channel in range(5):
            for bit in range(bits):
                stored = packed[row][channel] >> (plane * bits + bit) & 1
                assert stored == int(codes[token, channel]) >> bit & 1, (token, channel, bit)


def test_two_bit_row_holds_tokens_a_plane_apart():
    codes = torch.tensor([[1], [0], [2], [0], [3], [0], [0], [1]], dtype=torch.uint8)
    assert pack_planes(codes, 2).tolist() == [[0b00_11_10_01], [0b01_00_00_00]]


def test_four_bit_row_holds_two_tokens_half_a_block_apart():
    codes = torch.tensor([[0xA], [0x1], [0x3], [0xF]], dtype=torch.uint8)
    assert pack_planes(codes, 4).tolist() == [[0x3A], [0xF1]]


def test_eight_bit_codes_are_their_own_packing():
    codes = torch.arange(256, dtype=torch.uint8).view(-1, 1)
    assert torch.equal(pack_planes(codes, 8), codes)
    assert torch.equal(unpack_planes(codes, 8), codes)


@pytest.mark.parametrize("bits", [2, 4])
def test_unpack_of_every_byte_value_matches_its_bits(bits):
    packed = torch.arange(256, dtype=torch.uint8).view(1, 256)
    codes = unpack_planes(packed, bits).tolist()
    for byte in range(256):
        planes = [byte >> shift & ((1 << bits) - 1) for shift in range(0, 8, bits)]
        assert [row[byte] for row in codes] == planes
    assert torch.equal(pack_planes(unpack_planes(packed, bits), bits), packed)


@pytest.mark.parametrize("bits", [2, 4])
def test_unpack_undoes_pack_under_leading_dimensions(bits):
    codes = torch.randint(0, 1 << bits, (3, 2, 64, 8), dtype=torch.uint8, generator=rng())
    assert torch.equal(unpack_planes(pack_planes(codes, bits), bits), codes)


# -- the bytes of a record ----------------------------------------------------------------------

HEADS, KEY_DIM, VALUE_DIM = 2, 24, 40


def sealed_cache(kv_format: KVFormat, dtype: torch.dtype = torch.float32, seed: int = 0):
    """A cache of three blocks, the middle one sealed, and the tokens [H, block_size, D] in it."""
    layer = LayerSpec(kv_format=kv_format, num_kv_heads=HEADS, key_dim=KEY_DIM, value_dim=VALUE_DIM)
    cache = PagedKVCache([layer], num_blocks=3, dtype=dtype)
    shape = (HEADS, kv_format.block_size)
    keys = torch.randn(*shape, KEY_DIM, generator=rng(seed))
    values = torch.randn(*shape, VALUE_DIM, generator=rng(seed + 1))
    records, middle = cache.records[0], torch.tensor([1])
    seal_keys(records, records.sealed, keys[None], middle)
    seal_values(records, records.sealed, values[None], middle)
    return cache, keys, values


def decode_record(raw: bytes, cache: PagedKVCache) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keys, values [block_size, D] and key scale of each element, from the bytes of a CPU record.

    Spells out the documented order: key bytes [D, rows], value bytes [rows, D], fp16 key scales,
    key zero points, value scales, value zero points.
    """
    kv_format = cache.layers[0].kv_format
    tokens, bits = kv_format.block_size, kv_format.key_bits
    rows, groups = tokens * bits // 8, kv_format.num_key_groups
    key_codes = np.zeros((tokens, KEY_DIM))
    value_codes = np.zeros((tokens, VALUE_DIM))
    for token in range(tokens):
        row, shift = token % rows, token // rows * bits
        for channel in range(KEY_DIM):
            byte = raw[channel * rows + row]
            key_codes[token, channel] = byte >> shift & ((1 << bits) - 1)
        for channel in range(VALUE_DIM):
            byte = raw[rows * KEY_DIM + row * VALUE_DIM + channel]
            value_codes[token, channel] = byte >> shift & ((1 << bits) - 1)
    position = rows * (KEY_DIM + VALUE_DIM)

    def metadata(*shape: int) -> np.ndarray:
        nonlocal position
        start, position = position, position + 2 * math.prod(shape)
        return np.frombuffer(raw[start:position], np.float16).reshape(shape).astype(np.float64)

    if bits == 8:
        key_scale, value_scale = metadata(tokens)[:, None], metadata(tokens)[:, None]
        keys, values = (key_codes - 128) * key_scale, (value_codes - 128) * value_scale
    else:
        key_scale, key_zero = metadata(groups, KEY_DIM), metadata(groups, KEY_DIM)
        value_scale, value_zero = metadata(tokens)[:, None], metadata(tokens)[:, None]
        group = np.arange(tokens) * groups // tokens
        key_scale = key_scale[group]
        keys = key_codes * key_scale + key_zero[group]
        values = value_codes * value_scale + value_zero
    assert position == len(raw), "the record has bytes that no section owns"
    return keys, values, np.broadcast_to(key_scale, keys.shape)


@pytest.mark.parametrize(("bits", "group"), BITS_AND_GROUP)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_of_a_cpu_record_decode_to_the_sealed_tokens(bits, group, dtype):
    cache, keys, values = sealed_cache(format_of(bits, group), dtype)
    for head in range(HEADS):
        raw = cache.arenas[0][1, head].numpy().tobytes()
        got_keys, got_values, key_scale = decode_record(raw, cache)
        assert (np.abs(got_keys - keys[head].numpy()) <= 0.51 * key_scale + 0.01).all()
        value_range = np.ptp(values[head].numpy(), axis=1, keepdims=True)
        value_scale = value_range / ((1 << bits) - 1) if bits < 8 else value_range / 127
        assert (np.abs(got_values - values[head].numpy()) <= 0.51 * value_scale + 0.01).all()


@pytest.mark.parametrize(("bits", "group"), BITS_AND_GROUP)
def test_typed_views_read_what_the_bytes_say(bits, group):
    cache, *_ = sealed_cache(format_of(bits, group))
    keys, values = dequantized_block(cache, 0, 1)
    for head in range(HEADS):
        raw = cache.arenas[0][1, head].numpy().tobytes()
        from_bytes = decode_record(raw, cache)
        np.testing.assert_array_equal(keys[:, head], from_bytes[0])
        np.testing.assert_array_equal(values[:, head], from_bytes[1])


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_sealing_a_block_leaves_its_neighbours_alone(bits):
    cache, *_ = sealed_cache(format_of(bits))
    assert cache.arenas[0][1].any()
    assert not cache.arenas[0][0].any()
    assert not cache.arenas[0][2].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_open_record_is_all_keys_then_all_values(bits, dtype):
    layer = LayerSpec(
        kv_format=format_of(bits), num_kv_heads=HEADS, key_dim=KEY_DIM, value_dim=VALUE_DIM
    )
    cache = PagedKVCache([layer], num_blocks=2, dtype=dtype)
    capacity, size = cache.geometry.open_block_size, dtype.itemsize
    keys = torch.randn(capacity, KEY_DIM, generator=rng()).to(dtype)
    values = torch.randn(capacity, VALUE_DIM, generator=rng(1)).to(dtype)
    cache.records[0].open_keys[1, 0] = keys
    cache.records[0].open_values[1, 0] = values
    raw = cache.arenas[0][1, 0]
    middle, end = capacity * KEY_DIM * size, capacity * (KEY_DIM + VALUE_DIM) * size
    channel_major = raw[:middle].view(dtype).view(KEY_DIM, capacity)
    assert torch.equal(channel_major.T, keys)
    assert torch.equal(raw[middle:end].view(dtype).view(capacity, VALUE_DIM), values)
    assert not raw[end:].any()


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_gpu_record_holds_keys_row_by_row_and_values_channel_by_channel(bits):
    """The order that both matrix products contract along; strides are taken from a meta arena."""
    kv_format = format_of(bits, 32)
    layer = LayerSpec(kv_format=kv_format, num_kv_heads=HEADS, key_dim=KEY_DIM, value_dim=VALUE_DIM)
    layout = layer.record_layout(torch.bfloat16)
    shape = (3, HEADS, layout.record_bytes)
    not_cpu = torch.empty(shape, dtype=torch.uint8, device="meta")
    views = layer_blocks(not_cpu, layer, torch.bfloat16, layout.open_capacity).sealed
    assert views is not None

    arena = torch.zeros(shape, dtype=torch.uint8)

    def on_arena(view: Tensor) -> Tensor:
        typed = arena.view(view.dtype)
        return typed.as_strided(view.shape, view.stride(), view.storage_offset())

    rows = kv_format.block_size * bits // 8
    key_codes = torch.randint(0, 256, (rows, KEY_DIM), dtype=torch.uint8, generator=rng())
    value_codes = torch.randint(0, 256, (rows, VALUE_DIM), dtype=torch.uint8, generator=rng())
    on_arena(views.key_codes)[1, 1] = key_codes
    on_arena(views.value_codes)[1, 1] = value_codes
    on_arena(views.value_scale)[1, 1] = torch.arange(kv_format.block_size, dtype=torch.float16)

    raw = arena[1, 1].numpy().tobytes()
    middle, end = rows * KEY_DIM, rows * (KEY_DIM + VALUE_DIM)
    assert raw[:middle] == key_codes.numpy().tobytes()
    assert raw[middle:end] == value_codes.T.contiguous().numpy().tobytes()
    scale_at = layout.offset("value_scale")
    scales = np.frombuffer(raw[scale_at : scale_at + 2 * kv_format.block_size], np.float16)
    np.testing.assert_array_equal(scales, np.arange(kv_format.block_size))
    assert not arena[0].any()
    assert not arena[2].any()
    assert not arena[1, 0].any()


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_metadata_has_the_same_order_on_every_device(bits):
    layer = LayerSpec(
        kv_format=format_of(bits, 32), num_kv_heads=HEADS, key_dim=KEY_DIM, value_dim=VALUE_DIM
    )
    layout = layer.record_layout(torch.bfloat16)
    sealed = {}
    for device in ("cpu", "meta"):
        arena = torch.empty((3, HEADS, layout.record_bytes), dtype=torch.uint8, device=device)
        records = layer_blocks(arena, layer, torch.bfloat16, layout.open_capacity)
        sealed[device] = records.sealed._asdict()
    for name, view in sealed["cpu"].items():
        other = sealed["meta"][name]
        assert (view is None) == (other is None)
        if view is not None:
            assert (view.shape, view.dtype) == (other.shape, other.dtype)
            assert view.storage_offset() == other.storage_offset()
            assert (view.stride() == other.stride()) is ("codes" not in name)


# -- error --------------------------------------------------------------------------------------


def gaussian(tokens: int = 128, dim: int = 64) -> Tensor:
    return torch.randn(16, tokens, dim, generator=rng(3))


def with_outlier_channels() -> Tensor:
    keys = gaussian()
    keys[..., [3, 17, 40]] *= 25.0
    keys[..., 17] += 40.0
    return keys


def with_sink_token() -> Tensor:
    keys = gaussian()
    keys[:, 0] *= 60.0
    return keys


DATA = {
    "gaussian": gaussian,
    "outlier channels": with_outlier_channels,
    "sink token": with_sink_token,
}


def sections(**given: Tensor) -> SealedViews:
    """Sealed sections of which only these are there."""
    return SealedViews(**dict.fromkeys(SealedViews._fields) | given)


def rms(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())


def round_trip_keys(keys: Tensor, bits: int, group: int, clip: float = 1.0) -> Tensor:
    """Keys [..., tokens, D] as they come back from a sealed block."""
    if bits == 8:
        codes, scale = quantize_symmetric(keys)
        return dequantize_keys(sections(key_codes=codes, key_scale=scale), 8, None, torch.float32)
    groups = keys.unflatten(-2, (-1, group))
    codes, scale, zero = quantize_asymmetric(groups, -2, bits, clip)
    packed = pack_planes(codes.flatten(-3, -2), bits)
    views = sections(key_codes=packed, key_scale=scale, key_zero=zero)
    return dequantize_keys(views, bits, None, torch.float32)


def round_trip_values(values: Tensor, bits: int, clip: float = 1.0) -> Tensor:
    if bits == 8:
        codes, scale = quantize_symmetric(values)
        return dequantize_values(sections(value_codes=codes, value_scale=scale), 8, torch.float32)
    codes, scale, zero = quantize_asymmetric(values, -1, bits, clip)
    packed = pack_planes(codes, bits)
    views = sections(value_codes=packed, value_scale=scale, value_zero=zero)
    return dequantize_values(views, bits, torch.float32)


def predicted_rms(values: Tensor, dim: int, bits: int) -> float:
    """Error of rounding evenly spread values: step / sqrt(12), over the groups along `dim`."""
    if bits == 8:
        step = values.abs().amax(-1) / 127
    else:
        step = (values.amax(dim) - values.amin(dim)) / ((1 << bits) - 1)
    return rms(step) / math.sqrt(12)


@pytest.mark.parametrize("data", DATA.values(), ids=DATA)
@pytest.mark.parametrize(("bits", "group"), BITS_AND_GROUP)
def test_key_error_is_what_uniform_rounding_predicts(bits, group, data):
    keys = data()
    predicted = predicted_rms(keys.unflatten(-2, (-1, group)), -2, bits)
    assert rms(round_trip_keys(keys, bits, group) - keys) <= 1.3 * predicted


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_value_error_is_what_uniform_rounding_predicts(bits):
    values = gaussian(dim=128)
    predicted = predicted_rms(values, -1, bits)
    measured = rms(round_trip_values(values, bits) - values)
    assert 0.7 * predicted <= measured <= 1.3 * predicted


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (2, 32), (2, 128)])
def test_outlier_channel_costs_only_its_own_channel(bits, group):
    keys, plain = with_outlier_channels(), gaussian()
    quiet = [channel for channel in range(64) if channel not in (3, 17, 40)]
    assert torch.equal(
        round_trip_keys(keys, bits, group)[..., quiet],
        round_trip_keys(plain, bits, group)[..., quiet],
    )


@pytest.mark.parametrize("clip", [0.95, 0.8, 0.6])
@pytest.mark.parametrize(("bits", "group"), [(4, 64), (2, 32), (2, 128)])
def test_clipping_bounds_every_error_by_half_a_step_or_by_what_was_clipped(bits, group, clip):
    keys = gaussian()
    groups = keys.unflatten(-2, (-1, group))
    spread = groups.amax(-2, keepdim=True) - groups.amin(-2, keepdim=True)
    half_step = spread * clip / ((1 << bits) - 1) / 2
    clipped_off = spread * (1 - clip) / 2
    bound = torch.maximum(half_step, clipped_off) + 4 * FP16_EPS * spread
    error = (round_trip_keys(keys, bits, group, clip) - keys).abs()
    assert (error.unflatten(-2, (-1, group)) <= bound).all()


@pytest.mark.parametrize("group", [32, 64, 128])
def test_clipping_lowers_the_error_of_gaussian_keys_at_two_bits(group):
    keys = gaussian()
    faithful = rms(round_trip_keys(keys, 2, group) - keys)
    assert rms(round_trip_keys(keys, 2, group, clip=0.8) - keys) < 0.95 * faithful


def test_clip_shrinks_the_range_about_its_middle():
    values = torch.linspace(-1.0, 3.0, 128).view(128, 1)
    _, scale, zero = quantize_asymmetric(values, 0, 2, 0.5)
    assert scale.item() == pytest.approx(2.0 / 3, rel=FP16_EPS)
    assert zero.item() == pytest.approx(0.0, abs=1e-6)


# -- groups that must not break it --------------------------------------------------------------


@pytest.mark.parametrize("clip", [1.0, 0.7])
@pytest.mark.parametrize("constant", [0.0, 1.0, -3.14159, 1e-6, 1234.5, -65504.0])
@pytest.mark.parametrize("bits", [2, 4])
def test_constant_group_comes_back_as_its_fp16_value(bits, constant, clip):
    keys = torch.full((128, 8), constant)
    expected = keys.half().float()
    assert torch.equal(round_trip_keys(keys, bits, 32, clip), expected)
    assert torch.equal(round_trip_values(keys, bits, clip), expected)


@pytest.mark.parametrize("bits", [2, 4])
def test_constant_group_has_scale_zero_and_codes_zero(bits):
    codes, scale, zero = quantize_asymmetric(torch.full((32, 8), 5.0), 0, bits, 1.0)
    assert not codes.any()
    assert not scale.any()
    assert torch.equal(zero, torch.full((8,), 5.0, dtype=torch.float16))


@pytest.mark.parametrize("constant", [1.0, -3.14159, 1234.5, -65504.0])
def test_constant_int8_row_comes_back_to_fp16_precision(constant):
    keys = torch.full((4, 8), constant)
    torch.testing.assert_close(round_trip_keys(keys, 8, 128), keys, rtol=FP16_EPS, atol=0.0)


def test_all_zero_int8_row_is_all_128_with_scale_zero():
    codes, scale = quantize_symmetric(torch.zeros(3, 16))
    assert torch.equal(codes, torch.full((3, 16), 128, dtype=torch.uint8))
    assert torch.equal(scale, torch.zeros(3, dtype=torch.float16))
    views = sections(value_codes=codes, value_scale=scale)
    assert not dequantize_values(views, 8, torch.float32).any()


def test_int8_codes_are_symmetric_around_128():
    codes, scale = quantize_symmetric(torch.tensor([[-127.0, -1.0, 0.0, 1.0, 127.0]]))
    assert codes.tolist() == [[1, 127, 128, 129, 255]]
    assert scale.item() == 1.0


EXTREMES = {
    "fp16 max": [65504.0, -65504.0, 65000.0, 0.0],
    "beyond fp16": [1e6, -1e6, 65505.0, 1.0],
    "only beyond fp16": [1e6, 1e6, 1.1e6, 1e6],
    "float32 max": [3.4e38, -3.4e38, 3.4e38, 0.0],
    "tiny": [1e-9, -1e-9, 2e-9, 0.0],
    "float32 subnormal": [1e-42, -1e-42, 0.0, 1e-45],
    "huge beside tiny": [65504.0, 1e-9, -1e-9, 1.0],
}


@pytest.mark.parametrize("extreme", EXTREMES.values(), ids=EXTREMES)
@pytest.mark.parametrize("clip", [1.0, 0.7])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_extreme_values_stay_finite(bits, clip, extreme):
    constant_channels = torch.tensor(extreme).repeat(128, 2)
    constant_tokens = torch.tensor(extreme).repeat(32)[:, None].expand(128, 8)
    neither = torch.tensor(extreme)[(torch.arange(128)[:, None] + torch.arange(8)) % 4]
    for tokens in (constant_channels, constant_tokens, neither):
        assert round_trip_keys(tokens, bits, 32, clip).isfinite().all()
        assert round_trip_values(tokens, bits, clip).isfinite().all()


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_largest_fp16_values_keep_the_relative_error_of_the_format(bits):
    values = torch.linspace(-65504.0, 65504.0, 128).expand(4, 128)
    step = 2 * 65504.0 / (254 if bits == 8 else (1 << bits) - 1)
    assert (round_trip_values(values, bits) - values).abs().max() <= 0.51 * step


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_values_too_small_for_fp16_metadata_come_back_as_zero(bits):
    values = torch.full((4, 16), 1e-9) * torch.tensor([1.0, -1.0]).repeat(8)
    assert not round_trip_values(values, bits).any()


@pytest.mark.parametrize("data", DATA.values(), ids=DATA)
@pytest.mark.parametrize(("bits", "group"), BITS_AND_GROUP)
def test_quantizing_a_dequantized_block_changes_nothing(bits, group, data):
    once = round_trip_keys(data(), bits, group)
    torch.testing.assert_close(round_trip_keys(once, bits, group), once, rtol=1e-6, atol=1e-6)
    values = round_trip_values(data(), bits)
    torch.testing.assert_close(round_trip_values(values, bits), values, rtol=1e-6, atol=1e-6)


def test_codes_are_computed_against_the_scale_as_it_is_stored():
    values = torch.randn(64, 128, generator=rng(5)) * 10.0
    codes, scale = quantize_symmetric(values)
    against_stored = (values / scale.float()[:, None]).round().clamp(-127, 127) + 128
    assert torch.equal(codes.float(), against_stored)
    codes, scale, zero = quantize_asymmetric(values, -1, 4, 1.0)
    against_stored = (values - zero.float()[:, None]) / scale.float()[:, None]
    assert torch.equal(codes.float(), against_stored.round().clamp(0, 15))


# -- wide channels, feedback, values around 0 -----------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4])
def test_values_around_zero_have_no_code_for_it_and_err_by_half_a_step(bits):
    values = torch.randn(50, 64, generator=rng())
    codes, scale = quantize_centred(values, bits, 1.0)
    top_code = (1 << bits) - 1
    read = (codes.float() - top_code / 2) * scale.float()[:, None]
    assert (read != 0).all()
    assert ((read - values).abs() <= 0.51 * scale.float()[:, None]).all()
    greatest = values.abs().amax(-1)
    torch.testing.assert_close(scale.float(), 2 * greatest / top_code, rtol=1e-3, atol=0)
    _, clipped = quantize_centred(values, bits, 0.5)
    torch.testing.assert_close(clipped.float(), scale.float() / 2, rtol=1e-3, atol=0)


def test_eight_bits_per_channel_do_not_feel_a_bias_that_eight_bits_per_token_cannot_bear():
    keys = torch.randn(1, 1, 128, 64, generator=rng())
    biased = keys.clone()
    biased[..., [3, 17, 40]] += torch.tensor([100.0, -300.0, 300.0])
    codes, scale, zero = quantize_keys(biased, 1, 8, (1.0, 1.0))
    views = sections(key_codes=codes, key_scale=scale, key_zero=zero)
    by_channel = dequantize_keys(views, 8, None, torch.float32) - biased
    codes, scale = quantize_symmetric(biased)
    by_token = round_trip_keys(biased, 8, 128) - biased
    plain = [c for c in range(64) if c not in (3, 17, 40)]
    assert rms(by_channel[..., plain]) < 0.012
    assert rms(by_token[..., plain]) > 0.5


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("num_groups", [1, 4])
def test_wide_channels_have_four_levels_where_others_have_one(num_groups, bits):
    keys = torch.randn(2, 3, 128, 24, generator=rng())
    is_wide = torch.zeros(3, 24, dtype=torch.bool)
    is_wide[0, ::3] = is_wide[1, :8] = is_wide[2, 16:] = True
    codes, scale, zero = quantize_keys(keys, num_groups, bits, (1.0, 1.0), is_wide)
    wide = is_wide[None, :, None].expand(codes.shape)
    assert int(codes[wide].max()) == 4 * 2**bits - 1
    assert int(codes[~wide].max()) == 2**bits - 1
    groups = keys.unflatten(2, (num_groups, -1))
    span = groups.amax(3) - groups.amin(3)
    top_code = torch.where(is_wide[None, :, None], 4.0 * 2**bits - 1, 2.0**bits - 1)
    torch.testing.assert_close(scale.float(), span / top_code, rtol=1e-3, atol=0)
    torch.testing.assert_close(zero.float(), groups.amin(3), rtol=1e-3, atol=1e-6)


def test_feedback_lowers_the_error_that_queries_see():
    """Of correlated queries; without correlation there is nothing to make up for."""
    mixing = torch.randn(2, 64, 8, generator=rng(1)) @ torch.randn(2, 8, 64, generator=rng(2))
    queries = torch.randn(2, 1000, 64, generator=rng(3)) @ (mixing + torch.eye(64))
    products = (queries.mT @ queries / 1000).double().numpy()
    known = KeyCalibration.from_moments(products, np.ones((2, 64)))
    keys = torch.randn(4, 2, 128, 64, generator=rng())
    errors = []
    for feedback in (None, torch.from_numpy(known.feedback.astype(np.float32))):
        codes, scale, zero = quantize_keys(keys, 1, 4, (1.0, 1.0), None, feedback)
        views = sections(key_codes=pack_planes(codes, 4), key_scale=scale, key_zero=zero)
        error = dequantize_keys(views, 4, None, torch.float32) - keys
        errors.append(rms(error @ queries.mT))
    assert errors[1] < 0.6 * errors[0]


def test_feedback_of_zero_changes_nothing():
    keys = torch.randn(2, 2, 64, 16, generator=rng())
    without = quantize_keys(keys, 2, 4, (0.9, 1.0))
    with_zeros = quantize_keys(keys, 2, 4, (0.9, 1.0), None, torch.zeros(2, 16, 16))
    assert all(torch.equal(a, b) for a, b in zip(without, with_zeros, strict=True))
