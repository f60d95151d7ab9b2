"""Requests that are held: they keep their place, do not start, and hinder nobody."""

from __future__ import annotations

from paged_kv.scheduler.request import RequestStatus
from tests.support.scheduler_policies import add, make_scheduler, run_step
from tests.support.scheduler_steps import geometry_of

GEOMETRY = geometry_of(16, 16, 0, 0)


def test_a_held_request_waits_while_later_ones_start():
    scheduler = make_scheduler(GEOMETRY, num_blocks=70, max_model_len=600, token_budget=100)
    first, second = add(scheduler, "first", 20, 9), add(scheduler, "second", 20, 9)
    scheduler.hold(first)
    run_step(scheduler)
    assert (first.status, second.status) == (RequestStatus.WAITING, RequestStatus.RUNNING)
    assert first.times_passed == 0
    scheduler.let_go(first)
    run_step(scheduler)
    assert first.status is RequestStatus.RUNNING
    assert first.rank < second.rank


def test_where_all_are_held_there_is_no_step_and_no_error():
    scheduler = make_scheduler(GEOMETRY, num_blocks=70, max_model_len=600, token_budget=100)
    first = add(scheduler, "first", 20, 9)
    scheduler.hold(first)
    assert scheduler.schedule() is None
    scheduler.pause(add(scheduler, "paused", 20, 9))
    assert scheduler.schedule() is None
    scheduler.let_go(first)
    assert scheduler.schedule() is not None


def test_what_nobody_could_start_is_looked_at_again_when_it_is_let_go():
    scheduler = make_scheduler(GEOMETRY, num_blocks=70, max_model_len=600, token_budget=100)
    add(scheduler, "runs", 20, 300)
    run_step(scheduler)
    held = add(scheduler, "held", 20, 9)
    scheduler.hold(held)
    for _ in range(3):
        run_step(scheduler)
    assert held.status is RequestStatus.WAITING
    scheduler.let_go(held)
    run_step(scheduler)
    assert held.status is RequestStatus.RUNNING


def test_one_that_is_held_can_be_finished_and_begun_anew():
    scheduler = make_scheduler(GEOMETRY, num_blocks=70, max_model_len=600, token_budget=100)
    held = add(scheduler, "held", 20, 9)
    scheduler.hold(held)
    scheduler.recover()
    held.restart()
    scheduler.add(held)
    assert not held.is_held
    scheduler.hold(held)
    scheduler.finish(held)
    scheduler.let_go(held)
    assert not scheduler.has_unfinished
    scheduler.check_integrity()
