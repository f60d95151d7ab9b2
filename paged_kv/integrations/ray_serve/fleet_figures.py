"""What an endpoint has done: requests, hits and losses, of each replica and together.

Knows counts, never requests.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from threading import Lock
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from .order import Reply


@dataclass
class ReplicaCounts:
    """Of one replica; tokens are those of prompts whose answers began there."""

    num_requests: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0


class FleetFigures(Collector):
    """Figures for `GET /statistics` and `GET /metrics` of an endpoint. Any thread may ask."""

    def __init__(self) -> None:
        self._lock = Lock()  # of what follows
        self._replicas: dict[str, ReplicaCounts] = {}
        self.num_output_tokens: int = 0
        self.num_lost_attempts: int = 0
        self.num_lost_requests: int = 0
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def accepted(self, replica: str) -> None:
        with self._lock:
            self._of(replica).num_requests += 1

    def began(self, reply: Reply, num_prompt_tokens: int) -> None:
        with self._lock:
            counts = self._of(reply.replica)
            counts.num_prompt_tokens += num_prompt_tokens
            counts.num_cached_tokens += reply.num_cached_tokens

    def lost(self, *, is_last: bool) -> None:
        with self._lock:
            self.num_lost_attempts += 1
            self.num_lost_requests += is_last

    def _of(self, replica: str) -> ReplicaCounts:
        return self._replicas.setdefault(replica, ReplicaCounts())

    def statistics(self) -> dict[str, Any]:
        with self._lock:
            replicas = {name: asdict(counts) for name, counts in self._replicas.items()}
        num_prompt_tokens = sum(each["num_prompt_tokens"] for each in replicas.values())
        num_cached_tokens = sum(each["num_cached_tokens"] for each in replicas.values())
        return {
            "replicas": replicas,
            "prefix_cache": {
                "query_tokens": num_prompt_tokens,
                "hit_tokens": num_cached_tokens,
                "hit_rate": num_cached_tokens / max(num_prompt_tokens, 1),
            },
            "output_tokens": self.num_output_tokens,
            "lost_attempts": self.num_lost_attempts,
            "lost_requests": self.num_lost_requests,
        }

    def exposition(self) -> bytes:
        return generate_latest(self._registry)

    def collect(self) -> list[CounterMetricFamily]:
        """As prometheus_client asks for it."""
        figures = self.statistics()
        families = []
        for name, text in (
            ("num_requests", "Requests that a replica accepted"),
            ("num_prompt_tokens", "Tokens of their prompts"),
            ("num_cached_tokens", "Of these, found in the replica's prefix cache"),
        ):
            family = CounterMetricFamily(
                f"paged_kv:fleet_{name.removeprefix('num_')}", text, labels=["replica"]
            )
            for replica, counts in figures["replicas"].items():
                family.add_metric([replica], counts[name])
            families.append(family)
        for name, text in (
            ("output_tokens", "Tokens of answers"),
            ("lost_attempts", "Attempts at requests that ended with their replica"),
            ("lost_requests", "Requests whose last attempt did"),
        ):
            families.append(CounterMetricFamily(f"paged_kv:fleet_{name}", text, figures[name]))
        return families
