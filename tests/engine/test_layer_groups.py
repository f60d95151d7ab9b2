"""Models most of whose layers see a window: they hold less, and say what `generate` says."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    PreTrainedModel,
)

from paged_kv import LLM, BeamSearchParams, DraftModel, SamplingParams
from paged_kv.cache.layer_groups import find_groups
from paged_kv.cache.layer_spec import keeping_all
from paged_kv.models.huggingface import PagedModel
from tests.support import paged_models
from tests.support.paged_models import open_llm, scarce_blocks

preempted = paged_models.preempted

VOCAB, NEW = 300, 12
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 65536,
    "eos_token_id": None,
    "pad_token_id": 0,
    "initializer_range": 0.4,
}


def gemma3(**changes) -> PreTrainedModel:
    """26 layers, five of six with a window of 1024 tokens."""
    torch.manual_seed(3)
    shape = {"num_hidden_layers": 26, "sliding_window": 1024, **SHAPE, **changes}
    return Gemma3ForCausalLM(Gemma3TextConfig(**shape)).eval()


def gpt_oss(**changes) -> PreTrainedModel:
    """24 layers, every other with a window of 128 tokens."""
    torch.manual_seed(4)
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1}
    shape = {"num_hidden_layers": 24, "sliding_window": 128, **experts, **SHAPE, **changes}
    return GptOssForCausalLM(GptOssConfig(**shape)).eval()


def prompt(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCAB, (length,), generator=generator).tolist()


@torch.inference_mode()
def generated(model: PreTrainedModel, token_ids: list[int], num_new: int = NEW) -> list[int]:
    """What `generate` continues a prompt with, greedily."""
    ids = torch.tensor([token_ids])
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_new, do_sample=False
    )
    return found[0, len(token_ids) :].tolist()


def greedy(llm: LLM, prompts: list[list[int]]) -> list[list[int]]:
    params = SamplingParams(max_tokens=NEW, temperature=0)
    outputs = llm.generate(prompts, params, show_progress=False)
    llm.engine.scheduler.check_integrity()
    return [output.token_ids for output in outputs]


@pytest.mark.parametrize(
    ("make", "lengths"), [(gemma3, [1500, 1100, 40]), (gpt_oss, [700, 300, 40])]
)
def test_tokens_are_those_of_generate(make, lengths):
    """Chunks, preemption, prefixes that are shared and found again, all at once."""
    model = make()
    start = prompt(lengths[0], 1)
    prompts = [start, start[: lengths[1]] + prompt(50, 2), prompt(lengths[2], 3)]
    expected = [generated(model, each) for each in prompts]
    with open_llm(model, num_blocks=2000, token_budget=256, prefix_caching=True) as llm:
        manager = llm.engine.manager
        assert len(manager.groups) > 1
        with scarce_blocks(7):
            assert greedy(llm, prompts) == expected
        hits = manager.prefix_statistics.num_hit_tokens
        assert greedy(llm, prompts) == expected
        found = manager.prefix_statistics.num_hit_tokens - hits
        assert found >= sum(map(len, prompts)) - 16 * len(prompts)
        assert manager.num_free_blocks == manager.num_blocks


@pytest.mark.parametrize("make", [gemma3, gpt_oss])
def test_what_is_held_is_what_the_arithmetic_says(make):
    model, length = make(), 2000
    with open_llm(model, num_blocks=3000, token_budget=128, kv_format="int8") as llm:
        cache, manager = llm.engine.cache, llm.engine.manager
        greedy(llm, [prompt(length, 5)])
        stored = length + NEW - 1
        chunk = -(-128 // cache.geometry.open_block_size) + 2  # in one group, while it is stored
        counts = [each.max_blocks(cache.geometry, stored) for each in cache.groups.retentions]
        assert manager.pool.peak_allocated <= sum(counts) + chunk * len(counts)
        assert cache.groups == find_groups(cache.layers, cache.dtype)
        alone = cache.geometry.max_blocks(stored)
        assert manager.pool.peak_allocated < len(counts) * alone


def test_forks_guesses_and_swaps_say_the_same(preempted):
    model = gpt_oss(num_hidden_layers=4)
    start = prompt(250, 9)
    prompts = [start + start[:40], prompt(330, 10), prompt(200, 11)]
    expected = [generated(model, each) for each in prompts]
    with open_llm(model, speculation=DraftModel(model=deepcopy(model))) as llm:
        assert greedy(llm, prompts) == expected
        assert llm.engine.scheduler.statistics().num_accepted_tokens > NEW
    with open_llm(model, swap_space="64MiB") as llm, scarce_blocks(4):
        assert greedy(llm, prompts) == expected
        assert preempted
        params = SamplingParams(max_tokens=NEW, temperature=0, n=3)
        (output,) = llm.generate(prompts[:1], params, show_progress=False)
        assert [each.token_ids for each in output.completions] == [expected[0]] * 3
        assert llm.engine.manager.num_free_blocks == llm.engine.manager.num_blocks
    with open_llm(model) as llm:
        params = BeamSearchParams(num_beams=3, max_tokens=NEW)
        found = llm.beam_search(prompts[:1], params)
        assert llm.engine.manager.num_free_blocks == llm.engine.manager.num_blocks
    ids = torch.tensor(prompts[:1])
    with torch.inference_mode():
        beams = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW,
            num_beams=3,
            do_sample=False,
        )
    assert found[0].completions[0].token_ids == beams[0, len(prompts[0]) :].tolist()


@pytest.mark.parametrize("kv_format", ["int8", "int2"])
def test_layers_in_groups_say_what_layers_that_keep_all_say(kv_format, monkeypatch):
    """Quantized, with and without letting go."""
    model, prompts = gpt_oss(num_hidden_layers=4), [prompt(600, 7), prompt(450, 8)]
    with open_llm(model, num_blocks=900, kv_format=kv_format, token_budget=100) as llm:
        assert len(llm.engine.manager.groups) == 2
        tokens = greedy(llm, prompts)
    layers = PagedModel.layers
    monkeypatch.setattr(PagedModel, "layers", lambda *which: keeping_all(layers(*which)))
    with open_llm(model, num_blocks=900, kv_format=kv_format, token_budget=100) as llm:
        assert len(llm.engine.manager.groups) == 1
        assert greedy(llm, prompts) == tokens
