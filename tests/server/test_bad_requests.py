"""Requests that are refused: with a status and a reason, in OpenAI's form, and nothing else."""

from __future__ import annotations

import json
import resource
import time

import pytest

from tests.support.running_server import running

JSON = {"Content-Type": "application/json"}
PATH = "/v1/completions"
MAX_BODY = 100_000


@pytest.fixture(scope="module")
def server(llm):
    with running(llm, max_body=MAX_BODY, max_requests=4) as server:
        yield server
        assert not server.engine.submitted
        assert server.engine.num_requests == 0


def refusal(answer, status: int, param: str | None = None) -> str:
    """The message of an answer that refuses, which must have OpenAI's form."""
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    assert body["error"]["type"] == ("server_error" if status >= 500 else "invalid_request_error")
    assert body["error"]["param"] == param
    message = body["error"]["message"]
    assert isinstance(message, str)
    assert 0 < len(message) < 300
    return message


NO_JSON = {
    "nothing": b"",
    "a half": b'{"prompt": "x"',
    "more than one": b'{"prompt": "x"}{}',
    "single quotes": b"{'prompt': 'x'}",
    "not UTF-8": b'{"prompt": "\xff\xfe"}',
    "half a surrogate pair": b'{"prompt": "\\ud800"}',
    "NaN": b'{"prompt": "x", "temperature": NaN}',
    "infinity": b'{"prompt": "x", "temperature": -Infinity}',
    "10000 digits": b'{"prompt": "x", "seed": ' + b"9" * 10_000 + b"}",
    "deep lists": b'{"prompt": ' + b"[" * 20_000 + b"]" * 20_000 + b"}",
    "deep objects": b'{"prompt":' * 9_000 + b"1" + b"}" * 9_000,
    "a list": b'["x"]',
    "text": b'"x"',
    "null": b"null",
}


@pytest.mark.parametrize("content", NO_JSON.values(), ids=NO_JSON.keys())
def test_what_is_no_json_object(server, content):
    message = refusal(server.client.post(PATH, content=content, headers=JSON), 400)
    assert "JSON" in message


WRONG = [
    ({"prompt": None}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": [1.0]}, "prompt"),
    ({"prompt": ["x", 1]}, "prompt"),
    ({"prompt": {"a": 1}}, "prompt"),
    ({"prompt": ["x"] * 5}, "prompt"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": "1"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"temperature": 10**400}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"n": 0}, "n"),
    ({"n": 129}, "n"),
    ({"n": 1.5}, "n"),
    ({"n": 3, "best_of": 2}, "best_of"),
    ({"n": 1, "best_of": 2, "stream": True}, "best_of"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"seed": 2**64}, "seed"),
    ({"stop": 3}, "stop"),
    ({"stop": [""]}, "stop"),
    ({"stop_token_ids": [99999]}, "stop_token_ids"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"99999": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 1e9}}, "logit_bias"),
    ({"stream": 1}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage"),
    ({"sink_window": {"window_size": 0}}, "window_size"),
    ({"sink_window": {"size": 64}}, "sink_window.size"),
    ({"sink_window": 64}, "sink_window"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "("}}, "structured_output"),
    ({"structured_outputs": {"regex": ""}}, "structured_outputs.regex"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
    ({"structured_outputs": {"json": True}}, "structured_outputs.json"),
    ({"adapter": "other"}, None),
    ({"cache_salt": ""}, "cache_salt"),
    ({"priority": 2**40}, "priority"),
    ({"priority": -1}, "priority"),
]


def test_wrong_values_are_named(server):
    refusal(server.post(PATH), 400, "prompt")
    for options, param in WRONG:
        answer = server.post(PATH, **{"prompt": "x", **options})
        submitted, server.engine.submitted = server.engine.submitted, []
        message = refusal(answer, 400, param)
        assert param is None or param.rpartition(".")[2] in message.replace("[", "."), options
        for _, params, _ in submitted:  # what is held to the vocabulary, and forms
            assert params is not None


WRONG_CHATS = [
    ({}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "captain", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": "x", "mood": 1}]}, "messages[0].mood"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": 2}, "logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
]


def test_wrong_chats_are_named(server):
    for options, param in WRONG_CHATS:
        default = {"messages": [{"role": "user", "content": "x"}]} if options else {}
        answer = server.post("/v1/chat/completions", **{**default, **options})
        refusal(answer, 400, param)


def test_a_prompt_that_is_too_long(server):
    for prompt in ("x " * 4000, [5] * 1024):
        answer = server.post(PATH, prompt=prompt)
        refusal(answer, 400)
        assert answer.json()["error"]["code"] == "context_length_exceeded"
    server.engine.submitted.clear()


def test_paths_methods_and_types(server):
    refusal(server.get("/v1/nothing"), 404)
    refusal(server.get(PATH), 405)
    assert server.get(PATH).headers["allow"] == "POST"
    for headers in ({}, {"Content-Type": "text/plain"}):
        answer = server.client.post(PATH, content=b'{"prompt": "x"}', headers=headers)
        refusal(answer, 415)
    answer = server.post(PATH, prompt="x", model="other")
    refusal(answer, 404, "model")
    assert answer.json()["error"]["code"] == "model_not_found"
    assert server.get("/v1/models/other").json() == answer.json()


def test_there_are_no_embeddings_and_none_are_made_up(server):
    message = refusal(server.post("/v1/embeddings", input="x", model="demo"), 400)
    assert "embeddings" in message


def response_to(server, *parts: bytes) -> bytes:
    """What comes back while no more is sent."""
    with server.connect() as connection:
        for part in parts:
            connection.sendall(part)
        received = b""
        while not received.endswith(b"}}"):
            received += connection.recv(65536)
        return received


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


def test_a_large_body_is_refused_before_it_is_sent(server):
    answer = response_to(server, HEAD + b"Content-Length: 100000000\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"body_too_large" in answer


def test_a_body_without_a_length_is_refused_at_the_limit(server):
    chunk = b"8000\r\n" + b" " * 0x8000 + b"\r\n"
    answer = response_to(server, HEAD + b"Transfer-Encoding: chunked\r\n\r\n", *[chunk] * 4)
    assert answer.startswith(b"HTTP/1.1 413 ")


def test_a_hundred_megabytes_take_no_memory(server):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    part = b" " * (1 << 20)
    with server.connect() as connection:
        connection.sendall(HEAD + b"Content-Length: 104857600\r\n\r\n")
        for _ in range(100):
            connection.sendall(part)
        assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")  # it still serves
        deadline, received = time.monotonic() + 20, b""
        while b"alive" not in received and time.monotonic() < deadline:
            received += connection.recv(1000)
    assert b"alive" in received
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # KiB


def test_a_body_at_the_limit_is_read(server):
    content = json.dumps({"prompt": ""}).encode()
    answer = server.client.post(
        PATH, content=content + b" " * (MAX_BODY - len(content)), headers=JSON
    )
    refusal(answer, 400, "prompt")
    answer = server.client.post(
        PATH, content=content + b" " * (MAX_BODY - len(content) + 1), headers=JSON
    )
    refusal(answer, 413)
