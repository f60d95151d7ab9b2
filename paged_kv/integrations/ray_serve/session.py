"""Whose request it is, for routing: a header, or a field of the body. Knows ASGI, never routes.

OpenAI's bodies have `prompt_cache_key` and `user`, which change no answer: a server reads them and
drops them, so that they are looked for here.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any, Final

from pydantic_core import from_json
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER: Final = b"x-session-id"
FIELDS: Final = ("prompt_cache_key", "user")  # the first that there is counts
MAX_BODY: Final = 1 << 20  # a longer one is not searched

session_key: ContextVar[str | None] = ContextVar("paged_kv_session", default=None)


class SessionKeys:
    """An ASGI application that is called with its request's `session_key`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        values = [value for name, value in scope["headers"] if name.lower() == HEADER]
        key = values[0].decode("latin-1") if values else None
        if key is None:
            messages = await beginning_of(receive)
            key = key_in(b"".join(message.get("body", b"") for message in messages))
            receive = replayed(messages, receive)
        token = session_key.set(key or None)
        try:
            await self._app(scope, receive, send)
        finally:
            session_key.reset(token)


async def beginning_of(receive: Receive) -> list[Message]:
    """Messages up to the end of the body, or up to more of it than is looked at."""
    messages: list[Message] = []
    size, has_more = 0, True
    while has_more and size <= MAX_BODY:
        message = await receive()
        messages.append(message)
        size += len(message.get("body", b""))
        has_more = message["type"] == "http.request" and message.get("more_body", False)
    return messages


def replayed(messages: list[Message], receive: Receive) -> Receive:
    """These messages again, and then what comes."""
    waiting = list(reversed(messages))

    async def next_message() -> Message:
        return waiting.pop() if waiting else await receive()

    return next_message


def key_in(body: bytes) -> str | None:
    """The session that a body names; what is wrong with a body is for others to say."""
    if len(body) > MAX_BODY or not any(name.encode() in body for name in FIELDS):
        return None
    try:
        values: Any = from_json(body)
    except ValueError:
        return None
    found = [values.get(name) for name in FIELDS] if isinstance(values, dict) else []
    return next((value for value in found if isinstance(value, str) and value), None)
