"""Attention that differs from model to model: heads, biases, soft caps, prompts of 2000 tokens."""

from __future__ import annotations

import random
from math import floor

import pytest

from tests.support.random_models import save_model
from tests.support.vllm_job import first_difference, own_rounds, vllm_answer

GENERATOR = random.Random(2)
PROMPTS = [
    [GENERATOR.randrange(5, 2000) for _ in range(length)] for length in (12, 63, 700, 1111, 2000)
]
LONG = {"max_model_len": 2200}
FORMATS_OF = {
    "llama-gqa1": ["int8", "int4"],
    "llama-gqa4": ["int8", "int2", "kivi2"],
    "llama-gqa8": ["int8", "k4v2"],
    "qwen2-biases": ["int8", "int3", "int8-token"],
    "gemma2": ["int8", "int2-long"],
}
WINDOWED = {"gemma3": ["int2"], "mistral-window": ["int8"]}


def native_rounds(model: str) -> list[list[list[int]]]:
    """What vLLM says on native blocks of ours, which is what it says on its own, and not one token
    all the time."""
    native = vllm_answer(PROMPTS, model=model, kv_format="native", **LONG)
    assert native.rounds == vllm_answer(PROMPTS, model=model, **LONG).rounds
    assert len({token for tokens in native.rounds[0] for token in tokens}) > 10
    return native.rounds


def assert_like_our_own_engine(model: str, kv_formats: list[str]) -> None:
    for kv_format in kv_formats:
        answer = vllm_answer(PROMPTS, model=model, kv_format=kv_format, **LONG)
        expected = own_rounds(PROMPTS, kv_format, model=model, **LONG)
        assert first_difference(answer, expected) is None, kv_format


@pytest.mark.parametrize("name", FORMATS_OF)
def test_tokens_are_those_of_vllms_own_cache_and_of_our_own_engine(name, tmp_path):
    model = save_model(name, tmp_path)
    native_rounds(model)
    assert_like_our_own_engine(model, FORMATS_OF[name])


@pytest.mark.parametrize("name", WINDOWED)
def test_windows_give_the_tokens_of_vllms_own_cache_and_of_our_own_engine(name, tmp_path):
    """Also where vLLM is told to keep all that they no longer see."""
    model = save_model(name, tmp_path)
    options = {**LONG, "disable_hybrid_kv_cache_manager": True}
    kept = vllm_answer(PROMPTS, model=model, kv_format="native", **options)
    assert native_rounds(model) == kept.rounds
    assert_like_our_own_engine(model, WINDOWED[name])


def test_a_pool_holds_the_requests_that_its_log_promises(tmp_path):
    """At 4096 tokens in bfloat16; so many decode side by side, and one more does not fit."""
    model = save_model("narrow", tmp_path)
    prompts = [[GENERATOR.randrange(5, 2000) for _ in range(4096 - 64)] for _ in range(12)]
    options = {"model": model, "dtype": "bfloat16", "max_model_len": 4096}
    options["kv_cache_memory_bytes"] = 2 * 4096 * 256
    own = vllm_answer(prompts[:1], **options)
    for name, gain in {"int8": 1.75, "int4": 3.0, "int2": 4.4}.items():
        answer = vllm_answer(prompts, kv_format=name, **options)
        assert answer.capacity >= gain * own.capacity
        assert answer.peak_running >= floor(answer.concurrency)
        first = min(12, floor(answer.concurrency))
        assert not any(str(index) in answer.preempted for index in range(first))
