"""Chunks of K/V as bytes hold what blocks hold, are as small, and are taken for no other chunk."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import Tensor

from paged_kv.cache.attention import store_tokens
from paged_kv.cache.kv_cache import PagedKVCache
from paged_kv.cache.layer_formats import resolve_formats
from paged_kv.cache.layer_spec import LayerSpec
from paged_kv.cache.stored_context import read_blocks
from paged_kv.errors import ConfigError, TransferError
from paged_kv.integrations.chunk_codec import FRAME, ChunkCodec
from paged_kv.models.calibration import Calibration
from tests.support.calibrations import calibrated

HEAD_DIM, NUM_HEADS, NUM_LAYERS = 32, 2, 3
FORMATS = ("int8", "int8-token", "int4", "k4v2", "int3", "int2", "int2-long", "kivi2")


def chunk(num_tokens: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    """Channels of keys have offsets, as those of models do, and the first token is far from all."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, NUM_LAYERS, num_tokens, NUM_HEADS * HEAD_DIM)
    kv = torch.randn(shape, generator=generator)
    kv[0] += 4 * torch.randn(shape[1], 1, shape[3], generator=generator)
    kv[0, :, 0] *= 20
    return kv.to(dtype)


def round_trip(codec: ChunkCodec, kv: Tensor) -> Tensor:
    data, out = codec.encode(kv, b"name"), torch.full_like(kv, 7)
    assert len(data) == codec.num_bytes(kv.shape, kv.dtype)
    codec.decode(data, out, b"name")
    return out


def error(found: Tensor, kv: Tensor) -> float:
    """Of what is not in full precision, in parts of how far tokens lie from their mean."""
    spread = kv.float() - kv.float().mean(2, keepdim=True)
    return float((found.float() - kv.float()).norm() / spread[:, :, 4:].norm())


def dequantized(kv: Tensor, name: str) -> Tensor:
    """What sealed blocks of a cache hold of a chunk that is whole blocks, its first token apart."""
    formats = resolve_formats(name).of(NUM_LAYERS)
    layers = [
        LayerSpec(
            kv_format=each.with_options(num_sink_tokens=0, min_tail_tokens=0),
            num_kv_heads=NUM_HEADS,
            key_dim=HEAD_DIM,
            value_dim=HEAD_DIM,
        )
        for each in formats
    ]
    cache = PagedKVCache(layers, num_blocks=300, dtype=kv.dtype)
    manager = cache.new_manager(max_num_seqs=1, max_model_len=kv.shape[2])
    seq_id = manager.add_sequence()
    plan = manager.reserve(np.array([seq_id]), np.array([kv.shape[2]]))
    step = cache.begin(plan)
    found = torch.empty_like(kv)
    for layer in range(NUM_LAYERS):
        keys, values = kv[:, layer].unflatten(-1, (NUM_HEADS, HEAD_DIM))
        store_tokens(keys, values, cache, layer, step)
    manager.commit(plan)
    ids = torch.from_numpy(manager.block_ids(seq_id).astype(np.int64))
    for layer in range(NUM_LAYERS):
        read = read_blocks(cache, layer, ids, kv.dtype)
        found[:, layer] = torch.stack([each.flatten(0, 1).flatten(1) for each in read])
    return found


@pytest.mark.parametrize("name", FORMATS)
def test_a_chunk_holds_what_blocks_hold(name):
    kv = chunk(256)
    found = round_trip(ChunkCodec(name, head_dim=HEAD_DIM, num_sink_tokens=0), kv)
    torch.testing.assert_close(found, dequantized(kv, name), rtol=0, atol=0)
    kept = round_trip(ChunkCodec(name, head_dim=HEAD_DIM, num_sink_tokens=4), kv)
    stood_for = kv.clone()
    stood_for[:, :, :4] = kv[:, :, 4:5]
    assert torch.equal(kept[:, :, :4], kv[:, :, :4])
    torch.testing.assert_close(
        kept[:, :, 4:], dequantized(stood_for, name)[:, :, 4:], rtol=0, atol=0
    )


@pytest.mark.parametrize(("name", "most"), [("int8", 0.02), ("int4", 0.2), ("int2", 0.6)])
def test_errors_are_those_of_the_format(name, most):
    kv = chunk(256)
    found = error(round_trip(ChunkCodec(name, head_dim=HEAD_DIM, num_sink_tokens=4), kv), kv)
    assert most / 8 < found < most


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_tokens", [1, 4, 63, 64, 65, 200])
def test_what_fills_no_block_is_in_full_precision(num_tokens, dtype):
    kv = chunk(num_tokens, dtype)
    found = round_trip(ChunkCodec("int2", head_dim=HEAD_DIM), kv)
    body = num_tokens // 64 * 64
    assert torch.equal(found[:, :, body:], kv[:, :, body:])
    assert torch.equal(found[:, :, :4], kv[:, :, :4])
    assert torch.equal(found, kv) == (body == 0)
    assert torch.equal(round_trip(ChunkCodec("native", head_dim=HEAD_DIM), kv), kv)


def test_layers_have_formats_of_their_own():
    kv = chunk(256)
    found = round_trip(ChunkCodec("int2,0=native,-1=int8", head_dim=HEAD_DIM), kv)
    errors = [error(found[:, [n]], kv[:, [n]]) for n in range(NUM_LAYERS)]
    assert errors[0] == 0 < errors[2] < 0.02 < errors[1]


