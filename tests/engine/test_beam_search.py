"""Beam search: equal to transformers' in native, never short of blocks once begun, free at the end.

The reference is the model's own `generate` on each prompt alone, and an enumeration of every
continuation where there are few.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from paged_kv import LLM, BeamSearchParams, KVFormat, SamplingParams
from paged_kv.engine.beam_search import max_blocks_of_beams
from paged_kv.entrypoints.demo import MODEL_FOLDER, demo_prompts
from paged_kv.errors import (
    ConfigError,
    GenerationError,
    InvalidRequestError,
    NonFiniteLogitsError,
    OutOfBlocksError,
    PromptTooLongError,
)
from tests.support import zoo
from tests.support.beam_searches import (
    ENDS,
    SMALL_VOCABULARY,
    assert_nothing_is_held,
    assert_same,
    engine_of,
    expected_of,
    intercept,
    params_of,
    prompts_of,
    replace_logits,
    scores_alone,
    search_beams,
    searched,
    small_model,
)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return small_model()


@pytest.fixture(scope="module")
def demo_model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(MODEL_FOLDER, dtype=torch.float32)


# -- equal to transformers ----------------------------------------------------------------------


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("num_beams", [1, 2, 3, 4, 5])
def test_tokens_and_scores_equal_generate(model, num_beams, early_stopping):
    """Among ends, whatever the length penalty, and all prompts in one batch."""
    prompts = prompts_of()
    for length_penalty in (0.0, 1.0, 2.0, -1.0):
        params = params_of(
            num_beams=num_beams,
            num_return=num_beams,
            max_tokens=30,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
        )
        expected = expected_of(model, prompts, params)
        with engine_of(model) as llm:
            found = searched(search_beams(llm.engine, prompts, params))
        assert_same(found, expected)


def test_the_options_make_a_difference(model):
    """Or the test above would prove little."""
    found = []
    with engine_of(model) as llm:
        for penalty, stopping in itertools.product((0.0, 1.0, 2.0), (False, True, "never")):
            params = params_of(max_tokens=30, length_penalty=penalty, early_stopping=stopping)
            outputs = search_beams(llm.engine, prompts_of(), params)
            found.append([tokens for tokens, _ in searched(outputs)])
            reasons = {h.finish_reason for output in outputs for h in output.hypotheses}
    assert reasons == {"stop", "length"}
    different = [beams for index, beams in enumerate(found) if beams not in found[:index]]
    assert len(different) == 7  # without a length penalty sums only fall: all three stop alike


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt-neox"])
def test_architectures_equal_generate(name):
    reference, prompts = zoo.model(name), zoo.prompts((1, 5, 40, 97))
    params = params_of(num_beams=4, num_return=2)
    expected = expected_of(reference, prompts, params)
    with engine_of(reference) as llm:
        assert_same(searched(search_beams(llm.engine, prompts, params)), expected)


def test_demo_model_equals_generate(demo_model):
    tokenizer = AutoTokenizer.from_pretrained(MODEL_FOLDER)
    prompts = [tokenizer.encode(text * n) for n, text in enumerate(demo_prompts()[:3], start=1)]
    params = params_of(num_beams=4, num_return=4, max_tokens=24)
    expected = expected_of(demo_model, prompts, params)
    with engine_of(demo_model) as llm:
        assert_same(searched(search_beams(llm.engine, prompts, params)), expected)


def test_stop_tokens_are_further_ends(model):
    prompts, params = prompts_of(), params_of(stop_token_ids=[11, 12])
    model.generation_config.eos_token_id = [*ENDS, 11, 12]
    try:
        expected = expected_of(model, prompts, params)
    finally:
        model.generation_config.eos_token_id = ENDS
    with engine_of(model) as llm:
        assert_same(searched(search_beams(llm.engine, prompts, params)), expected)
        alone = params_of(stop_token_ids=[11, 12], ignore_eos=True)
        outputs = search_beams(llm.engine, prompts, alone)
    stopped = [h for output in outputs for h in output.hypotheses if h.finish_reason == "stop"]
    assert stopped
    assert {h.token_ids[-1] for h in stopped} <= {11, 12}


def test_ignored_ends_do_not_end(model):
    prompts, params = prompts_of(), params_of(ignore_eos=True)
    with engine_of(model) as llm:
        outputs = search_beams(llm.engine, prompts, params)
    hypotheses = [h for output in outputs for h in output.hypotheses]
    assert {len(h.token_ids) for h in hypotheses} == {12}
    assert {h.finish_reason for h in hypotheses} == {"length"}
    assert set(ENDS) & {token for h in hypotheses for token in h.token_ids}


# -- equal to the enumeration of everything -----------------------------------------------------


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, -2.0])
@pytest.mark.parametrize("early_stopping", [False, "never"])
def test_enough_beams_find_the_best_of_all(early_stopping, length_penalty):
    """Logits that depend on the last token alone: every continuation can be scored by hand."""
    vocab_size, end, max_tokens, prompt = 4, 0, 3, [2]
    made = zoo.build("LlamaForCausalLM", vocab_size=vocab_size, num_hidden_layers=1)
    made.generation_config.eos_token_id = end
    table = torch.randn(vocab_size, vocab_size, generator=torch.Generator().manual_seed(3))
    log_probabilities = table.log_softmax(-1).tolist()
    scores = {}
    for tokens in itertools.product(range(vocab_size), repeat=max_tokens):
        length = tokens.index(end) + 1 if end in tokens else max_tokens
        path = [*prompt, *tokens[:length]]
        total = sum(log_probabilities[a][b] for a, b in itertools.pairwise(path))
        scores[tokens[:length]] = total / length**length_penalty
    ranked = sorted(scores, key=lambda tokens: -scores[tokens])
    params = BeamSearchParams(
        num_beams=64,  # of 40 continuations
        num_return=64,
        max_tokens=max_tokens,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
    )
    with engine_of(made, max_num_seqs=64) as llm:
        replace_logits(llm, lambda token_ids, _: table[token_ids])
        ((tokens, found_scores),) = searched(search_beams(llm.engine, [prompt], params))
    assert tokens == [list(t) for t in ranked]
    assert found_scores == pytest.approx([scores[t] for t in ranked], abs=1e-5)


def test_later_ends_may_be_better_where_short_is_good():
    """By hand: with a length penalty of -1 [2, 3, end] replaces [2, end] in the third step."""
    made = zoo.build("LlamaForCausalLM", vocab_size=4, num_hidden_layers=1)
    made.generation_config.eos_token_id = 0
    rows = [[0.25] * 4, [0.39, 0.005, 0.6, 0.005], [0.29, 0.005, 0.005, 0.7], [0.97] + [0.01] * 3]
    table = torch.tensor(rows).log()
    params = params_of(num_beams=2, num_return=2, length_penalty=-1.0, early_stopping="never")
    with engine_of(made) as llm:
        replace_logits(llm, lambda token_ids, _: table[token_ids])
        ((tokens, scores),) = searched(search_beams(llm.engine, [[1]], params))
    assert tokens == [[0], [2, 3, 0]]
    assert scores == pytest.approx([math.log(0.39), 3 * math.log(0.6 * 0.7 * 0.97)])


# -- whatever the engine's settings -------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"token_budget": 7}, id="chunks"),
        pytest.param({"token_budget": 1}, id="fewer tokens than beams"),
        pytest.param({"max_num_seqs": 4}, id="one prompt at a time"),
        pytest.param({"max_num_seqs": 7, "token_budget": 33}, id="two at a time"),
        pytest.param({"prefix_caching": False}, id="no prefix cache"),
        pytest.param({"num_blocks": 14}, id="no block to spare"),
    ],
)
def test_settings_change_nothing(model, settings):
    prompts = [*prompts_of((64, 17, 40)), *prompts_of((64,)), prompts_of((64,))[0][:40]]
    params = params_of(max_tokens=20)
    with engine_of(model) as llm:
        expected = searched(search_beams(llm.engine, prompts, params))
    with engine_of(model, **settings) as llm:
        assert_same(searched(search_beams(llm.engine, prompts, params)), expected)


def test_prompts_that_begin_alike_are_computed_once(model):
    (prompt,) = prompts_of((64,))
    computed = 0
    with engine_of(model) as llm:
        forward = llm.engine.model.forward

        def counting(token_ids: Tensor, *arguments: Any) -> Tensor:
            nonlocal computed
            computed += len(token_ids)
            return forward(token_ids, *arguments)

        llm.engine.model.forward = counting
        first, second, again = search_beams(llm.engine, [prompt] * 3, params_of(max_tokens=1))
        assert computed == 64 + 16 + 16  # the last block holds the token whose logits are wanted
        assert_same(searched([second, again]), searched([first, first]))
        search_beams(llm.engine, [prompt], params_of(max_tokens=1))
        assert computed == 64 + 3 * 16
        search_beams(llm.engine, [prompt], params_of(max_tokens=1, cache_salt="another tenant"))
        assert computed == 2 * 64 + 3 * 16


@pytest.mark.parametrize(
    ("kv_format", "tolerance"), [("native", 1e-5), ("int8", 3e-3), ("int2", 0.1)]
)
def test_scores_are_ordered_and_those_of_the_tokens(demo_model, kv_format, tolerance):
    """Over prompts and outputs that seal blocks, against one full forward pass."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL_FOLDER)
    tokens = tokenizer.encode(" ".join(demo_prompts()))
    prompts = [tokens[:150], tokens[20:205], tokens[40:340]]
    with engine_of(demo_model, kv_format=kv_format) as llm:
        outputs = search_beams(llm.engine, prompts, params_of(max_tokens=24))
    for prompt, output in zip(prompts, outputs, strict=True):
        scores = [h.score for h in output.hypotheses]
        assert scores == sorted(scores, reverse=True)
        found = [h.token_ids for h in output.hypotheses]
        assert len({tuple(t) for t in found}) == 3
        alone = [scores_alone(demo_model, prompt, t, 1.0) for t in found]
        assert scores == pytest.approx(alone, abs=tolerance)


