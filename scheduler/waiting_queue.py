"""Requests that wait for blocks, best rank first. Knows ranks, never blocks."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

from .request import Request


class WaitingQueue:
    """A list in the order of ranks, which are distinct."""

    def __init__(self) -> None:
        self._requests: list[Request] = []

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        """Best rank first. The current one may be removed meanwhile."""
        place = 0
        while place < len(self._requests):
            request = self._requests[place]
            yield request
            if place < len(self._requests) and self._requests[place] is request:
                place += 1

    @property
    def first(self) -> Request | None:
        return self._requests[0] if self._requests else None

    def push(self, request: Request) -> None:
        insort(self._requests, request, key=lambda waiting: waiting.rank)

    def remove(self, request: Request) -> None:
        place = bisect_left(self._requests, request.rank, key=lambda waiting: waiting.rank)
        assert self._requests[place] is request
        del self._requests[place]
