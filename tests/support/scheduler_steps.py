"""A scheduler, requests whose tokens tell them apart, and a model that only counts: whole steps."""

from __future__ import annotations

import numpy as np
import pytest

from paged_kv.blocks.block_manager import BlockManager
from paged_kv.blocks.geometry import BlockGeometry
from paged_kv.scheduler.request import Request, RequestStatus
from paged_kv.scheduler.scheduler import Scheduler
from paged_kv.scheduler.step import ScheduledStep


def geometry_of(block: int, open_block: int, head: int, min_tail: int) -> BlockGeometry:
    return BlockGeometry(
        block_size=block,
        open_block_size=open_block,
        num_head_tokens=head,
        min_tail_tokens=min_tail,
    )


NATIVE = geometry_of(16, 16, 0, 0)

QUANTIZED = geometry_of(128, 16, 16, 32)

NO_HEAD_NO_TAIL = geometry_of(64, 32, 0, 0)

TINY = geometry_of(4, 2, 2, 3)  # every boundary within a few tokens, a tail of part of a block

GEOMETRIES = {
    "native": NATIVE,
    "quantized": QUANTIZED,
    "no-head-no-tail": NO_HEAD_NO_TAIL,
    "tiny": TINY,
}

every_geometry = pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())


def make_scheduler(
    geometry: BlockGeometry = NATIVE,
    *,
    num_blocks: int = 200,
    max_num_seqs: int = 8,
    max_model_len: int = 1024,
    token_budget: int = 64,
    steps_ahead: int = 0,
) -> Scheduler:
    manager = BlockManager(
        geometry, num_blocks=num_blocks, max_num_seqs=max_num_seqs, max_model_len=max_model_len
    )
    return Scheduler(manager, token_budget=token_budget, steps_ahead=steps_ahead)


def make_request(
    request_id: str, prompt_length: int, max_tokens: int = 4, priority: int = 0
) -> Request:
    """A prompt whose tokens tell requests and positions apart."""
    tokens = [token_of(request_id, position) for position in range(prompt_length)]
    return Request(
        request_id=request_id, prompt_token_ids=tokens, max_tokens=max_tokens, priority=priority
    )


def token_of(request_id: str, position: int) -> int:
    return sum(request_id.encode()) * 100_003 + position


def add(scheduler: Scheduler, *args: object, **options: object) -> Request:
    request = make_request(*args, **options)
    scheduler.add(request)
    return request


def counts_of(scheduler: Scheduler, step: ScheduledStep) -> dict[str, int]:
    """New tokens of each request in a step."""
    by_seq_id = {request.seq_id: request.request_id for request in running(scheduler)}
    return {
        by_seq_id[seq_id]: count
        for seq_id, count in zip(
            step.plan.seq_ids.tolist(), step.plan.num_scheduled_tokens.tolist(), strict=True
        )
    }


def running(scheduler: Scheduler) -> list[Request]:
    return [r for r in scheduler._requests.values() if r.status is RequestStatus.RUNNING]


def complete(scheduler: Scheduler, step: ScheduledStep) -> list[Request]:
    """The model ran: every sampled request gets its next token; finishes those at their limit."""
    sampled = [token_of(r.request_id, len(r.token_ids)) for r in step.sampled_requests]
    at_limit = scheduler.update(step, np.array(sampled, dtype=np.int64))
    for request in at_limit:
        scheduler.finish(request)
    return at_limit


def run_step(scheduler: Scheduler) -> dict[str, int]:
    """One whole step; new tokens of each request in it."""
    step = scheduler.schedule()
    assert step is not None
    counts = counts_of(scheduler, step)
    complete(scheduler, step)
    scheduler.check_integrity()
    return counts


def drain(scheduler: Scheduler, max_steps: int = 10_000) -> list[Request]:
    """Run until nothing is left; requests in the order in which they finished."""
    finished: list[Request] = []
    for _ in range(max_steps):
        step = scheduler.schedule()
        if step is None:
            return finished
        finished += complete(scheduler, step)
    raise AssertionError(f"unfinished after {max_steps} steps")


def assert_nothing_is_held(scheduler: Scheduler) -> None:
    scheduler.check_integrity()
    assert not scheduler.has_unfinished
    assert scheduler.num_running == scheduler.num_waiting == 0
    assert scheduler.manager.num_free_blocks == scheduler.manager.num_blocks
    assert scheduler.manager.num_free_seqs == scheduler.manager.max_num_seqs


def two_that_outgrow_the_pool(first_priority: int = 0) -> tuple[Scheduler, Request, Request]:
    """Both hold 2 of 4 blocks, and the next step needs a third for each."""
    scheduler = make_scheduler(num_blocks=4)
    a = add(scheduler, "a", 16, max_tokens=40, priority=first_priority)
    b = add(scheduler, "b", 16, max_tokens=40)
    for _ in range(17):
        assert set(run_step(scheduler)) == {"a", "b"}
    assert scheduler.manager.num_free_blocks == 0
    return scheduler, a, b
