"""What the scheduler says of itself, and that none of its containers grows."""

from __future__ import annotations

import numpy as np

from paged_kv.scheduler.statistics import SchedulerStatistics
from tests.support.scheduler_policies import (
    add,
    assert_nothing_is_held,
    fork_at_the_prompt,
    make_scheduler,
    run_step,
    two_of_which_one_makes_room,
)
from tests.support.scheduler_steps import complete, drain

# -- statistics -----------------------------------------------------------------------------------


def test_statistics_say_what_is_and_what_was():
    scheduler, a, b = two_of_which_one_makes_room()
    assert scheduler.statistics() == SchedulerStatistics(
        num_running=2,
        num_waiting=0,
        num_swapped=0,
        num_free_blocks=0,
        num_cached_blocks=6,
        num_steps=9,
        num_scheduled_tokens=2 * 12,
        num_preemptions=0,
        num_query_tokens=8,
        num_hit_tokens=0,
        num_draft_tokens=0,
        num_accepted_tokens=0,
    )
    add(scheduler, "c", a.token_ids[:5])
    complete(scheduler, scheduler.schedule())
    assert scheduler.statistics() == SchedulerStatistics(
        num_running=1,
        num_waiting=2,
        num_swapped=1,
        num_free_blocks=2,
        num_cached_blocks=5,
        num_steps=10,
        num_scheduled_tokens=25,
        num_preemptions=1,
        num_query_tokens=8,
        num_hit_tokens=0,
        num_draft_tokens=0,
        num_accepted_tokens=0,
    )
    run_step(scheduler)
    statistics = scheduler.statistics()
    assert (statistics.num_running, statistics.num_waiting) == (2, 1)
    assert (statistics.num_query_tokens, statistics.num_hit_tokens) == (13, 4)
    assert b.swapped is not None
    drain(scheduler)
    final = scheduler.statistics()
    assert (final.num_running, final.num_waiting, final.num_swapped) == (0, 0, 0)
    assert (final.num_free_blocks, final.num_preemptions) == (6, 1)


def test_a_preempted_request_counts_each_time_it_is_admitted():
    scheduler = make_scheduler()
    request = add(scheduler, "a", 10)
    run_step(scheduler)
    scheduler._preempt(request)
    run_step(scheduler)
    statistics = scheduler.statistics()
    assert (statistics.num_query_tokens, statistics.num_hit_tokens) == (10 + 11, 8)


def test_cancelled_steps_count_as_steps():
    scheduler = make_scheduler()
    add(scheduler, "a", 5)
    for _ in range(3):
        scheduler.cancel(scheduler.schedule())
    statistics = scheduler.statistics()
    assert (statistics.num_steps, statistics.num_scheduled_tokens) == (3, 15)


# -- nothing grows --------------------------------------------------------------------------------


def container_sizes(owner: object, depth: int = 3) -> dict[str, int]:
    """Length of every container that an object holds, and of those that its parts hold."""
    sizes = {}
    for name, value in vars(owner).items():
        if isinstance(value, (list, dict, set, np.ndarray)):
            sizes[name] = len(value)
        elif hasattr(value, "__dict__") and depth and type(value).__module__.startswith("paged_kv"):
            inner = container_sizes(value, depth - 1)
            sizes |= {f"{name}.{key}": size for key, size in inner.items()}
    return sizes


def test_no_container_grows_with_the_number_of_requests_served():
    scheduler = make_scheduler(num_blocks=12, num_host_blocks=8, swap_cost=0.5)
    sizes = []
    for turn in range(6):
        for index in range(40):
            request = add(scheduler, f"{turn}-{index}", [index % 3] * 9, max_tokens=4)
            if index % 4 == 0:
                fork_at_the_prompt(scheduler, request, [f"{turn}-{index}-child"])
            if index % 7 == 0:
                scheduler.abort(request.request_id)
        drain(scheduler)
        sizes.append(container_sizes(scheduler))
    assert len(sizes[0]) > 20
    assert sizes[1] == sizes[-1]
    assert scheduler.statistics().num_preemptions > 0
    assert_nothing_is_held(scheduler)
