"""`paged-kv top`: what it shows of a server, and of one that is not there."""

from __future__ import annotations

import copy
import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from rich.console import Console

from paged_kv.entrypoints import top_cli
from paged_kv.entrypoints.cli import main
from paged_kv.entrypoints.server_view import (
    Reading,
    ServerView,
    difference,
    histograms_of,
    quantile,
    shares,
)
from paged_kv.entrypoints.top_cli import server_url
from paged_kv.errors import InvalidRequestError

FIGURES: dict[str, Any] = {
    "model": "smollm",
    "kv_format": "int4",
    "uptime_seconds": 12345.6,
    "requests": {"running": 3, "waiting": 2, "swapped": 1, "ended": {"stop": 7, "length": 1}},
    "blocks": {"total": 100, "head": 3, "body": 40, "tail": 6, "cached": 30, "free": 21},
    "bytes": {"total": 1 << 30, "used": 1 << 29, "wasted": 1 << 20, "cached": 1 << 28},
    "prefix_cache": {"query_tokens": 1000, "hit_tokens": 250, "hit_rate": 0.25},
    "tokens": {"generated_per_second": 41.25, "prompt_per_second": 120.0},
    "drafts": {"tried": 9, "accepted": 4},
    "steps": 77,
    "preemptions": 5,
}
EXPOSITION = """# HELP vllm:inter_token_latency_seconds x
vllm:inter_token_latency_seconds_bucket{engine="0",le="0.01",model_name="a le=\\"7\\""} 0.0
vllm:inter_token_latency_seconds_bucket{engine="0",le="0.02",model_name="a le=\\"7\\""} 80.0
vllm:inter_token_latency_seconds_bucket{engine="0",le="0.1",model_name="a le=\\"7\\""} 100.0
vllm:inter_token_latency_seconds_bucket{engine="0",le="+Inf",model_name="a le=\\"7\\""} 100.0
vllm:time_to_first_token_seconds_bucket{le="0.5"} 1.0
vllm:time_to_first_token_seconds_bucket{le="+Inf"} 2.0
"""


class Server:
    """Answers as told, on a port of its own."""

    def __init__(self) -> None:
        self.status = 200
        self.answers = {"/statistics": json.dumps(FIGURES), "/metrics": EXPOSITION}
        self.api_key = ""
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                is_allowed = self.headers.get("Authorization", "") == server.api_key
                self.send_response(server.status if is_allowed else 401)
                self.end_headers()
                self.wfile.write(server.answers.get(self.path, "").encode())

            def log_message(self, *arguments: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,))
        self._thread.start()

    def close(self) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "118")
    monkeypatch.delenv("PAGED_KV_API_KEY", raising=False)


def shown(view: ServerView, width: int = 118) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(view.frame(width))
    text: str = console.file.getvalue()
    return text