# -- blocks -------------------------------------------------------------------------------------

TWO_BITS = KVFormat(name="two bits", key_bits=2, value_bits=2)


def test_beams_share_the_blocks_of_the_prompt(model):
    """160 of 165 prompt tokens lie in 10 shared blocks; each beam has at most 2 of its own."""
    with engine_of(model, num_blocks=60) as llm:
        pool = llm.engine.manager.pool
        search_beams(llm.engine, prompts_of((165,)), params_of(num_beams=5, max_tokens=20))
        assert 12 <= pool.peak_allocated <= 10 + 5 * 2
        ten_beams = params_of(num_beams=10, max_tokens=20)
        search_beams(llm.engine, prompts_of((165, 165)), ten_beams)
        assert pool.peak_allocated <= 60 < 2 * 10 * 12


@pytest.mark.parametrize(
    ("kv_format", "num_prompt_tokens", "max_tokens", "num_blocks"),
    [
        pytest.param("native", 16, 17, 1 + 3, id="the last token is not stored"),
        pytest.param("native", 16, 18, 1 + 3 * 2, id="one more is"),
        pytest.param("native", 33, 1, 3, id="beams of one token store nothing"),
        pytest.param("native", 33, 2, 2 + 3, id="each its copy of the last block"),
        # Head of 8 tokens, body blocks of 128, a tail of at least 32 in blocks of 8.
        pytest.param(TWO_BITS, 10, 290, 1 + 3 * 22, id="each seals for itself, twice"),
        pytest.param(TWO_BITS, 180, 246, 2 + 3 * 22, id="head and body of the prompt shared"),
        pytest.param(TWO_BITS, 180, 100, 7 + 3 * 13, id="head, body and part of the tail shared"),
    ],
)
def test_beams_that_part_at_once_need_what_is_foretold(
    model, kv_format, num_prompt_tokens, max_tokens, num_blocks
):
    """Three beams, each of which then repeats its first token."""
    table = 20.0 * torch.eye(SMALL_VOCABULARY)
    table[0, :4] = torch.tensor([0.0, 20.0, 20.0, 20.0])
    params = params_of(max_tokens=max_tokens, ignore_eos=True)
    settings = {"kv_format": kv_format, "kv_dtype": torch.float32, "num_blocks": num_blocks}
    with engine_of(model, **settings) as llm:
        manager = llm.engine.manager
        needed = max_blocks_of_beams(manager.geometry, num_prompt_tokens, max_tokens, 3)
        replace_logits(llm, lambda token_ids, _: table[token_ids])
        (output,) = search_beams(llm.engine, [[0] * num_prompt_tokens], params)
        assert sorted(h.token_ids[-1] for h in output.hypotheses) == [1, 2, 3]
        assert manager.pool.peak_allocated == needed == num_blocks


