"""The two deployments of an application: replicas, and the endpoint before them.

Knows Ray Serve's hooks, never what a request asks for.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator
from contextlib import aclosing
from contextvars import Context
from dataclasses import replace
from typing import Any, Final

from ray import serve
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    WorkerCrashedError,
)
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
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

# How Ray tells of a replica that is no more, or of none that is there.
GONE: Final = (
    RayActorError,
    ObjectLostError,
    WorkerCrashedError,
    NodeDiedError,
    OutOfMemoryError,  # a replica that Ray's memory monitor has killed
    DeploymentUnavailableError,
)


CARD_SECONDS: Final = 0.2  # between questions for the card of a model that is being loaded


class ReplicaDeployment:
    """A replica as Ray Serve runs it: it is closed when its requests are over.

    Serves those who name the same `engine`: others are of the application before or after it.
    """

    def __init__(
        self, model: str, keywords: dict[str, Any], max_requests: int, engine: str, release: str
    ) -> None:
        name = serve.get_replica_context().replica_id.unique_id
        self._replica = EngineReplica(name, model, keywords, max_requests=max_requests)
        self._engine = engine

    async def card(self, engine: str) -> ModelCard | None:
        """None for those who want another model or other options of it."""
        return self._replica.card() if engine == self._engine else None

    async def generate(self, order: Order, engine: str) -> AsyncGenerator[Reply, None]:
        if engine != self._engine:  # one of them is on its way out
            lost = ReplicaLostError("this replica has another model, or other options of it")
            yield Reply(replica=self._replica.name, refusal=lost)
            return
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

    def __init__(self, replicas: DeploymentHandle, engine: str) -> None:
        self._generate = replicas.options(method_name="generate", stream=True)
        self._engine = engine

    async def send(self, order: Order) -> AsyncGenerator[Reply, None]:
        # A call takes the number of the HTTP request that it is made for, and a router that has two
        # waiting calls of one number finds a replica for the first alone. Here it makes its own.
        replies = Context().run(self._generate.remote, order, self._engine)
        is_over = False
        try:
            async for reply in replies:
                yield reply
            is_over = True
        except BackPressureError as error:
            raise QueueFullError(str(error)) from error
        except (RayError, DeploymentUnavailableError) as error:
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

    def __init__(
        self, replicas: DeploymentHandle, options: dict[str, Any], fleet: str, engine: str
    ) -> None:
        self._replicas = replicas
        self._options = FleetOptions.model_validate(options)
        self._fleet = fleet
        self._engine = engine

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        options = self._options
        engine = FleetEngine(
            RayCalls(self._replicas, self._engine),
            shared_fleet(self._fleet, options.policy),
            await self._card(),
            max_requests=options.max_requests,
            max_attempts=options.max_attempts,
        )
        settings = replace(options.settings, api_key=os.environ.get(API_KEY_VARIABLE) or None)
        return SessionKeys(app_of(Served(engine, settings, engine.figures, engine.card)))

    async def _card(self) -> ModelCard:
        """That of our model: replicas of another one may still be there."""
        while True:
            card: ModelCard | None = await self._replicas.card.remote(self._engine)
            if card is not None:
                return card
            await asyncio.sleep(CARD_SECONDS)
