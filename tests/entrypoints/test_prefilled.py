"""A prompt that one process computes and another one goes on from gives the tokens of one alone."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from paged_kv import (
    DEMO_MODEL,
    LLM,
    AsyncLLM,
    BeamSearchParams,
    ConfigError,
    InvalidRequestError,
    PrefilledPrompt,
    SamplingParams,
    SinkWindow,
    TransferError,
    export_sequence,
)
from tests.support.small_llm import (
    assert_nothing_is_held,
    every_format,
    params_of,
    raise_once,
    sampling,
    tokens_of,
)

PROMPT = [index % 251 for index in range(7, 307)]
FORMATS = ("native", "int8", "int2")
# The other process: for each format, prompts of which one is computed as greedy, one sampled.
PREFILL = """
import sys
from pathlib import Path
from tests.entrypoints.test_prefilled import FORMATS, demo, demo_params, PROMPT
for kv_format in FORMATS:
    llm = demo(kv_format)
    for name, params in demo_params().items():
        Path(sys.argv[1], f"{kv_format}-{name}").write_bytes(llm.prefill(PROMPT, params))
    llm.close()
"""


def demo(kv_format: str) -> LLM:
    return LLM(DEMO_MODEL, kv_format=kv_format, num_blocks=200, prefix_caching=False)


def demo_params() -> dict[str, SamplingParams]:
    return {
        "greedy": SamplingParams(max_tokens=24, temperature=0, ignore_eos=True),
        "sampled": SamplingParams(
            max_tokens=24, temperature=1.2, top_p=0.9, seed=11, repetition_penalty=1.1
        ),
    }


@pytest.fixture(scope="module")
def from_elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What another process has computed: a file for each format and way of sampling."""
    folder = tmp_path_factory.mktemp("prefilled")
    subprocess.run([sys.executable, "-c", PREFILL, str(folder)], check=True, timeout=300)
    return folder


@pytest.mark.parametrize("kv_format", FORMATS)
def test_two_processes_give_the_tokens_of_one(from_elsewhere, kv_format):
    one, other = demo(kv_format), demo(kv_format)
    for name, params in demo_params().items():
        data = (from_elsewhere / f"{kv_format}-{name}").read_bytes()
        expected = one.generate(PROMPT, params)[0]
        found = other.generate(PrefilledPrompt(data), params)[0]
        assert found.prompt_token_ids == PROMPT
        assert found.token_ids == expected.token_ids
        assert found.text == expected.text
        damaged = bytearray(data)
        damaged[len(data) // 2] ^= 1
        with pytest.raises(TransferError, match="corrupt"):
            PrefilledPrompt(damaged)
        with pytest.raises(TransferError, match="truncated"):
            PrefilledPrompt(data[:-1])
    num_steps = other.statistics().num_scheduled_tokens
    assert num_steps == other.engine.num_steps, "a step computed more than one token"
    one.close()
    other.close()


@every_format
def test_prompts_from_elsewhere_beside_others_go_on_as_they_would_have(make_llm, kv_format):
    here = make_llm(kv_format=kv_format, prefix_caching=False)
    prompts = [PROMPT[:length] for length in (1, 5, 40, 170, 290)]
    for params in (params_of(), sampling()):
        expected = tokens_of(here.generate(prompts, params))
        mixed = [
            PrefilledPrompt(here.prefill(prompt, params)) if index % 2 else prompt
            for index, prompt in enumerate(prompts)
        ]
        assert tokens_of(here.generate(mixed, params)) == expected
        events = here.stream(mixed[1], params)
        assert [event.token_id for event in events] == expected[1]


def test_what_comes_waits_for_room_and_makes_room_again(make_llm):
    elsewhere = make_llm(kv_format="native", prefix_caching=False)
    params = params_of(max_tokens=100)
    prompts = [[*PROMPT[:150], index] for index in range(8)]
    expected = tokens_of(elsewhere.generate(prompts, params))
    prefilled = [PrefilledPrompt(elsewhere.prefill(prompt, params)) for prompt in prompts]
    most = elsewhere.engine.manager.max_blocks(251)
    here = make_llm(kv_format="native", num_blocks=3 * most, prefix_caching=True)
    assert tokens_of(here.generate(prefilled, params)) == expected
    assert here.statistics().num_steps > 99, "all at once: nobody has waited"
    here.reset_prefix_cache()


def test_links_of_what_came_are_found_by_others(make_llm):
    elsewhere, here = make_llm(kv_format="int8"), make_llm(kv_format="int8")
    data = elsewhere.prefill(PROMPT, params_of())
    before = here.statistics().num_hit_tokens
    here.generate(PrefilledPrompt(data), params_of())
    here.generate([*PROMPT, 1], params_of())
    assert here.statistics().num_hit_tokens - before >= 256
    here.reset_prefix_cache()
    elsewhere.reset_prefix_cache()


def test_a_first_token_that_ends_a_request_is_all_of_it(make_llm):
    llm = make_llm(prefix_caching=False)
    first = llm.generate(PROMPT, params_of(max_tokens=1))[0]
    for params, reason in (
        (params_of(max_tokens=1), "length"),
        (params_of(stop_token_ids=first.token_ids), "stop"),
    ):
        data = llm.prefill(PROMPT, params)
        found = llm.generate([PrefilledPrompt(data), PROMPT[:9]], params)[0]
        assert (found.token_ids, found.completions[0].finish_reason) == (first.token_ids, reason)


def test_other_samplers_go_on_from_the_same_first_token(make_llm):
    llm = make_llm(prefix_caching=False)
    data = llm.prefill(PROMPT, params_of())
    found = llm.generate(PrefilledPrompt(data), sampling())[0].token_ids
    assert found[0] == llm.generate(PROMPT, params_of())[0].token_ids[0]
    assert found != llm.generate(PROMPT, params_of())[0].token_ids


def test_what_does_not_fit_is_refused_before_anything_is_queued(make_llm):
    llm = make_llm(kv_format="int8", prefix_caching=False)
    data = llm.prefill(PROMPT, params_of(cache_salt="a"))
    prefilled = PrefilledPrompt(data)
    with pytest.raises(TransferError, match="root"):
        llm.generate([PROMPT, prefilled], params_of(cache_salt="b"))
    assert llm.engine.num_steps == 1
    other = make_llm(kv_format="int4", prefix_caching=False)
    with pytest.raises(TransferError, match="kv_format"):
        other.generate(prefilled, params_of(cache_salt="a"))
    with pytest.raises(InvalidRequestError, match="not computed once more"):
        llm.prefill(prefilled, params_of())
    with pytest.raises(ConfigError, match=r"params must be SamplingParams, got \{'n': 1\}"):
        llm.prefill(PROMPT, {"n": 1})


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"n": 2}, "n=2"),
        ({"best_of": 2, "n": 1}, "best_of=2"),
        ({"logprobs": 0}, "logprobs=0"),
        ({"prompt_logprobs": 1}, "prompt_logprobs=1"),
        ({"sink_window": SinkWindow(window_size=64)}, "windowed"),
    ],
)
def test_what_the_data_cannot_have_is_refused_on_both_sides(make_llm, options, named):
    llm = make_llm()
    prefilled = PrefilledPrompt(llm.prefill(PROMPT, params_of()))
    with pytest.raises(InvalidRequestError, match=named):
        llm.prefill(PROMPT, params_of(**options))
    with pytest.raises(InvalidRequestError, match=named):
        llm.generate(prefilled, params_of(**options))
    llm.reset_prefix_cache()


