"""Requests that go on from tokens which another engine has drawn: what comes is what would have."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from paged_kv import LLM, AsyncLLM, InvalidRequestError, RequestOutput, SamplingParams
from paged_kv.entrypoints.outputs import OutputAssembler, StreamEvent
from paged_kv.errors import GenerationError
from tests.support.small_llm import MakeLLM, params_of, sampling

GREEDY = params_of(temperature=0.0)
CASES = {
    "greedy": GREEDY,
    "seeded": sampling(),
    "penalties": sampling(repetition_penalty=1.3, frequency_penalty=0.5, no_repeat_ngram_size=3),
    "limits": sampling(top_k=40, top_p=0.9, min_tokens=20),
    "samples": sampling(n=3, logprobs=2),
    "best of": sampling(n=1, best_of=3),
}


async def events_of(
    engine: AsyncLLM,
    prompt: list[int],
    params: SamplingParams,
    given: Mapping[int, Sequence[int]] | None = None,
) -> list[StreamEvent]:
    async with await engine.submit(prompt, params, given=given) as request:
        return [event async for event in request]


def with_engine(llm: LLM, use: Any) -> Any:
    async def main() -> Any:
        async with AsyncLLM(llm) as engine:
            return await use(engine)

    return asyncio.run(asyncio.wait_for(main(), 120))


def put_together(
    prompt: list[int], params: SamplingParams, events: Sequence[StreamEvent]
) -> RequestOutput:
    assembler = OutputAssembler([prompt], [prompt], [params])
    for event in events:
        assembler.add(event)
    return assembler.outputs[0]


def tokens_of(events: Sequence[StreamEvent], num_samples: int) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {index: [] for index in range(num_samples)}
    for event in events:
        if event.token_id is not None:
            found[event.sample_index].append(event.token_id)
    return found


@pytest.mark.parametrize("params", CASES.values(), ids=CASES)
@pytest.mark.parametrize("num_events", [1, 7, 20])
def test_the_rest_is_what_it_would_have_been(
    make_llm: MakeLLM, prompts: list[list[int]], params: SamplingParams, num_events: int
) -> None:
    llm, prompt = make_llm(), prompts[3]

    async def use(engine: AsyncLLM) -> tuple[list[StreamEvent], list[StreamEvent]]:
        whole = await events_of(engine, prompt, params)
        begun = whole[:num_events]
        given = tokens_of(begun, params.num_samples)
        return whole, begun + await events_of(engine, prompt, params, given)

    whole, continued = with_engine(llm, use)
    assert len(continued) == len(whole)
    expected = put_together(prompt, params, whole)
    found = put_together(prompt, params, continued)
    for one, other in zip(found.completions, expected.completions, strict=True):
        assert one.token_ids == other.token_ids
        assert (one.text, one.finish_reason) == (other.text, other.finish_reason)
        if other.logprobs is not None and one.logprobs is not None:
            chosen = [each.logprob for each in one.logprobs]
            assert chosen == pytest.approx([each.logprob for each in other.logprobs], abs=1e-4)


def test_samples_that_are_over_are_not_computed(
    make_llm: MakeLLM, prompts: list[list[int]]
) -> None:
    params = sampling(n=3)

    async def use(engine: AsyncLLM) -> tuple[list[StreamEvent], list[StreamEvent]]:
        whole = await events_of(engine, prompts[2], params)
        given = {2: tokens_of(whole, 3)[2][:4], 0: []}
        return whole, await events_of(engine, prompts[2], params, given)

    whole, rest = with_engine(make_llm(), use)
    expected, found = tokens_of(whole, 3), tokens_of(rest, 3)
    assert found == {0: expected[0], 1: [], 2: expected[2][4:]}
    assert sum(event.finish_reason is not None for event in rest) == 2


@pytest.mark.parametrize("num_given", [1, 2, 3, 4])
def test_text_and_stop_strings_reach_over_the_seam(make_llm: MakeLLM, num_given: int) -> None:
    """Bytes of one character, and a stop string, of which some were given."""
    text = "x\u20acy END"
    token_ids = list(text.encode())
    llm = make_llm()
    bias = dict.fromkeys(range(258), -10000.0)

    async def use(engine: AsyncLLM) -> list[StreamEvent]:
        params = params_of(
            temperature=0.0, logit_bias={**bias, token_ids[num_given]: 1e4}, max_tokens=12
        )
        return await events_of(engine, [1, 2, 3], params, {0: token_ids[:num_given]})

    events = with_engine(llm, use)
    given = put_together([1, 2, 3], GREEDY, events)
    whole = llm.requests.processor.text_of([1, 2, 3], [*token_ids[:num_given], *given.token_ids])
    before = llm.requests.processor.text_of([1, 2, 3], token_ids[:num_given])
    assert whole.endswith(given.text)
    assert before.replace("\ufffd", "") + given.text == whole

    async def stopped(engine: AsyncLLM) -> list[StreamEvent]:
        params = params_of(temperature=0.0, logit_bias={**bias, ord("D"): 1e4}, stop="END")
        return await events_of(engine, [1], params, {0: list(b"a EN")})

    (end,) = with_engine(llm, stopped)
    assert (end.finish_reason, end.text) == ("stop", "")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"given: tokens of the samples below 1, got \[\]"),
        ({1: [3]}, r"given: tokens of the samples below 1, got \[1\]"),
        ([[3]], r"given: tokens of the samples below 1, got \[\[3\]\]"),
        ({0: [70000]}, "given: token id 70000 is outside the vocabulary"),
        ({0: ["3"]}, "given: token ids must be a flat list"),
        ({0: [3] * 30}, "given: 30 tokens leave none of 30"),
        ({0: [5, 9]}, "given: token 9 has ended the request"),
    ],
)
def test_what_cannot_go_on_is_refused(make_llm: MakeLLM, given: Any, message: str) -> None:
    async def use(engine: AsyncLLM) -> None:
        with pytest.raises(InvalidRequestError, match=message):
            await events_of(engine, [1, 2], params_of(stop_token_ids=[9]), given)
        while engine.num_requests:  # its place is given back when the loop hears of it
            await asyncio.sleep(0.001)
        assert not engine._room._num_inside

    with_engine(make_llm(), use)


def test_one_that_was_stopped_by_its_text_ends(make_llm: MakeLLM) -> None:
    """Whoever gives tokens that a stop string is in gets the end that it should have had."""

    async def use(engine: AsyncLLM) -> list[StreamEvent]:
        return await events_of(engine, [1], params_of(stop="END"), {0: list(b"a END")})

    events = with_engine(make_llm(), use)
    assert [event.finish_reason for event in events] == ["stop"]


def test_a_step_that_fails_ends_it_as_any_other(
    make_llm: MakeLLM, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make_llm()

    def fail(*arguments: Any, **options: Any) -> Any:
        raise ValueError("no logits")

    monkeypatch.setattr(llm.engine.runner, "run", fail)

    async def use(engine: AsyncLLM) -> list[StreamEvent]:
        return await events_of(engine, prompts[1], GREEDY, {0: [1, 2, 3]})

    (end,) = with_engine(llm, use)
    assert end.finish_reason == "error"
    assert "no logits" in str(end.error)
    assert not isinstance(end.error, GenerationError)
