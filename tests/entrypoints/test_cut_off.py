"""An exception at any line where requests end, or their stream does: nothing is left behind."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from paged_kv import LLM, BeamSearchParams, SamplingParams
from tests.support.interrupts import Lines
from tests.support.small_llm import assert_nothing_is_held

FOLDERS = ("paged_kv/entrypoints/llm.py", "paged_kv/engine/engine.py")
PROMPTS = [[5, 6, 7], [8, 9, 10, 11]]
PARAMS = SamplingParams(max_tokens=2)


def strike_every_line(llm: LLM, begin: Callable[[], Callable[[], object]]) -> int:
    """Let an exception strike every line of what `begin` returns; how many there are."""
    counter = Lines(folders=FOLDERS)
    function = begin()
    with counter.traced():
        function()
    for at in range(1, counter.count + 1):
        lines = Lines(KeyboardInterrupt("struck"), at=at, folders=FOLDERS)
        function = begin()
        with suppress(KeyboardInterrupt), lines.traced():
            function()
        llm.engine.step()
        del function
        assert not llm.engine.has_unfinished, lines.where
        assert not llm.requests, lines.where
        assert_nothing_is_held(llm)
    return counter.count


def test_a_stream_that_is_closed_ends_its_requests_whatever_strikes(make_llm):
    llm = make_llm()

    def begin() -> Callable[[], object]:
        stream = llm.stream(PROMPTS, PARAMS)
        next(stream)
        return stream.close

    assert strike_every_line(llm, begin) > 20


def test_requests_that_end_leave_nothing_behind_whatever_strikes(make_llm):
    llm = make_llm()
    assert strike_every_line(llm, lambda: lambda: list(llm.stream(PROMPTS[:1], PARAMS))) > 100


def test_a_search_that_ends_is_not_lost_whatever_strikes(make_llm):
    llm = make_llm()
    params = BeamSearchParams(num_beams=2, max_tokens=2)
    engine, name = llm.engine, "search"
    search = engine.add_search(name, PROMPTS[0], params)
    while engine.has_unfinished:
        engine.step()
    expected = [hypothesis.token_ids for hypothesis in search.output.hypotheses]
    at, is_struck = 0, True
    while is_struck:
        at += 1
        lines = Lines(MemoryError("struck"), at=at, folders=FOLDERS)
        search = engine.add_search(name, PROMPTS[0], params)
        while engine.has_unfinished:
            with suppress(MemoryError), lines.traced():
                engine.step()
        assert search.is_done, lines.where
        assert [h.token_ids for h in search.output.hypotheses] == expected, lines.where
        is_struck = bool(lines.where)
    assert at > 100