def test_once_prints_one_frame_of_everything(server, capsys):
    assert main(["top", server.url, "--once"]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert lines[0].split(None, 1) == [
        "server", f"smollm in int4 at {server.url}, up 3:25:45"
    ]  # fmt: skip
    rest = "\n".join(lines[1:])
    for text in (
        "3 running, 2 waiting (1 swapped); ended: 7 stop, 1 length",
        "41.2 generated, 120.0 of prompts",
        "25.0% of all prompts' tokens",
        "p50 500.0 ms, p99 500.0 ms",  # beyond the last bound
        "p50 16.2 ms, p99 96.0 ms",
        "whole request  -",
        "512.0 MiB used, 1.0 MiB wasted, 256.0 MiB cached, of 1.0 GiB",
        "77, 5 preemptions; 4 of 9 drafts accepted",
        "█ 3 head  ▓ 40 body  ▒ 6 tail  ░ 30 cached  · 21 free  of 100",
        "███▓▓▓▓",
    ):
        assert text in rest, text


def test_the_bar_has_its_whole_width_and_something_of_each_kind():
    assert shares([3, 40, 6, 30, 21], 100) == [3, 40, 6, 30, 21]
    assert shares([1, 0, 1, 0, 10_000], 50) == [1, 0, 1, 0, 48]
    assert shares([0, 0, 0, 0, 0], 10) == [10, 0, 0, 0, 0]
    assert shares([1, 1, 1, 1, 1], 12) == [4, 2, 2, 2, 2]


def test_quantiles_are_those_of_prometheus():
    histograms = histograms_of(EXPOSITION)
    latency = histograms["vllm:inter_token_latency_seconds"]
    assert latency == {0.01: 0, 0.02: 80, 0.1: 100, float("inf"): 100}
    assert quantile(latency, 0.4) == pytest.approx(0.015)
    assert quantile(latency, 0.9) == pytest.approx(0.06)
    assert quantile(histograms["vllm:time_to_first_token_seconds"], 0.99) == 0.5
    assert quantile(difference(latency, latency), 0.5) is None
    assert quantile({}, 0.5) is None


def test_a_later_frame_tells_of_the_time_since_the_one_before():
    view, later = ServerView("u"), copy.deepcopy(FIGURES)
    view.show(Reading(1.0, FIGURES, histograms_of(EXPOSITION)))
    later["uptime_seconds"] += 1
    later["prefix_cache"] = {"query_tokens": 1100, "hit_tokens": 340, "hit_rate": 0.309}
    newer = EXPOSITION.replace('le="0.1",', 'le="0.1",x="",')
    for old, new in (("0.0\n", "10.0\n"), ("80.0", "90.0"), ("100.0", "110.0")):
        newer = newer.replace(f" {old}", f" {new}")
    view.show(Reading(2.0, later, histograms_of(newer)))
    text = shown(view)
    assert "90.0% now, 30.9% of all prompts' tokens" in text
    assert "next token     p50 5.0 ms, p99 9.9 ms" in text
    assert "first token    -" in text
    view.show(Reading(3.0, later, histograms_of(newer)))
    assert " now," not in shown(view)
    view.show(Reading(4.0, {**FIGURES, "uptime_seconds": 1.0}, histograms_of(EXPOSITION)))
    assert "p50 16.2 ms" in shown(view)  # it was started anew


def test_a_narrow_terminal_has_a_frame_too():
    view = ServerView("u")
    view.show(Reading(1.0, FIGURES, {}))
    assert "3 running" in shown(view, 30)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"status": 500}, "answers with status 500"),
        ({"api_key": "Bearer k"}, "status 401: it wants an --api-key, or another one"),
        ({"answers": {"/statistics": "{", "/metrics": ""}}, "does not answer"),
        ({"answers": {"/statistics": "[1]", "/metrics": ""}}, "no server of paged_kv"),
        ({"answers": {"/statistics": '{"n": 1}', "/metrics": ""}}, "no server of paged_kv"),
    ],
)
def test_once_ends_with_the_reason_where_there_is_no_answer(server, capsys, changes, text):
    vars(server).update(changes)
    assert main(["top", server.url, "--once"]) == 2
    assert text in capsys.readouterr().err


def test_a_key_is_sent(server, capsys, monkeypatch):
    server.api_key = "Bearer secret"
    assert main(["top", server.url, "--once", "--api-key", "secret"]) == 0
    monkeypatch.setenv("PAGED_KV_API_KEY", "secret")
    assert main(["top", server.url, "--once"]) == 0
    assert "secret" not in capsys.readouterr().out


def test_a_server_that_goes_away_is_shown_and_asked_again(server, monkeypatch):
    frames: list[str] = []
    show = ServerView.frame

    def note(view: ServerView, width: int) -> object:
        frames.append(shown_frame(show(view, width)))
        return show(view, width)

    def sleep(seconds: float) -> None:
        assert seconds == 0.5
        server.status = {1: 503, 2: 503, 3: 200}.get(len(frames), 200)
        if len(frames) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(ServerView, "frame", note)
    monkeypatch.setattr(top_cli.time, "sleep", sleep)
    assert main(["top", server.url, "--interval", "0.5"]) == 0
    assert ["trying again" in frame for frame in frames] == [False, True, True, False]
    assert all("3 running" in frame for frame in frames)  # what was known stays


def shown_frame(frame: object) -> str:
    console = Console(file=io.StringIO(), width=118, color_system=None)
    console.print(frame)
    text: str = console.file.getvalue()
    return text


def test_where_nobody_listens_is_said(server, capsys):
    server.close()
    assert main(["top", server.url, "--once"]) == 2
    assert "does not answer" in capsys.readouterr().err
    server.close = lambda: None


def test_a_url_may_be_written_as_people_do():
    assert server_url("localhost:8000") == "http://localhost:8000"
    assert server_url("https://host/v1/") == "https://host"
    assert server_url("http://[::1]:8000/") == "http://[::1]:8000"
    for wrong in ("file:///etc/passwd", "ftp://host", "http://", "host:port", ""):
        with pytest.raises(InvalidRequestError, match="a server is at http://HOST:PORT"):
            server_url(wrong)


@pytest.mark.parametrize("interval", ["0", "-1", "nan", "inf"])
def test_an_interval_is_a_time(capsys, interval):
    assert main(["top", "--interval", interval]) == 2
    assert "--interval must be a number above 0" in capsys.readouterr().err
