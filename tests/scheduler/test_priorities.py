"""Who is served first, and who makes room for whom."""

from __future__ import annotations

import random

import pytest

from tests.support.scheduler_policies import (
    add,
    four_that_outgrow_the_pool,
    make_scheduler,
    names,
    run_step,
)
from tests.support.scheduler_steps import complete, counts_of, drain

# -- who is served first --------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_requests_are_served_by_priority_then_arrival(seed):
    rng = random.Random(seed)
    scheduler = make_scheduler(max_num_seqs=1)
    requests = [
        add(scheduler, f"r{index}", rng.randint(1, 9), priority=rng.randint(-2, 2))
        for index in range(12)
    ]
    expected = sorted(requests, key=lambda request: (request.priority, request.arrival))
    assert names(drain(scheduler)) == names(expected)


def test_the_budget_is_shared_in_the_order_of_ranks():
    scheduler = make_scheduler(token_budget=10)
    for name, priority in (("a", 1), ("b", 0), ("c", 1), ("d", 0)):
        add(scheduler, name, 4, priority=priority)
    assert run_step(scheduler) == {"b": 4, "d": 4, "a": 2}
    assert run_step(scheduler) == {"b": 1, "d": 1, "a": 2, "c": 4}


def test_a_preempted_request_keeps_its_place_before_later_arrivals():
    scheduler = make_scheduler()
    first = add(scheduler, "first", 5)
    run_step(scheduler)
    add(scheduler, "later", 5)
    scheduler._preempt(first)
    assert names(list(scheduler.waiting)) == ["first", "later"]
    assert names(drain(scheduler)) == ["first", "later"]


# -- who makes room -------------------------------------------------------------------------------


def test_the_newest_of_the_lowest_priority_makes_room_first():
    scheduler, requests = four_that_outgrow_the_pool()
    step = scheduler.schedule()
    assert names(step.preempted) == ["c", "b"]
    assert counts_of(scheduler, step) == {"a": 1, "d": 1}
    assert [requests[name].num_preemptions for name in "abcd"] == [0, 1, 1, 0]
    assert names(list(scheduler.waiting)) == ["b", "c"]
    complete(scheduler, step)
    scheduler.check_integrity()


def test_no_more_make_room_than_have_to():
    scheduler, _ = four_that_outgrow_the_pool()
    scheduler.abort("d")  # two blocks are free, and three are needed
    assert names(scheduler.schedule().preempted) == ["c"]


def test_nobody_makes_room_where_blocks_suffice_to_the_last():
    scheduler, _ = four_that_outgrow_the_pool()
    scheduler.abort("c")
    scheduler.abort("d")
    assert scheduler.manager.num_free_blocks == 4
    for _ in range(8):
        assert set(run_step(scheduler)) == {"a", "b"}
    assert scheduler.manager.num_free_blocks == 0
    assert scheduler.statistics().num_preemptions == 0
    assert names(scheduler.schedule().preempted) == ["b"]


def test_an_earlier_arrival_of_a_lower_priority_makes_room_for_a_later_one():
    scheduler = make_scheduler(num_blocks=6)
    for name, priority in (("worst", 9), ("best", 0)):
        add(scheduler, name, 4, 20, priority)
    for _ in range(9):
        run_step(scheduler)
    assert scheduler.manager.num_free_blocks == 0
    assert names(scheduler.schedule().preempted) == ["worst"]


@pytest.mark.parametrize("num_host_blocks", [0, 50])
def test_nobody_is_admitted_in_a_step_that_preempted(num_host_blocks):
    scheduler, _ = four_that_outgrow_the_pool(num_host_blocks=num_host_blocks)
    add(scheduler, "urgent", 1, priority=-9)
    step = scheduler.schedule()
    assert names(step.preempted) == ["c", "b"]
    assert counts_of(scheduler, step) == {"a": 1, "d": 1}
    assert step.swap_ins == []
    complete(scheduler, step)
    assert run_step(scheduler) == {"urgent": 1, "a": 1, "d": 1}
