"""Preempted requests: swapped or computed again, and what they go on from."""

from __future__ import annotations

import pytest

from paged_kv.scheduler.request import RequestStatus
from tests.support.block_contents import BlockContents
from tests.support.scheduler_policies import (
    LONG_TAIL,
    add,
    assert_nothing_is_held,
    check_contents,
    every_geometry,
    follow,
    four_that_outgrow_the_pool,
    make_scheduler,
    names,
    run_step,
    two_of_which_one_makes_room,
)
from tests.support.scheduler_steps import complete, counts_of, drain, token_of

# -- swapped or computed again --------------------------------------------------------------------


@pytest.mark.parametrize(("swap_cost", "is_swapped"), [(0.0, True), (1.99, True), (2.0, False)])
def test_swapped_where_moving_twice_costs_less_than_computing_again(swap_cost, is_swapped):
    """3 blocks there and back against 12 tokens."""
    scheduler, _, b = two_of_which_one_makes_room(swap_cost=swap_cost)
    step = scheduler.schedule()
    assert step.preempted == [b]
    assert (b.swapped is not None) == is_swapped
    assert len(step.swap_outs) == is_swapped
    assert scheduler.statistics().num_swapped == is_swapped
    assert (b.status, b.num_preemptions, b.seq_id) == (RequestStatus.PREEMPTED, 1, None)


@pytest.mark.parametrize(("num_host_blocks", "is_swapped"), [(0, False), (2, False), (3, True)])
def test_without_room_on_the_host_it_is_computed_again(num_host_blocks, is_swapped):
    scheduler, _, b = two_of_which_one_makes_room(num_host_blocks=num_host_blocks)
    step = scheduler.schedule()
    assert (b.swapped is not None) == is_swapped
    complete(scheduler, step)
    drain(scheduler)
    assert b.output_token_ids == [token_of("b", position) for position in range(4, 24)]
    assert_nothing_is_held(scheduler)


def test_of_two_victims_the_one_for_which_the_host_has_room_is_swapped():
    scheduler, requests = four_that_outgrow_the_pool(num_host_blocks=3)
    step = scheduler.schedule()
    assert names(step.preempted) == ["c", "b"]
    assert requests["c"].swapped is not None
    assert requests["b"].swapped is None
    assert len(step.swap_outs) == 1


def test_a_step_says_which_blocks_to_copy_where():
    scheduler, a, b = two_of_which_one_makes_room()
    manager = scheduler.manager
    blocks = manager.block_ids(b.seq_id).tolist()
    step = scheduler.schedule()
    (copy,) = step.swap_outs
    assert copy.request_id == "b"
    assert copy.device_block_ids.tolist() == blocks
    assert copy.host_block_ids.tolist() == [0, 1, 2]
    assert step.swap_ins == []
    assert manager.host_pool.num_allocated == 3
    tokens = b.token_ids
    assert len(tokens) == 13
    complete(scheduler, step)
    while b.status is RequestStatus.PREEMPTED:
        assert b.token_ids == tokens
        step = scheduler.schedule()
        assert step.swap_outs == []
        last, found = step, step.swap_ins
        complete(scheduler, step)
    (copy,) = found
    assert copy.request_id == "b"
    assert copy.host_block_ids.tolist() == [0, 1, 2]
    assert copy.device_block_ids.tolist() == manager.block_ids(b.seq_id).tolist()[:3]
    assert manager.host_pool.num_allocated == 0
    assert last.plan.context_lens.tolist() == [12]  # only what was not computed before
    assert last.token_ids.tolist() == tokens[12:]
    assert a.status is RequestStatus.FINISHED or a.num_output_tokens == 20
    step = scheduler.schedule()
    assert step.swap_ins == step.swap_outs == []
    complete(scheduler, step)
    drain(scheduler)
    assert b.output_token_ids == [token_of("b", position) for position in range(4, 24)]


def test_copies_of_a_cancelled_step_are_not_asked_for_again():
    scheduler, _, b = two_of_which_one_makes_room()
    step = scheduler.schedule()
    assert len(step.swap_outs) == 1
    scheduler.cancel(step)
    assert b.swapped is not None
    step = scheduler.schedule()
    assert step.swap_outs == []
    while not step.swap_ins:
        complete(scheduler, step)
        step = scheduler.schedule()
    scheduler.cancel(step)
    assert b.status is RequestStatus.RUNNING
    assert scheduler.schedule().swap_ins == []


