"""Abort in every state that a request can be in."""

from __future__ import annotations

import pytest

from paged_kv.scheduler.request import Request, RequestStatus
from paged_kv.scheduler.scheduler import Scheduler
from tests.support.scheduler_policies import (
    PROMPT,
    add,
    assert_nothing_is_held,
    every_geometry,
    fork_at_the_prompt,
    make_scheduler,
    run_step,
    update,
)
from tests.support.scheduler_steps import drain, token_of


def reach_waiting(scheduler: Scheduler) -> Request:
    return add(scheduler, "target", 20)


def reach_waiting_for_a_prefix(scheduler: Scheduler) -> Request:
    add(scheduler, "leader", PROMPT)
    target = add(scheduler, "target", PROMPT)
    scheduler.cancel(scheduler.schedule())
    assert target.status is RequestStatus.WAITING
    return target


def reach_mid_prefill(scheduler: Scheduler) -> Request:
    target = add(scheduler, "target", 90)
    run_step(scheduler)
    assert 0 < scheduler.manager.num_computed_tokens[target.seq_id] < 90
    return target


def reach_decoding(scheduler: Scheduler) -> Request:
    target = add(scheduler, "target", 5, max_tokens=60)
    while target.num_output_tokens < 3:
        run_step(scheduler)
    return target


def reach_preempted(scheduler: Scheduler) -> Request:
    target = reach_decoding(scheduler)
    scheduler.swap_cost = 1e9
    scheduler._preempt(target)
    assert target.swapped is None
    return target


def reach_swapped(scheduler: Scheduler) -> Request:
    target = reach_decoding(scheduler)
    scheduler.swap_cost = 0.0
    scheduler._preempt(target)
    assert scheduler.manager.host_pool.num_allocated > 0
    return target


def reach_swapped_in(scheduler: Scheduler) -> Request:
    target = reach_swapped(scheduler)
    run_step(scheduler)
    assert target.status is RequestStatus.RUNNING
    return target


def reach_forked(scheduler: Scheduler) -> Request:
    parent = add(scheduler, "parent", 6, max_tokens=9)
    return fork_at_the_prompt(scheduler, parent, ["target"])[0]


REACHES = [
    reach_waiting,
    reach_waiting_for_a_prefix,
    reach_mid_prefill,
    reach_decoding,
    reach_preempted,
    reach_swapped,
    reach_swapped_in,
    reach_forked,
]


@every_geometry
@pytest.mark.parametrize("reach", REACHES, ids=lambda reach: reach.__name__[6:])
@pytest.mark.parametrize("when", ["between steps", "in a step", "in a step that fails"])
def test_abort_in_any_state_frees_everything(geometry, reach, when):
    scheduler = make_scheduler(geometry, num_host_blocks=100, token_budget=40)
    other = add(scheduler, "other", 30, max_tokens=50)
    target = reach(scheduler)
    step = None if when == "between steps" else scheduler.schedule()
    assert scheduler.abort("target") is target
    assert target.status is RequestStatus.FINISHED
    assert scheduler.abort("target") is None
    if when == "in a step":
        update(scheduler, step)
    elif step is not None:
        scheduler.cancel(step)
    scheduler.check_integrity()
    assert target.seq_id is None
    assert target.swapped is None
    assert other in drain(scheduler)
    assert other.output_token_ids == [token_of("other", p) for p in range(30, 80)]
    assert_nothing_is_held(scheduler)
