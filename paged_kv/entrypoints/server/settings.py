"""What a server is told beside its model. Knows values and their ranges, never requests."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from ...validation import is_finite, is_integer, is_list_of, require, require_count

DEFAULT_MAX_BODY: Final = 8 << 20
DEFAULT_MAX_REQUESTS: Final = 256
DEFAULT_MIN_PRIORITY: Final = 0  # what requests have that ask for none: nobody goes before them
DEFAULT_DRAIN_SECONDS: Final = 30.0
ORIGIN: Final = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s?#@]+")


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """`model_name` is what requests call the model. With an `api_key` all but the state of the
    server needs it. A body of more than `max_body` bytes is refused, and so are requests beside
    `max_requests` others, of which each sample is one, and a `priority` below `min_priority`: lower
    ones come first. Where there are `max_connections`, whatever comes beside them gets status 503.
    A request that takes more than `request_timeout` seconds ends with an error;
    so do those that are not over `drain_timeout` seconds after a signal (None: they may take their
    time). Pages of `allow_origins` may read answers in a browser ("*": all pages).
    """

    model_name: str
    api_key: str | None = None
    max_body: int = DEFAULT_MAX_BODY
    max_requests: int = DEFAULT_MAX_REQUESTS
    min_priority: int = DEFAULT_MIN_PRIORITY
    max_connections: int | None = None
    request_timeout: float | None = None
    drain_timeout: float | None = DEFAULT_DRAIN_SECONDS
    allow_origins: Sequence[str] = ()

    def __post_init__(self) -> None:
        require("model_name", self.model_name, is_text(self.model_name), "text")
        # Not shown: what is wrong with a key is mostly a letter of it.
        is_key = self.api_key is None or (is_text(self.api_key) and self.api_key.isascii())
        require("api_key", "what is not shown", is_key, "ASCII text that is not empty")
        require_count("max_body", self.max_body)
        require_count("max_requests", self.max_requests)
        is_rank = is_integer(self.min_priority)
        require("min_priority", self.min_priority, is_rank, "an integer")
        if self.max_connections is not None:
            require_count("max_connections", self.max_connections)
        for name in ("request_timeout", "drain_timeout"):
            limit = getattr(self, name)
            is_limit = limit is None or (is_finite(limit) and limit > 0)
            require(name, limit, is_limit, "None or a number of seconds above 0")
        origins = self.allow_origins
        expected = "a list of origins, as https://example.org:8080, or *"
        require("allow_origins", origins, is_list_of(origins, is_origin), expected)


def is_origin(value: object) -> bool:
    """Whether browsers may send it as their page's: a scheme, a host and perhaps a port."""
    return value == "*" or (isinstance(value, str) and ORIGIN.fullmatch(value) is not None)


def is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)
