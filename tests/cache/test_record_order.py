"""Records of another order, as another device stores them: they read the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from paged_kv.blocks.token_chain import TokenChain, root_hash
from paged_kv.cache import transfer
from paged_kv.cache.backend import TORCH_BACKEND
from paged_kv.cache.block_views import layer_blocks
from paged_kv.cache.formats import INT2, INT4, INT8, NATIVE, RecordLayout
from paged_kv.cache.kv_cache import PagedKVCache
from paged_kv.cache.layer_spec import LayerSpec
from paged_kv.cache.transfer import SequenceData, export_sequence, import_sequence, reorder_records
from paged_kv.kernels.block_views import LayerBlocks
from tests.support.exported_sequences import (
    ALL_FORMATS,
    DTYPES,
    ORDERS,
    SharingFleet,
    assert_close,
    assert_equal,
    assert_refused,
    exported,
    forged,
    layers_of,
    parts_of,
    records_of,
    small_layer,
    state_of,
    tokens_of,
)
from tests.support.fleets import as_stored
from tests.support.kv_formats import FORMATS_BY_LABEL
from tests.support.token_streams import make_stream


def views_in_order(cache: PagedKVCache, arenas: list[torch.Tensor], order: str) -> list:
    """Views of `layer_blocks` over records that lie in the given order, whatever the device."""
    found = []
    for layer, arena in zip(cache.layers, arenas, strict=True):
        layout = layer.record_layout(cache.dtype)
        views = layer_blocks(arena, layer, cache.dtype, cache.geometry.open_block_size)
        found.append(with_order(views, arena, layout, order == transfer.CHANNEL_MAJOR_KEYS))
    return found


def with_order(
    views: LayerBlocks, arena: torch.Tensor, layout: RecordLayout, keys_are_channel_major: bool
) -> LayerBlocks:
    def strided(view: torch.Tensor, byte_offset: int, is_channel_major: bool) -> torch.Tensor:
        typed, (rows, dim) = arena.view(view.dtype), view.shape[2:]
        strides = (*typed.stride()[:2], *((1, rows) if is_channel_major else (dim, 1)))
        return typed.as_strided(view.shape, strides, byte_offset // view.itemsize)

    views = replace(views, open_keys=strided(views.open_keys, 0, keys_are_channel_major))
    if views.sealed is None:
        return views
    codes = {
        name: strided(
            getattr(views.sealed, name),
            layout.offset(name),
            keys_are_channel_major == (name in ("key_codes", "wide_codes")),
        )
        for name in layout.code_shapes
    }
    return replace(views, sealed=views.sealed._replace(**codes))


def ordered_views(views: LayerBlocks) -> dict[str, torch.Tensor]:
    """The views whose inner order follows the device."""
    found = {"open_keys": views.open_keys}
    if views.sealed is not None:
        names = ("key_codes", "wide_codes", "value_codes", "upper_value_codes")
        found |= {
            n: getattr(views.sealed, n) for n in names if getattr(views.sealed, n) is not None
        }
    return found


def gpu_like_fleet(layers: list[LayerSpec], **options) -> SharingFleet:
    """Stands for a fleet on a GPU: its views are those of one, its kernels take either order."""
    fleet = SharingFleet(layers, **options)
    cache = fleet.cache
    cache.backend = TORCH_BACKEND
    cache.records = views_in_order(cache, cache.arenas, transfer.CHANNEL_MAJOR_VALUES)
    return fleet


@ALL_FORMATS
def test_the_cpus_views_are_one_of_the_two_orders(kv_format):
    cache = PagedKVCache(layers_of(kv_format), num_blocks=3, dtype=torch.bfloat16)
    assert transfer.record_order_of(cache) == transfer.CHANNEL_MAJOR_KEYS
    for own, views, others in zip(
        cache.records,
        *(views_in_order(cache, cache.arenas, order) for order in ORDERS),
        strict=True,
    ):
        for name, view in ordered_views(views).items():
            own_view, other = ordered_views(own)[name], ordered_views(others)[name]
            assert own_view.data_ptr() == view.data_ptr() == other.data_ptr()
            assert own_view.shape == view.shape == other.shape
            assert own_view.stride() == view.stride() != other.stride()


@ALL_FORMATS
@pytest.mark.parametrize("order", ORDERS)
def test_reordered_records_read_the_same_and_come_back_the_same(kv_format, order):
    """Random bytes as the records of a sequence: head blocks, three of the body, two of the tail.

    Some are NaNs when read as numbers, so what they are made of is compared.
    """
    other = next(name for name in ORDERS if name != order)
    layers = layers_of(kv_format)
    start = PagedKVCache(layers, num_blocks=1, dtype=torch.bfloat16).geometry.num_head_blocks
    num_sealed = 0 if kv_format.is_native else 3
    cache = PagedKVCache(layers, num_blocks=start + num_sealed + 2, dtype=torch.bfloat16)
    is_sealed = torch.zeros(cache.num_blocks, dtype=torch.bool)
    is_sealed[start : start + num_sealed] = True
    generator = torch.Generator().manual_seed(1)
    arenas = [
        torch.randint(256, arena.shape, dtype=torch.uint8, generator=generator)
        for arena in cache.arenas
    ]

    def reordered(records: list[torch.Tensor], record_order: str) -> list[torch.Tensor]:
        turned = [record.clone() for record in records]
        sequence = SequenceData(
            tokens=TokenChain(tokens_of(1, 0), root_hash(cache.fingerprint())),
            num_computed_tokens=0,
            num_sealed=num_sealed,
            record_order=record_order,
        )
        for layer, record in enumerate(turned):
            reorder_records(cache, layer, record, sequence)
        return turned

    turned = reordered(arenas, order)
    assert_equal(reordered(turned, other), arenas)
    for before, after in zip(arenas, turned, strict=True):
        assert not torch.equal(before[is_sealed], after[is_sealed]) or not num_sealed
        assert not torch.equal(before[~is_sealed], after[~is_sealed])
    for before, after in zip(
        views_in_order(cache, arenas, order), views_in_order(cache, turned, other), strict=True
    ):
        pairs = [
            (before.open_keys[~is_sealed], after.open_keys[~is_sealed]),
            (before.open_values[~is_sealed], after.open_values[~is_sealed]),
        ]
        if num_sealed:
            pairs += [
                (view[is_sealed], other_view[is_sealed])
                for view, other_view in zip(before.sealed, after.sealed, strict=True)
                if view is not None
            ]
        for pair in pairs:
            assert torch.equal(*(view.contiguous().view(torch.uint8) for view in pair))


@DTYPES
@ALL_FORMATS
def test_import_from_a_device_with_the_other_order(kv_format, dtype):
    layers = layers_of(kv_format)
    stream = make_stream(layers, 900, 6, torch.float32)  # outputs of more digits than are stored
    on_cpu, back = (SharingFleet(layers, dtype=dtype) for _ in range(2))
    gpu_like, moved_on = (gpu_like_fleet(layers, dtype=dtype) for _ in range(2))
    assert transfer.record_order_of(gpu_like.cache) == transfer.CHANNEL_MAJOR_VALUES
    seq_id = on_cpu.add_tokens(stream, tokens_of(6, 900))
    on_cpu.step({seq_id: 500})
    data = on_cpu.export(seq_id)
    moved = gpu_like.take(data, stream)
    for ours, theirs in zip(records_of(gpu_like, moved), records_of(on_cpu, seq_id), strict=True):
        assert not torch.equal(ours, theirs)
    if not kv_format.is_native:
        assert not torch.equal(gpu_like.sealed_bytes(moved), on_cpu.sealed_bytes(seq_id))
    returned = back.take(gpu_like.export(moved), stream)
    assert_equal(records_of(back, returned), records_of(on_cpu, seq_id))
    assert back.export(returned) == data
    further = moved_on.take(gpu_like.export(moved), stream)
    for count in (1, 300, 1):
        expected = on_cpu.step({seq_id: count})[seq_id]
        assert_equal(back.step({returned: count})[returned], expected)
        outputs = gpu_like.step({moved: count})[moved]
        assert_close(outputs, expected)
        assert_equal(moved_on.step({further: count})[further], outputs)


def open_tokens(fleet: SharingFleet, seq_id: int, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [tokens, heads, dim] that the open blocks of a sequence hold."""
    manager, records = fleet.manager, fleet.cache.records[layer]
    block_ids = torch.as_tensor(manager.tables.head_and_tail_ids(seq_id), dtype=torch.int64)
    sealed_tokens = int(manager.num_sealed[seq_id]) * manager.geometry.block_size
    num_tokens = fleet.length(seq_id) - sealed_tokens
    return tuple(
        view[block_ids].transpose(1, 2).flatten(0, 1)[:num_tokens]
        for view in (records.open_keys, records.open_values)
    )


