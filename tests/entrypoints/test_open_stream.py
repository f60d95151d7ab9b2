"""`LLM.open_stream`: what is fed and asked for in turns is one windowed sequence."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from paged_kv import (
    DEMO_MODEL,
    LLM,
    ClosedError,
    ConfigError,
    InvalidRequestError,
    SamplingParams,
    SinkWindow,
)

WINDOW = SinkWindow(4, 128)
LINES = ('\n"Is the captain in?"\n"', '\n"When is he?"\n"', '\n"And where do whales sleep?"\n"')


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(DEMO_MODEL, kv_format="native", dtype="float32", max_num_seqs=2) as llm:
        yield llm


def params_of(**options: object) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 24, "ignore_eos": True, **options})


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_p": 0.9, "seed": 3}])
def test_every_turn_says_what_a_request_with_all_before_it_would(llm, options):
    """Far beyond the window: beside a request that computes everything once more."""
    history = list(llm.tokenizer.encode(""))
    with llm.open_stream(WINDOW) as stream:
        for turn in range(12):
            line = LINES[turn % 3]
            stream.feed(line)
            history += llm.tokenizer.encode(line, add_special_tokens=False)
            said = stream.generate(params_of(**options))
            (alone,) = llm.generate(history, params_of(**options, sink_window=WINDOW))
            assert said.token_ids == alone.token_ids
            assert said.text == alone.text
            assert said.finish_reason == "length"
            history += said.token_ids
            assert stream.num_tokens == len(history)
    assert len(history) > 2 * 128


def test_memory_is_bounded_over_many_feeds(llm):
    with llm.open_stream(WINDOW) as stream:
        held = []
        for _ in range(8):
            stream.feed(list(range(5, 305)))  # more than fits in a step
            stream.generate(params_of(max_tokens=1))
            held.append(stream.memory_stats().allocated)
        assert max(held[2:]) <= max(held[:2])
        assert stream.num_tokens == 1 + 8 * 301
    assert llm.memory_stats().used == 0


def test_ends_are_part_of_the_stream(llm):
    with llm.open_stream(WINDOW) as stream:
        stream.feed(LINES[0])
        before = stream.num_tokens
        said = stream.generate(params_of(stop=",", max_tokens=200, logprobs=2))
        assert said.finish_reason == "stop"
        assert "," not in said.text
        assert stream.num_tokens == before + len(said.token_ids)
        assert len(said.logprobs) == len(said.token_ids)


def test_what_a_stream_cannot_do_is_refused_and_changes_nothing(llm):
    with pytest.raises(ConfigError, match="sink_window must be a SinkWindow, here or of the LLM"):
        llm.open_stream()
    with llm.open_stream(WINDOW) as stream:
        stream.feed(LINES[0])
        before = stream.num_tokens
        for wrong in ([1 << 20], [-1], ["a"]):
            with pytest.raises(InvalidRequestError):
                stream.feed(wrong)
        for options, name in (
            ({"n": 2}, "n=2"),
            ({"max_tokens": None}, "max_tokens=None"),
            ({"cache_salt": "x"}, "cache_salt='x'"),
            ({"sink_window": WINDOW}, "sink_window="),
        ):
            with pytest.raises(ConfigError, match=f"a stream does not take {name}"):
                stream.generate(params_of(**options))
        assert stream.num_tokens == before
        assert len(stream.generate(params_of()).token_ids) == 24
    stream.close()
    for call in (lambda: stream.feed("x"), stream.generate, stream.memory_stats):
        with pytest.raises(ClosedError, match="the stream is closed"):
            call()


def test_a_step_that_fails_leaves_the_stream_as_it_was(llm, monkeypatch):
    with llm.open_stream(WINDOW) as stream, llm.open_stream(WINDOW) as other:
        for each in (stream, other):
            each.feed(LINES[0])
        with monkeypatch.context() as patch:
            patch.setattr(type(stream._runner), "run", lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                stream.generate(params_of())
        assert stream.generate(params_of()).token_ids == other.generate(params_of()).token_ids
