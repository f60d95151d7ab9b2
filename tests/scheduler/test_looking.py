"""How often waiting requests are looked at, and that whoever can start is not overlooked."""

from __future__ import annotations

import random

import pytest

from paged_kv.scheduler import admission
from paged_kv.scheduler.admission import MAX_SKIPPED
from paged_kv.scheduler.request import Branching, Request
from paged_kv.scheduler.scheduler import Scheduler
from paged_kv.scheduler.waiting_queue import WaitingQueue
from tests.support.scheduler_policies import GEOMETRIES, add, make_scheduler, run_step
from tests.support.scheduler_steps import complete, geometry_of

Looks = list[Request]

TOO_LONG = [5] * 1100  # 69 of 70 blocks


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Looks:
    """The requests that were looked at, each as often as it was."""
    seen: Looks = []
    find_need = admission.find_need

    def counted(request, *others):
        seen.append(request)
        return find_need(request, *others)

    monkeypatch.setattr(admission, "find_need", counted)
    return seen


def full_pool(num_waiting: int, **options: object) -> Scheduler:
    """One request that goes on, and others of which none fits beside it."""
    scheduler = make_scheduler(
        geometry_of(16, 16, 0, 0), num_blocks=70, max_model_len=1200, token_budget=900, **options
    )
    add(scheduler, "runs", 20, 1080)
    run_step(scheduler)
    for index in range(num_waiting):
        add(scheduler, f"w{index}", TOO_LONG, 4)
    return scheduler


@pytest.mark.parametrize("prefix_caching", [False, True])
def test_steps_in_which_nobody_can_start_look_at_nobody(looks, prefix_caching):
    scheduler = full_pool(400, prefix_caching=prefix_caching)
    looks.clear()
    run_step(scheduler)
    assert len(looks) == MAX_SKIPPED
    looks.clear()
    for turn in range(1000):
        add(scheduler, f"late{turn}", TOO_LONG, 4)
        run_step(scheduler)
    assert looks == []


def test_they_are_looked_at_again_when_the_one_that_runs_has_ended(looks):
    scheduler = full_pool(3)
    run_step(scheduler)
    looks.clear()
    scheduler.abort("runs")
    assert set(run_step(scheduler)) == {"w0"}
    assert looks


def test_a_better_rank_that_comes_is_looked_at(looks):
    scheduler = full_pool(100)
    run_step(scheduler)
    looks.clear()
    add(scheduler, "urgent", 9, 4, priority=-1)
    assert set(run_step(scheduler)) == {"runs", "urgent"}


def test_an_abort_lets_those_be_seen_that_were_behind(looks):
    scheduler = full_pool(MAX_SKIPPED)
    add(scheduler, "small", 9, 4)
    for _ in range(3):
        assert set(run_step(scheduler)) == {"runs"}
    scheduler.abort("w7")
    assert set(run_step(scheduler)) == {"runs", "small"}


def test_one_that_was_paused_is_seen_when_it_is_resumed(looks):
    scheduler = full_pool(2)
    small = add(scheduler, "small", 9, 4)
    scheduler.pause(small)
    for _ in range(3):
        assert set(run_step(scheduler)) == {"runs"}
    scheduler.resume(small)
    assert set(run_step(scheduler)) == {"runs", "small"}


def test_a_branching_request_is_seen_when_sequences_end():
    scheduler = make_scheduler(max_num_seqs=4, num_blocks=100)
    for name in "abc":
        add(scheduler, name, 4, 5 if name == "a" else 50)
    branching = Request("beam", [1, 2, 3], 4, branching=Branching(max_seqs=2, max_blocks=9))
    scheduler.add(branching)
    while "a" in scheduler._requests:
        assert branching.seq_id is None
        run_step(scheduler)
    assert set(run_step(scheduler)) == {"b", "c", "beam"}


def test_statistics_and_aborts_walk_past_nobody(monkeypatch):
    scheduler = full_pool(5)
    run_step(scheduler)
    monkeypatch.delattr(WaitingQueue, "__iter__")
    assert scheduler.statistics().num_waiting == 5
    for name in ("w3", "w0", "runs"):
        scheduler.abort(name)
    assert scheduler.statistics().num_waiting == 3


# -- against a scheduler that looks every time ----------------------------------------------------


class EveryStep(Scheduler):
    """What `Scheduler` would do if it looked at waiting requests in every step."""

    def _choose(self, preempted):
        self._lack.changed()
        return super()._choose(preempted)


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("seed", range(6))
def test_whoever_would_start_if_all_were_looked_at_starts(geometry, seed):
    """Both see the same traffic, with shared prefixes, aborts, pauses and swaps."""
    rng = random.Random(seed)
    options = {
        "num_blocks": geometry.max_blocks(60) + rng.choice([2, 10]),
        "max_num_seqs": rng.choice([3, 6]),
        "num_host_blocks": rng.choice([0, 20]),
        "prefix_caching": rng.random() < 0.8,
        "token_budget": rng.choice([7, 30, 100]),
        "watermark": rng.choice([0.0, 0.1]),
        "swap_cost": 0.3,
        "steps_ahead": rng.choice([0, 8]),
    }
    ours, other = make_scheduler(geometry, **options), make_scheduler(geometry, **options)
    other.__class__ = EveryStep
    num_admitted = 0
    for turn in range(250):
        action = rng.random()
        if action < 0.3 and ours.num_waiting < 90:
            opening = rng.choice([[], [7] * 20, [7] * 9 + [8] * 20])
            prompt = opening + [rng.randrange(100) for _ in range(rng.randint(1, 20))]
            for scheduler in (ours, other):
                add(scheduler, f"r{turn}", prompt, 1 + turn % 17, priority=turn % 3)
        elif action < 0.4 and ours._requests:
            name = rng.choice(list(ours._requests))
            is_abort, is_pause = rng.random() < 0.4, rng.random() < 0.4
            for scheduler in (ours, other):
                request = scheduler._requests[name]
                if is_abort:
                    scheduler.abort(name)
                elif is_pause:
                    scheduler.pause(request)
                else:
                    scheduler.resume(request)
        steps = ours.schedule(), other.schedule()
        assert (steps[0] is None) == (steps[1] is None)
        if steps[0] is None:
            continue
        assert steps[0].plan.seq_ids.tolist() == steps[1].plan.seq_ids.tolist()
        assert steps[0].token_ids.tolist() == steps[1].token_ids.tolist()
        num_admitted += len(steps[0].swap_ins)
        for scheduler, step in zip((ours, other), steps, strict=True):
            complete(scheduler, step)
            scheduler.check_integrity()
