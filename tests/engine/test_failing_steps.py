"""A step that fails ends the requests that it computed, with all their samples, and no others."""

from __future__ import annotations

import pytest

from paged_kv.engine.engine import Engine
from paged_kv.engine.sampling_params import SamplingParams
from paged_kv.errors import StepFailedError
from tests.support.faults import DeviceError
from tests.support.scheduler_policies import make_scheduler
from tests.support.simulated_model import SimulatedRunner


def test_samples_that_wait_for_a_prompt_end_with_it():
    """A prompt's first samples start when it is computed; it fails before."""
    runner = SimulatedRunner(make_scheduler(token_budget=8))
    engine = Engine(runner, runner.scheduler, [])  # type: ignore[arg-type]

    def fail() -> None:
        raise DeviceError("out of memory")

    lives = engine.add_request(["a", "b", "c"], list(range(30)), SamplingParams(max_tokens=3, n=3))
    runner.after_run = fail
    with pytest.raises(DeviceError) as caught:
        engine.step()
    runner.after_run = lambda: None
    assert engine.fail_step(caught.value) == 3
    for _ in range(20):
        engine.step()
    assert not engine.has_unfinished
    assert [live.finish_reason for live in lives] == ["error"] * 3
    assert all(isinstance(live.error, StepFailedError) for live in lives)
    assert sorted(engine.take_ended()) == ["a", "b", "c"]
    runner.scheduler.check_integrity()
