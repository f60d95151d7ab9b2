"""`POST /v1/chat/completions`: answers to messages. Knows its answers, never how tokens come."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Annotated, Any, Final
from uuid import uuid4

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response

from ...engine.text import encode_chat
from ...engine.token_logprob import TokenLogprob
from ..outputs import Completion, StreamEvent
from .chat_request import ChatRequest
from .event_stream import EventStream, unless_disconnected
from .generation import Generation
from .json_body import body_as
from .logprobs import chat_logprobs
from .served import Served

router: Final = APIRouter()


@router.post("/v1/chat/completions")
async def create_chat_completion(
    body: Annotated[ChatRequest, Depends(body_as(ChatRequest))], request: Request
) -> Response:
    answer = ChatAnswer(request.app.state.served, body)
    if body.stream:
        return EventStream(answer.chunks())
    return JSONResponse(await unless_disconnected(request.receive, answer.whole()))


class ChatAnswer:
    """The answer to one request, whole or in chunks."""

    def __init__(self, served: Served, body: ChatRequest) -> None:
        self._served = served
        self._body = body
        self._params = served.completed(body.params(), body)
        self._id = f"chatcmpl-{uuid4().hex}"
        self._created = int(time.time())
        self._model = served.check_name(body.model)

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model,
        }

    @asynccontextmanager
    async def _requests(self) -> AsyncIterator[Generation]:
        model = self._served.model
        token_ids = await asyncio.to_thread(
            encode_chat,
            self._body.plain_messages,
            model.tokenizer,
            model.max_prompt_tokens(self._params),
            **self._body.template_options,
        )
        async with self._served.generation(
            [token_ids], self._params, self._body.priority
        ) as generation:
            yield generation

    async def whole(self) -> dict[str, Any]:
        async with self._requests() as generation:
            token_ids = generation.requests[0].prompt_token_ids
            (output,) = await generation.outputs([token_ids])
            choices = [self._choice(i, found) for i, found in enumerate(output.completions)]
            answer = {**self._head("chat.completion"), "choices": choices}
            if self._body.return_token_ids:
                answer["prompt_token_ids"] = token_ids
            return {**answer, "usage": generation.usage}

    def _choice(self, index: int, found: Completion) -> dict[str, Any]:
        texts, logprobs = self._served.token_texts, found.logprobs
        choice = {
            "index": index,
            "message": {"role": "assistant", "content": found.text, "refusal": None},
            "logprobs": None if logprobs is None else chat_logprobs(logprobs, texts),
            "finish_reason": found.finish_reason,
        }
        if self._body.return_token_ids:
            choice["token_ids"] = found.token_ids
        return choice

    async def chunks(self) -> AsyncGenerator[dict[str, Any], None]:
        """Each choice begins with its role, and ends with a reason."""
        head, options = self._head("chat.completion.chunk"), self._body.stream_options
        usage: dict[str, Any] = {"usage": None} if options and options.include_usage else {}
        begun: set[int] = set()
        async with self._requests() as generation, aclosing(generation.events()) as events:
            async for _, event in events:
                index = event.sample_index
                if index not in begun:
                    begun.add(index)
                    role = delta_choice(index, {"role": "assistant", "content": ""})
                    first = {**head, "choices": [role], **usage}
                    if self._body.return_token_ids:
                        first["prompt_token_ids"] = generation.requests[0].prompt_token_ids
                    yield first
                if options and options.continuous_usage_stats:
                    usage = {"usage": generation.usage}
                for choice in self._parts(event):
                    yield {**head, "choices": [choice], **usage}
            if options and options.include_usage:
                yield {**head, "choices": [], "usage": generation.usage}

    def _parts(self, event: StreamEvent) -> list[dict[str, Any]]:
        """What an event adds to its choice: text, and its end."""
        parts, index = [], event.sample_index
        found = self._logprob(event)
        is_wanted = found is not None or (
            self._body.return_token_ids and event.token_id is not None
        )
        if event.text or is_wanted:
            part = delta_choice(index, {"content": event.text})
            if found is not None:
                part["logprobs"] = chat_logprobs([found], self._served.token_texts)
            if self._body.return_token_ids:
                part["token_ids"] = [] if event.token_id is None else [event.token_id]
            parts.append(part)
        if event.finish_reason is not None:
            parts.append(delta_choice(index, {}, event.finish_reason))
        return parts

    def _logprob(self, event: StreamEvent) -> TokenLogprob | None:
        if not self._body.logprobs or event.token_id is None or event.log_probability is None:
            return None
        return TokenLogprob(event.token_id, event.log_probability, event.likeliest)


def delta_choice(
    index: int, delta: dict[str, Any], finish_reason: str | None = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
