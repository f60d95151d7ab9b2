"""Requests to replicas that die: none is lost, and each gets what one engine would have given."""

from __future__ import annotations

import asyncio
import copy
import random
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import httpx
import pytest

from paged_kv import (
    LLM,
    InvalidRequestError,
    PromptTooLongError,
    QueueFullError,
    RequestOutput,
    RequestTimeoutError,
    SamplingParams,
)
from paged_kv.entrypoints.outputs import OutputAssembler
from paged_kv.entrypoints.server.app import app_of
from paged_kv.entrypoints.server.refusal import Refusal
from paged_kv.entrypoints.server.served import Served
from paged_kv.entrypoints.server.settings import ServerSettings
from paged_kv.integrations.ray_serve import fleet_engine
from paged_kv.integrations.ray_serve.fleet_engine import FleetEngine, FleetRequest
from paged_kv.integrations.ray_serve.replica import EngineReplica
from paged_kv.integrations.ray_serve.session import SessionKeys
from tests.support.local_fleet import LocalCalls, fleet_of
from tests.support.small_llm import MakeLLM, assert_nothing_is_held, params_of, sampling

GREEDY = params_of(temperature=0.0)
Use = Callable[[FleetEngine, LocalCalls], Awaitable[Any]]


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_engine, "WAIT_SECONDS", 0.001)


@pytest.fixture
def with_fleet(pristine_model, tokenizer) -> Iterator[Callable[..., Any]]:
    """Runs a coroutine with a fleet of small replicas, of which nothing may be left."""

    def run(use: Use, *, num_replicas: int = 2, llm: Any = None, **options: Any) -> Any:
        async def main() -> Any:
            settings = {"tokenizer": tokenizer, "kv_format": "native", "max_num_seqs": 8}
            replicas = [
                EngineReplica(
                    f"replica {number}",
                    copy.deepcopy(pristine_model),
                    {**settings, **(llm or {})},
                    max_requests=64,
                )
                for number in range(num_replicas)
            ]
            engine, calls = fleet_of(*replicas, **options)
            try:
                result = await use(engine, calls)
                assert not engine.fleet._placements
                assert not engine.room._num_inside
            finally:
                for replica in replicas:
                    await replica.engine.drain(30)
                    assert_nothing_is_held(replica.llm)
                    await replica.close()
            return result

        return asyncio.run(asyncio.wait_for(main(), 120))

    return run


async def output_of(
    engine: FleetEngine, prompt: list[int], params: SamplingParams
) -> tuple[FleetRequest, RequestOutput]:
    async with await engine.submit(prompt, params) as request:
        assembler = OutputAssembler([prompt], [request.prompt_token_ids], [request.params])
        async for event in request:
            assert event.error is None, event.error
            assembler.add(event)
    return request, assembler.outputs[0]


async def slowly_read(request: FleetRequest) -> None:
    async for _ in request:
        await asyncio.sleep(0.01)


def answers(output: RequestOutput) -> list[tuple[list[int], str, str | None]]:
    return [(each.token_ids, each.text, each.finish_reason) for each in output.completions]


def expected(llm: LLM, requests: Sequence[FleetRequest]) -> list[Any]:
    outputs = llm.generate(
        [request.prompt_token_ids for request in requests], [request.params for request in requests]
    )
    return [answers(output) for output in outputs]


@pytest.mark.parametrize("seed", range(3))
def test_replicas_die_and_nothing_is_lost(
    with_fleet: Callable[..., Any], make_llm: MakeLLM, prompts: list[list[int]], seed: int
) -> None:
    draw = random.Random(seed)
    kinds = [
        GREEDY,
        sampling(),
        sampling(seed=None),
        sampling(n=3, logprobs=1),
        sampling(best_of=2, repetition_penalty=1.2),
    ]

    async def use(engine: FleetEngine, calls: LocalCalls) -> Any:
        calls.replies_left = {"replica 0": draw.randrange(60), "replica 1": draw.randrange(300)}
        work = [output_of(engine, prompt, params) for prompt in prompts for params in kinds]
        results = await asyncio.gather(*work)
        assert len(calls.alive) == 1
        assert engine.figures.num_lost_attempts
        assert not engine.figures.num_lost_requests
        assert any(sent.given for _, sent in calls.sent), "none had begun"
        return results

    results = with_fleet(use, num_replicas=3)
    found = [answers(output) for _, output in results]
    assert found == expected(make_llm(), [request for request, _ in results])


