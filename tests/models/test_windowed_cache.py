"""`PagedCache` with a `SinkWindow`: the tokens of an `LLM` with that window, in constant memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from paged_kv import (
    LLM,
    ConfigError,
    InvalidRequestError,
    PagedCache,
    SamplingParams,
    SinkWindow,
    UnsupportedModelError,
)
from tests.models.test_paged_cache import batch_of, check, generate, open_cache
from tests.support import zoo

WINDOW = SinkWindow(4, 64)
NUM_NEW = 120
PROMPTS = (70, 33)


def expected_tokens(name: str, num_new: int = NUM_NEW) -> list[list[int]]:
    with LLM(zoo.model(name), kv_format="native", num_blocks=99, sink_window=WINDOW) as llm:
        outputs = llm.generate(
            zoo.prompts(PROMPTS), SamplingParams(max_tokens=num_new, temperature=0.0)
        )
        return [list(output.token_ids) for output in outputs]


def windowed(model: torch.nn.Module, kv_format: str = "native", **settings: object) -> PagedCache:
    return open_cache(model, kv_format, fused=True, sink_window=WINDOW, **settings)


@pytest.mark.parametrize("name", ["llama", "llama-rope-yarn", "gpt-neox", "gemma3", "gpt-oss"])
def test_native_tokens_are_those_of_a_windowed_llm(name):
    model = zoo.model(name)
    expected, cache = expected_tokens(name), windowed(model)
    tokens = generate(model, batch_of(PROMPTS), past_key_values=cache, max_new_tokens=NUM_NEW)
    assert tokens[:, max(PROMPTS) :].tolist() == expected
    assert cache.get_seq_length() == max(PROMPTS) + NUM_NEW - 1
    cache._batch.pool.manager.check_integrity()


@pytest.mark.parametrize("kv_format", ["native", "int8", "int2", "int2,1=native"])
def test_memory_is_constant_beyond_the_models_own_length(kv_format):
    model = zoo.model("llama")
    cache, sizes = windowed(model, kv_format), []
    text = batch_of((60,))["input_ids"]
    for _ in range(6):
        inputs = {"input_ids": text, "attention_mask": torch.ones_like(text)}
        text = generate(model, inputs, past_key_values=cache, max_new_tokens=128)
        sizes.append(cache.memory_stats().allocated)
    assert text.shape[1] > 1.5 * zoo.MAX_MODEL_LEN
    assert len(set(sizes[4:])) == 1


def test_beams_and_drafts():
    """Beams fork windows; what is drafted is dropped before anything is let go for it."""
    model = zoo.model("llama")
    inputs = batch_of((33,))
    cache = windowed(model)
    generate(model, inputs, past_key_values=cache, max_new_tokens=90, num_beams=3)
    check_living(cache, 3)
    cache.reset()
    plain = generate(model, inputs, past_key_values=cache, max_new_tokens=90)
    cache.reset()
    options = {"max_new_tokens": 90, "prompt_lookup_num_tokens": 3}
    assert generate(model, inputs, past_key_values=cache, **options).equal(plain)
    check_living(cache, 1)


def check_living(cache: PagedCache, size: int) -> None:
    pool = cache._batch.pool
    assert pool is not None
    pool.manager.check_integrity()
    assert len(pool.manager.living_seq_ids) == size


def test_long_prompts_come_in_chunks():
    model = zoo.model("llama")
    inputs, cache = batch_of((500,)), windowed(model)
    with pytest.raises(InvalidRequestError, match=r"500 tokens at once.*prefill_chunk_size"):
        generate(model, inputs, past_key_values=cache)
    assert cache.get_seq_length() == 0
    tokens: Tensor = generate(model, inputs, past_key_values=cache, prefill_chunk_size=48)
    with LLM(model, kv_format="native", num_blocks=99, sink_window=WINDOW) as llm:
        output = llm.generate(inputs["input_ids"].tolist(), SamplingParams(max_tokens=24))[0]
    assert tokens[0, 500:].tolist() == list(output.token_ids)


def test_what_a_window_cannot_do_is_refused():
    with pytest.raises(ConfigError, match=r"needs attention that reads blocks.*paged_kv"):
        PagedCache(zoo.model("llama"), sink_window=WINDOW)
    with pytest.raises(ConfigError, match="sink_window must be a SinkWindow, got 64"):
        PagedCache(zoo.model("llama"), sink_window=64)
    with pytest.raises(UnsupportedModelError, match="cannot be windowed"):
        windowed(zoo.model("gpt2"))
    model = zoo.model("llama")
    cache = windowed(model)
    generate(model, batch_of((33,)), past_key_values=cache)
    with pytest.raises(InvalidRequestError, match="5 tokens cannot be taken back: SinkWindow"):
        cache.crop(-5)
    assert cache.get_seq_length() == 56
    check(cache)
