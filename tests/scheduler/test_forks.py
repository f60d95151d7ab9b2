"""Requests that are forked: their order, their tokens, and refusals."""

from __future__ import annotations

import pytest

from paged_kv.errors import InvalidRequestError, InvalidStepError, PromptTooLongError
from paged_kv.scheduler.request import RequestStatus
from paged_kv.scheduler.scheduler import Scheduler
from paged_kv.scheduler.step import Fork, ScheduledStep
from tests.support.scheduler_policies import (
    add,
    assert_nothing_is_held,
    child_of,
    first_token,
    fork_at_the_prompt,
    make_scheduler,
    names,
    run_step,
    update,
)
from tests.support.scheduler_steps import drain, token_of


def test_a_child_goes_on_from_the_tokens_of_its_parent_with_a_token_of_its_own():
    scheduler = make_scheduler()
    parent = add(scheduler, "parent", 6, max_tokens=3)
    step = scheduler.schedule()
    child = child_of(parent, "child", max_tokens=3)
    assert scheduler.update(step, [70], [Fork(parent, child, 71)]) == []
    scheduler.check_integrity()
    assert (parent.output_token_ids, child.output_token_ids) == ([70], [71])
    assert child.status is RequestStatus.RUNNING
    assert scheduler.manager.pool.num_allocated == 2
    step = scheduler.schedule()
    assert step.sampled_requests == [parent, child]
    assert step.token_ids.tolist() == [70, 71]
    assert step.plan.context_lens.tolist() == [6, 6]
    assert len(step.plan.copy_sources) == 1
    assert scheduler.update(step, [80, 81]) == []
    step = scheduler.schedule()
    assert scheduler.update(step, [90, 91]) == [parent, child]
    assert (parent.output_token_ids, child.output_token_ids) == ([70, 80, 90], [71, 81, 91])
    scheduler.finish(parent)
    scheduler.finish(child)
    assert_nothing_is_held(scheduler)


@pytest.mark.parametrize("prefix_caching", [False, True])
def test_children_without_a_seq_id_wait_and_are_served_later(prefix_caching):
    scheduler = make_scheduler(max_num_seqs=3, prefix_caching=prefix_caching)
    parent = add(scheduler, "parent", 10, max_tokens=5)
    children = fork_at_the_prompt(scheduler, parent, ["c0", "c1", "c2", "c3"], max_tokens=5)
    assert [child.status for child in children] == [RequestStatus.RUNNING] * 2 + [
        RequestStatus.WAITING
    ] * 2
    assert [child.num_output_tokens for child in children] == [1] * 4
    assert (scheduler.num_running, scheduler.num_waiting) == (3, 2)
    finished = drain(scheduler)
    assert names(finished) == ["parent", "c0", "c1", "c2", "c3"]
    for child in children:
        prompt = [token_of("parent", position) for position in range(10)]
        assert child.token_ids == prompt + [token_of(child.request_id, p) for p in range(10, 15)]
    # Each of the two that waited computes 11 tokens for its second one, or what is left of 8.
    computed = 10 + 3 * 4 + 2 * (11 + 3) - prefix_caching * 2 * 8
    assert scheduler.statistics().num_scheduled_tokens == computed
    assert_nothing_is_held(scheduler)


@pytest.mark.parametrize("max_num_seqs", [1, 2, 4])
def test_children_that_want_one_token_end_with_the_step_whether_they_had_a_seq_id_or_not(
    max_num_seqs,
):
    scheduler = make_scheduler(max_num_seqs=max_num_seqs)
    parent = add(scheduler, "parent", 6, max_tokens=1)
    step = scheduler.schedule()
    children = [child_of(parent, f"c{index}", max_tokens=1) for index in range(3)]
    at_limit = update(scheduler, step, [Fork(parent, c, first_token(c)) for c in children])
    assert sorted(names(at_limit)) == ["c0", "c1", "c2", "parent"]
    assert [child.output_token_ids for child in children] == [[first_token(c)] for c in children]
    assert_nothing_is_held(scheduler)


def test_a_child_outlives_a_parent_that_ends_with_the_same_step():
    scheduler = make_scheduler()
    parent = add(scheduler, "parent", 6, max_tokens=1)
    step = scheduler.schedule()
    child = child_of(parent, "child", max_tokens=4)
    assert update(scheduler, step, [Fork(parent, child, first_token(child))]) == [parent]
    assert names(drain(scheduler)) == ["child"]
    assert child.output_token_ids == [token_of("child", p) for p in range(6, 10)]
    assert_nothing_is_held(scheduler)


def test_a_parent_that_is_aborted_in_mid_step_may_still_be_forked():
    scheduler = make_scheduler()
    parent = add(scheduler, "parent", 6)
    step = scheduler.schedule()
    scheduler.abort("parent")
    child = child_of(parent, "child", max_tokens=4)
    assert update(scheduler, step, [Fork(parent, child, first_token(child))]) == []
    assert names(drain(scheduler)) == ["child"]
    assert_nothing_is_held(scheduler)