@DTYPES
@pytest.mark.parametrize(
    "kv_format",
    [*FORMATS_BY_LABEL.values(), NATIVE.with_options(block_size=1)],
    ids=[*FORMATS_BY_LABEL, "native-block1"],
)
def test_open_tokens_read_the_same_on_a_device_with_the_other_order(kv_format, dtype):
    """In the head, in a tail without a body, in head and tail: the stream's own tokens."""
    layers = layers_of(kv_format)
    on_cpu, back = (SharingFleet(layers, dtype=dtype, num_blocks=600) for _ in range(2))
    gpu_like = gpu_like_fleet(layers, dtype=dtype, num_blocks=600)
    num_head = on_cpu.manager.geometry.num_head_tokens
    for length in (3, 50, 500):
        stream = make_stream(layers, length, length, dtype)
        seq_id = on_cpu.add_tokens(stream, tokens_of(length, length))
        on_cpu.step({seq_id: length})
        moved = gpu_like.take(on_cpu.export(seq_id), stream)
        returned = back.take(gpu_like.export(moved), stream)
        num_sealed = int(on_cpu.manager.num_sealed[seq_id])
        positions = torch.arange(length)
        body_end = num_head + num_sealed * on_cpu.manager.geometry.block_size
        is_open = (positions < num_head) | (positions >= body_end)
        for layer in range(len(layers)):
            values = as_stored(stream.values[layer], kv_format, dtype)
            expected = [stream.keys[layer][is_open], values[is_open]]
            for fleet, its_seq_id in ((on_cpu, seq_id), (gpu_like, moved), (back, returned)):
                assert_equal([*open_tokens(fleet, its_seq_id, layer)], expected)


