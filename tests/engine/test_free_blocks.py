"""What lies in blocks that nobody uses, or where nobody has written yet, changes no output."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from paged_kv import LLM, SamplingParams
from paged_kv.blocks.sink_window import SinkWindow
from paged_kv.blocks.step_plan import StepPlan
from paged_kv.engine.model_runner import ModelRunner
from tests.support.kv_formats import FORMATS_BY_LABEL
from tests.support.small_llm import assert_nothing_is_held, tokens_of

NAN_BYTE = 0xFF  # float32, bfloat16 and float16 of these bytes are NaN
SMALL_POOLS = {"native": 40, "int8": 16, "int2": 26}  # in which requests preempt each other


@pytest.fixture(scope="module")
def pristine() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        initializer_range=0.3,
        eos_token_id=None,
    )
    torch.manual_seed(1)
    return LlamaForCausalLM(config).eval()


def fill_unused(runner: ModelRunner, llm: LLM, plan: StepPlan) -> int:
    """NaN into blocks that are free, and into those that the step has just taken."""
    pool = llm.engine.manager.pool
    unused = (pool.ref_counts == 0) & ~pool.prefix_cache.is_cached
    unused[plan.new_block_ids] = True
    ids = torch.from_numpy(np.flatnonzero(unused))
    for arena in runner.cache.arenas:
        arena[ids] = NAN_BYTE
    return len(ids)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("label", FORMATS_BY_LABEL)
def test_nan_in_blocks_that_nobody_uses_changes_no_output(pristine, monkeypatch, backend, label):
    """Requests come, share, fork, are preempted and windowed, in a pool that is reused."""
    rng = random.Random(5)
    prompts = [[rng.randrange(64) for _ in range(n)] for n in (1, 40, 190, 131, 150, 230)]
    prompts[3] = prompts[2][:150]
    params = [
        SamplingParams(max_tokens=40),
        SamplingParams(max_tokens=30, temperature=1.0, seed=1, n=2),
        SamplingParams(max_tokens=50),
        SamplingParams(max_tokens=50),
        SamplingParams(max_tokens=60, sink_window=SinkWindow(0, 130)),
        SamplingParams(max_tokens=60),
    ]
    monkeypatch.setenv("PAGED_KV_BACKEND", backend)
    llm = LLM(
        copy.deepcopy(pristine),
        kv_format=FORMATS_BY_LABEL[label],
        num_blocks=SMALL_POOLS.get(label, 40),
        max_num_seqs=4,
        token_budget=100,
        swap_space="1MiB",
    )
    llm.engine.scheduler.steps_ahead = 0  # so that a small pool preempts
    expected = tokens_of(llm.generate(prompts, params))
    llm.reset_prefix_cache()
    run, num_filled = ModelRunner.run, 0

    def fill_and_run(self: ModelRunner, plan: StepPlan, *rest: Any) -> Any:
        nonlocal num_filled
        num_filled += fill_unused(self, llm, plan)
        return run(self, plan, *rest)

    monkeypatch.setattr(ModelRunner, "run", fill_and_run)
    assert tokens_of(llm.generate(prompts, params)) == expected
    assert num_filled > 300
    assert llm.statistics().num_preemptions or label not in SMALL_POOLS
    assert_nothing_is_held(llm)
    llm.close()
