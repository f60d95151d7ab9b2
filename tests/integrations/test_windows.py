"""Layers with a window inside vLLM: what they give back, and what others find of it."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from paged_kv.cache.formats import FORMATS
from paged_kv.cache.layer_spec import LayerSpec, cache_geometry
from paged_kv.errors import ConfigError
from paged_kv.integrations.vllm.spec import PagedKVPages
from paged_kv.integrations.vllm.windows import PagedKVWindowManager, num_let_go
from tests.support.random_models import save_model
from tests.support.vllm_job import first_difference, own_rounds, vllm_answer

GENERATOR = random.Random(3)
OPENING = [GENERATOR.randrange(5, 2000) for _ in range(900)]
PROMPTS = [
    OPENING[:start] + [GENERATOR.randrange(5, 2000) for _ in range(length)]
    for start, length in ((0, 40), (400, 300), (900, 200), (900, 500), (0, 700))
]
SHORT = [OPENING[:20] + [GENERATOR.randrange(5, 2000) for _ in range(20)] for _ in range(30)]
LONG = {"max_model_len": 2200}
POOL = 12_000_000  # bytes: the longest request, and some


class Pages:
    """A pool of which some links are found, each as a page that says which link it is."""

    null_block = "null"

    def __init__(self, found: set[int]) -> None:
        self.found = found  # places where links end

    def get_cached_block(self, block_hash: int, group_ids: list[int]) -> list[str] | None:
        is_found = block_hash in self.found
        return [f"{group} {block_hash}" for group in group_ids] if is_found else None


@pytest.mark.parametrize("name", ["native", "int8", "int2", "kivi2"])
def test_a_hit_is_the_longest_of_which_all_is_there_that_is_seen(name):
    layer = LayerSpec(kv_format=FORMATS[name], num_kv_heads=1, key_dim=64, value_dim=64)
    geometry, rng = cache_geometry([layer], torch.float32), random.Random(name)
    size, num_head = geometry.open_block_size, geometry.num_head_blocks
    lengths = set()
    for _ in range(600):
        num_tokens, window = rng.randrange(1, 3000), rng.choice([1, 2, 64, 65, 100, 129, 700])
        num_hashes = num_tokens // size
        ends = [geometry.link_end(link + 1) // size for link in range(num_hashes)]
        pages = Pages({end for end in ends if rng.random() < rng.choice([0.9, 0.99])})
        most = rng.choice([num_tokens - 1, num_tokens - 1, rng.randrange(num_tokens)])
        spec = SimpleNamespace(geometry=geometry, block_size=size, sliding_window=window)
        found, length = PagedKVWindowManager.find_longest_cache_hit(
            list(range(1, num_hashes + 1)), most, [3, 5], pages, spec
        )
        expected = {0: []}
        for links in range(1, geometry.num_shareable_links(num_tokens) + 1):
            end = geometry.link_end(links)
            body = np.array([max(links - num_head, 0)])
            gone = int(num_let_go(geometry, window, np.array([end]), body)[0])
            seen = [link for link in range(links) if not num_head <= link < num_head + gone]
            if end <= most and all(ends[link] in pages.found for link in seen):
                expected[end] = [(ends[link - 1] if link else 0, ends[link]) for link in seen]
        longest = max(expected)
        if most == num_tokens - 1:  # else it may be a block shorter, where the length is not known
            assert length == longest or length == longest - geometry.block_size
        assert length in expected
        lengths.add(length)
        for group, blocks in zip((3, 5), found, strict=True):
            table = ["null"] * (length // size)
            for place, end in expected[length]:
                table[place] = f"{group} {end}"
            assert blocks == table
    assert len(lengths) > 10


def test_layers_of_different_heads_are_refused():
    specs = [SimpleNamespace(layer=1), SimpleNamespace(layer=2)]
    with pytest.raises(ConfigError, match="same heads"):
        PagedKVPages.merge(specs)


@pytest.mark.parametrize("kv_format", ["native", "int2"])
def test_a_prefix_is_found_of_which_a_window_keeps_only_the_end(kv_format, tmp_path):
    """Twice over: the second round finds what the first has published before it let go of it.

    Prompts that share nothing: our own engine finds what others store in the same step.
    """
    prompts = [PROMPTS[0], PROMPTS[3], PROMPTS[4]]
    model, options = save_model("gemma3", tmp_path), {"rounds": 2, **LONG}
    answer = vllm_answer(
        prompts, model=model, kv_format=kv_format, enable_prefix_caching=True, **options
    )
    assert answer.num_hit_tokens > 1700
    expected = own_rounds(prompts, kv_format, model=model, prefix_caching=True, **options)
    assert first_difference(answer, expected) is None


def test_chunks_aborts_and_a_full_pool_change_no_token(tmp_path):
    """Asynchronous steps in chunks of 192 tokens, the prefix cache on, and preemptions."""
    model = save_model("gemma3", tmp_path)
    whole = vllm_answer(PROMPTS + SHORT, model=model, **LONG).rounds[0]
    options = {"max_num_batched_tokens": 192, "enable_prefix_caching": True, **LONG}
    crowded = vllm_answer(
        PROMPTS + SHORT,
        model=model,
        kv_format="native",
        aborted={1: 5},
        async_scheduling=True,
        kv_cache_memory_bytes=POOL,
        **options,
    )
    assert crowded.preempted
    assert crowded.num_hit_tokens > 0
    cut = crowded.rounds[0]
    assert [cut[0], *cut[2:]] == [whole[0], *whole[2:]]
    assert cut[1] == whole[1][: len(cut[1])]


def test_a_long_request_holds_what_its_windows_see(tmp_path):
    """3000 tokens; five layers of six have a window of 70."""
    model = save_model("gemma3", tmp_path)
    prompt = [[GENERATOR.randrange(5, 2000) for _ in range(3000)]]
    options = {"model": model, "max_model_len": 3200, "max_num_batched_tokens": 128}
    for kv_format, gain in {"int2": 2.0}.items():
        given_back, kept = (
            vllm_answer(
                prompt, kv_format=kv_format, disable_hybrid_kv_cache_manager=is_kept, **options
            )
            for is_kept in (False, True)
        )
        assert given_back.peak_bytes * gain < kept.peak_bytes
        assert first_difference(given_back, kept.rounds) is None
