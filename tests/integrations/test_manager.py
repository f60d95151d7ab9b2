"""vLLM's real block pool and our manager, step by step beside a cache of our own; no model."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.v1.core.block_pool import BlockPool

from paged_kv.blocks.retention import Retention
from paged_kv.cache.attention import paged_attention
from paged_kv.cache.embedding import EmbeddedLayer, step_from_block_table
from paged_kv.cache.formats import FORMATS
from paged_kv.cache.kv_cache import PagedKVCache
from paged_kv.cache.layer_spec import LayerSpec, cache_geometry
from paged_kv.integrations.vllm.backend import num_shared
from paged_kv.integrations.vllm.manager import PagedKVManager
from paged_kv.integrations.vllm.spec import PagedKVSpec, PagedKVWindowSpec
from paged_kv.integrations.vllm.windows import PagedKVWindowManager, WindowTables
from paged_kv.kernels.new_tokens import NewTokens
from paged_kv.kernels.rules import ScoreRules

CPU, SIZE, NUM_PAGES, LONGEST, NUM_ROWS = torch.device("cpu"), 64, 1500, 1500, 8


def spec_of(layer: LayerSpec, dtype: torch.dtype) -> PagedKVSpec | PagedKVWindowSpec:
    geometry, retention = cache_geometry([layer], dtype), layer.retention
    window = {} if retention.keeps_all else {"sliding_window": retention.window_size}
    return (PagedKVWindowSpec if window else PagedKVSpec)(
        **window,
        block_size=geometry.open_block_size,
        num_kv_heads=layer.num_kv_heads,
        head_size=SIZE,
        dtype=dtype,
        tokens_per_state=geometry.open_block_size,
        state_content_bytes=layer.record_layout(dtype).record_bytes,
        layer=layer,
        geometry=geometry,
        model_itemsize=dtype.itemsize,
    )


class Engine:
    """vLLM's scheduler and tables as far as our manager sees them, beside our own cache.

    Pages that nobody holds are full of NaN.
    """

    def __init__(self, layer: LayerSpec, dtype: torch.dtype) -> None:
        self.window = None if layer.retention.keeps_all else layer.retention.window_size
        self.spec, self.geometry = spec_of(layer, dtype), cache_geometry([layer], dtype)
        size = self.geometry.open_block_size
        self.pool = BlockPool(num_gpu_blocks=NUM_PAGES, enable_caching=False, hash_block_size=size)
        self.held: set[int] = set()
        self.most_pages = 0  # of one request
        self.manager = (PagedKVWindowManager if self.window else PagedKVManager)(
            self.spec,
            block_pool=self.pool,
            enable_caching=False,
            kv_cache_group_id=0,
            scheduler_block_size=size,
        )
        shape = (NUM_PAGES, layer.num_kv_heads, layer.record_layout(dtype).record_bytes)
        self.arena = torch.full(shape, 255, dtype=torch.uint8)  # reads as NaN
        self.embedded = EmbeddedLayer(self.arena, layer, dtype, self.geometry)
        self.cache = PagedKVCache([layer], num_blocks=NUM_PAGES, dtype=dtype)
        self.own = self.cache.new_manager(max_num_seqs=NUM_ROWS, max_model_len=LONGEST + 700)
        self.table = np.zeros((NUM_ROWS, LONGEST // size + 100), dtype=np.int32)
        self.live: dict[str, SimpleNamespace] = {}

    def add(self, name: str) -> None:
        row = min(set(range(NUM_ROWS)) - {request.row for request in self.live.values()})
        seq_id = self.own.add_sequence()
        self.live[name] = SimpleNamespace(row=row, length=0, seq_id=seq_id, pages=0)
        self.manager.num_cached_block[name] = 0

    def allocate(self, name: str, new: int) -> None:
        """As `Scheduler` and `BlockTable.append_row`: a row only ever grows."""
        request, total = self.live[name], self.live[name].length + new
        self.manager.remove_skipped_blocks(name, request.length)
        lengths = (request.length, request.length, total)
        needed = self.manager.get_num_blocks_to_allocate(name, total, (), *lengths)
        before = self.pool.get_num_free_blocks()
        blocks = self.manager.allocate_new_blocks(name, total, total)
        assert before - self.pool.get_num_free_blocks() == needed
        ids = [block.block_id for block in blocks]
        self.table[request.row, request.pages : request.pages + len(ids)] = ids
        request.pages += len(ids)
        held = sum(not block.is_null for block in self.manager.req_to_blocks[name])
        self.most_pages = max(self.most_pages, held)

    def step(self, counts: dict[str, int], generator: torch.Generator) -> int:
        """Both sides compute the same tokens: equal to the bit. Returns the number of seals."""
        requests = [self.live[name] for name in counts]
        new = np.array(list(counts.values()))
        plan = self.own.reserve(np.array([request.seq_id for request in requests]), new)
        assert plan is not None
        for name, count in counts.items():
            self.allocate(name, count)
        held = {block.block_id for block in self.pool.blocks if block.ref_cnt}
        self.arena[list(self.held - held)] = 255
        self.held = held
        starts = np.concatenate([[0], np.cumsum(new)])
        seq_lens = np.array([request.length for request in requests]) + new
        table = self.table[[request.row for request in requests]]
        shared = num_shared(self.geometry, seq_lens - new, table)
        if self.window:
            tables = WindowTables(seq_lens, table, shared)
            seq_lens, table, shared = tables.behind(self.geometry, self.window, new)
        step = step_from_block_table(self.geometry, starts, seq_lens, table, CPU, min_sealed=shared)
        query, key, value = (
            torch.randn(int(starts[-1]), heads, SIZE, generator=generator) for heads in (6, 2, 2)
        )
        rules = ScoreRules(0.125, sliding_window=self.window)
        plan_of_kernels = self.embedded.backend.plan(step)
        given = self.embedded.attend_and_store(NewTokens(query, key, value), plan_of_kernels, rules)
        begun = self.cache.begin(plan)
        own = paged_attention(
            query, key, value, self.cache, 0, begun, scale=0.125, sliding_window=self.window
        )
        self.own.commit(plan)
        assert torch.equal(given, own)
        for request, count in zip(requests, new.tolist(), strict=True):
            request.length += count
        return len(step.seal_block_ids)

    def finish(self, name: str) -> None:
        """What was sealed is equal to the bit, and no page is held that need not be."""
        request = self.live.pop(name)
        num_sealed = int(self.geometry.num_sealed_blocks(np.array([request.length]))[0])
        places = self.geometry.body_places(np.arange(num_sealed))
        theirs = self.table[request.row, places].astype(np.int64)
        ours = self.own.tables.body_ids(request.seq_id).astype(np.int64)
        theirs = theirs[len(theirs) - len(ours) :]  # less what a window let go
        assert torch.equal(self.arena[theirs], self.cache.arenas[0][ours])
        self.manager.remove_skipped_blocks(name, request.length)
        held = sum(not block.is_null for block in self.manager.req_to_blocks[name])
        assert held == self.spec.layer.retention.blocks_held(self.geometry, request.length)
        self.manager.free(name)
        self.own.remove_sequence(request.seq_id)


WINDOWS = {"native": 40, "int8": 1, "int4": 300, "k4v2": 17, "int2": 100, "kivi2": 3}


@pytest.mark.parametrize(
    ("name", "window"), [*((name, None) for name in FORMATS), *WINDOWS.items()]
)
def test_random_steps_give_the_bytes_of_our_own_cache(name, window):
    retention = Retention.of_layer(window, None)
    layer = LayerSpec(
        kv_format=FORMATS[name], num_kv_heads=2, key_dim=SIZE, value_dim=SIZE, retention=retention
    )
    engine, rng = Engine(layer, torch.float32), random.Random(name)
    generator, num_seals = torch.Generator().manual_seed(0), 0
    for turn in range(1000):
        if len(engine.live) < 4 and (not engine.live or rng.random() < 0.5):
            engine.add(f"request {turn}")
        names = [name for name in engine.live if rng.random() < 0.9] or list(engine.live)
        sizes = [1, 1, 1, 1, 1, 1, 7, 40, 130, 300]
        num_seals += engine.step({name: rng.choice(sizes) for name in names}, generator)
        for name in [name for name in engine.live if engine.live[name].length > LONGEST - 200]:
            engine.finish(name)
    for name in list(engine.live):
        engine.finish(name)
    assert engine.pool.get_num_free_blocks() == NUM_PAGES - 1
    assert num_seals > 0 or not engine.geometry.seals
    if window is not None:
        assert engine.most_pages <= engine.spec.max_admission_blocks_per_request(300, LONGEST, 1)
