"""Threads, streams that nobody reads or that are collected, failing texts and failing steps."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from paged_kv import LLM
from paged_kv.blocks.block_manager import BlockManager
from paged_kv.engine.text import Detokenizer
from paged_kv.entrypoints.text_engine import MAX_WAITING
from paged_kv.errors import (
    GenerationError,
    InvalidRequestError,
    InvalidStepError,
    StepFailedError,
)
from tests.support.small_llm import (
    assemble,
    assert_nothing_is_held,
    params_of,
    raise_once,
    sampling,
    tokens_of,
)

# -- threads --------------------------------------------------------------------------------------


def test_threads_share_an_llm_and_each_gets_its_own_tokens(make_llm, prompts, greedy):
    llm = make_llm(num_blocks=40)
    expected = tokens_of(llm.generate(prompts, params_of()))

    def serve(number: int) -> list[list[int]]:
        order = prompts[number % 3 :] + prompts[: number % 3]
        found = tokens_of(llm.generate(order, params_of()))
        return found[len(prompts) - number % 3 :] + found[: len(prompts) - number % 3]

    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(serve, range(12)):
            assert found == expected
    assert expected == greedy


def test_an_abort_from_another_thread_ends_the_request_and_leaks_nothing(make_llm, prompts):
    llm = make_llm(num_blocks=60)
    (expected,) = tokens_of(llm.generate([prompts[2]], params_of(max_tokens=300)))
    started, names = threading.Event(), []

    def abort_all() -> None:
        started.wait()
        while names:
            llm.engine.abort(names.pop())

    thread = threading.Thread(target=abort_all)
    thread.start()
    stream = llm.stream([prompts[2]] * 7, params_of(max_tokens=300))
    events = [next(stream) for _ in range(40)]
    names += list(llm.engine._live)[1:]
    started.set()
    events += list(stream)
    thread.join()
    kept, *aborted = assemble(iter(events), 7)
    assert kept.token_ids == expected
    for completion in aborted:
        assert completion.finish_reason == "abort"
        assert completion.token_ids == expected[: len(completion.token_ids)]
        assert len(completion.token_ids) < 300


def test_an_llm_called_from_inside_its_own_step_says_so(make_llm, prompts, greedy):
    llm = make_llm()
    errors: list[Exception] = []

    def call_again(ids: Tensor, scores: Tensor) -> Tensor:
        for call in (
            lambda: llm.generate(prompts[0]),
            llm.engine.step,
            lambda: llm.engine.add_request("x", [1], params_of()),
        ):
            with pytest.raises(InvalidStepError, match="in the middle of a step") as caught:
                call()
            errors.append(caught.value)
        return scores

    params = [params_of(logits_processors=[call_again]), params_of()]
    assert tokens_of(llm.generate(prompts[1:3], params)) == greedy[1:3]
    assert len(errors) == 3 * len(greedy[1])


# -- streams that nobody reads --------------------------------------------------------------------


@pytest.mark.parametrize("method", ["find_prefix", "add_sequence", "reserve", "commit"])
def test_a_stream_collected_in_the_middle_of_a_step_disturbs_nobody(
    make_llm, monkeypatch, prompts, greedy, method
):
    """The garbage collector may run between any two lines, and closes what nobody holds."""
    llm = make_llm()
    ring: list[Any] = [llm.stream([prompts[4], prompts[3]], sampling(n=2))]
    next(ring[0])
    ring.append(ring)
    del ring
    original: Callable[..., Any] = getattr(BlockManager, method)

    def collect_and_call(self: BlockManager, *args: Any, **options: Any) -> Any:
        gc.collect()
        return original(self, *args, **options)

    gc.disable()
    try:
        monkeypatch.setattr(BlockManager, method, collect_and_call)
        assert tokens_of(llm.generate(prompts, params_of())) == greedy
    finally:
        gc.enable()
    assert_nothing_is_held(llm)


def test_a_stream_that_nobody_reads_waits_and_keeps_no_more_than_it_may(make_llm, prompts):
    llm = make_llm(num_blocks=80)
    params = params_of(max_tokens=480)
    (expected,) = tokens_of(llm.generate([prompts[1]], params))
    paused = llm.stream([prompts[1]], params)
    first = next(paused).token_id
    llm.generate([prompts[0]] * 2, params)
    (live,) = llm.engine._live.values()
    assert MAX_WAITING <= len(live.token_ids) <= MAX_WAITING + 2
    llm.generate([prompts[0]], params)
    assert len(live.token_ids) <= MAX_WAITING + 2
    assert [first, *(event.token_id for event in paused)] == expected


def test_a_paused_stream_makes_room_for_those_who_read(make_llm, prompts):
    """It holds nearly the whole pool; swapped or computed again, its tokens stay the same."""
    llm = make_llm(num_blocks=30)
    params = params_of(max_tokens=440)
    (expected,) = tokens_of(llm.generate([prompts[1]], params))
    paused = llm.stream([prompts[1]], params)
    tokens = [next(paused).token_id]
    other = tokens_of(llm.generate([prompts[4]] * 3, params_of(max_tokens=330)))
    assert other == tokens_of(llm.generate([prompts[4]] * 3, params_of(max_tokens=330)))
    tokens += [event.token_id for event in paused]
    assert tokens == expected


# -- texts and steps that fail --------------------------------------------------------------------


def test_a_text_that_fails_ends_its_own_request_alone(make_llm, monkeypatch, prompts, greedy):
    """In the step in which it fails others get their tokens too."""
    append = Detokenizer.append

    def fail_at_one_token(self: Detokenizer, token_id: int, may_stop: bool) -> bool:
        if self._context == prompts[2][-8:]:
            raise UnicodeError("broken")
        return append(self, token_id, may_stop)

    monkeypatch.setattr(Detokenizer, "append", fail_at_one_token)
    llm = make_llm()
    with pytest.raises(GenerationError, match=r"1 of 3 .*broken") as caught:
        llm.generate(prompts[1:4], params_of())
    outputs = caught.value.outputs
    assert tokens_of([outputs[0], outputs[2]]) == [greedy[1], greedy[3]]
    assert outputs[1].completions[0].finish_reason == "error"
    assert_nothing_is_held(llm)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), RuntimeError("lost")], ids=repr)
@pytest.mark.parametrize("call", [1, 2, 7])
def test_a_step_that_fails_costs_its_own_requests_where_that_is_asked_for(
    make_llm, model, monkeypatch, prompts, greedy, error, call
):
    llm = make_llm(max_num_seqs=2)
    mlp = model.model.layers[-1].mlp
    monkeypatch.setattr(mlp, "forward", raise_once(mlp.forward, call, error))
    completions = assemble(llm.stream(prompts, params_of(), keep_going=True), len(prompts))
    failed = [c for c in completions if c.error is not None]
    assert 1 <= len(failed) <= 2
    for completion, expected in zip(completions, greedy, strict=True):
        if completion.error is None:
            assert completion.token_ids == expected
        else:
            assert isinstance(completion.error, StepFailedError)
            assert completion.error.__cause__ is error
            assert completion.token_ids == expected[: len(completion.token_ids)]
    assert_nothing_is_held(llm)


def test_a_step_that_fails_costs_the_samples_that_wait_for_it_too(make_llm, model, monkeypatch):
    llm = make_llm()
    mlp = model.model.layers[-1].mlp
    monkeypatch.setattr(mlp, "forward", raise_once(mlp.forward, 1, RuntimeError("lost")))
    events = list(llm.stream([[1, 2, 3]], params_of(n=3), keep_going=True))
    assert [event.sample_index for event in events] == [0, 1, 2]
    assert all(isinstance(event.error, StepFailedError) for event in events)


def test_closing_many_streams_looks_at_each_request_once(make_llm, monkeypatch, prompts):
    """No list of all others is gone through for each: that would be quadratic."""
    llm: LLM = make_llm(num_blocks=40)
    stream = llm.stream([prompts[0]] * 300, params_of())
    next(stream)
    lines = 0

    def count(frame: Any, event: str, argument: Any) -> Any:
        nonlocal lines
        lines += event == "line"
        return count

    sys.settrace(count)
    try:
        stream.close()
    finally:
        sys.settrace(None)
    assert lines < 300 * 100


# -- errors name the request ----------------------------------------------------------------------


def test_errors_say_which_prompt_they_are_about(make_llm, prompts):
    llm = make_llm()
    for call in (llm.generate, llm.stream, llm.beam_search):
        with pytest.raises(InvalidRequestError, match=r"^prompt 2: token id 9999 is outside"):
            call([prompts[0], prompts[1], [9999]])
        with pytest.raises(InvalidRequestError, match=r"^token id 9999 is outside"):
            call([9999])

    def fail(ids: Tensor, scores: Tensor) -> Tensor:
        raise ValueError("mine")

    params = [params_of(), params_of(n=2, logits_processors=[fail])]
    with pytest.raises(GenerationError, match=r"2 of 3 requests failed: prompt 1, sample 0: after"):
        llm.generate(prompts[:2], params)


def test_a_prompts_share_of_a_step_can_be_capped(make_llm, prompts, greedy):
    llm = make_llm(max_prefill_tokens=16)
    assert tokens_of(llm.generate([prompts[4]], params_of(max_tokens=1))) == [greedy[4][:1]]
    assert llm.engine.num_steps == -(-len(prompts[4]) // 16)
