"""Requests of asyncio's tasks: what they get, who waits, and that nothing is left of them."""

from __future__ import annotations

import asyncio
import gc
import random
import re
import threading
import time
import warnings
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest

from paged_kv import (
    AsyncLLM,
    ClosedError,
    ConfigError,
    InvalidRequestError,
    PromptTooLongError,
    QueueFullError,
    RequestTimeoutError,
    SamplingParams,
    SinkWindow,
)
from paged_kv.engine.engine import Engine
from paged_kv.entrypoints import async_request, text_engine
from paged_kv.entrypoints.async_request import Feed
from paged_kv.entrypoints.demo import MODEL_FOLDER
from paged_kv.entrypoints.engine_thread import MOST_FAULTS
from paged_kv.entrypoints.outputs import StreamEvent
from paged_kv.entrypoints.waiting_room import WaitingRoom
from paged_kv.errors import GenerationError, StepFailedError
from tests.support.small_llm import MakeLLM, assert_nothing_is_held, params_of, raise_once, sampling

Result = TypeVar("Result")
ENDLESS = SamplingParams(max_tokens=None, sink_window=SinkWindow(16, 48))
SECONDS = 120.0  # nothing here takes so long


def run(task: Coroutine[Any, Any, Result]) -> Result:
    async def limited() -> Result:
        return await asyncio.wait_for(task, SECONDS)

    return asyncio.run(limited())


async def until(holds: Callable[[], bool]) -> None:
    while not holds():
        await asyncio.sleep(0.001)


async def tokens_of(engine: AsyncLLM, prompt: list[int], **options: Any) -> list[int]:
    return (await engine.generate(prompt, params_of(**options))).token_ids


def sample_of(event: StreamEvent) -> int:
    return event.sample_index


@pytest.fixture
def serve(make_llm: MakeLLM) -> Callable[..., Any]:
    """Runs a coroutine with an AsyncLLM, after which nothing may be held."""

    def serve(
        use: Callable[[AsyncLLM], Awaitable[Result]], *, llm_options: Any = None, **options: Any
    ) -> Result:
        llm = make_llm(**(llm_options or {}))

        async def main() -> Result:
            async with AsyncLLM(llm, **options) as engine:
                result = await use(engine)
            assert not engine.num_requests
            assert not engine._running
            return result

        result = run(main())
        assert_nothing_is_held(llm)
        return result

    return serve


# -- what they get ------------------------------------------------------------------------------


def test_tasks_get_what_the_model_generates(serve, prompts, greedy):
    async def use(engine: AsyncLLM) -> list[list[int]]:
        return await asyncio.gather(*(tokens_of(engine, prompt) for prompt in prompts))

    assert serve(use) == greedy
    assert serve(use, max_requests=2) == greedy


def test_events_tell_of_every_token_of_every_sample(serve, make_llm, prompts):
    params = sampling(n=3, logprobs=2, prompt_logprobs=1)
    (expected,) = make_llm().generate([prompts[2]], params)

    async def use(engine: AsyncLLM) -> None:
        async with await engine.submit(prompts[2], params) as request:
            events = [event async for event in request]
        assert request.prompt_token_ids == prompts[2]
        assert request.params is params
        for index, completion in enumerate(expected.completions):
            mine = [event for event in events if event.sample_index == index]
            assert [event.token_id for event in mine] == completion.token_ids
            assert "".join(event.text for event in mine) == completion.text
            assert mine[-1].finish_reason == completion.finish_reason
        streamed = [event async for event in engine.stream(prompts[2], params)]
        assert sorted(streamed, key=sample_of) == sorted(events, key=sample_of)
        assert await engine.generate(prompts[2], params) == expected

    serve(use)


def test_best_of_keeps_the_likeliest(serve, make_llm, prompts):
    params = sampling(n=1, best_of=3)
    (expected,) = make_llm().generate([prompts[1]], params)
    assert serve(lambda engine: engine.generate(prompts[1], params)) == expected


