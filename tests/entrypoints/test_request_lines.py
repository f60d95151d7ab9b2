"""Lines of a batch job: what is read of each, and that a bad one costs no other anything."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paged_kv import SamplingParams, SinkWindow
from paged_kv.entrypoints.batch_job import BatchJob
from paged_kv.entrypoints.request_lines import (
    SAMPLING_FIELDS,
    Line,
    encode_json,
    fingerprint,
    json_lines,
    text_lines,
)
from paged_kv.entrypoints.result_file import OrderedSink

DEFAULTS = SamplingParams(max_tokens=4, ignore_eos=True)
GOOD = {"id": "good", "prompt": "The captain", "temperature": 1.5, "seed": 3}


def lines_of(*records: object) -> list[Line]:
    raw = [r if isinstance(r, bytes) else json.dumps(r).encode() for r in records]
    return list(json_lines(line + b"\n" for line in raw))


def results_of(llm: Any, *records: object) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = []
    BatchJob(lines_of(*records), DEFAULTS, OrderedSink(results.append)).run(llm)
    return results


# -- reading --------------------------------------------------------------------------------------

BAD_LINES = {
    "half a pair in the prompt": (rb'{"id": 7, "prompt": "\ud800"}', "half of a surrogate pair"),
    "half a pair in the id": (rb'{"id": "\udfff", "prompt": "a"}', "half of a surrogate pair"),
    "half a pair in a message": (
        rb'{"messages": [{"role": "user", "content": "\ud83d"}]}',
        "half of a surrogate pair",
    ),
    "half a pair in a stop string": (
        rb'{"prompt": "a", "stop": ["b", "\ud800"]}',
        "half of a surrogate pair",
    ),
    "half a pair in a salt": (
        rb'{"prompt": "a", "cache_salt": "\ud800"}',
        "half of a surrogate pair",
    ),
    "half a pair in a name": (rb'{"prompt": "a", "\ud800": 1}', "half of a surrogate pair"),
    "bytes that are not UTF-8": (b'{"prompt": "\xff"}', "not UTF-8"),
    "half a pair in bytes": (b'{"prompt": "\xed\xa0\x80"}', "not UTF-8"),
    "a mark that is not at the start": (b'\xef\xbb\xbf{"prompt": "a"}', "not JSON"),
    "UTF-16": ('{"prompt": "a"}'.encode("utf-16-le"), "not JSON"),
    "nesting": (b'{"prompt": ' + b"[" * 101 + b"]" * 101 + b"}", "nested more than 100"),
    "deep nesting": (b'{"prompt": ' + b"[" * 10**6, "not JSON"),
    "NaN": (b'{"prompt": "a", "temperature": NaN}', "NaN is not a number in JSON"),
    "infinity": (b'{"prompt": "a", "id": -Infinity}', "-Infinity is not a number in JSON"),
    "an infinite number": (b'{"prompt": "a", "temperature": 1e999}', "not finite"),
    "a huge integer": (b'{"prompt": [' + b"9" * 5000 + b"]}", "not JSON"),
    "a list": (b'["prompt"]', "not a JSON object"),
    "null": (b"null", "not a JSON object"),
    "half a line": (b'{"prompt": "a', "not JSON"),
    "neither": (b'{"id": 1}', 'needs either "prompt" or "messages"'),
    "both": (b'{"prompt": "a", "messages": []}', 'needs either "prompt" or "messages"'),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_says_what_is_wrong_and_where(name: str) -> None:
    raw, words = BAD_LINES[name]
    before, bad, after = lines_of(GOOD, raw, GOOD)
    assert before.record == after.record == GOOD
    assert before.error is after.error is None
    assert bad.error is not None
    assert words in bad.error
    assert "line 2" in bad.error
    encode_json(bad.echo)


def test_what_cannot_be_repeated_leaves_the_id_where_that_can() -> None:
    assert lines_of(rb'{"id": 7, "prompt": "\ud800"}')[0].echo == {"id": 7}
    assert lines_of(rb'{"id": "\ud800", "prompt": "a"}')[0].echo == {}


def test_a_byte_order_mark_at_the_start_blank_lines_and_other_line_ends_are_read_over() -> None:
    raw = b'\xef\xbb\xbf{"prompt": "a"}\r\n\n \t\n{"prompt": "b"}'.splitlines(keepends=True)
    read = list(json_lines(raw))
    assert [(line.number, line.record, line.error) for line in read] == [
        (1, {"prompt": "a"}, None),
        (4, {"prompt": "b"}, None),
    ]


def test_plain_prompts_may_be_bad_too() -> None:
    good, bad = text_lines([b"caf\xc3\xa9", b"caf\xe9"], is_chat=True)
    assert good.record == {"messages": [{"role": "user", "content": "café"}]}
    assert bad.error is not None
    assert "prompt 2 is not UTF-8" in bad.error


def test_a_request_has_the_name_that_its_user_gave_it() -> None:
    named, unnamed = lines_of({"id": "x7", "prompt": "a"}, {"prompt": "a"})
    assert named.name == "request 1 (id 'x7')"
    assert unnamed.name == "request 2"


def test_a_fingerprint_is_of_requests_and_not_of_how_they_are_written() -> None:
    first = fingerprint(lines_of(GOOD, b"no JSON", {"prompt": "a", "n": 2}))
    assert first == fingerprint(lines_of(GOOD, b"nothing", b'{"prompt":  "a","n":2}'))
    assert first != fingerprint(lines_of(GOOD, b"no JSON", {"prompt": "a", "n": 3}))
    assert first != fingerprint(lines_of(GOOD, b"no JSON"))
    assert first != fingerprint(lines_of(b"no JSON", GOOD, {"prompt": "a", "n": 2}))


any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.lists(st.binary(max_size=40) | any_json.map(lambda v: json.dumps(v).encode()), max_size=5)
)
def test_any_bytes_are_lines_that_can_be_repeated(raw: list[bytes]) -> None:
    for line in json_lines(one.replace(b"\n", b"") + b"\n" for one in raw):
        assert line.error is None or f"line {line.number}" in line.error
        encode_json(line.echo)
    fingerprint(json_lines(raw))


# -- serving --------------------------------------------------------------------------------------

VALUES: list[Any] = [
    *(None, True, 0, -1, 1, 2.5, 1e308, 5e-324, 10**30, -(10**30), "", "x", "1"),
    *([], ["a"], [1], [-1], [10**30], [None], [[1]], [2.5], [True], {}, {"a": 1}, [{}]),
    *([{"role": "user"}], [{"role": 5, "content": "a"}], [{"role": "user", "content": 5}]),
    *([{"role": "user", "content": "a"}, "b"], [1, "a"], ["a", 1]),
]
# Everything else of these is refused.
RIGHT_VALUES: dict[str, list[Any]] = {
    "prompt": ["x", "1", [1]],
    "messages": [[{"role": "user"}]],
    "id": VALUES,
    "temperature": [None, 0, 1, 2.5, 1e308, 5e-324, 10**30],
    "top_h": [None, 1, 5e-324],
    "top_k": [None, 0, 1, 10**30],
    "top_p": [None, 1, 5e-324],
    "min_p": [None, 0, 1, 5e-324],
    "typical_p": [None, 1, 5e-324],
    "epsilon_cutoff": [None, 0, 1, 5e-324],
    "eta_cutoff": [None, 0, 1, 5e-324],
    "seed": [None, 0, 1],
    "logit_bias": [{}],
    "repetition_penalty": [None, 1, 2.5],
    "frequency_penalty": [0, -1, 1, 2.5, 5e-324],
    "presence_penalty": [0, -1, 1, 2.5, 5e-324],
    "no_repeat_ngram_size": [None, 0, 1],
    "bad_words_ids": [None, [], [[1]]],
    "suppress_tokens": [None, [], [1]],
    "begin_suppress_tokens": [None, [], [1]],
    "forced_bos_token_id": [None, 0, 1],
    "forced_eos_token_id": [None, 0, 1, [1]],
    "exponential_decay_length_penalty": [None],
    "max_tokens": [None, 1, 10**30],
    "min_tokens": [None, 0, 1, 10**30],
    "n": [1],
    "best_of": [None, 1],
    "logprobs": [None, 0, 1],
    "prompt_logprobs": [None, 0, 1],
    "structured_output": [None],
    "cache_salt": [None, "", "x", "1"],
    "adapter": [None],
    "stop": [None, "x", "1", [], ["a"]],
    "stop_token_ids": [[], [1]],
    "ignore_eos": [True],
    "logits_processors": [],
    "sink_window": [],
    "prompts": [],
    "": [],
}


def is_in(value: object, values: list[Any]) -> bool:
    return any(repr(v) == repr(value) for v in values)  # True is not 1


def test_all_fields_are_in_the_table() -> None:
    assert set(RIGHT_VALUES) >= SAMPLING_FIELDS | {"id", "prompt", "messages"}


@pytest.mark.parametrize("name", RIGHT_VALUES)
def test_a_field_of_a_wrong_type_is_one_error_and_alters_nothing(make_llm, name: str) -> None:
    records = []
    for value in VALUES:
        base = {} if name in ("prompt", "messages") else {"prompt": "x"}
        records += [GOOD, {"id": f"{name} {value!r}", **base, name: value}]
    llm = make_llm(max_model_len=64)
    alone = results_of(llm, GOOD)[0]
    results = results_of(llm, *records)
    assert len(results) == len(records)
    assert all(result == alone for result in results[::2])
    for value, result in zip(VALUES, results[1::2], strict=True):
        assert ("error" not in result) == is_in(value, RIGHT_VALUES[name]), (value, result)


def test_options_of_a_line_are_those_of_a_request(make_llm) -> None:
    """In JSON token ids are text where they are keys, and no number is infinite."""
    llm = make_llm()
    options = {"logit_bias": {"97": 90.0}, "max_tokens": 3, "suppress_tokens": [98], "logprobs": 2}
    options["prompt_logprobs"] = 0
    (result,) = results_of(llm, {"prompt": "xyz", **options})
    assert [entry and entry["token_id"] for entry in result["prompt_logprobs"]] == [None, *b"yz"]
    assert result["text"] == "aaa"
    assert [entry["token_id"] for entry in result["logprobs"]] == [97] * 3
    assert [len(entry["likeliest"]) for entry in result["logprobs"]] == [2] * 3
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    form = {"regex": "a+b"}  # this model has no token that ends it
    (refused,) = results_of(llm, {"prompt": "x", "structured_output": form, "ignore_eos": False})
    assert "needs an end-of-sequence token" in refused["error"]
    (refused,) = results_of(llm, {"prompt": "x", "structured_output": {"xml": "a"}})
    assert "an object with one of choice, grammar, json_schema, regex" in refused["error"]
    (refused,) = results_of(llm, {"prompt": "x", "logit_bias": {"the": 1.0}})
    assert (
        "logit_bias must be numbers from -10000 to 10000 by token id, got {'the': 1.0}"
        in refused["error"]
    )


def test_more_continuations_than_memory_holds_are_refused(make_llm) -> None:
    llm = make_llm()
    for count in ({"n": 10**9}, {"best_of": 10**12}):
        bad, good = results_of(llm, {"prompt": "a", **count}, GOOD)
        assert str(max(count.values())) in bad["error"]
        assert "text" in good


def test_an_error_does_not_quote_a_book(make_llm) -> None:
    book = "a" * 100_000
    for bad in ({"prompt": book, "stop": {book: 1}}, {"prompt": [book]}, {"prompt": "a", book: 1}):
        assert len(results_of(make_llm(), bad)[0]["error"]) <= 500
    assert len(lines_of({"id": book, "prompt": "a"})[0].name) < 100


def test_equal_ids_are_two_requests(make_llm) -> None:
    results = results_of(make_llm(), GOOD, {**GOOD, "prompt": "Her sister"}, GOOD)
    assert [result["id"] for result in results] == ["good"] * 3
    assert results[0] == results[2] != results[1]


def test_equal_prompts_under_one_seed_have_equal_samples(make_llm) -> None:
    """The seed is of a request: its tokens do not depend on its place in the file."""
    results = results_of(make_llm(), *[{"prompt": "a", "temperature": 1, "seed": 5}] * 3)
    assert results[0] == results[1] == results[2]


def test_what_a_tokenizer_raises_costs_its_line(make_llm, monkeypatch) -> None:
    llm = make_llm()
    check = llm.check

    def fail_at_b(prompt: Any, params: SamplingParams, priority: int = 0) -> list[int]:
        if prompt == "b":
            raise RuntimeError("no such letter")
        return check(prompt, params, priority)

    monkeypatch.setattr(llm, "check", fail_at_b)
    results = results_of(llm, GOOD, {"prompt": "b"}, GOOD)
    assert results[1]["error"] == "RuntimeError: no such letter"
    assert results[0] == results[2]


def test_a_windowed_request_without_a_limit_would_never_end(make_llm) -> None:
    llm = make_llm(sink_window=SinkWindow(0, 32))
    bad, good = results_of(llm, {"prompt": "a", "max_tokens": None}, {"prompt": "a"})
    assert "needs max_tokens" in bad["error"]
    assert good["num_tokens"] == 4