@pytest.mark.parametrize("kv_format", ["native", "int8", "int2"])
def test_searches_fit_in_exactly_the_blocks_they_are_said_to_need(model, kv_format):
    """Random logits and lengths, and a pool without a block to spare: no step ever lacks one."""
    numbers = np.random.default_rng(5)
    fullest = 0.0
    for _ in range(12):
        num_beams = int(numbers.integers(1, 6))
        lengths = [int(n) for n in numbers.integers(1, 400, size=int(numbers.integers(1, 4)))]
        max_tokens = int(numbers.integers(1, 150))
        params = params_of(num_beams=num_beams, max_tokens=max_tokens, num_return=1)
        with LLM(model, kv_format=kv_format, num_blocks=1, max_num_seqs=1) as probe:
            geometry = probe.engine.manager.geometry
        needs = [max_blocks_of_beams(geometry, n, max_tokens, num_beams) for n in lengths]
        num_blocks = int(numbers.integers(max(needs), sum(needs) + 1))
        settings = {"num_blocks": num_blocks, "token_budget": int(numbers.integers(1, 300))}
        with engine_of(model, kv_format=kv_format, **settings) as llm:
            replace_logits(llm, lambda _, rows: torch.randn(rows, SMALL_VOCABULARY))
            outputs = search_beams(llm.engine, prompts_of(tuple(lengths)), params)
            assert all(len(output.hypotheses) == 1 for output in outputs)
            fullest = max(fullest, llm.engine.manager.pool.peak_allocated / num_blocks)
    assert fullest > 0.9


