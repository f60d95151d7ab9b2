"""How much of prompts a step computes beside decodes: what is learned, and that tokens stay."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from paged_kv.engine import prefill_pace
from paged_kv.engine.prefill_pace import LEAST_TOKENS, PATIENCE, PrefillPace
from paged_kv.engine.step_costs import StepCosts
from paged_kv.errors import ConfigError
from tests.support.small_llm import params_of, tokens_of

# Seconds of a step, of each decode, of each prompt token, and where both meet of a step and of each
# decode: about those of SmolLM2-135M in float32 on two cores, whose decodes alone take a way of
# their own.
PARTS = (0.03, 0.007, 0.0035, 0.02, 0.003)
NOISE = 0.05
LENGTHS = 96, 64  # of prompts and outputs


def seconds_of(num_decodes: int, num_prompt_tokens: int) -> float:
    step, decode, token, mixed_step, mixed_decode = PARTS
    seconds = step + decode * num_decodes + token * num_prompt_tokens
    if num_decodes and num_prompt_tokens:
        seconds += mixed_step + mixed_decode * num_decodes
    return seconds


class Steps:
    """Steps on a clock of their own, told to a pace."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, max_slowdown: float = 3.0) -> None:
        self.now = 100.0
        self.scheduler: Any = SimpleNamespace(most_beside_decodes=None, num_steps_waited=0)
        self.pace = PrefillPace(self.scheduler, max_slowdown)
        self.rng = np.random.default_rng(0)
        monkeypatch.setattr(prefill_pace, "perf_counter", lambda: self.now)

    def run(self, *num_new: int, seconds: float | None = None, drafts: Any = None) -> int | None:
        began = self.now
        num_decodes = num_new.count(1)
        if seconds is None:
            seconds = seconds_of(num_decodes, sum(num_new) - num_decodes)
            seconds *= np.exp(NOISE * self.rng.standard_normal())
        self.now += seconds
        starts = np.concatenate([[0], np.cumsum(num_new)])
        plan = SimpleNamespace(query_start_loc=starts, num_draft_tokens=drafts)
        self.pace.note(SimpleNamespace(plan=plan), began)
        most: int | None = self.scheduler.most_beside_decodes
        return most

    def warm(self) -> None:
        """Steps of all kinds."""
        for index in range(300):
            num_decodes = 1 + index % 40
            self.run(*[1] * num_decodes, *([16 + index % 50] if index % 3 else []))


class Server:
    """Requests that come at their times, prompts in order of coming, on the clock of `Steps`."""

    def __init__(self, steps: Steps, arrivals: list[float], *, is_paced: bool = True) -> None:
        self.steps, self.is_paced = steps, is_paced
        self.waiting = [steps.now + each for each in arrivals]
        self.prompts: list[int] = []  # tokens left
        self.arrived: list[int] = []  # of those that have not begun, the step
        self.num_steps = 0
        self.outputs: list[int] = []
        self.slowdowns: list[float] = []  # of steps in which somebody decodes

    def serve(self) -> float:
        """Seconds until all is done."""
        began = self.steps.now
        while self.waiting or self.prompts or self.outputs:
            while self.waiting and self.waiting[0] <= self.steps.now:
                self.prompts.append(LENGTHS[0])
                self.arrived.append(self.num_steps)
                self.waiting.pop(0)
            if not self.prompts and not self.outputs:
                self.steps.now = self.waiting[0]
            else:
                self.step()
        return self.steps.now - began

    def step(self) -> None:
        num_decodes, left = len(self.outputs), 1024
        most = self.steps.scheduler.most_beside_decodes
        if self.is_paced and num_decodes and most is not None:
            left = most
        pieces = []
        for length in self.prompts:
            pieces.append(min(length, left))
            left -= pieces[-1]
        self.num_steps += 1
        waited = self.num_steps - self.arrived[0] if self.arrived else 0
        self.steps.scheduler.num_steps_waited = waited if sum(pieces) < sum(self.prompts) else 0
        self.steps.run(*[1] * num_decodes, *(piece for piece in pieces if piece > 1))
        if num_decodes:
            taken = seconds_of(num_decodes, sum(pieces)) / seconds_of(num_decodes, 0)
            self.slowdowns.append(taken)
        rest = [length - piece for length, piece in zip(self.prompts, pieces, strict=True)]
        num_whole = rest.count(LENGTHS[0])
        self.arrived = self.arrived[len(self.arrived) - num_whole :]
        self.prompts = [length for length in rest if length > 1]
        self.outputs = [length - 1 for length in self.outputs if length > 1]
        self.outputs += [LENGTHS[1]] * (len(rest) - len(self.prompts))


