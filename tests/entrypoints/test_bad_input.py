"""Settings and requests that are refused by value, before anything is queued."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
import torch
from transformers import ByT5Tokenizer

from paged_kv import LLM, SamplingParams
from paged_kv.errors import (
    ConfigError,
    InvalidRequestError,
    ModelNotFoundError,
    OutOfBlocksError,
    PagedKVError,
    PromptTooLongError,
)
from tests.support.small_llm import (
    MODEL_LEN,
    NUM_NEW_TOKENS,
    assert_nothing_is_held,
    every_format,
    model_tokens,
    params_of,
    tokens_of,
)

BAD_SETTINGS = [
    ({"kv_format": "int5"}, ConfigError, ["'int5'", "int2"]),
    ({"kv_memory": 1}, OutOfBlocksError, ["1 bytes"]),
    ({"kv_memory": "2KB"}, OutOfBlocksError, ["2000 bytes"]),
    ({"kv_memory": "lots"}, ConfigError, ["'lots'"]),
    ({"kv_memory": 0}, ConfigError, ["0"]),
    ({"kv_memory": "1MB", "num_blocks": 9}, ConfigError, ["kv_memory", "num_blocks", "1MB", "9"]),
    ({"num_blocks": 0}, ConfigError, ["num_blocks", "0"]),
    ({"num_blocks": -4}, ConfigError, ["num_blocks", "-4"]),
    ({"max_num_seqs": 0}, ConfigError, ["max_num_seqs", "0"]),
    ({"max_num_seqs": "many"}, ConfigError, ["max_num_seqs", "'many'"]),
    ({"token_budget": 2.5}, ConfigError, ["token_budget", "2.5"]),
    ({"kv_format": 8}, ConfigError, ["KV format 8"]),
    ({"max_num_seqs": -2}, ConfigError, ["max_num_seqs", "-2"]),
    ({"token_budget": 0}, ConfigError, ["token_budget", "0"]),
    ({"token_budget": -1}, ConfigError, ["token_budget", "-1"]),
    ({"max_model_len": MODEL_LEN + 1}, ConfigError, ["max_model_len", "513", "512"]),
    ({"max_model_len": 0}, ConfigError, ["max_model_len", "0"]),
    ({"dtype": torch.bfloat16}, ConfigError, ["bfloat16", "float32"]),
]


@pytest.mark.parametrize(
    ("options", "error", "words"), BAD_SETTINGS, ids=[str(options) for options, *_ in BAD_SETTINGS]
)
def test_a_bad_setting_is_refused_by_value_and_leaves_the_model_as_it_was(
    model, prompts, greedy, options, error, words
):
    before = model.config._attn_implementation
    with pytest.raises(error) as caught:
        LLM(model, **options)
    assert isinstance(caught.value, PagedKVError)
    for word in words:
        assert word in str(caught.value)
    assert model.config._attn_implementation == before
    assert model_tokens(model, prompts[1]) == greedy[1]


@pytest.mark.parametrize("kind", [str, Path])
def test_a_missing_model_folder_is_refused_by_its_path(tmp_path, kind):
    path = tmp_path / "no-such-model"
    with pytest.raises(ModelNotFoundError, match="no-such-model"):
        LLM(kind(path))


def test_a_folder_without_a_model_is_refused_by_its_path(tmp_path):
    with pytest.raises(ModelNotFoundError, match=tmp_path.name):
        LLM(tmp_path)


def test_a_tokenizer_that_cannot_stream_is_refused_and_nothing_is_queued(model):
    """A tokenizer in Python has no backend that decodes token by token."""
    with pytest.raises(PagedKVError, match="ByT5Tokenizer"):
        LLM(model, tokenizer=ByT5Tokenizer()).generate([1, 2], params_of())


# 512 tokens to a sequence, 260 tokens to the pool, and a vocabulary of 258.
SMALL_POOL = {"num_blocks": 17, "max_num_seqs": 4}

BAD_REQUESTS = [
    pytest.param("", {}, InvalidRequestError, ["empty"], id="empty-text"),
    pytest.param([], {}, InvalidRequestError, ["no prompts"], id="no-prompts"),
    pytest.param([[]], {}, InvalidRequestError, ["empty"], id="empty-ids"),
    pytest.param([[1], []], {}, InvalidRequestError, ["empty"], id="one-of-two-empty"),
    pytest.param([1] * 512, {}, PromptTooLongError, ["512"], id="no-room-for-output"),
    pytest.param([1] * 600, {}, PromptTooLongError, ["600", "512"], id="longer-than-the-model"),
    pytest.param([1] * 300, {}, PromptTooLongError, ["300", "21", "17"], id="too-long-for-pool"),
    pytest.param(
        [1] * 10,
        {"max_tokens": 502},
        PromptTooLongError,
        ["10", "502", "32", "17"],
        id="output-too-long-for-pool",
    ),
    pytest.param([1, 258], {}, InvalidRequestError, ["258"], id="id-outside-the-vocabulary"),
    pytest.param([1, -1], {}, InvalidRequestError, ["-1", "258"], id="negative-id"),
    pytest.param([[1], [999]], {}, InvalidRequestError, ["999", "258"], id="one-of-two-outside"),
    pytest.param(
        [1], {"stop_token_ids": [4, 300]}, InvalidRequestError, ["300", "258"], id="stop-id-outside"
    ),
    pytest.param([1, "a"], {}, InvalidRequestError, ["[1, 'a']"], id="id-and-text"),
    pytest.param(["a", 1], {}, InvalidRequestError, ["1"], id="text-and-id"),
    pytest.param([1, 2.5], {}, InvalidRequestError, ["[1, 2.5]"], id="id-and-float"),
    pytest.param([1.5, 2.5], {}, InvalidRequestError, ["1.5"], id="floats"),
    pytest.param([1, True], {}, InvalidRequestError, ["[1, True]"], id="id-and-bool"),
    pytest.param([None], {}, InvalidRequestError, ["None"], id="none-in-list"),
    pytest.param(7, {}, InvalidRequestError, ["7"], id="one-id"),
    pytest.param({"role": "user"}, {}, InvalidRequestError, ["role"], id="one-message"),
    pytest.param(b"bytes", {}, InvalidRequestError, ["b'bytes'"], id="bytes"),
]


@pytest.mark.parametrize("method", ["generate", "stream"])
@pytest.mark.parametrize(("prompt", "options", "error", "words"), BAD_REQUESTS)
def test_a_bad_request_is_refused_by_value_before_anything_is_queued(
    make_llm, prompts, greedy, method, prompt, options, error, words
):
    llm = make_llm(**SMALL_POOL)
    with closing(llm.stream(prompts[2], params_of())) as open_stream:
        tokens = [next(open_stream).token_id for _ in range(3)]
        with pytest.raises(error) as caught:
            getattr(llm, method)(prompt, params_of(**options))
        assert isinstance(caught.value, PagedKVError)
        for word in words:
            assert word in str(caught.value)
        assert (llm.engine.scheduler.num_running, llm.engine.scheduler.num_waiting) == (1, 0)
        assert len(llm.requests) == 1
        assert [*tokens, *(event.token_id for event in open_stream)] == greedy[2]
    assert tokens_of(llm.generate(prompts[:2], params_of())) == greedy[:2]


@pytest.mark.parametrize("method", ["generate", "stream"])
@pytest.mark.parametrize(
    ("params", "priorities", "words"),
    [
        ([params_of()], None, ["2 prompts", "1 sampling"]),
        ([params_of()] * 3, None, ["2 prompts", "3 sampling"]),
        ([], None, ["2 prompts", "0 sampling"]),
        (None, [1], ["2 prompts", "1 priorities"]),
        (None, [1, 2, 3], ["2 prompts", "3 priorities"]),
        (None, [], ["2 prompts", "0 priorities"]),
    ],
)
def test_the_wrong_number_of_params_or_priorities_is_refused_with_both_numbers(
    make_llm, method, params, priorities, words
):
    llm = make_llm()
    with pytest.raises(ConfigError) as caught:
        getattr(llm, method)([[1], [2]], params, priorities=priorities)
    for word in words:
        assert word in str(caught.value)
    assert_nothing_is_held(llm)


def test_a_negative_temperature_is_refused_by_value():
    with pytest.raises(ConfigError, match=r"temperature.*-0\.5"):
        SamplingParams(temperature=-0.5)


@every_format
def test_a_pool_too_small_for_one_request_says_what_it_needs(make_llm, kv_format):
    """One sequence of up to 300 tokens needs 19 native blocks, or a head, bodies and a tail."""
    llm = make_llm(kv_format=kv_format, num_blocks=1)
    needed = llm.engine.manager.geometry.max_blocks(299)
    with pytest.raises(PromptTooLongError, match=rf"270 .*=30 need {needed} blocks.* has 1"):
        llm.generate([[1] * 270], params_of())
    llm = make_llm(kv_format=kv_format, num_blocks=needed)
    (output,) = llm.generate([[1] * 270], params_of())
    assert len(output.token_ids) == NUM_NEW_TOKENS


@pytest.mark.parametrize(
    ("prompt", "options", "word"),
    [
        ("text", {}, "tokenizer"),
        ([{"role": "user", "content": "a"}], {}, "tokenizer"),
        ([1], {"stop": "end"}, "tokenizer"),
    ],
    ids=["text", "messages", "stop-string"],
)
def test_what_needs_a_tokenizer_is_refused_without_one(make_llm, prompt, options, word):
    llm = make_llm(tokenizer=None)
    with pytest.raises(InvalidRequestError, match=word):
        llm.generate(prompt, params_of(**options))
    assert_nothing_is_held(llm)
