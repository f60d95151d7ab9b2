"""The server's log: one line for each request, with numbers and nothing of what it says."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections.abc import Iterator
from datetime import datetime

import pytest

from paged_kv import LLM, AsyncLLM, SamplingParams
from paged_kv.entrypoints.demo import MODEL_FOLDER
from paged_kv.entrypoints.server.logs import (
    FieldFormatter,
    JsonFormatter,
    RequestLog,
    logging_as,
)

SECRET = "Xyzzy"


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(MODEL_FOLDER, kv_format="native", num_blocks=100) as made:
        yield made


def record_of(text: str, **options: object) -> logging.LogRecord:
    return logging.getLogger("paged_kv.test").makeRecord(
        "paged_kv.test", logging.WARNING, "file.py", 7, text, (), options.pop("error", None),
        extra=options,
    )  # fmt: skip


async def use(llm: LLM) -> None:
    async with AsyncLLM(llm, listener=RequestLog()) as engine:
        params = SamplingParams(max_tokens=4, cache_salt=SECRET, ignore_eos=True)
        for _ in range(2):
            await engine.generate(f"{SECRET} is the word that opens every door. " * 6, params)
        both = SamplingParams(max_tokens=3, n=2, temperature=1.0, ignore_eos=True)
        await engine.generate(SECRET, both)
        async with await engine.submit(SECRET, SamplingParams(max_tokens=90)) as request:
            async for _ in request:
                break
        async with await engine.submit(SECRET, params, timeout=1e-6) as request:
            async for _ in request:
                pass


def test_each_request_is_one_line_of_numbers(llm, caplog):
    with caplog.at_level(logging.INFO):
        asyncio.run(use(llm))
    lines = [JsonFormatter().format(record) for record in caplog.records]
    requests = [json.loads(line) for line in lines if "request ended" in line]
    assert [r["finish_reason"] for r in requests] == ["length"] * 3 + ["abort", "error"]
    assert [r["level"] for r in requests] == ["info"] * 4 + ["warning"]
    first, again, both, *_, late = requests
    assert first["output_tokens"] == 4
    assert (first["cached_tokens"], first["samples"]) == (0, 1)
    assert again["prompt_tokens"] == first["prompt_tokens"]
    assert again["cached_tokens"] >= 16
    assert (both["output_tokens"], both["samples"]) == (6, 2)
    assert len({request["request"] for request in requests}) == 5
    assert 0 < first["first_token_seconds"] < first["seconds"]
    assert 0 <= first["queue_seconds"] < first["first_token_seconds"]
    assert 0 < first["decode_seconds"] < first["seconds"]
    assert late["first_token_seconds"] is None
    assert SECRET not in "".join(lines)
    assert "door" not in "".join(lines)


def test_a_json_line_is_one_object_whatever_is_in_it():
    record = record_of("a\nb", fields={"name": 'x"\n', "object": {1, 2}.__class__, "n": 3})
    line = JsonFormatter().format(record)
    assert "\n" not in line
    told = json.loads(line)
    assert (told["event"], told["level"], told["logger"]) == ("a\nb", "warning", "paged_kv.test")
    assert (told["name"], told["n"], told["object"]) == ('x"\n', 3, "<class 'set'>")
    assert datetime.fromisoformat(told["time"]).utcoffset() is not None


@pytest.mark.parametrize("formatter", [JsonFormatter(), FieldFormatter()])
def test_a_fault_is_told_with_its_trace(formatter):
    try:
        raise RuntimeError("planted")
    except RuntimeError:
        line = formatter.format(record_of("the engine failed", error=sys.exc_info()))
    assert "RuntimeError: planted" in line
    assert "the engine failed" in line


def test_text_has_the_same_fields():
    line = FieldFormatter().format(record_of("started", fields={"model": "m", "port": 8000}))
    assert line.endswith(" WARNING started model=m port=8000")
    assert FieldFormatter().format(record_of("started")).endswith(" WARNING started")


def test_an_option_decides_which_form_it_has(capsys):
    anybody = logging.getLogger("anybody")
    before = logging.getLogger().handlers[:], logging.getLogger().level
    for name, is_json in (("json", True), ("text", False)):
        with logging_as(name):
            anybody.info("hello", extra={"fields": {"n": 1}})
            anybody.debug("not this")
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("{") == is_json
        assert "hello" in line
    assert (logging.getLogger().handlers, logging.getLogger().level) == before
