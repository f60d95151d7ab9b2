"""Layers of several formats over the same blocks, those in full precision among them.

What forks, drafts and swaps do to such layers is tested beside all other formats, by `Twins`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from paged_kv.blocks.sink_window import SinkWindow
from paged_kv.cache import transfer
from paged_kv.cache.backend import choose_backend
from paged_kv.cache.formats import INT2, NATIVE
from paged_kv.cache.layer_formats import resolve_formats
from paged_kv.cache.layer_spec import LayerSpec
from paged_kv.cache.stored_context import StoredContext, read_blocks
from paged_kv.cache.transfer import reorder_records
from paged_kv.errors import ConfigError, TransferError
from paged_kv.kernels.full_precision import in_full_precision
from paged_kv.kernels.triton import plan as triton_plan
from tests.support import attention_oracle
from tests.support.arrays import ids
from tests.support.attention_oracle import check_step, tolerance
from tests.support.exported_sequences import (
    SharingFleet,
    assert_refused,
    forged,
    parts_of,
    tokens_of,
)
from tests.support.fleets import Fleet
from tests.support.token_streams import Stream, make_stream

INTERPRETED = (
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
)
BACKENDS = pytest.mark.parametrize(
    "backend", ["torch", "cpu", pytest.param("triton", marks=INTERPRETED)]
)
MIXTURE = resolve_formats("int2,0=native,2=int4,3=int8,-1=native")
NATIVE_LAYERS = (0, 4)
LIMITS = {"torch": 1e-5, "cpu": 1e-5, "triton": 2e-3}  # fp16 queries and weights of codes


def layers_of(*, heads: int = 2, key_dim: int = 32, value_dim: int = 16) -> list[LayerSpec]:
    make = partial(LayerSpec, num_kv_heads=heads, key_dim=key_dim, value_dim=value_dim)
    return [make(kv_format=each) for each in MIXTURE.of(5)]


@pytest.fixture(autouse=True)
def few_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes as long for a split without tokens as for one of them."""
    monkeypatch.setattr(triton_plan, "num_processors", lambda device: 1)


def fleet_on(backend: str, layers: list[LayerSpec], **options: object) -> Fleet:
    return switch(Fleet(layers, num_blocks=400, **options), backend)


def switch(fleet: Fleet, backend: str) -> Fleet:
    fleet.cache.backend = choose_backend(fleet.cache.device, backend)
    return fleet


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("torch", torch.float32),
        ("torch", torch.bfloat16),
        ("cpu", torch.float32),
        ("cpu", torch.bfloat16),
        pytest.param("triton", torch.float32, marks=INTERPRETED),
    ],
)
def test_every_layer_attends_to_what_it_stores(backend, dtype):
    """Chunks that end anywhere, decodes, and seals of one block and of several."""
    layers = layers_of()
    if backend == "triton":  # whose interpreter takes its time
        layers = layers_of(heads=1, key_dim=16)[:2]
    fleet = fleet_on(backend, layers, dtype=dtype)
    streams = [make_stream(layers, 700, seed, dtype, gqa_group=2) for seed in range(3)]
    first, second, third = (fleet.add(stream) for stream in streams)
    check = partial(check_step, fleet, limit=LIMITS[backend] + tolerance(dtype))
    if backend == "triton":
        switch(fleet, "torch").feed({first: [64], second: [130], third: [33, 262]})
        switch(fleet, backend)
    else:
        check({first: 1, second: 130, third: 33})
        check({first: 63, third: 262})
    check({first: 1, second: 1, third: 1})  # which seals
    check({first: 1, second: 1, third: 1})
    if backend != "triton":
        check({first: 70, second: 1, third: 200})
        check({first: 1, second: 1, third: 1})
    assert int(fleet.manager.num_sealed[third]) == (2 if backend == "triton" else 3)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_masks_and_soft_caps(backend):
    layers = layers_of()
    options = {"sliding_window": 70, "softcap": 3.0, "sink_logits": torch.tensor([0.5, 2.0] * 2)}
    fleet = fleet_on(backend, layers)
    one, other = (
        fleet.add(make_stream(layers, 400, seed, torch.float32, gqa_group=2)) for seed in range(2)
    )
    limit = LIMITS[backend] + tolerance(torch.float32)
    check_step(fleet, {one: 200, other: 31}, limit=limit, **options)
    check_step(fleet, {one: 1, other: 150}, limit=limit, **options)
    check_step(fleet, {one: 1, other: 1}, limit=limit, **options)


