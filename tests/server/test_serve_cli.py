"""`paged-kv serve`, and the signals that end it."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from paged_kv.entrypoints.cli import main
from paged_kv.entrypoints.server import serve_cli

SECONDS = 60.0


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def serve_while(monkeypatch, use: Callable[[str], Any], *options: str) -> tuple[int, Any]:
    """The exit code of a server, and what its user had while it ran."""
    ports: list[int] = []
    bind = serve_cli.bound_socket

    def noted(host: str, port: int) -> Any:
        listener = bind(host, port)
        ports.append(listener.getsockname()[1])
        return listener

    def run() -> Any:
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            try:
                url = f"http://127.0.0.1:{ports[0]}"
                httpx.get(url + "/health")
                break
            except (IndexError, httpx.ConnectError):
                time.sleep(0.05)
        try:
            return use(url)
        except BaseException:
            for _ in range(3):  # or the server would go on
                signalled(signal.SIGTERM)
            raise

    monkeypatch.setattr(serve_cli, "bound_socket", noted)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(run)
        code = main(
            ["serve", "--port", "0", "--kv-format", "native", "--num-blocks", "64", *options]
        )
        return code, future.result()


def signalled(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_requests_finish(monkeypatch, capfd, number):
    assert threading.current_thread() is threading.main_thread()
    monkeypatch.setenv("PAGED_KV_API_KEY", "from the environment")
    before = signal.getsignal(number)

    def use(url: str) -> list[Any]:
        headers = {"Authorization": "Bearer from the environment"}
        body = {"prompt": "x", "max_tokens": 40, "ignore_eos": True, "stream": True}
        assert httpx.get(url + "/v1/models").status_code == 401
        names = httpx.get(url + "/v1/models", headers=headers).json()["data"]
        with httpx.stream("POST", url + "/v1/completions", json=body, headers=headers) as answer:
            lines = answer.iter_lines()
            first = next(lines)
            signalled(number)
            rest = [line for line in lines if line]
        return [names[0]["id"], answer.status_code, first, rest[-1]]

    code, (name, status, first, last) = serve_while(monkeypatch, use, "--served-model-name", "ship")
    assert code == 0
    assert (name, status, last) == ("ship", 200, "data: [DONE]")
    assert json.loads(first.removeprefix("data: "))["choices"]
    assert signal.getsignal(number) is before
    said = capfd.readouterr().err
    assert "serving 'ship' at http://127.0.0.1:" in said
    assert "environment" not in said


def test_a_second_signal_ends_at_once(monkeypatch):
    def use(url: str) -> str:
        endless = {
            "prompt": "x",
            "sink_window": {"window_size": 64},
            "ignore_eos": True,
            "max_tokens": 1_000_000,
            "stream": True,
        }
        with httpx.stream("POST", url + "/v1/completions", json=endless) as answer:
            lines = answer.iter_lines()
            next(lines)
            signalled(signal.SIGTERM)
            while httpx.get(url + "/ready").status_code == 200:
                time.sleep(0.05)  # two signals at once are one
            signalled(signal.SIGTERM)
            return str([line for line in lines if line][-1])

    code, last = serve_while(monkeypatch, use, "--drain-timeout", "1000")
    assert code == 0
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "shutting_down"


def test_what_cannot_be_is_refused_before_a_model_is_loaded(capfd, monkeypatch):
    monkeypatch.setattr(serve_cli, "load_llm", None)
    taken = serve_cli.bound_socket("127.0.0.1", 0)
    taken.listen()
    port = str(taken.getsockname()[1])
    with taken:
        for options in (
            ["--port", port],
            ["--port", "70000"],
            ["--host", "256.256.256.256"],
            ["--max-body", "x"],
            ["--max-requests", "0"],
            ["--max-connections", "0"],
            ["--request-timeout", "-1"],
        ):
            assert main(["serve", *options]) == 2, options
            assert capfd.readouterr().err.startswith("paged-kv: ")
