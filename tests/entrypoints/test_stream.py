"""`LLM.stream`: events of every token, closed streams, and priorities."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from paged_kv.entrypoints.outputs import StreamEvent
from tests.support.small_llm import (
    NUM_NEW_TOKENS,
    assemble,
    assert_nothing_is_held,
    every_format,
    params_of,
    sampling,
    tokens_of,
)


@every_format
def test_a_stream_gives_what_generate_gives(make_llm, prompts, kv_format):
    # What a prompt finds in the prefix cache the second time is quantized.
    llm = make_llm(kv_format=kv_format, token_budget=64, num_blocks=40, prefix_caching=False)
    params = [params_of(), sampling(), *[params_of(max_tokens=9)] * (len(prompts) - 2)]
    expected = llm.generate(prompts, params)
    found = assemble(llm.stream(prompts, params), len(prompts))
    assert found == [output.completions[0] for output in expected]


def test_stream_events_tell_prompts_and_samples_apart(make_llm, prompts):
    llm = make_llm()
    expected = llm.generate(prompts[:2], sampling(n=2))
    found: dict[tuple[int, int], list[int]] = {}
    for event in llm.stream(prompts[:2], sampling(n=2)):
        found.setdefault((event.prompt_index, event.sample_index), []).append(event.token_id)
    assert found == {
        (p, s): expected[p].completions[s].token_ids for p in range(2) for s in range(2)
    }


def test_tokens_stream_one_at_a_time_and_only_the_last_has_a_reason(make_llm, prompts, greedy):
    events = list(make_llm().stream(prompts[1], params_of()))
    assert [event.token_id for event in events] == greedy[1]
    reasons = [event.finish_reason for event in events]
    assert reasons == [None] * (NUM_NEW_TOKENS - 1) + ["length"]


@pytest.mark.parametrize("num_events", [0, 1, 9])
@pytest.mark.parametrize("num_blocks", [200, 10], ids=["roomy", "preempting"])
def test_closing_a_stream_aborts_its_requests_and_frees_every_block(
    make_llm, prompts, greedy, num_events, num_blocks
):
    llm = make_llm(num_blocks=num_blocks)
    events = llm.stream(prompts, params_of())
    for _ in range(num_events):
        next(events)
    assert llm.engine.has_unfinished or num_events == 0
    events.close()
    assert_nothing_is_held(llm)
    assert tokens_of(llm.generate(prompts, params_of())) == greedy


def test_a_stream_that_is_dropped_frees_every_block(make_llm, prompts):
    llm = make_llm()
    events = llm.stream(prompts, params_of())
    next(events)
    del events
    assert_nothing_is_held(llm)


def test_two_interleaved_streams_each_get_their_own_tokens(make_llm, prompts, greedy):
    llm = make_llm()
    first, second = llm.stream(prompts[1], params_of()), llm.stream(prompts[2], params_of())
    tokens: tuple[list[int], list[int]] = ([], [])
    for one, two in itertools.zip_longest(first, second):
        tokens[0].append(one.token_id)
        tokens[1].append(two.token_id)
    assert list(tokens) == greedy[1:3]


def test_a_stream_goes_on_when_another_is_closed_or_runs_ahead(make_llm, prompts, greedy):
    llm = make_llm(num_blocks=20)
    survivor = llm.stream(prompts[3], params_of())
    tokens = [next(survivor).token_id]
    closed = llm.stream(prompts[1:3], params_of())
    for _ in range(3):
        next(closed)
    closed.close()
    tokens += [next(survivor).token_id]
    ahead = list(llm.stream(prompts[1], params_of()))
    assert [event.token_id for event in ahead] == greedy[1]
    assert [*tokens, *(event.token_id for event in survivor)] == greedy[3]


def test_generate_while_a_stream_is_open_disturbs_neither(make_llm, prompts, greedy):
    llm = make_llm(num_blocks=16)
    events = llm.stream(prompts[3], params_of())
    tokens = [next(events).token_id for _ in range(4)]
    assert tokens_of(llm.generate(prompts[:3], params_of())) == greedy[:3]
    assert [*tokens, *(event.token_id for event in events)] == greedy[3]


def finishing_order(events: Iterator[StreamEvent]) -> list[int]:
    return [event.prompt_index for event in events if event.finish_reason]


def test_lower_priority_numbers_are_served_first(make_llm, prompts):
    llm = make_llm(max_num_seqs=1)
    four = prompts[:4]
    assert finishing_order(llm.stream(four, params_of(max_tokens=3))) == [0, 1, 2, 3]
    events = llm.stream(four, params_of(max_tokens=3), priorities=[2, -1, 2, 0])
    assert finishing_order(events) == [1, 3, 0, 2]


def test_priorities_do_not_change_what_is_generated(make_llm, prompts, greedy):
    outputs = make_llm(max_num_seqs=2).generate(prompts, params_of(), priorities=[5, 4, 3, 2, 1, 0])
    assert tokens_of(outputs) == greedy