def test_without_a_seed_others_draw_what_it_would_have_drawn(
    with_fleet: Callable[..., Any], prompts: list[list[int]]
) -> None:
    async def use(engine: FleetEngine, calls: LocalCalls) -> Any:
        one, other = [await engine.submit(prompts[1], sampling(seed=None)) for _ in range(2)]
        seeds = [one.params.seed, other.params.seed]
        await one.close()
        await other.close()
        greedy = await engine.submit(prompts[1], replace(GREEDY, temperature=None))
        await greedy.close()
        return [*seeds, greedy.params.seed]

    first, second, greedy = with_fleet(use)
    assert None not in (first, second)
    assert first != second
    assert greedy is None


def test_a_replica_that_is_closed_hands_its_requests_on(
    with_fleet: Callable[..., Any], make_llm: MakeLLM, prompts: list[list[int]]
) -> None:
    async def use(engine: FleetEngine, calls: LocalCalls) -> Any:
        tasks = [asyncio.create_task(output_of(engine, each, GREEDY)) for each in prompts]
        while len(calls.sent) < len(prompts):
            await asyncio.sleep(0.001)
        leaving = calls.alive.pop("replica 0")
        await leaving.engine.close()
        return await asyncio.gather(*tasks)

    results = with_fleet(use)
    found = [answers(output) for _, output in results]
    assert found == expected(make_llm(), [request for request, _ in results])


def test_a_replica_that_fails_at_once_does_not_draw_all_requests(
    with_fleet: Callable[..., Any], make_llm: MakeLLM, prompts: list[list[int]]
) -> None:
    """It is always idle, so that by work alone each attempt would go there."""

    async def use(engine: FleetEngine, calls: LocalCalls) -> Any:
        await calls.alive["replica 0"].engine.close()
        results = []
        for _ in range(2):
            tasks = [output_of(engine, each, GREEDY) for each in [*prompts, *prompts]]
            results += await asyncio.gather(*tasks)
        assert not engine.figures.num_lost_requests
        there = [name for name, _ in calls.sent].count("replica 0")
        assert 0 < there <= 2 * len(prompts)  # once, and only of those that came together
        return results

    results = with_fleet(use)
    found = [answers(output) for _, output in results]
    assert found == expected(make_llm(), [request for request, _ in results])


def test_a_step_that_fails_is_tried_elsewhere(
    with_fleet: Callable[..., Any], make_llm: MakeLLM, prompts: list[list[int]]
) -> None:
    async def use(engine: FleetEngine, calls: LocalCalls) -> Any:
        broken, before = calls.alive["replica 0"].llm.engine.runner, 3

        def fail(*arguments: Any, **options: Any) -> Any:
            nonlocal before
            before -= 1
            if before < 0:
                raise ValueError("broken")
            return run(*arguments, **options)

        run, broken.run = broken.run, fail
        results = [await output_of(engine, each, GREEDY) for each in prompts[:2]]
        assert engine.figures.num_lost_attempts
        return results

    results = with_fleet(use)
    found = [answers(output) for _, output in results]
    assert found == expected(make_llm(), [request for request, _ in results])


def test_attempts_are_limited(with_fleet: Callable[..., Any], prompts: list[list[int]]) -> None:
    async def use(engine: FleetEngine, calls: LocalCalls) -> None:
        calls.replies_left = dict.fromkeys(calls.alive, 2)
        with pytest.raises(Refusal, match=r"3 replicas were lost: .* died") as caught:
            await output_of(engine, prompts[0], GREEDY)
        assert caught.value.status == 503
        assert len(calls.sent) == 3
        assert engine.figures.num_lost_requests == 1

    with_fleet(use, num_replicas=4, max_attempts=3)


