"""Samples of an LLM: seeds, batches, and processors of logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor

from paged_kv.scheduler.scheduler import Scheduler
from tests.support.small_llm import model_tokens, params_of, sampling, tokens_of


def test_n_samples_of_a_seed_differ_and_come_again(make_llm, prompts):
    llm = make_llm()
    first, second = (llm.generate(prompts[1], sampling(n=4))[0] for _ in range(2))
    samples = [completion.token_ids for completion in first.completions]
    assert len({tuple(tokens) for tokens in samples}) == 4
    assert samples == [completion.token_ids for completion in second.completions]


def test_the_first_of_n_samples_is_the_sample_of_n_1(make_llm, prompts):
    llm = make_llm()
    (one,), (three,) = (llm.generate(prompts[1], sampling(n=n)) for n in (1, 3))
    assert one.token_ids == three.token_ids
    assert three.text == three.completions[0].text


def test_different_seeds_give_different_tokens(make_llm, prompts):
    outputs = make_llm().generate([prompts[1]] * 3, [sampling(seed=seed) for seed in range(3)])
    assert len({tuple(tokens) for tokens in tokens_of(outputs)}) == 3


def test_without_a_seed_every_call_samples_anew(make_llm, prompts):
    llm = make_llm()
    outputs = llm.generate([prompts[1]] * 2, sampling(seed=None, temperature=3.0))
    outputs += llm.generate([prompts[1]], sampling(seed=None, temperature=3.0))
    assert len({tuple(tokens) for tokens in tokens_of(outputs)}) == 3


@pytest.mark.parametrize(
    "options",
    [{}, {"token_budget": 31}, {"num_blocks": 12}, {"num_blocks": 10, "max_num_seqs": 3}],
    ids=str,
)
def test_seeded_samples_depend_neither_on_the_batch_nor_on_preemption(
    make_llm, monkeypatch, prompts, options
):
    params = [sampling(seed=index, n=2) for index in range(len(prompts))]
    roomy = make_llm()
    alone = [
        [c.token_ids for c in roomy.generate([prompt], p)[0].completions]
        for prompt, p in zip(prompts, params, strict=True)
    ]
    num_preemptions = 0
    preempt = Scheduler._preempt

    def count_and_preempt(scheduler, request):
        nonlocal num_preemptions
        num_preemptions += 1
        preempt(scheduler, request)

    monkeypatch.setattr(Scheduler, "_preempt", count_and_preempt)
    outputs = make_llm(**options).generate(prompts, params)
    together = [[c.token_ids for c in output.completions] for output in outputs]
    assert together == alone
    assert (num_preemptions > 0) == ("num_blocks" in options)


def test_a_transformers_processor_works_as_in_transformers(
    make_llm, pristine_model, prompts, greedy
):
    processor = RepetitionPenaltyLogitsProcessor(penalty=1.8)
    outputs = make_llm(num_blocks=14).generate(prompts, params_of(logits_processors=[processor]))
    expected = [model_tokens(pristine_model, p, repetition_penalty=1.8) for p in prompts]
    assert tokens_of(outputs) == expected
    assert expected != greedy


def test_processors_of_one_request_do_not_touch_the_others(make_llm, prompts, greedy):
    seen = []

    def only_seven(ids: Tensor, scores: Tensor) -> Tensor:
        seen.append(ids[0].tolist())
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([7]), 0.0)

    params = [params_of(), params_of(logits_processors=[only_seven], max_tokens=3), params_of()]
    outputs = make_llm().generate(prompts[:3], params)
    assert tokens_of(outputs) == [greedy[0], [7, 7, 7], greedy[2]]
    assert seen == [prompts[1], [*prompts[1], 7], [*prompts[1], 7, 7]]
