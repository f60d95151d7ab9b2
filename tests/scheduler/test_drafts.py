"""Guessed tokens in a step: how many are tried, and what is stored of them."""

from __future__ import annotations

import numpy as np
import pytest

from paged_kv.errors import InvalidRequestError, InvalidStepError
from paged_kv.scheduler.request import Request
from paged_kv.scheduler.scheduler import Scheduler
from paged_kv.scheduler.step import Fork, ScheduledStep
from tests.support.scheduler_steps import (
    GEOMETRIES,
    NATIVE,
    TINY,
    add,
    assert_nothing_is_held,
    drain,
    every_geometry,
    make_request,
    make_scheduler,
    run_step,
    token_of,
)


def right_drafts(request: Request, count: int) -> list[int]:
    length = len(request.token_ids)
    return [token_of(request.request_id, length + place) for place in range(count)]


def finish(scheduler: Scheduler, step: ScheduledStep, accepted: list[int]) -> list[Request]:
    """Each request gets so many of its drafts, and the token that comes then."""
    names_and_lengths = [(r.request_id, len(r.token_ids)) for r in step.sampled_requests]
    tokens = [
        token_of(name, length + count)
        for (name, length), count in zip(names_and_lengths, accepted, strict=True)
    ]
    at_limit = scheduler.update(step, tokens, num_accepted=accepted)
    for request in at_limit:
        scheduler.finish(request)
    scheduler.check_integrity()
    return at_limit


@every_geometry
@pytest.mark.parametrize("kept", [0, 1, 3])
def test_right_drafts_are_tokens_and_others_were_never_there(geometry, kept):
    scheduler = make_scheduler(geometry)
    a = add(scheduler, "a", 5, max_tokens=300)
    b = add(scheduler, "b", 7, max_tokens=300)
    run_step(scheduler)
    tokens = sum(GEOMETRIES["quantized"].block_size for _ in range(2))
    while a.num_output_tokens < tokens:
        drafts = {"a": right_drafts(a, kept) + [0] * (3 - kept)}
        before = a.num_tokens
        step = scheduler.schedule(drafts)
        num_tried = int(step.num_drafts[0])
        assert num_tried <= 3
        assert step.num_drafts.tolist() == [num_tried, 0]
        tried = step.token_ids[step.draft_token_index].tolist()
        assert tried == drafts["a"][:num_tried]
        finish(scheduler, step, [min(kept, num_tried), 0])
        assert a.num_tokens == before + 1 + min(kept, num_tried)
        assert scheduler.manager.num_computed_tokens[a.seq_id] == a.num_tokens - 1
    for request in (a, b):
        expected = [token_of(request.request_id, place) for place in range(request.num_tokens)]
        assert request.token_ids == expected
    statistics = scheduler.statistics()
    assert statistics.num_draft_tokens > 0
    assert (statistics.num_accepted_tokens > 0) == (kept > 0)
    drain(scheduler)
    assert_nothing_is_held(scheduler)


def num_tried(scheduler: Scheduler, drafts: dict[str, list[int]]) -> list[int]:
    """How many drafts each sequence of the next step tries; the step is cancelled."""
    step = scheduler.schedule(drafts)
    found = step.num_drafts.tolist()
    scheduler.cancel(step)
    return found


def test_limits_of_drafts():
    scheduler = make_scheduler(token_budget=10, max_model_len=40)
    a = add(scheduler, "a", 4, max_tokens=6)
    b = add(scheduler, "b", 4, max_tokens=30)
    for _ in range(2):
        run_step(scheduler)
    assert num_tried(scheduler, {}) == [0, 0]
    assert num_tried(scheduler, {"nobody": [1], "b": []}) == [0, 0]
    assert num_tried(scheduler, {"b": [7] * 3}) == [0, 3]
    assert num_tried(scheduler, {"a": [7] * 9}) == [3, 0]  # and a token behind them
    assert num_tried(scheduler, {"a": [7] * 9, "b": [7] * 9}) == [3, 5]  # the budget
    for _ in range(4):
        run_step(scheduler)
    assert b.num_tokens == 10
    assert not a.is_unfinished
    assert num_tried(scheduler, {"b": [7] * 50}) == [9]
    roomy = make_scheduler(max_model_len=40)
    add(roomy, "c", 20, max_tokens=20)
    run_step(roomy)
    assert num_tried(roomy, {"c": [7] * 50}) == [NATIVE.block_size]