def test_times_and_cached_tokens_are_told(serve, prompts):
    async def use(engine: AsyncLLM) -> None:
        async with await engine.submit(prompts[4], params_of()) as first:
            assert [event async for event in first]
        async with await engine.submit(prompts[4], params_of()) as second:
            assert [event async for event in second]
        assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 112)
        times = second.times
        stamps = [times.arrived, times.queued, times.started, times.first_token]
        stamps += [times.last_token, times.ended]
        assert None not in stamps
        assert sorted(stamps) == stamps
        assert times.num_output_tokens == 30

    serve(use)


def test_other_threads_may_use_the_llm_too(serve, prompts, greedy):
    async def use(engine: AsyncLLM) -> None:
        def in_a_thread() -> list[list[int]]:
            outputs = engine.llm.generate(prompts, params_of())
            return [output.token_ids for output in outputs]

        mine = [tokens_of(engine, prompt) for prompt in prompts]
        theirs = asyncio.to_thread(in_a_thread)
        assert await asyncio.gather(theirs, *mine) == [greedy, *greedy]

    serve(use)


# -- who waits ----------------------------------------------------------------------------------


def test_one_that_nobody_reads_waits_and_others_go_on(serve, monkeypatch, prompts):
    most = 16
    for module in (text_engine, async_request):
        monkeypatch.setattr(module, "MAX_WAITING", most)
    params = params_of(max_tokens=100)

    async def use(engine: AsyncLLM) -> None:
        expected = await tokens_of(engine, prompts[1], max_tokens=100)
        async with await engine.submit(prompts[1], params) as slow:
            (output,) = slow._feed.outputs
            await until(lambda: output.text.is_paused)
            assert len(await tokens_of(engine, prompts[0], max_tokens=30)) == 30
            assert most <= len(output.text.live.token_ids) <= most + 2
            assert [event.token_id async for event in slow] == expected

    serve(use)


def test_a_full_house_refuses_or_lets_wait_by_priority(serve, prompts):
    async def use(engine: AsyncLLM) -> None:
        order: list[int] = []

        async def waiting(priority: int) -> None:
            async with await engine.submit(prompts[0], params_of(), priority=priority) as request:
                order.append(priority)
                assert [event async for event in request]

        inside = [await engine.submit(prompts[0], params_of(max_tokens=400)) for _ in range(2)]
        with pytest.raises(QueueFullError, match="2 requests are there"):
            await engine.submit(prompts[0], params_of(), wait=False)
        tasks = [asyncio.create_task(waiting(priority)) for priority in (2, 0, 1, 0)]
        await asyncio.sleep(0)
        assert engine.num_requests == 2
        tasks[3].cancel()
        inside[0].abort()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert order == [0, 1, 2]
        inside[1].abort()
        assert [event async for event in inside[1]][-1].finish_reason == "abort"

    serve(use, max_requests=2)


def test_a_request_ends_when_its_time_is_over(serve, prompts):
    async def use(engine: AsyncLLM) -> None:
        async with await engine.submit(prompts[1], ENDLESS, timeout=0.1) as request:
            *events, last = [event async for event in request]
        assert last.finish_reason == "error"
        assert isinstance(last.error, RequestTimeoutError)
        assert str(last.error) == "the request was not over within its 0.1 seconds"
        assert all(event.token_id is not None for event in events)
        with pytest.raises(RequestTimeoutError, match="no place became free"):
            async with await engine.submit(prompts[1], ENDLESS):
                await engine.generate(prompts[0], params_of(), timeout=0.01)
        assert len(await tokens_of(engine, prompts[0])) == 30

    serve(use, max_requests=1)


def test_whoever_is_cancelled_as_it_gets_a_place_leaves_it():
    async def main() -> None:
        room = WaitingRoom(1)
        await room.enter(0, None, waits=True)
        second = asyncio.create_task(room.enter(0, None, waits=True))
        await asyncio.sleep(0)
        room.leave()
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        assert not room.is_full

    run(main())


