"""Random traffic on a simulated model, with faults at random lines: a short piece of the soak."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.support.engine_traffic import EngineTraffic, Rates
from tests.support.faults import Violation
from tests.support.simulated_model import SPOILT

BUSY = Rates(line_fault=0.15, second_fault=0.3, runner_fault=0.02, spoilt=0.02, abort=0.04)


@pytest.mark.parametrize("seed", range(4))
def test_requests_end_as_they_would_alone_whatever_strikes(seed):
    traffic = EngineTraffic(seed, rates=BUSY)
    traffic.serve(40)
    assert traffic.tally.faults.total() == traffic.tally.num_recovered > 10


@pytest.mark.parametrize("seed", range(6))
def test_steps_that_begin_before_the_last_one_is_read(seed):
    """Without faults but what is not finite, so that many do; then whatever strikes."""
    calm = Rates(line_fault=0, runner_fault=0, spoilt=0.02)
    for rates in (calm, BUSY):
        traffic = EngineTraffic(seed, rates=rates, runs_ahead=True)
        num_ahead = count_calls(traffic.engine, "_step_ahead")
        traffic.serve(30)
        assert num_ahead["_step_ahead"] > 3


@pytest.mark.filterwarnings("ignore:speculation is off")  # where an error strikes a guess
@pytest.mark.parametrize("seed", range(6))
def test_guesses_change_nothing_but_the_number_of_steps(seed):
    """Right and wrong ones, without faults but what is not finite; then whatever strikes."""
    calm = Rates(line_fault=0, runner_fault=0, spoilt=0.02)
    for rates in (calm, BUSY):
        traffic = EngineTraffic(seed, rates=rates, speculates=True)
        traffic.serve(40)
        statistics = traffic.engine.scheduler.statistics()
        least = 20 if rates is calm else 5
        assert statistics.num_draft_tokens >= statistics.num_accepted_tokens > least
        assert statistics.num_draft_tokens > statistics.num_accepted_tokens or rates is BUSY


def count_calls(engine, name):
    """How often a method of the engine is called, as a `Counter` that goes on counting."""
    counts, method = Counter(), getattr(engine, name)

    def count_and_call(*arguments):
        counts[name] += 1
        return method(*arguments)

    setattr(engine, name, count_and_call)
    return counts


def test_another_thread_may_abort_meanwhile():
    traffic = EngineTraffic(3, rates=Rates(abort=0.3), has_thread=True)
    traffic.serve(80)
    traffic.close()
    assert traffic.tally.events["aborts by another thread"] > 10


def test_the_same_seed_makes_the_same_run():
    runs = []
    for _ in range(2):
        traffic = EngineTraffic(11, rates=BUSY)
        traffic.serve(40)
        runs.append((traffic.tally, traffic.engine.scheduler.statistics(), str(traffic)))
    assert vars(runs[0][0]) == vars(runs[1][0])
    assert runs[0][1:] == runs[1][1:]


def test_a_block_that_is_lost_is_found_out():
    """What a sequence stored is overwritten, as by a sequence that shares its block by mistake."""
    traffic = EngineTraffic(2, rates=Rates(line_fault=0.0, runner_fault=0.0, spoilt=0.0, abort=0.0))
    run, contents = traffic.runner.run, traffic.runner.contents
    num_runs = Counter[str]()

    def lose_and_run(plan, *arguments):
        num_runs["all"] += 1
        if num_runs["all"] == 20:
            for pool in contents.pool:
                pool[traffic.engine.manager.block_ids(int(plan.seq_ids[0]))[0]] = 1
        return run(plan, *arguments)

    traffic.runner.run = lose_and_run
    with pytest.raises(Violation, match="changed"):
        traffic.serve(60)


def test_what_is_not_finite_and_reaches_somebody_else_is_found_out():
    traffic = EngineTraffic(2, rates=Rates(line_fault=0.0, runner_fault=0.0, spoilt=0.0, abort=0.0))
    run, contents = traffic.runner.run, traffic.runner.contents

    def spoil_and_run(plan, *arguments):
        row = int(plan.context_lens.argmax())
        if plan.context_lens[row] > 8:
            for pool in contents.pool:
                pool[traffic.engine.manager.block_ids(int(plan.seq_ids[row]))[0]] = SPOILT
        return run(plan, *arguments)

    traffic.runner.run = spoil_and_run
    with pytest.raises(Violation, match="changed"):
        traffic.serve(60)
