"""Cache events to whoever subscribes: sockets and the thread that feeds them.

Knows batches and sequence numbers, never what an event says.

The protocol is that of vLLM's `ZmqEventPublisher`: a PUB socket sends `topic, sequence, payload`,
the sequence number in 8 bytes, big-endian. A ROUTER socket replays: asked with the number of a
batch, it answers `topic, sequence, payload` for each that it still has from there on, and then once
with an empty topic, the number -1 and an empty payload.
"""

from __future__ import annotations

import logging
import queue
import time
from collections import deque
from threading import Thread
from typing import Final, NamedTuple

import msgspec
import zmq

from ...blocks.events import CacheEvent
from ...errors import ConfigError
from ..llm import LLM
from .kv_events import ClearedMessage, Message, MessageBatch, UniformBlocks

WAIT_SECONDS: Final = 0.1  # a request for a replay waits at most so long
LINGER_MS: Final = 500  # what was sent last still goes out
END_OF_REPLAY: Final = (-1).to_bytes(8, "big", signed=True)
log: Final = logging.getLogger(__name__)


class StepEvents(NamedTuple):
    """What happened in one step, after so many whose events were dropped."""

    seconds: float  # since 1970
    events: list[CacheEvent]
    num_dropped: int


class EventPublisher:
    """Tells subscribers what happens to cached blocks, in batches: one for each step.

    `block_size` is what all blocks have on the wire, that of an open block. `endpoint` is bound
    where it has a `*` or `::` in it or is `ipc://` or `inproc://`, as vLLM's is, else it is where
    to connect to; a `replay_endpoint` is bound. Of the newest `buffer_steps` batches any can be
    replayed; a subscriber that leaves more than `high_water_mark` unread misses some.

    The engine never waits: a step whose events find `max_queue_size` before them is dropped. Its
    sequence number is left out, and the next batch begins with `AllBlocksCleared`: a router must
    not count on what may be gone. Raises `ConfigError` where an endpoint cannot be had.
    """

    def __init__(
        self,
        block_size: int,
        endpoint: str = "tcp://*:5557",
        *,
        replay_endpoint: str | None = None,
        topic: str = "",
        buffer_steps: int = 10_000,
        high_water_mark: int = 100_000,
        max_queue_size: int = 100_000,
    ) -> None:
        self.num_dropped: int = 0  # steps
        self._num_dropped_since = 0  # the last one that was queued
        self._steps: queue.Queue[StepEvents | None] = queue.Queue(max_queue_size)
        self._blocks = UniformBlocks(block_size)
        self._has_failed = False  # to send a step
        self._topic = topic.encode()
        self._sequence = 0
        self._sent: deque[tuple[bytes, bytes]] = deque(maxlen=buffer_steps)
        self._context = zmq.Context()
        self._replays: zmq.Socket[bytes] | None = None
        try:
            is_bound = "*" in endpoint or "::" in endpoint
            is_bound = is_bound or endpoint.startswith(("ipc://", "inproc://"))
            self._subscribers = self._socket(zmq.PUB, high_water_mark, endpoint, is_bound=is_bound)
            self.endpoint: str = self._subscribers.get_string(zmq.LAST_ENDPOINT)
            if replay_endpoint is not None:
                most = 2 * (buffer_steps + 1)  # a whole replay, though nobody reads it yet
                self._replays = self._socket(zmq.ROUTER, most, replay_endpoint, is_bound=True)
                self.replay_endpoint: str = self._replays.get_string(zmq.LAST_ENDPOINT)
        except BaseException:
            self._context.destroy(linger=0)
            raise
        self._thread = Thread(target=self._run, name="kv-events", daemon=True)
        self._thread.start()

    def _socket(
        self, kind: int, high_water_mark: int, endpoint: str, *, is_bound: bool
    ) -> zmq.Socket[bytes]:
        socket: zmq.Socket[bytes] = self._context.socket(kind)
        socket.set_hwm(high_water_mark)
        try:
            (socket.bind if is_bound else socket.connect)(endpoint)
        except zmq.ZMQError as error:
            raise ConfigError(f"cache events cannot be sent from {endpoint!r}: {error}") from error
        return socket

    # -- the engine's thread --------------------------------------------------------------------

    def step_done(self, llm: LLM) -> None:
        """Publish what has happened since the last call; for the thread that steps the engine."""
        self.publish(llm.engine.manager.take_events())

    def publish(self, events: list[CacheEvent]) -> None:
        """Queue the events of a step, or drop them; for one thread at a time."""
        if not events:
            return
        try:
            self._steps.put_nowait(StepEvents(time.time(), events, self._num_dropped_since))
            self._num_dropped_since = 0
        except queue.Full:
            self._num_dropped_since += 1
            self.num_dropped += 1

    def close(self) -> None:
        """Send what is queued, and let go of the sockets."""
        self._steps.put(None)
        self._thread.join()
        self._context.destroy(linger=LINGER_MS)

    # -- the publisher's thread -----------------------------------------------------------------

    def _run(self) -> None:
        while True:
            try:
                if self._replays is not None and self._replays.poll(0):
                    self._replay(self._replays)
                step = self._steps.get(timeout=WAIT_SECONDS)
                if step is None:
                    return
                self._send(step)
            except queue.Empty:
                pass
            except Exception:
                log.exception("cache events were not sent")
                self._has_failed = True

    def _send(self, step: StepEvents) -> None:
        num_lost = step.num_dropped + self._has_failed
        self._has_failed = False
        messages: list[Message] = []
        if num_lost:
            self._sequence += num_lost
            self._blocks.clear()
            messages.append(ClearedMessage())
        messages += self._blocks.messages(step.events)
        if not messages:
            return
        number = self._sequence.to_bytes(8, "big")
        payload = msgspec.msgpack.encode(MessageBatch(ts=step.seconds, events=messages))
        self._sequence += 1
        self._sent.append((number, payload))
        self._subscribers.send_multipart((self._topic, number, payload))

    def _replay(self, socket: zmq.Socket[bytes]) -> None:
        """Answer one request for batches."""
        frames = socket.recv_multipart()
        if len(frames) != 3 or len(frames[2]) != 8:
            log.warning("a request for a replay is not a number in 8 bytes")
            return
        subscriber, delimiter, first = frames
        for number, payload in self._sent:
            if number >= first:
                socket.send_multipart((subscriber, delimiter, self._topic, number, payload))
        socket.send_multipart((subscriber, delimiter, b"", END_OF_REPLAY, b""))