# -- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 0}, "num_beams must be an integer of at least 1, got 0"),
        ({"num_beams": 2.0}, "num_beams must be an integer of at least 1, got 2.0"),
        ({"num_beams": True}, "num_beams must be an integer of at least 1, got True"),
        ({"num_return": 0}, "num_return must be an integer of at least 1, got 0"),
        ({"num_return": 4}, r"num_return must be at most num_beams \(3\), got 4"),
        ({"length_penalty": "1"}, "length_penalty must be a number from -16 to 16, got '1'"),
        ({"length_penalty": math.nan}, "length_penalty must be a number .* got nan"),
        ({"length_penalty": 17}, "length_penalty must be a number from -16 to 16, got 17"),
        ({"early_stopping": "always"}, "early_stopping must be True, .* got 'always'"),
        ({"early_stopping": 1}, 'early_stopping must be True, False or "never", got 1'),
        ({"max_tokens": 0}, "max_tokens must be None or at least 1, got 0"),
        ({"stop_token_ids": 5}, "stop_token_ids must be a list of token ids, got 5"),
        ({"cache_salt": 5}, "cache_salt must be None or a string, got 5"),
    ],
)
def test_bad_params_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        params_of(**options)


@pytest.mark.parametrize(
    ("bad", "options", "error", "message"),
    [
        ([], {}, InvalidRequestError, "the prompt is empty"),
        ([1, 99], {}, InvalidRequestError, "token id 99 is outside the vocabulary of 20"),
        ([1], {"stop_token_ids": [-1]}, InvalidRequestError, "token id -1 is outside"),
        ([1] * 100, {}, PromptTooLongError, "a prompt of 100 tokens leaves no room"),
        ([1] * 99, {"max_tokens": None}, PromptTooLongError, "need 7 blocks; the pool has 6"),
        ([1] * 60, {}, OutOfBlocksError, "3 beams of 60 .* may need 9 blocks; the pool has 6"),
        ([1], {"num_beams": 9}, OutOfBlocksError, r"9 beams exceed max_num_seqs \(8\)"),
    ],
)
def test_prompts_that_cannot_be_served_are_refused_first(model, bad, options, error, message):
    with engine_of(model, num_blocks=6, max_num_seqs=8, max_model_len=100) as llm:
        replace_logits(llm, lambda *_: pytest.fail("something was computed"))
        with pytest.raises(error, match=message):
            search_beams(llm.engine, [[1, 2], bad], params_of(**options))
        assert not llm.engine.manager.num_cached_blocks


def test_max_tokens_none_ends_with_the_model_length(model):
    with engine_of(model, max_model_len=30) as llm:
        params = params_of(max_tokens=None, ignore_eos=True)
        (output,) = search_beams(llm.engine, prompts_of((17,)), params)
    assert [len(h.token_ids) for h in output.hypotheses] == [13] * 3


