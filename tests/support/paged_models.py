"""Models on paged blocks that are full of NaN, and who was preempted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

import pytest
from transformers import PreTrainedModel

from paged_kv import LLM, SamplingParams
from paged_kv.blocks.block_manager import BlockManager
from paged_kv.blocks.step_plan import StepPlan
from paged_kv.scheduler.request import Request
from paged_kv.scheduler.scheduler import Scheduler

from .zoo import NUM_NEW_TOKENS

NAN_BYTE = 0xFF

POOL = 200  # native blocks: room for every sequence of a test at once


@pytest.fixture
def preempted(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """Requests in the order in which schedulers preempt them."""
    requests: list[Request] = []
    preempt = Scheduler._preempt

    def record(scheduler: Scheduler, request: Request) -> None:
        requests.append(request)
        preempt(scheduler, request)

    monkeypatch.setattr(Scheduler, "_preempt", record)
    return requests


@contextmanager
def scarce_blocks(every: int = 5) -> Iterator[None]:
    """Every so many steps of several sequences too few blocks are free, whatever the pool."""
    reserve, calls = BlockManager.reserve, count(1)

    def refuse(manager: BlockManager, *arguments: Any) -> StepPlan | None:
        if len(manager.living_seq_ids) > 1 and next(calls) % every == 0:
            return None
        return reserve(manager, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlockManager, "reserve", refuse)
        yield


def open_llm(model: PreTrainedModel, **settings: Any) -> LLM:
    """An LLM whose blocks are full of NaN: reading what was never written shows."""
    llm = LLM(model, **{"kv_format": "native", "max_num_seqs": 8, "num_blocks": POOL, **settings})
    for arena in llm.engine.cache.arenas:
        arena.fill_(NAN_BYTE)
    llm.engine.scheduler.steps_ahead = 0  # so that a small pool preempts
    return llm


def greedy(
    llm: LLM, prompts: Sequence[list[int]], num_new_tokens: int = NUM_NEW_TOKENS
) -> list[list[int]]:
    """Greedy tokens for each prompt, all at once; afterwards every block is free again."""
    outputs = llm.generate(prompts, SamplingParams(max_tokens=num_new_tokens), show_progress=False)
    llm.engine.scheduler.check_integrity()
    assert llm.engine.manager.num_free_blocks == llm.engine.manager.num_blocks
    return [output.token_ids for output in outputs]