def test_beams_do_not_begin_elsewhere(make_llm):
    llm = make_llm(prefix_caching=False)
    prefilled = PrefilledPrompt(llm.prefill(PROMPT, params_of()))
    with pytest.raises(InvalidRequestError, match="beam search"):
        llm.beam_search(prefilled, BeamSearchParams(num_beams=2, max_tokens=4))


def test_an_exported_sequence_in_the_middle_of_its_prompt_is_no_prompt(make_llm):
    llm = make_llm(kv_format="native", prefix_caching=False)
    manager = llm.engine.manager
    seq_id = manager.add_sequence(manager.chain_tokens(PROMPT))
    data = export_sequence(llm.engine.cache, manager, seq_id)
    with pytest.raises(TransferError, match="0 computed tokens and 300 known"):
        PrefilledPrompt(data)
    for arena in llm.engine.cache.arenas:
        arena.zero_()
    plan = manager.reserve([seq_id], [128])
    manager.commit(plan)
    data = export_sequence(llm.engine.cache, manager, seq_id)
    manager.remove_sequence(seq_id)
    with pytest.raises(TransferError, match="128 computed tokens and 300 known"):
        PrefilledPrompt(data)


@pytest.mark.parametrize("error", [RuntimeError("no"), MemoryError(), KeyboardInterrupt()])
def test_an_exception_while_blocks_come_or_go_loses_nothing(make_llm, monkeypatch, error):
    llm = make_llm(kv_format="int8", prefix_caching=False)
    expected = llm.generate(PROMPT, params_of())[0].token_ids
    desk, runner = llm.engine._desk, llm.engine.runner
    with monkeypatch.context() as patch:
        patch.setattr(desk, "send", raise_once(desk.send, 1, error))
        with pytest.raises(type(error)):
            llm.prefill(PROMPT, params_of())
        assert_nothing_is_held(llm)
        data = llm.prefill(PROMPT, params_of())
    with monkeypatch.context() as patch:
        patch.setattr(runner, "write_arrived", raise_once(runner.write_arrived, 1, error))
        live = llm.engine.add_request("a", PROMPT, params_of(), handover=PrefilledPrompt(data))[0]
        with pytest.raises(type(error)):
            llm.engine.step()
        while llm.engine.has_unfinished:
            llm.engine.step()
    assert live.token_ids.tolist() == expected


def test_tasks_hand_prompts_over_too(make_llm):
    llm = make_llm(kv_format="int8", prefix_caching=False)
    expected = tokens_of(llm.generate([PROMPT, PROMPT[:50]], sampling()))

    async def main() -> list[list[int]]:
        async with AsyncLLM(llm) as engine:
            data = await asyncio.gather(
                engine.prefill(PROMPT, sampling()), engine.prefill(PROMPT[:50], sampling())
            )
            return tokens_of(
                await asyncio.gather(
                    *(engine.generate(PrefilledPrompt(each), sampling()) for each in data)
                )
            )

    assert asyncio.run(main()) == expected
