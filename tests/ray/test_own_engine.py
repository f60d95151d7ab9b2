"""Our own engine on Ray Serve: replicas that die or are replaced under load, and who is asked."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import pytest
from bench_ray_serve import (
    Ask,
    asks_of,
    death_of,
    deploy,
    disturbed,
    expected_tokens,
    hit_rate,
    replica_names,
    serving,
    shared_prefixes,
    statistics,
)

from paged_kv import DEMO_MODEL, ConfigError
from paged_kv.integrations.ray_serve import build_app

NUM_NEW = 48


@pytest.fixture(scope="module")
def url(cluster: Path) -> Iterator[str]:
    with serving() as url:
        deploy(num_blocks=128, policy="round_robin")
        yield url


@pytest.fixture(scope="module")
def asks() -> list[Ask]:
    return asks_of(60, num_new=NUM_NEW)


@pytest.fixture(scope="module")
def expected(asks: Sequence[Ask]) -> list[list[int]]:
    return expected_tokens(str(DEMO_MODEL), asks)


@pytest.fixture(scope="module")
def by_turns(url: str) -> float:
    """The hit rate of replicas that take turns, while both are there."""
    return hit_rate(url, shared_prefixes(12, 4, 200, num_new=2, seed=1), 1)


def test_a_killed_replica_loses_nothing(
    url: str, asks: list[Ask], expected: list[list[int]], by_turns: float
) -> None:
    outcome = disturbed(url, asks, expected, at=20, disturb=death_of(replica_names()[0]))
    assert (outcome.num_lost, outcome.num_wrong) == (0, 0), outcome.faults
    assert outcome.num_continued, "it had nothing to do"


def test_a_restart_loses_nothing_and_prefixes_are_found_more_often_than_by_turns(
    url: str, asks: list[Ask], expected: list[list[int]], by_turns: float
) -> None:
    """The restart brings the other policy, so that one deployment does for both."""
    before = replica_names()
    outcome = disturbed(
        url, asks, expected, at=20, disturb=lambda: deploy(num_blocks=128, release="next")
    )
    assert (outcome.num_lost, outcome.num_wrong) == (0, 0), outcome.faults
    assert before
    assert not set(before) & set(replica_names())
    by_prefix = hit_rate(url, shared_prefixes(12, 4, 200, num_new=2), 1)
    assert by_prefix >= 1.5 * by_turns, (by_prefix, by_turns)
    running = {name.rpartition("#")[2] for name in replica_names()}
    assert running <= set(statistics(url)["replicas"]), "one was never asked"


def test_what_is_wrong_is_refused_once(url: str) -> None:
    before = statistics(url)["lost_attempts"]
    body = {"prompt": [70000], "max_tokens": 1}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60, trust_env=False)
    assert answer.status_code == 400
    assert "token id 70000 is outside the vocabulary" in answer.json()["error"]["message"]
    assert statistics(url)["lost_attempts"] == before


def test_replicas_come_with_load_and_go_without_it(
    url: str, asks: list[Ask], expected: list[list[int]]
) -> None:
    scaling = {
        "min_replicas": 1,
        "max_replicas": 2,
        "target_ongoing_requests": 4,
        "metrics_interval_s": 0.5,
        "look_back_period_s": 1,
        "upscale_delay_s": 0.5,
        "downscale_delay_s": 2,
    }
    deploy(
        num_replicas=None,
        num_blocks=128,
        max_model_len=256,
        deployment={"autoscaling_config": scaling},
    )
    await_replicas(1)
    deadline = time.monotonic() + 180
    while len(asked_of(url)) < 2:
        assert time.monotonic() < deadline, replica_names()
        outcome = disturbed(url, asks, expected, at=1, disturb=lambda: None)
        assert (outcome.num_lost, outcome.num_wrong) == (0, 0), outcome.faults
    await_replicas(1)
    outcome = disturbed(url, asks[:8], expected[:8], at=8, disturb=lambda: None)
    assert (outcome.num_lost, outcome.num_wrong) == (0, 0), outcome.faults


def test_another_model_is_read_for_as_soon_as_it_is_there(url: str) -> None:
    """The replica before, to which 300 tokens are too many, answers until it is replaced."""
    deploy(num_blocks=128, num_replicas=1)
    answer = httpx.post(
        f"{url}/v1/completions", json={"prompt": [300] * 300, "max_tokens": 1}, trust_env=False,
        timeout=60,
    )  # fmt: skip
    assert answer.status_code == 200, answer.text


def asked_of(url: str) -> set[str]:
    """The replicas that there are and that have been asked."""
    return {name.rpartition("#")[2] for name in replica_names()} & set(statistics(url)["replicas"])


def await_replicas(count: int) -> None:
    deadline = time.monotonic() + 120
    while len(replica_names()) != count:
        assert time.monotonic() < deadline, replica_names()
        time.sleep(0.2)


def test_options_of_serve_pass_through() -> None:
    scaling = {"min_replicas": 1, "max_replicas": 5}
    app = build_app({"kv_format": "int2", "deployment": {"autoscaling_config": scaling}})
    config = app._bound_deployment.init_args[0]._bound_deployment._deployment_config
    assert config.autoscaling_config.max_replicas == 5
    with pytest.raises(ConfigError, match="kv_fromat: "):
        build_app({"kv_fromat": "int2"})
    with pytest.raises(ConfigError, match=r"deployment: .*nosuch.*, got \{'nosuch': 3\}"):
        build_app({"deployment": {"nosuch": 3}})
