"""What a router learns of our blocks: vLLM's cache manager and its events, no model."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request, RequestStatus

from paged_kv.blocks.retention import Retention
from paged_kv.cache.formats import FORMATS
from paged_kv.cache.layer_spec import LayerSpec
from tests.integrations.test_manager import spec_of

LONGEST = 700


class Router:
    """Believes what it is told: the blocks of each group, each behind one that it knows."""

    def __init__(self) -> None:
        self.blocks: dict[int, dict[int, tuple[Any, tuple[int, ...]]]] = {}

    def read(self, events: list[Any]) -> None:
        for event in events:
            if isinstance(event, AllBlocksCleared):
                self.blocks.clear()
                continue
            known = self.blocks.setdefault(event.group_idx, {})
            if isinstance(event, BlockRemoved):
                for block in event.block_hashes:
                    del known[block]
                continue
            assert isinstance(event, BlockStored)
            parent = event.parent_block_hash
            size = event.block_size
            assert len(event.token_ids) == size * len(event.block_hashes)
            assert len(event.extra_keys or event.block_hashes) == len(event.block_hashes)
            for number, block in enumerate(event.block_hashes):
                tokens = tuple(event.token_ids[number * size : (number + 1) * size])
                assert known.setdefault(block, (parent, tokens)) == (parent, tokens)
                parent = block

    def num_found(self, tokens: list[int], size: int, group: int) -> int:
        """How many tokens of a prompt it would say are there."""
        found = 0
        blocks = {value: block for block, value in self.blocks.get(group, {}).items()}
        parent = None
        for start in range(0, len(tokens), size):
            block = blocks.get((parent, tuple(tokens[start : start + size])))
            if block is None:
                break
            parent, found = block, start + size
        return found


class Engine:
    """vLLM's cache manager on our pages, as its scheduler calls it."""

    def __init__(self, name: str, windows: list[int | None], num_pages: int) -> None:
        specs = [
            spec_of(
                LayerSpec(
                    kv_format=FORMATS[name],
                    num_kv_heads=1,
                    key_dim=64,
                    value_dim=64,
                    retention=Retention.of_layer(window, None),
                ),
                torch.float32,
            )
            for window in windows
        ]
        self.geometry, self.size = specs[0].geometry, specs[0].block_size
        groups = [KVCacheGroupSpec([f"layers.{n}"], spec) for n, spec in enumerate(specs)]
        self.manager = KVCacheManager(
            KVCacheConfig(num_blocks=num_pages, kv_cache_tensors=[], kv_cache_groups=groups),
            max_model_len=LONGEST + 100,
            scheduler_block_size=self.size,
            hash_block_size=self.size,
            enable_kv_cache_events=True,
        )
        init_none_hash(sha256)
        self.hasher = get_request_block_hasher(self.size, sha256)
        self.router, self.whole = Router(), windows.index(None)
        self.num_made = 0

    def run(self, tokens: list[int], generator: random.Random) -> int:
        """A request to its end, its prompt in chunks; how much of it was found."""
        self.num_made += 1
        params = SamplingParams(max_tokens=50, ignore_eos=True)
        request = Request(str(self.num_made), tokens, params, None, block_hasher=self.hasher)
        computed, num_found, *_ = self.manager.get_computed_blocks(request)
        assert self.router.num_found(tokens, self.size, self.whole) >= num_found
        options = {"num_new_computed_tokens": num_found, "new_computed_blocks": computed}
        request.status = RequestStatus.RUNNING
        request.num_computed_tokens = num_found
        while request.num_output_tokens < 40:
            count = min(request.num_tokens - request.num_computed_tokens, 150)
            self.manager.new_step_starts()
            assert self.manager.allocate_slots(request, count, **options) is not None
            options = {}
            request.num_computed_tokens += count
            if request.num_computed_tokens == request.num_tokens:
                request.append_output_token_ids(generator.randrange(1000))
            self.router.read(self.manager.take_events())
        self.manager.free(request)
        self.router.read(self.manager.take_events())
        return int(num_found)


@pytest.mark.parametrize("name", ["native", "int8", "int2"])
@pytest.mark.parametrize("windows", [[None], [100, None]])
def test_a_router_knows_what_can_be_found_and_forgets_what_was_evicted(name, windows):
    """Prompts that begin alike up to any token, in a pool that a few of them fill."""
    engine, generator = Engine(name, windows, num_pages=150 * len(windows)), random.Random(name)
    openings = [[generator.randrange(1000) for _ in range(400)] for _ in range(4)]
    num_hit = 0
    for turn in range(150):
        opening = generator.choice(openings)[: generator.randrange(1, 400)]
        rest = [generator.randrange(1000) for _ in range(generator.randrange(1, 250))]
        num_hit += engine.run(opening + rest, generator) > 0
        if turn == 100:
            assert engine.manager.reset_prefix_cache()
    assert num_hit > 20
    pool, expected = engine.manager.block_pool, 0
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
    pages = [page for page in pool.blocks if page.block_hash is not None]
    pool.get_new_blocks(pool.get_num_free_blocks() - len(pages))  # what holds nothing
    assert sum(len(known) for known in engine.router.blocks.values()) >= len(pages)
    manager = engine.manager.coordinator.single_type_managers[0]
    while pool.get_num_free_blocks():  # evict the rest by our own manager
        manager.allocate_new_blocks(f"last {expected}", engine.size, engine.size)
        expected += 1
    engine.router.read(engine.manager.take_events())
    assert not any(engine.router.blocks.values())
