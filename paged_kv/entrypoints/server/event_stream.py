"""Answers that clients may leave: server-sent events, and work that ends with its client.

Knows ASGI and JSON, never what is in an event.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing, suppress
from typing import Any, Final, TypeVar

from starlette.background import BackgroundTask
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ...errors import PagedKVError
from .error_answers import error_answer

Result = TypeVar("Result")
HEADERS: Final = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
LAST_EVENT: Final = b"data: [DONE]\n\n"
logger: Final = logging.getLogger(__name__)


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of the work, which is cancelled, and over, when the client has gone.

    Raises `ClientDisconnect` then. The body of the request must have been read.
    """
    task, gone = asyncio.create_task(work), asyncio.create_task(disconnection(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def disconnection(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Chunks as server-sent events, each taken when the one before it has been sent.

    The response begins with the first chunk: what fails before has a status of its own. What fails
    later is the last event, and the stream then ends without [DONE].
    """

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncGenerator[dict[str, Any], None]) -> None:
        self.status_code = 200
        self.background: BackgroundTask | None = None
        self.init_headers(HEADERS)
        self._chunks = chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(ClientDisconnect):
            await unless_disconnected(receive, self._send_all(send))

    async def _send_all(self, send: Send) -> None:
        is_begun = False
        try:
            async with aclosing(self._chunks) as chunks:
                async for chunk in chunks:
                    if not is_begun:
                        await self._begin(send)
                        is_begun = True
                    await send(part(encoded(chunk)))
            last = LAST_EVENT
        except Exception as error:
            if not is_begun:
                raise
            if not isinstance(error, PagedKVError):
                logger.exception("a stream failed")
            last = encoded(error_answer(error).body)
        if not is_begun:
            await self._begin(send)
        await send(part(last))
        await send(part(b"", is_last=True))

    async def _begin(self, send: Send) -> None:
        await send(
            {
                "type": "http.response.start",
                "status": self.status_code,
                "headers": self.raw_headers,
            }
        )


def part(content: bytes, *, is_last: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": content, "more_body": not is_last}


def encoded(chunk: dict[str, Any]) -> bytes:
    text = json.dumps(chunk, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()
