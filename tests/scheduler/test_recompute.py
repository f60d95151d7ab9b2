"""How many tokens are computed again where the pool is tight: counts of a simulation."""

from __future__ import annotations

import random
from typing import NamedTuple

import numpy as np
import pytest

from paged_kv.blocks.geometry import BlockGeometry
from paged_kv.scheduler.request import Request
from tests.support.scheduler_policies import assert_nothing_is_held, make_scheduler
from tests.support.scheduler_steps import geometry_of

NATIVE, SEALED = geometry_of(16, 16, 0, 0), geometry_of(64, 16, 16, 0)


class Drained(NamedTuple):
    tokens: float  # computed, for each that had to be
    num_steps: int
    least_steps: float  # in which no block of the pool is ever free


def drain(
    geometry: BlockGeometry, prompts: tuple[int, int], outputs: tuple[int, int], size: float
) -> Drained:
    """Serve 80 requests with a pool for so many of them, every one to its last token."""
    rng = random.Random(5)
    lengths = [(rng.randint(*prompts), rng.randint(*outputs)) for _ in range(80)]
    blocks = [geometry.max_blocks(prompt + output) for prompt, output in lengths]
    num_blocks = max(int(size * sum(blocks) / len(blocks)), max(blocks) + 1)
    scheduler = make_scheduler(
        geometry,
        num_blocks=num_blocks,
        max_num_seqs=64,
        max_model_len=1024,
        prefix_caching=False,
        token_budget=512,
        watermark=0.01,
        steps_ahead=48,
    )
    for index, (prompt, output) in enumerate(lengths):
        token_ids = np.full(prompt, index, dtype=np.int64)
        scheduler.add(Request(f"r{index}", token_ids, output))
    num_steps = 0
    while (step := scheduler.schedule()) is not None:
        num_steps += 1
        for request in scheduler.update(step, np.zeros(len(step.sampled_seq_ids), dtype=np.int64)):
            scheduler.finish(request)
    assert_nothing_is_held(scheduler)
    ideal = sum(prompt + output - 1 for prompt, output in lengths)
    held = sum(
        output * (geometry.max_blocks(prompt + output) + geometry.max_blocks(prompt)) / 2
        for prompt, output in lengths
    )
    computed = scheduler.statistics().num_scheduled_tokens
    return Drained(computed / ideal, num_steps, held / num_blocks)


@pytest.mark.parametrize(
    ("geometry", "prompts", "outputs", "size"),
    [
        (NATIVE, (8, 40), (200, 600), 8),
        (NATIVE, (20, 300), (20, 400), 8),
        (NATIVE, (300, 700), (20, 200), 6),
        (NATIVE, (100, 300), (100, 300), 2.5),
        (SEALED, (20, 300), (20, 400), 8),
        (SEALED, (8, 40), (200, 600), 8),
    ],
    ids=["long outputs", "mixed", "long prompts", "room for two", "sealed", "sealed, long outputs"],
)
def test_a_tight_pool_costs_few_tokens_twice_and_is_not_left_empty(
    geometry, prompts, outputs, size
):
    drained = drain(geometry, prompts, outputs, size)
    assert drained.tokens < 1.4
    assert drained.num_steps < 1.4 * drained.least_steps
