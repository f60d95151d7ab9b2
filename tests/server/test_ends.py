"""How requests end that do not end by themselves: clients that leave or do not read, times that
pass, queues that are full, servers that are told to end. Nothing is held afterwards.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from paged_kv.entrypoints import async_request, text_engine
from tests.support.running_server import SECONDS, RunningServer, running
from tests.support.small_llm import raise_once

PATH = "/v1/completions"
ENDLESS = {
    "prompt": "Call me Ishmael.",
    "sink_window": {"num_sink_tokens": 4, "window_size": 64},
    "ignore_eos": True,
    "max_tokens": 1_000_000,
}


def until(is_so: Callable[[], object]) -> None:
    deadline = time.monotonic() + SECONDS
    while not is_so():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.005)


def assert_nothing_is_held(server: RunningServer) -> None:
    until(lambda: not server.engine.num_requests)
    until(lambda: not server.llm.engine.has_unfinished)
    until(lambda: server.llm.memory_stats().used == 0)


@pytest.fixture
def server(llm):
    with running(llm, max_requests=2) as server:
        yield server
        if server.engine.is_accepting:
            assert_nothing_is_held(server)


def send(server: RunningServer, **body: object):
    """A request on a connection of its own, of which nothing is read."""
    content = json.dumps(body).encode()
    connection = server.connect()
    connection.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (len(content), content)
    )
    return connection


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_requests(server, stream):
    with send(server, **ENDLESS, stream=stream) as connection:
        until(lambda: server.llm.statistics().num_running)
        if stream:
            assert connection.recv(10) == b"HTTP/1.1 2"
    assert_nothing_is_held(server)
    assert server.post(PATH, prompt="x", max_tokens=1).status_code == 200


def test_a_client_that_leaves_while_it_waits_for_several(llm):
    with running(llm, max_requests=4) as server:
        with send(server, **{**ENDLESS, "prompt": ["a", "b"], "n": 2}):
            until(lambda: server.llm.statistics().num_running == 4)
        assert_nothing_is_held(server)


def test_a_client_that_does_not_read_holds_up_nobody(server, monkeypatch):
    """Its request waits when what was generated for it is taken by nobody."""
    for module in (text_engine, async_request):
        monkeypatch.setattr(module, "MAX_WAITING", 16)
    large = {"prompt": [5, 6] * 300, "echo": True, "logprobs": 20}  # an echo of a megabyte
    with send(server, **{**ENDLESS, **large}, stream=True) as slow:
        until(lambda: server.llm.statistics().num_running)
        for _ in range(2):
            answer = server.post(PATH, prompt="x", max_tokens=4, temperature=0)
            assert answer.json()["usage"]["completion_tokens"] == 4
        counts = [-1, -2]
        while counts[-1] != counts[-2]:  # it generates no more
            time.sleep(0.3)
            counts.append(server.llm.statistics().num_scheduled_tokens)
            assert len(counts) < 60
        assert server.engine.num_requests == 1
        while server.llm.statistics().num_scheduled_tokens < counts[-1] + 5:
            assert slow.recv(1 << 16), "when it is read it goes on"
    assert_nothing_is_held(server)


def test_more_than_there_is_room_for_is_refused(server):
    with send(server, **ENDLESS), send(server, **ENDLESS, stream=True):
        until(lambda: server.engine.num_requests == 2)
        for options in ({}, {"stream": True}):
            answer = server.post(PATH, prompt="x", **options)
            assert answer.status_code == 429
            assert answer.headers["retry-after"] == "1"
            assert answer.json()["error"]["type"] == "rate_limit_error"
            assert answer.json()["error"]["code"] == "rate_limit_exceeded"
    assert_nothing_is_held(server)
    answer = server.post(PATH, prompt=["x", "y"], max_tokens=1)
    assert len(answer.json()["choices"]) == 2


def test_clients_go_before_others_as_far_as_the_server_lets_them(llm):
    with running(llm, min_priority=-2) as server:
        answers = [server.post(PATH, prompt="x", max_tokens=1, priority=p) for p in (-2, 5, -3)]
    assert [answer.status_code for answer in answers] == [200, 200, 400]
    message = "priority must be at least -2 on this server, got -3"
    assert answers[-1].json()["error"]["message"] == message


def test_connections_beside_those_that_there_may_be_are_refused(llm):
    with running(llm, max_connections=1) as server:
        connections = server.server.server_state.connections
        with server.connect():  # and sends nothing
            until(lambda: len(connections) == 1)
            assert httpx.get(server.url + "/health").status_code == 503
        until(lambda: not connections)
        assert server.get("/health").status_code == 200


def test_every_sample_is_one_of_those_there_is_room_for(server):
    with send(server, **ENDLESS):
        until(lambda: server.engine.num_requests == 1)
        assert server.post(PATH, prompt="x", n=2, max_tokens=1).status_code == 429
        assert server.post(PATH, prompt="x", max_tokens=1).status_code == 200
    assert_nothing_is_held(server)
    assert len(server.post(PATH, prompt="x", n=2, max_tokens=1).json()["choices"]) == 2
    for options, param in (({"n": 3}, "n"), ({"best_of": 3}, "n"), ({"n": 2}, "prompt")):
        prompt = "x" if param == "n" else ["x", "y"]
        answer = server.post(PATH, prompt=prompt, max_tokens=1, **options)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == param


def test_a_list_that_does_not_fit_beside_others_leaves_nothing(server):
    with send(server, **ENDLESS):
        until(lambda: server.engine.num_requests == 1)
        answer = server.post(PATH, prompt=["x", "y"], max_tokens=1000, ignore_eos=True)
        assert answer.status_code == 429
        assert "prompt 1" not in answer.json()["error"]["message"]
        until(lambda: server.engine.num_requests == 1)


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_takes_too_long_ends_with_an_error(llm, stream):
    with running(llm, request_timeout=0.3) as server:
        answer = server.post(PATH, **ENDLESS, stream=stream)
        error = last_error(answer) if stream else answer.json()["error"]
        assert answer.status_code == (200 if stream else 504)
        assert error["code"] == "timeout"
        assert error["type"] == "server_error"
        assert_nothing_is_held(server)


def last_error(answer: httpx.Response) -> dict[str, object]:
    """What a stream that fails says at its end."""
    *events, last, nothing = answer.text.split("\n\n")
    assert events
    assert nothing == ""
    error: dict[str, object] = json.loads(last.removeprefix("data: "))["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error


def test_a_step_that_fails_is_told_and_the_server_goes_on(server, monkeypatch):
    runner = server.llm.engine.runner
    for stream in (False, True):
        faulty = raise_once(runner.run, 4, MemoryError("no more"))
        monkeypatch.setattr(runner, "run", faulty)
        answer = server.post(PATH, **{**ENDLESS, "max_tokens": 20}, stream=stream)
        monkeypatch.undo()
        error = last_error(answer) if stream else answer.json()["error"]
        assert answer.status_code == (200 if stream else 500)
        assert error["type"] == "server_error"
        assert error["message"]
        assert_nothing_is_held(server)
    assert server.post(PATH, prompt="x", max_tokens=1).status_code == 200


def test_an_error_that_nobody_meant_is_not_shown(server, monkeypatch, caplog):
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a secret")

    monkeypatch.setattr(server.engine, "submit", fail)
    for stream in (False, True):
        answer = server.post(PATH, prompt="x", stream=stream)
        assert answer.status_code == 500
        assert answer.json()["error"]["message"] == "an error of the server"
    assert "a secret" in caplog.text  # for whoever runs it


def test_a_server_that_ends_answers_what_it_accepted(server):
    with ThreadPoolExecutor(2) as pool:
        asked = {"prompt": "x", "max_tokens": 60, "ignore_eos": True}
        futures = [pool.submit(server.post, PATH, **asked, stream=s) for s in (False, True)]
        until(lambda: server.engine.num_requests == 2)
        server.stop(closes_client=False)
        until(lambda: not server.engine.is_accepting)
        refused = [
            httpx.get(server.url + "/ready"),
            httpx.post(server.url + PATH, json={"prompt": "x"}),
        ]
        alive = httpx.get(server.url + "/health")
        answers = [future.result() for future in futures]
    server.join()
    for answer in refused:
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "shutting_down"
    assert alive.status_code == 200
    assert answers[0].json()["usage"]["completion_tokens"] == 60
    assert answers[1].text.endswith("data: [DONE]\n\n")


def test_what_is_left_when_it_must_end_gets_an_error(llm):
    with running(llm, drain_timeout=0.2) as server:
        with ThreadPoolExecutor(2) as pool:
            futures = [pool.submit(server.post, PATH, **ENDLESS, stream=s) for s in (False, True)]
            until(lambda: llm.statistics().num_running == 2)
            server.stop(closes_client=False)
            whole, stream = [future.result() for future in futures]
        assert whole.status_code == 503
        assert whole.json()["error"]["code"] == "shutting_down"
        assert last_error(stream)["code"] == "shutting_down"
    assert not llm.engine.has_unfinished


def test_tenants_with_salts_share_nothing(server):
    """Also while both run: a block of one is never found by the other."""
    prompt = "The whale is a mammal. " * 20
    barrier = threading.Barrier(2)

    def cached(salt: str) -> list[int]:
        barrier.wait()
        answers = [
            server.post(PATH, prompt=prompt, cache_salt=salt, max_tokens=1) for _ in range(2)
        ]
        return [a.json()["usage"]["prompt_tokens_details"]["cached_tokens"] for a in answers]

    with ThreadPoolExecutor(2) as pool:
        for first, second in pool.map(cached, ("mine", "yours")):
            assert first == 0
            assert second > 0
