"""Blocks that outlive an engine: found again by another one, and never what was not computed."""

from __future__ import annotations

import copy
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from paged_kv import LLM, SamplingParams, SinkWindow
from paged_kv.engine import block_reader, block_writer
from paged_kv.engine.beam_search import BeamSearchParams
from paged_kv.errors import ConfigError
from paged_kv.stores.folder_store import FolderStore
from tests.support.interrupts import Lines
from tests.support.small_llm import assert_nothing_is_held, tokens_of

ROOT = Path(__file__).parents[2]
NUM_TRIALS = int(os.environ.get("PAGED_KV_TRIALS", "30"))
FORMATS = ("native", "int8", "int2", "int2,0=native")
every_format = pytest.mark.parametrize("kv_format", FORMATS)
GREEDY = SamplingParams(max_tokens=12)


def llama(**options: Any) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.3,
        eos_token_id=None,
        **options,
    )
    torch.manual_seed(1)
    return LlamaForCausalLM(config).eval()


def gemma() -> Gemma3ForCausalLM:
    """Five of six layers see a window."""
    config = Gemma3TextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=48,
        max_position_embeddings=2048,
        initializer_range=0.3,
        eos_token_id=None,
        pad_token_id=0,
        bos_token_id=None,
    )
    torch.manual_seed(2)
    return Gemma3ForCausalLM(config).eval()


MODEL = llama()


def prompt_of(length: int, seed: int) -> list[int]:
    return [random.Random(seed + 1000 * place).randrange(64) for place in range(length)]


PROMPT = prompt_of(700, 1)


def open_llm(store: object, model: Any = MODEL, **options: Any) -> LLM:
    settings = {"kv_format": "native", "num_blocks": 300, "max_num_seqs": 8, "calibration": None}
    return LLM(model, block_store=store, **{**settings, **options})


def served(
    store: object, prompts: Sequence[list[int]] = (PROMPT,), params: Any = GREEDY, **options: Any
) -> tuple[list[list[int]], Any, int]:
    """Tokens of a new engine, its store's figures, and how many prompt tokens it has hit."""
    with open_llm(store, **options) as llm:
        tokens = tokens_of(llm.generate(list(prompts), params))
        assert_nothing_is_held(llm)
        llm.engine.tier.flush()
        return tokens, llm.block_store_statistics(), llm.statistics().num_hit_tokens


def warm_tokens(prompts: Sequence[list[int]], params: Any = GREEDY, **options: Any) -> Any:
    """What an engine answers that has its own cache and no store."""
    with open_llm(None, **options) as llm:
        for prompt in prompts:
            llm.generate([prompt], GREEDY)
        return tokens_of(llm.generate(list(prompts), params))


# -- what comes back ------------------------------------------------------------------------------


@every_format
def test_another_engine_finds_what_was_computed(tmp_path, kv_format):
    expected = warm_tokens([PROMPT], kv_format=kv_format)
    first, stats, hit = served(tmp_path, kv_format=kv_format)
    assert (stats.num_found, hit) == (0, 0)
    assert stats.num_stored > 0
    files = list(tmp_path.iterdir())
    assert (len(files), sum(f.stat().st_size for f in files)) == (
        stats.num_stored,
        stats.num_stored_bytes,
    )
    again, stats, hit = served(tmp_path, kv_format=kv_format)
    assert again == expected
    assert hit > 500
    assert stats.num_found > 0
    assert stats.num_refused == stats.num_dropped == stats.num_failed == 0
    if kv_format == "native":
        ids = torch.tensor([PROMPT])
        output = MODEL.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
        )
        assert first == again == [output[0, len(PROMPT) :].tolist()]


def test_what_was_generated_is_found_too(tmp_path):
    (tokens,), *_ = served(tmp_path, params=SamplingParams(max_tokens=60))
    _, _, hit = served(tmp_path, prompts=[PROMPT + tokens])
    assert hit >= len(PROMPT) + 60 - 32


