"""Exceptions at any executed line: the caller sees them, and everybody else goes on unharmed."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from paged_kv import LLM, SamplingParams
from paged_kv.engine.beam_search import BeamSearchParams
from tests.support.interrupts import Lines
from tests.support.small_llm import assert_nothing_is_held, tokens_of

NUM_TRIALS = int(os.environ.get("PAGED_KV_TRIALS", "40"))
ERRORS = (KeyboardInterrupt, MemoryError)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    """With a pool that is too small for all, host blocks, and a prefix cache."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        initializer_range=0.3,
        eos_token_id=None,
    )
    torch.manual_seed(1)
    llm = LLM(
        LlamaForCausalLM(config).eval(),
        kv_format="native",
        num_blocks=14,
        max_num_seqs=8,
        token_budget=24,
        swap_space="16KiB",
    )
    llm.engine.scheduler.steps_ahead = 0  # so that they preempt each other
    yield llm
    llm.close()


def prompt_of(length: int, seed: int) -> list[int]:
    return [random.Random(seed + 1000 * place).randrange(64) for place in range(length)]


COMMON = prompt_of(34, 1)
PROMPTS = [COMMON, [*COMMON, 3], prompt_of(20, 2), [*COMMON, 4, 5], prompt_of(47, 3)]
PARAMS = [
    SamplingParams(max_tokens=14),
    SamplingParams(max_tokens=9, temperature=1.5, seed=3, n=3),
    SamplingParams(max_tokens=30),
    SamplingParams(max_tokens=11, temperature=1.0, seed=5),
    SamplingParams(max_tokens=25),
]
SURVIVOR = prompt_of(25, 9)
SURVIVING = SamplingParams(max_tokens=60)
BEAMS = BeamSearchParams(num_beams=3, max_tokens=8)


def serve(llm: LLM) -> list[list[int]]:
    """Samples, preemption, swapping and beams, in a pool that is too small."""
    outputs = llm.generate(PROMPTS, PARAMS)
    outputs += llm.beam_search([COMMON[:20]], BEAMS)
    return [completion.token_ids for output in outputs for completion in output.completions]


def interrupted_service(llm: LLM, lines: Lines, expected: list[list[int]]) -> list[int]:
    """Serve beside a stream that is older and goes on; its tokens."""
    survivor = llm.stream([SURVIVOR], SURVIVING)
    tokens = [next(survivor).token_id for _ in range(3)]
    raised: BaseException | None = None
    try:
        with lines.traced():
            assert serve(llm) == expected
    except BaseException as error:
        raised = error
    assert raised is None or raised is lines.error, f"{raised!r} at {lines.where}"
    tokens += [event.token_id for event in survivor]
    assert_nothing_is_held(llm)
    return tokens


def test_after_an_exception_at_any_line_all_tokens_are_right_and_no_block_is_lost(llm):
    """Of both kinds in turn: what strikes at a line matters little, so lines are many."""
    expected = serve(llm)
    (surviving,) = tokens_of(llm.generate([SURVIVOR], SURVIVING))
    llm.reset_prefix_cache()
    counter = Lines()
    assert interrupted_service(llm, counter, expected) == surviving
    num_preemptions = llm.statistics().num_preemptions
    assert num_preemptions
    rng = random.Random(7)
    for trial in range(NUM_TRIALS):
        error = ERRORS[trial % 2]("struck")
        lines = Lines(error, at=rng.randrange(1, counter.count + 1))
        got = interrupted_service(llm, lines, expected)
        assert got == surviving, lines.where
        assert lines.where or lines.count < lines.at
    assert serve(llm) == expected
