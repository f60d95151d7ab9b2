"""Requests and steps that fail: alone, and without losing a block."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from paged_kv import LLM
from paged_kv.errors import ConfigError, GenerationError, InvalidRequestError, NonFiniteLogitsError
from paged_kv.models.huggingface import PagedModel
from tests.support.small_llm import (
    NUM_NEW_TOKENS,
    assemble,
    assert_nothing_is_held,
    every_format,
    model_tokens,
    params_of,
    raise_once,
    tokens_of,
)

# -- requests that fail alone ---------------------------------------------------------------------

BROKEN_TOKEN = 255


@pytest.fixture
def broken_model(model) -> LlamaForCausalLM:
    """One token's embedding is NaN: so is everything that a sequence computes after it."""
    with torch.no_grad():
        model.get_input_embeddings().weight[BROKEN_TOKEN] = torch.nan
    return model


def without_broken_token(ids: Tensor, scores: Tensor) -> Tensor:
    return scores.index_fill(1, torch.tensor([BROKEN_TOKEN]), -torch.inf)


@every_format
@pytest.mark.parametrize("is_roomy", [True, False], ids=["roomy", "reusing-blocks"])
def test_a_request_with_nan_logits_fails_alone_and_its_blocks_are_clean_for_others(
    make_llm, broken_model, kv_format, is_roomy
):
    """The blocks it leaves hold NaN; those who take them over must not see it."""
    params = params_of(logits_processors=[without_broken_token])
    good = [[3, 1, 4] * 5, [7] * 20, [2, 7, 1, 8] * 9]
    bad = [[9] * 150 + [BROKEN_TOKEN] + [9] * 40, [BROKEN_TOKEN]]
    # One chunk a prompt: chunks of another size would give a quantized format other tokens.
    options = {"kv_format": kv_format, "token_budget": 4096}
    llm = make_llm(**options)
    expected = tokens_of(llm.generate(good, params))
    if not is_roomy:  # no more than the longest request needs
        smallest = llm.engine.manager.geometry.max_blocks(len(bad[0]) + NUM_NEW_TOKENS - 1)
        llm = make_llm(num_blocks=smallest, **options)
    batch = [bad[0], good[0], bad[1], good[1], bad[0], good[2]]
    with pytest.raises(GenerationError, match="3 of 6 requests failed") as caught:
        llm.generate(batch, params)
    outputs = caught.value.outputs
    assert [output.prompt_token_ids for output in outputs] == batch
    assert [outputs[index].token_ids for index in (1, 3, 5)] == expected
    for index in (0, 2, 4):
        (completion,) = outputs[index].completions
        assert completion.token_ids == []
        assert completion.text == ""
        assert completion.finish_reason == "error"
        assert isinstance(completion.error, NonFiniteLogitsError)
        assert f"{len(batch[index])} prompt and 0 output tokens" in str(completion.error)
    assert [outputs[index].completions[0].error for index in (1, 3, 5)] == [None] * 3
    assert caught.value.__cause__ is outputs[0].completions[0].error
    assert_nothing_is_held(llm)
    assert tokens_of(llm.generate(good, params)) == expected


def test_a_request_that_fails_after_some_tokens_keeps_them_and_their_text(
    make_llm, monkeypatch, tokenizer, prompts, greedy
):
    """Only the sequence that reaches position 68 fails: prompt 3 of 63 tokens, after 6 outputs."""
    forward = PagedModel.forward

    def poisoned(self, token_ids, positions, logit_rows, *step):
        logits = forward(self, token_ids, positions, logit_rows, *step).clone()
        logits[positions[logit_rows] == 68] = torch.nan
        return logits

    monkeypatch.setattr(PagedModel, "forward", poisoned)
    llm = make_llm()
    with pytest.raises(GenerationError, match="63 prompt and 6 output tokens") as caught:
        llm.generate([*prompts[:4], prompts[5]], params_of())
    (failed,) = caught.value.outputs[3].completions
    assert failed.token_ids == greedy[3][:6]
    assert failed.finish_reason == "error"
    others = [caught.value.outputs[index].token_ids for index in (0, 1, 2)]
    assert others == greedy[:3]
    monkeypatch.undo()
    (same_length,) = llm.generate([prompts[3]], params_of(max_tokens=6))
    assert failed.text == same_length.text


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_a_stream_ends_a_failed_request_with_an_event_that_carries_its_error(
    make_llm, prompts, greedy, value
):
    calls = itertools.count()

    def break_the_third(ids: Tensor, scores: Tensor) -> Tensor:
        return torch.full_like(scores, value) if next(calls) == 2 else scores

    params = [params_of(), params_of(logits_processors=[break_the_third])]
    good, bad = assemble(make_llm().stream(prompts[1:3], params), 2)
    assert (good.token_ids, good.error) == (greedy[1], None)
    assert bad.token_ids == greedy[2][:2]
    assert bad.finish_reason == "error"
    assert isinstance(bad.error, NonFiniteLogitsError)


# -- steps that fail ------------------------------------------------------------------------------


