"""An `LLM` for asyncio: many tasks ask, one thread steps the engine.

Knows tasks and requests, never what a step computes.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from functools import partial
from types import TracebackType
from typing import Final, Protocol

from ..engine.handover import Departure, Handover, PrefilledPrompt
from ..engine.live_request import GivenTokens
from ..engine.sampling_params import SamplingParams
from ..engine.text import Prompt
from ..errors import (
    ClosedError,
    ConfigError,
    RequestTimeoutError,
    StepFailedError,
)
from ..validation import is_finite, is_integer, require
from .async_request import AsyncRequest, Feed, RequestTimes
from .engine_thread import EngineThread
from .llm import LLM, raise_failures
from .outputs import OutputAssembler, RequestOutput, StreamEvent
from .waiting_room import WaitingRoom

logger: Final = logging.getLogger(__name__)


class Listener(Protocol):
    """Who wants to know what happens; called by the engine's thread, which waits for it.

    What it raises is logged and disturbs nobody.
    """

    def tokens_came(self, request: Feed, num_tokens: int, now: float) -> None:
        """A request has so many more tokens, of one of its samples, at this `time.monotonic`."""

    def request_ended(self, request: Feed, finish_reason: str, now: float) -> None:
        """A sample is over: "stop", "length", "error" or "abort"."""

    def step_done(self, llm: LLM) -> None:
        """The engine has made a step, or found nothing to do."""


class AsyncLLM:
    """Requests of the tasks of one event loop, decoded together on one `LLM` by its own thread.

    At most `max_requests` are accepted at once, of which each sample is one; others wait before
    they are looked at, or are refused. A request whose events nobody takes waits, and others go on.
    Cancelling a task ends its requests. An exception of a step ends the requests of that step, and
    the engine goes on. The `llm` stays its owner's, who may use it in other threads too and closes
    it afterwards.
    """

    def __init__(
        self, llm: LLM, *, max_requests: int = 256, listener: Listener | None = None
    ) -> None:
        is_count = is_integer(max_requests) and max_requests >= 1
        require("max_requests", max_requests, is_count, "an integer of at least 1")
        self.llm = llm
        self.listener = listener
        self._room = WaitingRoom(max_requests)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_accepting = True
        self._feeds: set[Feed] = set()  # of requests that were accepted and are not over
        self._idle = asyncio.Event()  # whether there are none
        self._idle.set()
        # The engine's thread has its own list of them, and which have something for their tasks.
        self._running: dict[Feed, None] = {}
        self._changed: deque[Feed] = deque()
        self._step_begins = time.monotonic()
        self.thread: Final = EngineThread(llm.requests, self._after_step, self._on_fault)

    @property
    def num_requests(self) -> int:
        """Requests that were accepted and are not over."""
        return len(self._feeds)

    @property
    def is_accepting(self) -> bool:
        """Whether it takes requests: until `drain`, `close` or a `failure`."""
        return self._is_accepting and self.failure is None

    @property
    def failure(self) -> str | None:
        """Why the engine can compute no more and has to be made anew; None while it can.

        That is so where a process of tensor parallelism has died.
        """
        return self.llm.engine.runner.failure

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def drain(self, timeout: float | None = None) -> None:
        """Take no more requests, and return when those that were accepted are over.

        After `timeout` seconds what is left ends with a `ClosedError`. Raises `ConfigError` for a
        time that cannot be.
        """
        is_time = timeout is None or (is_finite(timeout) and timeout >= 0)
        require("timeout", timeout, is_time, "None or a number of seconds from 0 on")
        self._is_accepting = False
        self._room.dismiss(ClosedError("no more requests are taken"))
        try:
            await asyncio.wait_for(self._idle.wait(), timeout)
        except asyncio.TimeoutError:
            error = ClosedError("ended before it was over: the engine is being closed")
            for feed in self._feeds:
                feed.order_end(error)
            await self._idle.wait()

    async def close(self) -> None:
        """End what is not over, and the engine's thread. Can be called again."""
        await self.drain(timeout=0)
        await asyncio.to_thread(self.thread.stop)

    async def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        timeout: float | None = None,
        wait: bool = True,
        given: GivenTokens | None = None,
    ) -> AsyncRequest:
        """Queue a request: it was checked and accepted when this returns.

        `timeout` is the seconds that it may take from now on, waiting included; then its samples
        end with a `RequestTimeoutError`, or this call with it. With `given` samples go on that
        another engine has begun: by the index of each that is not over, the tokens that it has,
        which have no events here. Raises what `LLM.check` raises for what cannot be served,
        `QueueFullError` where `max_requests` are there and it is not to `wait`, and `ClosedError`
        after `drain` and a `failure`.
        """
        handover = prompt if isinstance(prompt, PrefilledPrompt) else None
        return await self._submit(prompt, params, handover, given, priority, timeout, waits=wait)

    async def _submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        handover: Handover | None,
        given: GivenTokens | None,
        priority: int,
        timeout: float | None,
        *,
        waits: bool,
    ) -> AsyncRequest:
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise ConfigError(f"params must be SamplingParams, got {params!r}")
        require("priority", priority, is_integer(priority), "an integer")
        is_time = timeout is None or (is_finite(timeout) and timeout > 0)
        require("timeout", timeout, is_time, "None or a number of seconds above 0")
        loop, times = self._enter_loop(), RequestTimes(arrived=time.monotonic())
        deadline = None if timeout is None else loop.time() + timeout
        self._check_is_accepting()
        num_places = params.num_samples
        await self._room.enter(priority, deadline, waits=waits, num_places=num_places)
        try:
            departure = handover if isinstance(handover, Departure) else None
            token_ids = await asyncio.to_thread(self.llm.check, prompt, params, priority, departure)
            self._check_is_accepting()
            feed = Feed(self, token_ids, params, times, given)
            feed.handover = handover
        except BaseException:
            self._room.leave(num_places)
            raise
        self._feeds.add(feed)
        self._idle.clear()
        try:
            if deadline is not None:
                feed.timer = loop.call_at(deadline, feed.order_end, timed_out(timeout))
            queued = loop.create_future()
            self.thread.order(partial(self._add, feed, priority, queued))
            await queued
        except BaseException:
            feed.order_end()
            raise
        return AsyncRequest(feed)

    async def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        timeout: float | None = None,
    ) -> AsyncGenerator[StreamEvent, None]:
        """The events of one prompt as they come; closing this generator ends what is left."""
        async with await self.submit(prompt, params, priority=priority, timeout=timeout) as request:
            async for event in request:
                yield event

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        timeout: float | None = None,
    ) -> RequestOutput:
        """Continue one prompt; raises `GenerationError` if that fails, as `LLM.generate` does."""
        return await collect(
            prompt, await self.submit(prompt, params, priority=priority, timeout=timeout)
        )

    async def prefill(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        timeout: float | None = None,
    ) -> bytes:
        """Compute a prompt and its first token, to go on with elsewhere, as `LLM.prefill` does."""
        departure = Departure()
        request = await self._submit(prompt, params, departure, None, priority, timeout, waits=True)
        await collect(prompt, request)
        return departure.taken()

    def _enter_loop(self) -> asyncio.AbstractEventLoop:
        loop = asyncio.get_running_loop()
        if self._loop is not None and self._loop is not loop:
            raise ConfigError("an AsyncLLM serves the tasks of one event loop, this is another")
        self._loop = loop
        return loop

    def _check_is_accepting(self) -> None:
        if not self._is_accepting:
            raise ClosedError("no more requests are taken")
        if self.failure is not None:
            raise ClosedError(self.failure)

    def _deliver(self, feeds: list[Feed]) -> None:
        """Wake the tasks of requests that have something for them."""
        for feed in feeds:
            feed.wake()
            if not feed.num_running and feed in self._feeds:
                self._feeds.remove(feed)
                feed.close()
                self._room.leave(feed.params.num_samples)
        if not self._feeds:
            self._idle.set()

    # -- on the engine's thread -----------------------------------------------------------------

    def _add(self, feed: Feed, priority: int, queued: asyncio.Future[None]) -> None:
        requests, error = self.llm.requests, None
        try:
            feed.outputs = requests.add(
                requests.new_ids(feed.num_running),
                feed.prompt_token_ids,
                feed.params,
                feed.tell,
                priority=priority,
                given=feed.given,
                handover=feed.handover,
            )
            feed.handover = None  # what it brings is large, and the engine has it
            feed.times.queued = time.monotonic()
            self._running[feed] = None
        except Exception as failure:
            feed.num_running, error = 0, failure
            self._changed.append(feed)
        self._post(settle, queued, error)

    def note(self, feed: Feed, num_tokens: int, finish_reason: str | None, now: float) -> None:
        """A request has more, and one of its samples may be over."""
        self._changed.append(feed)
        self._note_start(feed)
        if num_tokens:
            self._tell(lambda listener: listener.tokens_came(feed, num_tokens, now))
        if finish_reason is not None:
            feed.num_running -= 1
            feed.times.ended = None if feed.num_running else now
            self._tell(lambda listener: listener.request_ended(feed, finish_reason, now))

    def _note_start(self, feed: Feed) -> None:
        """The step that is over, or ends, may have been the first of a request."""
        times, began = feed.times, self._step_begins
        if times.started is None and feed.num_hit_tokens is not None:
            times.started = max(began, times.queued or began)

    def _after_step(self) -> None:
        for feed in list(self._running):
            self._note_start(feed)
            if not feed.num_running:
                del self._running[feed]
        self._step_begins = time.monotonic()
        changed: dict[Feed, None] = {}
        while self._changed:
            changed[self._changed.popleft()] = None
        if changed:
            self._post(self._deliver, list(changed))
        self._tell(lambda listener: listener.step_done(self.llm))

    def _on_fault(self, error: BaseException) -> None:
        """A step failed, again and again, and nobody knows for which request."""
        failure = StepFailedError(f"the step failed: {error!r}")
        failure.__cause__ = error
        for feed in list(self._running):
            feed.stop(failure)

    def _tell(self, what: Callable[[Listener], None]) -> None:
        if self.listener is None:
            return
        try:
            what(self.listener)
        except Exception:
            logger.exception("a listener of requests failed")

    def _post(self, what: Callable[..., None], *arguments: object) -> None:
        """Have it done by the event loop; without one nobody waits for anything any more."""
        assert self._loop is not None, "requests come from its tasks"
        try:
            self._loop.call_soon_threadsafe(what, *arguments)
        except RuntimeError:  # it is closed
            self.llm.requests.let_go([name for feed in self._running for name in feed.request_ids])
            self._running.clear()


async def collect(prompt: Prompt, request: AsyncRequest) -> RequestOutput:
    """All that becomes of a request; raises `GenerationError` if that is a failure."""
    async with request:
        assembler = OutputAssembler([prompt], [request.prompt_token_ids], [request.params])
        async for event in request:
            assembler.add(event)
    raise_failures(assembler.outputs)
    return assembler.outputs[0]


def settle(queued: asyncio.Future[None], error: Exception | None) -> None:
    if queued.done():  # whoever asked was cancelled
        return
    if error is None:
        queued.set_result(None)
    else:
        queued.set_exception(error)


def timed_out(seconds: float | None) -> RequestTimeoutError:
    return RequestTimeoutError(f"the request was not over within its {seconds:g} seconds")
