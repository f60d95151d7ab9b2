"""Beam searches through an engine, and what they are held to: `generate` on each prompt alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from paged_kv import LLM, BeamSearchParams
from paged_kv.engine.beam_search import BeamOutput
from paged_kv.engine.engine import Engine
from paged_kv.engine.live_request import SearchUpdate
from tests.support import zoo

SMALL_VOCABULARY = 20
ENDS = [3, 7]
PROMPT_LENGTHS = (1, 17, 40)
Searched = list[tuple[list[list[int]], list[float]]]  # of each prompt: tokens, scores


def small_model() -> PreTrainedModel:
    """Two of its 20 tokens end a sequence, so that most beams meet one."""
    made = zoo.build(
        "LlamaForCausalLM",
        vocab_size=SMALL_VOCABULARY,
        num_hidden_layers=2,
        initializer_range=0.2,
        max_position_embeddings=1024,
    )
    made.generation_config.eos_token_id = ENDS
    return made


def prompts_of(lengths: tuple[int, ...] = PROMPT_LENGTHS) -> list[list[int]]:
    numbers = random.Random(1)
    return [[numbers.randrange(8, SMALL_VOCABULARY) for _ in range(n)] for n in lengths]


def params_of(**options: Any) -> BeamSearchParams:
    return BeamSearchParams(**{"num_beams": 3, "num_return": 3, "max_tokens": 12, **options})


@contextmanager
def engine_of(model: PreTrainedModel, **options: Any) -> Iterator[LLM]:
    """An LLM whose invariants hold at every step, and that holds nothing in the end."""
    with LLM(model, **{"kv_format": "native", "max_num_seqs": 20, **options}) as llm:
        intercept(llm, lambda logits: logits)
        yield llm
        assert_nothing_is_held(llm)


def intercept(llm: LLM, change: Callable[[Tensor], Tensor]) -> None:
    """Pass all logits [M, V] through a function."""
    forward = llm.engine.model.forward

    def changed(*arguments: Any) -> Tensor:
        llm.engine.manager.check_integrity()
        return change(forward(*arguments))

    llm.engine.model.forward = changed  # type: ignore[method-assign]


def replace_logits(llm: LLM, make: Callable[[Tensor, int], Tensor]) -> None:
    """Let `make(token_ids, num_rows)` be the model; nothing is stored."""

    def forward(token_ids: Tensor, positions: Tensor, rows: Tensor, *rest: Any) -> Tensor:
        llm.engine.manager.check_integrity()
        return make(token_ids[rows], len(rows))

    llm.engine.model.forward = forward  # type: ignore[method-assign]


def assert_nothing_is_held(llm: LLM) -> None:
    manager = llm.engine.manager
    llm.engine.scheduler.check_integrity()
    assert manager.num_free_blocks == manager.num_blocks
    assert manager.num_free_seqs == manager.max_num_seqs
    assert not manager.prefix_cache or not manager.prefix_cache._pending


def search_beams(
    engine: Engine, prompts: list[list[int]], params: BeamSearchParams
) -> list[BeamOutput]:
    """Search from all prompts at once; whatever happens, nothing is held afterwards."""
    names = [f"search {index}" for index in range(len(prompts))]
    for name, prompt in zip(names, prompts, strict=True):
        engine.intake.search(name, prompt, params)
    found = {}
    try:
        for name, prompt in zip(names, prompts, strict=True):
            engine.add_search(name, prompt, params)
        while engine.has_unfinished:
            for update in engine.step():
                assert isinstance(update, SearchUpdate)
                found[update.request_id] = update.output
            engine.scheduler.check_integrity()
    finally:
        for name in names:
            engine.abort(name)
    return [found[name] for name in names]


def searched(outputs: list[BeamOutput]) -> Searched:
    assert all(output.error is None for output in outputs)
    return [
        ([h.token_ids for h in output.hypotheses], [h.score for h in output.hypotheses])
        for output in outputs
    ]


def expected_of(
    model: PreTrainedModel, prompts: list[list[int]], params: BeamSearchParams
) -> Searched:
    return [expected_for(model, prompt, params) for prompt in prompts]


def expected_for(
    model: PreTrainedModel, prompt: list[int], params: BeamSearchParams
) -> tuple[list[list[int]], list[float]]:
    """What the model's own `generate` finds for one prompt alone."""
    options: dict[str, Any] = {}
    if params.num_beams > 1:
        options = {"length_penalty": params.length_penalty, "early_stopping": params.early_stopping}
    ids = torch.tensor([prompt])
    found = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=params.max_tokens,
        do_sample=False,
        num_beams=params.num_beams,
        num_return_sequences=params.num_return,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    sequences = found.sequences[:, len(prompt) :].tolist()
    if params.num_beams == 1:  # greedy search, which scores nothing
        return sequences, [scores_alone(model, prompt, sequences[0], params.length_penalty)]
    lengths = (found.beam_indices >= 0).sum(1).tolist()
    trimmed = [tokens[:length] for tokens, length in zip(sequences, lengths, strict=True)]
    return trimmed, found.sequences_scores.tolist()


def scores_alone(
    model: PreTrainedModel, prompt: list[int], output: list[int], length_penalty: float
) -> float:
    """The score of an output by one full forward pass."""
    log_probabilities = zoo.logits_alone(model, prompt, output).log_softmax(-1)
    total = log_probabilities.gather(-1, torch.tensor(output)[:, None]).sum()
    return float(total) / len(output) ** length_penalty


def assert_same(found: Searched, expected: Searched) -> None:
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in expected]
    for (_, scores), (_, expected_scores) in zip(found, expected, strict=True):
        assert scores == pytest.approx(expected_scores, rel=1e-5, abs=1e-4)
