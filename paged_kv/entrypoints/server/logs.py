"""The server's log: a line for each request that is over, JSON or text.

Knows numbers and times of requests, never what they say: no prompt, output, salt or key.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import Any, Final

from ..async_request import Feed
from ..llm import LLM

log: Final = logging.getLogger(__name__)


class FieldFormatter(logging.Formatter):
    """Lines with the `fields` of a record: `log.info("text", extra={"fields": {...}})`."""

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        moment = datetime.fromtimestamp(record.created, timezone.utc)
        return moment.isoformat(timespec="milliseconds")

    def format(self, record: logging.LogRecord) -> str:
        fields = " ".join(f"{name}={value}" for name, value in fields_of(record).items())
        text = f"{self.formatTime(record)} {record.levelname} {record.getMessage()} {fields}"
        trace = self.formatException(record.exc_info) if record.exc_info else ""
        return f"{text.rstrip()}\n{trace}".rstrip()


class JsonFormatter(FieldFormatter):
    """The same as one JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": self.formatTime(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **fields_of(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    fields: dict[str, Any] = getattr(record, "fields", {})
    return fields


@contextmanager
def logging_as(log_format: str, level: int = logging.INFO) -> Iterator[None]:
    """Lines of "json" or "text" on standard error, of this package and whoever logs beside it."""
    handler, root = logging.StreamHandler(sys.stderr), logging.getLogger()
    handler.setFormatter(JsonFormatter() if log_format == "json" else FieldFormatter())
    level_before = root.level
    root.addHandler(handler)
    root.setLevel(level)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(level_before)


class RequestLog:
    """Logs each request of an `AsyncLLM` when the last of its samples is over."""

    def tokens_came(self, request: Feed, num_tokens: int, now: float) -> None:
        pass

    def request_ended(self, request: Feed, finish_reason: str, now: float) -> None:
        times = request.times
        if times.ended is None:  # other samples go on
            return
        fields = {
            "request": request.request_ids[0] if request.request_ids else None,
            "finish_reason": finish_reason,
            "prompt_tokens": len(request.prompt_token_ids),
            "cached_tokens": request.num_cached_tokens,
            "output_tokens": times.num_output_tokens,
            "samples": request.params.num_samples,
            "seconds": seconds_between(times.arrived, now),
            "queue_seconds": seconds_between(times.queued, times.started),
            "first_token_seconds": seconds_between(times.arrived, times.first_token),
            "decode_seconds": seconds_between(times.first_token, times.last_token),
        }
        level = logging.WARNING if finish_reason == "error" else logging.INFO
        log.log(level, "request ended", extra={"fields": fields})

    def step_done(self, llm: LLM) -> None:
        pass


def seconds_between(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else round(end - start, 6)