@BACKENDS
def test_streams_see_what_they_see_where_all_is_in_full_precision(backend):
    """Layers in full precision beside others, and the same layers alone."""
    layers = layers_of(heads=1, key_dim=16)
    mixed = fleet_on("torch", layers)
    own_format = NATIVE.with_options(block_size=mixed.manager.geometry.open_block_size)
    plain = fleet_on("torch", [replace(layers[0], kv_format=own_format)] * 2)
    window = SinkWindow(num_sink_tokens=4, window_size=130).fitted(mixed.manager.geometry)
    stream = make_stream(layers, 460, 1, torch.float32, gqa_group=2)
    stream.sink_queries = make_stream(layers, 460, 2, torch.float32, gqa_group=2).queries
    names = ("queries", "keys", "values", "sink_queries")
    own = Stream(*([getattr(stream, name)[layer] for layer in NATIVE_LAYERS] for name in names))
    seq_id, twin = mixed.add(stream, window), plain.add(own, window)
    while mixed.length(seq_id) < 456:
        if backend != "triton" or mixed.length(seq_id) > 410:
            switch(mixed, backend)
        for count in (37, 1):
            outputs, expected = mixed.step({seq_id: count}), plain.step({twin: count})
            for layer, other in zip(NATIVE_LAYERS, expected[twin], strict=True):
                error = (outputs[seq_id][layer] - other).norm() / other.norm()
                assert float(error) < 1e-5
    assert int(mixed.manager.num_evicted_tokens[seq_id]) == 256


