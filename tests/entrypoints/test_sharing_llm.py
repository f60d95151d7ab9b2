"""The LLM where prompts, samples and preempted sequences share blocks: the tokens do not tell.

Where tokens must be equal to those of a request alone, the format is native, or both runs take the
same blocks from the cache: a quantized prefix is not what the prompt's own chunk sees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedModel

from paged_kv import LLM, SamplingParams
from paged_kv.engine.engine import Engine
from paged_kv.engine.live_request import SequenceUpdate
from paged_kv.engine.sampler import Sampling, uniform_numbers
from paged_kv.entrypoints.demo import MODEL_FOLDER
from paged_kv.entrypoints.outputs import Completion
from paged_kv.errors import (
    ConfigError,
    GenerationError,
    InvalidRequestError,
    InvalidStepError,
    PagedKVError,
)
from tests.support import small_llm as small
from tests.support.small_llm import assert_nothing_is_held, params_of, sampling, tokens_of

every_format = small.every_format
EXCERPT = Path(__file__).parents[1] / "support" / "data" / "persuasion-excerpt.txt"


def samples_of(llm: LLM, prompt: list[int], params: SamplingParams) -> list[list[int]]:
    (output,) = llm.generate([prompt], params)
    return [completion.token_ids for completion in output.completions]


@torch.inference_mode()
def log_probabilities(model: LlamaForCausalLM, prompt: list[int], tokens: list[int]) -> np.ndarray:
    """Of each of the tokens after the prompt and those before it, by transformers."""
    logits = model(torch.tensor([prompt + tokens])).logits[0].double().log_softmax(-1)
    places = torch.arange(len(prompt) - 1, len(prompt) + len(tokens) - 1)
    return logits[places, torch.tensor(tokens)].numpy()


@torch.inference_mode()
def sampled_alone(
    model: LlamaForCausalLM,
    prompt: list[int],
    seed: int,
    sample_index: int,
    temperature: float,
    count: int,
) -> list[int]:
    """One sample by transformers and the inverse of the cumulative distribution, in numpy."""
    tokens: list[int] = []
    for position in range(count):
        logits = model(torch.tensor([prompt + tokens])).logits[0, -1].double().numpy()
        weights = np.exp((logits - logits.max()) / temperature)
        cumulative = np.cumsum(weights / weights.sum())
        number = uniform_numbers([seed], [sample_index], [position])[0] * cumulative[-1]
        tokens.append(int(np.searchsorted(cumulative, number, side="right")))
    return tokens


# -- n samples ----------------------------------------------------------------------------------

NUM_SAMPLES = 4
NUM_TOKENS = 12
SEED = 7


@pytest.fixture(scope="session")
def samples(pristine_model, prompts) -> list[list[list[int]]]:
    """For three prompts, each sample computed alone by transformers."""
    return [
        [
            sampled_alone(pristine_model, prompt, SEED, index, 1.5, NUM_TOKENS)
            for index in range(NUM_SAMPLES)
        ]
        for prompt in (prompts[2], prompts[4], prompts[5])
    ]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prefix_caching": False},
        {"max_num_seqs": 2},
        {"token_budget": 11},
        {"num_blocks": 14, "swap_space": "1MiB"},
        {"num_blocks": 14, "prefix_caching": False, "max_num_seqs": 3, "token_budget": 13},
    ],
    ids=str,
)
def test_n_samples_are_n_independent_ones_of_the_same_seed(make_llm, prompts, samples, options):
    llm = make_llm(**options)
    params = sampling(seed=SEED, n=NUM_SAMPLES, max_tokens=NUM_TOKENS)
    outputs = llm.generate([prompts[2], prompts[4], prompts[5]], params)
    assert [[c.token_ids for c in output.completions] for output in outputs] == samples
    assert len({tuple(tokens) for tokens in samples[0]}) == NUM_SAMPLES


def test_n_greedy_samples_are_all_the_greedy_one(make_llm, prompts, greedy):
    outputs = make_llm().generate(prompts, params_of(n=3))
    assert [[c.token_ids for c in o.completions] for o in outputs] == [[t] * 3 for t in greedy]


@pytest.mark.parametrize("kv_format", ["native", "int8", "int2"])
def test_the_first_of_n_samples_is_the_sample_alone(make_llm, prompts, kv_format):
    """And all greedy ones are equal, on blocks that were sealed before the fork."""
    llm = make_llm(kv_format=kv_format)
    long = (prompts[4] + prompts[3]) * 2
    alone = samples_of(llm, long[:280], sampling(n=1))
    llm.reset_prefix_cache()
    assert samples_of(llm, long[:280], sampling(n=3))[:1] == alone
    llm.reset_prefix_cache()
    one, *others = samples_of(llm, long[:280], params_of(n=4, max_tokens=50))
    assert others == [one] * 3


def test_samples_of_one_token_each(make_llm, prompts, samples):
    for max_num_seqs in (1, 3, 8):
        llm = make_llm(max_num_seqs=max_num_seqs)
        params = sampling(seed=SEED, n=NUM_SAMPLES, max_tokens=1)
        found = samples_of(llm, prompts[2], params)
        assert found == [tokens[:1] for tokens in samples[0]]
        assert_nothing_is_held(llm)


def test_samples_share_the_blocks_of_their_prompt(make_llm, prompts):
    """120 tokens are 7 full blocks and one that every sample but the last copies."""
    llm = make_llm()
    llm.generate([prompts[4]], sampling(n=8, max_tokens=5))
    assert llm.engine.manager.pool.peak_allocated == 7 + 8
    assert llm.statistics().num_scheduled_tokens == 120 + 8 * 4


def test_the_samples_of_a_stream_start_together(make_llm, prompts, samples):
    events = list(
        make_llm().stream(prompts[2], sampling(seed=SEED, n=NUM_SAMPLES, max_tokens=NUM_TOKENS))
    )
    assert sorted(event.sample_index for event in events[:NUM_SAMPLES]) == list(range(NUM_SAMPLES))
    found: list[list[int | None]] = [[] for _ in range(NUM_SAMPLES)]
    for event in events:
        found[event.sample_index].append(event.token_id)
        assert event.log_probability is None
    assert found == samples[0]


def test_every_sample_has_its_own_text(make_llm, tokenizer, prompts):
    (output,) = make_llm().generate([[*b"hello"]], sampling(n=3, max_tokens=20))
    for completion in output.completions:
        assert completion.text == small.text_after(tokenizer, [*b"hello"], completion.token_ids)


def test_a_sample_that_stops_early_does_not_stop_the_others(make_llm, prompts, samples):
    stop = samples[0][1][3]
    params = sampling(seed=SEED, n=NUM_SAMPLES, max_tokens=NUM_TOKENS, stop_token_ids=[stop])
    expected = [
        tokens[: tokens.index(stop) + 1] if stop in tokens else tokens for tokens in samples[0]
    ]
    assert samples_of(make_llm(), prompts[2], params) == expected
    assert len({len(tokens) for tokens in expected}) > 1


@every_format
def test_memory_stats_add_up_while_samples_share_blocks(make_llm, prompts, kv_format):
    llm = make_llm(kv_format=kv_format, num_blocks=90)
    prompt = (prompts[4] + prompts[3])[:170]
    for _ in llm.stream([prompt, prompts[1]], sampling(n=4, max_tokens=20)):
        stats = llm.memory_stats()
        assert stats.allocated + stats.free == stats.total
        assert 0 <= stats.wasted == stats.allocated - stats.used
        assert stats.head + stats.body + stats.tail == stats.allocated
        assert stats.cached <= stats.free
    assert llm.memory_stats().cached > 0


# -- samples that fail or are aborted -----------------------------------------------------------


def run_engine(engine: Engine, found: dict[str, list[int]]) -> None:
    """One step; adds the new tokens to those found."""
    update: SequenceUpdate
    for update in engine.step():
        assert update.error is None
        found.setdefault(update.request_id, []).append(update.token_id)


def drain_engine(engine: Engine, found: dict[str, list[int]]) -> None:
    while engine.has_unfinished:
        run_engine(engine, found)


NAMES = ["s0", "s1", "s2", "s3"]


@pytest.mark.parametrize(
    "aborted", [["s0"], ["s1"], ["s3"], ["s0", "s1"], ["s2", "s0"], ["s0", "s1", "s2"], NAMES],
    ids=",".join,
)  # fmt: skip
@pytest.mark.parametrize("steps_before", [0, 1, 4])
def test_samples_aborted_before_or_after_their_prompt_do_not_change_the_others(
    make_llm, prompts, samples, aborted, steps_before
):
    """The prompt of 17 tokens is computed in steps of 8 tokens: by the first, if it lives."""
    llm = make_llm(token_budget=8)
    params = sampling(seed=SEED, n=NUM_SAMPLES, max_tokens=NUM_TOKENS)
    llm.engine.add_request(NAMES, prompts[2], params)
    found: dict[str, list[int]] = {}
    for _ in range(steps_before):
        run_engine(llm.engine, found)
    assert bool(found) == (steps_before == 4)
    for name in aborted:
        assert llm.engine.abort(name)
        assert not llm.engine.abort(name)
        llm.engine.scheduler.check_integrity()
    drain_engine(llm.engine, found)
    for index, name in enumerate(NAMES):
        if name not in aborted:
            assert found[name] == samples[0][index]
    assert_nothing_is_held(llm)


def test_a_stream_of_samples_that_is_dropped_frees_everything(make_llm, prompts):
    llm = make_llm(token_budget=20)
    for num_events in (0, 1, 2, 7):
        stream = llm.stream([prompts[4], prompts[2]], sampling(n=3))
        for _ in range(num_events):
            next(stream)
        stream.close()
        assert_nothing_is_held(llm)


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_may_be_aborted_in_the_step_that_computes_its_prompt(
    make_llm, prompts, samples, name
):
    """By a logits processor, which runs between the model and the fork."""
    llm = make_llm()

    def abort(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        llm.engine.abort(name)
        return scores

    params = sampling(seed=SEED, n=NUM_SAMPLES, max_tokens=NUM_TOKENS, logits_processors=[abort])
    llm.engine.add_request(NAMES, prompts[2], params)
    found: dict[str, list[int]] = {}
    drain_engine(llm.engine, found)
    assert found == {n: samples[0][i] for i, n in enumerate(NAMES) if n != name}
    assert_nothing_is_held(llm)


@pytest.mark.parametrize("name", ["s0", "s2"])
def test_a_sample_may_be_aborted_while_the_first_tokens_are_drawn(
    make_llm, monkeypatch, prompts, samples, name
):
    """As when a stream is closed by the garbage collector, at any moment."""
    llm = make_llm()

    def abort_and_sample(*args: Any) -> Sampling:
        llm.engine.abort(name)
        return Sampling(*args)

    monkeypatch.setattr("paged_kv.engine.engine.Sampling", abort_and_sample)
    params = sampling(seed=SEED, n=NUM_SAMPLES, max_tokens=NUM_TOKENS)
    llm.engine.add_request(NAMES, prompts[2], params)
    found: dict[str, list[int]] = {}
    drain_engine(llm.engine, found)
    assert found == {n: samples[0][i] for i, n in enumerate(NAMES) if n != name}
    assert_nothing_is_held(llm)


def test_a_prompt_that_fails_fails_all_its_samples_and_no_other(make_llm, prompts, greedy):
    def fail(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError("in a processor")

    llm = make_llm()
    params = [params_of(), params_of(n=3, logits_processors=[fail]), params_of()]
    with pytest.raises(GenerationError, match="3 of 5 requests failed") as caught:
        llm.generate(prompts[:3], params)
    outputs = caught.value.outputs
    assert [outputs[0].token_ids, outputs[2].token_ids] == [greedy[0], greedy[2]]
    assert [c.token_ids for c in outputs[1].completions] == [[], [], []]
    assert {c.finish_reason for c in outputs[1].completions} == {"error"}
    assert_nothing_is_held(llm)


def test_a_sample_that_fails_later_fails_alone(make_llm, prompts, samples):
    def fail_after(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if ids[0].tolist() == prompts[2] + samples[0][2][:5]:
            raise ZeroDivisionError("in a processor")
        return scores

    llm = make_llm()
    params = sampling(
        seed=SEED, n=NUM_SAMPLES, max_tokens=NUM_TOKENS, logits_processors=[fail_after]
    )
    with pytest.raises(GenerationError, match="1 of 4 requests failed") as caught:
        llm.generate([prompts[2]], params)
    found = [c.token_ids for c in caught.value.outputs[0].completions]
    assert found == [*samples[0][:2], samples[0][2][:5], samples[0][3]]


def test_the_wrong_number_of_ids_is_refused(make_llm, prompts):
    llm = make_llm()
    for request_ids in ("a", ["a", "b", "c"], ["a", "a"]):
        with pytest.raises(InvalidRequestError, match="2 samples need as many ids"):
            llm.engine.add_request(request_ids, prompts[1], params_of(n=2))
    llm.engine.add_request(["a", "b"], prompts[1], params_of(n=2))
    with pytest.raises(InvalidRequestError, match="'b' is already in use"):
        llm.engine.add_request("b", prompts[1], params_of())
    drain_engine(llm.engine, {})


# -- best_of ------------------------------------------------------------------------------------


def mean_log_probabilities(
    model: LlamaForCausalLM, prompt: list[int], completions: list[Completion]
) -> list[float]:
    return [log_probabilities(model, prompt, c.token_ids).mean() for c in completions]


def test_best_of_keeps_the_likeliest_in_order(make_llm, pristine_model, prompts):
    llm = make_llm()
    (every,) = llm.generate([prompts[2]], sampling(n=6, best_of=6, max_tokens=15))
    for completion in every.completions:
        expected = log_probabilities(pristine_model, prompts[2], completion.token_ids).sum()
        assert completion.log_probability == pytest.approx(expected, abs=1e-3)
    means = mean_log_probabilities(pristine_model, prompts[2], every.completions)
    assert means == sorted(means, reverse=True)
    assert min(-np.diff(means)) > 1e-4  # no ties
    (best,) = llm.generate([prompts[2]], sampling(n=2, best_of=6, max_tokens=15))
    assert [c.token_ids for c in best.completions] == [c.token_ids for c in every.completions[:2]]
    (plain,) = llm.generate([prompts[2]], sampling(n=6, max_tokens=15))
    assert sorted(c.token_ids for c in plain.completions) == (
        sorted(c.token_ids for c in every.completions)
    )
    assert {c.log_probability for c in plain.completions} == {None}


def test_best_of_compares_means_not_sums(make_llm, pristine_model, prompts):
    """Stopped early, a sample has a higher sum, and not for that a higher mean."""
    llm = make_llm()
    options = {"n": 8, "best_of": 8, "max_tokens": 25, "temperature": 1.2}
    (every,) = llm.generate([prompts[2]], sampling(**options))
    stops = sorted({c.token_ids[3] for c in every.completions[::2]} | {every.token_ids[8]})
    (stopped,) = llm.generate([prompts[2]], sampling(stop_token_ids=stops, **options))
    assert len({len(c.token_ids) for c in stopped.completions}) > 1
    means = mean_log_probabilities(pristine_model, prompts[2], stopped.completions)
    assert means == sorted(means, reverse=True)
    sums = [c.log_probability for c in stopped.completions]
    assert sums != sorted(sums, reverse=True)


def test_best_of_is_refused_in_a_stream_unless_all_are_kept(make_llm, pristine_model, prompts):
    llm = make_llm()
    with pytest.raises(ConfigError, match="best_of"):
        llm.stream(prompts[1], params_of(n=1, best_of=2))
    with pytest.raises(ConfigError, match="best_of"):
        llm.stream(prompts[:2], [params_of(), params_of(n=2, best_of=3)])
    assert_nothing_is_held(llm)
    events = list(llm.stream(prompts[1], params_of(n=1, best_of=1)))
    tokens = [event.token_id for event in events]
    expected = log_probabilities(pristine_model, prompts[1], tokens)
    assert [event.log_probability for event in events] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("options", [{"n": 3, "best_of": 2}, {"best_of": 0}, {"best_of": 1.5}])
def test_best_of_of_fewer_than_n_is_refused(options):
    with pytest.raises(ConfigError, match="best_of"):
        SamplingParams(**options)


# -- prefixes -----------------------------------------------------------------------------------


def shareable(prompt: list[int]) -> int:
    """Tokens of a prompt that native blocks of 16 let another one share."""
    return (len(prompt) - 1) // 16 * 16


def test_the_second_time_prompts_are_hit_and_the_tokens_are_the_same(make_llm, prompts, greedy):
    llm = make_llm()
    assert tokens_of(llm.generate(prompts, params_of())) == greedy
    first = llm.statistics()
    assert first.num_hit_tokens == 0
    assert tokens_of(llm.generate(prompts, params_of())) == greedy
    second = llm.statistics()
    assert second.num_hit_tokens == sum(map(shareable, prompts))
    assert second.num_query_tokens == 2 * sum(map(len, prompts))
    computed = second.num_scheduled_tokens - first.num_scheduled_tokens
    assert computed == first.num_scheduled_tokens - second.num_hit_tokens


def test_what_was_generated_is_hit_by_the_next_turn(make_llm, pristine_model, prompts, greedy):
    llm = make_llm()
    llm.generate([prompts[2]], params_of())
    turn = [*prompts[2], *greedy[2], 1, 2, 3]
    before = llm.statistics().num_hit_tokens
    (output,) = llm.generate([turn], params_of())
    assert llm.statistics().num_hit_tokens - before == 32  # of 47 tokens 46 are stored
    assert output.token_ids == small.model_tokens(pristine_model, turn)


def test_equal_prompts_of_one_call_are_computed_once(make_llm, prompts, greedy):
    llm = make_llm()
    assert tokens_of(llm.generate([prompts[4]] * 6, params_of())) == [greedy[4]] * 6
    assert llm.statistics().num_hit_tokens == 5 * shareable(prompts[4])


def test_a_salt_keeps_prompts_apart(make_llm, prompts, greedy):
    llm = make_llm()
    hits = [0]
    for salt in (None, "a", "b", "a", None, ""):
        assert tokens_of(llm.generate([prompts[4]], params_of(cache_salt=salt))) == [greedy[4]]
        hits.append(llm.statistics().num_hit_tokens)
    expected = [0, 0, 0, shareable(prompts[4]), shareable(prompts[4]), 0]
    assert np.diff(hits).tolist() == expected


def test_samples_keep_the_salt_of_their_prompt(make_llm, prompts):
    llm = make_llm(max_num_seqs=2)
    llm.generate([prompts[4]], sampling(n=4, cache_salt="a"))
    hits = llm.statistics().num_hit_tokens
    assert hits == 2 * shareable(prompts[4])  # those that had no seq_id
    llm.generate([prompts[4]], sampling())
    assert llm.statistics().num_hit_tokens == hits


def test_other_weights_or_another_format_share_no_hash(make_llm, model, prompts):
    def hashes(**options: Any) -> set[bytes]:
        chain = make_llm(**options).engine.manager.chain_tokens((prompts[4] * 3)[:300])
        return set(chain.hashes)

    before = hashes()
    assert before == hashes(max_num_seqs=2, num_blocks=70)
    assert not before & hashes(kv_format="int8")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight += 0.5
    assert not before & hashes()


def test_without_prefix_caching_nothing_is_hit_or_kept(make_llm, prompts, greedy):
    llm = make_llm(prefix_caching=False)
    for _ in range(2):
        assert tokens_of(llm.generate(prompts, params_of())) == greedy
    assert llm.statistics().num_hit_tokens == llm.statistics().num_cached_blocks == 0
    assert llm.memory_stats().cached == 0


def test_a_full_pool_of_cached_blocks_is_as_good_as_an_empty_one(make_llm, prompts, greedy):
    llm = make_llm(num_blocks=12)
    for _ in range(3):
        assert tokens_of(llm.generate(prompts, params_of())) == greedy
    assert llm.statistics().num_cached_blocks > 8
    assert llm.memory_stats().free == llm.memory_stats().total


def test_a_failed_step_leaves_no_wrong_prefix_behind(make_llm, model, monkeypatch, prompts, greedy):
    llm = make_llm(token_budget=40)
    mlp = model.model.layers[-1].mlp
    for call in (1, 2, 5, 9):
        with monkeypatch.context() as patch:
            broken = small.raise_once(mlp.forward, call, RuntimeError("device lost"))
            patch.setattr(mlp, "forward", broken)
            with pytest.raises(RuntimeError, match="device lost"):
                llm.generate(prompts, params_of())
        assert tokens_of(llm.generate(prompts, params_of())) == greedy


def test_reset_forgets_all_prefixes_and_is_refused_while_requests_run(make_llm, prompts, greedy):
    llm = make_llm()
    llm.generate(prompts, params_of())
    assert llm.memory_stats().cached > 0
    stream = llm.stream(prompts[1], params_of())
    next(stream)
    with pytest.raises(InvalidStepError, match="in use by 1"):
        llm.reset_prefix_cache()
    stream.close()
    llm.reset_prefix_cache()
    assert llm.memory_stats().cached == llm.statistics().num_cached_blocks == 0
    before = llm.statistics().num_hit_tokens
    assert tokens_of(llm.generate(prompts, params_of())) == greedy
    assert llm.statistics().num_hit_tokens == before


# -- swap ---------------------------------------------------------------------------------------


def count_swaps(llm: LLM) -> list[int]:
    """Counts blocks copied to and from the host from here on."""
    counts, cache = [0, 0], llm.engine.cache
    copies = (cache.swap_out, cache.swap_in)

    def counting(place: int) -> Callable[..., None]:
        def count_and_copy(device_ids: np.ndarray, host_ids: np.ndarray) -> None:
            counts[place] += len(device_ids)
            copies[place](device_ids, host_ids)

        return count_and_copy

    cache.swap_out, cache.swap_in = counting(0), counting(1)
    return counts


def swap_prompts(prompts: list[list[int]], length: int) -> list[list[int]]:
    source = [token for prompt in prompts for token in prompt]
    return [[index, *source[7 * index :], *source][:length] for index in range(5)]


@pytest.mark.parametrize(("kv_format", "length", "num_blocks"), [
    ("native", 40, 14), ("int8", 40, 12), ("int4", 300, 30), ("int2", 300, 45),
])  # fmt: skip
def test_a_pool_too_small_for_all_gives_the_same_tokens_with_swap(
    make_llm, prompts, kv_format, length, num_blocks
):
    """A recomputed sequence could differ in a quantized format; a swapped one may not."""
    batch = swap_prompts(prompts, length)
    options = {"kv_format": kv_format, "token_budget": 4096, "prefix_caching": False}
    params = sampling(max_tokens=60)
    large = make_llm(**options)
    expected = tokens_of(large.generate(batch, params))
    assert large.statistics().num_preemptions == 0
    llm = make_llm(num_blocks=num_blocks, swap_space="4MiB", **options)
    llm.engine.scheduler.steps_ahead = 0  # they outgrow the pool
    counts = count_swaps(llm)
    assert tokens_of(llm.generate(batch, params)) == expected
    assert llm.statistics().num_preemptions > 0
    assert counts[0] == counts[1] > 0
    assert llm.engine.manager.host_pool.num_allocated == 0


def test_swap_and_prefix_caching_and_samples_together(make_llm, prompts, samples):
    llm = make_llm(num_blocks=16, swap_space="1MiB", max_num_seqs=6)
    counts = count_swaps(llm)
    params = sampling(seed=SEED, n=NUM_SAMPLES, max_tokens=NUM_TOKENS)
    for _ in range(2):
        outputs = llm.generate([prompts[2], prompts[4], prompts[5]], params)
        assert [[c.token_ids for c in output.completions] for output in outputs] == samples
    assert counts[0] == counts[1] > 0
    assert llm.statistics().num_hit_tokens > 0


def test_a_request_may_be_aborted_while_it_is_swapped_out(make_llm, prompts):
    batch = swap_prompts(prompts, 40)
    llm = make_llm(num_blocks=14, swap_space="1MiB")
    llm.engine.scheduler.steps_ahead = 0  # they outgrow the pool
    names = [str(index) for index in range(5)]
    for name, prompt in zip(names, batch, strict=True):
        llm.engine.add_request(name, prompt, params_of(max_tokens=60))
    while not llm.statistics().num_swapped:
        llm.engine.step()
    for name in names:
        llm.engine.abort(name)
    assert_nothing_is_held(llm)
    assert llm.engine.manager.host_pool.num_allocated == 0


def test_a_copy_that_fails_ends_the_call_and_the_llm_goes_on(make_llm, monkeypatch, prompts):
    batch = swap_prompts(prompts, 40)
    params = sampling(max_tokens=60)
    llm = make_llm(num_blocks=14, swap_space="1MiB")
    llm.engine.scheduler.steps_ahead = 0  # they outgrow the pool
    expected = tokens_of(llm.generate(batch, params))
    broken = small.raise_once(llm.engine.cache.swap_in, 1, RuntimeError("no pinned memory"))
    monkeypatch.setattr(llm.engine.cache, "swap_in", broken)
    with pytest.raises(RuntimeError, match="no pinned memory"):
        llm.generate(batch, params)
    assert_nothing_is_held(llm)
    assert llm.engine.manager.host_pool.num_allocated == 0
    assert tokens_of(llm.generate(batch, params)) == expected


@pytest.mark.parametrize("direction", ["swap_out", "swap_in"])
def test_a_copy_that_fails_loses_no_request(make_llm, monkeypatch, prompts, direction):
    """Those that go on have the tokens that they would have had."""
    batch = swap_prompts(prompts, 40)
    names = [str(index) for index in range(5)]
    params = sampling(max_tokens=60)
    llm = make_llm(num_blocks=14, swap_space="1MiB")
    llm.engine.scheduler.steps_ahead = 0  # they outgrow the pool
    expected = dict(zip(names, tokens_of(llm.generate(batch, params)), strict=True))
    copy = getattr(llm.engine.cache, direction)
    broken = small.raise_once(copy, 1, RuntimeError("no pinned memory"))
    monkeypatch.setattr(llm.engine.cache, direction, broken)
    for name, prompt in zip(names, batch, strict=True):
        llm.engine.add_request(name, prompt, params)
    found: dict[str, list[int]] = {name: [] for name in names}
    with pytest.raises(RuntimeError, match="no pinned memory"):
        drain_engine(llm.engine, found)
    left = set(llm.engine._live) | {name for name in names if len(found[name]) == 60}
    assert len(left) == 5
    drain_engine(llm.engine, found)
    for name in left:
        assert found[name] == expected[name]


@pytest.mark.parametrize("swap_space", ["lots", -1, 1])
def test_a_swap_space_that_holds_nothing_is_refused(model, swap_space):
    with pytest.raises(PagedKVError):
        LLM(model, swap_space=swap_space)


# -- the demo model -----------------------------------------------------------------------------

NUM_REQUESTS = 64
PREFIX_LENGTH = 512
SUFFIX_LENGTH = 8


@pytest.fixture(scope="module")
def demo_model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(MODEL_FOLDER, dtype=torch.float32)


@pytest.fixture(scope="module")
def common_prompts() -> list[list[int]]:
    """64 prompts of 512 common tokens and 8 of their own."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL_FOLDER, model_max_length=1 << 30)
    text = " ".join(EXCERPT.read_text().split())
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    own = np.array(token_ids[600 : 600 + NUM_REQUESTS * SUFFIX_LENGTH])
    own = own.reshape(NUM_REQUESTS, SUFFIX_LENGTH).tolist()
    return [token_ids[:PREFIX_LENGTH] + suffix for suffix in own]


