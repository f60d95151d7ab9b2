"""`POST /v1/completions`: text that follows prompts. Knows its answers, never how tokens come."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractAsyncContextManager, aclosing
from typing import Annotated, Any, Final
from uuid import uuid4

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response

from ...engine.token_logprob import TokenLogprob
from ..outputs import Completion, RequestOutput, StreamEvent
from .completion_request import CompletionRequest
from .event_stream import EventStream, unless_disconnected
from .generation import Generation
from .json_body import body_as
from .logprobs import CompletionLogprobs
from .served import Served

router: Final = APIRouter()


@router.post("/v1/completions")
async def create_completion(
    body: Annotated[CompletionRequest, Depends(body_as(CompletionRequest))], request: Request
) -> Response:
    answer = CompletionAnswer(request.app.state.served, body)
    if body.stream:
        return EventStream(answer.chunks())
    return JSONResponse(await unless_disconnected(request.receive, answer.whole()))


class CompletionAnswer:
    """The answer to one request, whole or in chunks."""

    def __init__(self, served: Served, body: CompletionRequest) -> None:
        self._served = served
        self._body = body
        self._params = served.completed(body.params(), body)
        self._head = {
            "id": f"cmpl-{uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": served.check_name(body.model),
        }

    def _requests(self) -> AbstractAsyncContextManager[Generation]:
        return self._served.generation(self._body.prompt, self._params, self._body.priority)

    async def whole(self) -> dict[str, Any]:
        async with self._requests() as generation:
            outputs = await generation.outputs(self._body.prompt)
            samples = [(output, one) for output in outputs for one in output.completions]
            choices = [self._choice(i, output, one) for i, (output, one) in enumerate(samples)]
            return {**self._head, "choices": choices, "usage": self._usage(generation)}

    def _choice(self, index: int, output: RequestOutput, found: Completion) -> dict[str, Any]:
        """A prompt that is echoed, and its continuation unless the echo is all."""
        text, token_ids, logprobs = "", list[int](), list[TokenLogprob | None]()
        if self._body.echo:
            text = self._text_of(output.prompt)
            token_ids += output.prompt_token_ids
            logprobs += output.prompt_logprobs or ()
        if not self._body.is_echo_alone:
            text += found.text
            token_ids += found.token_ids
            logprobs += found.logprobs or ()
        is_wanted = self._body.logprobs is not None
        lists = CompletionLogprobs(self._served.token_texts)
        choice = {
            "index": index,
            "text": text,
            "logprobs": lists.next(token_ids, logprobs) if is_wanted else None,
            "finish_reason": "length" if self._body.is_echo_alone else found.finish_reason,
        }
        if self._body.return_token_ids:
            choice["prompt_token_ids"] = output.prompt_token_ids
            choice["token_ids"] = [] if self._body.is_echo_alone else found.token_ids
        return choice

    async def chunks(self) -> AsyncGenerator[dict[str, Any], None]:
        options = self._body.stream_options
        usage: dict[str, Any] = {"usage": None} if options and options.include_usage else {}
        choices: dict[int, ChoiceInChunks] = {}
        looked_at: dict[int, Sequence[TokenLogprob | None]] = {}  # prompts, by their first sample
        async with self._requests() as generation, aclosing(generation.events()) as events:
            async for prompt_index, event in events:
                index = prompt_index * self._params.num_samples + event.sample_index
                if index not in choices:
                    choices[index] = ChoiceInChunks(index, self._served, self._body)
                    prompt_ids = generation.requests[prompt_index].prompt_token_ids
                    prompt = self._text_of(self._body.prompt[prompt_index])
                    found = looked_at.setdefault(prompt_index, event.prompt_logprobs)
                    part = choices[index].begin(prompt, prompt_ids, found)
                    if part is not None:
                        yield {**self._head, "choices": [part], **usage}
                part = choices[index].go_on(event)
                if options and options.continuous_usage_stats:
                    usage = {"usage": self._usage(generation)}
                if part is not None:
                    yield {**self._head, "choices": [part], **usage}
            if options and options.include_usage:
                yield {**self._head, "choices": [], "usage": self._usage(generation)}

    def _usage(self, generation: Generation) -> dict[str, Any]:
        if self._body.is_echo_alone:
            generation.num_output_tokens = 0
        return generation.usage

    def _text_of(self, prompt: Any) -> str:
        tokenizer = self._served.model.tokenizer
        if isinstance(prompt, str) or not self._body.echo:
            return prompt if isinstance(prompt, str) else ""
        return "" if tokenizer is None else str(tokenizer.decode(prompt, skip_special_tokens=True))


class ChoiceInChunks:
    """One continuation of a stream."""

    def __init__(self, index: int, served: Served, body: CompletionRequest) -> None:
        self._index = index
        self._body = body
        self._logprobs = CompletionLogprobs(served.token_texts)

    def begin(
        self,
        prompt: str,
        prompt_token_ids: list[int],
        looked_at: Sequence[TokenLogprob | None],
    ) -> dict[str, Any] | None:
        """The echo of the prompt, where wanted; with its token ids, where those are."""
        if not self._body.echo and not self._body.return_token_ids:
            return None
        if self._body.echo:
            part = self._part(prompt, prompt_token_ids, looked_at, None)
        else:
            part = self._part("", [], [], None)
        if self._body.return_token_ids:
            part |= {"prompt_token_ids": prompt_token_ids, "token_ids": []}
        return part

    def go_on(self, event: StreamEvent) -> dict[str, Any] | None:
        """What an event adds; None: nothing."""
        body, reason = self._body, event.finish_reason
        if body.is_echo_alone:
            return None if reason is None else self._part("", [], [], "length")
        has_token = event.token_id is not None and (
            body.logprobs is not None or body.return_token_ids
        )
        if not event.text and reason is None and not has_token:
            return None
        ids = [] if event.token_id is None else [event.token_id]
        found = [
            TokenLogprob(token_id, event.log_probability, event.likeliest)
            for token_id in ids
            if event.log_probability is not None
        ]
        part = self._part(event.text, ids, found, reason)
        if body.return_token_ids:
            part["token_ids"] = ids
        return part

    def _part(
        self,
        text: str,
        token_ids: Sequence[int],
        found: Sequence[TokenLogprob | None],
        finish_reason: str | None,
    ) -> dict[str, Any]:
        is_wanted = self._body.logprobs is not None
        return {
            "index": self._index,
            "text": text,
            "logprobs": self._logprobs.next(token_ids, found) if is_wanted else None,
            "finish_reason": finish_reason,
        }
