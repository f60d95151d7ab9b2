"""Another engine's arenas, tables and steps: the bytes and outputs of a cache of one's own."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
import triton

from paged_kv.blocks.geometry import BlockGeometry
from paged_kv.cache.attention import paged_attention
from paged_kv.cache.backend import choose_backend
from paged_kv.cache.embedding import EmbeddedLayer, step_from_block_table, warm_up
from paged_kv.cache.formats import INT2, INT4, INT8, NATIVE
from paged_kv.cache.kv_cache import PagedKVCache
from paged_kv.cache.layer_spec import LayerSpec, cache_geometry
from paged_kv.errors import ConfigError
from paged_kv.kernels.new_tokens import NewTokens
from paged_kv.kernels.rules import ScoreRules
from tests.support.calibrations import calibrated
from tests.support.kv_formats import FORMATS_BY_LABEL

CPU = torch.device("cpu")
SIZE = 32
NUM_PAGES = 600
INTERPRETED = [
    pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="needs TRITON_INTERPRET=1"),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]


class Engine:
    """A table that only grows, and pages that are taken back once their tokens are sealed."""

    def __init__(self, geometry: BlockGeometry, num_seqs: int) -> None:
        self.geometry = geometry
        self.free = np.random.default_rng(0).permutation(np.arange(1, NUM_PAGES)).tolist()
        self.table = np.zeros((num_seqs, 1000), dtype=np.int32)
        self.num_places = [0] * num_seqs

    def grow(self, row: int, length: int, new_length: int) -> None:
        places = np.arange(self.num_places[row])
        given_back = ~self.geometry.is_place_needed(places, length) & (self.table[row, places] > 0)
        self.free.extend(self.table[row, places[given_back]].tolist())
        self.table[row, places[given_back]] = 0
        held = int((self.table[row] > 0).sum())
        assert held == self.geometry.blocks_held(length)
        end = self.geometry.table_width(new_length)
        places = np.arange(self.num_places[row], end)
        for place in places[self.geometry.is_place_needed(places, new_length)]:
            self.table[row, place] = self.free.pop()
        self.num_places[row] = end


def layer_of(kv_format, kv_heads=2):
    layer = LayerSpec(kv_format=kv_format, num_kv_heads=kv_heads, key_dim=SIZE, value_dim=SIZE)
    return calibrated(layer) if kv_format.wants_calibration else layer


def check_against_own_cache(layer, dtype, backend_name, turns):
    geometry, layout = cache_geometry([layer], dtype), layer.record_layout(dtype)
    backend = choose_backend(CPU, backend_name)
    generator = torch.Generator().manual_seed(1)
    # The middle of a larger allocation, with stale bytes that read as NaN.
    whole = torch.full((NUM_PAGES + 7, layer.num_kv_heads, layout.record_bytes), 255).byte()
    embedded = EmbeddedLayer(whole[5:-2], layer, dtype, geometry, backend)
    engine = Engine(geometry, 3)
    cache = PagedKVCache([layer], num_blocks=NUM_PAGES, dtype=dtype, backend=backend_name)
    manager = cache.new_manager(max_num_seqs=3, max_model_len=2000)
    seq_ids = [manager.add_sequence() for _ in range(3)]
    lengths, num_seals = np.zeros(3, dtype=np.int64), 0
    for turn in turns:
        counts = np.array(turn)
        plan = manager.reserve(np.array(seq_ids), counts)
        assert plan is not None
        for row in range(3):
            engine.grow(row, int(lengths[row]), int(lengths[row] + counts[row]))
        starts = np.concatenate([[0], np.cumsum(counts)])
        step = step_from_block_table(geometry, starts, lengths + counts, engine.table, CPU)
        num_seals += len(step.seal_block_ids)
        query, key, value = (
            torch.randn(int(starts[-1]), heads, SIZE, generator=generator)
            for heads in (layer.num_kv_heads * 2, layer.num_kv_heads, layer.num_kv_heads)
        )
        out = torch.empty_like(query)
        given = embedded.attend_and_store(
            NewTokens(query, key, value), backend.plan(step), ScoreRules(SIZE**-0.5), out=out
        )
        assert given is out
        expected = paged_attention(query, key, value, cache, 0, cache.begin(plan))
        manager.commit(plan)
        lengths += counts
        assert torch.equal(out, expected)
        for row, seq_id in enumerate(seq_ids):
            num_sealed = geometry.num_sealed_blocks(lengths)[row]
            ours = manager.tables.body_ids(seq_id).astype(np.int64)
            theirs = engine.table[row, geometry.body_places(np.arange(num_sealed))].astype(int)
            assert torch.equal(whole[5:-2][theirs], cache.arenas[0][ours])
    assert (whole[:5] == 255).all()
    assert (whole[-2:] == 255).all()
    assert num_seals > 0 or not geometry.seals


TURNS = [(300, 1, 40), (1, 1, 1), (129, 400, 1), (1, 130, 300), *[(1, 1, 1)] * 30]


@pytest.mark.parametrize(
    ("backend", "dtype"), [("torch", torch.float32), ("cpu", torch.bfloat16)], ids=["torch", "cpu"]
)
@pytest.mark.parametrize("kv_format", FORMATS_BY_LABEL.values(), ids=FORMATS_BY_LABEL)
def test_outputs_and_sealed_bytes_are_those_of_a_cache(kv_format, backend, dtype):
    check_against_own_cache(layer_of(kv_format), dtype, backend, TURNS)


@pytest.mark.parametrize("kv_format", [INT8, INT2], ids=lambda f: f.name)
@pytest.mark.parametrize("backend", [pytest.param("triton", marks=INTERPRETED)])
def test_a_gpu_seals_in_place_as_well(kv_format, backend):
    turns = [(200, 1, 40), (1, 1, 1), (1, 60, 150)]
    check_against_own_cache(layer_of(kv_format, kv_heads=1), torch.float32, backend, turns)


@pytest.mark.parametrize("kv_format", [INT8, INT4, INT2], ids=lambda f: f.name)
def test_a_shared_prefix_is_sealed_to_its_end(kv_format):
    """A lone sequence of its length would keep its last block open."""
    layer = layer_of(kv_format)
    geometry = cache_geometry([layer], torch.float32)
    length = geometry.num_head_tokens + 2 * geometry.block_size
    table = np.arange(1, 1 + geometry.table_width(length + 1))[None]
    step = step_from_block_table(
        geometry, np.array([0, 1]), np.array([length + 1]), table, CPU, min_sealed=np.array([2])
    )
    assert step.num_sealed.tolist() == [2]
    assert not len(step.seal_block_ids)
    after = geometry.num_head_tokens + 3 * geometry.block_size + geometry.min_tail_tokens
    table = np.arange(1, 1 + geometry.table_width(after))[None]
    step = step_from_block_table(
        geometry,
        np.array([0, after - length]),
        np.array([after]),
        table,
        CPU,
        min_sealed=np.array([2]),
    )
    assert step.seal_block_ids.tolist() == [table[0, geometry.body_places(np.array(2))]]


def test_a_step_that_cannot_be_is_refused():
    geometry = cache_geometry([layer_of(INT8)], torch.float32)
    table = np.zeros((1, 2), dtype=np.int32)
    with pytest.raises(ConfigError, match=r"block tables of 2 places for 500 tokens"):
        step_from_block_table(geometry, np.array([0, 1]), np.array([500]), table, CPU)
    with pytest.raises(ConfigError, match=r"query_start_loc must be ascending"):
        step_from_block_table(geometry, np.array([0, 5]), np.array([4]), table, CPU)


def test_an_arena_that_is_none_is_refused():
    layer = layer_of(INT8)
    geometry = cache_geometry([layer], torch.float32)
    size = layer.record_layout(torch.float32).record_bytes
    with pytest.raises(ConfigError, match=rf"\(num_blocks, 2, {size}\), got torch.uint8 of \(4,"):
        EmbeddedLayer(torch.zeros(4, 2, 16).byte(), layer, torch.float32, geometry)
    arena = torch.zeros(8, 2, size).byte()
    for other in (arena[::2], arena.flatten()[8 : 8 + 2 * size].view(1, 2, size)):
        with pytest.raises(ConfigError, match=r"contiguous and start at a multiple of 16 bytes"):
            EmbeddedLayer(other, layer, torch.float32, geometry)
    native = cache_geometry([layer_of(NATIVE)], torch.float32)
    with pytest.raises(ConfigError, match=r"cannot have blocks of"):
        EmbeddedLayer(arena, layer, torch.float32, native)


def test_tensors_of_another_step_or_precision_are_refused():
    layer = layer_of(INT8)
    geometry = cache_geometry([layer], torch.float32)
    arena = torch.zeros(8, 2, layer.record_layout(torch.float32).record_bytes).byte()
    embedded = EmbeddedLayer(arena, layer, torch.float32, geometry)
    step = step_from_block_table(
        geometry, np.array([0, 1]), np.array([1]), np.ones((1, 1), dtype=np.int32), CPU
    )
    plan, one = embedded.backend.plan(step), torch.zeros(1, 2, SIZE)
    with pytest.raises(ConfigError, match=r"key must have shape"):
        embedded.attend_and_store(NewTokens(one, one[:, :1], one), plan, ScoreRules(1.0))
    with pytest.raises(ConfigError, match=r"out must be torch.float32 of shape"):
        embedded.attend_and_store(
            NewTokens(one, one, one), plan, ScoreRules(1.0), out=torch.zeros(1, 3, SIZE)
        )
    assert not arena.any()


def test_kernels_are_compiled_before_there_is_an_arena():
    for kv_format in (NATIVE, INT2):
        warm_up(layer_of(kv_format), torch.bfloat16, CPU)


@pytest.mark.parametrize("kv_format", [INT8, INT2], ids=lambda kv_format: kv_format.name)
@pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="needs TRITON_INTERPRET=1")
@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_gpu_is_given_a_step_in_one_copy_and_waited_for_by_nobody(kv_format):
    """A prompt, and decode steps of which one seals a block where its own tokens are."""
    from tests.support.pretend_gpu import GPU, pretend_gpu

    layer, geometry = (
        layer_of(kv_format, 1),
        cache_geometry([layer_of(kv_format, 1)], torch.float32),
    )
    record_bytes = layer.record_layout(torch.float32).record_bytes
    sealed_at = geometry.num_head_tokens + geometry.min_tail_tokens + geometry.block_size
    lengths = [0, sealed_at - 1, sealed_at, sealed_at + 1]
    table = np.arange(geometry.table_width(lengths[-1]))[None].astype(np.int32)
    num_seals = []
    with pretend_gpu() as gpu:
        arena = torch.zeros(table.size, 1, record_bytes, dtype=torch.uint8, device=GPU)
        embedded = EmbeddedLayer(arena, layer, torch.float32, geometry)
        for before, after in pairwise(lengths):
            count = after - before
            new = NewTokens(*(torch.ones(count, 1, SIZE, device=GPU) for _ in range(3)))
            with gpu.watching() as traffic:
                starts, ends = np.array([0, count]), np.array([after])
                step = step_from_block_table(geometry, starts, ends, table, GPU)
                plan = embedded.backend.plan(step)
                output = embedded.attend_and_store(new, plan, ScoreRules(SIZE**-0.5))
            num_seals.append(len(step.seal_block_ids))
            assert traffic.waits == []
            assert traffic.to_host == 0
            assert output.cpu().isfinite().all()
    assert num_seals == [0, 1, 0]
    assert traffic.to_device == 1