def test_small_blocks_are_those_of_their_tokens():
    """The table of a layer in full precision, spelled out."""
    layers = layers_of()
    fleet = fleet_on("torch", layers)
    seq_id = fleet.add(make_stream(layers, 200, 1, torch.float32))
    fleet.step({seq_id: 190})
    geometry = fleet.manager.geometry
    size, num_small = geometry.open_block_size, geometry.open_blocks_per_block
    plan = fleet.plan({seq_id: 1})
    small = in_full_precision(fleet.cache.begin(plan).inputs)
    fleet.manager.rollback(plan)
    head, sealed = geometry.num_head_blocks, int(fleet.manager.num_sealed[seq_id])
    expected = [block * num_small for block in fleet.manager.block_ids(seq_id)[:head].tolist()]
    for block in fleet.manager.body_ids(seq_id).tolist():
        expected += range(block * num_small, (block + 1) * num_small)
    tail = fleet.manager.block_ids(seq_id)[head + sealed :].tolist()
    expected += [block * num_small for block in tail]
    assert small.block_table[0, : len(expected)].tolist() == expected
    assert len(expected) == -(-190 // size)
    assert (small.block_size, small.open_block_size, small.num_head_tokens) == (size, size, 0)
    assert small.num_sealed.tolist() == [0]


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_what_is_stored_can_be_read(backend):
    layers = layers_of()
    fleet = fleet_on(backend, layers, dtype=torch.bfloat16)
    seq_ids = [fleet.add(make_stream(layers, 300, seed, torch.bfloat16)) for seed in range(2)]
    fleet.step({seq_ids[0]: 287, seq_ids[1]: 100})
    columns = np.tile(np.arange(287), (2, 1))
    context = StoredContext.of(fleet.manager, ids(*seq_ids), columns, fleet.cache.device)
    for layer, spec in enumerate(layers):
        keys = torch.zeros(2, spec.num_kv_heads, 287, spec.key_dim)
        values = torch.zeros(2, spec.num_kv_heads, 287, spec.value_dim)
        context.read(fleet.cache, layer, keys, values)
        body = torch.as_tensor(fleet.manager.body_ids(seq_ids[0]), dtype=torch.int64)
        geometry = fleet.manager.geometry
        start, end = geometry.num_head_tokens, len(body) * geometry.block_size
        of_blocks = read_blocks(fleet.cache, layer, body, torch.float32)
        for row, seq_id in enumerate(seq_ids):
            for found, stored in zip((keys, values), fleet.context(seq_id, layer), strict=True):
                expected = torch.from_numpy(stored).transpose(0, 1)
                error = (found[row, :, : len(stored)] - expected).norm() / expected.norm()
                assert float(error) < 5e-3  # values that were rotated in bfloat16
        for found, whole in zip((keys, values), of_blocks, strict=True):
            flat = whole.flatten(0, 1).transpose(0, 1)
            assert torch.allclose(flat, found[0, :, start : start + end], atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_an_exported_sequence_goes_on_elsewhere(dtype):
    layers = layers_of()
    source, target, back = (SharingFleet(layers, dtype=dtype) for _ in range(3))
    stream = make_stream(layers, 500, 1, dtype, gqa_group=2)
    seq_id = source.add_tokens(stream, tokens_of(1, 500))
    source.feed({seq_id: [77, 1, 250]})
    data = source.export(seq_id)
    other = target.add_tokens(stream, tokens_of(2, 500))
    target.step({other: 99})
    copy = target.take(data, stream)
    assert back.export(back.take(target.export(copy), stream)) == data
    for count in (1, 60, 1):
        outputs, expected = target.step({copy: count})[copy], source.step({seq_id: count})[seq_id]
        assert all(map(torch.equal, outputs, expected))


def test_an_export_of_a_device_of_the_other_order_is_read():
    """Its small blocks are turned one by one."""
    layers = layers_of()
    fleet = SharingFleet(layers, dtype=torch.bfloat16)
    stream = make_stream(layers, 300, 1, torch.bfloat16)
    seq_id = fleet.add_tokens(stream, tokens_of(1, 300))
    fleet.step({seq_id: 300})
    data = fleet.export(seq_id)
    header, body = parts_of(data)
    sequence, sections = transfer.read_sequence(fleet.cache, fleet.manager, data, b"", ())
    parts = [body[: header["token_bytes"]]]
    for layer, section in enumerate(sections):
        shape = (-1, *fleet.cache.record_shapes[layer])
        records = torch.from_numpy(np.array(section).reshape(shape))
        reorder_records(fleet.cache, layer, records, sequence)
        parts.append(records.numpy().tobytes())
    turned = forged(header | {"record_order": transfer.CHANNEL_MAJOR_VALUES}, b"".join(parts))
    assert turned != data
    other = SharingFleet(layers, dtype=torch.bfloat16)
    copy = other.take(turned, stream)
    assert other.export(copy) == data
    # A row of a small block is a channel here and a token there.
    assert b"".join(parts)[header["token_bytes"] :][:64] != body[header["token_bytes"] :][:64]


def test_a_sealed_block_in_full_precision_that_is_not_finite_is_refused():
    layers = layers_of()
    fleet, target = SharingFleet(layers), SharingFleet(layers)
    seq_id = fleet.add_tokens(make_stream(layers, 200, 1, torch.float32), tokens_of(1, 200))
    fleet.step({seq_id: 200})
    header, body = parts_of(fleet.export(seq_id))
    geometry, record = fleet.manager.geometry, fleet.cache.arenas[0][0].nbytes
    for part in (0, 1, geometry.open_blocks_per_block - 1):  # of the first sealed block
        small = record // geometry.open_blocks_per_block // layers[0].num_kv_heads
        start = header["token_bytes"] + geometry.num_head_blocks * record + part * small
        bad = body[:start] + np.float32(np.nan).tobytes() + body[start + 4 :]
        assert_refused(target, forged(header, bad), "layer 0 are not all finite", TransferError)


def test_what_a_mixture_takes_is_the_sum_over_its_layers():
    mixed = Fleet(layers_of(), num_blocks=10).cache
    sizes = [arena[0].nbytes for arena in mixed.arenas]
    assert mixed.block_bytes == sum(sizes)
    assert sizes[0] == sizes[4] == 2 * 128 * (32 + 16) * 4
    assert sizes[1] < sizes[2] < sizes[3] < sizes[0]
    assert mixed.has_several_tables
    with pytest.raises(ConfigError, match="have no decode tables"):
        mixed.decode_tables(mixed.new_manager(max_num_seqs=1, max_model_len=100))
    assert not Fleet([attention_oracle.layer_of(INT2)], num_blocks=10).cache.has_several_tables
