"""How much of prompts a step computes beside decodes: what is learned, and that tokens stay."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from paged_kv.engine import prefill_pace
from paged_kv.engine.prefill_pace import LEAST_TOKENS, MOST_TIMES, WEIGHT, PrefillPace
from paged_kv.errors import ConfigError
from tests.support.small_llm import params_of, tokens_of

DECODE, TOKEN = 0.010, 0.001  # seconds of a step of decodes, and of a token of a prompt


class Steps:
    """Steps on a clock of their own, told to a pace."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, max_slowdown: float = 3.0) -> None:
        self.now = 100.0
        self.scheduler: Any = SimpleNamespace(most_beside_decodes=None)
        self.pace = PrefillPace(self.scheduler, max_slowdown)
        monkeypatch.setattr(prefill_pace, "perf_counter", lambda: self.now)

    def run(self, *num_new: int, seconds: float | None = None, drafts: Any = None) -> int | None:
        began = self.now
        prompt_tokens = sum(count for count in num_new if count > 1)
        self.now += DECODE + TOKEN * prompt_tokens if seconds is None else seconds
        starts = np.concatenate([[0], np.cumsum(num_new)])
        plan = SimpleNamespace(query_start_loc=starts, num_draft_tokens=drafts)
        self.pace.note(SimpleNamespace(plan=plan), began)
        most: int | None = self.scheduler.most_beside_decodes
        return most


def test_it_begins_with_little_beside_decodes_as_soon_as_a_prompt_is_known(monkeypatch):
    steps = Steps(monkeypatch)
    assert steps.run(300, seconds=0.450) == LEAST_TOKENS  # 1.5 ms a token
    assert steps.run(1, 1, 20) == 20  # decodes are taken to be half of its 30 ms
    for _ in range(60):
        steps.run(1, 1)
    most = 0
    for _ in range(200):
        most = steps.run(1, 1, 20) or 0
    assert most in (19, 20)  # two decodes' time more, at a tenth of it for each token


def test_nothing_is_limited_before_anything_is_known(monkeypatch):
    steps = Steps(monkeypatch)
    assert steps.run(1, 300) is None
    assert steps.run(1, 1) is None
    assert steps.run(1, 1, 300) == 20


@pytest.mark.parametrize(("max_slowdown", "most"), [(2.0, LEAST_TOKENS), (5.0, 40), (11.0, 100)])
def test_the_limit_is_what_the_slowdown_leaves(monkeypatch, max_slowdown, most):
    steps = Steps(monkeypatch, max_slowdown)
    steps.run(1)
    assert steps.run(1, 500) == most


def test_it_follows_the_machine_and_a_single_long_step_moves_it_by_little(monkeypatch):
    steps = Steps(monkeypatch, 11.0)
    steps.run(1)
    assert steps.run(1, 500) == 100
    most = steps.run(1, seconds=50.0)
    assert most == int(100 * (1 + WEIGHT * (MOST_TIMES - 1)))
    for _ in range(200):
        most = steps.run(1, seconds=0.020)
    assert most == 199  # and never quite 200


def test_what_tells_nothing_is_not_learned_from(monkeypatch):
    """Steps without decodes, and those with drafts."""
    steps = Steps(monkeypatch, 11.0)
    steps.run(1)
    steps.run(1, 500)
    steps.run(500, seconds=9.0)
    steps.run(4, 4, seconds=9.0, drafts=np.array([3, 3]))
    assert steps.scheduler.most_beside_decodes == 100


def test_steps_that_overlap_count_from_the_end_of_the_one_before(monkeypatch):
    steps = Steps(monkeypatch, 11.0)
    steps.run(1)
    steps.run(1, 500)
    began, steps.now = steps.now - 1.0, steps.now + DECODE
    plan = SimpleNamespace(query_start_loc=np.array([0, 1]), num_draft_tokens=None)
    steps.pace.note(SimpleNamespace(plan=plan), began)
    assert steps.scheduler.most_beside_decodes == 100


def test_an_llm_that_paces_gives_the_same_tokens(make_llm, monkeypatch, prompts, greedy):
    """Whatever it learns of this machine: here that prompts are dear."""
    monkeypatch.setattr(PrefillPace, "most_tokens", LEAST_TOKENS)
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
    assert max(beside) == LEAST_TOKENS


@pytest.mark.parametrize("slowdown", [1, 0.5, float("nan"), float("inf"), "3", True])
def test_a_slowdown_that_cannot_be_is_refused(make_llm, slowdown):
    with pytest.raises(ConfigError, match=f"max_slowdown must be None or .*{slowdown}"):
        make_llm(max_slowdown=slowdown)