@pytest.fixture
def make_demo(demo_model) -> Iterator[Any]:
    made: list[LLM] = []

    def make(**options: Any) -> LLM:
        settings = {"max_num_seqs": NUM_REQUESTS, "token_budget": 8192, "max_model_len": 600}
        made.append(LLM(demo_model, **{**settings, **options}))
        return made[-1]

    yield make
    for llm in made:
        assert_nothing_is_held(llm)
        llm.close()


# Five steps compute all prompts where none is shared; then all run at once.
DEMO_PARAMS = SamplingParams(max_tokens=6, ignore_eos=True)


def test_64_requests_with_a_common_prompt_take_an_eighth_of_the_memory(make_demo, common_prompts):
    """32 blocks of 16 tokens are shared, and each has one for its last 8 tokens and its output."""
    shared = make_demo(kv_format="native")
    outputs = tokens_of(shared.generate(common_prompts, DEMO_PARAMS))
    unshared = make_demo(kv_format="native", prefix_caching=False)
    assert tokens_of(unshared.generate(common_prompts, DEMO_PARAMS)) == outputs
    peak = shared.engine.manager.pool.peak_allocated
    assert peak == PREFIX_LENGTH // 16 + NUM_REQUESTS
    assert unshared.engine.manager.pool.peak_allocated == (PREFIX_LENGTH // 16 + 1) * NUM_REQUESTS
    assert peak < unshared.engine.manager.pool.peak_allocated / 8
    assert shared.statistics().num_hit_tokens == PREFIX_LENGTH * (NUM_REQUESTS - 1)
    for prompt, expected in list(zip(common_prompts, outputs, strict=True))[::16]:
        assert tokens_of(unshared.generate([prompt], DEMO_PARAMS)) == [expected]
    for prompt, expected in list(zip(common_prompts, outputs, strict=True))[::4]:
        assert tokens_of(shared.generate([prompt], DEMO_PARAMS)) == [expected]


@pytest.mark.parametrize(("kv_format", "num_hit"), [("int8", 480), ("int2", 456)])
def test_64_requests_on_a_quantized_prefix_get_the_tokens_of_each_alone(
    make_demo, common_prompts, kv_format, num_hit
):
    """The first computes the prefix, and so does the first of those alone; the others hit it."""
    together, alone = make_demo(kv_format=kv_format), make_demo(kv_format=kv_format)
    outputs = tokens_of(together.generate(common_prompts, DEMO_PARAMS))
    assert together.statistics().num_hit_tokens == num_hit * (NUM_REQUESTS - 1)
    for prompt, expected in list(zip(common_prompts, outputs, strict=True))[::8]:
        assert tokens_of(alone.generate([prompt], DEMO_PARAMS)) == [expected]
    assert alone.statistics().num_hit_tokens == num_hit * (NUM_REQUESTS // 8 - 1)
