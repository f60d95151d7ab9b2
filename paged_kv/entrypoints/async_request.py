"""One request between the thread that steps the engine and the task that waits for its tokens.

Knows events and times, never how requests are queued.
"""

from __future__ import annotations

import asyncio
import time
import warnings
from collections import deque
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING

from ..engine.handover import Handover
from ..engine.live_request import GivenTokens, samples_left
from ..engine.sampling_params import SamplingParams
from ..errors import PagedKVError
from .outputs import StreamEvent
from .text_engine import MAX_WAITING, Output

if TYPE_CHECKING:
    from .async_llm import AsyncLLM


@dataclass(kw_only=True)
class RequestTimes:
    """When what happened to a request, in seconds of `time.monotonic`; None: not yet."""

    arrived: float
    queued: float | None = None  # after it was checked
    started: float | None = None  # the step in which it got blocks
    first_token: float | None = None
    last_token: float | None = None
    ended: float | None = None
    num_output_tokens: int = 0  # of all samples


class Feed:
    """What the engine's thread has for a task, and what the task has taken of it."""

    def __init__(
        self,
        owner: AsyncLLM,
        prompt_token_ids: list[int],
        params: SamplingParams,
        times: RequestTimes,
        given: GivenTokens | None = None,
    ) -> None:
        self.prompt_token_ids = prompt_token_ids
        self.params = params
        self.times = times
        self.given = given
        indices = samples_left(params.num_samples, given)
        self.handover: Handover | None = None  # until it is queued
        self.outputs: list[Output] = []  # one for each sample, when it is queued
        # Samples that are not over, for the engine's thread.
        self.num_running: int = len(indices)
        self.timer: asyncio.TimerHandle | None = None  # of its timeout
        self.is_over: bool = False  # for the event loop
        self._owner = owner
        # Tokens of each sample that were counted.
        self.num_tokens: dict[int, int] = {i: len(given[i]) if given else 0 for i in indices}
        self._end_error: PagedKVError | None = None  # why it was ended, where that is an error
        self._num_untaken = len(indices)  # whose end was not taken
        self._ready: deque[Output] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._is_resuming = False

    @property
    def num_cached_tokens(self) -> int:
        """Of the prompt, found in the prefix cache; known with the first token."""
        return self.num_hit_tokens or 0

    # -- on the engine's thread -----------------------------------------------------------------

    def tell(self, output: Output) -> None:
        """An output has more, or is over."""
        self._ready.append(output)
        now, live, index = time.monotonic(), output.text.live, output.sample_index
        num_new = len(live.token_ids) - self.num_tokens[index]
        self.num_tokens[index] += num_new
        if num_new:
            self.times.num_output_tokens += num_new
            self.times.first_token = self.times.first_token or now
            self.times.last_token = now
        newest, reason = output.text.newest, None
        if output.text.is_over and self._owner.llm.requests.forget(live.request_id):
            assert newest is not None, "its end has just been read"
            reason = self._end_of(newest.finish_reason)
        self._owner.note(self, num_new, reason, now)

    @property
    def num_hit_tokens(self) -> int | None:
        """Of its prompt, found in the prefix cache; None before it starts."""
        found = (output.text.live.request.num_hit_tokens for output in self.outputs)
        return next((number for number in found if number is not None), None)

    @property
    def request_ids(self) -> list[str]:
        return [output.text.live.request_id for output in self.outputs]

    def stop(self, error: PagedKVError | None = None) -> None:
        """End what is not over: with an error, or as aborted."""
        self._end_error = self._end_error or error
        self._owner.llm.engine.abort_all(self.request_ids)

    def _end_of(self, finish_reason: str | None) -> str | None:
        """How a sample has ended: what was aborted with an error has that error."""
        is_error = finish_reason == "abort" and self._end_error is not None
        return "error" if is_error else finish_reason

    def resume(self) -> None:
        """Go on with samples of which most was taken."""
        for output in self.outputs:
            if output.text.is_paused:
                self._owner.llm.requests.resume(output.text)
        self._is_resuming = False

    # -- on the event loop ----------------------------------------------------------------------

    def order_end(self, error: PagedKVError | None = None) -> None:
        """Have the engine's thread end what is not over. Any thread may call this."""
        self._owner.thread.order(partial(self.stop, error))

    @property
    def has_more(self) -> bool:
        """Whether it is not over, or its end was not taken."""
        return self._num_untaken > 0 and not self.is_over

    def close(self) -> None:
        """Nothing more comes."""
        self.is_over = True
        if self.timer is not None:
            self.timer.cancel()

    def wake(self) -> None:
        """There is something to take for the task that waits."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def next(self) -> StreamEvent:
        """The oldest event that was not taken; raises `StopAsyncIteration` behind the last."""
        while True:
            event = self.take()
            if event is not None:
                return event
            if not self._num_untaken:
                raise StopAsyncIteration
            if self._waiter is not None and not self._waiter.done():
                raise RuntimeError("another task waits for the events of this request")
            self._waiter = asyncio.get_running_loop().create_future()
            if not self._ready:  # else it came before anybody waited
                await self._waiter

    def take(self) -> StreamEvent | None:
        """The oldest event that was not taken; None where there is none yet."""
        while self._ready:
            output = self._ready[0]
            update = output.text.take()
            if output.text.is_paused and output.text.num_waiting <= MAX_WAITING // 2:
                self._ask_to_resume()
            if update is None:
                self._ready.popleft()
                continue
            event = output.event(update)
            reason = self._end_of(event.finish_reason)
            if reason != event.finish_reason:
                event = replace(event, finish_reason=reason, error=self._end_error)
            self._num_untaken -= event.finish_reason is not None
            return event
        return None

    def _ask_to_resume(self) -> None:
        if not self._is_resuming:
            self._is_resuming = True
            self._owner.thread.order(self.resume)


class AsyncRequest:
    """A request that was accepted: `async for` gives its events, of all samples, as they come.

    Within `async with`; leaving that ends what is not over. One task at a time may iterate; when
    it takes no events for long, the request waits, and others go on.
    """

    def __init__(self, feed: Feed) -> None:
        self._feed = feed
        self._is_aborted = False

    @property
    def prompt_token_ids(self) -> list[int]:
        return self._feed.prompt_token_ids

    @property
    def params(self) -> SamplingParams:
        return self._feed.params

    @property
    def times(self) -> RequestTimes:
        return self._feed.times

    @property
    def num_cached_tokens(self) -> int:
        """Of the prompt, found in the prefix cache; known with the first token."""
        return self._feed.num_cached_tokens

    def take_ready(self) -> list[StreamEvent]:
        """The events that have come and were not taken, without waiting for more."""
        return list(iter(self._feed.take, None))

    def abort(self) -> None:
        """End what is not over of it: its last events say "abort". Any thread may call this."""
        self._is_aborted = True
        self._feed.order_end()

    def __aiter__(self) -> AsyncRequest:
        return self

    async def __anext__(self) -> StreamEvent:
        return await self._feed.next()

    async def __aenter__(self) -> AsyncRequest:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._is_wanted:
            self.abort()

    @property
    def _is_wanted(self) -> bool:
        return not self._is_aborted and self._feed.has_more

    def __del__(self) -> None:
        if self._is_wanted:
            warnings.warn("a request was dropped that is not over: it ends", ResourceWarning, 2)
            self.abort()