def test_samples_take_a_place_each_and_nobody_passes_who_wants_more():
    async def main() -> None:
        room, order = WaitingRoom(3), []

        async def enter(num_places: int, priority: int = 0) -> None:
            await room.enter(priority, None, waits=True, num_places=num_places)
            order.append(num_places)

        await enter(2)
        with pytest.raises(QueueFullError, match="2 requests are there, of 3 at once, and 2 more"):
            await room.enter(0, None, waits=False, num_places=2)
        tasks = [asyncio.create_task(enter(count)) for count in (2, 1, 9)]  # 9: all three
        await asyncio.sleep(0)
        assert order == [2]
        with pytest.raises(QueueFullError):
            await room.enter(0, None, waits=False)  # one is free, but others came before
        await enter(1, priority=-1)
        room.leave(2)
        await asyncio.sleep(0)
        assert order == [2, 1, 2]
        room.leave(2)
        await asyncio.sleep(0)
        assert order == [2, 1, 2, 1]
        assert not room.is_full
        room.leave(1)
        room.leave(1)
        await asyncio.gather(*tasks)
        assert order == [2, 1, 2, 1, 9]
        assert room.is_full
        room.leave(9)
        tasks = [asyncio.create_task(enter(count)) for count in (2, 2, 1)]
        await asyncio.sleep(0)
        tasks[1].cancel()  # whoever waited behind it may come in
        await asyncio.sleep(0)
        await tasks[2]
        assert room.is_full

    run(main())


# -- what goes wrong ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "options", "error", "message"),
    [
        ([], {}, InvalidRequestError, "the prompt is empty"),
        ([1] * 600, {}, PromptTooLongError, "600"),
        ([-1], {}, InvalidRequestError, "-1"),
        ([1], {"params": 3}, ConfigError, "params must be SamplingParams, got 3"),
        ([1], {"priority": 0.5}, ConfigError, "priority must be an integer, got 0.5"),
        ([1], {"timeout": 0}, ConfigError, "timeout must be None or a number of seconds"),
        ([1], {"timeout": float("nan")}, ConfigError, "timeout must be None or a number"),
    ],
)
def test_bad_input_is_refused_before_it_is_queued(serve, prompt, options, error, message):
    async def use(engine: AsyncLLM) -> None:
        with pytest.raises(error, match=message):
            await engine.submit(prompt, **options)
        assert not engine.num_requests
        assert not engine._room._num_inside

    serve(use)


def test_its_size_is_checked(make_llm):
    with pytest.raises(ConfigError, match="max_requests must be an integer of at least 1, got 0"):
        AsyncLLM(make_llm(), max_requests=0)


def test_what_the_engine_refuses_late_is_raised(serve, monkeypatch, prompts):
    async def use(engine: AsyncLLM) -> None:
        error = InvalidRequestError("too late")
        monkeypatch.setattr(Engine, "add_request", raise_once(Engine.add_request, 1, error))
        with pytest.raises(InvalidRequestError, match="too late"):
            await engine.submit(prompts[0], params_of())
        await until(lambda: not engine.num_requests)
        assert len(await tokens_of(engine, prompts[0])) == 30

    serve(use)


def test_a_step_that_fails_ends_its_requests_and_others_go_on(serve, monkeypatch, prompts, greedy):
    async def use(engine: AsyncLLM) -> None:
        runner = engine.llm.engine.runner
        hit = [asyncio.create_task(tokens_of(engine, prompt)) for prompt in prompts[:2]]
        await until(lambda: engine.num_requests == 2)
        monkeypatch.setattr(runner, "run", raise_once(runner.run, 5, RuntimeError("a device")))
        for task in hit:
            with pytest.raises(GenerationError, match="the step failed: RuntimeError") as caught:
                await task
            assert isinstance(caught.value.__cause__, StepFailedError)
        assert await tokens_of(engine, prompts[2]) == greedy[2]

    serve(use)


def test_a_fault_of_nobody_is_tried_again(serve, monkeypatch, prompts, greedy):
    """The scheduler fails, once; and then again and again, which ends all."""

    async def use(engine: AsyncLLM) -> None:
        scheduler = engine.llm.engine.scheduler
        schedule = scheduler.schedule
        monkeypatch.setattr(scheduler, "schedule", raise_once(schedule, 5, MemoryError()))
        assert await tokens_of(engine, prompts[2]) == greedy[2]
        calls = []

        def fail(*arguments: Any) -> Any:
            calls.append(arguments)
            if len(calls) > 2 * MOST_FAULTS:
                return schedule(*arguments)
            raise MemoryError

        monkeypatch.setattr(scheduler, "schedule", fail)
        with pytest.raises(GenerationError, match="the step failed: MemoryError"):
            await tokens_of(engine, prompts[2])
        await until(lambda: len(calls) > 2 * MOST_FAULTS)
        assert await tokens_of(engine, prompts[2]) == greedy[2]

    serve(use)