def test_what_is_refused_is_not_tried_again(with_fleet: Callable[..., Any]) -> None:
    async def use(engine: FleetEngine, calls: LocalCalls) -> None:
        with pytest.raises(PromptTooLongError, match="a prompt of 512"):
            await engine.submit([1] * 512, GREEDY)
        assert not calls.sent
        with pytest.raises(InvalidRequestError, match="token id 70000 is outside the vocabulary"):
            await engine.submit([70000], GREEDY)
        assert len(calls.sent) == 1
        assert not engine.figures.num_lost_attempts

    with_fleet(use)


def test_so_many_at_once_and_no_more(
    with_fleet: Callable[..., Any], prompts: list[list[int]]
) -> None:
    async def use(engine: FleetEngine, calls: LocalCalls) -> None:
        inside = [await engine.submit(prompts[0], GREEDY) for _ in range(2)]
        with pytest.raises(QueueFullError, match="2 requests are there"):
            await engine.submit(prompts[0], GREEDY, wait=False)
        waiting = asyncio.create_task(engine.submit(prompts[0], GREEDY))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        await inside[0].close()
        await (await waiting).close()
        await inside[1].close()
        await inside[1].close()

    with_fleet(use, max_requests=2)


def test_time_is_the_requests_wherever_it_is(
    with_fleet: Callable[..., Any], prompts: list[list[int]]
) -> None:
    async def use(engine: FleetEngine, calls: LocalCalls) -> None:
        params = params_of(temperature=0.0, max_tokens=400, ignore_eos=True)
        async with await engine.submit(prompts[0], params, timeout=0.05) as request:
            with pytest.raises(RequestTimeoutError, match=r"within its 0\.05 seconds"):
                await slowly_read(request)

    with_fleet(use)


def test_who_leaves_ends_the_work(with_fleet: Callable[..., Any], prompts: list[list[int]]) -> None:
    async def use(engine: FleetEngine, calls: LocalCalls) -> None:
        params = params_of(max_tokens=400, ignore_eos=True)
        async with await engine.submit(prompts[0], params) as request:
            await anext(request)
        task = asyncio.create_task(output_of(engine, prompts[1], params))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        for replica in calls.alive.values():
            while replica.engine.num_requests:
                await asyncio.sleep(0.001)

    with_fleet(use)


@pytest.mark.parametrize("kv_format", ["native", "int8", "int2"])
def test_what_is_expected_of_a_replica_is_what_is_found_there(
    with_fleet: Callable[..., Any], kv_format: str
) -> None:
    """Prompts of a tree, one after another, in a pool so small that blocks are evicted."""
    draw = random.Random(5)
    stems = [[draw.randrange(256) for _ in range(150)] for _ in range(3)]

    async def use(engine: FleetEngine, calls: LocalCalls) -> None:
        num_hits = 0
        for _ in range(25):
            stem = draw.choice(stems)
            prompt = stem[: draw.randrange(20, 150)] + [draw.randrange(256) for _ in range(60)]
            params = params_of(max_tokens=2, cache_salt=draw.choice([None, None, "salt"]))
            blocks = engine.card.blocks_of(prompt, params)
            expected = {
                name: replica.num_cached_tokens(blocks)
                for name, replica in engine.fleet._replicas.items()
            }
            request, _ = await output_of(engine, prompt, params)
            name = calls.sent[-1][0]
            assert request.num_cached_tokens == expected.get(name, 0)
            assert expected.get(name, 0) == max(expected.values(), default=0)
            num_hits += request.num_cached_tokens > 0
        assert num_hits > 5
        for name, replica in calls.alive.items():  # what the last reply came too early for
            engine.fleet.learn(name, replica._blocks.since(engine.fleet.known[name]))
            assert engine.fleet._replicas[name].cached == set(replica._blocks._stored)

    with_fleet(use, llm={"kv_format": kv_format, "calibration": None, "num_blocks": 60})


