"""Replicas of this process that die when a test wants it, and an engine that asks them."""

from __future__ import annotations

import pickle
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing

from paged_kv.integrations.ray_serve.fleet import Fleet
from paged_kv.integrations.ray_serve.fleet_engine import FleetEngine
from paged_kv.integrations.ray_serve.order import Order, ReplicaLostError, Reply
from paged_kv.integrations.ray_serve.replica import EngineReplica


class LocalCalls:
    """Orders and replies go through pickle, as between processes.

    A replica of `replies_left` dies in place of the reply after so many. `sent` tells which
    orders went where.
    """

    def __init__(self, replicas: Mapping[str, EngineReplica], fleet: Fleet) -> None:
        self.alive = dict(replicas)
        self.replies_left: dict[str, int] = {}
        self.sent: list[tuple[str, Order]] = []
        self._fleet = fleet

    async def send(self, order: Order) -> AsyncGenerator[Reply, None]:
        if not self.alive:
            raise ReplicaLostError("nobody is left")
        name = self._fleet.choose(order, list(self.alive))[0]
        self.sent.append((name, order))
        arrived = pickle.loads(pickle.dumps(order))
        async with aclosing(self.alive[name].generate(arrived)) as replies:
            async for reply in replies:
                self.replies_left[name] = self.replies_left.get(name, 1 << 30) - 1
                if self.replies_left[name] < 0:
                    self.alive.pop(name, None)
                    raise ReplicaLostError(f"{name} died")
                yield pickle.loads(pickle.dumps(reply))


def fleet_of(
    *replicas: EngineReplica, max_requests: int = 64, max_attempts: int = 4
) -> tuple[FleetEngine, LocalCalls]:
    fleet = Fleet()
    calls = LocalCalls({replica.name: replica for replica in replicas}, fleet)
    card = pickle.loads(pickle.dumps(replicas[0].card()))
    engine = FleetEngine(calls, fleet, card, max_requests=max_requests, max_attempts=max_attempts)
    return engine, calls
