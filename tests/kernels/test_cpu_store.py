"""What the CPU's kernels store: the bytes of the reference."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch
from torch import Tensor

from paged_kv.cache.block_views import layer_blocks
from paged_kv.cache.formats import (
    INT2,
    INT4,
    INT8,
    INT8_TOKEN,
    KIVI2,
    WIDE_SHARES,
    KVFormat,
)
from paged_kv.cache.layer_spec import LayerSpec
from paged_kv.kernels.block_views import LayerBlocks
from paged_kv.kernels.cpu import attention as cpu_attention
from paged_kv.kernels.cpu import quantize as cpu_quantize
from paged_kv.kernels.cpu import store as cpu_store
from paged_kv.kernels.eager import store
from paged_kv.kernels.new_tokens import NewTokens
from paged_kv.kernels.rules import ScoreRules
from paged_kv.kernels.step_inputs import StepInputs
from tests.support import cpu_kernels
from tests.support.arrays import ids
from tests.support.attention_oracle import layer_of, ragged_fleet
from tests.support.calibrations import calibrated
from tests.support.cpu_kernels import ALL_FORMATS, BASE_FORMATS
from tests.support.fleets import Fleet
from tests.support.token_streams import in_float32_only, make_stream, tokens_of_every_kind

on_cpu_kernels = cpu_kernels.on_cpu_kernels
lanes = cpu_kernels.lanes
two_threads = cpu_kernels.two_threads

SEALING_FORMATS = {
    f"{base.name}-block{block_size}-group{group}": base.with_options(
        block_size=block_size, key_group_size=group
    )
    for base in (INT8, INT8_TOKEN, INT4, INT2, KIVI2)
    for block_size in (64, 128)
    for group in ((None,) if base.has_token_keys else (32, 64, None))
    if group is None or group < block_size
} | {f"int2-share{share}": INT2.with_options(wide_key_share=share) for share in WIDE_SHARES}


def store_twice(
    kv_format: KVFormat,
    dtype: torch.dtype,
    dims: tuple[int, int],
    tokens: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor, LayerBlocks]:
    """Arenas after the torch reference and the CPU's kernels stored and sealed the same tokens.

    `tokens` are keys and values [blocks, block_size, heads, dim], one block each to seal. Tokens
    come from open blocks and from the step's own in turn; some new ones are appended as well.
    """
    keys, values = tokens
    num_seals, block_size, heads, _ = keys.shape
    layer = LayerSpec(kv_format=kv_format, num_kv_heads=heads, key_dim=dims[0], value_dim=dims[1])
    layer = calibrated(layer)
    layout = layer.record_layout(dtype)
    size = layout.open_capacity
    generator = torch.Generator().manual_seed(1)
    num_open = -(-num_seals * block_size // size)
    is_open = torch.rand(num_seals * block_size, generator=generator) < 0.5
    is_open[:block_size] = True  # one block from open blocks alone
    is_open[-block_size:] = False  # and one from new tokens alone
    is_new = ~is_open
    shape = (num_seals + num_open + 4, heads, layout.record_bytes)
    arena = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    order = torch.randperm(num_open * size, generator=generator)[: len(is_open)]
    slots = num_seals * size + order
    new_index = torch.cumsum(is_new, 0) - 1
    sources = torch.where(is_open, slots, ~new_index)
    num_new = int(is_new.sum())
    num_stored = min(num_new, 3 * size)
    none = torch.zeros(1, 1, dtype=torch.int64)
    step = StepInputs(
        query_lens=ids(num_new),
        context_lens_host=ids(0),
        context_lens=none[0],
        query_start_loc=torch.tensor([0, num_new]),
        cache_positions=torch.arange(num_new),
        block_table=none,
        num_sealed=none[0],
        stored_tokens=torch.randperm(num_new, generator=generator)[:num_stored],
        stored_slots=(num_seals + num_open) * size + torch.randperm(4 * size)[:num_stored],
        seal_block_ids=torch.randperm(num_seals, generator=generator),
        seal_sources=sources.view(num_seals, block_size),
        block_size=block_size,
        open_block_size=size,
        num_head_tokens=0,
    )
    flat_keys, flat_values = keys.flatten(0, 1), values.flatten(0, 1)
    before = layer_blocks(arena, layer, dtype, size)
    for open_blocks, flat in ((before.open_keys, flat_keys), (before.open_values, flat_values)):
        at = slots[is_open]
        open_blocks[at // size, :, at % size] = flat[is_open].to(dtype)
    arenas = arena.clone(), arena.clone()
    records = [layer_blocks(copy, layer, dtype, size) for copy in arenas]
    new = NewTokens(flat_keys[is_new], flat_keys[is_new], flat_values[is_new])
    store.store_tokens(new, records[0], step)
    cpu_store.store_tokens(new, records[1], step)
    assert not torch.equal(arenas[0], arena)
    return *arenas, records[0]


@pytest.mark.parametrize("dims", [(8, 40), (40, 8), (64, 128), (128, 64), (256, 256)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kv_format", SEALING_FORMATS.values(), ids=SEALING_FORMATS)
def test_stored_bytes_are_those_of_the_reference(kv_format, dtype, dims):
    make = [tokens_of_every_kind]
    if dtype == torch.float32:
        make.append(in_float32_only)
    for kind in make:
        keys, values = (kind(kv_format.block_size, 2, dim, seed) for seed, dim in enumerate(dims))
        if dtype == torch.float16:
            keys, values = keys.clamp(-65504, 65504), values.clamp(-65504, 65504)
        expected, stored, records = store_twice(kv_format, dtype, dims, (keys, values))
        assert records.sealed is not None
        assert torch.isfinite(records.sealed.key_scale[: len(keys)]).all()
        assert torch.equal(stored, expected)


@pytest.mark.parametrize("kv_format", SEALING_FORMATS.values(), ids=SEALING_FORMATS)
def test_every_vector_width_stores_the_same_bytes(kv_format, lanes):
    keys, values = (tokens_of_every_kind(kv_format.block_size, 2, dim, dim) for dim in (24, 72))
    expected, stored, _ = store_twice(kv_format, torch.float32, (24, 72), (keys, values))
    assert torch.equal(stored, expected)


@BASE_FORMATS
def test_two_threads_store_the_same_bytes(kv_format, two_threads):
    if kv_format.is_native:
        kv_format = INT8
    keys, values = (tokens_of_every_kind(kv_format.block_size, 3, 64, seed) for seed in (0, 1))
    expected, stored, _ = store_twice(kv_format, torch.bfloat16, (64, 64), (keys, values))
    assert torch.equal(stored, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_are_rounded_as_torch_does(dtype):
    """Any bits, and what is halfway between two numbers of the lower precision."""
    bits = np.random.default_rng(0).integers(0, 1 << 32, 1 << 16, dtype=np.uint32)
    bits[::4] = bits[::4] & 0xFFFF0000 | 0x8000  # halfway as bfloat16
    bits[1::4] = bits[1::4] & 0xFFFFE000 | 0x1000  # as float16
    floats = torch.from_numpy(bits.view(np.float32))
    kernel = cpu_quantize.copy_kernel("float32", str(dtype).removeprefix("torch."))
    rounded = torch.empty(len(floats), 2, dtype=dtype)[:, 0]
    stride = 2 * dtype.itemsize
    kernel_call = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 5)(kernel.address)
    kernel_call(floats.data_ptr(), 4, rounded.data_ptr(), stride, len(floats))
    torch.testing.assert_close(rounded, floats.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_attention_alone_stores_nothing():
    fleet, slots = ragged_fleet(layer_of(INT8), (70, 200), gqa_group=2)
    plan = fleet.manager.reserve(np.array(slots), np.ones(2, dtype=np.int64))
    assert plan is not None
    step = fleet.cache.begin(plan)
    heads, dim = 2, fleet.cache.layers[0].key_dim
    before = fleet.cache.arenas[0].clone()
    new = torch.randn(2, heads, dim)
    cpu_attention.attend(
        NewTokens(new, new, new), fleet.cache.records[0], step.plan, ScoreRules(scale=1.0)
    )
    assert torch.equal(fleet.cache.arenas[0], before)


def test_infinite_values_saturate_in_8_bits():
    keys = torch.randn(4, INT8.block_size, 2, 16, generator=torch.Generator().manual_seed(0))
    keys[0, ::7, :, 3] = torch.inf
    keys[1, ::5, 1, ::4] = -torch.inf
    keys[2] = torch.inf
    expected, stored, _ = store_twice(INT8, torch.float32, (16, 16), (keys, keys.flip(0)))
    assert torch.equal(stored, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kv_format", SEALING_FORMATS.values(), ids=SEALING_FORMATS)
def test_what_is_not_finite_is_sealed_as_in_the_reference(kv_format, dtype):
    """Equal but for the sign of zeros and the bits of NaN, which are not defined."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(5, kv_format.block_size, 2, 24, generator=generator)
    chance = torch.rand(keys.shape, generator=generator)
    for block, number in enumerate((torch.nan, torch.inf, -torch.inf)):
        keys[block][chance[block] < 0.02] = number
    keys[3][chance[3] < 0.02] = torch.inf
    keys[3][chance[3] > 0.98] = -torch.inf
    keys[4] = torch.where(chance[4] < 0.5, 0.0, -0.0)
    arenas = store_twice(kv_format, dtype, (24, 24), (keys, keys.flip(-1)))[:2]
    layer = LayerSpec(kv_format=kv_format, num_kv_heads=2, key_dim=24, value_dim=24)
    layout = layer.record_layout(dtype)
    expected, stored = (
        layer_blocks(arena, layer, dtype, layout.open_capacity).sealed for arena in arenas
    )
    assert expected is not None
    assert stored is not None
    for name, view in expected._asdict().items():
        if view is not None:
            is_same = torch.isclose(
                getattr(stored, name)[:5].float(), view[:5].float(), 0, 0, equal_nan=True
            )
            assert is_same.all(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@ALL_FORMATS
def test_a_whole_cache_has_the_bytes_of_the_reference_after_every_step(
    kv_format, dtype, two_threads
):
    """Decode, chunks of several row tiles, contexts in parts; blocks are sealed on the way."""
    layers = [layer_of(kv_format, key_dim=24, value_dim=40), layer_of(kv_format, heads=3)]
    fleets = [Fleet(layers, dtype=dtype, backend=backend) for backend in ("cpu", "torch")]
    for fleet in fleets:
        for seed in range(3):
            fleet.add(make_stream(layers, 1600, seed, torch.float32))
    for counts in ((1150, 1, 33), (1, 1, 1), (300, 160, 97), (1, 200, 7), (20, 1, 1)):
        for num_threads, fleet in zip((2, 1), fleets, strict=True):
            torch.set_num_threads(num_threads)
            fleet.step(dict(zip(fleet.streams, counts, strict=True)))
        for stored, expected in zip(*(fleet.cache.arenas for fleet in fleets), strict=True):
            assert torch.equal(stored, expected)
