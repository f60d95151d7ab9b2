"""Every row of the conformance table is true: applied, accepted without effect, or refused."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from paged_kv import SamplingParams, SinkWindow, StructuredOutput
from paged_kv.entrypoints.server.sampling_fields import COPIED
from tests.support.conformance_table import (
    DOCUMENT,
    ENDPOINTS,
    names,
    treatment,
    written,
)
from tests.support.running_server import running

PATHS = {"completions": "/v1/completions", "chats": "/v1/chat/completions"}
LEAST: dict[str, dict[str, Any]] = {
    "completions": {"prompt": "x"},
    "chats": {"messages": [{"role": "user", "content": "x"}]},
}
# Of options whose name and meaning are the engine's: a value that is not what it is without.
COPIED_VALUES = {
    "n": 2,
    "best_of": 3,
    "min_tokens": 2,
    "stop": ["y"],
    "stop_token_ids": [5],
    "ignore_eos": True,
    "temperature": 0.5,
    "top_p": 0.5,
    "min_p": 0.5,
    "top_h": 0.5,
    "typical_p": 0.5,
    "epsilon_cutoff": 0.5,
    "eta_cutoff": 0.5,
    "frequency_penalty": 0.5,
    "presence_penalty": 0.5,
    "repetition_penalty": 1.5,
    "no_repeat_ngram_size": 2,
    "bad_words_ids": [[5]],
    "suppress_tokens": [5],
    "begin_suppress_tokens": [5],
    "forced_bos_token_id": 5,
    "forced_eos_token_id": 5,
    "exponential_decay_length_penalty": [1, 1.5],
    "adapter": "__base__",
    "cache_salt": "a",
}
# Of others: a value, the option of the engine and what it becomes.
SAME = "a request's own"
WINDOW = {"num_sink_tokens": 4, "window_size": 64}
CHANGED_VALUES: dict[str, tuple[Any, str, Any]] = {
    "seed": (-1, "seed", 2**64 - 1),
    "max_tokens": (7, "max_tokens", 7),
    "max_completion_tokens": (7, "max_tokens", 7),
    "top_k": (5, "top_k", 5),
    "logit_bias": ({"5": -1}, "logit_bias", {5: -1.0}),
    "response_format": (
        {"type": "json_object"},
        "structured_output",
        StructuredOutput(json_schema={"type": "object"}),
    ),
    "structured_outputs": ({"regex": "a"}, "structured_output", StructuredOutput(regex="a")),
    "sink_window": (WINDOW, "sink_window", SinkWindow(**WINDOW)),
}
LOGPROBS = {"completions": 2, "chats": True}
# Of those that the answer tells of, tests of completions and chats.
SEEN_IN_ANSWERS = {
    *("stream", "stream_options", "echo", "return_token_ids", "messages", "prompt"),
    *("top_logprobs", "add_generation_prompt", "continue_final_message", "chat_template_kwargs"),
}
JUNK: list[Any] = ["junk", 7, 0.25, True, [1], {"a": 1}]


@pytest.fixture(scope="module")
def server(llm):
    with running(llm) as server:
        server.engine.is_dry = True
        yield server


def asked(server, endpoint, **options) -> tuple[SamplingParams, dict[str, Any], str]:
    """What the engine is asked for."""
    server.engine.submitted.clear()
    answer = server.post(PATHS[endpoint], **LEAST[endpoint], **options)
    assert answer.status_code == 503, answer.text  # as it is dry
    ((prompt, params, others),) = server.engine.submitted
    return params, others, str(prompt)


def rows(kind: str) -> list[tuple[str, str]]:
    return [
        (endpoint, name)
        for endpoint, request in ENDPOINTS.items()
        for name in names()
        if treatment(request, name) == kind
    ]


def test_the_table_is_what_the_code_does():
    assert DOCUMENT.read_text() == written(DOCUMENT.read_text())


def test_every_parameter_that_is_applied_is_tested():
    assert COPIED_VALUES.keys() == COPIED
    tested = {*COPIED_VALUES, *CHANGED_VALUES, *SEEN_IN_ANSWERS, "logprobs", "model", "priority"}
    assert tested == {name for _, name in rows("applied")}


@pytest.mark.parametrize("endpoint", PATHS)
def test_what_is_applied_reaches_the_engine(server, endpoint):
    plain = asdict(asked(server, endpoint)[0])
    wanted = {name: (value, name, value) for name, value in COPIED_VALUES.items()}
    wanted |= CHANGED_VALUES
    wanted["logprobs"] = (LOGPROBS[endpoint], "logprobs", 2 if endpoint == "completions" else 0)
    for name in wanted.keys() & ENDPOINTS[endpoint].model_fields.keys():
        value, option, meaning = wanted[name]
        more = {"sink_window": {"max_tokens": plain["max_tokens"] or 5}}.get(name, {})
        params, _, _ = asked(server, endpoint, **{name: value}, **more)
        assert getattr(params, option) == meaning, name
        assert plain[option] != meaning, name
        changed = {key for key, value in asdict(params).items() if value != plain[key]}
        assert changed - {"max_tokens" if more else option} == ({option} if more else set()), name
    assert asked(server, endpoint, priority=3)[1]["priority"] == 3
    assert asked(server, endpoint, model="demo")[0] == asked(server, endpoint)[0]


@pytest.mark.parametrize("endpoint", PATHS)
def test_what_is_null_is_as_if_it_were_not_there(server, endpoint):
    everything = dict.fromkeys(ENDPOINTS[endpoint].model_fields.keys() - LEAST[endpoint].keys())
    everything |= dict.fromkeys(ENDPOINTS[endpoint].unapplied)
    assert asked(server, endpoint, **everything) == asked(server, endpoint)


@pytest.mark.parametrize("endpoint", PATHS)
def test_what_is_accepted_changes_nothing(server, endpoint):
    found = [name for where, name in rows("accepted") if where == endpoint]
    assert "user" in found
    for value in JUNK:
        assert asked(server, endpoint, **dict.fromkeys(found, value)) == asked(server, endpoint)


@pytest.mark.parametrize(("endpoint", "name"), rows("refused"))
def test_what_is_refused_is_refused_by_name(server, endpoint, name):
    harmless = ENDPOINTS[endpoint].unapplied[name].harmless or ()
    for value in harmless:
        assert asked(server, endpoint, **{name: value}) == asked(server, endpoint)
    server.engine.submitted.clear()
    for value in JUNK:
        if value in harmless and type(value) in map(type, harmless):
            continue
        answer = server.post(PATHS[endpoint], **LEAST[endpoint], **{name: value})
        assert answer.status_code == 400, (value, answer.text)
        error = answer.json()["error"]
        assert error["param"] == name
        assert name in error["message"]
        assert error["code"] == "unsupported_parameter"
    assert not server.engine.submitted


def test_tools_that_are_not_to_be_called_are_taken(server):
    tools = [{"type": "function", "function": {"name": "f"}}]
    plain = asked(server, "chats")
    assert asked(server, "chats", tools=tools, tool_choice="none") == plain
    for choice in ({}, {"tool_choice": "auto"}):
        answer = server.post(PATHS["chats"], **LEAST["chats"], tools=tools, **choice)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "tools"


@pytest.mark.parametrize("endpoint", PATHS)
@pytest.mark.parametrize("value", [None, 1])
def test_what_nobody_knows_is_refused_by_name(server, endpoint, value):
    answer = server.post(PATHS[endpoint], **LEAST[endpoint], tempurature=value)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "unknown_parameter"
    assert answer.json()["error"]["param"] == "tempurature"