def test_sizes_are_those_of_the_blocks():
    """Of SmolLM2's layers, in chunks of LMCache's usual 256 tokens."""
    shape = (2, 30, 256, 192)
    native = ChunkCodec("native", head_dim=64).num_bytes(shape, torch.bfloat16)
    assert native - 2 * 30 * 256 * 192 * 2 < 1000, "a frame is small"
    for name, all_sealed, with_first in (("int8", 1.9, 1.85), ("int2", 6.0, 5.5)):
        for num_sinks, least in ((0, all_sealed), (4, with_first)):
            codec = ChunkCodec(name, head_dim=64, num_sink_tokens=num_sinks)
            assert native / codec.num_bytes(shape, torch.bfloat16) > least


def test_a_calibration_is_used_and_has_to_be_the_same():
    layer = calibrated(
        LayerSpec(kv_format="int2", num_kv_heads=NUM_HEADS, key_dim=HEAD_DIM, value_dim=HEAD_DIM)
    )
    assert layer.calibration is not None
    calibration = Calibration((layer.calibration,) * NUM_LAYERS, b"model")
    kv = chunk(128)
    with_it = ChunkCodec("int2", head_dim=HEAD_DIM, calibration=calibration)
    without = ChunkCodec("int2", head_dim=HEAD_DIM)
    assert not torch.equal(round_trip(with_it, kv), round_trip(without, kv))
    with pytest.raises(TransferError, match="fingerprint"):
        without.decode(with_it.encode(kv), torch.empty_like(kv))
    with pytest.raises(ConfigError, match="a calibration of 3 layers for 2"):
        with_it.num_bytes((2, 2, 128, 64), torch.bfloat16)


def test_every_changed_byte_and_length_is_refused_and_nothing_written():
    codec, kv = ChunkCodec("int8", head_dim=HEAD_DIM), chunk(70)
    data, out = codec.encode(kv, b"name"), torch.full_like(kv, 7)
    changed = bytearray(data)
    for position in (*range(700), *range(700, len(data), 997), *range(len(data) - 40, len(data))):
        changed[position] ^= 0x40
        with pytest.raises(TransferError):
            codec.decode(changed, out, b"name")
        changed[position] ^= 0x40
    for length in (0, 10, FRAME.size, 700, len(data) - 1):
        with pytest.raises(TransferError, match="bytes"):
            codec.decode(data[:length], out, b"name")
    assert bool((out == 7).all())
    codec.decode(data + bytes(100), out, b"name")  # a buffer may be larger
    assert torch.equal(out[:, :, 64:], kv[:, :, 64:])


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (ChunkCodec("int4", head_dim=HEAD_DIM), "bytes|format"),
        (ChunkCodec("int8", head_dim=HEAD_DIM, num_sink_tokens=0), "bytes|num_sink_tokens"),
        (ChunkCodec("int8", head_dim=2 * HEAD_DIM), "bytes|head_dim"),
    ],
)
def test_chunks_of_another_kind_are_refused(other, named):
    kv = chunk(256)
    data = ChunkCodec("int8", head_dim=HEAD_DIM).encode(kv)
    with pytest.raises(TransferError, match=named):
        other.decode(data, torch.empty_like(kv))


def test_a_chunk_of_another_name_or_precision_is_refused():
    codec, kv = ChunkCodec("int8", head_dim=HEAD_DIM), chunk(256)
    data = codec.encode(kv, b"one")
    with pytest.raises(TransferError, match="name is"):
        codec.decode(data, torch.empty_like(kv), b"other")
    with pytest.raises(TransferError, match="dtype is 'bfloat16'"):
        codec.decode(data, torch.empty_like(kv, dtype=torch.float16), b"one")
    header_bytes = FRAME.unpack_from(data)[2]
    assert json.loads(data[FRAME.size : FRAME.size + header_bytes])["format"] == "int8"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_encoded(value):
    codec, kv = ChunkCodec("int8", head_dim=HEAD_DIM), chunk(64)
    kv[1, 2, 3, 4] = value
    with pytest.raises(ConfigError, match="finite"):
        codec.encode(kv)


def test_what_is_no_chunk_is_refused():
    codec = ChunkCodec("int8", head_dim=HEAD_DIM)
    for shape in ((1, 3, 64, 64), (2, 3, 64), (2, 3, 0, 64)):
        with pytest.raises(ConfigError, match="a chunk must be"):
            codec.num_bytes(shape, torch.bfloat16)
    with pytest.raises(ConfigError, match="33 is not heads of 32"):
        codec.num_bytes((2, 3, 64, 33), torch.bfloat16)
    with pytest.raises(ConfigError, match="dtype"):
        codec.num_bytes((2, 3, 64, 64), torch.int8)


def test_an_exception_while_a_chunk_is_sealed_leaves_a_codec_that_works(monkeypatch):
    codec, kv = ChunkCodec("int8", head_dim=HEAD_DIM), chunk(256)
    expected = codec.encode(kv)
    with monkeypatch.context() as patch:
        patch.setattr(
            "paged_kv.integrations.chunk_codec.store_tokens",
            lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt),
        )
        with pytest.raises(KeyboardInterrupt):
            codec.encode(kv)
    assert codec.encode(kv) == expected
    codec.decode(expected, torch.empty_like(kv))