def test_prompts_that_share_nothing_have_no_blocks(with_fleet: Callable[..., Any]) -> None:
    async def use(engine: FleetEngine, calls: LocalCalls) -> None:
        prompt = list(range(100))
        assert engine.card.blocks_of(prompt, GREEDY).hashes
        assert not engine.card.blocks_of(prompt, replace(GREEDY, prompt_logprobs=1)).hashes

    with_fleet(use)


# -- behind the server of `paged-kv serve` --------------------------------------------------------


def asked(engine: FleetEngine, use: Callable[[httpx.AsyncClient], Awaitable[Any]]) -> Any:
    settings = ServerSettings(model_name="small", max_requests=64)
    served = Served(engine, settings, engine.figures, engine.card)
    transport = httpx.ASGITransport(SessionKeys(app_of(served)))

    async def ask() -> Any:
        async with httpx.AsyncClient(transport=transport, base_url="http://fleet") as client:
            return await use(client)

    return ask()


def test_the_server_over_a_fleet(with_fleet: Callable[..., Any], make_llm: MakeLLM) -> None:
    body = {"model": "small", "prompt": "once", "max_tokens": 20, "temperature": 0, "seed": 1}

    async def use(engine: FleetEngine, calls: LocalCalls) -> None:
        expected_text = make_llm().generate("once", replace(GREEDY, max_tokens=20))[0].text

        async def ask(client: httpx.AsyncClient) -> None:
            calls.replies_left = {"replica 0": 6}
            plain = (await client.post("/v1/completions", json=body)).json()
            assert plain["choices"][0]["text"] == expected_text
            lines = (await client.post("/v1/completions", json={**body, "stream": True})).text
            assert lines.endswith("data: [DONE]\n\n")
            chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
            answer = await client.post("/v1/chat/completions", json=chat)
            assert answer.json()["usage"]["completion_tokens"] == 4
            refused = await client.post("/v1/completions", json={**body, "prompt": [70000]})
            assert refused.status_code == 400
            figures = (await client.get("/statistics")).json()
            assert sum(each["num_requests"] for each in figures["replicas"].values()) == 4
            assert figures["lost_attempts"] == 1
            metrics = (await client.get("/metrics")).text
            assert "paged_kv:fleet_lost_attempts_total 1.0" in metrics
            assert (await client.get("/ready")).status_code == 200
            assert (await client.get("/v1/models")).json()["data"][0]["max_model_len"] == 512
            assert (await client.post("/tokenize", json={"prompt": "ab"})).json()["count"] == 2

        await asked(engine, ask)

    with_fleet(use, llm={"max_num_seqs": 4})


@pytest.mark.parametrize(
    ("headers", "fields", "session"),
    [
        ({"X-Session-Id": "one"}, {"user": "two"}, "one"),
        ({}, {"user": "two"}, "two"),
        ({}, {"user": "two", "prompt_cache_key": "three"}, "three"),
        ({}, {"user": ""}, None),
        ({}, {}, None),
    ],
)
def test_a_request_has_a_session(
    with_fleet: Callable[..., Any], headers: dict[str, str], fields: dict[str, str], session: Any
) -> None:
    body = {"prompt": "once", "max_tokens": 1, **fields}

    async def use(engine: FleetEngine, calls: LocalCalls) -> None:
        async def ask(client: httpx.AsyncClient) -> None:
            answer = await client.post("/v1/completions", json=body, headers=headers)
            assert answer.status_code == 200
            broken = await client.post("/v1/completions", content=b'{"user": "x"')
            assert broken.status_code in (400, 415)

        await asked(engine, ask)
        assert [sent.session for _, sent in calls.sent] == [session]

    with_fleet(use, num_replicas=1)
