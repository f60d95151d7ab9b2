"""The two deployments of an application: replicas, and the endpoint before them.

Knows Ray Serve's hooks, never what a request asks for.
"""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator
from contextlib import aclosing
from contextvars import Context
from dataclasses import replace
from typing import Any, Final

from ray import serve
from ray.exceptions import ObjectLostError, RayActorError, RayError, WorkerCrashedError
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from ...entrypoints.server.app import app_of
from ...entrypoints.server.serve_cli import API_KEY_VARIABLE
from ...entrypoints.server.served import Served
from ...errors import QueueFullError
from .fleet import shared_fleet
from .fleet_engine import FleetEngine
from .model_card import ModelCard
from .options import FleetOptions
from .order import Order, ReplicaLostError, Reply
from .replica import EngineReplica
from .session import SessionKeys

GONE: Final = (RayActorError, ObjectLostError, WorkerCrashedError)


class ReplicaDeployment:
    """A replica as Ray Serve runs it: it is closed when its requests are over."""

    def __init__(
        self, model: str, keywords: dict[str, Any], max_requests: int, release: str
    ) -> None:
        name = serve.get_replica_context().replica_id.unique_id
        self._replica = EngineReplica(name, model, keywords, max_requests=max_requests)

    async def card(self) -> ModelCard:
        return self._replica.card()

    async def generate(self, order: Order) -> AsyncGenerator[Reply, None]:
        async with aclosing(self._replica.generate(order)) as replies:
            async for reply in replies:
                yield reply

    def check_health(self) -> None:
        engine = self._replica.engine
        if not engine.is_accepting:
            raise RuntimeError(engine.failure or "the engine is closed")

    async def __del__(self) -> None:
        if hasattr(self, "_replica"):  # or the model could not be loaded
            await self._replica.close()


class RayCalls:
    """Orders through a handle, whose router chooses the replica."""

    def __init__(self, replicas: DeploymentHandle) -> None:
        self._generate = replicas.options(method_name="generate", stream=True)

    async def send(self, order: Order) -> AsyncGenerator[Reply, None]:
        # A call takes the number of the HTTP request that it is made for, and a router that has two
        # waiting calls of one number finds a replica for the first alone. Here it makes its own.
        replies = Context().run(self._generate.remote, order)
        is_over = False
        try:
            async for reply in replies:
                yield reply
            is_over = True
        except BackPressureError as error:
            raise QueueFullError(str(error)) from error
        except RayError as error:
            cause = getattr(error, "cause", None)
            if isinstance(error, GONE) or isinstance(cause, GONE):
                raise ReplicaLostError(first_line(error)) from error
            raise
        finally:
            if not is_over:
                replies.cancel()


def first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


class EndpointDeployment:
    """OpenAI's API over the replicas: the server of `paged-kv serve`, whose engine is the fleet."""

    def __init__(self, replicas: DeploymentHandle, options: dict[str, Any], fleet: str) -> None:
        self._replicas = replicas
        self._options = FleetOptions.model_validate(options)
        self._fleet = fleet

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        options = self._options
        engine = FleetEngine(
            RayCalls(self._replicas),
            shared_fleet(self._fleet, options.policy),
            await self._replicas.card.remote(),
            max_requests=options.max_requests,
            max_attempts=options.max_attempts,
        )
        settings = replace(options.settings, api_key=os.environ.get(API_KEY_VARIABLE) or None)
        return SessionKeys(app_of(Served(engine, settings, engine.figures, engine.card)))
