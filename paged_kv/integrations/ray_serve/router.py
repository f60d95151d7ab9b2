"""How Ray Serve asks which replica a request goes to. Knows replicas by name, decides nothing.

Ray Serve sends the classes of this module to where they are needed, and imports what they use.
"""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from .fleet import Fleet, shared_fleet
from .order import Order


class FleetRouter(RequestRouter):  # type: ignore[misc]
    """Asks the fleet of this process, which knows what each replica has cached."""

    _fleet: Fleet

    def initialize_state(self, **kwargs: Any) -> None:
        self._fleet = shared_fleet(kwargs["fleet"], kwargs["policy"])

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        self._fleet.keep_only([replica.replica_id.unique_id for replica in replicas])

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_died(replica_id)
        self._fleet.forget(replica_id.unique_id)

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Each replica by itself, the best one first: the next is tried where one has no room."""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
        order = order_in(pending_request)
        if order is None:
            return [candidate_replicas]
        replicas = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        return [[replicas[name]] for name in self._fleet.choose(order, list(replicas))]

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any
    ) -> None:
        order = order_in(pending_request)
        if order is not None:
            self._fleet.place(order, replica_id.unique_id)


def order_in(pending_request: PendingRequest | None) -> Order | None:
    """What is asked for, where it is not something else about a replica."""
    given = pending_request.args if pending_request is not None else ()
    return given[0] if given and isinstance(given[0], Order) else None
