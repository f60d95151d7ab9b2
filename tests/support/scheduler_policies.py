"""Schedulers with every policy to choose, and requests by name."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from paged_kv.blocks.block_manager import BlockManager
from paged_kv.blocks.geometry import BlockGeometry
from paged_kv.blocks.token_chain import ExtraKey
from paged_kv.scheduler.request import Request
from paged_kv.scheduler.scheduler import Scheduler
from paged_kv.scheduler.step import Fork, ScheduledStep
from tests.support.block_contents import BlockContents, prefix_values
from tests.support.scheduler_steps import complete, counts_of, geometry_of, token_of

N = geometry_of(4, 4, 0, 0)

GEOMETRIES = {
    "native": N,
    "sealed": geometry_of(8, 4, 4, 2),
    "tiny": geometry_of(4, 2, 2, 3),
    "no head, no tail": geometry_of(8, 2, 0, 0),
}

LONG_TAIL = geometry_of(4, 2, 2, 9)  # longer than two blocks, which then seal in one step

every_geometry = pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)


def make_scheduler(
    geometry: BlockGeometry = N,
    *,
    num_blocks: int = 100,
    max_num_seqs: int = 8,
    max_model_len: int = 500,
    num_host_blocks: int = 0,
    prefix_caching: bool = True,
    **options: float | None,
) -> Scheduler:
    """With a `token_budget` of 64 and nothing kept for growth, where `options` say nothing else."""
    manager = BlockManager(
        geometry,
        num_blocks=num_blocks,
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        prefix_caching=prefix_caching,
        num_host_blocks=num_host_blocks,
    )
    return Scheduler(manager, **{"token_budget": 64, "watermark": 0.0, "steps_ahead": 0, **options})


def add(
    scheduler: Scheduler,
    request_id: str,
    prompt: int | Sequence[int],
    max_tokens: int = 4,
    priority: int = 0,
    extra_keys: Sequence[ExtraKey] = (),
) -> Request:
    """Queue a request; a length as prompt makes one that no other request shares."""
    if isinstance(prompt, int):
        prompt = [token_of(request_id, position) for position in range(prompt)]
    request = Request(
        request_id=request_id,
        prompt_token_ids=prompt,
        max_tokens=max_tokens,
        priority=priority,
        extra_keys=extra_keys,
    )
    scheduler.add(request)
    return request


def run_step(scheduler: Scheduler) -> dict[str, int]:
    """One whole step; new tokens of each request in it."""
    step = scheduler.schedule()
    assert step is not None
    counts = counts_of(scheduler, step)
    complete(scheduler, step)
    scheduler.check_integrity()
    return counts


def names(requests: Sequence[Request]) -> list[str]:
    return [request.request_id for request in requests]


def assert_nothing_is_held(scheduler: Scheduler) -> None:
    manager = scheduler.manager
    scheduler.check_integrity()
    assert not scheduler.has_unfinished
    assert scheduler.num_running == scheduler.num_waiting == 0
    assert manager.num_free_blocks == manager.num_blocks
    assert manager.num_free_seqs == manager.max_num_seqs
    assert manager.host_pool is None or manager.host_pool.num_allocated == 0
    assert manager.prefix_cache is None or not manager.prefix_cache._pending


# -- who makes room -------------------------------------------------------------------------------


def four_that_outgrow_the_pool(**options: object) -> tuple[Scheduler, dict[str, Request]]:
    """Each holds 2 of 8 blocks; the next token of each needs a third. Ranks: a, d, b, c."""
    scheduler = make_scheduler(num_blocks=8, **options)
    priorities = {"a": 0, "b": 1, "c": 1, "d": 0}
    requests = {name: add(scheduler, name, 4, 20, p) for name, p in priorities.items()}
    for _ in range(5):
        assert set(run_step(scheduler)) == set(priorities)
    assert scheduler.manager.num_free_blocks == 0
    assert scheduler.manager.num_computed_tokens[:4].tolist() == [8] * 4
    return scheduler, requests


# -- waiting for a prefix -------------------------------------------------------------------------

PROMPT = list(range(1000, 1033))  # 33 tokens: 8 blocks that can be shared, and a token


# -- swapped or computed again --------------------------------------------------------------------


def two_of_which_one_makes_room(**options: object) -> tuple[Scheduler, Request, Request]:
    """Both hold 3 of 6 blocks with 12 tokens in them, and have sampled a 13th."""
    options = {"num_host_blocks": 50, **options}
    scheduler = make_scheduler(num_blocks=6, **options)
    a, b = add(scheduler, "a", 4, 20), add(scheduler, "b", 4, 20)
    for _ in range(9):
        assert set(run_step(scheduler)) == {"a", "b"}
    assert scheduler.manager.num_computed_tokens[[a.seq_id, b.seq_id]].tolist() == [12, 12]
    assert scheduler.manager.num_free_blocks == 0
    return scheduler, a, b


def follow(scheduler: Scheduler, contents: BlockContents, step: ScheduledStep) -> None:
    """Do what a step orders, in the order in which it has to be done."""
    for copy in step.swap_outs:
        contents.swap_out(copy.device_block_ids, copy.host_block_ids)
    for copy in step.swap_ins:
        contents.swap_in(copy.device_block_ids, copy.host_block_ids)
    manager, plan = scheduler.manager, step.plan
    values = [
        prefix_values(
            manager.token_ids[seq_id, : start + count].tolist(), salt_of(scheduler, seq_id)
        )[start:]
        for seq_id, start, count in zip(
            plan.seq_ids.tolist(),
            plan.context_lens.tolist(),
            plan.num_scheduled_tokens.tolist(),
            strict=True,
        )
    ]
    contents.apply(plan, np.concatenate(values))


def check_contents(scheduler: Scheduler, contents: BlockContents) -> None:
    contents.poison_free()
    for seq_id in scheduler.manager.living_seq_ids.tolist():
        contents.check(seq_id, salt_of(scheduler, seq_id))


def salt_of(scheduler: Scheduler, seq_id: int) -> int:
    """The salts of these tests are numbers."""
    return sum(map(int, scheduler._running.by_seq_id[seq_id].extra_keys))


# -- abort ----------------------------------------------------------------------------------------


def fork_at_the_prompt(
    scheduler: Scheduler, parent: Request, children: Sequence[str], max_tokens: int = 9
) -> list[Request]:
    """Run steps until the parent samples, then fork it; children are returned as they are."""
    while True:
        step = scheduler.schedule()
        if parent in step.sampled_requests:
            break
        complete(scheduler, step)
    made = [child_of(parent, name, max_tokens) for name in children]
    update(scheduler, step, [Fork(parent, child, first_token(child)) for child in made])
    return made


def child_of(parent: Request, name: str, max_tokens: int = 9, priority: int = 0) -> Request:
    return Request(
        request_id=name,
        prompt_token_ids=parent.token_ids,
        max_tokens=max_tokens,
        priority=priority,
        extra_keys=parent.extra_keys,
    )


def first_token(request: Request) -> int:
    return token_of(request.request_id, request.num_prompt_tokens)


def update(scheduler: Scheduler, step: ScheduledStep, forks: Sequence[Fork] = ()) -> list[Request]:
    """The model ran; finishes and returns those at their limit."""
    sampled = [token_of(r.request_id, r.num_tokens) for r in step.sampled_requests]
    at_limit = scheduler.update(step, np.array(sampled, dtype=np.int64), forks)
    for request in at_limit:
        scheduler.finish(request)
    scheduler.check_integrity()
    return at_limit