def test_orders_that_fail_are_tried_again(serve, monkeypatch, prompts):
    async def use(engine: AsyncLLM) -> None:
        request = await engine.submit(prompts[1], ENDLESS)
        inner = engine.llm.engine
        abort_all = raise_once(inner.abort_all, 1, MemoryError())
        monkeypatch.setattr(inner, "abort_all", abort_all)
        request.abort()
        assert [event async for event in request][-1].finish_reason == "abort"

    serve(use)


def test_a_listener_hears_of_all_and_its_errors_disturb_nobody(serve, prompts, greedy, caplog):
    class Listener:
        def __init__(self) -> None:
            self.num_tokens, self.num_steps, self.ends = 0, 0, []

        def tokens_came(self, request: Feed, num_tokens: int, now: float) -> None:
            self.num_tokens += num_tokens
            raise ValueError("a listener's own")

        def request_ended(self, request: Feed, finish_reason: str, now: float) -> None:
            self.ends.append(finish_reason)

        def step_done(self, llm: object) -> None:
            self.num_steps += 1
            assert threading.current_thread().name == "paged_kv engine"

    listener = Listener()

    async def use(engine: AsyncLLM) -> list[list[int]]:
        return await asyncio.gather(*(tokens_of(engine, prompt) for prompt in prompts))

    assert serve(use, listener=listener) == greedy
    assert listener.num_tokens == sum(map(len, greedy))
    assert listener.ends == ["length"] * len(prompts)
    assert listener.num_steps > 30
    assert "a listener of requests failed" in caplog.text


def test_a_listener_hears_when_a_request_of_one_step_began(serve, prompts):
    class Listener:
        def tokens_came(self, request: Feed, num_tokens: int, now: float) -> None:
            self.heard = replace(request.times)

        def request_ended(self, request: Feed, finish_reason: str, now: float) -> None:
            pass

        def step_done(self, llm: object) -> None:
            pass

    listener = Listener()

    async def use(engine: AsyncLLM) -> None:
        await engine.generate(prompts[1], params_of(max_tokens=1))

    serve(use, listener=listener)
    times = listener.heard
    assert times.arrived <= times.queued <= times.started <= times.first_token


# -- how it ends --------------------------------------------------------------------------------


def test_what_was_accepted_is_finished_when_it_drains(serve, prompts, greedy):
    async def use(engine: AsyncLLM) -> None:
        accepted = [await engine.submit(prompt, params_of()) for prompt in prompts[:3]]
        outside = asyncio.create_task(engine.submit(prompts[3], params_of()))
        await asyncio.sleep(0)
        draining = asyncio.create_task(engine.drain())
        with pytest.raises(ClosedError, match="no more requests are taken"):
            await outside
        assert engine.num_requests == 3

        async def read(request: Any) -> list[int]:
            async with request:
                return [event.token_id async for event in request]

        tasks = [asyncio.create_task(read(request)) for request in accepted]
        await draining
        assert not engine.is_accepting
        assert await asyncio.gather(*tasks) == greedy[:3]
        with pytest.raises(ClosedError, match="no more requests are taken"):
            await engine.submit(prompts[0], params_of())

    serve(use, max_requests=3)


def test_what_takes_too_long_to_drain_ends_with_an_error(serve, prompts):
    async def use(engine: AsyncLLM) -> None:
        request = await engine.submit(prompts[1], ENDLESS)
        await engine.drain(timeout=0.01)
        last = [event async for event in request][-1]
        assert isinstance(last.error, ClosedError)
        await engine.close()

    serve(use)


