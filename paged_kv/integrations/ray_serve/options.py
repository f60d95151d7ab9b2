"""What an application of Ray Serve is told. Knows values and their ranges, never Ray."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Mapping
from typing import Any, ClassVar, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ...engine.config import EngineConfig
from ...entrypoints.llm import LLM
from ...entrypoints.server.settings import (
    DEFAULT_MAX_REQUESTS,
    DEFAULT_MIN_PRIORITY,
    ServerSettings,
)
from ...errors import ConfigError
from ...models.loading import DEMO_MODEL, parse_dtype
from .fleet import BY_BLOCKS, POLICIES

# What an `LLM` takes and text can say.
NOT_TEXT: Final = {"self", "model", "tokenizer", "speculation", "sink_window", "record_events"}
ENGINE_KEYWORDS: Final = {field.name for field in dataclasses.fields(EngineConfig)}
LLM_KEYWORDS: Final = frozenset(inspect.signature(LLM.__init__).parameters) - NOT_TEXT
TEXTS: Final = {"model", "served_model_name", "release", "policy"}
# What the application says of its engines' deployment.
OWN: Final = {"name", "num_replicas", "max_ongoing_requests", "request_router_config"}


class FleetOptions(BaseModel):
    """`num_replicas` of an `LLM` of `model`, made with the keywords of `llm`.

    `deployment` are further options of Ray Serve's deployment of them, as `autoscaling_config`
    (then without `num_replicas`), `ray_actor_options` or `graceful_shutdown_timeout_s`. Each
    replica takes at most `max_ongoing_requests` at once; `num_endpoints` processes that read HTTP
    take `max_requests` each, of which each sample is one, others get status 429; a `priority` below
    `min_priority` is refused. An order is tried on at most `max_attempts`
    replicas. A new `release` restarts all replicas, one after another.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(
        extra="forbid", frozen=True, coerce_numbers_to_str=True
    )

    model: str = str(DEMO_MODEL)
    served_model_name: str | None = None
    policy: str = BY_BLOCKS
    num_replicas: int | None = Field(None, ge=1)
    num_endpoints: int = Field(1, ge=1)
    max_ongoing_requests: int = Field(64, ge=1)
    max_requests: int = Field(DEFAULT_MAX_REQUESTS, ge=1)
    min_priority: int = DEFAULT_MIN_PRIORITY
    max_attempts: int = Field(4, ge=1)
    request_timeout: float | None = Field(None, gt=0)
    release: str = ""
    llm: dict[str, Any] = Field(default_factory=dict)
    deployment: dict[str, Any] = Field(default_factory=dict)

    @field_validator("policy")
    @classmethod
    def _check_policy(cls, policy: str) -> str:
        if policy not in POLICIES:
            raise ValueError(f"must be one of {', '.join(POLICIES)}")
        return policy

    @field_validator("llm")
    @classmethod
    def _check_keywords(cls, llm: dict[str, Any]) -> dict[str, Any]:
        return known(llm, LLM_KEYWORDS, "keyword of LLM that can be given here")

    @field_validator("deployment")
    @classmethod
    def _check_deployment(cls, deployment: dict[str, Any]) -> dict[str, Any]:
        wrong = sorted(OWN & deployment.keys())
        if wrong:
            raise ValueError(f"{wrong[0]} is not one that can be given here")
        return deployment

    @property
    def settings(self) -> ServerSettings:
        """What the server behind each endpoint is told, but for its key."""
        return ServerSettings(
            model_name=self.served_model_name or self.model,
            max_requests=self.max_requests,
            min_priority=self.min_priority,
            request_timeout=self.request_timeout,
        )


def known(given: dict[str, Any], names: frozenset[str], what: str) -> dict[str, Any]:
    wrong = sorted(given.keys() - names)
    if wrong:
        raise ValueError(f"{wrong[0]} is no {what}")
    return given


def read_options(arguments: Mapping[str, Any]) -> FleetOptions:
    """Fields, and keywords of `LLM` beside them. Raises `ConfigError` for what cannot be, whatever
    the model is."""
    if not isinstance(arguments, Mapping):
        raise ConfigError(f"an application is told by a mapping of names, got {arguments!r}")
    fields: dict[str, Any] = {}
    llm: dict[str, Any] = {}
    for name, value in arguments.items():
        given = value if name in TEXTS else read_value(value)
        (llm if name in LLM_KEYWORDS else fields)[name] = given
    if llm:
        fields["llm"] = {**(fields.get("llm") or {}), **llm}
    try:
        options = FleetOptions.model_validate(fields)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        place = ".".join(map(str, fault["loc"]))
        raise ConfigError(f"{place}: {fault['msg']}, got {fault['input']!r:.200}") from None
    if options.num_replicas is not None and "autoscaling_config" in options.deployment:
        raise ConfigError(
            f"num_replicas {options.num_replicas} and an autoscaling_config: give one of them"
        )
    check_engine(options.llm)
    return options


def check_engine(llm: Mapping[str, Any]) -> None:
    """Raise `ConfigError` now, rather than in replicas that are started again and again."""
    settings = {name: llm[name] for name in ENGINE_KEYWORDS & llm.keys()}
    if "kv_dtype" in settings:
        settings["kv_dtype"] = parse_dtype(settings["kv_dtype"], "kv_dtype")
    EngineConfig(**settings)
    parse_dtype(llm.get("dtype"))


def read_value(value: Any) -> Any:
    """A command line has text alone: numbers, true and lists are written as in JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value
