"""Bodies of requests: read up to a limit, as strict JSON, as what a model of pydantic takes.

Knows bytes and where a value is wrong, never what it is for.
"""

from __future__ import annotations

import reprlib
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, from_json
from starlette.requests import ClientDisconnect

from .refusal import Refusal

Body = TypeVar("Body", bound=BaseModel)
JSON: Final = "application/json"


def body_as(kind: type[Body]) -> Callable[[Request], Awaitable[Body]]:
    """A dependency of FastAPI: the body of a request as a `kind`."""

    async def read(request: Request) -> Body:
        require_json(request)
        return parsed(kind, await limited_body(request, request.app.state.served.settings.max_body))

    return read


def require_json(request: Request) -> None:
    """A browser sends any other type to other origins without asking them first."""
    given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if given != JSON:
        raise Refusal(f"Content-Type must be {JSON}, got {reprlib.repr(given)}", 415)


async def limited_body(request: Request, most: int) -> bytes:
    """All of it; what is too long is refused as soon as that is known, and not kept."""
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length) > most:
        raise too_large(f"{length} bytes", most)
    content = bytearray()
    try:
        async for chunk in request.stream():
            content += chunk
            if len(content) > most:
                raise too_large("more", most)
    except ClientDisconnect:
        raise Refusal("the body ended before its end") from None
    return bytes(content)


def too_large(length: str, most: int) -> Refusal:
    return Refusal(
        f"a body may have {most} bytes, and this one has {length}", 413, code="body_too_large"
    )


def parsed(kind: type[Body], content: bytes) -> Body:
    try:
        values = from_json(content, allow_inf_nan=False)
    except ValueError as error:
        raise Refusal(f"the body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(values, dict):
        raise Refusal("the body must be a JSON object", code="invalid_json")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise refusal_of(error.errors(include_url=False)[0]) from None


def refusal_of(fault: ErrorDetails) -> Refusal:
    """The first thing that is wrong with a body."""
    place = place_of(fault["loc"])
    if fault["type"] == "missing":
        return Refusal(f"{place} is missing", param=place)
    if fault["type"] == "extra_forbidden":
        return unknown(place)
    message = fault["msg"].removeprefix("Value error, ")
    return Refusal(f"{place}: {message}, got {reprlib.repr(fault['input'])}", param=place)


def unknown(name: str) -> Refusal:
    return Refusal(f"unknown parameter: {name}", param=name, code="unknown_parameter")


def place_of(location: tuple[Any, ...]) -> str:
    """Of names and indices: messages[0].content"""
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}"
    return text.removeprefix(".")