@pytest.mark.parametrize("kv_format", ["native", "int2"])
def test_windowed_layers_find_what_they_need(tmp_path, kv_format):
    model, options = gemma(), {"kv_format": kv_format, "num_blocks": 600}
    expected = warm_tokens([PROMPT], model=model, **options)
    served(tmp_path, model=model, **options)
    num_files = len(list(tmp_path.iterdir()))
    again, stats, hit = served(tmp_path, model=model, **options)
    assert again == expected
    assert hit > 500
    if kv_format == "native":  # windows alone: the last of the prefix
        assert 0 < stats.num_found < num_files * 2 // 3


def test_a_prefix_that_is_there_in_part_is_used_in_part(tmp_path):
    served(tmp_path, prompts=[PROMPT[:300]])
    tokens, stats, hit = served(tmp_path)
    assert tokens == warm_tokens([PROMPT])
    assert hit == 288
    assert stats.num_stored > 20


def test_forks_beams_and_preempted_ones_beside(tmp_path):
    prompts = [PROMPT[:40], prompt_of(200, 2), PROMPT[:100], prompt_of(150, 3)]
    params = [
        SamplingParams(max_tokens=60),
        SamplingParams(max_tokens=30, temperature=1.5, seed=3, n=3),
        SamplingParams(max_tokens=50),
        SamplingParams(max_tokens=60, temperature=1.0, seed=5),
    ]

    def all_tokens(llm: LLM) -> list[list[int]]:
        outputs = llm.generate(prompts, params)
        outputs += llm.beam_search([PROMPT[:50]], BeamSearchParams(num_beams=3, max_tokens=8))
        assert_nothing_is_held(llm)
        return [completion.token_ids for output in outputs for completion in output.completions]

    options = {"num_blocks": 26, "token_budget": 48}
    with open_llm(None, **options) as llm:
        expected = all_tokens(llm)
    for is_known in (False, True, True):
        with open_llm(tmp_path, **options) as llm:
            llm.engine.scheduler.steps_ahead = 0
            assert all_tokens(llm) == expected
            assert llm.statistics().num_preemptions > 0
            stats = llm.block_store_statistics()
            assert (stats.num_found > 0) >= is_known


@pytest.mark.parametrize("kv_format", ["native", "int4"])
def test_sink_windows_share_what_comes_before_they_let_go(tmp_path, kv_format):
    params = SamplingParams(max_tokens=80, sink_window=SinkWindow(4, 256))
    prompt, options = PROMPT[:220], {"kv_format": kv_format}
    expected = warm_tokens([prompt], params, **options)
    served(tmp_path, prompts=[prompt], **options)
    tokens, _, hit = served(tmp_path, prompts=[prompt], params=params, **options)
    assert tokens == expected
    assert hit > 100


def test_a_pool_that_is_nearly_full_takes_no_more_than_it_can(tmp_path):
    served(tmp_path)
    with open_llm(tmp_path, num_blocks=48) as llm:
        tokens = tokens_of(llm.generate([PROMPT, PROMPT[:350], prompt_of(40, 7)], GREEDY))
        assert_nothing_is_held(llm)
    assert tokens == warm_tokens([PROMPT, PROMPT[:350], prompt_of(40, 7)])


def test_who_finds_no_room_for_what_was_found_looks_again_when_there_is_some(tmp_path):
    served(tmp_path)
    other = SamplingParams(max_tokens=200)
    with open_llm(tmp_path, num_blocks=48) as llm:
        tokens = tokens_of(llm.generate([prompt_of(200, 7), PROMPT], [other, GREEDY]))
        assert llm.statistics().num_hit_tokens > 600
    first, second = warm_tokens([prompt_of(200, 7)], other), warm_tokens([PROMPT])
    assert tokens == [*first, *second]


# -- who shares -----------------------------------------------------------------------------------