@pytest.mark.parametrize("timeout", [float("nan"), -1, "1"])
def test_a_time_to_drain_that_cannot_be_is_refused(serve, prompts, greedy, timeout):
    async def use(engine: AsyncLLM) -> None:
        with pytest.raises(ConfigError, match="timeout must be None or a number of seconds"):
            await engine.drain(timeout)
        assert await tokens_of(engine, prompts[0]) == greedy[0]

    serve(use)


def test_a_request_that_is_dropped_ends(serve, prompts):
    async def use(engine: AsyncLLM) -> None:
        request = await engine.submit(prompts[1], ENDLESS)
        holder = [request]
        del request
        with pytest.warns(ResourceWarning, match="dropped"):
            holder.clear()
        await until(lambda: not engine.num_requests)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            async for _ in engine.stream(prompts[1], ENDLESS):
                break
            gc.collect()
            await until(lambda: not engine.num_requests)

    serve(use)


def test_requests_of_a_loop_that_is_gone_end(make_llm, prompts):
    llm = make_llm()
    engine = AsyncLLM(llm)
    loop = asyncio.new_event_loop()
    request = loop.run_until_complete(engine.submit(prompts[1], ENDLESS))
    loop.close()
    holder = [request]
    del request
    with pytest.warns(ResourceWarning, match="dropped"):
        holder.clear()
    give_up = time.monotonic() + SECONDS
    while engine._running and time.monotonic() < give_up:
        time.sleep(0.01)
    assert not engine._running
    assert not llm.engine.has_unfinished
    engine.thread.stop()
    with pytest.raises(ConfigError, match="another"):
        run(engine.submit(prompts[1]))


@pytest.mark.parametrize("max_requests", [1, 256])
def test_cancelling_anywhere_leaves_nothing(serve, prompts, greedy, max_requests):
    """Tasks are cancelled after so many turns of the event loop, in whatever they wait for."""

    async def read(engine: AsyncLLM) -> list[int | None]:
        params = replace(ENDLESS, n=2, temperature=1.0)
        async with await engine.submit(prompts[2], params) as request:
            return [event.token_id async for event in request]

    async def use(engine: AsyncLLM) -> None:
        rng = random.Random(0)
        for turns in (*range(12), *(rng.randrange(12, 200) for _ in range(12))):
            tasks = [asyncio.create_task(read(engine)) for _ in range(2)]
            for _ in range(turns):
                await asyncio.sleep(rng.choice((0, 0, 0.0005)))
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await until(lambda: not engine._room._num_inside)
        assert await tokens_of(engine, prompts[2]) == greedy[2]
        assert not engine.llm.requests

    serve(use, max_requests=max_requests)


def test_random_traffic(serve, prompts, greedy):
    """Readers, slow ones, ones that leave, time limits and aborts: whoever ends well is right."""

    async def one(engine: AsyncLLM, seed: int) -> str:
        rng = random.Random(seed)
        index, kind = rng.randrange(len(prompts)), rng.choice("rrrsatc")
        await asyncio.sleep(rng.random() * 0.3)
        timeout = rng.random() * 0.1 + 1e-3 if kind == "t" else None
        events: list[StreamEvent] = []
        try:
            async with await engine.submit(prompts[index], params_of(), timeout=timeout) as request:
                async for event in request:
                    events.append(event)
                    if kind == "s":
                        await asyncio.sleep(rng.random() * 0.005)
                    if kind in "ac" and rng.random() < 0.1:
                        if kind == "c":
                            return "left"
                        request.abort()
        except RequestTimeoutError:
            return "late"
        tokens = [event.token_id for event in events if event.token_id is not None]
        assert tokens == greedy[index][: len(tokens)]
        if events[-1].finish_reason == "length":
            assert tokens == greedy[index]
        return str(events[-1].finish_reason)

    async def use(engine: AsyncLLM) -> list[str]:
        return await asyncio.gather(*(one(engine, seed) for seed in range(60)))

    ends = serve(use, max_requests=12, llm_options={"num_blocks": 40})
    assert {"length", "left"} <= set(ends)


def test_the_example_of_the_docs_runs(capsys):
    text = (Path(__file__).parents[2] / "docs" / "async.md").read_text()
    example = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert example is not None
    exec(example[1].replace("path/to/model", str(MODEL_FOLDER)), {})
    assert len(capsys.readouterr().out) > 100
