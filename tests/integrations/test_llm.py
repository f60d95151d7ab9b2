"""vLLM's engine on our blocks: the tokens of its own cache, and those of our own engine."""

from __future__ import annotations

import random
from typing import Any

import pytest
from transformers import AutoTokenizer

from paged_kv.cache.formats import FORMATS
from paged_kv.models import calibration
from tests.support.vllm_job import MODEL, run

# Of a text: what follows random tokens is so uncertain that a last bit decides.
TEXT = AutoTokenizer.from_pretrained(MODEL)(calibration.TEXT.read_text())["input_ids"]
PROMPTS = [TEXT[n // 2 : n // 2 + n] for n in (12, 100, 257, 500, 900)]


def plugged(name: str, prompts: list[list[int]], **options: Any) -> dict[str, Any]:
    """vLLM on our blocks; no page is lost on the way."""
    config = {"paged_kv": {"format": name}}
    answer = run("vllm", prompts, additional_config=config, **options)
    assert answer["lost"] == 0
    return answer


def test_native_gives_the_tokens_of_vllms_own_cache():
    expected = run("vllm", PROMPTS)["rounds"]
    assert plugged("native", PROMPTS)["rounds"] == expected


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_gives_the_tokens_of_our_own_engine(name):
    """Twice over, with the prefix cache: the second round reads what the first has sealed."""
    expected = run("own", PROMPTS, rounds=2, kv_format=name, prefix_caching=True)
    answer = plugged(name, PROMPTS, rounds=2, enable_prefix_caching=True)
    assert answer["rounds"] == expected["rounds"]
    assert answer["num_hit_tokens"] > 1000


@pytest.mark.parametrize("name", ["native", "int8", "int2"])
def test_tokens_in_chunks_are_those_of_our_own_engine(name):
    expected = run("own", PROMPTS[-1:], kv_format=name, token_budget=192)
    answer = plugged(name, PROMPTS[-1:], max_num_batched_tokens=192)
    assert answer["rounds"] == expected["rounds"]


def test_two_equal_prompts_in_one_step():
    expected = run("own", PROMPTS[3:4], kv_format="int2")["rounds"][0]
    answer = plugged("int2", PROMPTS[3:4] * 2, enable_prefix_caching=True)
    assert answer["rounds"][0] == expected * 2


SMALL = {"max_model_len": 320, "enable_prefix_caching": True}


def many_prompts() -> list[list[int]]:
    generator = random.Random(1)
    return [[generator.randrange(5, 500) for _ in range(150)] for _ in range(40)]


def test_a_full_pool_changes_no_output():
    """Prefix cache on, preemptions, more requests than fit; see vLLM's issue 50702."""
    prompts = many_prompts()
    crowded = plugged("native", prompts, kv_cache_memory_bytes=4_000_000, **SMALL)
    assert crowded["rounds"] == plugged("native", prompts)["rounds"]


def test_a_full_pool_of_quantized_blocks_loses_no_page():
    """What preemption recomputes in one chunk reads in full precision what it had read quantized:
    in a quantized format, as in our own engine, its tokens may differ."""
    answer = plugged("int2", many_prompts(), kv_cache_memory_bytes=1_000_000, **SMALL)
    assert all(len(tokens) == 64 for tokens in answer["rounds"][0])


def test_options_are_checked_with_our_errors():
    for options in ({"format": "int5"}, {"format": "int8", "colour": 1}):
        with pytest.raises(AssertionError, match=r"ConfigError: (unknown KV format 'int5'|.*colo)"):
            run("vllm", PROMPTS[:1], additional_config={"paged_kv": options})