def test_requests_of_other_salts_and_single_ones_meet_nothing(tmp_path):
    salted = SamplingParams(max_tokens=4, cache_salt="tenant")
    served(tmp_path, params=salted)
    assert served(tmp_path, params=SamplingParams(max_tokens=4, cache_salt="other"))[2] == 0
    assert served(tmp_path, params=GREEDY)[2] == 0
    assert served(tmp_path, params=salted)[2] > 600
    num_files = len(list(tmp_path.iterdir()))
    looked_at = SamplingParams(max_tokens=4, prompt_logprobs=1)
    assert served(tmp_path, params=looked_at)[2] == 0
    assert len(list(tmp_path.iterdir())) == num_files


def changed(how: Callable[[LlamaForCausalLM], object]) -> LlamaForCausalLM:
    model = copy.deepcopy(MODEL)
    how(model)
    return model


@torch.no_grad()
def change_one_row(model: LlamaForCausalLM) -> None:
    """Which samples of the weights do not show."""
    weight = model.model.layers[1].mlp.down_proj.weight
    weight[3, 5] += 0.25


def change_a_setting(model: LlamaForCausalLM) -> None:
    model.config.rms_norm_eps *= 2


@pytest.mark.parametrize("how", [change_one_row, change_a_setting])
def test_other_models_meet_nothing(tmp_path, how):
    served(tmp_path)
    other = changed(how)
    tokens, _, hit = served(tmp_path, model=other)
    assert hit == 0
    assert tokens == warm_tokens([PROMPT], model=other)
    assert served(tmp_path, model=copy.deepcopy(MODEL))[2] > 600


@pytest.mark.parametrize(
    "options",
    [{"kv_format": "int8"}, {"kv_format": "int4"}, {"kv_dtype": "bfloat16"}],
    ids=["int8", "int4", "bfloat16"],
)
def test_other_formats_meet_nothing(tmp_path, options):
    served(tmp_path)
    assert served(tmp_path, **options)[2] == 0


def test_after_a_change_of_weights_others_are_meant(tmp_path):
    model = copy.deepcopy(MODEL)
    with open_llm(tmp_path, model=model) as llm:
        llm.generate([PROMPT], GREEDY)
        change_one_row(model)
        llm.reset_prefix_cache()
        tokens = tokens_of(llm.generate([PROMPT], GREEDY))
        assert llm.statistics().num_hit_tokens == 0
    assert tokens == warm_tokens([PROMPT], model=model)
    again, _, hit = served(tmp_path, model=model)
    assert (again, hit > 600) == (tokens, True)


# -- entries that are not what they should be ----------------------------------------------------


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Cut, longer, flipped, zeroed, or another entry's."""
    place = rng.randrange(len(data))
    kind = rng.randrange(5)
    if kind == 0:
        return data[:place]
    if kind == 1:
        return data + bytes(rng.randrange(1, 100))
    if kind == 2:
        return data[:place] + bytes([data[place] ^ (1 << rng.randrange(8))]) + data[place + 1 :]
    if kind == 3:
        return bytes(len(data))
    return b""


def tokens_after_hits(kv_format: str) -> Callable[[int], list[list[int]]]:
    """What an engine without a store answers that finds so many tokens in its own cache."""
    known: dict[int, list[list[int]]] = {}

    def tokens_after(num_hit: int) -> list[list[int]]:
        if num_hit in known:
            return known[num_hit]
        with open_llm(None, kv_format=kv_format) as llm:
            llm.generate([PROMPT], GREEDY)
            manager = llm.engine.manager
            cache, chain = manager.prefix_cache, manager.chain_tokens(PROMPT)
            chain.hash_links(manager.geometry, manager.geometry.num_links(len(PROMPT)))
            num_links = manager.geometry.num_links(num_hit)
            for block_id in [n for each in chain.hashes[num_links:] for n in cache.find([each])]:
                del cache._idle[block_id]
                cache.withdraw([block_id])
                manager.pool._push([block_id])
            manager.check_integrity()
            before = llm.statistics().num_hit_tokens
            known[num_hit] = tokens_of(llm.generate([PROMPT], GREEDY))
            assert llm.statistics().num_hit_tokens - before == num_hit
        return known[num_hit]

    return tokens_after