@pytest.mark.parametrize("target", ["parent", "c0", "c3"])
@pytest.mark.parametrize("when", ["between steps", "in a step"])
def test_any_of_a_family_may_be_aborted(target, when):
    """c3 has no seq_id when it is forked."""
    scheduler = make_scheduler(max_num_seqs=4)
    parent = add(scheduler, "parent", 10, max_tokens=6)
    family = [parent, *fork_at_the_prompt(scheduler, parent, ["c0", "c1", "c2", "c3"], 6)]
    assert family[-1].status is RequestStatus.WAITING
    step = None if when == "between steps" else scheduler.schedule()
    scheduler.abort(target)
    if step is not None:
        update(scheduler, step)
    assert set(names(drain(scheduler))) == set(names(family)) - {target}
    for request in family[1:]:
        if request.request_id != target:
            expected = [token_of(request.request_id, p) for p in range(10, 16)]
            assert request.output_token_ids == expected
    assert_nothing_is_held(scheduler)


def test_several_parents_fork_in_one_step_into_the_order_of_ranks():
    scheduler = make_scheduler()
    one, two = add(scheduler, "one", 5), add(scheduler, "two", 5, priority=2)
    step = scheduler.schedule()
    children = [
        child_of(two, "c0", priority=1), child_of(one, "c1", priority=3), child_of(one, "c2"),
    ]  # fmt: skip
    parents = [two, one, one]
    update(
        scheduler,
        step,
        [Fork(p, c, first_token(c)) for p, c in zip(parents, children, strict=True)],
    )
    step = scheduler.schedule()
    assert names(step.sampled_requests) == ["one", "c2", "c0", "two", "c1"]
    update(scheduler, step)
    drain(scheduler)
    for parent, child in zip(parents, children, strict=True):
        assert child.token_ids[:5] == parent.token_ids[:5]
        assert child.output_token_ids == [token_of(child.request_id, p) for p in range(5, 14)]


@pytest.mark.parametrize("max_num_seqs", [1, 4])
def test_a_fork_in_mid_answer_goes_on_from_there(max_num_seqs):
    scheduler = make_scheduler(max_num_seqs=max_num_seqs)
    parent = add(scheduler, "parent", 5, max_tokens=12)
    for _ in range(4):
        run_step(scheduler)
    assert parent.num_output_tokens == 4
    (child,) = fork_at_the_prompt(scheduler, parent, ["child"], max_tokens=3)
    drain(scheduler)
    assert child.token_ids[:9] == parent.token_ids[:9]
    assert child.output_token_ids == [token_of("child", p) for p in range(9, 12)]
    assert_nothing_is_held(scheduler)


@pytest.mark.parametrize("num_host_blocks", [0, 50])
def test_children_that_outgrow_the_pool_make_room_newest_first(num_host_blocks):
    scheduler = make_scheduler(num_blocks=10, num_host_blocks=num_host_blocks, swap_cost=0.1)
    parent = add(scheduler, "parent", 6, max_tokens=20)
    children = fork_at_the_prompt(scheduler, parent, ["c0", "c1", "c2"], max_tokens=20)
    preempted = []
    while scheduler.has_unfinished:
        step = scheduler.schedule()
        preempted += names(step.preempted)
        update(scheduler, step)
    assert preempted[:2] == ["c2", "c1"]
    for child in children:
        assert child.output_token_ids == [token_of(child.request_id, p) for p in range(6, 26)]
    assert_nothing_is_held(scheduler)


def parent_in_mid_prompt(scheduler: Scheduler, step: ScheduledStep) -> list[Fork]:
    (other,) = [r for r in scheduler._requests.values() if r.request_id == "long"]
    return [Fork(other, child_of(other, "child"), 1)]


def id_in_use(scheduler: Scheduler, step: ScheduledStep) -> list[Fork]:
    (parent,) = step.sampled_requests
    return [Fork(parent, child_of(parent, "long"), 1)]


def same_id_twice(scheduler: Scheduler, step: ScheduledStep) -> list[Fork]:
    (parent,) = step.sampled_requests
    return [Fork(parent, child_of(parent, "child"), 1) for _ in range(2)]


def child_too_long(scheduler: Scheduler, step: ScheduledStep) -> list[Fork]:
    (parent,) = step.sampled_requests
    children = [child_of(parent, "child"), child_of(parent, "longer", max_tokens=9999)]
    return [Fork(parent, child, 1) for child in children]


@pytest.mark.parametrize(
    ("make_forks", "error"),
    [
        (parent_in_mid_prompt, InvalidStepError),
        (id_in_use, InvalidRequestError),
        (same_id_twice, InvalidRequestError),
        (child_too_long, PromptTooLongError),
    ],
)
def test_forks_that_make_no_sense_are_refused_and_change_nothing(make_forks, error):
    scheduler = make_scheduler(token_budget=40)
    parent = add(scheduler, "parent", 6)
    add(scheduler, "long", 90)
    step = scheduler.schedule()
    assert step.sampled_requests == [parent]
    with pytest.raises(error):
        scheduler.update(step, [1], make_forks(scheduler, step))
    scheduler.check_integrity()
    assert parent.num_output_tokens == 0
    update(scheduler, step)
    assert names(drain(scheduler)) == ["parent", "long"]
    assert_nothing_is_held(scheduler)
