"""Completions over HTTP: the tokens of the engine, in OpenAI's form."""

from __future__ import annotations

from typing import Any

import pytest

from paged_kv import SamplingParams
from tests.support.running_server import NAME
from tests.support.streams import events_of

TEXT = "The old man of the sea"
IDS = [40, 41, 42, 300, 7]
GREEDY = {"temperature": 0, "max_tokens": 12}


def expected(llm, prompts, **options):
    return llm.generate(prompts, SamplingParams(**{**GREEDY, **options}))


def joined(chunks) -> dict[int, dict[str, Any]]:
    """The choices of a stream put together, as a whole answer would have them."""
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for part in chunk["choices"]:
            choice = choices.setdefault(part["index"], {"text": "", "logprobs": None})
            assert choice.get("finish_reason") is None, "a part after the end"
            choice["index"] = part["index"]
            choice["text"] += part["text"]
            choice["finish_reason"] = part["finish_reason"]
            for name, values in (part["logprobs"] or {}).items():
                choice["logprobs"] = choice["logprobs"] or {}
                choice["logprobs"].setdefault(name, []).extend(values)
            for name in ("prompt_token_ids", "token_ids"):
                if name in part:
                    choice[name] = choice.get(name, []) + part[name]
    return choices


@pytest.mark.parametrize("prompt", [TEXT, IDS, [TEXT, "A whale"], [IDS, [5]], [TEXT, IDS]])
def test_greedy_tokens_are_those_of_the_engine(server, llm, prompt):
    is_one = isinstance(prompt, str) or isinstance(prompt[0], int)
    outputs = expected(llm, [prompt] if is_one else prompt)
    body = server.post("/v1/completions", prompt=prompt, return_token_ids=True, **GREEDY).json()
    assert [choice["token_ids"] for choice in body["choices"]] == [o.token_ids for o in outputs]
    assert [choice["text"] for choice in body["choices"]] == [o.text for o in outputs]
    assert [c["prompt_token_ids"] for c in body["choices"]] == [o.prompt_token_ids for o in outputs]
    assert [c["index"] for c in body["choices"]] == list(range(len(outputs)))
    num_prompt = sum(len(output.prompt_token_ids) for output in outputs)
    num_new = sum(len(output.token_ids) for output in outputs)
    assert body["object"] == "text_completion"
    assert body["model"] == NAME
    assert body["id"].startswith("cmpl-")
    usage = body["usage"]
    assert usage.pop("prompt_tokens_details").keys() == {"cached_tokens"}
    assert usage == {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_new,
        "total_tokens": num_prompt + num_new,
    }


ASKED = {
    "plain": {},
    "several prompts": {"prompt": [TEXT, IDS, "A"]},
    "samples": {"n": 3, "seed": 1, "temperature": 1.0},
    "samples of several": {"n": 2, "seed": 1, "temperature": 1.0, "prompt": [TEXT, IDS]},
    "echo": {"echo": True},
    "log-probabilities": {"logprobs": 3},
    "echoed log-probabilities": {"echo": True, "logprobs": 2, "n": 2, "prompt": [IDS, TEXT]},
    "echo alone": {"echo": True, "max_tokens": 0, "logprobs": 1},
    "token ids": {"return_token_ids": True, "echo": True},
    "stop strings": {"stop": ["e", "the"], "max_tokens": 40, "logprobs": 0},
}


@pytest.mark.parametrize("options", ASKED.values(), ids=ASKED.keys())
def test_a_stream_says_what_a_whole_answer_says(server, options):
    asked = {"prompt": TEXT, **GREEDY, **options}
    server.post("/v1/completions", **asked)  # what it stores both others find, and round alike
    whole = server.post("/v1/completions", **asked).json()
    stream_options = {"include_usage": True}
    chunks = events_of(
        server.post("/v1/completions", **asked, stream=True, stream_options=stream_options)
    )
    assert joined(chunks) == {choice["index"]: choice for choice in whole["choices"]}
    *parts, last = chunks
    assert all(part["usage"] is None for part in parts)
    assert last["choices"] == []
    for usage in (last["usage"], whole["usage"]):  # the second one finds what the first stored
        del usage["prompt_tokens_details"]
    assert last["usage"] == whole["usage"]
    assert {(c["object"], c["model"]) for c in chunks} == {("text_completion", NAME)}
    assert len({(chunk["id"], chunk["created"]) for chunk in chunks}) == 1


