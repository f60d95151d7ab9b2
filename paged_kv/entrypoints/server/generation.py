"""The requests of one HTTP request, and their events. Knows an engine's requests, never JSON."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Any, Protocol

from ...engine.sampling_params import SamplingParams
from ...engine.text import Prompt
from ...errors import PagedKVError
from ..outputs import OutputAssembler, RequestOutput, StreamEvent


class RunningRequest(Protocol):
    """A request that was accepted, as `AsyncRequest` is one; it ends with its `async with`."""

    @property
    def prompt_token_ids(self) -> list[int]: ...

    @property
    def params(self) -> SamplingParams: ...

    @property
    def num_cached_tokens(self) -> int: ...

    def __aiter__(self) -> AsyncIterator[StreamEvent]: ...

    async def __anext__(self) -> StreamEvent: ...

    async def __aenter__(self) -> RunningRequest: ...

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...


class Generation:
    """Requests of one prompt or several, with the same parameters, whose events are taken once."""

    def __init__(self, requests: Sequence[RunningRequest]) -> None:
        self.requests = requests
        self.num_output_tokens: int = 0  # of the events that were taken

    async def events(self) -> AsyncGenerator[tuple[int, StreamEvent], None]:
        """The index of a prompt, and an event of it. Raises the error of the first that fails."""
        async with aclosing(merged(self.requests)) as events:
            async for index, event in events:
                if event.error is not None:
                    raise event.error
                if event.finish_reason == "abort":
                    raise PagedKVError("the request was aborted")
                self.num_output_tokens += event.token_id is not None
                yield index, event

    async def outputs(self, prompts: Sequence[Prompt]) -> list[RequestOutput]:
        """What comes of all prompts, when all of it is there."""
        assemblers = [
            OutputAssembler([prompt], [request.prompt_token_ids], [request.params])
            for prompt, request in zip(prompts, self.requests, strict=True)
        ]
        async with aclosing(self.events()) as events:
            async for index, event in events:
                assemblers[index].add(event)
        return [assembler.outputs[0] for assembler in assemblers]

    @property
    def usage(self) -> dict[str, Any]:
        """Tokens so far, in OpenAI's form."""
        num_prompt_tokens = sum(len(request.prompt_token_ids) for request in self.requests)
        return {
            "prompt_tokens": num_prompt_tokens,
            "completion_tokens": self.num_output_tokens,
            "total_tokens": num_prompt_tokens + self.num_output_tokens,
            "prompt_tokens_details": {
                "cached_tokens": sum(request.num_cached_tokens for request in self.requests)
            },
        }


async def merged(
    requests: Sequence[RunningRequest],
) -> AsyncGenerator[tuple[int, StreamEvent], None]:
    """Events of all requests as they come. Of each at most one is taken before it is wanted."""
    if len(requests) == 1:
        async for event in requests[0]:
            yield 0, event
        return
    ready: asyncio.Queue[tuple[int, StreamEvent | BaseException | None]] = asyncio.Queue(1)

    async def forward(index: int, events: AsyncIterator[StreamEvent]) -> None:
        try:
            async for event in events:
                await ready.put((index, event))
            await ready.put((index, None))
        except Exception as error:
            await ready.put((index, error))

    tasks = [asyncio.create_task(forward(index, request)) for index, request in enumerate(requests)]
    try:
        num_left = len(tasks)
        while num_left:
            index, item = await ready.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                num_left -= 1
            else:
                yield index, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
