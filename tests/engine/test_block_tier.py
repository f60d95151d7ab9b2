"""Blocks that outlive an engine: found again by another one, and never what was not computed."""

from __future__ import annotations

import copy
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from paged_kv import LLM, SamplingParams, SinkWindow
from paged_kv.engine.beam_search import BeamSearchParams
from paged_kv.errors import ConfigError
from paged_kv.stores.folder_store import FolderStore
from tests.support.interrupts import Lines
from tests.support.small_llm import assert_nothing_is_held, tokens_of
from tests.support.stored_blocks import (
    GREEDY,
    MODEL,
    PROMPT,
    change_one_row,
    gemma,
    open_llm,
    prompt_of,
    served,
    warm_tokens,
)

ROOT = Path(__file__).parents[2]
NUM_TRIALS = int(os.environ.get("PAGED_KV_TRIALS", "30"))
FORMATS = ("native", "int8", "int2", "int2,0=native")
every_format = pytest.mark.parametrize("kv_format", FORMATS)


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


# -- several engines, and exceptions --------------------------------------------------------------

SERVING = """
import sys
from tests.support.stored_blocks import GREEDY, PROMPT, open_llm
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
