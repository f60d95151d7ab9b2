"""Who is served, who waits, who makes room and how: the policies of the scheduler, in numbers.

No torch: tokens come from a function, and where it matters `BlockContents` follows what the blocks
hold. N is a geometry of 4 tokens a block that never seals.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from paged_kv.blocks.block_manager import BlockManager
from paged_kv.blocks.geometry import BlockGeometry
from paged_kv.blocks.token_chain import ExtraKey
from paged_kv.errors import (
    ConfigError,
    InvalidRequestError,
    InvalidStepError,
    OutOfBlocksError,
    PromptTooLongError,
)
from paged_kv.scheduler.request import Request, RequestStatus
from paged_kv.scheduler.scheduler import (
    MAX_TIMES_PASSED,
    Fork,
    ScheduledStep,
    Scheduler,
    SchedulerStatistics,
)
from tests.scheduler.test_scheduler import complete, counts_of, drain, geometry_of, token_of
from tests.support.block_contents import BlockContents, prefix_values

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
    token_budget: int = 64,
    watermark: float = 0.0,
    swap_cost: float = 1.0,
) -> Scheduler:
    manager = BlockManager(
        geometry,
        num_blocks=num_blocks,
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        prefix_caching=prefix_caching,
        num_host_blocks=num_host_blocks,
    )
    return Scheduler(manager, token_budget=token_budget, watermark=watermark, swap_cost=swap_cost)


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


# -- who is served first ------------------------------------------------------------------------


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


# -- who makes room -----------------------------------------------------------------------------


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


# -- who is let in ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("watermark", "num_kept_free"), [(0.0, 0), (0.05, 5), (0.059, 5), (0.25, 25)]
)
def test_an_admission_leaves_the_watermark_free(watermark, num_kept_free):
    """100 blocks, of which one request holds 10 with room for its next token."""
    fits = 100 - 10 - num_kept_free
    for num_blocks, admitted in ((fits, True), (fits + 1, False)):
        scheduler = make_scheduler(watermark=watermark)
        add(scheduler, "a", 38)
        run_step(scheduler)
        add(scheduler, "b", 4 * num_blocks, max_tokens=1)
        assert ("b" in run_step(scheduler)) == admitted


def test_an_admission_leaves_room_for_what_the_running_ones_compute_now():
    """The block that the next token of a needs is not given away."""
    for num_blocks, admitted in ((89, True), (90, False)):
        scheduler = make_scheduler(watermark=0.0)
        add(scheduler, "a", 40)
        run_step(scheduler)
        add(scheduler, "b", 4 * num_blocks, max_tokens=1)
        assert ("b" in run_step(scheduler)) == admitted


def test_the_whole_prompt_has_to_fit_not_only_its_first_chunk():
    for num_blocks, admitted in ((90, True), (91, False)):
        scheduler = make_scheduler(token_budget=40, max_num_seqs=3)
        add(scheduler, "a", 38)
        run_step(scheduler)
        add(scheduler, "b", 4 * num_blocks, max_tokens=1)
        assert ("b" in run_step(scheduler)) == admitted


def test_admissions_of_one_step_add_up():
    scheduler = make_scheduler(num_blocks=10)
    for name, length in (("a", 12), ("b", 16), ("c", 13), ("d", 12)):
        add(scheduler, name, length, max_tokens=1)
    assert run_step(scheduler) == {"a": 12, "b": 16, "d": 12}


def test_admissions_of_one_step_leave_the_watermark_free_together():
    """Of 90 free blocks 20 are to stay free: after 40 more there is room for 30."""
    for num_blocks, admitted in ((30, True), (31, False)):
        scheduler = make_scheduler(watermark=0.2, token_budget=1000)
        add(scheduler, "a", 38)
        run_step(scheduler)
        add(scheduler, "b", 4 * 40, max_tokens=1)
        add(scheduler, "c", 4 * num_blocks, max_tokens=1)
        counts = run_step(scheduler)
        assert "b" in counts
        assert ("c" in counts) == admitted


def test_the_watermark_does_not_keep_a_request_out_of_an_empty_pool():
    scheduler = make_scheduler(watermark=0.5)
    add(scheduler, "a", 400, max_tokens=1)
    assert run_step(scheduler) == {"a": 64}


def test_the_budget_left_is_what_the_next_request_gets():
    scheduler = make_scheduler(token_budget=16)
    add(scheduler, "a", 10)
    add(scheduler, "b", 10)
    add(scheduler, "c", 10)
    assert run_step(scheduler) == {"a": 10, "b": 6}


@pytest.mark.parametrize("watermark", [-0.1, 1.0, 3])
def test_a_watermark_outside_its_range_is_refused(watermark):
    with pytest.raises(ConfigError, match=f"watermark.*{watermark}"):
        make_scheduler(watermark=watermark)


def test_a_negative_swap_cost_is_refused():
    with pytest.raises(ConfigError, match=r"swap_cost.*-0\.5"):
        make_scheduler(swap_cost=-0.5)


# -- who is passed ------------------------------------------------------------------------------


def one_that_does_not_fit(max_num_seqs: int = 8) -> tuple[Scheduler, Request]:
    """A running request leaves 90 blocks, and the next one needs 95."""
    scheduler = make_scheduler(max_num_seqs=max_num_seqs)
    add(scheduler, "a", 38, max_tokens=40)
    run_step(scheduler)
    return scheduler, add(scheduler, "big", 4 * 95, max_tokens=1)


def test_a_request_that_does_not_fit_is_passed_a_limited_number_of_times():
    scheduler, big = one_that_does_not_fit()
    for turn in range(MAX_TIMES_PASSED):
        add(scheduler, f"s{turn}", 1, max_tokens=1)
        assert f"s{turn}" in run_step(scheduler)
        assert big.times_passed == turn + 1
    add(scheduler, "late", 1, max_tokens=1)
    for _ in range(3):
        assert run_step(scheduler) == {"a": 1}
    assert big.times_passed == MAX_TIMES_PASSED
    scheduler.abort("a")
    assert run_step(scheduler) == {"big": 64}
    assert set(run_step(scheduler)) == {"big"}  # the budget is its own


def test_a_request_is_passed_no_more_often_by_many_in_one_step():
    scheduler, big = one_that_does_not_fit(max_num_seqs=64)
    for turn in range(40):
        add(scheduler, f"s{turn}", 1, max_tokens=1)
    run_step(scheduler)
    assert big.times_passed <= MAX_TIMES_PASSED


def test_better_ranks_do_not_count_as_passing():
    scheduler, big = one_that_does_not_fit()
    big.times_passed = MAX_TIMES_PASSED
    add(scheduler, "urgent", 1, max_tokens=1, priority=-1)
    add(scheduler, "equal", 1, max_tokens=1)
    assert set(run_step(scheduler)) == {"a", "urgent"}
    assert big.times_passed == MAX_TIMES_PASSED


def test_each_of_several_that_do_not_fit_is_passed():
    scheduler, big = one_that_does_not_fit()
    bigger = add(scheduler, "bigger", 4 * 96, max_tokens=1)
    add(scheduler, "small", 1, max_tokens=1)
    huge = add(scheduler, "huge", 4 * 96, max_tokens=1)
    run_step(scheduler)
    assert (big.times_passed, bigger.times_passed, huge.times_passed) == (1, 1, 0)


def test_a_request_that_waits_for_a_seq_id_is_not_passed():
    scheduler = make_scheduler(max_num_seqs=1)
    add(scheduler, "a", 4)
    waiting = add(scheduler, "b", 4)
    for _ in range(3):
        run_step(scheduler)
    assert waiting.times_passed == 0


# -- waiting for a prefix -----------------------------------------------------------------------

PROMPT = list(range(1000, 1033))  # 33 tokens: 8 blocks that can be shared, and a token


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


# -- swapped or computed again ------------------------------------------------------------------


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
    return sum(map(int, scheduler._by_seq_id[seq_id].extra_keys))


# -- after a preemption -------------------------------------------------------------------------


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


# -- abort --------------------------------------------------------------------------------------


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


# -- forks --------------------------------------------------------------------------------------


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


# -- statistics ---------------------------------------------------------------------------------


def test_statistics_say_what_is_and_what_was():
    scheduler, a, b = two_of_which_one_makes_room()
    assert scheduler.statistics() == SchedulerStatistics(
        num_running=2,
        num_waiting=0,
        num_swapped=0,
        num_free_blocks=0,
        num_cached_blocks=4,  # a block that its last token fills is found one step later
        num_steps=9,
        num_scheduled_tokens=2 * 12,
        num_preemptions=0,
        num_query_tokens=8,
        num_hit_tokens=0,
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


# -- nothing grows ------------------------------------------------------------------------------


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


# -- everything at once -------------------------------------------------------------------------


class Traffic:
    """Random requests, forks, aborts and steps that fail, over a tiny pool with host blocks."""

    def __init__(self, geometry: BlockGeometry, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        self.geometry = geometry
        self.scheduler = make_scheduler(
            geometry,
            num_blocks=geometry.max_blocks(46) + rng.choice([0, 2, 8]),
            max_num_seqs=rng.choice([2, 4, 6]),
            max_model_len=80,
            num_host_blocks=rng.choice([0, 12, 40]),
            prefix_caching=rng.random() < 0.8,
            token_budget=rng.choice([5, 16, 60]),
            watermark=rng.choice([0.0, 0.1]),
            swap_cost=rng.choice([0.0, 0.5]),
        )
        self.contents = BlockContents(self.scheduler.manager)
        self.expected: dict[Request, list[int]] = {}
        self.num_made = 0
        self.num_forks = 0

    def new_id(self) -> str:
        self.num_made += 1
        return f"r{self.num_made}"

    def add(self) -> None:
        rng = self.rng
        opening = rng.choice([[0] * 24, [1] * 6 + [0] * 10, [0, 1] * 9])
        prompt = opening[: rng.randint(1, len(opening))]
        prompt = prompt + [rng.randrange(2) for _ in range(rng.randint(0, 3))]
        request_id, salt = self.new_id(), rng.choice([0, 0, 1])
        try:
            request = add(
                self.scheduler, request_id, prompt, rng.randint(1, 24), rng.randint(0, 2), (salt,)
            )
        except PromptTooLongError:
            return
        self.expected[request] = list(prompt)

    def abort(self) -> None:
        if self.expected:
            request = self.rng.choice(list(self.expected))
            assert self.scheduler.abort(request.request_id) is request
            del self.expected[request]

    def step(self) -> None:
        rng, scheduler = self.rng, self.scheduler
        was_running = {
            seq_id: scheduler._by_seq_id[seq_id] for seq_id in scheduler._running.tolist()
        }
        step = scheduler.schedule()
        if step is None:
            assert not self.expected
            return
        admitted = [
            request
            for request in scheduler._by_seq_id[scheduler._running].tolist()
            if request not in was_running.values()
        ]
        assert not (admitted and step.preempted)
        assert not (step.swap_ins and step.swap_outs)
        follow(scheduler, self.contents, step)
        if rng.random() < 0.04:
            self.abort()
        if rng.random() < 0.1:
            scheduler.cancel(step)
            return
        sampled = [rng.randrange(2) for _ in step.sampled_requests]
        forks = []
        for request in step.sampled_requests:
            if rng.random() < 0.08 and request in self.expected:
                child = child_of(request, self.new_id(), rng.randint(1, 12), rng.randint(0, 2))
                try:
                    scheduler.check(child)
                except PromptTooLongError:
                    continue
                forks.append(Fork(request, child, rng.randrange(2)))
        for request, token_id in zip(step.sampled_requests, sampled, strict=True):
            if request in self.expected:
                self.expected[request].append(token_id)
        for fork in forks:
            self.num_forks += 1
            self.expected[fork.child] = [*fork.child.tokens.token_ids.tolist(), fork.token_id]
        for request in scheduler.update(step, sampled, forks):
            assert request.num_output_tokens == request.max_tokens
            scheduler.finish(request)
            assert request.token_ids == self.expected.pop(request)

    def check(self) -> None:
        scheduler = self.scheduler
        scheduler.check_integrity()
        check_contents(scheduler, self.contents)
        assert set(self.expected) == set(scheduler._requests.values())
        for request, token_ids in self.expected.items():
            assert request.token_ids == token_ids
        host_pool = scheduler.manager.host_pool
        if host_pool is not None:
            swapped = [r.swapped for r in scheduler.waiting if r.swapped is not None]
            host_ids = [entry.host_block_ids for entry in swapped]
            host_pool.check_integrity(np.concatenate([np.empty(0, dtype=np.int32), *host_ids]))

    def run(self, num_actions: int) -> None:
        for _ in range(num_actions):
            may_add = self.scheduler.num_waiting < 8
            others: list[Callable[[], None]] = [self.add] * 8 * may_add + [self.abort]
            self.rng.choice([*others, *[self.step] * 24])()
            self.check()
        for _ in range(5000):
            if not self.expected:
                break
            self.step()
            self.check()
        assert_nothing_is_held(self.scheduler)


@pytest.mark.parametrize(
    "geometry", [*GEOMETRIES.values(), LONG_TAIL], ids=[*GEOMETRIES, "long tail"]
)
@pytest.mark.parametrize("seed", range(5))
def test_random_traffic_with_forks_and_swaps_keeps_every_token_and_leaks_nothing(geometry, seed):
    traffic = Traffic(geometry, seed)
    traffic.run(150)
    assert traffic.scheduler.statistics().num_steps > 90
