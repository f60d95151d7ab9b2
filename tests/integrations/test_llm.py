"""vLLM's engine on our blocks: the tokens of its own cache, and those of our own engine."""

from __future__ import annotations

import random

import pytest
from transformers import AutoTokenizer

from paged_kv.cache.formats import FORMATS
from paged_kv.models import calibration
from tests.support.vllm_job import MEMORY, MODEL, first_difference, own_rounds, vllm_answer

# Of a text: what follows random tokens is so uncertain that a last bit decides.
TEXT = AutoTokenizer.from_pretrained(MODEL)(calibration.TEXT.read_text())["input_ids"]
PROMPTS = [TEXT[n // 2 : n // 2 + n] for n in (12, 100, 257, 500, 900)]
SAMPLED = {"n": 3, "temperature": 0.8, "seed": 7, "logprobs": None}


def test_native_gives_the_tokens_of_vllms_own_cache():
    assert vllm_answer(PROMPTS, kv_format="native").rounds == vllm_answer(PROMPTS).rounds


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_gives_the_tokens_of_our_own_engine(name):
    """Twice over, with the prefix cache: the second round reads what the first has sealed."""
    expected = own_rounds(PROMPTS, name, rounds=2, prefix_caching=True)
    answer = vllm_answer(PROMPTS, kv_format=name, rounds=2, enable_prefix_caching=True)
    assert first_difference(answer, expected) is None
    assert answer.num_hit_tokens > 1000


@pytest.mark.parametrize("name", ["native", "int8", "int2"])
def test_tokens_in_chunks_are_those_of_our_own_engine(name):
    expected = own_rounds(PROMPTS[-1:], name, token_budget=192)
    answer = vllm_answer(PROMPTS[-1:], kv_format=name, max_num_batched_tokens=192)
    assert first_difference(answer, expected) is None


@pytest.mark.parametrize("name", ["native", "int8", "int2"])
def test_a_prompt_that_one_step_finishes_is_found_again(name):
    """As in scoring: one step computes the prompt, and its request ends with it."""
    options = {"rounds": 3, "params": {"max_tokens": 1}, "enable_prefix_caching": True}
    answer = vllm_answer(PROMPTS[-1:], kv_format=name, **options)
    assert answer.num_hit_tokens > 700
    assert len({str(tokens) for tokens in answer.rounds}) == 1


def test_two_equal_prompts_in_one_step():
    (expected,) = own_rounds(PROMPTS[3:4], "int2")
    answer = vllm_answer(PROMPTS[3:4] * 2, kv_format="int2", enable_prefix_caching=True)
    assert first_difference(answer, [expected * 2]) is None
    assert answer.rounds[0][0] == answer.rounds[0][1]


def test_completions_of_one_prompt_are_those_of_vllms_own_cache():
    """`n` of them share what they read, and are drawn as seeded."""
    options = {"params": SAMPLED, "enable_prefix_caching": True}
    expected = vllm_answer(PROMPTS[2:4], **options).rounds
    assert len({tuple(tokens) for tokens in expected[0]}) == 6
    assert vllm_answer(PROMPTS[2:4], kv_format="native", **options).rounds == expected


@pytest.mark.parametrize("is_async", [False, True])
def test_aborted_requests_hold_nothing_and_change_nothing(is_async):
    options = {"kv_format": "int2", "async_scheduling": is_async}
    whole = vllm_answer(PROMPTS, **options).rounds[0]
    cut = vllm_answer(PROMPTS, aborted={1: 5, 4: 20}, **options).rounds[0]
    assert [cut[0], cut[2], cut[3]] == [whole[0], whole[2], whole[3]]
    assert cut[1] == whole[1][: len(cut[1])]
    assert len(cut[1]) < 64
    assert len(cut[4]) < 64


def test_compiled_models_give_the_tokens_of_eager_ones():
    """`--enforce-eager` is off by default: torch.compile has our attention as one operation."""
    eager = vllm_answer(PROMPTS, kv_format="int2").rounds
    assert vllm_answer(PROMPTS, kv_format="int2", enforce_eager=False).rounds == eager


def test_two_workers_give_the_tokens_of_one():
    """Tensor parallel: each worker holds half of the heads and seals as the scheduler knows."""
    one = vllm_answer(PROMPTS, kv_format="int2").rounds
    assert vllm_answer(PROMPTS, kv_format="int2", tensor_parallel_size=2).rounds == one


def test_bfloat16_scores_a_text_as_vllms_own_cache():
    """Chunks of 192 tokens read what those before have stored; means over 900 tokens."""
    options = {
        "params": {"prompt_logprobs": 0, "max_tokens": 1},
        "max_num_batched_tokens": 192,
        "dtype": "bfloat16",
    }
    own, native, int8 = (
        vllm_answer(PROMPTS[-1:], kv_format=name, **options).log_probs[0]
        for name in (None, "native", "int8")
    )
    assert own < -1
    assert native == pytest.approx(own, abs=5e-3)
    assert int8 == pytest.approx(own, abs=5e-3)


SMALL = {"max_model_len": 320, "enable_prefix_caching": True}


def many_prompts(count: int, num_openings: int) -> list[list[int]]:
    """Of 150 tokens; as many openings of a hundred tokens are shared."""
    generator = random.Random(1)
    places = [generator.randrange(len(TEXT) - 150) for _ in range(num_openings)]
    prompts = []
    for number in range(count):
        opening = TEXT[places[number % num_openings] :][:100]
        place = generator.randrange(len(TEXT) - 50)
        prompts.append(opening + TEXT[place : place + 50])
    return prompts


def test_a_full_pool_changes_no_output():
    """Prefix cache on, preemptions, 200 requests, more than fit; see vLLM's issue 50702."""
    prompts = many_prompts(200, num_openings=8)
    crowded = vllm_answer(prompts, kv_format="native", kv_cache_memory_bytes=8_000_000, **SMALL)
    assert len(crowded.preempted) > 20
    assert crowded.num_hit_tokens > 0
    assert crowded.rounds == vllm_answer(prompts, kv_format="native").rounds


@pytest.mark.parametrize("name", ["int8", "int2"])
def test_a_full_pool_of_quantized_blocks_changes_what_is_preempted_only(name):
    """What preemption recomputes in one chunk reads in full precision what it had read quantized:
    in a quantized format, as in our own engine, its tokens may differ from there on."""
    prompts = many_prompts(200, num_openings=200)
    memory = {"int8": 3_000_000, "int2": 1_600_000}[name]
    crowded = vllm_answer(prompts, kv_format=name, kv_cache_memory_bytes=memory, **SMALL)
    ample = vllm_answer(prompts, kv_format=name, kv_cache_memory_bytes=4 * MEMORY)
    assert not ample.preempted
    assert 20 < len(crowded.preempted) < 180
    for index, (mine, expected) in enumerate(zip(crowded.rounds[0], ample.rounds[0], strict=True)):
        num_sure = min(crowded.preempted.get(str(index), [64]))
        assert mine[:num_sure] == expected[:num_sure]
        assert len(mine) == 64
