"""How many may be inside at once, and who of those outside comes next. Knows tasks, no requests."""

from __future__ import annotations

import asyncio
import heapq
import itertools

from ..errors import QueueFullError, RequestTimeoutError


class WaitingRoom:
    """Places for `max_inside`; a lower `priority` comes first, then whoever has waited longest.

    For tasks of one event loop. Whoever is cancelled while it waits takes no place.
    """

    def __init__(self, max_inside: int) -> None:
        self._max_inside = max_inside
        self._num_inside = 0
        self._numbers = itertools.count()
        self._queue: list[tuple[int, int, asyncio.Future[None]]] = []

    @property
    def is_full(self) -> bool:
        return self._num_inside >= self._max_inside

    async def enter(self, priority: int, deadline: float | None, *, waits: bool) -> None:
        """Take a place, if need be when others have left.

        Raises `QueueFullError` where all are taken and it does not wait, `RequestTimeoutError` when
        none was free until the `deadline` of the loop's clock.
        """
        if not self.is_full:
            self._num_inside += 1
            return
        if not waits:
            raise QueueFullError(f"{self._num_inside} requests are there, which is the limit")
        loop = asyncio.get_running_loop()
        place = loop.create_future()
        timer = None if deadline is None else loop.call_at(deadline, expire, place)
        heapq.heappush(self._queue, (priority, next(self._numbers), place))
        try:
            await place
        except BaseException:
            if place.done() and not place.cancelled() and place.exception() is None:
                self.leave()  # it was given the place and cancelled in the same moment
            place.cancel()
            raise
        finally:
            if timer is not None:
                timer.cancel()

    def leave(self) -> None:
        """Give the place to whoever comes next."""
        while self._queue:
            _, _, place = heapq.heappop(self._queue)
            if not place.done():
                place.set_result(None)
                return
        self._num_inside -= 1

    def dismiss(self, error: Exception) -> None:
        """Nobody who waits now will enter: each raises this."""
        for _, _, place in self._queue:
            if not place.done():
                place.set_exception(error)
        self._queue.clear()


def expire(place: asyncio.Future[None]) -> None:
    if not place.done():
        place.set_exception(RequestTimeoutError("no place became free within the request's time"))