def test_it_begins_with_little_beside_decodes_as_soon_as_a_prompt_is_known(monkeypatch):
    steps = Steps(monkeypatch)
    most = steps.run(300, seconds=0.450)  # 1.5 ms a token
    assert most is not None
    assert LEAST_TOKENS <= most < 40


def test_nothing_is_limited_before_a_prompt_is_known(monkeypatch):
    assert Steps(monkeypatch).run(1, 1) is None


def test_what_each_part_costs_is_learned(monkeypatch):
    steps = Steps(monkeypatch)
    steps.warm()
    costs: StepCosts = steps.pace._costs
    for step in ((1, 0), (8, 0), (40, 0), (1, 32), (20, 64), (40, 96), (0, 500)):
        assert costs.seconds(*step) == pytest.approx(seconds_of(*step), rel=0.1)


@pytest.mark.parametrize("max_slowdown", [2.0, 3.0, 6.0])
def test_the_limit_is_what_the_slowdown_leaves(monkeypatch, max_slowdown):
    steps = Steps(monkeypatch, max_slowdown)
    steps.warm()
    for num_decodes in (4, 16, 40):
        most = steps.pace.most_tokens(num_decodes)
        assert most is not None
        slowdown = seconds_of(num_decodes, most) / seconds_of(num_decodes, 0)
        assert most == LEAST_TOKENS or slowdown == pytest.approx(max_slowdown, rel=0.12)


def test_at_80_percent_of_what_saturates_it_tokens_come_evenly_and_nobody_falls_behind(monkeypatch):
    """A pace that took the decodes' time to be what it was with few of them gave prompts 16 tokens
    a step, and requests came faster than they went: 254 s instead of 220."""
    at_once = Server(Steps(monkeypatch), [0.0] * 48, is_paced=False).serve()
    gaps = np.random.default_rng(1).exponential(at_once / 48 / 0.8, 192)
    arrivals = np.cumsum(gaps).tolist()
    seconds = Server(Steps(monkeypatch), arrivals, is_paced=False).serve()
    server = Server(Steps(monkeypatch), arrivals)
    assert server.serve() < 1.03 * seconds
    assert np.quantile(server.slowdowns, 0.99) < 3.5


def test_saturated_it_costs_little(monkeypatch):
    """Prompts that come one soon after the other: with them in small pieces for all that time there
    would be few decodes at once, 1.2 times as much in all."""
    arrivals = (0.02 * np.arange(48)).tolist()
    free = Server(Steps(monkeypatch), arrivals, is_paced=False).serve()
    assert Server(Steps(monkeypatch), arrivals).serve() < 1.04 * free


def test_who_has_waited_long_is_served_whatever_it_takes(monkeypatch):
    steps = Steps(monkeypatch)
    steps.warm()
    steps.scheduler.num_steps_waited = PATIENCE
    assert steps.run(1, 1, 20) is not None
    steps.scheduler.num_steps_waited = PATIENCE + 1
    assert steps.run(1, 1, 20) is None


