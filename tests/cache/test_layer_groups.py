"""Layers that keep what they see beside layers that keep all: what they compute is the same.

Every block is full of NaN before it is used and once it is let go.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from paged_kv.blocks.retention import Retention
from paged_kv.blocks.sink_window import SinkWindow
from paged_kv.blocks.step_arrays import StepArrays
from paged_kv.cache.attention import paged_attention
from paged_kv.cache.backend import choose_backend
from paged_kv.cache.formats import FORMATS, INT2, INT8, NATIVE, KVFormat
from paged_kv.cache.layer_groups import find_groups, sequence_bytes
from paged_kv.cache.layer_spec import LayerSpec, keeping_all
from paged_kv.cache.step_staging import stage
from paged_kv.cache.transfer import export_sequence, import_sequence
from paged_kv.errors import ConfigError, InvalidStepError, TransferError
from paged_kv.kernels.triton import plan as triton_plan
from tests.support.attention_oracle import layer_of
from tests.support.exported_sequences import forged, parts_of
from tests.support.fleets import Fleet
from tests.support.token_streams import Stream, make_stream
from tests.support.transfers import TransferCounter

EVERYTHING = Retention()
SIZES = {"block_size": 64, "num_sink_tokens": 4, "min_tail_tokens": 32}
QUANTIZED = [INT8.with_options(**SIZES), INT2.with_options(**SIZES)]


def windowed(size: int) -> Retention:
    return Retention(window_size=size)


def chunked(size: int) -> Retention:
    return Retention(chunk_size=size)


class MaskedFleet(Fleet):
    """Layers of these formats whose masks are as `retentions` say, kept or not."""

    def __init__(
        self,
        kv_formats: list[KVFormat],
        retentions: list[Retention],
        *,
        keeps_all: bool = False,
        layers: list[LayerSpec] | None = None,
        **options,
    ) -> None:
        self.retentions = retentions
        layers = layers or [
            replace(layer_of(kv_format), retention=retention)
            for kv_format, retention in zip(kv_formats, retentions, strict=True)
        ]
        super().__init__(keeping_all(layers) if keeps_all else layers, **options)

    def masks(self, layer: int) -> dict[str, object]:
        unlimited, its = EVERYTHING.window_size, self.retentions[layer]
        return {
            "sliding_window": None if its.window_size == unlimited else its.window_size,
            "attention_chunk": None if its.chunk_size == unlimited else its.chunk_size,
        }


def both(kv_formats: list[KVFormat], retentions: list[Retention], **options) -> list[MaskedFleet]:
    return [
        MaskedFleet(kv_formats, retentions, keeps_all=keeps_all, num_blocks=400, **options)
        for keeps_all in (False, True)
    ]


def stream_of(fleet: MaskedFleet, seed: int, length: int) -> Stream:
    return make_stream(fleet.cache.layers, length, seed, torch.float32)


def assert_same(outputs: list[dict[int, list[torch.Tensor]]]) -> None:
    grouped, whole = outputs
    assert grouped.keys() == whole.keys()
    for seq_id, layers in grouped.items():
        for its, expected in zip(layers, whole[seq_id], strict=True):
            assert torch.isfinite(its).all()
            torch.testing.assert_close(its, expected, atol=2e-5, rtol=1e-5)


def step_both(fleets: list[MaskedFleet], counts: dict[int, int]) -> None:
    assert_same([fleet.step(counts) for fleet in fleets])
    for fleet in fleets:
        fleet.manager.check_integrity()


MIXES = {
    "a window": [EVERYTHING, windowed(40), windowed(40)],
    "two windows": [windowed(17), EVERYTHING, windowed(130)],
    "windows alone": [windowed(24), windowed(100)],
    "a window smaller than any block": [EVERYTHING, windowed(3)],
    "a window of one token": [windowed(1), EVERYTHING],
    "chunks": [chunked(48), EVERYTHING, chunked(64)],
    "a window in a chunk": [Retention(window_size=30, chunk_size=96), EVERYTHING],
}


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("kv_format", [NATIVE, *QUANTIZED], ids=lambda each: each.name)
@pytest.mark.parametrize("mix", MIXES)
def test_layers_compute_the_same_whatever_they_keep(backend, kv_format, mix):
    retentions = MIXES[mix]
    fleets = both([kv_format] * len(retentions), retentions, backend=backend)
    chosen = random.Random(mix)
    streams = [stream_of(fleets[0], seed, 700) for seed in range(3)]
    for fleet in fleets:
        for stream in streams:
            fleet.add(stream)
    left = [650, 400, 90]
    while any(left):
        ahead = {n: min(k, chosen.choice([1, 1, 2, 33, 64, 150])) for n, k in enumerate(left) if k}
        step_both(fleets, ahead)
        left = [k - ahead.get(n, 0) for n, k in enumerate(left)]
    for fleet in fleets:
        for seq_id in range(3):
            fleet.remove(seq_id)
        assert fleet.manager.num_free_blocks == 400


@pytest.mark.parametrize("kv_format", [NATIVE, QUANTIZED[0]], ids=lambda each: each.name)
@pytest.mark.parametrize("size", [15, 16, 17, 31, 32, 33, 63, 64, 65, 79, 80, 81])
def test_windows_at_every_offset_around_block_edges(kv_format, size):
    """One token a step over the edges of blocks that are let go."""
    fleets = both([kv_format] * 2, [EVERYTHING, windowed(size)])
    stream = stream_of(fleets[0], 5, 400)
    for fleet in fleets:
        fleet.add(stream)
    step_both(fleets, {0: 200})
    for _ in range(90):
        step_both(fleets, {0: 1})


def test_native_layers_beside_quantized_ones_in_groups():
    kv_formats = [INT8, NATIVE, INT8, NATIVE]
    sizes = [each.with_options(**SIZES) for each in kv_formats]
    fleets = both(sizes, [EVERYTHING, windowed(50), windowed(50), EVERYTHING], dtype=torch.bfloat16)
    stream = make_stream(fleets[0].cache.layers, 500, 7, torch.bfloat16)
    for fleet in fleets:
        fleet.add(stream)
    for count in (300, 1, 70, *([1] * 20)):
        outputs = [fleet.step({0: count}) for fleet in fleets]
        for its, expected in zip(*(each[0] for each in outputs), strict=True):
            torch.testing.assert_close(its, expected, atol=2e-3, rtol=2e-2)


@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("kv_format", [NATIVE, QUANTIZED[0]], ids=lambda each: each.name)
def test_triton_kernels_read_the_tables_of_their_group(kv_format, monkeypatch):
    """Interpreted where there is no GPU; contexts are fed by torch's kernels."""
    monkeypatch.setattr(triton_plan, "num_processors", lambda device: 1)
    fleets = both([kv_format] * 2, [EVERYTHING, windowed(20)])
    stream = stream_of(fleets[0], 9, 300)
    for fleet in fleets:
        fleet.add(stream)
    step_both(fleets, {0: 150})
    fleets[0].cache.backend = choose_backend(fleets[0].cache.device, "triton")
    for count in (1, 15):
        outputs = [fleet.step({0: count}) for fleet in fleets]
        for its, expected in zip(*(each[0] for each in outputs), strict=True):
            torch.testing.assert_close(its, expected, atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize("kv_format", [NATIVE, QUANTIZED[0]], ids=lambda each: each.name)
@pytest.mark.parametrize("sink_window", [SinkWindow(4, 100), SinkWindow(16, 64)])
def test_a_window_of_ones_own_on_top_of_the_layers(kv_format, sink_window):
    """It counts where it reaches less far than the layers' own; beside a sequence without one."""
    retentions = [EVERYTHING, windowed(300), windowed(70), windowed(20)]
    fleets = both([kv_format] * 4, retentions)
    streams = [stream_of(fleets[0], seed, 800) for seed in (21, 22)]
    for fleet in fleets:
        fleet.add(streams[0], sink_window)
        fleet.add(streams[1])
    fitted = fleets[0].manager.fitted_window(sink_window)
    step_both(fleets, {0: fitted.num_visible_tokens, 1: 300})
    for count in (60, 1, 1, 90, 1, 128, 64, 1, 1, 1):
        step_both(fleets, {0: count, 1: 1})
    lengths = fleets[0].manager.stored_lengths(0)
    assert len({its.num_stored + its.num_evicted for its in lengths}) == 1
    assert [its.num_evicted > 0 for its in lengths] == [True] * 4


def test_values_of_another_size_than_keys():
    """As latent attention (MLA) has them."""
    layers = [
        replace(layer_of(QUANTIZED[0], key_dim=64, value_dim=32), retention=each)
        for each in (EVERYTHING, windowed(50))
    ]
    fleets = both([QUANTIZED[0]] * 2, [EVERYTHING, windowed(50)], layers=layers)
    stream = stream_of(fleets[0], 13, 400)
    for fleet in fleets:
        fleet.add(stream)
    for count in (250, 1, 100, 1):
        step_both(fleets, {0: count})


# -- what is kept ---------------------------------------------------------------------------------


def specs(kv_format: KVFormat, retentions: list[Retention]) -> list[LayerSpec]:
    return [replace(layer_of(kv_format), retention=each) for each in retentions]


GEMMA3 = [EVERYTHING if layer % 6 == 5 else windowed(1024) for layer in range(26)]
GPT_OSS = [windowed(128) if layer % 2 == 0 else EVERYTHING for layer in range(24)]


@pytest.mark.parametrize(
    ("retentions", "sizes", "most"), [(GEMMA3, [4] * 7, 0.25), (GPT_OSS, [12] * 2, 0.51)]
)
@pytest.mark.parametrize("kv_format", ["native", "int8", "int2"])
def test_what_a_sequence_holds_is_what_the_arithmetic_says(retentions, sizes, most, kv_format):
    """Gemma 3 (26 layers, 22 of them with a window) and gpt-oss (every other layer)."""
    layers, dtype, length = specs(FORMATS[kv_format], retentions), torch.bfloat16, 32768
    groups = find_groups(layers, dtype)
    counts = [len(groups.layers_of(group)) for group in range(len(groups.retentions))]
    assert len(counts) == len(sizes)
    assert sum(counts) == len(layers)
    assert max(counts) == len(groups.slot_bytes) == sizes[0]
    record = layers[0].num_kv_heads * layers[0].record_layout(dtype).record_bytes
    assert groups.block_bytes == sizes[0] * record
    held = sequence_bytes(layers, dtype, length)
    assert held <= most * sequence_bytes(keeping_all(layers), dtype, length)


def test_blocks_hold_one_group_whatever_lies_in_its_slots():
    """Larger records take larger slots, small blocks slots of their own."""
    kv_formats = [each.with_options(**SIZES) for each in (INT8, INT2, NATIVE, INT2)]
    retentions = [EVERYTHING, EVERYTHING, windowed(40), windowed(40)]
    layers = [
        replace(layer_of(kv_format), retention=retention)
        for kv_format, retention in zip(kv_formats, retentions, strict=True)
    ]
    groups = find_groups(layers, torch.bfloat16)
    assert groups.group_of_layer == (0, 0, 1, 1)
    assert len(set(groups.slot_of_layer[:2])) == len(set(groups.slot_of_layer[2:])) == 2
    sizes = [each.num_kv_heads * each.record_layout(torch.bfloat16).record_bytes for each in layers]
    for size, slot in zip(sizes, groups.slot_of_layer, strict=True):
        assert groups.slot_bytes[slot] >= size


# -- sequences on their way -----------------------------------------------------------------------


def fed(kv_format: KVFormat, length: int) -> list[MaskedFleet]:
    fleets = both([kv_format] * 3, [EVERYTHING, windowed(40), chunked(64)])
    stream = stream_of(fleets[0], 11, length + 200)
    for fleet in fleets:
        fleet.add(stream)
    step_both(fleets, {0: length})
    return fleets


@pytest.mark.parametrize("kv_format", [NATIVE, QUANTIZED[1]], ids=lambda each: each.name)
@pytest.mark.parametrize("length", [130, 300, 333])
def test_forks_go_on_by_themselves(kv_format, length):
    fleets = fed(kv_format, length)
    for fleet in fleets:
        child = fleet.manager.fork(0)
        fleet.streams[child] = fleet.streams[0]
    for counts in ({0: 1, 1: 5}, {0: 1}, {1: 70}, {0: 90, 1: 1}):
        step_both(fleets, counts)


@pytest.mark.parametrize("kv_format", [NATIVE, QUANTIZED[1]], ids=lambda each: each.name)
@pytest.mark.parametrize("length", [20, 130, 333])
def test_exported_sequences_go_on_elsewhere(kv_format, length):
    fleets = fed(kv_format, length)
    data = export_sequence(fleets[0].cache, fleets[0].manager, 0)
    kept = export_sequence(fleets[1].cache, fleets[1].manager, 0)
    assert len(data) < len(kept) or length == 20
    target = MaskedFleet([kv_format] * 3, fleets[0].retentions, num_blocks=400)
    copy = import_sequence(target.cache, target.manager, data)
    target.streams[copy] = fleets[0].streams[0]
    assert target.manager.stored_lengths(copy) == fleets[0].manager.stored_lengths(0)
    for count in (1, 70, 1):
        step_both([target, fleets[1]], {0: count})
    with pytest.raises(TransferError, match=r"header.groups is .*the last "):
        import_sequence(target.cache, target.manager, kept)
    with pytest.raises(TransferError, match=r"header.groups is .*the last "):
        import_sequence(fleets[1].cache, fleets[1].manager, data)
    assert "retention=Retention(" in repr(target.cache.layers[-1])
    assert "retention" not in repr(fleets[1].cache.layers[0])


def test_exports_that_lack_what_is_still_seen_are_refused():
    fleet = fed(NATIVE, 333)[0]
    data = export_sequence(fleet.cache, fleet.manager, 0)
    header, body = parts_of(data)
    assert header["num_evicted_tokens"] == [0, 320, 288]  # the window reaches least far
    target = MaskedFleet([NATIVE] * 3, fleet.retentions, num_blocks=400)
    others = ([0, 320, 304], [16, 320, 288], [0, 320, 280], [0, 304, 288], [0, 320], "all")
    for evicted in (*others, [0, 320, -16], [True, 320, 288]):
        wrong = forged({**header, "num_evicted_tokens": evicted}, body)
        with pytest.raises(TransferError, match="num_evicted_tokens"):
            import_sequence(target.cache, target.manager, wrong)
    assert target.manager.num_free_blocks == 400


def test_the_arrays_of_all_groups_travel_in_one_copy():
    fleet = fed(QUANTIZED[0], 150)[0]
    plan = fleet.plan({0: 40})
    for part, tables in zip(plan.parts, fleet.cache._tables, strict=True):
        tables.apply(part)
    arrays = [
        StepArrays.from_plan(fleet.cache.geometry, part, tables)
        for part, tables in zip(plan.parts, fleet.cache._tables, strict=True)
    ]
    with TransferCounter() as counter:
        staged = stage(fleet.cache.geometry, plan, arrays, {}, torch.device("meta"))
    assert len(counter.to_device) == 1
    assert not counter.to_host
    assert len(staged.inputs) == 3
    for inputs, its in zip(staged.inputs, arrays, strict=True):
        assert inputs.block_table.shape == its.block_table.shape


# -- misuse ---------------------------------------------------------------------------------------


def test_masks_that_show_what_is_not_kept_are_refused():
    fleet = MaskedFleet([NATIVE] * 2, [windowed(40), chunked(64)])
    fleet.add(stream_of(fleet, 1, 10))
    step = fleet.cache.begin(fleet.plan({0: 1}))
    layer = fleet.cache.layers[0]
    tensors = [torch.zeros(1, layer.num_kv_heads, layer.key_dim) for _ in range(3)]
    for window in (None, 41):
        with pytest.raises(ConfigError, match=f"sliding_window must be at most 40.*{window}"):
            paged_attention(*tensors, fleet.cache, 0, step, sliding_window=window)
    with pytest.raises(ConfigError, match="attention_chunk must be at most 64"):
        paged_attention(*tensors, fleet.cache, 1, step)


def test_a_manager_of_other_groups_cannot_hand_out_the_blocks():
    grouped, whole = both([NATIVE] * 2, [EVERYTHING, windowed(40)])
    whole.add(stream_of(whole, 1, 10))
    with pytest.raises(InvalidStepError, match="groups of layers"):
        grouped.cache.begin(whole.plan({0: 1}))
