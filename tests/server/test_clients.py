"""Clients that know nothing of us: the openai package and curl."""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import Any

import openai
import pytest

from paged_kv import SamplingParams
from tests.support.running_server import NAME, SECONDS, running

KEY = "key"
MESSAGES: Any = [{"role": "user", "content": "Where is the whale?"}]
SCHEMA = {
    "type": "object",
    "properties": {"sea": {"enum": ["calm", "rough"]}},
    "required": ["sea"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")


@pytest.fixture(scope="module")
def server(llm):
    with running(llm, api_key=KEY, max_requests=2) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(
        base_url=server.url + "/v1", api_key=KEY, max_retries=0, timeout=SECONDS
    ) as client:
        yield client


def greedy(llm, prompt, **options) -> Any:
    (output,) = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=8, **options))
    return output


def test_completions(client, llm):
    found = client.completions.create(
        model=NAME, prompt="The sea", max_tokens=8, temperature=0, logprobs=1, echo=True
    )
    assert found.choices[0].text == "The sea" + greedy(llm, "The sea").text
    assert found.usage.completion_tokens == 8
    assert found.choices[0].logprobs.token_logprobs[0] is None
    stream = client.completions.create(
        model=NAME, prompt=["The sea", "A ship"], max_tokens=8, temperature=0, stream=True
    )
    texts = ["", ""]
    for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [greedy(llm, prompt).text for prompt in ("The sea", "A ship")]


def test_chats(client, llm):
    output = greedy(llm, MESSAGES, logprobs=2)
    found = client.chat.completions.create(
        model=NAME,
        messages=MESSAGES,
        max_completion_tokens=8,
        temperature=0,
        n=2,
        logprobs=True,
        top_logprobs=2,
        user="somebody",
        extra_body={"return_token_ids": True, "cache_salt": "s"},
    )
    assert [choice.message.content for choice in found.choices] == [output.text] * 2
    logprobs = [entry.logprob for entry in found.choices[1].logprobs.content]
    assert logprobs == pytest.approx(
        [each.logprob for each in output.completions[0].logprobs], rel=1e-4
    )
    assert found.usage.prompt_tokens_details.cached_tokens is not None
    assert found.choices[0].token_ids == output.token_ids


def test_a_stream_of_a_chat(client, llm):
    output = greedy(llm, MESSAGES)
    stream = client.chat.completions.create(
        model=NAME,
        messages=MESSAGES,
        max_tokens=8,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, last = stream
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == output.text
    assert chunks[-1].choices[0].finish_reason == "length"
    assert last.usage.completion_tokens == 8


def test_a_schema_is_followed(client):
    found = client.chat.completions.create(
        model=NAME,
        messages=MESSAGES,
        seed=3,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "weather", "schema": SCHEMA, "strict": True},
        },
    )
    assert json.loads(found.choices[0].message.content)["sea"] in ("calm", "rough")


def test_models(client):
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME


def test_errors_are_those_of_the_client(client, server):
    with pytest.raises(openai.BadRequestError, match="suffix") as refused:
        client.completions.create(model=NAME, prompt="x", suffix="y")
    assert refused.value.param == "suffix"
    with pytest.raises(openai.BadRequestError, match="tools"):
        client.chat.completions.create(
            model=NAME,
            messages=MESSAGES,
            tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}],
        )
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model=NAME, prompt="x " * 3000)
    assert refused.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError, match="other"):
        client.completions.create(model="other", prompt="x")
    with pytest.raises(openai.BadRequestError, match="embeddings"):
        client.embeddings.create(model=NAME, input="x")
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    server.engine.is_dry = True
    with pytest.raises(openai.InternalServerError, match="dry"):
        client.completions.create(model=NAME, prompt="x", stream=True)
    server.engine.is_dry = False


def test_a_full_queue_is_a_rate_limit(client):
    asked: Any = {"model": NAME, "prompt": "x", "max_tokens": 500, "stream": True}
    options = {"extra_body": {"ignore_eos": True}}
    with (
        client.completions.create(**asked, **options) as first,
        client.completions.create(**asked, **options) as second,
    ):
        assert next(first).choices
        assert next(second).choices
        with pytest.raises(openai.RateLimitError):
            client.completions.create(model=NAME, prompt="x")


def curl(server, path: str, *options: str) -> str:
    command = ["curl", "-sS", "--max-time", "30", "-H", f"Authorization: Bearer {KEY}"]
    result = subprocess.run(
        [*command, *options, server.url + path], capture_output=True, text=True, check=True
    )
    return result.stdout


@needs_curl
def test_curl(server, llm):
    body = json.dumps({"model": NAME, "prompt": "The sea", "max_tokens": 8, "temperature": 0})
    as_json = ("-H", "Content-Type: application/json", "-d")
    text = greedy(llm, "The sea").text
    assert json.loads(curl(server, "/v1/completions", *as_json, body))["choices"][0]["text"] == text
    streamed = curl(server, "/v1/completions", "-N", *as_json, body[:-1] + ', "stream": true}')
    *events, done = streamed.strip().split("\n\n")
    assert done == "data: [DONE]"
    assert "".join(json.loads(e[6:])["choices"][0]["text"] for e in events) == text
    assert json.loads(curl(server, "/v1/models"))["data"][0]["id"] == NAME


@needs_curl
def test_curl_learns_at_once_that_a_body_is_too_large(server, tmp_path):
    file = tmp_path / "body"
    with file.open("wb") as body:
        body.truncate(100 << 20)
    options = ("-H", "Content-Type: application/json", "--data-binary", f"@{file}")
    told = curl(server, "/v1/completions", *options, "-w", "%{http_code} %{size_upload}")
    answer, _, end = told.rpartition("}")
    assert json.loads(answer + "}")["error"]["code"] == "body_too_large"
    code, size = end.split()
    assert code == "413"
    assert int(size) < 1 << 20