def test_usage_may_come_with_every_chunk(server):
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = events_of(
        server.post("/v1/completions", prompt=IDS, stream=True, stream_options=options, **GREEDY)
    )
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == [*range(1, 13), 12]
    plain = events_of(server.post("/v1/completions", prompt=IDS, stream=True, **GREEDY))
    assert not any("usage" in chunk for chunk in plain)


def test_log_probabilities_are_those_of_the_engine(server, llm):
    (output,) = expected(llm, TEXT, logprobs=2, prompt_logprobs=2)
    answer = server.post("/v1/completions", prompt=TEXT, logprobs=2, echo=True, **GREEDY).json()
    lists = answer["choices"][0]["logprobs"]
    new = output.completions[0].logprobs
    first, *others = lists["token_logprobs"]
    assert first is None
    known = [each.logprob for each in [*output.prompt_logprobs[1:], *new]]
    assert others == pytest.approx(known, rel=1e-4)
    assert lists["tokens"][0] == "<|bos|>"
    text = answer["choices"][0]["text"]
    for token, offset in zip(lists["tokens"][1:], lists["text_offset"][1:], strict=True):
        assert text[offset:].startswith(token)
    assert lists["top_logprobs"][0] is None
    for found, likeliest in zip(new, lists["top_logprobs"][-len(new) :], strict=True):
        assert max(likeliest.values()) == found.likeliest[0][1]
        assert 2 <= len(likeliest) <= 3


def test_an_echo_alone_generates_nothing(server):
    body = server.post("/v1/completions", prompt=TEXT, echo=True, max_tokens=0, logprobs=0).json()
    (choice,) = body["choices"]
    assert choice["text"] == TEXT
    assert choice["finish_reason"] == "length"
    assert len(choice["logprobs"]["tokens"]) == body["usage"]["prompt_tokens"]
    assert body["usage"]["completion_tokens"] == 0


def test_a_seed_decides_and_the_best_are_kept(server, llm):
    options = {"temperature": 1.5, "max_tokens": 8, "seed": 5, "n": 2, "best_of": 4}
    (output,) = llm.generate(IDS, SamplingParams(**options))
    body = server.post("/v1/completions", prompt=IDS, return_token_ids=True, **options).json()
    found = [choice["token_ids"] for choice in body["choices"]]
    assert found == [completion.token_ids for completion in output.completions]
    assert body["usage"]["completion_tokens"] == 32  # of all that were compared
    options = {"temperature": 1.5, "max_tokens": 8}
    texts = [
        server.post("/v1/completions", prompt=IDS, seed=seed, **options).json()["choices"][0][
            "text"
        ]
        for seed in (-3, -3, 2**64 - 3, 4)
    ]
    assert texts[0] == texts[1] == texts[2] != texts[3]


def test_without_a_temperature_it_is_one(server):
    server.engine.submitted.clear()
    answer = server.post("/v1/completions", prompt=TEXT)
    ((prompt, params, options),) = server.engine.submitted
    assert prompt == TEXT
    assert params.temperature == 1.0
    assert params.max_tokens == 16
    assert options == {"priority": 0, "timeout": None, "wait": False}
    assert answer.json()["usage"]["completion_tokens"] == 16


def test_what_was_computed_before_is_told(server):
    prompt = TEXT * 30
    usages = [
        server.post("/v1/completions", prompt=prompt, cache_salt=salt, **GREEDY).json()["usage"]
        for salt in ("a", "a", "b")
    ]
    cached = [usage["prompt_tokens_details"]["cached_tokens"] for usage in usages]
    assert cached[0] == cached[2] == 0
    assert cached[1] > usages[1]["prompt_tokens"] // 2