def test_a_swapped_request_may_be_swapped_again():
    scheduler, _, b = two_of_which_one_makes_room()
    complete(scheduler, scheduler.schedule())
    while b.swapped is not None:
        run_step(scheduler)
    scheduler._preempt(b)
    assert b.swapped is not None
    assert b.num_preemptions == 2
    drain(scheduler)
    assert b.output_token_ids == [token_of("b", position) for position in range(4, 24)]
    assert_nothing_is_held(scheduler)


def test_a_request_that_comes_from_the_host_is_not_sent_back_before_it_arrived():
    """It has 7 blocks there and needs 5 more, because it seals two blocks in one step.

    Sent out again in the schedule() that let it in, it would be lost: copies out of the pool come
    first, of blocks that nothing was copied into yet, over those on the host that hold its tokens.
    """
    scheduler = make_scheduler(
        LONG_TAIL, num_blocks=13, num_host_blocks=20, token_budget=15, swap_cost=0.0,
        prefix_caching=False,
    )  # fmt: skip
    contents = BlockContents(scheduler.manager)
    add(scheduler, "a", 1, max_tokens=20)
    b = add(scheduler, "b", 19, max_tokens=3)
    for turn in range(60):
        if turn == 1:
            scheduler._preempt(b)
        scheduler.token_budget = 1 if turn == 1 else 15  # b stays out for a step
        step = scheduler.schedule()
        if step is None:
            break
        follow(scheduler, contents, step)
        complete(scheduler, step)
        check_contents(scheduler, contents)
    assert b.num_output_tokens == 3


# -- after a preemption ---------------------------------------------------------------------------


@pytest.mark.parametrize(("num_more", "num_hit"), [(1, 8), (4, 8), (5, 4), (9, 0)])
def test_a_preempted_request_computes_again_only_what_was_evicted(num_more, num_hit):
    """b leaves 3 blocks behind, of which two can be found; a takes one for every 4 tokens."""
    scheduler = make_scheduler(num_blocks=6)
    a, b = add(scheduler, "a", 4, 9 + num_more), add(scheduler, "b", 4, 20)
    for _ in range(9):
        run_step(scheduler)
    tokens = b.token_ids
    for turn in range(num_more):
        step = scheduler.schedule()
        assert step.preempted == ([b] if turn == 0 else [])
        assert counts_of(scheduler, step) == {"a": 1}
        complete(scheduler, step)
    assert a.status is RequestStatus.FINISHED
    assert b.token_ids == tokens
    step = scheduler.schedule()
    assert counts_of(scheduler, step) == {"b": 13 - num_hit}
    assert step.plan.context_lens.tolist() == [num_hit]
    assert step.token_ids.tolist() == tokens[num_hit:]
    complete(scheduler, step)
    drain(scheduler)
    assert b.output_token_ids == [token_of("b", position) for position in range(4, 24)]
    assert_nothing_is_held(scheduler)


@every_geometry
@pytest.mark.parametrize("prefix_caching", [False, True])
@pytest.mark.parametrize("num_host_blocks", [0, 60])
def test_preemption_changes_no_token(geometry, prefix_caching, num_host_blocks):
    scheduler = make_scheduler(
        geometry,
        num_blocks=geometry.max_blocks(60) + 4,
        prefix_caching=prefix_caching,
        num_host_blocks=num_host_blocks,
        swap_cost=0.1,
    )
    contents = BlockContents(scheduler.manager)
    requests = [add(scheduler, f"r{index}", 9 + index, 40) for index in range(5)]
    num_swaps = 0
    while (step := scheduler.schedule()) is not None:
        follow(scheduler, contents, step)
        num_swaps += len(step.swap_outs)
        complete(scheduler, step)
        scheduler.check_integrity()
        check_contents(scheduler, contents)
    for request in requests:
        expected = [token_of(request.request_id, p) for p in range(request.num_prompt_tokens + 40)]
        assert request.token_ids == expected
    assert scheduler.statistics().num_preemptions > 0
    assert (num_swaps > 0) == (num_host_blocks > 0)
    assert_nothing_is_held(scheduler)
