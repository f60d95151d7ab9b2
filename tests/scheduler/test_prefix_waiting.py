"""Requests that wait until another has computed the prefix they share."""

from __future__ import annotations

import numpy as np
import pytest

from paged_kv.errors import OutOfBlocksError
from paged_kv.scheduler.request import Request, RequestStatus
from paged_kv.scheduler.scheduler import Scheduler
from tests.support.scheduler_policies import (
    PROMPT,
    add,
    assert_nothing_is_held,
    every_geometry,
    make_scheduler,
    names,
    run_step,
)
from tests.support.scheduler_steps import complete, counts_of, drain, token_of


def test_of_64_equal_prompts_one_is_computed_and_shared_a_step_later():
    scheduler = make_scheduler(num_blocks=200, max_num_seqs=64, token_budget=500)
    requests = [add(scheduler, f"r{index}", PROMPT) for index in range(64)]
    assert run_step(scheduler) == {"r0": 33}
    assert scheduler.statistics().num_hit_tokens == 0
    assert run_step(scheduler) == {f"r{index}": 1 for index in range(64)}
    assert scheduler.manager.pool.num_allocated == 8 + 64
    assert scheduler.manager.pool.ref_counts[:8].tolist() == [64] * 8
    assert scheduler.statistics().num_hit_tokens == 63 * 32
    drain(scheduler)
    for request in requests:
        expected = [token_of(request.request_id, position) for position in range(33, 37)]
        assert request.output_token_ids == expected
    assert scheduler.statistics().num_scheduled_tokens == 33 + 63 + 64 * 3
    assert_nothing_is_held(scheduler)


def test_without_prefix_caching_nobody_waits():
    scheduler = make_scheduler(prefix_caching=False, token_budget=500)
    for index in range(3):
        add(scheduler, f"r{index}", PROMPT)
    assert run_step(scheduler) == {"r0": 33, "r1": 33, "r2": 33}


def test_waiting_lasts_until_the_whole_prompt_is_there():
    scheduler = make_scheduler(token_budget=20)
    for index in range(3):
        add(scheduler, f"r{index}", PROMPT)
    assert run_step(scheduler) == {"r0": 20}
    assert run_step(scheduler) == {"r0": 13}
    assert run_step(scheduler) == {"r0": 1, "r1": 1, "r2": 1}


@every_geometry
def test_equal_prompts_share_in_every_geometry(geometry):
    scheduler = make_scheduler(geometry, token_budget=500)
    for index in range(5):
        add(scheduler, f"r{index}", PROMPT)
    assert run_step(scheduler) == {"r0": 33}
    links = geometry.num_shareable_links(33)
    left = 33 - geometry.link_end(links)
    assert run_step(scheduler) == {"r0": 1} | {f"r{index}": left for index in range(1, 5)}
    assert scheduler.manager.num_sealed[:5].tolist() == [geometry.num_sealed_blocks(33)] * 5
    drain(scheduler)
    assert_nothing_is_held(scheduler)


def test_only_those_wait_whose_next_block_is_on_its_way():
    scheduler = make_scheduler(token_budget=500)
    add(scheduler, "a", PROMPT)
    add(scheduler, "same", PROMPT)
    add(scheduler, "branches off", [*PROMPT[:8], 1, 2, 3, 4, 5])
    add(scheduler, "short", PROMPT[:4])
    add(scheduler, "salted", PROMPT, extra_keys=("salt",))
    add(scheduler, "other", 9)
    assert run_step(scheduler) == {"a": 33, "short": 4, "salted": 33, "other": 9}
    counts = run_step(scheduler)
    assert (counts["same"], counts["branches off"]) == (1, 5)


def test_others_are_served_while_a_request_waits_for_a_prefix_and_do_not_pass_it():
    scheduler = make_scheduler(token_budget=40)
    add(scheduler, "a", PROMPT)
    waiting = add(scheduler, "b", PROMPT)
    add(scheduler, "c", 30)
    assert run_step(scheduler) == {"a": 33, "c": 7}
    assert waiting.times_passed == 0
    assert run_step(scheduler) == {"a": 1, "c": 23, "b": 1}


