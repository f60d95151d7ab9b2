"""The application of Ray Serve: an endpoint before replicas. Knows how its parts go together."""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from typing import Any, Final

from ray import serve
from ray.serve.config import RequestRouterConfig

from ...errors import ConfigError
from .deployments import EndpointDeployment, ReplicaDeployment
from .options import FleetOptions

REPLICAS: Final = "replicas"
ENDPOINT: Final = "endpoint"
ROUTER: Final = f"{__package__}.router.FleetRouter"
ENDING: Final = ("graceful_shutdown_timeout_s", "graceful_shutdown_wait_loop_s")  # of both
SPARE: Final = 32  # requests beside those of `max_requests`, which are told so


def application_of(options: FleetOptions) -> serve.Application:
    fleet = f"{options.model}/{REPLICAS}"
    engine = engine_name(options.model, options.llm)
    given = (options.model, options.llm, options.max_ongoing_requests, engine, options.release)
    scaled: dict[str, Any] = {"num_replicas": options.num_replicas or 1}
    if "autoscaling_config" in options.deployment:
        scaled = {}
    router = RequestRouterConfig(
        request_router_class=ROUTER,
        request_router_kwargs={"fleet": fleet, "policy": options.policy},
    )
    try:
        replicas = serve.deployment(
            name=REPLICAS,
            max_ongoing_requests=options.max_ongoing_requests,
            request_router_config=router,
            **scaled,
            **options.deployment,
        )(ReplicaDeployment)
    except (TypeError, ValueError) as error:  # Ray's own checks, some of them of several lines
        told = " ".join(str(error).split())
        raise ConfigError(f"deployment: {told}, got {options.deployment!r}") from error
    ending = {name: options.deployment[name] for name in ENDING if name in options.deployment}
    endpoint = serve.deployment(
        name=ENDPOINT,
        num_replicas=options.num_endpoints,
        max_ongoing_requests=options.max_requests + SPARE,
        ray_actor_options={"num_cpus": 0},
        **ending,
    )(serve.ingress()(EndpointDeployment))
    return endpoint.bind(replicas.bind(*given), options.model_dump(), fleet, engine)


def engine_name(model: str, keywords: Mapping[str, Any]) -> str:
    """What replicas and an endpoint have in common that may talk to each other."""
    told = json.dumps([model, keywords], sort_keys=True, default=repr)
    return sha256(told.encode()).hexdigest()
