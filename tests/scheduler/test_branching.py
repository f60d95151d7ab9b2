"""Requests that go on as several sequences: room for all of them, in step, and all or none."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest

from paged_kv.errors import InvalidRequestError, InvalidStepError, OutOfBlocksError
from paged_kv.scheduler.request import Branching, Request, RequestStatus
from paged_kv.scheduler.scheduler import Scheduler
from paged_kv.scheduler.step import Branches, Fork, ScheduledStep
from tests.support.scheduler_steps import (
    NO_HEAD_NO_TAIL,
    QUANTIZED,
    TINY,
    add,
    assert_nothing_is_held,
    complete,
    every_geometry,
    make_request,
    make_scheduler,
    run_step,
)


def add_branching(
    scheduler: Scheduler, request_id: str, prompt_length: int, max_seqs: int, max_blocks: int
) -> Request:
    request = make_request(request_id, prompt_length, max_tokens=25)
    request.branching = Branching(max_seqs=max_seqs, max_blocks=max_blocks)
    scheduler.add(request)
    return request


def branch_at_the_prompt(
    scheduler: Scheduler, request: Request, token_ids: Sequence[Sequence[int]]
) -> None:
    """Compute the prompt, then go on with these tokens, one sequence each."""
    step = scheduler.schedule()
    assert step is not None
    assert step.sampled_requests == [request]
    branches = Branches(request, [0] * len(token_ids), token_ids)
    assert scheduler.update(step, [0], branches=[branches]) == []
    scheduler.check_integrity()


def tokens_of(scheduler: Scheduler, request: Request) -> list[list[int]]:
    """Output of each of its sequences."""
    manager = scheduler.manager
    return [
        manager.token_ids[n, request.num_prompt_tokens : manager.num_tokens[n]].tolist()
        for n in request.seq_ids
    ]


def computed_in(step: ScheduledStep) -> dict[int, int]:
    counts = step.plan.num_scheduled_tokens.tolist()
    return dict(zip(step.plan.seq_ids.tolist(), counts, strict=True))


def test_sequences_share_the_prompt_and_go_on_alone():
    scheduler = make_scheduler()
    request = add_branching(scheduler, "a", 20, max_seqs=3, max_blocks=10)
    branch_at_the_prompt(scheduler, request, [[7], [8], [9]])
    assert scheduler.manager.pool.num_allocated == 2
    assert scheduler.num_running == 3
    step = scheduler.schedule()
    assert step.sampled_requests == [request] * 3
    assert step.token_ids.tolist() == [7, 8, 9]
    branches = Branches(request, [2, 0, 2], [[1], [2], [3]])
    assert scheduler.update(step, [0, 0, 0], branches=[branches]) == []
    scheduler.check_integrity()
    assert tokens_of(scheduler, request) == [[9, 1], [7, 2], [9, 3]]
    scheduler.finish(request)
    assert_nothing_is_held(scheduler)


def test_sequences_that_have_nothing_to_compute_are_left_out():
    scheduler = make_scheduler(token_budget=6)
    request = add_branching(scheduler, "a", 6, max_seqs=3, max_blocks=10)
    other = add(scheduler, "b", 2, max_tokens=2)
    branch_at_the_prompt(scheduler, request, [[1], [2] * 8, [3]])
    first, second, third = request.seq_ids
    step = scheduler.schedule()
    assert computed_in(step) == {first: 1, second: 4, third: 1}
    assert step.sampled_seq_ids.tolist() == [first, third]
    scheduler.update(step, [0, 0])
    step = scheduler.schedule()
    assert computed_in(step) == {second: 4, other.seq_id: 2}
    scheduler.update(step, [0, 5])
    step = scheduler.schedule()
    assert computed_in(step) == {other.seq_id: 1}
    branches = Branches(request, [1, 0], [[4], [4]])
    assert scheduler.update(step, [6], branches=[branches]) == [other]
    assert tokens_of(scheduler, request) == [[2] * 8 + [4], [1, 4]]


def test_room_is_kept_for_sequences_to_come():
    """Three of five; a request that would take one of them waits, and later ones with it."""
    scheduler = make_scheduler(max_num_seqs=5)
    request = add_branching(scheduler, "a", 10, max_seqs=4, max_blocks=8)
    others = [add(scheduler, name, 10, max_tokens=3) for name in "bc"]
    assert run_step(scheduler) == {"a": 10, "b": 10}
    assert others[1].status is RequestStatus.WAITING
    assert scheduler.manager.num_free_seqs == 3
    scheduler.finish(request)
    assert set(run_step(scheduler)) == {"b", "c"}


def test_room_is_kept_for_blocks_to_come():
    scheduler = make_scheduler(num_blocks=12, max_num_seqs=20)
    add_branching(scheduler, "a", 10, max_seqs=4, max_blocks=9)
    for name in "bcde":
        add(scheduler, name, 10, max_tokens=3)
    assert set(run_step(scheduler)) == {"a", "b", "c", "d"}  # 9 and 3 of 12


def test_it_starts_when_there_is_room_for_all_its_sequences():
    """And before too many later requests have passed it."""
    scheduler = make_scheduler(max_num_seqs=4)
    for name in "bc":
        add(scheduler, name, 10, max_tokens=40)
    run_step(scheduler)
    request = add_branching(scheduler, "a", 10, max_seqs=3, max_blocks=9)
    for number in range(200):
        add(scheduler, f"later {number}", 5, max_tokens=2)
        step = scheduler.schedule()
        if request.status is RequestStatus.RUNNING:
            break
        complete(scheduler, step)
    assert request.status is RequestStatus.RUNNING
    assert request.times_passed <= 16


def test_it_is_preempted_whole_and_starts_again_with_its_prompt():
    scheduler = make_scheduler(num_blocks=8)
    first = add(scheduler, "first", 16, max_tokens=100)
    run_step(scheduler)
    request = add_branching(scheduler, "a", 16, max_seqs=3, max_blocks=6)
    while request.num_preemptions == 0:
        step = scheduler.schedule()
        at = [row for row, r in enumerate(step.sampled_requests) if r is request]
        branches = []
        if at:
            parents = [0, 0, 0] if len(request.seq_ids) == 1 else [0, 1, 2]
            branches = [Branches(request, parents, [[1], [2], [3]])]
        scheduler.update(step, [0] * len(step.sampled_seq_ids), branches=branches)
        scheduler.check_integrity()
    assert step.preempted == [request]
    assert request.seq_ids == []
    assert request.token_ids == list(request.prompt_token_ids)
    assert request.swapped is None
    assert scheduler.num_waiting == 1
    scheduler.finish(first)
    branch_at_the_prompt(scheduler, request, [[1] * 5, [2] * 5])
    assert tokens_of(scheduler, request) == [[1] * 5, [2] * 5]
    scheduler.finish(request)
    assert_nothing_is_held(scheduler)


@pytest.mark.parametrize(
    ("geometry", "prompt_length", "num_tokens", "num_blocks"),
    [(QUANTIZED, 150, 140, 23), (NO_HEAD_NO_TAIL, 40, 140, 8), (TINY, 40, 24, 28)],
)
def test_alone_it_takes_smaller_steps_where_blocks_lack(
    geometry, prompt_length, num_tokens, num_blocks
):
    """All tokens in one step would need new blocks before it lets old ones go."""
    scheduler = make_scheduler(geometry, num_blocks=num_blocks, token_budget=1024)
    request = make_request("a", prompt_length, max_tokens=num_tokens + 1)
    request.branching = Branching(max_seqs=2, max_blocks=num_blocks)
    scheduler.add(request)
    branch_at_the_prompt(scheduler, request, [[1] * num_tokens, [2] * num_tokens])
    steps = []
    while scheduler.manager.num_computable(np.array(request.seq_ids)).any():
        step = scheduler.schedule()
        assert not step.preempted
        steps.append(computed_in(step))
        scheduler.update(step, np.zeros(len(step.sampled_seq_ids), dtype=np.int64))
        scheduler.check_integrity()
    first, second = request.seq_ids
    assert steps[0] == {first: num_tokens}
    assert [seq_id for step in steps[1:] for seq_id in step] == [second] * (len(steps) - 1)
    assert len(steps) > 2
    scheduler.finish(request)
    assert_nothing_is_held(scheduler)


@pytest.mark.parametrize("is_cancelled", [False, True])
def test_it_may_end_while_a_step_computes_it(is_cancelled):
    scheduler = make_scheduler()
    request = add_branching(scheduler, "a", 20, max_seqs=3, max_blocks=10)
    branch_at_the_prompt(scheduler, request, [[7], [8], [9]])
    step = scheduler.schedule()
    scheduler.finish(request)
    scheduler.check_integrity()
    if is_cancelled:
        scheduler.cancel(step)
    else:
        scheduler.update(step, [0, 0, 0])
    assert_nothing_is_held(scheduler)


@pytest.mark.parametrize(
    ("parents", "token_ids", "message"),
    [
        ([], [], "may have 1 to 3 sequences, got 0"),
        ([0] * 4, [[1]] * 4, "may have 1 to 3 sequences, got 4"),
        ([0, 2], [[1], [1]], r"has 2 sequences, got parents \[0, 2\]"),
        ([-1], [[1]], r"has 2 sequences, got parents \[-1\]"),
        ([0, 1], [[1]], "needs tokens for each"),
        ([0, 1], [[1], []], "needs tokens for each"),
    ],
)
def test_branches_that_cannot_be_are_refused_and_change_nothing(parents, token_ids, message):
    scheduler = make_scheduler()
    request = add_branching(scheduler, "a", 20, max_seqs=3, max_blocks=10)
    branch_at_the_prompt(scheduler, request, [[7], [8]])
    step = scheduler.schedule()
    with pytest.raises(InvalidStepError, match=f"request 'a' {message}"):
        scheduler.update(step, [0, 0], branches=[Branches(request, parents, token_ids)])
    assert tokens_of(scheduler, request) == [[7], [8]]
    scheduler.update(step, [0, 0], branches=[Branches(request, [0, 1], [[5], [6]])])
    assert tokens_of(scheduler, request) == [[7, 5], [8, 6]]


def test_tokens_that_cannot_be_are_refused_and_change_nothing():
    scheduler = make_scheduler()
    request = add_branching(scheduler, "a", 20, max_seqs=3, max_blocks=10)
    branch_at_the_prompt(scheduler, request, [[7], [8]])
    step = scheduler.schedule()
    too_long = [[1] * scheduler.manager.max_model_len, [2]]
    once = Branches(request, [0, 1], [[5], [6]])
    for sampled, branches, message in [
        ([0, 0], [Branches(request, [0, 1], too_long)], "would have .* tokens; max_model_len is"),
        ([0, 0], [Branches(request, [0, 1], [[1.5], [2]])], "token ids must be"),
        ([0, 0], [once, once], "branches once in a step"),
        ([1 << 40, 0], [once], "token ids must be"),
        ([1.7, 0], [once], "token ids must be"),
    ]:
        with pytest.raises((InvalidStepError, InvalidRequestError), match=message):
            scheduler.update(step, sampled, branches=branches)
    assert tokens_of(scheduler, request) == [[7], [8]]
    scheduler.update(step, [0, 0], branches=[once])
    assert tokens_of(scheduler, request) == [[7, 5], [8, 6]]


def test_forks_leave_the_sequences_that_a_branching_request_will_need():
    scheduler = make_scheduler(max_num_seqs=4)
    parent = add(scheduler, "a", 5, max_tokens=9)
    request = add_branching(scheduler, "b", 6, max_seqs=3, max_blocks=10)
    step = scheduler.schedule()
    assert step.sampled_requests == [parent, request]
    children = [make_request(f"child {i}", 5, max_tokens=9) for i in range(2)]
    forks = [Fork(parent, child, 3 + i) for i, child in enumerate(children)]
    branches = [Branches(request, [0] * 3, [[1], [2], [3]])]
    scheduler.update(step, [2, 0], forks, branches)
    scheduler.check_integrity()
    assert len(request.seq_ids) == 3
    assert [child.status for child in children] == [RequestStatus.WAITING] * 2
    scheduler.finish(request)
    while scheduler.has_unfinished:
        run_step(scheduler)
    assert_nothing_is_held(scheduler)


def test_it_does_not_start_beside_sequences_that_nobody_knows():
    scheduler = make_scheduler(max_num_seqs=3)
    stranger = scheduler.manager.add_sequence([1, 2])
    request = add_branching(scheduler, "a", 6, max_seqs=3, max_blocks=10)
    with pytest.raises(OutOfBlocksError, match="1 of 3 sequences are in use"):
        scheduler.schedule()
    scheduler.manager.remove_sequence(stranger)
    branch_at_the_prompt(scheduler, request, [[1], [2], [3]])


def test_only_what_branches_has_branches():
    scheduler = make_scheduler()
    plain = add(scheduler, "b", 5)
    step = scheduler.schedule()
    with pytest.raises(InvalidStepError, match="request 'b' does not run, or does not branch"):
        scheduler.update(step, [1], branches=[Branches(plain, [0], [[1]])])


@pytest.mark.parametrize(
    ("branching", "message"),
    [
        ({"max_seqs": 9, "max_blocks": 5}, "max_seqs=9; there are 8"),
        ({"max_seqs": 2, "max_blocks": 201}, "max_blocks=201; there are 200"),
        ({"max_seqs": 0, "max_blocks": 5}, "max_seqs must be an integer of at least 1, got 0"),
        ({"max_seqs": 2, "max_blocks": 1.5}, "max_blocks must be an integer .* got 1.5"),
    ],
)
def test_what_never_fits_is_refused(branching, message):
    scheduler = make_scheduler()
    with pytest.raises(InvalidRequestError, match=message):
        add_branching(scheduler, "a", 5, **branching)


@every_geometry
@pytest.mark.parametrize("seed", range(6))
def test_random_traffic_of_requests_that_branch_always_finishes(geometry, seed):
    """In pools that are too small for all; every sequence keeps the tokens it was given."""
    numbers = random.Random(seed)
    max_blocks = 2 * geometry.max_blocks(60) + 6
    scheduler = make_scheduler(
        geometry,
        num_blocks=max_blocks + numbers.randrange(1 + max_blocks // 2),
        max_num_seqs=numbers.randint(4, 9),
        max_model_len=60,
        token_budget=numbers.choice([1, 7, 64]),
    )
    expected: dict[Request, list[list[int]]] = {}
    ready: dict[Request, set[int]] = {}
    plain: list[Request] = []
    for number in range(10):
        if numbers.random() < 0.5:
            request = make_request(f"branching {number}", numbers.randint(1, 30), max_tokens=20)
            request.branching = Branching(max_seqs=numbers.randint(1, 4), max_blocks=max_blocks)
            scheduler.add(request)
            expected[request], ready[request] = [[]], set()
        else:
            plain.append(
                add(
                    scheduler,
                    f"plain {number}",
                    numbers.randint(1, 30),
                    max_tokens=numbers.randint(1, 20),
                )
            )
    for _ in range(20_000):
        step = scheduler.schedule()
        if step is None:
            break
        for request in step.preempted:
            ready.get(request, set()).clear()
        for request, seq_id in zip(step.sampled_requests, step.sampled_seq_ids, strict=True):
            if request in ready:
                ready[request].add(int(seq_id))
        branches, over = [], []
        for request in {r for r in step.sampled_requests if r in ready}:
            outputs = expected[request]
            if request.num_output_tokens < len(outputs[0]):  # it starts again
                branches.append(Branches(request, [0] * len(outputs), outputs))
            elif ready[request] == set(request.seq_ids):
                if len(outputs[0]) == 12:
                    over.append(request)
                    continue
                parents = [
                    numbers.randrange(len(outputs))
                    for _ in range(numbers.randint(1, request.branching.max_seqs))
                ]
                tokens = [[numbers.randrange(9)] for _ in parents]
                branches.append(Branches(request, parents, tokens))
                expected[request] = [
                    [*outputs[parent], *token]
                    for parent, token in zip(parents, tokens, strict=True)
                ]
            else:
                continue
            ready[request].clear()
        sampled = [numbers.randrange(9) for _ in step.sampled_seq_ids]
        at_limit = scheduler.update(step, sampled, branches=branches)
        for request, *_ in branches:
            assert tokens_of(scheduler, request) == expected[request]
        for request in [*at_limit, *over]:
            scheduler.finish(request)
        scheduler.check_integrity()
    assert_nothing_is_held(scheduler)
    assert all(len(outputs[0]) == 12 for outputs in expected.values())
    assert all(request.num_output_tokens == request.max_tokens for request in plain)
