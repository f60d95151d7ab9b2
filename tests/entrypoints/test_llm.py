"""The LLM: what it generates, when it stops, its memory, and models on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from paged_kv import LLM, SamplingParams
from paged_kv.errors import ConfigError
from tests.support.small_llm import (
    FORMATS,
    MODEL_LEN,
    NUM_NEW_TOKENS,
    assert_nothing_is_held,
    every_format,
    model_tokens,
    params_of,
    sampling,
    text_after,
    tokens_of,
)

# -- what is generated ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        pytest.param("hello", [*b"hello"], id="text"),
        pytest.param([104, 105], [104, 105], id="ids"),
        pytest.param([{"role": "user", "content": "hé"}], [*"[user] hé\n".encode()], id="messages"),
        pytest.param({"prompt": "hello"}, [*b"hello"], id="dict"),
        pytest.param({"prompt_token_ids": [104, 105]}, [104, 105], id="dict-of-ids"),
    ],
)
def test_one_prompt_of_each_kind_is_continued(make_llm, tokenizer, pristine_model, prompt, ids):
    (output,) = make_llm().generate(prompt, params_of())
    expected = model_tokens(pristine_model, ids)
    assert output.prompt == prompt
    assert output.prompt_token_ids == ids
    assert output.token_ids == expected
    assert output.text == text_after(tokenizer, ids, expected)
    assert [c.finish_reason for c in output.completions] == ["length"]


def test_a_batch_may_be_rows_of_an_array_or_a_list_of_dicts(make_llm):
    llm = make_llm()
    ids = [[104, 105], [106, 107]]
    expected = tokens_of(llm.generate(ids, params_of()))
    dicts = [{"prompt_token_ids": row} for row in ids]
    arrays = [np.array(row) for row in ids]
    for batch in (np.array(ids), torch.tensor(ids), dicts, arrays, [dicts[0], arrays[1]]):
        assert tokens_of(llm.generate(batch, params_of())) == expected
    assert tokens_of(llm.generate(np.array(ids[0]), params_of())) == expected[:1]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"token_budget": 50},
        {"token_budget": 7, "max_num_seqs": 3},
        {"max_num_seqs": 1},
        {"num_blocks": 10},
        {"num_blocks": 10, "token_budget": 23, "max_num_seqs": 5},
        {"kv_memory": "300KiB"},
    ],
    ids=str,
)
def test_many_prompts_come_back_in_order_as_the_model_itself_continues_them(
    make_llm, prompts, greedy, options
):
    outputs = make_llm(**options).generate(prompts, params_of())
    assert [output.prompt_token_ids for output in outputs] == prompts
    assert tokens_of(outputs) == greedy


@every_format
def test_every_format_equals_the_model_until_something_is_sealed(
    make_llm, prompts, greedy, kv_format
):
    llm = make_llm(kv_format=kv_format, kv_dtype=torch.float32)
    geometry = llm.engine.manager.geometry
    first_sealed = geometry.num_head_tokens + geometry.block_size + geometry.min_tail_tokens
    lengths = [len(prompt) + len(tokens) for prompt, tokens in zip(prompts, greedy, strict=True)]
    short = [n for n, length in enumerate(lengths) if length < first_sealed or not geometry.seals]
    assert len(short) > 1
    outputs = llm.generate([prompts[i] for i in short], params_of())
    assert tokens_of(outputs) == [greedy[i] for i in short]


def test_each_prompt_may_have_params_of_its_own(make_llm, prompts, greedy):
    params = [params_of(max_tokens=count) for count in (1, 9, 30, 2, 17, 4)]
    outputs = make_llm().generate(prompts, params)
    expected = [tokens[: p.max_tokens] for tokens, p in zip(greedy, params, strict=True)]
    assert tokens_of(outputs) == expected


def test_token_ids_need_no_tokenizer_and_give_no_text(make_llm, prompts, greedy):
    outputs = make_llm(tokenizer=None).generate(prompts, params_of())
    assert tokens_of(outputs) == greedy
    assert {output.text for output in outputs} == {""}


def test_one_llm_serves_many_calls(make_llm, prompts, greedy):
    llm = make_llm(num_blocks=12)
    for _ in range(3):
        assert tokens_of(llm.generate(prompts, params_of())) == greedy
        assert_nothing_is_held(llm)


def test_two_llms_may_share_a_model(make_llm, model, prompts, greedy):
    first, second = make_llm(), make_llm(kv_format="int8")
    streams = [llm.stream(prompts[1], params_of()) for llm in (first, second)]
    pairs = list(zip(*streams, strict=True))
    for index in range(2):
        assert [pair[index].token_id for pair in pairs] == greedy[1]
    first.close()
    assert tokens_of(second.generate(prompts[:2], params_of())) == greedy[:2]


def test_close_gives_the_model_its_own_attention_back(model, prompts, greedy):
    before = model.config._attn_implementation
    with LLM(model) as llm:
        llm.generate(prompts[0], params_of(max_tokens=2))
        assert model.config._attn_implementation != before
    assert model.config._attn_implementation == before
    assert model_tokens(model, prompts[0]) == greedy[0]


# -- when it ends ---------------------------------------------------------------------------------


def first_seen_after(tokens: list[int], start: int) -> int:
    """Place of a token, from `start` on, that has not come before."""
    return next(i for i in range(start, len(tokens)) if tokens[i] not in tokens[:i])


def test_a_stop_token_ends_the_tokens_and_adds_no_text(make_llm, tokenizer, prompts, greedy):
    end = first_seen_after(greedy[1], 5)
    params = params_of(stop_token_ids=[greedy[1][end]])
    (output,) = make_llm().generate([prompts[1]], params)
    assert output.token_ids == greedy[1][: end + 1]
    assert output.completions[0].finish_reason == "stop"
    assert output.text == make_llm().generate(prompts[1], params_of(max_tokens=end))[0].text


@pytest.mark.parametrize("as_list", [False, True], ids=["one-id", "list"])
def test_the_models_end_of_sequence_ends_it_unless_ignored(
    make_llm, model, prompts, greedy, as_list
):
    end = first_seen_after(greedy[2], 7)
    eos = greedy[2][end]
    model.generation_config.eos_token_id = [eos, 10_000] if as_list else eos
    llm = make_llm()
    (output,) = llm.generate(prompts[2], params_of())
    assert output.token_ids == greedy[2][: end + 1]
    assert output.completions[0].finish_reason == "stop"
    (output,) = llm.generate(prompts[2], params_of(ignore_eos=True))
    assert output.token_ids == greedy[2]
    assert output.completions[0].finish_reason == "length"


@pytest.mark.parametrize("min_tokens", [1, 7, 8, 9, 20, NUM_NEW_TOKENS])
def test_min_tokens_masks_the_end_of_sequence_as_transformers_does(
    make_llm, model, pristine_model, prompts, greedy, min_tokens
):
    eos = greedy[2][first_seen_after(greedy[2], 7)]
    model.generation_config.eos_token_id = eos
    expected = model_tokens(pristine_model, prompts[2], eos_token_id=eos, min_new_tokens=min_tokens)
    (output,) = make_llm().generate(prompts[2], params_of(min_tokens=min_tokens))
    assert output.token_ids == expected
    assert len(output.token_ids) >= min_tokens


def test_min_tokens_masks_stop_tokens_even_where_the_end_of_sequence_is_ignored(
    make_llm, model, prompts, greedy
):
    end = first_seen_after(greedy[2], 7)
    stop = greedy[2][end]
    model.generation_config.eos_token_id = greedy[2][0]
    params = params_of(stop_token_ids=[stop], ignore_eos=True, min_tokens=end + 1)
    (output,) = make_llm().generate(prompts[2], params)
    assert output.token_ids[:end] == greedy[2][:end]  # the end of sequence is not masked
    assert output.token_ids[end] != stop


def letters_only(ids: Tensor, scores: Tensor) -> Tensor:
    """A logits processor under which one token is one letter of text."""
    letters = torch.tensor([*b"abcdefgh "])
    masked = torch.full_like(scores, -torch.inf)
    masked[:, letters] = scores[:, letters]
    return masked


def test_a_stop_string_ends_the_text_before_it(make_llm):
    options = {"logits_processors": [letters_only], "max_tokens": 60}
    llm = make_llm()
    (plain,) = llm.generate("hello", sampling(**options))
    assert len(plain.text) == 60
    stop = plain.text[20:23]
    begin = plain.text.index(stop)
    (output,) = llm.generate("hello", sampling(stop=[stop, "zz"], **options))
    assert output.text == plain.text[:begin]
    assert output.token_ids == plain.token_ids[: begin + 3]
    assert output.completions[0].finish_reason == "stop"
    (output,) = llm.generate("hello", sampling(stop=stop, min_tokens=begin + 4, **options))
    assert output.token_ids[: begin + 4] == plain.token_ids[: begin + 4]


@pytest.mark.parametrize("max_tokens", [None, 63, 10_000])
@pytest.mark.parametrize("length", [1, 40, 63])
def test_generation_fills_the_model_length_at_most(make_llm, length, max_tokens):
    llm = make_llm(max_model_len=64)
    (output,) = llm.generate([[5] * length], SamplingParams(max_tokens=max_tokens))
    assert len(output.token_ids) == 64 - length
    assert output.completions[0].finish_reason == "length"
    assert llm.max_model_len == 64


# -- memory, and models on disk -------------------------------------------------------------------


@every_format
def test_memory_stats_add_up_while_sequences_run_and_after(make_llm, prompts, kv_format):
    llm = make_llm(kv_format=kv_format, num_blocks=50)
    total = sum(arena.nbytes for arena in llm.engine.cache.arenas)
    seals = kv_format != "native"
    bodies = set()
    for _ in llm.stream([prompts[4] + prompts[3], prompts[1]], params_of(max_tokens=40)):
        stats = llm.memory_stats()
        assert stats.total == total
        assert stats.allocated + stats.free == total
        assert stats.used + stats.wasted == stats.allocated
        assert stats.head + stats.body + stats.tail == stats.allocated
        bodies.add(stats.body > 0)
    assert (True in bodies) == seals
    assert llm.memory_stats().free == llm.memory_stats().total == total


@every_format
def test_the_arenas_take_the_kv_memory_less_than_one_block(make_llm, kv_format):
    llm = make_llm(kv_format=kv_format, kv_memory="1MiB")
    block_bytes = llm.engine.cache.block_bytes
    assert (1 << 20) - block_bytes < llm.memory_stats().total <= 1 << 20


def test_a_sealed_token_of_fewer_bits_takes_fewer_bytes(make_llm):
    sizes = [make_llm(kv_format=kv_format).bytes_per_token() for kv_format in FORMATS]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 4
    assert sizes[0] == 2 * 2 * 2 * 16 * 4  # layers, K and V, kv heads, head dim, bytes


@pytest.mark.parametrize("kind", [str, Path])
def test_a_saved_model_and_tokenizer_generate_as_they_did_in_memory(
    make_llm, tokenizer, pristine_model, tmp_path, kind
):
    pristine_model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    chat = [{"role": "user", "content": "hi"}]
    batch = ["hello", [1, 2, 3], chat]
    expected = make_llm().generate(batch, params_of())
    with LLM(kind(tmp_path), kv_format="native") as llm:
        assert llm.generate(batch, params_of()) == expected
        assert llm.max_model_len == MODEL_LEN


def test_num_threads_is_that_of_torch(make_llm, prompts, greedy):
    before = torch.get_num_threads()
    try:
        llm = make_llm(kv_format="native", num_threads=2)
        assert torch.get_num_threads() == 2
        outputs = llm.generate(prompts, params_of())
        assert tokens_of(outputs) == greedy
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("value", [0, -1, 1.5, "2"])
def test_a_bad_number_of_threads_is_refused(make_llm, value):
    before = torch.get_num_threads()
    with pytest.raises(ConfigError, match="num_threads"):
        make_llm(num_threads=value)
    assert torch.get_num_threads() == before
