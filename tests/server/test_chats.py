"""Chats over HTTP: answers by the model's template, whole and in chunks."""

from __future__ import annotations

import json
from typing import Any

import pytest

from paged_kv import SamplingParams, StructuredOutput
from tests.support.running_server import NAME
from tests.support.streams import events_of

MESSAGES = [
    {"role": "system", "content": "You tell of the sea."},
    {"role": "user", "content": "Where is the whale?"},
]
GREEDY = {"temperature": 0, "max_tokens": 12}
PATH = "/v1/chat/completions"
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["n"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},  # of which the demo model would write only
}


def expected(llm, **options):
    (output,) = llm.generate([MESSAGES], SamplingParams(**{**GREEDY, **options}))
    return output


def joined(chunks: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """The choices of a stream put together, as a whole answer would have them."""
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for part in chunk["choices"]:
            if part["index"] not in choices:
                assert part["delta"] == {"role": "assistant", "content": ""}
                message = {**part["delta"], "refusal": None}
                new = {"index": part["index"], "message": message, "logprobs": None}
                choices[part["index"]] = new
                continue
            choice = choices[part["index"]]
            assert choice.get("finish_reason") is None, "a part after the end"
            choice["finish_reason"] = part["finish_reason"]
            assert bool(part["delta"]) != bool(part["finish_reason"])
            choice["message"]["content"] += part["delta"].get("content", "")
            if part["logprobs"]:
                choice["logprobs"] = choice["logprobs"] or {"content": [], "refusal": None}
                choice["logprobs"]["content"] += part["logprobs"]["content"]
            if "token_ids" in part:
                choice["token_ids"] = choice.get("token_ids", []) + part["token_ids"]
    return choices


def test_a_greedy_answer_is_the_engines(server, llm):
    output = expected(llm)
    body = server.post(PATH, messages=MESSAGES, return_token_ids=True, **GREEDY).json()
    (choice,) = body["choices"]
    assert choice == {
        "index": 0,
        "message": {"role": "assistant", "content": output.text, "refusal": None},
        "logprobs": None,
        "finish_reason": "length",
        "token_ids": output.token_ids,
    }
    assert body["prompt_token_ids"] == output.prompt_token_ids
    assert (body["object"], body["model"]) == ("chat.completion", NAME)
    assert body["id"].startswith("chatcmpl-")
    assert body["usage"]["completion_tokens"] == 12


ASKED = {
    "plain": {},
    "samples": {"n": 3, "seed": 1, "temperature": 1.0},
    "log-probabilities": {"logprobs": True, "top_logprobs": 3},
    "their own alone": {"logprobs": True},
    "token ids": {"return_token_ids": True},
    "stop strings": {"stop": "the", "max_tokens": 40},
    "a form": {"response_format": {"type": "json_object"}, "max_tokens": 20},
}


@pytest.mark.parametrize("options", ASKED.values(), ids=ASKED.keys())
def test_a_stream_says_what_a_whole_answer_says(server, options):
    asked = {"messages": MESSAGES, **GREEDY, **options}
    server.post(PATH, **asked)  # what it stores both others find, and round alike
    whole = server.post(PATH, **asked).json()
    stream_options = {"include_usage": True}
    chunks = events_of(server.post(PATH, **asked, stream=True, stream_options=stream_options))
    assert joined(chunks) == {choice["index"]: choice for choice in whole["choices"]}
    assert chunks[0].get("prompt_token_ids") == whole.get("prompt_token_ids")
    *parts, last = chunks
    assert all(part["usage"] is None for part in parts)
    assert last["choices"] == []
    for usage in (last["usage"], whole["usage"]):  # the second one finds what the first stored
        del usage["prompt_tokens_details"]
    assert last["usage"] == whole["usage"]
    assert {(c["object"], c["model"]) for c in chunks} == {("chat.completion.chunk", NAME)}
    assert len({(chunk["id"], chunk["created"]) for chunk in chunks}) == 1


def test_log_probabilities_have_texts_and_bytes(server, llm):
    output = expected(llm, logprobs=2)
    body = server.post(PATH, messages=MESSAGES, logprobs=True, top_logprobs=2, **GREEDY).json()
    content = body["choices"][0]["logprobs"]["content"]
    found = [entry["logprob"] for entry in content]
    assert found == pytest.approx(
        [each.logprob for each in output.completions[0].logprobs], rel=1e-4
    )
    assert bytes(byte for entry in content for byte in entry["bytes"]).decode() == output.text
    for entry in content:
        assert len(entry["top_logprobs"]) == 2
        best = {key: entry["top_logprobs"][0][key] for key in ("token", "logprob", "bytes")}
        assert best == {key: entry[key] for key in best}  # greedy


def test_parts_of_a_message_are_lines(server):
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    bodies = [
        server.post(PATH, messages=[{"role": "user", "content": content}], **GREEDY).json()
        for content in (parts, "one\ntwo")
    ]
    assert bodies[0]["choices"] == bodies[1]["choices"]
    image = [{"type": "image_url", "image_url": {"url": "x"}}]
    answer = server.post(PATH, messages=[*MESSAGES, {"role": "user", "content": image}])
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == "messages[2].content"
    assert "image_url" in error["message"]


def test_what_a_client_received_can_be_sent_back(server):
    """Fields of an answer that are null, or empty, mean nothing."""
    said = {"role": "assistant", "content": "Ahoy.", "refusal": None, "tool_calls": None}
    answer = server.post(PATH, messages=[*MESSAGES, said, MESSAGES[1]], **GREEDY)
    assert answer.status_code == 200
    said["tool_calls"] = [{"id": "x"}]
    answer = server.post(PATH, messages=[*MESSAGES, said], **GREEDY)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "messages[2].tool_calls"


def test_options_of_the_template(server, llm):
    def ids(**options: Any) -> str:
        body = server.post(PATH, messages=MESSAGES, return_token_ids=True, **GREEDY, **options)
        assert body.status_code == 200, body.text
        return str(llm.tokenizer.decode(body.json()["prompt_token_ids"]))

    assert ids().endswith("whale?\nassistant:")
    assert ids(add_generation_prompt=False).endswith("whale?\n")
    assert ids(continue_final_message=True).endswith("whale?")
    assert ids(chat_template_kwargs={"ending": "<now>"}).endswith("assistant:<now>")
    for wrong in ("tokenize", "chat_template", "tools", "messages", "tokenizer", "max_tokens"):
        answer = server.post(PATH, messages=MESSAGES, chat_template_kwargs={wrong: True})
        assert answer.status_code == 400
        assert wrong in answer.json()["error"]["message"]
    answer = server.post(
        PATH, messages=MESSAGES, add_generation_prompt=True, continue_final_message=True
    )
    assert answer.status_code == 400


@pytest.mark.parametrize("is_named", [False, True])
def test_an_answer_follows_its_schema(server, llm, is_named):
    form: dict[str, Any] = {"structured_outputs": {"json": SCHEMA}}
    if is_named:
        schema = {"name": "digit", "schema": SCHEMA, "strict": True}
        form = {"response_format": {"type": "json_schema", "json_schema": schema}}
    body = server.post(PATH, messages=MESSAGES, **form, temperature=0, max_tokens=30).json()
    (choice,) = body["choices"]
    output = expected(llm, max_tokens=30, structured_output=StructuredOutput(json_schema=SCHEMA))
    assert choice["message"]["content"] == output.text
    assert choice["finish_reason"] == "stop"
    assert 0 <= json.loads(choice["message"]["content"])["n"] <= 9


FORMS = {
    "regex": "[0-9]{3}",
    "choice": ["left", "right"],
    "grammar": 'start: "a" "b"',
}


@pytest.mark.parametrize(("name", "value"), FORMS.items(), ids=FORMS.keys())
def test_other_forms(server, llm, name, value):
    output = expected(llm, structured_output=StructuredOutput(**{name: value}))
    body = server.post(PATH, messages=MESSAGES, structured_outputs={name: value}, **GREEDY).json()
    assert body["choices"][0]["message"]["content"] == output.text


def test_an_answer_without_a_limit_ends_with_the_model(server):
    message = {"role": "user", "content": "x " * 400}
    body = server.post(PATH, messages=[message], temperature=0).json()
    usage = body["usage"]
    assert body["choices"][0]["finish_reason"] in ("stop", "length")
    assert usage["total_tokens"] <= 1024
    assert usage["total_tokens"] == 1024 or body["choices"][0]["finish_reason"] == "stop"


def test_both_names_of_a_limit(server):
    for options in ({"max_tokens": 3}, {"max_completion_tokens": 3}):
        body = server.post(PATH, messages=MESSAGES, temperature=0, **options).json()
        assert body["usage"]["completion_tokens"] == 3
    answer = server.post(PATH, messages=MESSAGES, max_tokens=3, max_completion_tokens=4)
    assert answer.status_code == 400


def test_a_windowed_answer_goes_beyond_the_model(server):
    window = {"num_sink_tokens": 4, "window_size": 64}
    body = server.post(
        PATH, messages=MESSAGES, sink_window=window, ignore_eos=True, temperature=0, max_tokens=80
    ).json()
    assert body["usage"]["completion_tokens"] == 80
    answer = server.post(PATH, messages=MESSAGES, sink_window=window)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "max_tokens"
