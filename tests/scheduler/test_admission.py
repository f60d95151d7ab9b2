"""Who is let in, and who is passed how often."""

from __future__ import annotations

import pytest

from paged_kv.errors import ConfigError
from paged_kv.scheduler.admission import MAX_TIMES_PASSED
from paged_kv.scheduler.request import Request
from paged_kv.scheduler.scheduler import Scheduler
from tests.support.scheduler_policies import add, make_scheduler, run_step

# -- who is let in --------------------------------------------------------------------------------


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


@pytest.mark.parametrize(("steps_ahead", "num_kept_free"), [(0, 0), (4, 1), (30, 7), (60, 9)])
def test_an_admission_leaves_room_for_the_steps_ahead(steps_ahead, num_kept_free):
    """One request holds 10 of 100 blocks, and generates 39 more tokens."""
    fits = 100 - 10 - num_kept_free
    for num_blocks, admitted in ((fits, True), (fits + 1, False)):
        scheduler = make_scheduler(steps_ahead=steps_ahead)
        add(scheduler, "a", 38, max_tokens=40)
        run_step(scheduler)
        add(scheduler, "b", 4 * num_blocks, max_tokens=1)
        assert ("b" in run_step(scheduler)) == admitted


def test_whoever_starts_has_room_for_its_own_steps_ahead():
    """75 of 90 free blocks for its prompt, 15 for what it generates: the last is not stored."""
    for max_tokens, admitted in ((61, True), (62, False), (100, False)):
        scheduler = make_scheduler(steps_ahead=80)
        add(scheduler, "a", 38, max_tokens=2)
        run_step(scheduler)
        add(scheduler, "b", 4 * 75, max_tokens=max_tokens)
        assert ("b" in run_step(scheduler)) == admitted


def test_negative_steps_ahead_are_refused():
    with pytest.raises(ConfigError, match=r"steps_ahead.*-1"):
        make_scheduler(steps_ahead=-1)


# -- who is passed --------------------------------------------------------------------------------


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
