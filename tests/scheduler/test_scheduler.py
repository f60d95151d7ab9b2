"""The scheduler: budget, preemption, refusals, and that everything always finishes."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest

from paged_kv.errors import ConfigError, InvalidRequestError, PromptTooLongError
from paged_kv.scheduler.admission import MAX_TIMES_PASSED
from paged_kv.scheduler.request import RequestStatus
from tests.support.scheduler_steps import (
    add,
    assert_nothing_is_held,
    complete,
    counts_of,
    drain,
    every_geometry,
    make_scheduler,
    run_step,
    token_of,
    two_that_outgrow_the_pool,
)

# -- budget, chunks, order ------------------------------------------------------------------------


def test_long_prompts_are_computed_in_chunks_that_fill_the_budget_exactly():
    scheduler = make_scheduler(token_budget=32)
    add(scheduler, "a", 100, max_tokens=3)
    add(scheduler, "b", 50)
    add(scheduler, "c", 3)
    assert [run_step(scheduler) for _ in range(6)] == [
        {"a": 32},
        {"a": 32},
        {"a": 32},
        {"a": 4, "b": 28},
        {"a": 1, "b": 22, "c": 3},
        {"a": 1, "b": 1, "c": 1},
    ]


@every_geometry
@pytest.mark.parametrize("token_budget", [1, 7, 64])
def test_no_step_exceeds_the_token_budget(geometry, token_budget):
    scheduler = make_scheduler(geometry, token_budget=token_budget)
    for index, length in enumerate((90, 1, 33, 200)):
        add(scheduler, f"r{index}", length)
    totals = []
    while scheduler.has_unfinished:
        counts = run_step(scheduler)
        totals.append(sum(counts.values()))
    assert max(totals) == token_budget
    assert min(totals) >= 1


def test_a_request_is_sampled_only_when_all_its_tokens_are_computed():
    scheduler = make_scheduler(token_budget=10)
    add(scheduler, "a", 25)
    add(scheduler, "b", 4)
    sampled = []
    for _ in range(4):
        step = scheduler.schedule()
        sampled.append([request.request_id for request in step.sampled_requests])
        complete(scheduler, step)
    assert sampled == [[], [], ["a", "b"], ["a", "b"]]


def test_a_step_carries_the_tokens_at_its_positions_and_points_at_each_last_one():
    scheduler = make_scheduler(token_budget=9)
    first, second = add(scheduler, "a", 6), add(scheduler, "b", 8)
    step = scheduler.schedule()
    assert step.token_ids.tolist() == first.token_ids + second.token_ids[:3]
    assert step.plan.positions.tolist() == [*range(6), *range(3)]
    assert step.sampled_requests == [first]
    assert step.sampled_token_index.tolist() == [5]
    scheduler.update(step, np.array([777]))
    step = scheduler.schedule()
    assert step.token_ids.tolist() == [777, *second.token_ids[3:]]
    assert step.sampled_requests == [first, second]
    assert step.sampled_token_index.tolist() == [0, 5]


def test_equal_priorities_are_served_first_come_first_served():
    scheduler = make_scheduler(max_num_seqs=1)
    for name, length in (("long", 60), ("short", 1), ("middle", 20)):
        add(scheduler, name, length)
    assert [request.request_id for request in drain(scheduler)] == ["long", "short", "middle"]


def test_a_lower_priority_number_is_served_before_an_earlier_arrival():
    scheduler = make_scheduler(max_num_seqs=1)
    for name, priority in (("a", 5), ("b", 0), ("c", 5), ("d", -1), ("e", 0)):
        add(scheduler, name, 3, priority=priority)
    assert [request.request_id for request in drain(scheduler)] == ["d", "b", "e", "a", "c"]


def test_the_budget_goes_to_the_best_rank_of_the_running_requests_first():
    scheduler = make_scheduler(token_budget=1)
    add(scheduler, "late", 1, max_tokens=9, priority=1)
    run_step(scheduler)
    scheduler.token_budget = 5
    add(scheduler, "urgent", 4, max_tokens=9, priority=0)
    assert run_step(scheduler) == {"late": 1, "urgent": 4}
    scheduler.token_budget = 1
    assert run_step(scheduler) == {"urgent": 1}


def test_no_more_sequences_run_than_there_are_seq_ids():
    scheduler = make_scheduler(max_num_seqs=3)
    for index in range(5):
        add(scheduler, f"r{index}", 2)
    run_step(scheduler)
    assert (scheduler.num_running, scheduler.num_waiting) == (3, 2)


def test_schedule_with_no_requests_is_none():
    scheduler = make_scheduler()
    assert scheduler.schedule() is None
    add(scheduler, "a", 3)
    drain(scheduler)
    assert scheduler.schedule() is None


def test_update_returns_exactly_the_requests_at_their_limit():
    scheduler = make_scheduler()
    one, two = add(scheduler, "one", 5, max_tokens=1), add(scheduler, "two", 5, max_tokens=2)
    step = scheduler.schedule()
    assert scheduler.update(step, np.array([7, 8])) == [one]
    scheduler.finish(one)
    step = scheduler.schedule()
    assert scheduler.update(step, np.array([9])) == [two]
    assert (one.output_token_ids, two.output_token_ids) == ([7], [8, 9])


# -- preemption -----------------------------------------------------------------------------------


def test_out_of_blocks_preempts_the_latest_arrival():
    scheduler, a, b = two_that_outgrow_the_pool()
    step = scheduler.schedule()
    assert step.preempted == [b]
    assert counts_of(scheduler, step) == {"a": 1}
    assert (b.status, b.num_preemptions, b.seq_id) == (RequestStatus.PREEMPTED, 1, None)
    assert (a.status, a.num_preemptions) == (RequestStatus.RUNNING, 0)
    assert scheduler.manager.num_free_blocks == 1


def test_out_of_blocks_preempts_the_worst_priority_before_the_latest_arrival():
    scheduler, a, _ = two_that_outgrow_the_pool(first_priority=1)
    assert scheduler.schedule().preempted == [a]


def test_a_preempted_request_keeps_its_outputs_and_is_recomputed_from_zero():
    scheduler, _, b = two_that_outgrow_the_pool()
    outputs = list(b.output_token_ids)
    assert len(outputs) == 17
    finished = complete(scheduler, scheduler.schedule())
    while not finished:
        assert b.status is RequestStatus.PREEMPTED
        assert b.output_token_ids == outputs
        finished = complete(scheduler, scheduler.schedule())
    step = scheduler.schedule()
    assert step.plan.context_lens.tolist() == [0]
    assert step.token_ids.tolist() == b.token_ids
    assert step.sampled_requests == [b]
    complete(scheduler, step)
    drain(scheduler)
    assert b.output_token_ids == [token_of("b", position) for position in range(16, 56)]


def test_nothing_is_admitted_in_a_step_that_preempted():
    scheduler, _, b = two_that_outgrow_the_pool()
    add(scheduler, "urgent", 1, priority=-1)
    step = scheduler.schedule()
    assert step.preempted == [b]
    assert counts_of(scheduler, step) == {"a": 1}
    complete(scheduler, step)
    assert run_step(scheduler) == {"a": 1, "urgent": 1}


def test_a_request_is_not_admitted_while_its_whole_prompt_would_not_fit():
    scheduler = make_scheduler(num_blocks=4, token_budget=32)
    add(scheduler, "a", 20, max_tokens=2)
    add(scheduler, "b", 33, max_tokens=2)  # 3 blocks; its first 12 tokens would fit at once
    assert run_step(scheduler) == {"a": 20}
    assert run_step(scheduler) == {"a": 1}
    assert run_step(scheduler) == {"b": 32}


def test_a_request_that_does_not_fit_is_passed_by_one_that_does_but_not_for_ever():
    scheduler = make_scheduler(num_blocks=4, token_budget=64)
    add(scheduler, "a", 20, max_tokens=28)
    big = add(scheduler, "big", 40, max_tokens=2)
    add(scheduler, "small", 1, max_tokens=1)
    assert run_step(scheduler) == {"a": 20, "small": 1}
    assert big.times_passed == 1
    for turn in range(2, MAX_TIMES_PASSED + 1):
        add(scheduler, f"small{turn}", 1, max_tokens=1)
        assert run_step(scheduler) == {"a": 1, f"small{turn}": 1}
    assert big.times_passed == MAX_TIMES_PASSED
    add(scheduler, "late", 1, max_tokens=1)
    while "big" not in (served := run_step(scheduler)):
        assert served == {"a": 1}
    assert served["big"] == 40


# -- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_options", "error", "numbers"),
    [
        ({"prompt_length": 90, "max_tokens": 11}, PromptTooLongError, ["90", "11", "100"]),
        ({"prompt_length": 101, "max_tokens": 1}, PromptTooLongError, ["101", "100"]),
        ({"prompt_length": 50, "max_tokens": 32}, PromptTooLongError, ["50", "32", "6", "5"]),
        ({"prompt_length": 81, "max_tokens": 1}, PromptTooLongError, ["81", "1", "6", "5"]),
        ({"prompt_length": 0, "max_tokens": 1}, InvalidRequestError, ["target", "empty"]),
        ({"prompt_length": 3, "max_tokens": 0}, InvalidRequestError, ["max_tokens", "0"]),
        ({"prompt_length": 3, "max_tokens": -2}, InvalidRequestError, ["max_tokens", "-2"]),
    ],
    ids=["length", "prompt-length", "pool", "prompt-pool", "empty", "max-tokens-0", "negative"],
)
def test_a_request_that_can_never_be_served_is_refused_with_its_numbers(
    request_options, error, numbers
):
    scheduler = make_scheduler(num_blocks=5, max_model_len=100)
    other = add(scheduler, "other", 5)
    with pytest.raises(error) as caught:
        add(scheduler, "target", **request_options)
    words = re.findall(r"-?\w+", str(caught.value))
    assert set(numbers) <= set(words)
    assert scheduler.num_waiting == 1
    scheduler.check_integrity()
    assert drain(scheduler) == [other]


@pytest.mark.parametrize("options", [{"prompt_length": 90, "max_tokens": 10}, {"prompt_length": 1}])
def test_a_request_that_fits_exactly_is_served(options):
    scheduler = make_scheduler(num_blocks=7, max_model_len=100)
    request = add(scheduler, "a", **options)
    assert drain(scheduler) == [request]
    assert request.num_output_tokens == request.max_tokens


def test_the_last_sampled_token_needs_no_block():
    """16 + 17 tokens, of which the last is never stored: 2 blocks of 16."""
    scheduler = make_scheduler(num_blocks=2)
    request = add(scheduler, "a", 16, max_tokens=17)
    drain(scheduler)
    assert request.num_output_tokens == 17


def test_a_request_id_in_use_is_refused_and_the_first_goes_on():
    scheduler = make_scheduler()
    first = add(scheduler, "same", 5)
    with pytest.raises(InvalidRequestError, match="'same'"):
        add(scheduler, "same", 9)
    run_step(scheduler)
    with pytest.raises(InvalidRequestError, match="'same'"):
        add(scheduler, "same", 9)
    assert drain(scheduler) == [first]


def test_a_request_id_may_be_used_again_once_it_is_over():
    scheduler = make_scheduler()
    add(scheduler, "same", 5)
    drain(scheduler)
    again = add(scheduler, "same", 9)
    assert drain(scheduler) == [again]


def test_a_request_id_used_again_after_abort_has_the_rank_of_its_new_request():
    scheduler = make_scheduler(max_num_seqs=1)
    add(scheduler, "same", 5)
    add(scheduler, "other", 5)
    scheduler.abort("same")
    add(scheduler, "same", 5)
    assert [request.request_id for request in drain(scheduler)] == ["other", "same"]


def test_a_request_id_used_again_after_its_end_has_the_rank_of_its_new_request():
    scheduler = make_scheduler(max_num_seqs=1)
    add(scheduler, "same", 5, max_tokens=1)
    complete(scheduler, scheduler.schedule())
    add(scheduler, "other", 5)
    add(scheduler, "same", 5)
    assert [request.request_id for request in drain(scheduler)] == ["other", "same"]


@pytest.mark.parametrize("token_budget", [0, -3])
def test_a_token_budget_below_one_is_refused(token_budget):
    with pytest.raises(ConfigError, match=f"token_budget.*{token_budget}"):
        make_scheduler(token_budget=token_budget)


# -- liveness -------------------------------------------------------------------------------------


@every_geometry
@pytest.mark.parametrize("token_budget", [1, 13, 500])
@pytest.mark.parametrize("seed", range(4))
def test_every_request_finishes_in_the_smallest_pool_that_takes_the_biggest(
    geometry, token_budget, seed
):
    rng = random.Random(seed)
    longest = 3 * geometry.block_size + 60
    sizes = [(rng.randint(1, longest), rng.randint(1, 60)) for _ in range(5)]
    smallest = max(geometry.max_blocks(prompt + output - 1) for prompt, output in sizes)
    scheduler = make_scheduler(geometry, num_blocks=smallest, token_budget=token_budget)
    requests = [
        add(scheduler, f"r{index}", prompt, max_tokens=output, priority=rng.randrange(2))
        for index, (prompt, output) in enumerate(sizes)
    ]
    finished = drain(scheduler)
    assert {r.request_id for r in finished} == {r.request_id for r in requests}
    for request in requests:
        end = request.num_prompt_tokens + request.max_tokens
        assert request.token_ids == [token_of(request.request_id, p) for p in range(end)]
    assert_nothing_is_held(scheduler)


@every_geometry
@pytest.mark.parametrize("length", [1, 17, 64, 200, 300])
def test_a_pool_one_block_smaller_than_the_smallest_is_refused(geometry, length):
    smallest = geometry.max_blocks(length - 1 + 8)
    add(make_scheduler(geometry, num_blocks=smallest), "a", length, max_tokens=8)
    if smallest > 1:
        with pytest.raises(PromptTooLongError, match=rf"{smallest} blocks.* {smallest - 1}"):
            add(make_scheduler(geometry, num_blocks=smallest - 1), "a", length, max_tokens=8)