@pytest.mark.parametrize(("kv_format", "count"), [("native", 300), ("int2", 60)])
def test_damaged_entries_change_no_output(tmp_path, kv_format, count):
    """Each is refused, removed and computed anew: as where it is not there."""
    tokens_after, num_found = tokens_after_hits(kv_format), 0
    served(tmp_path, params=SamplingParams(max_tokens=1), kv_format=kv_format)
    whole = {path: path.read_bytes() for path in tmp_path.iterdir()}
    rng, num_damaged = random.Random(5), 0
    with open_llm(tmp_path, kv_format=kv_format) as llm:
        while num_damaged < count:
            for path, data in whole.items():
                path.write_bytes(data)
            some = rng.sample(sorted(whole), k=rng.randrange(1, len(whole) // 2))
            bad = {path: damaged(whole[path], rng) for path in some}
            for path, data in bad.items():
                path.write_bytes(data)
            num_damaged += len(some)
            before = llm.statistics().num_hit_tokens
            tokens = tokens_of(llm.generate([PROMPT], GREEDY))
            assert tokens == tokens_after(llm.statistics().num_hit_tokens - before)
            num_found += llm.statistics().num_hit_tokens > before
            llm.engine.tier.flush()
            assert not [path for path in some if path.exists() and path.read_bytes() == bad[path]]
            llm.reset_prefix_cache()
        stats = llm.block_store_statistics()
    assert stats.num_refused == num_damaged
    assert num_found > 5


def test_a_renamed_entry_and_one_of_another_version_are_refused(tmp_path):
    served(tmp_path)
    first, second, third, *_ = sorted(tmp_path.iterdir())
    first.write_bytes(second.read_bytes())
    data = bytearray(third.read_bytes())
    data[8] += 1
    third.write_bytes(data)
    tokens, stats, _ = served(tmp_path)
    assert tokens == warm_tokens([PROMPT])
    assert stats.num_refused == 2
    assert served(tmp_path)[1].num_refused == 0


def test_what_is_not_finite_is_neither_written_nor_taken(tmp_path):
    with open_llm(tmp_path) as llm:
        llm.generate([PROMPT], GREEDY)
        llm.engine.tier.flush()
        entries = llm.engine.tier._entries
        path = sorted(tmp_path.iterdir())[0]
        key, (kind,) = bytes.fromhex(path.stem), entries._parts
        payload = entries.payload(key, kind, path.read_bytes()).copy()
        payload[:4] = [0, 0, 0xC0, 0x7F]  # a float32 that is no number
        path.write_bytes(entries._framed(key, kind, payload))
        llm.engine.cache.arenas[0][:] = 255
        blocks = list(llm.engine.manager.prefix_cache._hash_of.items())[:3]
        news = llm.engine.manager.prefix_cache.take_news()
        published = [block_reader_published(h, b) for b, h in blocks]
        (copies,) = entries.copy(published)
        assert [data for _, data in entries.entries_of(copies)] == [None] * 3
        assert not news.published
    _, stats, _ = served(tmp_path)
    assert stats.num_refused == 1


def block_reader_published(block_hash: bytes, block_id: int) -> Any:
    from paged_kv.blocks.prefix_cache import PublishedBlock

    return PublishedBlock(block_hash, block_id, False, ())


# -- stores that fail, and slow ones --------------------------------------------------------------


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


# -- several engines, and exceptions --------------------------------------------------------------

SERVING = """
import sys
from tests.engine.test_block_tier import GREEDY, PROMPT, open_llm
for _ in range(2):
    with open_llm(sys.argv[1]) as llm:
        for n in (700, 400, 555):
            print(*llm.generate([PROMPT[:n]], GREEDY)[0].token_ids)
"""


def test_two_processes_share_a_folder_at_once(tmp_path):
    command = [sys.executable, "-c", SERVING, str(tmp_path)]
    both = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in ("1", "2")
    ]
    told = [process.communicate(timeout=120)[0] for process in both]
    expected = warm_tokens([PROMPT[:n] for n in (700, 400, 555)])
    lines = "".join(" ".join(map(str, tokens)) + "\n" for tokens in expected)
    assert told == [lines * 2] * 2
    assert served(tmp_path)[2] > 600


def test_closing_writes_what_is_left_and_can_be_done_again(tmp_path):
    llm = open_llm(tmp_path)
    llm.generate([PROMPT], SamplingParams(max_tokens=1))
    llm.close()
    llm.close()
    assert llm.block_store_statistics().num_stored == len(list(tmp_path.iterdir())) == 700 // 16


def test_a_size_limit_holds(tmp_path):
    with open_llm(tmp_path, block_store_size="200KiB") as llm:
        for seed in range(4):
            llm.generate([prompt_of(300, seed)], GREEDY)
            llm.engine.tier.flush()
            assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 200 << 10
    assert len(list(tmp_path.iterdir())) > 10


@pytest.fixture
def interrupted(tmp_path) -> Iterator[tuple[LLM, Path]]:
    with open_llm(tmp_path, num_blocks=24, token_budget=64) as llm:
        llm.engine.scheduler.steps_ahead = 0
        yield llm, tmp_path


def test_exceptions_at_any_line_leave_engine_and_store_whole(interrupted):
    llm, folder = interrupted
    prompts = [PROMPT[:150], [*PROMPT[:100], 3], prompt_of(60, 2)]
    params = [SamplingParams(max_tokens=20), GREEDY, SamplingParams(max_tokens=30)]
    expected = tokens_of(llm.generate(prompts, params))
    counter = Lines()
    llm.reset_prefix_cache()
    with counter.traced():
        assert tokens_of(llm.generate(prompts, params)) == expected
    rng = random.Random(7)
    for trial in range(NUM_TRIALS):
        error = (KeyboardInterrupt, MemoryError)[trial % 2]("struck")
        lines = Lines(error, at=rng.randrange(1, counter.count + 1))
        if trial % 3 == 0:
            for path in rng.sample(sorted(folder.iterdir()), k=4):
                path.unlink()
        llm.reset_prefix_cache()
        raised: BaseException | None = None
        try:
            with lines.traced():
                assert tokens_of(llm.generate(prompts, params)) == expected
        except BaseException as caught:
            raised = caught
        assert raised is None or raised is error, f"{raised!r} at {lines.where}"
        assert_nothing_is_held(llm)
        assert tokens_of(llm.generate(prompts, params)) == expected, lines.where
    assert llm.block_store_statistics().num_found > 0


# -- settings -------------------------------------------------------------------------------------


def test_what_cannot_be_is_refused_before_anything_is_made(tmp_path):
    for options, message in (
        ({"prefix_caching": False}, "a block_store needs prefix_caching, got False"),
        ({"block_store_size": "much"}, "block_store_size must be"),
    ):
        with pytest.raises(ConfigError, match=message):
            open_llm(tmp_path / "new", **options)
    with pytest.raises(ConfigError, match="block_store must be a folder, a url"):
        open_llm(7)
    assert not (tmp_path / "new").exists()


def test_any_store_of_the_form_may_be_given(tmp_path):
    store = FolderStore(tmp_path, 1 << 30)
    served(store)
    assert served(str(tmp_path))[2] > 600
    assert served(f"memory://{tmp_path.name}")[1].num_stored > 0
    assert served(f"memory://{tmp_path.name}")[2] > 600
