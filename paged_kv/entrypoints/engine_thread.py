"""A thread that steps an engine while it has requests, and between steps does what others order.

Knows no requests, and no event loop.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Final

from .text_engine import TextEngine

LOOKING_SECONDS: Final = 0.1  # until it sees what other threads have done
MOST_FAULTS: Final = 3  # in a row

logger: Final = logging.getLogger(__name__)


class EngineThread:
    """Steps `requests` until it is stopped.

    After each step `after_step` is called. A step that fails before it is known what it computes
    is tried again; `on_fault` is called with the exception when that does not help. Orders that
    fail are tried again too.
    """

    def __init__(
        self,
        requests: TextEngine,
        after_step: Callable[[], None],
        on_fault: Callable[[BaseException], None],
    ) -> None:
        self._requests = requests
        self._after_step = after_step
        self._on_fault = on_fault
        self._num_faults = 0  # since a step went well
        self._orders: SimpleQueue[Callable[[], None]] = SimpleQueue()  # a destructor may put
        self._due: deque[Callable[[], None]] = deque()  # taken from there and not done
        self._is_stopping = False
        self._thread = Thread(target=self._run, name="paged_kv engine", daemon=True)
        self._thread.start()

    def order(self, what: Callable[[], None]) -> None:
        """Have something done between two steps, after all that was ordered before."""
        self._orders.put(what)

    def stop(self) -> None:
        """Return when the step that runs is over, and all orders are done."""
        self._is_stopping = True
        self.order(lambda: None)
        self._thread.join()

    def _run(self) -> None:
        has_to_wait = False
        while not self._is_stopping or self._due or not self._orders.empty():
            self._fetch(has_to_wait)
            try:
                while self._due:
                    self._due[0]()
                    self._due.popleft()
                has_to_wait = not self._requests.step(keep_going=True)
                self._num_faults = 0
            except BaseException as error:  # whatever it is, others wait for what this thread does
                logger.exception("the engine failed")
                has_to_wait = self._has_to_wait_after(error)
            self._after_step()

    def _fetch(self, has_to_wait: bool) -> None:
        """Take what is ordered, which there may have to be something of."""
        if has_to_wait:
            seconds = LOOKING_SECONDS if self._due or len(self._requests) else None
            with suppress(Empty):
                self._due.append(self._orders.get(timeout=seconds))
        while not self._orders.empty():
            self._due.append(self._orders.get())

    def _has_to_wait_after(self, error: BaseException) -> bool:
        self._num_faults += 1
        if self._num_faults < MOST_FAULTS:
            return False
        with suppress(Exception):  # then it is tried with the next fault
            self._on_fault(error)
        return True
