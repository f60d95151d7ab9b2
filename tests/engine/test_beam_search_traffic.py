"""Beam searches beside requests: neither changes the other, whoever is preempted or aborted."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
from torch import Tensor
from transformers import PreTrainedModel

from paged_kv import RequestOutput, SamplingParams
from paged_kv.engine.live_request import SequenceUpdate
from paged_kv.errors import InvalidRequestError
from tests.support.beam_searches import (
    assert_same,
    engine_of,
    intercept,
    params_of,
    prompts_of,
    search_beams,
    searched,
    small_model,
)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return small_model()


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="roomy"),
        pytest.param({"token_budget": 5}, id="chunks"),
        pytest.param({"max_num_seqs": 5}, id="few sequences"),
        pytest.param({"num_blocks": 16}, id="few blocks"),
        pytest.param({"num_blocks": 16, "prefix_caching": False, "token_budget": 9}, id="tight"),
    ],
)
def test_searches_and_requests_do_not_change_each_other(model, settings):
    """Requests that run when the search begins, and one that begins while it runs."""
    prompts, params = prompts_of((30, 17, 40)), params_of(max_tokens=20)
    greedy = SamplingParams(max_tokens=40, ignore_eos=True)
    with engine_of(model) as llm:
        beams = searched(search_beams(llm.engine, prompts, params))
        expected = [output.token_ids for output in llm.generate(prompts, greedy)]
    with engine_of(model, **settings) as llm:
        stream = llm.stream(prompts, greedy)
        tokens: list[list[int]] = [[], [], []]
        for _ in range(5):
            event = next(stream)
            tokens[event.prompt_index].append(event.token_id)
        steps, step, later = itertools.count(), llm.engine.step, llm.stream(prompts[1], greedy)
        later_tokens: list[int | None] = []

        def step_and_begin_another() -> Any:
            if next(steps) == 7:
                later_tokens.append(next(later).token_id)
            return step()

        llm.engine.step = step_and_begin_another  # type: ignore[method-assign]
        outputs = llm.beam_search(prompts, params)
        assert_same([(found_tokens(output), found_scores(output)) for output in outputs], beams)
        for event in stream:
            tokens[event.prompt_index].append(event.token_id)
        assert tokens == expected
        assert [*later_tokens, *(event.token_id for event in later)] == expected[1]


def found_tokens(output: RequestOutput) -> list[list[int]]:
    return [completion.token_ids for completion in output.completions]


def found_scores(output: RequestOutput) -> list[float]:
    return [float(completion.log_probability or 0.0) for completion in output.completions]


@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize("token_budget", [1024, 6])
def test_preempted_searches_find_the_same(model, prefix_caching, token_budget):
    """At random, in every state: with part of the prompt, before and after beams have parted."""
    prompts, params = prompts_of((40, 17, 1)), params_of(max_tokens=20)
    numbers = random.Random(2)
    with engine_of(model) as llm:
        expected = searched(search_beams(llm.engine, prompts, params))
    with engine_of(model, prefix_caching=prefix_caching, token_budget=token_budget) as llm:
        preempted = []
        schedule = llm.engine.scheduler.schedule

        def preempt_and_schedule(drafts: Any) -> Any:
            scheduler = llm.engine.scheduler
            for search in list(llm.engine._searches.values()):
                request = search.request
                if request.seq_ids and numbers.random() < 0.2 and len(preempted) < 40:
                    preempted.append((len(request.seq_ids), search.num_generated))
                    scheduler._preempt(request)
                    scheduler.check_integrity()
            return schedule(drafts)

        llm.engine.scheduler.schedule = preempt_and_schedule  # type: ignore[method-assign]
        assert_same(searched(search_beams(llm.engine, prompts, params)), expected)
    # A prompt that fits a step has parted into beams when the next one comes.
    assert {num_seqs for num_seqs, _ in preempted} == ({3} if token_budget == 1024 else {1, 3})
    assert len({num_generated for _, num_generated in preempted}) >= 4


def test_requests_of_a_better_rank_preempt_a_search(model):
    """They grow until its beams have no room; it begins again when they are done."""
    prompts, params = prompts_of((30, 17, 17, 18, 19)), params_of(max_tokens=60, ignore_eos=True)
    greedy = SamplingParams(max_tokens=100, ignore_eos=True)
    with engine_of(model) as llm:
        expected = searched(search_beams(llm.engine, prompts[:1], params))
        outputs = llm.generate(prompts, greedy)
    with engine_of(model, num_blocks=30, prefix_caching=False) as llm:
        engine = llm.engine
        engine.scheduler.steps_ahead = 0  # or the search would wait for all of them
        found: dict[str, list[int | None]] = {name: [] for name in "abcde"}
        for name, prompt in zip(found, prompts, strict=True):
            engine.add_request(name, prompt, greedy)
        engine.add_search("search", prompts[0], params)
        search = engine._searches["search"]
        while engine.has_unfinished:
            for update in engine.step():
                if isinstance(update, SequenceUpdate):
                    found[update.request_id].append(update.token_id)
            engine.scheduler.check_integrity()
    assert search.request.num_preemptions > 0
    assert_same(searched([search.output]), expected)
    assert list(found.values()) == [output.token_ids for output in outputs]


def test_an_aborted_search_leaves_the_others_alone(model):
    """In any state, from the queue to parted beams; also while its own step runs."""
    prompts, params = prompts_of((30, 17)), params_of(ignore_eos=True)
    with engine_of(model) as llm:
        expected = searched(search_beams(llm.engine, prompts[1:], params))
        for last_step in (0, 1, 2, 5):
            for is_within in (False, True):
                engine, steps = llm.engine, itertools.count()
                engine.add_search("aborted", prompts[0], params)
                engine.add_search("other", prompts[1], params)
                search = engine._searches["other"]
                intercept(llm, lambda logits: logits)
                forward = engine.model.forward

                def abort_within(*arguments: Any) -> Tensor:
                    if is_within and next(steps) == last_step:  # noqa: B023 -- called in this turn
                        assert engine.abort("aborted")  # noqa: B023
                    return forward(*arguments)  # noqa: B023

                engine.model.forward = abort_within  # type: ignore[method-assign]
                for number in itertools.count():
                    if not is_within and number == last_step:
                        assert engine.abort("aborted")
                    if not engine.has_unfinished:
                        break
                    assert all(update.request_id == "other" for update in engine.step())
                    engine.scheduler.check_integrity()
                engine.model.forward = forward
                assert not engine.abort("aborted")
                assert_same(searched([search.output]), expected)


def test_searches_and_requests_share_ids(model):
    with engine_of(model) as llm:
        llm.engine.add_search("a", [1, 2], params_of())
        with pytest.raises(InvalidRequestError, match="'a' is already in use"):
            llm.engine.add_search("a", [1, 2], params_of())
        with pytest.raises(InvalidRequestError, match="'a' is already in use"):
            llm.engine.add_request("a", [1, 2], SamplingParams())
        assert llm.engine.abort("a")
