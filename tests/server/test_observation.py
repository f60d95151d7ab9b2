"""A whole server, and what it tells of itself over HTTP, in its log and to routers."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from paged_kv.entrypoints.cli import main
from paged_kv.entrypoints.server import event_publisher, serve_cli
from tests.support.router import RouterIndex, Subscriber

SECONDS = 60.0


def beside(use: Callable[[], None]) -> tuple[threading.Thread, list[BaseException]]:
    """A thread that uses a server, and then ends it by a signal."""
    faults: list[BaseException] = []

    def run() -> None:
        try:
            use()
        except BaseException as fault:
            faults.append(fault)
        os.kill(os.getpid(), signal.SIGTERM)

    return threading.Thread(target=run), faults


def test_a_server_tells_of_the_requests_that_it_has_answered(monkeypatch, capfd):
    urls: list[str] = []
    publishers: list[event_publisher.EventPublisher] = []
    bind, make = serve_cli.bound_socket, event_publisher.EventPublisher

    def bound(host: str, port: int) -> Any:
        listener = bind(host, port)
        urls.append(f"http://127.0.0.1:{listener.getsockname()[1]}")
        return listener

    def made(*arguments: Any, **options: Any) -> event_publisher.EventPublisher:
        publishers.append(make(*arguments, **options))
        return publishers[-1]

    monkeypatch.setattr(serve_cli, "bound_socket", bound)
    monkeypatch.setattr(event_publisher, "EventPublisher", made)
    told: dict[str, Any] = {}

    def use() -> None:
        deadline = time.monotonic() + SECONDS
        while not publishers:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        (url,) = urls
        with httpx.Client(base_url=url, timeout=SECONDS, trust_env=False) as client:
            body = {"prompt": [7] * 40, "max_tokens": 3, "ignore_eos": True}
            for _ in range(2):
                assert client.post("/v1/completions", json=body).status_code == 200
            told["statistics"] = client.get("/statistics").json()
            told["metrics"] = client.get("/metrics")
        assert main(["top", url, "--once"]) == 0
        endpoint = publishers[0].endpoint.replace("0.0.0.0", "127.0.0.1")
        replays = publishers[0].replay_endpoint.replace("0.0.0.0", "127.0.0.1")
        index = RouterIndex(told["statistics"]["blocks"]["tokens_per_open_block"])
        with Subscriber(endpoint, replays) as subscriber:
            while not (batches := subscriber.replay(0)):
                assert time.monotonic() < deadline
        for _, payload in batches:
            index.apply(payload)
        told["known"] = index.num_tokens([7] * 40)

    thread, faults = beside(use)
    thread.start()
    events = ["--kv-events", "tcp://*:0", "--kv-events-replay", "tcp://*:0"]
    settings = ["--kv-format", "native", "--num-blocks", "64", "--log-format", "json"]
    assert main(["serve", "--port", "0", *settings, *events]) == 0
    thread.join()
    assert not faults
    assert told["known"] == 32
    assert told["statistics"]["tokens"]["generated"] == 6
    assert told["statistics"]["prefix_cache"]["hit_tokens"] == 32
    assert told["metrics"].headers["content-type"].startswith("text/plain")
    families = {f.name: f for f in text_string_to_metric_families(told["metrics"].text)}
    assert families["vllm:generation_tokens"].samples[0].value == 6
    assert families["vllm:generation_tokens"].samples[0].labels["model_name"] == "demo"
    said = capfd.readouterr()
    assert "demo in native" in said.out
    lines = [json.loads(line) for line in said.err.splitlines() if line.startswith("{")]
    requests = [line for line in lines if line["event"] == "request ended"]
    assert [request["cached_tokens"] for request in requests] == [0, 32]
    assert any(line["event"].startswith("serving 'demo' at http://") for line in lines)
    assert any(line["event"].startswith("ending") for line in lines)