@pytest.mark.parametrize("kv_format", [NATIVE, INT2], ids=["native", "int2"])
def test_unknown_order_is_refused(kv_format):
    layer = small_layer(kv_format)
    header, body = parts_of(exported([layer]))
    assert header["record_order"] == transfer.CHANNEL_MAJOR_KEYS
    target = SharingFleet([layer])
    for order in ("rows first", None, 1, [transfer.CHANNEL_MAJOR_KEYS]):
        changed = forged(header | {"record_order": order}, body)
        assert_refused(target, changed, r"^header\.record_order is .*, which nobody can read$")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kv_format", [NATIVE, INT8, INT4, INT2], ids=lambda f: f.name)
def test_between_a_cpu_and_a_gpu(kv_format):
    layers = layers_of(kv_format)
    source = SharingFleet(layers)
    seq_id = source.add_tokens(make_stream(layers, 500, 6, torch.float32), tokens_of(6, 500))
    source.step({seq_id: 500})
    data = source.export(seq_id)
    cache = PagedKVCache(layers, num_blocks=100, dtype=torch.float32, device="cuda")
    manager = cache.new_manager(max_num_seqs=2, max_model_len=600)
    on_gpu = import_sequence(cache, manager, data)
    target = SharingFleet(layers)
    returned = import_sequence(
        target.cache, target.manager, export_sequence(cache, manager, on_gpu)
    )
    assert_equal(records_of(target, returned), records_of(source, seq_id))
    own_ids = torch.as_tensor(target.manager.block_ids(returned), dtype=torch.int64)
    gpu_ids = torch.as_tensor(manager.block_ids(on_gpu), dtype=torch.int64).cuda()
    start = source.manager.geometry.num_head_blocks
    body = slice(start, start + int(manager.num_sealed[on_gpu]))
    is_open = torch.ones(len(own_ids), dtype=torch.bool)
    is_open[body] = False
    for own, views in zip(target.cache.records, cache.records, strict=True):
        pair = views.open_keys[gpu_ids].cpu()[is_open], own.open_keys[own_ids][is_open]
        assert torch.equal(*(keys.contiguous().view(torch.uint8) for keys in pair))
        if views.sealed is not None:
            for name in ("key_codes", "value_codes"):
                codes = getattr(views.sealed, name)[gpu_ids[body]].cpu()
                assert torch.equal(codes, getattr(own.sealed, name)[own_ids[body]])


def test_nothing_refers_to_the_data_after_an_import():
    layer = small_layer()
    data = bytearray(exported([layer]))
    target = SharingFleet([layer], prefix_caching=True)
    seq_id = import_sequence(target.cache, target.manager, data)
    before = state_of(target)
    data[:] = bytes(len(data))
    data.clear()  # raises BufferError while something still looks into it
    assert state_of(target) == before
    assert target.length(seq_id) == 300