def test_no_draft_goes_beyond_a_seal():
    """The step that seals tries none, and the one before no more than fit: what a token reads of
    those before it does not depend on whether it was a draft."""
    scheduler = make_scheduler(TINY)
    a = add(scheduler, "a", 2, max_tokens=100)
    run_step(scheduler)
    for _ in range(30):
        stored = a.num_tokens
        sealed = TINY.num_sealed_blocks(np.arange(stored, stored + 9))
        [tried] = num_tried(scheduler, {"a": [7] * 4})
        assert (sealed[:tried] == scheduler.manager.num_sealed[a.seq_id]).all()
        assert tried == min(4, max(int((sealed == sealed[0]).sum()) - 1, 0)) or (
            tried == 0 and sealed[0] > scheduler.manager.num_sealed[a.seq_id]
        )
        run_step(scheduler)


def test_nobody_makes_room_for_drafts():
    scheduler = make_scheduler(num_blocks=2)
    add(scheduler, "a", 14, max_tokens=10)
    add(scheduler, "b", 3, max_tokens=10)
    run_step(scheduler)
    step = scheduler.schedule({"a": [7] * 4})
    assert step.num_drafts.tolist() == [0, 0]
    assert not step.preempted
    scheduler.cancel(step)
    drain(scheduler)
    assert_nothing_is_held(scheduler)


def test_a_prompt_may_try_drafts_with_its_last_tokens():
    scheduler = make_scheduler(token_budget=16)
    a = add(scheduler, "a", 20, max_tokens=10)
    drafts = {"a": right_drafts(a, 5)}
    assert num_tried(scheduler, drafts) == []
    finish(scheduler, scheduler.schedule(drafts), [])
    step = scheduler.schedule(drafts)
    assert step.num_drafts.tolist() == [5]
    finish(scheduler, step, [5])
    assert a.num_output_tokens == 6
    drain(scheduler)


@pytest.mark.parametrize(
    ("drafts", "match"),
    [
        ([1], "drafts must be tokens by request id"),
        ({"a": [1.5]}, "1.5"),
        ({"a": [-1]}, "-1"),
        ({"a": "text"}, "token"),
    ],
)
def test_what_are_no_drafts_is_refused_before_anything_changes(drafts, match):
    scheduler = make_scheduler()
    add(scheduler, "a", 5, max_tokens=10)
    run_step(scheduler)
    with pytest.raises((InvalidStepError, InvalidRequestError), match=match):
        scheduler.schedule(drafts)
    assert scheduler.is_whole
    drain(scheduler)
    assert_nothing_is_held(scheduler)


@pytest.mark.parametrize("accepted", [[-1], [4], [1, 1], [0.5]])
def test_more_than_was_tried_is_refused(accepted):
    scheduler = make_scheduler()
    a = add(scheduler, "a", 5, max_tokens=10)
    run_step(scheduler)
    step = scheduler.schedule({"a": right_drafts(a, 3)})
    with pytest.raises(InvalidStepError, match="num_accepted must be"):
        scheduler.update(step, [1], num_accepted=accepted)
    finish(scheduler, step, [3])
    assert a.num_output_tokens == 5


def test_a_request_that_goes_on_from_drafts_is_not_forked():
    scheduler = make_scheduler()
    a = add(scheduler, "a", 5, max_tokens=10)
    run_step(scheduler)
    step = scheduler.schedule({"a": right_drafts(a, 3)})
    fork = Fork(a, make_request("child", 6), 1)
    with pytest.raises(InvalidStepError, match="request 'a' goes on from drafts"):
        scheduler.update(step, [1], [fork], num_accepted=[2])
    scheduler.update(step, [token_of("a", 6)], [fork], num_accepted=[0])
    scheduler.check_integrity()
    assert fork.child.token_ids == [*a.token_ids[:-1], 1]
    drain(scheduler)
    assert_nothing_is_held(scheduler)