def test_a_step_of_decodes_alone_is_looked_at_where_none_was_for_long(monkeypatch):
    """While prompts come all the time: after the first beside it, and not at every step."""
    steps = Steps(monkeypatch)
    steps.run(100)
    limits = [steps.run(1, 20)]
    for num_decodes in range(1, 40):
        kinds = [1] * num_decodes + ([] if limits[-1] == 0 else [40])
        limits.append(steps.run(*kinds))
    assert limits[0] == 0
    assert 2 <= limits.count(0) <= 10
    assert steps.pace._costs.seconds(38, 0) == pytest.approx(seconds_of(38, 0), rel=0.15)


def test_it_follows_the_machine_and_a_single_long_step_moves_it_by_little(monkeypatch):
    steps = Steps(monkeypatch)
    steps.warm()
    costs, before = steps.pace._costs, seconds_of(20, 64)
    steps.run(*[1] * 20, 64, seconds=50.0)
    assert costs.seconds(20, 64) < 1.3 * before
    for _ in range(100):
        steps.run(*[1] * 20, 64, seconds=2 * before)
    assert costs.seconds(20, 64) == pytest.approx(2 * before, rel=0.05)


def test_like_steps_do_not_move_what_they_tell_nothing_of(monkeypatch):
    steps = Steps(monkeypatch)
    steps.warm()
    for _ in range(1000):
        steps.run(*[1] * 40)
    assert steps.pace._costs.token_seconds == pytest.approx(PARTS[2], rel=0.1)


def test_steps_with_drafts_are_not_learned_from(monkeypatch):
    steps = Steps(monkeypatch)
    steps.warm()
    before = steps.scheduler.most_beside_decodes
    steps.run(4, 4, seconds=9.0, drafts=np.array([3, 3]))
    assert steps.scheduler.most_beside_decodes == before


def test_steps_that_overlap_count_from_the_end_of_the_one_before(monkeypatch):
    steps = Steps(monkeypatch)
    steps.warm()
    before = steps.pace._costs.seconds(1, 0)
    for _ in range(50):
        began, steps.now = steps.now - 1.0, steps.now + seconds_of(1, 0)
        plan = SimpleNamespace(query_start_loc=np.array([0, 1]), num_draft_tokens=None)
        steps.pace.note(SimpleNamespace(plan=plan), began)
    assert steps.pace._costs.seconds(1, 0) == pytest.approx(before, rel=0.1)


@pytest.mark.parametrize("patience", [1000, 1], ids=["always", "until others wait"])
def test_an_llm_that_paces_gives_the_same_tokens(make_llm, monkeypatch, prompts, greedy, patience):
    """Whatever it learns of this machine: here that prompts are dear."""
    monkeypatch.setattr(prefill_pace, "PATIENCE", patience)
    monkeypatch.setattr(PrefillPace, "most_tokens", lambda pace, num_decodes: LEAST_TOKENS)
    llm = make_llm(max_slowdown=1.5)
    counts: list[np.ndarray] = []
    note = PrefillPace.note

    def watched(pace: PrefillPace, scheduled: Any, began: float) -> None:
        counts.append(np.diff(scheduled.plan.query_start_loc))
        note(pace, scheduled, began)

    monkeypatch.setattr(PrefillPace, "note", watched)
    first = llm.stream([prompts[0]], params_of(max_tokens=100))
    next(first)
    assert tokens_of(llm.generate(prompts, params_of())) == greedy
    assert len(list(first)) == 99
    beside = [int(each[each > 1].sum()) for each in counts if (each == 1).any()]
    assert (max(beside) == LEAST_TOKENS) == (patience == 1000)


@pytest.mark.parametrize("slowdown", [1, 0.5, float("nan"), float("inf"), "3", True])
def test_a_slowdown_that_cannot_be_is_refused(make_llm, slowdown):
    with pytest.raises(ConfigError, match=f"max_slowdown must be None or .*{slowdown}"):
        make_llm(max_slowdown=slowdown)
