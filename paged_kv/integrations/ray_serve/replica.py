"""One replica: an `LLM` of its own that does what orders say. Knows orders, never Ray."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import suppress
from typing import Any, Final

from ...entrypoints.async_llm import AsyncLLM
from ...entrypoints.async_request import AsyncRequest, Feed
from ...entrypoints.llm import LLM
from ...entrypoints.outputs import StreamEvent
from ...entrypoints.server.logs import RequestLog
from ...errors import PagedKVError
from .block_log import BlockLog
from .model_card import ModelCard, card_of
from .order import Order, Reply


class EngineReplica:
    """Loads a model; its `AsyncLLM` is as long as this is."""

    def __init__(
        self, name: str, model: str, keywords: Mapping[str, Any], *, max_requests: int
    ) -> None:
        self.name = name
        self.llm: Final = LLM(model, record_events=True, **keywords)
        self._blocks = BlockLog()
        self._log = RequestLog()
        self.engine: Final = AsyncLLM(self.llm, max_requests=max_requests, listener=self)

    async def close(self) -> None:
        """End what is not over: whoever asked for it asks elsewhere."""
        await self.engine.close()
        self.llm.close()

    def card(self) -> ModelCard:
        return card_of(self.llm)

    async def generate(self, order: Order) -> AsyncGenerator[Reply, None]:
        """The replies to an order; leaving them ends it."""
        try:
            request = await self.engine.submit(
                order.prompt_token_ids, order.params, priority=order.priority, given=order.given
            )
        except PagedKVError as error:
            yield Reply(replica=self.name, refusal=error)
            return
        known = order.known.get(self.name, 0)
        async with request:
            yield Reply(replica=self.name)
            num_left, is_first = len(order.given or range(order.params.num_samples)), True
            while num_left:
                events = await next_events(request)
                num_left -= sum(event.finish_reason is not None for event in events)
                changes = None
                if is_first or not num_left:
                    changes = self._blocks.since(known)
                    known = changes.last
                yield Reply(
                    replica=self.name,
                    events=events,
                    num_cached_tokens=request.num_cached_tokens,
                    changes=changes,
                )
                is_first = False

    # -- on the engine's thread -----------------------------------------------------------------

    def tokens_came(self, request: Feed, num_tokens: int, now: float) -> None:
        self._log.tokens_came(request, num_tokens, now)

    def request_ended(self, request: Feed, finish_reason: str, now: float) -> None:
        self._log.request_ended(request, finish_reason, now)

    def step_done(self, llm: LLM) -> None:
        with llm.requests.at_rest():
            self._blocks.note(llm.engine.manager.take_events())


async def next_events(request: AsyncRequest) -> list[StreamEvent]:
    """The next event, and those that have come behind it."""
    with suppress(StopAsyncIteration):
        return [await anext(request), *request.take_ready()]
    return []