# -- what goes wrong while it runs --------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("failing_step", [1, 2, 5])
def test_errors_of_the_model_free_everything(model, error, failing_step):
    prompts, params = prompts_of((1, 17, 90, 40)), params_of(ignore_eos=True)
    steps = itertools.count(1)

    def fail_once(logits: Tensor) -> Tensor:
        if next(steps) == failing_step:
            raise error("out of luck")
        return logits

    with engine_of(model, token_budget=50, max_num_seqs=9) as llm:
        intercept(llm, fail_once)
        with pytest.raises(error, match="out of luck"):
            search_beams(llm.engine, prompts, params)
        assert_nothing_is_held(llm)
        found = searched(search_beams(llm.engine, prompts, params))
    with engine_of(model) as llm:
        assert_same(found, searched(search_beams(llm.engine, prompts, params)))


def test_unusable_logits_end_one_prompt_alone(model):
    """In the fourth step, when each of three prompts has three beams."""
    prompts, params = prompts_of((1, 17, 40)), params_of(ignore_eos=True)
    steps = itertools.count(1)

    def spoil(logits: Tensor) -> Tensor:
        if next(steps) == 4:
            logits = logits.clone()
            logits[4] = math.nan
        return logits

    with engine_of(model) as llm:
        expected = searched(search_beams(llm.engine, prompts, params))
        intercept(llm, spoil)
        first, failed, last = search_beams(llm.engine, prompts, params)
    assert_same(searched([first, last]), [expected[0], expected[2]])
    assert failed.hypotheses == []
    assert isinstance(failed.error, NonFiniteLogitsError)
    assert "after 17 prompt and 3 output tokens" in str(failed.error)


def test_impossible_tokens_are_never_chosen(model):
    """Logits of -inf leave fewer candidates than beams."""

    def forbid(logits: Tensor) -> Tensor:
        return logits.masked_fill(torch.arange(SMALL_VOCABULARY) > 8, -math.inf)

    with engine_of(model) as llm:
        intercept(llm, forbid)
        params = params_of(num_beams=16, num_return=16, max_tokens=1)
        (output,) = search_beams(llm.engine, [[8]], params)
    assert sorted(h.token_ids[0] for h in output.hypotheses) == list(range(9))


# -- through the LLM ----------------------------------------------------------------------------


def test_llm_returns_texts_best_first(demo_model):
    tokenizer = AutoTokenizer.from_pretrained(MODEL_FOLDER)
    text = demo_prompts()[0]
    prompt = tokenizer.encode(text)
    params = params_of(stop_token_ids=[tokenizer.encode("x .", add_special_tokens=False)[-1]])
    with engine_of(demo_model, tokenizer=tokenizer) as llm:
        outputs = llm.beam_search([text, prompt], params)
        (expected, _) = search_beams(llm.engine, [prompt, prompt], params)
    assert [output.prompt for output in outputs] == [text, prompt]
    for output in outputs:
        assert output.prompt_token_ids == prompt
        for completion, hypothesis in zip(output.completions, expected.hypotheses, strict=True):
            assert completion.token_ids == hypothesis.token_ids
            assert completion.log_probability == hypothesis.score
            assert completion.finish_reason == hypothesis.finish_reason
            is_stop = completion.finish_reason == "stop"
            tokens = completion.token_ids[: -1 if is_stop else None]
            whole = tokenizer.decode(prompt + tokens, skip_special_tokens=True)
            assert completion.text == whole[len(tokenizer.decode(prompt, True)) :]


def test_llm_reports_failed_prompts(model):
    with engine_of(model) as llm:
        intercept(llm, lambda logits: torch.full_like(logits, math.nan))
        with pytest.raises(
            GenerationError, match="1 of 1 requests failed: prompt 0: after 2 prompt"
        ) as caught:
            llm.beam_search([1, 2])
    ((completion,),) = [output.completions for output in caught.value.outputs]
    assert completion.finish_reason == "error"
    assert isinstance(completion.error, NonFiniteLogitsError)


def test_llm_refuses_other_params(model):
    with (
        engine_of(model) as llm,
        pytest.raises(ConfigError, match="params must be BeamSearchParams, got SamplingParams"),
    ):
        llm.beam_search([1, 2], SamplingParams())