@every_format
@pytest.mark.parametrize("call", [1, 2, 20])
@pytest.mark.parametrize("error", [RuntimeError("device lost"), KeyboardInterrupt()], ids=repr)
def test_an_error_of_the_model_frees_every_block_and_the_llm_goes_on(
    make_llm, model, monkeypatch, prompts, kv_format, call, error
):
    """It comes from the last layer, when the first has already stored and sealed."""
    # What a prompt finds in the prefix cache the second time is quantized.
    has_prefixes = kv_format == "native"
    llm = make_llm(
        kv_format=kv_format, token_budget=200, num_blocks=60, prefix_caching=has_prefixes
    )
    expected = tokens_of(llm.generate(prompts, params_of()))
    mlp = model.model.layers[-1].mlp
    monkeypatch.setattr(mlp, "forward", raise_once(mlp.forward, call, error))
    with pytest.raises(type(error)) as caught:
        llm.generate(prompts, params_of())
    assert caught.value is error
    assert_nothing_is_held(llm)
    assert tokens_of(llm.generate(prompts, params_of())) == expected


@every_format
def test_a_stream_survives_a_step_that_fails_while_another_stream_runs_it(
    make_llm, model, monkeypatch, prompts, kv_format
):
    """Its tokens of the failed steps are computed again; some of those steps seal a block."""
    llm = make_llm(kv_format=kv_format, token_budget=4096, prefix_caching=False)
    long = (prompts[4] + prompts[3]) * 2
    params = params_of(max_tokens=60)
    (expected,) = llm.generate([long[:280]], params)
    survivor = llm.stream([long[:280]], params)
    tokens = [next(survivor).token_id]
    sealed_before = llm.memory_stats().body
    mlp = model.model.layers[-1].mlp
    for _ in range(45):
        other = llm.stream(prompts[1], params_of())
        next(other)
        monkeypatch.setattr(mlp, "forward", raise_once(mlp.forward, 1, RuntimeError("lost")))
        with pytest.raises(RuntimeError, match="lost"):
            next(other)
        tokens.append(next(survivor).token_id)
        llm.engine.scheduler.check_integrity()
    assert (llm.memory_stats().body > sealed_before) == (kv_format != "native")
    tokens += [event.token_id for event in survivor]
    assert tokens == expected.token_ids


def test_a_failing_logits_processor_ends_its_own_request_alone(make_llm, prompts, greedy):
    def fail(ids: Tensor, scores: Tensor) -> Tensor:
        raise ZeroDivisionError("in a processor")

    llm = make_llm()
    params = [params_of(), params_of(logits_processors=[fail]), params_of()]
    with pytest.raises(
        GenerationError, match=r"1 of 3 .* ZeroDivisionError\('in a processor'\)"
    ) as e:
        llm.generate(prompts[:3], params)
    assert [output.token_ids for output in e.value.outputs] == [greedy[0], [], greedy[2]]
    assert_nothing_is_held(llm)
    assert tokens_of(llm.generate(prompts, params_of())) == greedy


def test_rules_that_leave_no_token_are_named_as_the_reason(make_llm, prompts):
    def only_token_7(ids: Tensor, scores: Tensor) -> Tensor:
        return torch.where(torch.arange(scores.shape[-1]) == 7, scores, -torch.inf)

    params = params_of(logits_processors=[only_token_7], stop_token_ids=[7], min_tokens=2)
    with pytest.raises(GenerationError, match="leave no token"):
        make_llm().generate(prompts[:1], params)


def test_priorities_that_are_no_integers_are_refused_and_the_llm_goes_on(make_llm, prompts, greedy):
    llm = make_llm()
    with pytest.raises(InvalidRequestError, match="'high'"):
        llm.generate(prompts[:2], params_of(), priorities=["high", 1])
    assert tokens_of(llm.generate(prompts, params_of())) == greedy


def test_a_stream_dropped_during_another_ones_step_leaks_nothing(make_llm, prompts, greedy):
    """Garbage collection may close a stream at any moment, in the middle of a step too."""
    llm = make_llm()
    dropped = [llm.stream(prompts[1], params_of())]
    next(dropped[0])

    def drop(ids: Tensor, scores: Tensor) -> Tensor:
        dropped.clear()
        return scores

    assert tokens_of(llm.generate(prompts[:1], params_of(logits_processors=[drop]))) == greedy[:1]
    assert_nothing_is_held(llm)


def test_params_that_are_no_sampling_params_are_refused(make_llm, prompts):
    with pytest.raises(ConfigError, match="max_tokens"):
        make_llm().generate(prompts[:1], {"max_tokens": 5})


def test_training_mode_and_attention_come_back(model, tokenizer):
    model.train()
    with pytest.raises(ConfigError, match="99999"):
        LLM(model, tokenizer=tokenizer, max_model_len=99999)
    assert model.training
    llm = LLM(model, tokenizer=tokenizer)
    assert not model.training
    del llm  # never closed
    assert model.training
    assert model_tokens(model, [1, 2, 3], count=1)


def test_a_device_that_is_not_there_is_refused(model, tokenizer):
    with pytest.raises(ConfigError, match="'nonsense'"):
        LLM(model, tokenizer=tokenizer, device="nonsense")
