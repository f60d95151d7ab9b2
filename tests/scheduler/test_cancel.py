"""Aborted requests and cancelled steps: all or nothing."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from paged_kv.blocks.geometry import BlockGeometry
from paged_kv.errors import InvalidRequestError, InvalidStepError
from paged_kv.scheduler.request import Request, RequestStatus
from paged_kv.scheduler.scheduler import Scheduler
from tests.support.scheduler_steps import (
    add,
    assert_nothing_is_held,
    complete,
    drain,
    every_geometry,
    make_scheduler,
    run_step,
    running,
    token_of,
    two_that_outgrow_the_pool,
)


def waiting_request(scheduler: Scheduler) -> Request:
    return add(scheduler, "target", 20)


def mid_prefill_request(scheduler: Scheduler) -> Request:
    request = add(scheduler, "target", 200)
    assert run_step(scheduler)["target"] < 200
    return request


def decoding_request(scheduler: Scheduler) -> Request:
    request = add(scheduler, "target", 5, max_tokens=90)
    while request.num_output_tokens < 3:
        run_step(scheduler)
    return request


def preempted_request(scheduler: Scheduler) -> Request:
    request = decoding_request(scheduler)
    scheduler._preempt(request)
    return request


@every_geometry
@pytest.mark.parametrize("with_another", [False, True], ids=["alone", "beside-another"])
@pytest.mark.parametrize(
    ("reach", "status"),
    [
        (waiting_request, RequestStatus.WAITING),
        (mid_prefill_request, RequestStatus.RUNNING),
        (decoding_request, RequestStatus.RUNNING),
        (preempted_request, RequestStatus.PREEMPTED),
    ],
    ids=["waiting", "mid-prefill", "decoding", "preempted"],
)
def test_abort_in_any_state_frees_everything(
    geometry: BlockGeometry,
    reach: Callable[[Scheduler], Request],
    status: RequestStatus,
    with_another: bool,
):
    scheduler = make_scheduler(geometry)
    other = add(scheduler, "other", 30, max_tokens=50) if with_another else None
    request = reach(scheduler)
    assert request.status is status
    assert scheduler.abort("target") is request
    assert request.status is RequestStatus.FINISHED
    assert scheduler.abort("target") is None
    scheduler.check_integrity()
    if other is not None:
        assert drain(scheduler) == [other]
        assert other.output_token_ids == [token_of("other", p) for p in range(30, 80)]
    assert_nothing_is_held(scheduler)


@every_geometry
@pytest.mark.parametrize("ending", ["update", "cancel"])
def test_abort_while_a_step_computes_the_request_frees_it_when_the_step_ends(geometry, ending):
    scheduler = make_scheduler(geometry)
    target, other = add(scheduler, "target", 20, 9), add(scheduler, "other", 30, 9)
    step = scheduler.schedule()
    assert scheduler.abort("target") is target
    assert scheduler.abort("target") is None
    scheduler.check_integrity()
    if ending == "cancel":
        scheduler.cancel(step)
    else:
        complete(scheduler, step)
    scheduler.check_integrity()
    assert target.seq_id is None
    assert drain(scheduler) == [other]
    assert_nothing_is_held(scheduler)


def test_steps_out_of_turn_are_refused_and_change_nothing():
    scheduler = make_scheduler()
    add(scheduler, "a", 5)
    step = scheduler.schedule()
    add(scheduler, "b", 5)
    with pytest.raises(InvalidStepError, match="update or cancel"):
        scheduler.schedule()
    with pytest.raises(InvalidStepError, match=r"1 sequences sample .* \(2,\)"):
        scheduler.update(step, np.array([1, 2]))
    scheduler.update(step, [token_of("a", 5)])
    for end in (scheduler.cancel, lambda old: scheduler.update(old, [1])):
        with pytest.raises(InvalidStepError, match="scheduled last"):
            end(step)
    scheduler.check_integrity()
    assert len(drain(scheduler)) == 2


@pytest.mark.parametrize("how", ["commit", "rollback"])
def test_a_step_that_ended_behind_the_schedulers_back_is_refused_until_it_recovers(how):
    scheduler = make_scheduler()
    add(scheduler, "a", 5)
    step = scheduler.schedule()
    getattr(scheduler.manager, how)(step.plan)
    for end in (scheduler.cancel, lambda step: scheduler.update(step, [1])):
        with pytest.raises(InvalidStepError, match="behind the scheduler's back"):
            end(step)
    scheduler.recover()
    add(scheduler, "b", 5)
    assert len(drain(scheduler)) == 1
    scheduler.check_integrity()


def test_requests_with_the_same_prompt_list_do_not_share_their_outputs():
    scheduler, prompt = make_scheduler(), [1, 2, 3]
    requests = [Request(request_id=name, prompt_token_ids=prompt, max_tokens=2) for name in "ab"]
    for request in requests:
        scheduler.add(request)
    drain(scheduler)
    assert prompt == [1, 2, 3]
    assert requests[0].output_token_ids != requests[1].output_token_ids


@pytest.mark.parametrize("priority", ["high", 1.5, None])
def test_a_priority_that_is_no_integer_is_refused_and_not_queued(priority):
    scheduler = make_scheduler()
    with pytest.raises(InvalidRequestError, match=repr(priority)):
        add(scheduler, "a", 5, priority=priority)
    add(scheduler, "b", 5)
    assert len(drain(scheduler)) == 1


def test_abort_of_an_unknown_request_is_none():
    scheduler = make_scheduler()
    assert scheduler.abort("nobody") is None


def test_abort_of_a_request_that_preemption_made_wait_frees_everything():
    scheduler, a, b = two_that_outgrow_the_pool()
    step = scheduler.schedule()
    assert step.preempted == [b]
    complete(scheduler, step)
    assert scheduler.abort("b") is b
    assert drain(scheduler) == [a]
    assert_nothing_is_held(scheduler)


def state_of(scheduler: Scheduler) -> dict[str, object]:
    """Every count and table of the living sequences, and the free blocks as a set."""
    manager = scheduler.manager
    free = manager.pool._free_stack[: manager.num_free_blocks]
    return {
        "free": set(free.tolist()),
        "computed": manager.num_computed_tokens.tolist(),
        "sealed": manager.num_sealed.tolist(),
        "blocks": {
            int(seq_id): manager.block_ids(seq_id).tolist() for seq_id in manager.living_seq_ids
        },
        "tokens": {r.request_id: list(r.token_ids) for r in running(scheduler)},
        "running": scheduler.num_running,
        "waiting": scheduler.num_waiting,
    }


@every_geometry
def test_cancel_restores_every_count_and_table_of_every_step(geometry):
    """Over 250 steps of sequences that grow through every kind of boundary, and long chunks."""
    scheduler = make_scheduler(geometry, num_blocks=1000, token_budget=150)
    add(scheduler, "long", 400, max_tokens=300)
    add(scheduler, "short", 1, max_tokens=300)
    run_step(scheduler)
    num_compared = 0
    for _ in range(250):
        before = state_of(scheduler)
        cancelled = scheduler.schedule()
        scheduler.cancel(cancelled)
        scheduler.check_integrity()
        if scheduler.num_waiting == before["waiting"]:
            assert state_of(scheduler) == before
            num_compared += 1
        again = scheduler.schedule()
        assert again.token_ids.tolist() == cancelled.token_ids.tolist()
        assert again.plan.positions.tolist() == cancelled.plan.positions.tolist()
        assert again.plan.context_lens.tolist() == cancelled.plan.context_lens.tolist()
        assert again.sampled_requests == cancelled.sampled_requests
        complete(scheduler, again)
    assert num_compared >= 249  # one step admits the short request
    assert (scheduler.manager.num_sealed.max() > 0) == geometry.seals


def test_a_cancelled_admission_starts_again_from_zero():
    scheduler = make_scheduler()
    request = add(scheduler, "a", 10)
    scheduler.cancel(scheduler.schedule())
    scheduler.check_integrity()
    assert scheduler.manager.num_free_blocks == scheduler.manager.num_blocks
    step = scheduler.schedule()
    assert step.plan.context_lens.tolist() == [0]
    assert step.token_ids.tolist() == request.token_ids


@every_geometry
def test_a_reservation_that_does_not_fit_changes_nothing(geometry):
    scheduler = make_scheduler(geometry, num_blocks=14)
    add(scheduler, "a", 20, max_tokens=3)
    add(scheduler, "b", 5, max_tokens=9)
    run_step(scheduler)
    before = state_of(scheduler)
    seq_ids = scheduler.manager.living_seq_ids
    assert scheduler.manager.reserve(seq_ids, np.array([1, 900])) is None
    assert state_of(scheduler) == before
    scheduler.check_integrity()
