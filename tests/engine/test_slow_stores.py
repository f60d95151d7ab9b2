"""Block stores that fail, stand still or have little room: who waits for them, and what is lost."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

from paged_kv import SamplingParams
from paged_kv.engine import block_reader, block_writer
from tests.support.small_llm import assert_nothing_is_held, tokens_of
from tests.support.stored_blocks import (
    GREEDY,
    MODEL,
    PROMPT,
    change_one_row,
    open_llm,
    prompt_of,
    served,
    warm_tokens,
)


class Fragile:
    """A store in memory that raises, and takes its time, as it is told."""

    def __init__(self) -> None:
        self.entries: dict[bytes, bytes] = {}
        self.failing: set[str] = set()
        self.seconds = 0.0
        self.num_gets: dict[bytes, int] = {}
        self.gate = threading.Event()
        self.gate.set()

    @contextmanager
    def standing_still(self) -> Iterator[None]:
        """Whoever calls it waits meanwhile."""
        self.gate.clear()
        try:
            yield
        finally:
            self.gate.set()

    def _come(self, name: str) -> None:
        self.gate.wait()
        time.sleep(self.seconds)
        if name in self.failing:
            raise ConnectionError(f"{name} failed")

    def put(self, key: bytes, data: bytes) -> None:
        self._come("put")
        self.entries[key] = data

    def get(self, key: bytes) -> bytes | None:
        self.num_gets[key] = self.num_gets.get(key, 0) + 1
        self._come("get")
        return self.entries.get(key)

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        self._come("contains")
        return [key in self.entries for key in keys]

    def remove(self, key: bytes) -> None:
        self._come("remove")
        self.entries.pop(key, None)


@pytest.mark.parametrize("failing", ["put", "get", "contains"])
def test_a_store_that_fails_is_a_store_without_entries(failing, caplog):
    store = Fragile()
    served(store)
    store.failing = {failing}
    with open_llm(store) as llm:
        tokens = tokens_of(llm.generate([PROMPT, prompt_of(100, 3)], GREEDY))
        llm.engine.tier.flush()
        stats = llm.block_store_statistics()
    assert tokens == warm_tokens([PROMPT, prompt_of(100, 3)])
    assert stats.num_failed > 0
    assert len([r for r in caplog.records if "the block store fails" in r.message]) == 1


def test_a_slow_store_holds_up_nobody_but_who_waits_for_it(monkeypatch):
    monkeypatch.setattr(block_reader, "SECONDS", 600.0)
    store = Fragile()
    served(store)
    with open_llm(store) as llm:
        other = llm.stream([prompt_of(15, 3)], SamplingParams(max_tokens=300))
        tokens = [next(other).token_id]
        known = llm.stream([PROMPT], GREEDY)
        got: list[int | None] = []
        thread = threading.Thread(target=lambda: got.extend(e.token_id for e in known))
        with store.standing_still():
            thread.start()
            tokens += [next(other).token_id for _ in range(200)]
            assert not got
        tokens += [event.token_id for event in other]
        thread.join()
        assert llm.statistics().num_hit_tokens > 600
    assert [got] == warm_tokens([PROMPT])
    assert [tokens] == warm_tokens([prompt_of(15, 3)], SamplingParams(max_tokens=300))


def test_what_takes_too_long_is_computed(monkeypatch):
    monkeypatch.setattr(block_reader, "SECONDS", 0.05)
    monkeypatch.setattr(block_reader, "LATE_SECONDS", 0.05)
    store = Fragile()
    served(store)
    with open_llm(store) as llm, store.standing_still():
        assert tokens_of(llm.generate([PROMPT], GREEDY)) == warm_tokens([PROMPT])
        assert llm.statistics().num_hit_tokens == 0


def test_what_was_found_in_time_is_used(monkeypatch):
    monkeypatch.setattr(block_reader, "SECONDS", 2.0)
    monkeypatch.setattr(block_reader, "LATE_SECONDS", 0.2)
    store = Fragile()
    served(store, params=SamplingParams(max_tokens=1))
    get, stuck = store.get, next(iter(store.entries))  # written first: the last link

    def mostly(key: bytes) -> bytes | None:
        if key == stuck:
            store.gate.wait()
        return get(key)

    monkeypatch.setattr(store, "get", mostly)
    with open_llm(store) as llm:
        store._come = lambda name: None  # only that one waits
        with store.standing_still():
            assert tokens_of(llm.generate([PROMPT], GREEDY)) == warm_tokens([PROMPT])
            assert 600 < llm.statistics().num_hit_tokens < 43 * 16
            assert llm.block_store_statistics().num_failed == 1


def test_a_store_that_stands_still_is_left_alone_for_a_while(monkeypatch, caplog):
    monkeypatch.setattr(block_reader, "SECONDS", 0.05)
    monkeypatch.setattr(block_reader, "LATE_SECONDS", 0.05)
    monkeypatch.setattr(block_writer, "CLOSING_SECONDS", 0.05)
    store = Fragile()
    served(store)
    with store.standing_still():
        with open_llm(store) as llm:
            for _ in range(3):
                assert tokens_of(llm.generate([PROMPT], GREEDY)) == warm_tokens([PROMPT])
                llm.engine.manager.reset_prefix_cache()
            assert llm.block_store_statistics().num_failed == 1
        assert llm.block_store_statistics().num_failed == 2  # what was left could not be written
    assert "no answer within 0.05 seconds" in caplog.text
    monkeypatch.setattr(block_reader, "PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(block_reader, "SECONDS", 600.0)
    assert served(store)[2] > 600


def test_a_store_with_too_little_room_keeps_how_a_prefix_begins(tmp_path):
    served(tmp_path, params=SamplingParams(max_tokens=1))
    whole = sum(path.stat().st_size for path in tmp_path.iterdir())
    for path in tmp_path.iterdir():
        path.unlink()
    for _ in range(2):  # written, then read
        _, _, hit = served(tmp_path, block_store_size=whole // 2)
    assert hit > 200


def test_requests_that_begin_alike_ask_once(monkeypatch):
    store = Fragile()
    served(store)
    store.seconds = 0.002
    prompts = [[*PROMPT[: 650 - n], n] for n in range(6)]
    tokens, _, hit = served(store, prompts=prompts)
    assert tokens == warm_tokens(prompts)
    assert hit > 6 * 500
    assert set(store.num_gets.values()) == {1}


def test_who_waits_for_room_asks_when_there_is_some():
    store = Fragile()
    served(store)
    store.num_gets.clear()
    with open_llm(store, num_blocks=48) as llm:
        other = llm.stream([prompt_of(200, 7)], SamplingParams(max_tokens=200))
        next(other)
        tokens = llm.generate([PROMPT], GREEDY)[0].token_ids
        assert llm.statistics().num_hit_tokens > 600
        other.close()
    assert [tokens] == warm_tokens([PROMPT])
    assert set(store.num_gets.values()) == {1}


def test_more_than_may_wait_is_dropped_and_nobody_waits(monkeypatch):
    monkeypatch.setattr(block_writer, "MOST_WAITING", 100_000)
    store = Fragile()
    with open_llm(store, token_budget=128) as llm:
        before = llm.generate([PROMPT[:20]], GREEDY)
        llm.engine.tier.flush()
        assert before
        entry_bytes = len(next(iter(store.entries.values())))
        monkeypatch.setattr(block_reader.BlockReader, "begin", finds_nothing)
        with store.standing_still():
            llm.generate([prompt_of(700, 3)], GREEDY)
            stats = llm.block_store_statistics()
        llm.engine.tier.flush()
    assert stats.num_dropped > 0
    num_kept = len(store.entries) - 1
    assert num_kept * entry_bytes <= 100_000 + 8 * entry_bytes
    assert num_kept + stats.num_dropped >= 700 // 16


def finds_nothing(reader: block_reader.BlockReader, lookup: block_reader.Lookup) -> None:
    lookup.is_done = True


def test_an_aborted_request_waits_for_nothing():
    store = Fragile()
    served(store)
    with open_llm(store) as llm, store.standing_still():
        engine = llm.engine
        engine.add_request("a", PROMPT, GREEDY)
        assert engine.step() == []
        assert engine.tier.holds_requests
        assert engine.abort("a")
        assert engine.step() == []
        assert not engine.tier.holds_requests
        assert_nothing_is_held(llm)


def test_what_was_looked_for_before_a_change_of_weights_is_not_taken():
    model, store = copy.deepcopy(MODEL), Fragile()
    served(store, model=model)
    with open_llm(store, model=model) as llm:
        engine, tokens = llm.engine, list[int]()
        with store.standing_still():
            engine.add_request("a", PROMPT, GREEDY)
            assert engine.step() == []
            change_one_row(model)
            llm.reset_prefix_cache()
        while engine.has_unfinished:
            tokens += [update.token_id for update in engine.step()]
        assert llm.statistics().num_hit_tokens == 0
        assert_nothing_is_held(llm)
    assert [tokens] == warm_tokens([PROMPT], model=model)