def test_a_step_looks_at_64_requests_in_vain_and_no_more():
    for num_waiting, admitted in ((63, True), (64, False)):
        scheduler = make_scheduler(num_blocks=200, max_num_seqs=80, token_budget=500)
        for index in range(1 + num_waiting):
            add(scheduler, f"r{index}", PROMPT)
        add(scheduler, "other", 9)
        assert ("other" in run_step(scheduler)) == admitted
        assert "other" in run_step(scheduler)


def test_nobody_waits_for_a_sequence_that_the_scheduler_does_not_run():
    scheduler = make_scheduler()
    scheduler.manager.add_sequence(PROMPT)
    add(scheduler, "a", PROMPT)
    assert counts_of(scheduler, scheduler.schedule()) == {"a": 33}


@pytest.mark.parametrize("is_swapped", [False, True])
def test_a_pool_that_others_hold_is_an_error_and_the_request_is_served_when_they_leave(is_swapped):
    """It stays waiting or running meanwhile, also with its blocks in host memory."""
    scheduler = make_scheduler(num_blocks=10, num_host_blocks=9, swap_cost=0.0)
    manager = scheduler.manager
    request = add(scheduler, "a", 20, max_tokens=5)
    if is_swapped:
        run_step(scheduler)
        scheduler._preempt(request)
    other = manager.add_sequence(list(range(39)))
    manager.commit(manager.reserve([other], [39]))
    for _ in range(2):
        with pytest.raises(OutOfBlocksError, match="10 of 10 blocks"):
            scheduler.schedule()
    manager.remove_sequence(other)
    drain(scheduler)
    assert request.output_token_ids == [token_of("a", position) for position in range(20, 25)]
    assert_nothing_is_held(scheduler)


def abort_after_a_step(scheduler: Scheduler, request: Request) -> None:
    run_step(scheduler)
    scheduler.abort(request.request_id)


def abort_in_mid_step(scheduler: Scheduler, request: Request) -> None:
    step = scheduler.schedule()
    scheduler.abort(request.request_id)
    complete(scheduler, step)


def abort_after_a_failed_step(scheduler: Scheduler, request: Request) -> None:
    scheduler.cancel(scheduler.schedule())
    scheduler.abort(request.request_id)


def swap_after_a_step(scheduler: Scheduler, request: Request) -> None:
    run_step(scheduler)
    scheduler._preempt(request)
    assert request.swapped is not None
    scheduler.abort(request.request_id)


@pytest.mark.parametrize(
    ("stop", "num_hit"),
    [
        (abort_after_a_step, 16),
        (abort_in_mid_step, 16),  # what an ended request has stored is good
        (abort_after_a_failed_step, 0),
        (swap_after_a_step, 16),
    ],
)
def test_when_the_one_that_computes_a_prefix_stops_the_next_one_goes_on(stop, num_hit):
    scheduler = make_scheduler(token_budget=18, num_host_blocks=50, swap_cost=0.0)
    requests = [add(scheduler, f"r{index}", PROMPT) for index in range(3)]
    stop(scheduler, requests[0])
    step = scheduler.schedule()
    assert counts_of(scheduler, step) == {"r1": min(33 - num_hit, 18)}
    assert step.plan.context_lens.tolist() == [num_hit]
    complete(scheduler, step)
    assert set(names(drain(scheduler))) == {"r1", "r2"}
    assert_nothing_is_held(scheduler)


def test_who_shares_some_blocks_with_a_spoilt_request_and_has_not_sampled_starts_again():
    scheduler = make_scheduler(token_budget=40)
    spoilt = add(scheduler, "a", PROMPT)
    run_step(scheduler)
    other = add(scheduler, "b", [*PROMPT[:32], *range(900, 1000)])
    assert run_step(scheduler) == {"a": 1, "b": 39}
    step = scheduler.schedule()
    assert step is not None
    assert step.sampled_requests == [spoilt]
    assert len(scheduler.manager.block_ids(other.seq_id)) > 8  # with some of its own
    scheduler.update(step, [1], is_spoilt=np.array([True]))
    assert other.status is RequestStatus.PREEMPTED
    assert scheduler.manager.num_cached_blocks == 0
    scheduler.check_integrity()
