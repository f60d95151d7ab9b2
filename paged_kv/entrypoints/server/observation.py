"""All that watches an engine behind a server, as one listener of its `AsyncLLM`.

Knows who watches, never what they make of it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Final

from ..async_llm import Listener
from ..async_request import Feed
from ..llm import LLM
from .event_publisher import EventPublisher
from .figures import Figures
from .logs import RequestLog
from .metrics import Metrics

log: Final = logging.getLogger(__name__)


class Observation:
    """Figures and metrics of an `LLM`, a log of its requests, and its cache events on the wire.

    For `AsyncLLM(llm, listener=...)`. A `publisher` wants an `LLM(record_events=True)`, and is
    closed with this.
    """

    def __init__(
        self, llm: LLM, model_name: str, *, publisher: EventPublisher | None = None
    ) -> None:
        self.figures: Final = Figures(llm, model_name)
        self.metrics: Final = Metrics(llm, self.figures)
        self.publisher = publisher
        self._listeners: list[Listener] = [self.figures, self.metrics, RequestLog()]

    def close(self) -> None:
        if self.publisher is not None:
            self.publisher.close()

    def statistics(self) -> dict[str, Any]:
        """The answer to `GET /statistics`; for any thread."""
        return self.figures.snapshot()

    def exposition(self) -> bytes:
        """The answer to `GET /metrics`; for any thread."""
        return self.metrics.exposition()

    # -- on the engine's thread -----------------------------------------------------------------

    def tokens_came(self, request: Feed, num_tokens: int, now: float) -> None:
        self._tell_all(lambda listener: listener.tokens_came(request, num_tokens, now))

    def request_ended(self, request: Feed, finish_reason: str, now: float) -> None:
        self._tell_all(lambda listener: listener.request_ended(request, finish_reason, now))

    def step_done(self, llm: LLM) -> None:
        with llm.requests.at_rest():
            self._tell_all(lambda listener: listener.step_done(llm))
            if self.publisher is not None:
                self.publisher.step_done(llm)

    def _tell_all(self, what: Callable[[Listener], None]) -> None:
        for listener in self._listeners:
            try:
                what(listener)
            except Exception:  # the others are told all the same
                log.exception("what watches the engine failed")
