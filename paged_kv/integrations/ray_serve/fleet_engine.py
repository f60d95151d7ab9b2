"""Requests to whichever replica: asked again elsewhere, from where they were, when one is lost.

Knows orders and replies, never how they travel.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
from collections import deque
from collections.abc import AsyncGenerator, Awaitable
from dataclasses import replace
from types import TracebackType
from typing import Final, Protocol, TypeVar

from ...engine.live_request import GivenTokens
from ...engine.sampling_params import SamplingParams
from ...engine.text import Prompt, encode_prompt
from ...entrypoints.async_llm import timed_out
from ...entrypoints.outputs import StreamEvent
from ...entrypoints.server.refusal import Refusal
from ...entrypoints.waiting_room import WaitingRoom
from ...errors import ClosedError, StepFailedError
from .fleet import Fleet
from .fleet_figures import FleetFigures
from .model_card import ModelCard
from .order import Order, ReplicaLostError, Reply
from .session import session_key

# What a replica may tell of a request that another one may well serve.
OF_THE_REPLICA: Final = (ReplicaLostError, ClosedError, StepFailedError)
WAIT_SECONDS: Final = 0.05  # before the first further attempt, and twice as long before each other
Result = TypeVar("Result")
log: Final = logging.getLogger(__name__)


class Calls(Protocol):
    """How orders get to replicas."""

    def send(self, order: Order) -> AsyncGenerator[Reply, None]:
        """The replies to an order, which ends with this generator. Raises `ReplicaLostError`."""


class FleetEngine:
    """Takes requests as an `AsyncLLM` does, and has replicas compute them."""

    def __init__(
        self,
        calls: Calls,
        fleet: Fleet,
        card: ModelCard,
        *,
        max_requests: int,
        max_attempts: int,
    ) -> None:
        self.calls = calls
        self.fleet = fleet
        self.card = card
        self.max_attempts = max_attempts
        self.figures: Final = FleetFigures()
        self.room: Final = WaitingRoom(max_requests)
        self.numbers: Final = itertools.count(1)  # of orders
        self.is_accepting: bool = True
        self.failure: None = None  # replicas may fail: others come for them

    async def submit(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        priority: int = 0,
        timeout: float | None = None,
        wait: bool = True,
    ) -> FleetRequest:
        """Queue a request with a replica, which has accepted it when this returns.

        Raises what the replica refuses it for, `QueueFullError` where `max_requests` are there and
        it is not to `wait`, and a `Refusal` with status 503 when `max_attempts` replicas were lost.
        """
        loop = asyncio.get_running_loop()
        deadline = None if timeout is None else loop.time() + timeout
        num_places = params.num_samples
        await self.room.enter(priority, deadline, waits=wait, num_places=num_places)
        request: FleetRequest | None = None
        try:
            most = self.card.max_prompt_tokens(params)
            token_ids = await asyncio.to_thread(encode_prompt, prompt, self.card.tokenizer, most)
            order = Order(
                number=0,
                prompt_token_ids=token_ids,
                params=self._drawn(params),
                priority=priority,
                known={},
                blocks=None,
                session=session_key.get(),
            )
            request = FleetRequest(self, order, timeout, deadline)
            await request.begin()
        except BaseException:
            if request is None:
                self.room.leave(num_places)
            else:
                await request.close()
            raise
        return request

    def _drawn(self, params: SamplingParams) -> SamplingParams:
        """With a seed, by which other replicas draw what this one would have drawn."""
        if params.seed is not None or self.card.completed(params).is_greedy:
            return params
        return replace(params, seed=secrets.randbits(64))


class FleetRequest:
    """A request that was accepted: `async for` gives its events, wherever they come from."""

    def __init__(
        self, engine: FleetEngine, order: Order, timeout: float | None, deadline: float | None
    ) -> None:
        self.prompt_token_ids: list[int] = order.prompt_token_ids
        self.params: SamplingParams = order.params
        self.num_cached_tokens: int = 0
        self._engine = engine
        self._order = order
        self._timeout = timeout
        self._deadline = deadline
        self._given: dict[int, list[int]] = {i: [] for i in range(order.params.num_samples)}
        self._events: deque[StreamEvent] = deque()
        self._replies: AsyncGenerator[Reply, None] | None = None
        self._replica: str | None = None
        self._num_attempts = 0
        self._has_answer = False  # any event
        self._is_closed = False

    async def begin(self) -> None:
        """Have it accepted by a replica: by the next one, where one is lost."""
        while True:
            try:
                await self._attempt()
                return
            except OF_THE_REPLICA as error:
                await self._prepare_again(error)

    async def _attempt(self) -> None:
        """Send what is left of it, and read whether it was accepted."""
        engine, self._num_attempts = self._engine, self._num_attempts + 1
        given = self._given if self._has_answer else None
        begun = next(iter(self._given.values())) if given else []
        self._order = replace(
            self._order,
            number=next(engine.numbers),
            given=given and copied(given),
            known=engine.fleet.known,
            blocks=engine.card.blocks_of([*self.prompt_token_ids, *begun], self.params),
        )
        self._replies = engine.calls.send(self._order)
        reply = await self._next_reply()
        if reply.refusal is not None:
            raise reply.refusal
        engine.figures.accepted(reply.replica)

    async def _prepare_again(self, error: Exception) -> None:
        """End the attempt that failed; raises where it was the last."""
        engine = self._engine
        if self._replica is not None:
            self._order = replace(self._order, failed_on=self._order.failed_on | {self._replica})
            if isinstance(error, ReplicaLostError):
                engine.fleet.forget(self._replica)
            engine.fleet.failed(self._replica)
        await self._end_attempt()
        engine.figures.lost(is_last=self._num_attempts >= engine.max_attempts)
        log.warning("attempt %d of a request failed: %s", self._num_attempts, error)
        if self._num_attempts >= engine.max_attempts:
            raise Refusal(
                f"{self._num_attempts} replicas were lost: {error}", 503, code="replica_lost"
            ) from error
        await self._in_time(asyncio.sleep(WAIT_SECONDS * 2 ** (self._num_attempts - 1)))

    async def _next_reply(self) -> Reply:
        assert self._replies is not None, "it was sent"
        try:
            reply = await self._in_time(anext(self._replies))
        except StopAsyncIteration:
            raise ReplicaLostError("the replica ended before the request") from None
        self._replica = reply.replica
        if reply.changes is not None:
            self._engine.fleet.learn(reply.replica, reply.changes)
        return reply

    async def _in_time(self, work: Awaitable[Result]) -> Result:
        if self._deadline is None:
            return await work
        left = max(self._deadline - asyncio.get_running_loop().time(), 0.0)
        try:
            return await asyncio.wait_for(work, left)
        except asyncio.TimeoutError:
            raise timed_out(self._timeout) from None

    async def _read(self) -> None:
        """Take the next events, or go on with another replica."""
        try:
            reply = await self._next_reply()
            if reply.events and not self._has_answer:
                self.num_cached_tokens = reply.num_cached_tokens
                self._engine.figures.began(reply, len(self.prompt_token_ids))
            if reply.events:
                self._engine.fleet.begin(self._order.number)
            for event in reply.events:
                if isinstance(event.error, OF_THE_REPLICA):
                    raise event.error
                self._take(event)
        except OF_THE_REPLICA as error:
            await self._prepare_again(error)
            await self.begin()

    def _take(self, event: StreamEvent) -> None:
        self._has_answer = True
        if event.token_id is not None:
            self._given[event.sample_index].append(event.token_id)
            self._engine.figures.num_output_tokens += 1
        if event.finish_reason is not None:
            del self._given[event.sample_index]
        self._events.append(event)

    async def _end_attempt(self) -> None:
        replies, self._replies = self._replies, None
        self._replica = None
        self._engine.fleet.end(self._order.number)
        if replies is not None:
            await replies.aclose()

    async def close(self) -> None:
        """End what is not over of it, wherever that is. Can be called again."""
        if not self._is_closed:
            self._is_closed = True
            try:
                await self._end_attempt()
            finally:
                self._engine.room.leave(self.params.num_samples)

    def __aiter__(self) -> FleetRequest:
        return self

    async def __anext__(self) -> StreamEvent:
        while not self._events:
            if not self._given:
                raise StopAsyncIteration
            await self._read()
        return self._events.popleft()

    async def __aenter__(self) -> FleetRequest:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()


def copied(given: GivenTokens) -> dict[int, list[int]]:
    return {index: list(tokens) for index, tokens in given.items()}
