"""How many may be inside at once, and who of those outside comes next. Knows tasks, no requests."""

from __future__ import annotations

import asyncio
import heapq
import itertools

from ..errors import QueueFullError, RequestTimeoutError


class WaitingRoom:
    """Places for `max_inside`; a lower `priority` comes first, then whoever has waited longest.

    For tasks of one event loop. Whoever is cancelled while it waits takes no place. Whoever wants
    more places than there are gets all of them.
    """

    def __init__(self, max_inside: int) -> None:
        self._max_inside = max_inside
        self._num_inside = 0
        self._numbers = itertools.count()
        # By rank: how many places, and the future of who waits for them.
        self._queue: list[tuple[int, int, int, asyncio.Future[None]]] = []

    @property
    def is_full(self) -> bool:
        return self._num_inside >= self._max_inside

    async def enter(
        self, priority: int, deadline: float | None, *, waits: bool, num_places: int = 1
    ) -> None:
        """Take places, if need be when others have left.

        Raises `QueueFullError` where too few are free and it does not wait, `RequestTimeoutError`
        when too few were free until the `deadline` of the loop's clock.
        """
        loop = asyncio.get_running_loop()
        place, num_places = loop.create_future(), min(num_places, self._max_inside)
        entry = (priority, next(self._numbers), num_places, place)
        heapq.heappush(self._queue, entry)
        self._let_in()
        if place.done():
            return
        if not waits:
            self._queue.remove(entry)
            heapq.heapify(self._queue)
            raise QueueFullError(
                f"{self._num_inside} requests are there, of {self._max_inside} at once, and "
                f"{num_places} more were asked for"
            )
        timer = None if deadline is None else loop.call_at(deadline, expire, place)
        try:
            await place
        except BaseException:
            if place.done() and not place.cancelled() and place.exception() is None:
                self.leave(num_places)  # it was given them and cancelled in the same moment
            place.cancel()
            self._let_in()  # others may have waited behind it
            raise
        finally:
            if timer is not None:
                timer.cancel()

    def leave(self, num_places: int = 1) -> None:
        """Give places to whoever comes next."""
        self._num_inside -= min(num_places, self._max_inside)
        self._let_in()

    def _let_in(self) -> None:
        """Those who are next, as far as there are places; nobody passes one who wants more."""
        while self._queue:
            _, _, num_places, place = self._queue[0]
            if not place.done():
                if self._num_inside + num_places > self._max_inside:
                    return
                self._num_inside += num_places
                place.set_result(None)
            heapq.heappop(self._queue)

    def dismiss(self, error: Exception) -> None:
        """Nobody who waits now will enter: each raises this."""
        for *_, place in self._queue:
            if not place.done():
                place.set_exception(error)
        self._queue.clear()


def expire(place: asyncio.Future[None]) -> None:
    if not place.done():
        place.set_exception(RequestTimeoutError("no place became free within the request's time"))
