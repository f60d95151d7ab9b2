"""That nobody waits for ever: decodes beside prompts, turns at a small budget, aging."""

from __future__ import annotations

import random

import pytest

from paged_kv.errors import ConfigError
from paged_kv.scheduler.request import AGING_STEPS, Request
from paged_kv.scheduler.scheduler import Scheduler
from tests.support.scheduler_policies import add, assert_nothing_is_held, make_scheduler, run_step
from tests.support.scheduler_steps import complete, counts_of, drain

# -- decodes beside prompts -----------------------------------------------------------------------


def eight_decodes(**options: object) -> tuple[Scheduler, set[str]]:
    usual = {"num_blocks": 2000, "max_num_seqs": 16, "max_model_len": 5000}
    scheduler = make_scheduler(**{**usual, "prefix_caching": False, **options})
    decodes = {f"d{index}" for index in range(8)}
    for name in sorted(decodes):
        add(scheduler, name, 5, 200, priority=1)
    run_step(scheduler)
    return scheduler, decodes


def test_decodes_get_their_token_in_every_step_beside_a_long_prompt_of_a_better_rank():
    scheduler, decodes = eight_decodes()
    prompt = add(scheduler, "prompt", 4000, 3, priority=0)
    num_steps = 0
    while not prompt.num_output_tokens:
        counts = run_step(scheduler)
        num_steps += 1
        assert {name: counts.get(name) for name in decodes} == dict.fromkeys(decodes, 1)
        assert counts["prompt"] == min(64 - 8, 4000 - 56 * (num_steps - 1))
    assert num_steps == -(-4000 // 56)


def test_prompts_share_by_rank_what_decodes_leave():
    scheduler, decodes = eight_decodes()
    add(scheduler, "second", 50, priority=3)
    add(scheduler, "first", 90, priority=2)
    served = dict.fromkeys(decodes, 1)
    assert run_step(scheduler) == {**served, "first": 56}
    assert run_step(scheduler) == {**served, "first": 34, "second": 22}
    assert run_step(scheduler) == {**served, "first": 1, "second": 28}


def test_prompts_take_no_more_beside_decodes_than_is_set():
    scheduler, decodes = eight_decodes()
    scheduler.most_beside_decodes = 5
    add(scheduler, "a", 7)
    add(scheduler, "b", 50)
    served = dict.fromkeys(decodes, 1)
    assert run_step(scheduler) == {**served, "a": 5}
    assert run_step(scheduler) == {**served, "a": 2, "b": 3}
    scheduler.most_beside_decodes = None
    assert run_step(scheduler) == {**served, "a": 1, "b": 47}
    drain(scheduler)
    scheduler.most_beside_decodes = 5
    add(scheduler, "alone", 100)
    assert run_step(scheduler) == {"alone": 64}
    drain(scheduler)
    assert_nothing_is_held(scheduler)


def test_a_step_of_decodes_alone_can_be_asked_for():
    """Of all that decode, and of nobody else, as long as it is asked for."""
    scheduler, decodes = eight_decodes()
    add(scheduler, "a", 7)
    served = dict.fromkeys(decodes, 1)
    scheduler.most_beside_decodes = 3
    assert run_step(scheduler) == {**served, "a": 3}
    scheduler.most_beside_decodes = 0
    add(scheduler, "b", 5)
    for _ in range(3):
        assert run_step(scheduler) == served
    scheduler.most_beside_decodes = None
    assert run_step(scheduler) == {**served, "a": 4, "b": 5}


def test_how_long_the_first_that_waits_has_lacked_tokens_of_a_step():
    scheduler, _ = eight_decodes(max_num_seqs=10)
    assert scheduler.num_steps_waited == 0
    scheduler.most_beside_decodes = 2
    add(scheduler, "a", 30)
    run_step(scheduler)
    assert scheduler.num_steps_waited == 0  # it has begun
    add(scheduler, "b", 30, priority=1)
    for num_steps in range(1, 6):
        run_step(scheduler)
        assert scheduler.num_steps_waited == num_steps
    scheduler.most_beside_decodes = None
    run_step(scheduler)
    assert scheduler.num_steps_waited == 0


def test_who_lacks_a_sequence_does_not_wait_for_tokens_of_a_step():
    scheduler, _ = eight_decodes(max_num_seqs=8)
    add(scheduler, "a", 30)
    for _ in range(5):
        run_step(scheduler)
    assert scheduler.num_waiting == 1
    assert scheduler.num_steps_waited == 0


def test_a_prompt_takes_no_more_of_a_step_than_its_cap():
    scheduler, decodes = eight_decodes(max_prefill_tokens=20)
    for name in ("a", "b", "c"):
        add(scheduler, name, 50)
    served = dict.fromkeys(decodes, 1)
    assert run_step(scheduler) == {**served, "a": 20, "b": 20, "c": 16}
    assert run_step(scheduler) == {**served, "a": 20, "b": 20, "c": 16}
    assert run_step(scheduler) == {**served, "a": 10, "b": 10, "c": 18}
    drain(scheduler)
    assert_nothing_is_held(scheduler)


def test_the_cap_holds_for_one_that_is_alone():
    scheduler = make_scheduler(max_prefill_tokens=20)
    add(scheduler, "a", 50)
    assert [run_step(scheduler) for _ in range(4)] == [{"a": 20}, {"a": 20}, {"a": 10}, {"a": 1}]


@pytest.mark.parametrize("cap", [0, -1])
def test_a_cap_below_one_is_refused(cap):
    with pytest.raises(ConfigError, match=f"max_prefill_tokens.*{cap}"):
        make_scheduler(max_prefill_tokens=cap)


# -- turns ----------------------------------------------------------------------------------------


def admitted_one_by_one(token_budget: int, num_requests: int, **options: object) -> Scheduler:
    """They decode, more of them than there are tokens in a step."""
    scheduler = make_scheduler(max_num_seqs=16, prefix_caching=False, **options)
    for index in range(num_requests):
        add(scheduler, f"d{index}", 2, 40, priority=index)
    run_step(scheduler)
    scheduler.token_budget = token_budget
    return scheduler


@pytest.mark.parametrize(("num_decodes", "budget"), [(8, 3), (9, 3), (7, 1), (9, 8)])
def test_where_decodes_outnumber_the_budget_they_take_turns(num_decodes, budget):
    scheduler = admitted_one_by_one(budget, num_decodes)
    within = -(-num_decodes // budget)
    served = [set(run_step(scheduler)) for _ in range(6 * within)]
    for start in range(len(served) - within + 1):
        assert len(set().union(*served[start : start + within])) == num_decodes
    assert {len(names) for names in served} == {budget}
    drain(scheduler)
    assert_nothing_is_held(scheduler)


def test_a_prompt_takes_its_turn_where_decodes_leave_nothing():
    scheduler = admitted_one_by_one(64, 8)
    add(scheduler, "prompt", 150, 1)
    run_step(scheduler)
    scheduler.token_budget = 8
    counts = [run_step(scheduler) for _ in range(18)]
    assert {count for served in counts for count in served.values()} == {1}
    assert sum("prompt" in names for names in counts) == 16
    for name in (f"d{index}" for index in range(8)):
        assert sum(name in names for names in counts) == 16


# -- priorities that age --------------------------------------------------------------------------


def run_beside_a_flood(level: int, limit: int) -> int:
    """Steps until a request is admitted beside better ones that arrive in every step."""
    scheduler = make_scheduler(max_num_seqs=2, prefix_caching=False)
    for index in range(2):
        add(scheduler, f"first{index}", 1, 2)
    waiting = add(scheduler, "waiting", 1, 1, priority=level)
    for turn in range(limit):
        add(scheduler, f"f{turn}", 1, 1)
        add(scheduler, f"g{turn}", 1, 1)
        step = scheduler.schedule()
        is_served = waiting.seq_id is not None
        complete(scheduler, step)
        if is_served:
            return turn
    return limit


@pytest.mark.parametrize("level", [1, 2])
def test_a_level_of_priority_is_worth_so_many_steps_of_waiting(level):
    num_steps = run_beside_a_flood(level, 3 * AGING_STEPS)
    assert level * AGING_STEPS <= num_steps <= level * AGING_STEPS + 5


def test_at_equal_times_priority_decides_however_many_wait():
    scheduler = make_scheduler(max_num_seqs=1, prefix_caching=False)
    requests = [add(scheduler, f"r{index}", 1, 1, priority=-index) for index in range(200)]
    assert drain(scheduler) == requests[::-1]


def test_a_running_request_that_has_aged_makes_room_last():
    """Two that outgrow the pool: the newer one has the better priority, and came too late."""
    for num_before, name in ((AGING_STEPS - 2, "old"), (AGING_STEPS + 2, "new")):
        scheduler = make_scheduler(num_blocks=6, prefix_caching=False)
        old = add(scheduler, "old", 4, 20, priority=1)
        old.arrive(old.arrival, -num_before)
        add(scheduler, "new", 4, 20, priority=0)
        for _ in range(9):
            run_step(scheduler)
        assert [request.request_id for request in scheduler.schedule().preempted] == [name]


# -- everybody finishes ---------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_every_request_finishes_within_a_bound_whatever_else_arrives(seed):
    """Arrivals never end; steps until a request ends are bounded by what may come before it."""
    rng = random.Random(seed)
    scheduler = make_scheduler(
        num_blocks=40,
        max_num_seqs=rng.choice([2, 4, 8]),
        token_budget=rng.choice([4, 16, 64]),
        max_prefill_tokens=rng.choice([None, 3, 10]),
        prefix_caching=rng.random() < 0.5,
    )
    scheduler.most_beside_decodes = rng.choice([None, 1, 6])
    levels, rate = 3, rng.uniform(0.5, 1.5)
    born: dict[Request, int] = {}
    longest, num_made = 0, 0
    bound = 2 * levels * AGING_STEPS
    for now in range(5 * AGING_STEPS):
        if len(born) < 60 and rng.random() < rate:
            num_made += 1
            length, priority = rng.choice([2, 9, 60]), rng.randrange(levels)
            born[add(scheduler, f"r{num_made}", length, rng.choice([1, 5, 40]), priority)] = now
        step = scheduler.schedule()
        if step is None:
            continue
        counts = counts_of(scheduler, step)
        assert sum(counts.values()) <= scheduler.token_budget
        for request in complete(scheduler, step):
            longest = max(longest, now - born.pop(request))
        assert not born or now - min(born.values()) < bound
    assert num_made > 100
    assert longest < bound
    drain(scheduler)
    assert_nothing_is_held(scheduler)
