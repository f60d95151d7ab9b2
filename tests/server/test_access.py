"""Who may ask, and what is told to whom: keys, origins, logs, and what a server says of itself."""

from __future__ import annotations

import logging

import httpx
import pytest

from paged_kv import ConfigError, __version__
from paged_kv.entrypoints.server.settings import ServerSettings
from tests.support.running_server import running

KEY = "a-key-of-some-length"
OPEN = ["/health", "/ready", "/ping", "/version"]
CLOSED = [
    ("GET", "/v1/models"),
    ("GET", "/v1/models/demo"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/embeddings"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/statistics"),
    ("GET", "/metrics"),
    ("GET", "/nothing"),
]
ORIGIN = "https://app.example"


@pytest.fixture(scope="module")
def server(llm):
    with running(llm, api_key=KEY, allow_origins=[ORIGIN]) as server:
        yield server


@pytest.mark.parametrize("path", OPEN)
def test_the_state_is_open(server, path):
    assert server.get(path).status_code == 200


WRONG_KEYS = [
    {},
    {"Authorization": "Bearer other"},
    {"Authorization": f"Bearer {KEY}x"},
    {"Authorization": f"Bearer {KEY[:-1]}"},
    {"Authorization": "Bearer"},
    {"Authorization": KEY},
    {"Authorization": f"Basic {KEY}"},
    {"Authorization": b"Bearer \xff\xfe"},
    [("Authorization", f"Bearer {KEY}"), ("Authorization", "Bearer other")],
]


def test_all_else_needs_the_key(server):
    for method, path in CLOSED:
        for headers in WRONG_KEYS[:2]:
            answer = server.client.request(method, path, headers=headers)
            assert answer.status_code == 401, path
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
        answer = server.client.request(method, path, headers={"Authorization": f"bearer {KEY}"})
        assert answer.status_code != 401, path
    for headers in WRONG_KEYS:
        assert server.client.get("/v1/models", headers=headers).status_code == 401, headers


def test_a_body_is_not_read_without_the_key(server):
    with server.connect() as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: 1000\r\n\r\n"
        )
        assert connection.recv(1000).startswith(b"HTTP/1.1 401 ")


def test_pages_of_an_origin_that_is_allowed_may_read_answers(server):
    asking = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-any"}
    for origin, is_allowed in ((ORIGIN, True), ("https://other.example", False)):
        headers = {"Origin": origin}
        before = server.client.options("/v1/models", headers={**headers, **asking})
        assert (before.status_code == 200) == is_allowed
        answer = server.client.get("/v1/models", headers=headers)
        assert answer.status_code == 401
        assert answer.headers.get("access-control-allow-origin") == (origin if is_allowed else None)


def test_no_page_may_read_answers_unless_it_is_allowed(llm):
    with running(llm) as server:
        for path in ("/v1/models", "/health"):
            answer = server.client.get(path, headers={"Origin": ORIGIN})
            assert not [name for name in answer.headers if name.startswith("access-control")]


def test_no_log_tells_what_is_asked_or_answered(llm, caplog):
    caplog.set_level(logging.DEBUG)
    word = "Queequeg"
    with running(llm, model_name="ship") as server:
        messages = [{"role": "user", "content": word}]
        server.post("/v1/completions", prompt=word, max_tokens=2, user=word)
        server.post("/v1/completions", prompt=word, temperature=-1)
        server.post("/v1/completions", prompt=word, temperature=word)
        server.post("/v1/completions", prompt=word * 2000, cache_salt=word)
        server.post("/v1/chat/completions", messages=messages, max_tokens=2, stream=True)
        server.post("/v1/chat/completions", messages=[{"role": word}])
        server.post("/tokenize", prompt=word)
        httpx.post(server.url + "/v1/completions", content=f'{{"prompt": "{word}')
    assert "POST" in caplog.text
    assert word not in caplog.text


def test_what_a_server_says_of_itself(llm):
    with running(llm) as server:
        assert server.get("/health").json() == {"status": "alive"}
        assert server.post("/ping").json() == {"status": "alive"}
        assert server.get("/ready").json() == {"status": "ready"}
        assert server.get("/version").json() == {"version": __version__}
        assert server.get("/statistics").json()["model"] == "demo"
        assert "vllm:num_requests_running" in server.get("/metrics").text
        for path in ("/docs", "/openapi.json", "/redoc"):
            assert server.get(path).status_code == 404


def test_settings_that_cannot_be_are_refused():
    for name, value in {
        "model_name": "",
        "api_key": "",
        "max_body": 0,
        "max_requests": 0,
        "max_connections": 0,
        "min_priority": 0.5,
        "request_timeout": 0,
        "drain_timeout": -1,
        "allow_origins": "x",
    }.items():
        with pytest.raises(ConfigError, match=name):
            ServerSettings(**{"model_name": "x", name: value})
    for origin in ("foo", "http://", "https://a.b/c", "https://a b", ""):
        with pytest.raises(ConfigError, match="allow_origins must be a list of origins"):
            ServerSettings(model_name="x", allow_origins=["https://a.b:80", origin])
    assert ServerSettings(model_name="x", allow_origins=["*", "https://a.b:80"]).allow_origins
    with pytest.raises(ConfigError) as refused:
        ServerSettings(model_name="x", api_key="sécret")
    assert "cret" not in str(refused.value)
