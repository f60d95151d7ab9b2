"""Errors as HTTP says them and as OpenAI's clients read them. Knows exceptions, never requests."""

from __future__ import annotations

import re
from http import HTTPStatus
from typing import Any, Final, NamedTuple

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from ...errors import (
    ClosedError,
    ConfigError,
    InvalidRequestError,
    MissingDependencyError,
    PagedKVError,
    PromptTooLongError,
    QueueFullError,
    RequestTimeoutError,
    UnsupportedModelError,
)
from .refusal import Refusal

RETRY_SECONDS: Final = 1
NOBODY: Final = 499  # nginx has it in its logs
# The first kind that an error is of. What else an engine raises is the server's fault.
STATUSES: Final[tuple[tuple[type[PagedKVError], int, str | None], ...]] = (
    (QueueFullError, 429, "rate_limit_exceeded"),
    (ClosedError, 503, "shutting_down"),
    (RequestTimeoutError, 504, "timeout"),
    (PromptTooLongError, 400, "context_length_exceeded"),
    (InvalidRequestError, 400, None),
    (ConfigError, 400, None),
    (UnsupportedModelError, 400, "unsupported"),
    (MissingDependencyError, 400, "unsupported"),
)
FIRST_WORD: Final = re.compile(r"[a-z_]+")


class ErrorAnswer(NamedTuple):
    """A status, and the `error` of a body in OpenAI's form."""

    status: int
    error: dict[str, Any]

    @property
    def body(self) -> dict[str, Any]:
        return {"error": self.error}

    @property
    def headers(self) -> dict[str, str]:
        if self.status == HTTPStatus.UNAUTHORIZED:
            return {"WWW-Authenticate": "Bearer"}
        is_soon_over = self.status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)
        return {"Retry-After": str(RETRY_SECONDS)} if is_soon_over else {}


def error_answer(error: Exception) -> ErrorAnswer:
    """How an exception is told. Of one that nobody meant to raise only that it happened."""
    if isinstance(error, Refusal):
        return answer(error.status, str(error), error.code, error.param)
    if isinstance(error, HTTPException):
        return answer(error.status_code, str(error.detail), None, None)
    for kind, status, code in STATUSES:
        if isinstance(error, kind):
            return answer(status, str(error), code, named_parameter(str(error)))
    message = str(error) if isinstance(error, PagedKVError) else "an error of the server"
    return answer(500, message, None, None)


def answer(status: int, message: str, code: str | None, param: str | None) -> ErrorAnswer:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        kind = "rate_limit_error"
    return ErrorAnswer(status, {"message": message, "type": kind, "param": param, "code": code})


def named_parameter(message: str) -> str | None:
    """The option that a message of ours begins with: its names all have an underscore or stand
    before "must".
    """
    word = FIRST_WORD.match(message)
    if word is None:
        return None
    rest = message[word.end() :]
    return word[0] if "_" in word[0] or rest.startswith((" must", ":")) else None


async def answer_error(request: Request, error: Exception) -> JSONResponse:
    found = error_answer(error)
    headers = {**(getattr(error, "headers", None) or {}), **found.headers}
    if not isinstance(error, (PagedKVError, HTTPException)):
        headers["Connection"] = "close"  # as uvicorn does, having logged it
    return JSONResponse(found.body, found.status, headers)


async def answer_nobody(request: Request, error: Exception) -> Response:
    """To a client that has gone."""
    return Response(status_code=NOBODY)


def handle_errors(app: FastAPI) -> None:
    """The one place where exceptions become answers."""
    for kind in (PagedKVError, HTTPException, Exception):
        app.add_exception_handler(kind, answer_error)
    app.add_exception_handler(ClientDisconnect, answer_nobody)
