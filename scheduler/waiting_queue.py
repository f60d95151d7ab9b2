"""Requests that wait for blocks, best rank first. Knows ranks, never blocks."""

from __future__ import annotations

import heapq

from .request import Request


class WaitingQueue:
    """A heap by rank; removal from the middle is lazy."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, str]] = []
        self._requests: dict[str, Request] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def push(self, request: Request) -> None:
        self._requests[request.request_id] = request
        heapq.heappush(self._heap, (*request.rank, request.request_id))

    def peek(self) -> Request:
        """The request of the best rank; the queue must not be empty."""
        while not self._is_current(self._heap[0]):
            heapq.heappop(self._heap)
        return self._requests[self._heap[0][2]]

    def _is_current(self, entry: tuple[int, int, str]) -> bool:
        """False for a request that was removed, and for an earlier request of the same id."""
        request = self._requests.get(entry[2])
        return request is not None and request.rank == entry[:2]

    def pop(self) -> Request:
        request = self.peek()
        return self.remove(request.request_id)

    def remove(self, request_id: str) -> Request:
        return self._requests.pop(request_id)
