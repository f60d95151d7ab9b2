"""uvicorn around an engine: it drains on a signal, and then ends. Knows signals, never requests."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import uvicorn

from ..async_llm import AsyncLLM
from ..batch_job import STOP_SIGNALS
from ..llm import LLM
from .app import create_app
from .observation import Observation
from .served import Observer
from .settings import ServerSettings

KEEP_ALIVE_SECONDS: Final = 75  # longer than clients keep connections, which would find them closed
SENDING_SECONDS: Final = 5  # for clients that have not read what was generated for them
log: Final = logging.getLogger(__name__)


async def serve(
    llm: LLM, settings: ServerSettings, listener: socket.socket, observation: Observation
) -> None:
    """Answer requests at a bound socket until a signal comes and what was accepted is over."""
    async with AsyncLLM(llm, max_requests=settings.max_requests, listener=observation) as engine:
        await DrainingServer(engine, settings, observation).serve([listener])


class DrainingServer(uvicorn.Server):
    """A server that first lets its engine drain: meanwhile it answers, with status 503 where more
    is asked for.
    """

    should_exit: bool

    def __init__(self, engine: AsyncLLM, settings: ServerSettings, observer: Observer) -> None:
        most = settings.max_connections
        super().__init__(
            uvicorn.Config(
                create_app(engine, settings, observer),
                log_config=None,  # its lines are like all others
                lifespan="off",
                limit_concurrency=None if most is None else most + 1,  # which it refuses
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=SENDING_SECONDS,
                server_header=False,
            )
        )
        self._engine = engine
        self._drain_timeout = settings.drain_timeout
        self._draining: list[asyncio.Task[None]] = []

    def stop(self) -> None:
        """Drain and end; a second time, with errors for what is left; a third, whatever is left.

        In the thread of the event loop.
        """
        timeout = 0 if self._draining else self._drain_timeout
        if len(self._draining) < 2:
            self._draining.append(asyncio.get_running_loop().create_task(self._drain(timeout)))
        else:
            self.should_exit = self.force_exit = True

    async def _drain(self, timeout: float | None) -> None:
        log.info("ending: %d requests are left", self._engine.num_requests)
        await self._engine.drain(timeout)
        self.should_exit = True

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Within it signals stop the server. uvicorn's own would end the process by them."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()

        def handle(*_: Any) -> None:
            loop.call_soon_threadsafe(self.stop)

        before = {each: signal.signal(each, handle) for each in STOP_SIGNALS}
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)
