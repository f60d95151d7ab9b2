"""Answers that clients may leave or read slowly, without a network."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from starlette.requests import ClientDisconnect

from paged_kv.entrypoints.server.event_stream import EventStream, unless_disconnected
from paged_kv.errors import PagedKVError, QueueFullError


class Client:
    """Reads when it is told to, and leaves when it is told to."""

    def __init__(self) -> None:
        self.received: list[dict[str, Any]] = []
        self.may_read = asyncio.Semaphore(0)
        self.has_left = asyncio.Event()

    async def receive(self) -> dict[str, Any]:
        await self.has_left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict[str, Any]) -> None:
        await self.may_read.acquire()
        self.received.append(message)

    def read(self, count: int) -> None:
        for _ in range(count):
            self.may_read.release()

    @property
    def text(self) -> str:
        return b"".join(message.get("body", b"") for message in self.received).decode()


class Source:
    """Chunks 0, 1, 2 ... and how many were taken."""

    def __init__(self, most: int, error: Exception | None = None) -> None:
        self.num_taken = 0
        self.is_closed = False
        self._most, self._error = most, error

    async def chunks(self) -> AsyncGenerator[dict[str, Any], None]:
        try:
            for number in range(self._most):
                self.num_taken += 1
                yield {"number": number}
            if self._error is not None:
                raise self._error
        finally:
            self.is_closed = True


async def settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def test_a_chunk_is_taken_when_the_one_before_it_was_sent():
    async def run() -> None:
        client, source = Client(), Source(5)
        stream = EventStream(source.chunks())
        task = asyncio.create_task(stream({}, client.receive, client.send))
        await settled()
        assert source.num_taken == 1
        client.read(3)  # the start of the response, and two chunks
        await settled()
        assert source.num_taken == 3
        client.read(5)
        await task
        numbers = [json.loads(event[6:])["number"] for event in client.text.split("\n\n")[:5]]
        assert numbers == [0, 1, 2, 3, 4]
        assert client.text.endswith("data: [DONE]\n\n")
        assert [message.get("more_body") for message in client.received] == [
            None,
            *[True] * 6,
            False,
        ]

    asyncio.run(run())


@pytest.mark.parametrize("num_read", [0, 1, 3])
def test_who_leaves_ends_the_chunks_also_where_it_does_not_read(num_read):
    async def run() -> None:
        client, source = Client(), Source(1000)
        task = asyncio.create_task(EventStream(source.chunks())({}, client.receive, client.send))
        client.read(num_read)
        await settled()
        assert not source.is_closed
        client.has_left.set()
        await task
        assert source.is_closed

    asyncio.run(run())


def test_what_fails_before_the_first_chunk_has_a_status_of_its_own():
    async def run() -> None:
        client = Client()
        client.read(10)
        with pytest.raises(QueueFullError):
            await EventStream(Source(0, QueueFullError("full")).chunks())(
                {}, client.receive, client.send
            )
        assert not client.received

    asyncio.run(run())


@pytest.mark.parametrize("error", [PagedKVError("a reason"), ZeroDivisionError("a secret")])
def test_what_fails_later_is_the_last_event(error, caplog):
    async def run() -> None:
        client = Client()
        client.read(10)
        await EventStream(Source(1, error).chunks())({}, client.receive, client.send)
        _, last, nothing = client.text.split("\n\n")
        assert nothing == ""
        told = json.loads(last.removeprefix("data: "))["error"]
        assert told["type"] == "server_error"
        is_ours = isinstance(error, PagedKVError)
        assert told["message"] == ("a reason" if is_ours else "an error of the server")
        assert ("a secret" in caplog.text) != is_ours
        assert client.received[-1]["more_body"] is False

    asyncio.run(run())


def test_a_task_that_is_cancelled_cancels_its_work():
    async def run() -> None:
        client, is_cancelled = Client(), []

        async def work() -> None:
            try:
                await asyncio.sleep(100)
            finally:
                is_cancelled.append(True)

        task = asyncio.create_task(unless_disconnected(client.receive, work()))
        await settled()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert is_cancelled
        client.has_left.set()
        with pytest.raises(ClientDisconnect):
            await unless_disconnected(client.receive, work())
        assert len(is_cancelled) == 2 or len(is_cancelled) == 1  # it may not have begun
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(run())
