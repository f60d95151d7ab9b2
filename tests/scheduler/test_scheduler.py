"""The scheduler: budget, ranks, preemption, abort, refusals, and that everything always finishes.

Needs no torch: a "model" here is a function from a request and a position to a token id.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from paged_kv.blocks.block_manager import BlockManager
from paged_kv.blocks.geometry import BlockGeometry
from paged_kv.errors import (
    ConfigError,
    InvalidRequestError,
    InvalidStepError,
    PromptTooLongError,
)
from paged_kv.scheduler.request import Request, RequestStatus
from paged_kv.scheduler.scheduler import MAX_TIMES_PASSED, ScheduledStep, Scheduler


def geometry_of(block: int, open_block: int, head: int, min_tail: int) -> BlockGeometry:
    return BlockGeometry(
        block_size=block,
        open_block_size=open_block,
        num_head_tokens=head,
        min_tail_tokens=min_tail,
    )


NATIVE = geometry_of(16, 16, 0, 0)
QUANTIZED = geometry_of(128, 16, 16, 32)
NO_HEAD_NO_TAIL = geometry_of(64, 32, 0, 0)
TINY = geometry_of(4, 2, 2, 3)  # every boundary within a few tokens, a tail of part of a block
GEOMETRIES = {
    "native": NATIVE,
    "quantized": QUANTIZED,
    "no-head-no-tail": NO_HEAD_NO_TAIL,
    "tiny": TINY,
}
every_geometry = pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())


def make_scheduler(
    geometry: BlockGeometry = NATIVE,
    *,
    num_blocks: int = 200,
    max_num_seqs: int = 8,
    max_model_len: int = 1024,
    token_budget: int = 64,
) -> Scheduler:
    manager = BlockManager(
        geometry, num_blocks=num_blocks, max_num_seqs=max_num_seqs, max_model_len=max_model_len
    )
    return Scheduler(manager, token_budget=token_budget)


def make_request(
    request_id: str, prompt_length: int, max_tokens: int = 4, priority: int = 0
) -> Request:
    """A prompt whose tokens tell requests and positions apart."""
    tokens = [token_of(request_id, position) for position in range(prompt_length)]
    return Request(
        request_id=request_id, prompt_token_ids=tokens, max_tokens=max_tokens, priority=priority
    )


def token_of(request_id: str, position: int) -> int:
    return sum(request_id.encode()) * 100_003 + position


def add(scheduler: Scheduler, *args: object, **options: object) -> Request:
    request = make_request(*args, **options)
    scheduler.add(request)
    return request


def counts_of(scheduler: Scheduler, step: ScheduledStep) -> dict[str, int]:
    """New tokens of each request in a step."""
    by_seq_id = {request.seq_id: request.request_id for request in running(scheduler)}
    return {
        by_seq_id[seq_id]: count
        for seq_id, count in zip(
            step.plan.seq_ids.tolist(), step.plan.num_scheduled_tokens.tolist(), strict=True
        )
    }


def running(scheduler: Scheduler) -> list[Request]:
    return [r for r in scheduler._requests.values() if r.status is RequestStatus.RUNNING]


def complete(scheduler: Scheduler, step: ScheduledStep) -> list[Request]:
    """The model ran: every sampled request gets its next token; finishes those at their limit."""
    sampled = [token_of(r.request_id, len(r.token_ids)) for r in step.sampled_requests]
    at_limit = scheduler.update(step, np.array(sampled, dtype=np.int64))
    for request in at_limit:
        scheduler.finish(request)
    return at_limit


def run_step(scheduler: Scheduler) -> dict[str, int]:
    """One whole step; new tokens of each request in it."""
    step = scheduler.schedule()
    assert step is not None
    counts = counts_of(scheduler, step)
    complete(scheduler, step)
    scheduler.check_integrity()
    return counts


def drain(scheduler: Scheduler, max_steps: int = 10_000) -> list[Request]:
    """Run until nothing is left; requests in the order in which they finished."""
    finished: list[Request] = []
    for _ in range(max_steps):
        step = scheduler.schedule()
        if step is None:
            return finished
        finished += complete(scheduler, step)
    raise AssertionError(f"unfinished after {max_steps} steps")


def assert_nothing_is_held(scheduler: Scheduler) -> None:
    scheduler.check_integrity()
    assert not scheduler.has_unfinished
    assert scheduler.num_running == scheduler.num_waiting == 0
    assert scheduler.manager.num_free_blocks == scheduler.manager.num_blocks
    assert scheduler.manager.num_free_seqs == scheduler.manager.max_num_seqs


# -- budget, chunks, order ----------------------------------------------------------------------


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


# -- preemption ---------------------------------------------------------------------------------


def two_that_outgrow_the_pool(first_priority: int = 0) -> tuple[Scheduler, Request, Request]:
    """Both hold 2 of 4 blocks, and the next step needs a third for each."""
    scheduler = make_scheduler(num_blocks=4)
    a = add(scheduler, "a", 16, max_tokens=40, priority=first_priority)
    b = add(scheduler, "b", 16, max_tokens=40)
    for _ in range(17):
        assert set(run_step(scheduler)) == {"a", "b"}
    assert scheduler.manager.num_free_blocks == 0
    return scheduler, a, b


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


# -- abort, cancel, all or nothing --------------------------------------------------------------


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


# -- refusals -----------------------------------------------------------------------------------


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


# -- liveness -----------------------------------------------------------------------------------


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


# -- random traffic -----------------------------------------------------------------------------


class Traffic(RuleBasedStateMachine):
    """Random requests, steps, failed steps, early stops and aborts over a tiny pool.

    `stored` says how many tokens of each running request a model would have seen: what the
    scheduler believes to be computed must be that, and start from zero after a preemption.
    """

    geometry = NATIVE

    @initialize(
        num_blocks=st.integers(1, 14),
        max_num_seqs=st.integers(1, 4),
        token_budget=st.sampled_from([1, 3, 16, 40, 300]),
    )
    def start(self, num_blocks: int, max_num_seqs: int, token_budget: int) -> None:
        self.scheduler = make_scheduler(
            self.geometry,
            num_blocks=num_blocks,
            max_num_seqs=max_num_seqs,
            token_budget=token_budget,
        )
        self.requests: dict[str, Request] = {}
        self.stored: dict[str, int] = {}
        self.num_added = 0

    @property
    def num_boundary_tokens(self) -> int:
        """Tokens after which the first block is sealed, or the third native block is full."""
        geometry = self.geometry
        return geometry.num_head_tokens + 2 * geometry.block_size + geometry.min_tail_tokens

    @rule(length=st.integers(0, 12), share=st.floats(0, 1), priority=st.integers(0, 2))
    def add(self, length: int, share: float, priority: int) -> None:
        prompt = 1 + int(share * self.num_boundary_tokens)
        self.num_added += 1
        request = make_request(f"r{self.num_added}", prompt, 1 + length, priority)
        needed = self.geometry.max_blocks(prompt + length)
        queued = self.scheduler.num_waiting
        if needed > self.scheduler.manager.num_blocks:
            with pytest.raises(PromptTooLongError):
                self.scheduler.add(request)
            assert self.scheduler.num_waiting == queued
        else:
            self.scheduler.add(request)
            self.requests[request.request_id] = request

    def planned(self) -> ScheduledStep:
        """Schedule, and check the step against everything a step promises."""
        scheduler = self.scheduler
        had_run = {request.request_id for request in running(scheduler)}
        step = scheduler.schedule()
        assert step is not None, "unfinished requests, but no step"
        counts = counts_of(scheduler, step)
        assert 1 <= sum(counts.values()) <= scheduler.token_budget
        now = running(scheduler)
        admitted = [request for request in now if request.request_id not in had_run]
        assert not (step.preempted and admitted)
        left = [r for r in self.requests.values() if r.status is not RequestStatus.RUNNING]
        for request in admitted:
            assert all(r.rank > request.rank or r.times_passed for r in left)
            self.stored[request.request_id] = 0
        for request in step.preempted:
            assert request.rank > max(r.rank for r in now)
            del self.stored[request.request_id]
        starts = step.plan.query_start_loc.tolist()
        by_seq_id = {request.seq_id: request for request in now}
        complete_now = []
        for row, seq_id in enumerate(step.plan.seq_ids.tolist()):
            request, begin = by_seq_id[seq_id], self.stored[by_seq_id[seq_id].request_id]
            end = begin + starts[row + 1] - starts[row]
            tokens = slice(starts[row], starts[row + 1])
            assert step.plan.positions[tokens].tolist() == list(range(begin, end))
            assert step.token_ids[tokens].tolist() == request.token_ids[begin:end]
            if end == len(request.token_ids):
                complete_now.append((request, starts[row + 1] - 1))
        sampled = zip(step.sampled_requests, step.sampled_token_index.tolist(), strict=True)
        assert list(sampled) == complete_now
        return step

    def finish(self, step: ScheduledStep) -> None:
        for name, count in counts_of(self.scheduler, step).items():
            self.stored[name] += count
        for request in complete(self.scheduler, step):
            assert request.num_output_tokens == request.max_tokens
            self.forget(request)

    def forget(self, request: Request) -> None:
        del self.requests[request.request_id]
        self.stored.pop(request.request_id, None)

    @precondition(lambda self: self.requests)
    @rule()
    def step(self) -> None:
        self.finish(self.planned())

    @precondition(lambda self: self.requests)
    @rule()
    def failed_step(self) -> None:
        self.scheduler.cancel(self.planned())

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.requests)))
        assert self.scheduler.abort(name) is self.requests[name]
        self.forget(self.requests[name])

    @invariant()
    def holds_together(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        self.scheduler.check_integrity()
        assert self.scheduler.has_unfinished == bool(self.requests)
        for name, count in self.stored.items():
            seq_id = self.requests[name].seq_id
            assert self.scheduler.manager.num_computed_tokens[seq_id] == count

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        survivors = list(self.requests.values())
        while self.requests:
            self.finish(self.planned())
        for request in survivors:
            end = request.num_prompt_tokens + request.max_tokens
            assert request.token_ids == [token_of(request.request_id, p) for p in range(end)]
        assert_nothing_is_held(self.scheduler)


TRAFFIC_SETTINGS = settings(
    max_examples=280,
    stateful_step_count=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def traffic_over(name: str, geometry: BlockGeometry) -> type:
    machine = type(f"Traffic_{name}", (Traffic,), {"geometry": geometry})
    machine.TestCase.settings = TRAFFIC_SETTINGS
    return machine.TestCase


TestTrafficNative = traffic_over("native", NATIVE)
TestTrafficQuantized = traffic_over("quantized", QUANTIZED)
TestTrafficNoHeadNoTail = traffic_over("no_head_no_tail", NO_HEAD_NO_TAIL)
TestTrafficTiny = traffic_over("tiny", TINY)
