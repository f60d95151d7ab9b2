"""The LLM: what it generates, when it stops, what fails alone, and that no block is ever lost.

The reference is the model's own `generate`, one prompt at a time. Where tokens must be equal, the
format is native or nothing is sealed: quantized formats may differ when chunks do.
"""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    ByT5Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    RepetitionPenaltyLogitsProcessor,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from paged_kv import LLM, SamplingParams
from paged_kv.entrypoints.llm import Completion, RequestOutput, StreamEvent
from paged_kv.errors import (
    ConfigError,
    GenerationError,
    InvalidRequestError,
    ModelNotFoundError,
    NonFiniteLogitsError,
    OutOfBlocksError,
    PagedKVError,
    PromptTooLongError,
)
from paged_kv.models.huggingface import PagedModel
from paged_kv.scheduler.scheduler import Scheduler

MODEL_LEN = 512
NUM_NEW_TOKENS = 30
FORMATS = ("native", "int8", "int4", "int2")
CHAT_TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
every_format = pytest.mark.parametrize("kv_format", FORMATS)

MakeLLM = Callable[..., LLM]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Token i is byte i, then <s> and </s>."""
    vocab = {letter: byte for byte, letter in bytes_to_unicode().items()}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="session")
def pristine_model(tokenizer) -> LlamaForCausalLM:
    """Never attached to an LLM: the reference. Weights are wide, so that tokens vary."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MODEL_LEN,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def model(pristine_model) -> LlamaForCausalLM:
    return copy.deepcopy(pristine_model)


@pytest.fixture
def make_llm(model, tokenizer) -> Iterator[MakeLLM]:
    """Makes LLMs over the test's model; checks that nothing is held, and closes them at the end."""
    made: list[LLM] = []

    def make(**options: Any) -> LLM:
        settings = {"tokenizer": tokenizer, "kv_format": "native", "max_num_seqs": 8, **options}
        made.append(LLM(model, **settings))
        return made[-1]

    yield make
    for llm in made:
        assert_nothing_is_held(llm)
        llm.close()


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(256) for _ in range(length)] for length in (1, 5, 17, 63, 120, 33)]


@pytest.fixture(scope="session")
def greedy(pristine_model, prompts) -> list[list[int]]:
    """What the model itself generates for each prompt."""
    return [model_tokens(pristine_model, prompt) for prompt in prompts]


def model_tokens(
    model: LlamaForCausalLM, prompt: list[int], count: int = NUM_NEW_TOKENS, **options: Any
) -> list[int]:
    ids = torch.tensor([prompt])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, **options
    )
    return output[0, len(prompt) :].tolist()


def params_of(**options: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": NUM_NEW_TOKENS, **options})


def sampling(**options: Any) -> SamplingParams:
    return params_of(**{"temperature": 1.5, "seed": 7, **options})


def tokens_of(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.token_ids for output in outputs]


def text_after(tokenizer: PreTrainedTokenizerFast, prompt: list[int], tokens: list[int]) -> str:
    """What the tokens add to the text of the prompt; the prompt must end in a whole character."""
    before = tokenizer.decode(prompt, skip_special_tokens=True)
    after = tokenizer.decode(prompt + tokens, skip_special_tokens=True)
    assert after.startswith(before)
    return after[len(before) :]


def assert_nothing_is_held(llm: LLM) -> None:
    engine = llm.engine
    engine.scheduler.check_integrity()
    assert not engine.has_unfinished
    assert not engine._live
    assert not llm._mailboxes
    assert engine.manager.num_free_blocks == engine.manager.num_blocks
    stats = llm.memory_stats()
    assert stats.free == stats.total
    assert stats.used == stats.wasted == stats.allocated == 0


def assemble(events: Iterator[StreamEvent], count: int) -> list[Completion]:
    """The completions of `count` prompts with one sample each, put together from their events."""
    completions = [Completion() for _ in range(count)]
    for event in events:
        completion = completions[event.prompt_index]
        assert completion.finish_reason is None, "an event after the end"
        completion.text += event.text
        if event.token_id is not None:
            completion.token_ids.append(event.token_id)
        completion.finish_reason = event.finish_reason
        completion.error = event.error
    return completions


# -- what is generated --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        pytest.param("hello", [*b"hello"], id="text"),
        pytest.param([104, 105], [104, 105], id="ids"),
        pytest.param([{"role": "user", "content": "hé"}], [*"[user] hé\n".encode()], id="messages"),
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
    short = [index for index, prompt in enumerate(prompts) if len(prompt) <= 63]
    outputs = make_llm(kv_format=kv_format).generate([prompts[i] for i in short], params_of())
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


# -- when it ends -------------------------------------------------------------------------------


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


# -- samples ------------------------------------------------------------------------------------


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


# -- streams ------------------------------------------------------------------------------------


@every_format
def test_a_stream_gives_what_generate_gives(make_llm, prompts, kv_format):
    llm = make_llm(kv_format=kv_format, token_budget=64, num_blocks=40)
    params = [params_of(), sampling(), *[params_of(max_tokens=9)] * (len(prompts) - 2)]
    expected = llm.generate(prompts, params)
    found = assemble(llm.stream(prompts, params), len(prompts))
    assert found == [output.completions[0] for output in expected]


def test_stream_events_tell_prompts_and_samples_apart(make_llm, prompts):
    llm = make_llm()
    expected = llm.generate(prompts[:2], sampling(n=2))
    found: dict[tuple[int, int], list[int]] = {}
    for event in llm.stream(prompts[:2], sampling(n=2)):
        found.setdefault((event.prompt_index, event.sample_index), []).append(event.token_id)
    assert found == {
        (p, s): expected[p].completions[s].token_ids for p in range(2) for s in range(2)
    }


def test_tokens_stream_one_at_a_time_and_only_the_last_has_a_reason(make_llm, prompts, greedy):
    events = list(make_llm().stream(prompts[1], params_of()))
    assert [event.token_id for event in events] == greedy[1]
    reasons = [event.finish_reason for event in events]
    assert reasons == [None] * (NUM_NEW_TOKENS - 1) + ["length"]


@pytest.mark.parametrize("num_events", [0, 1, 9])
@pytest.mark.parametrize("num_blocks", [200, 10], ids=["roomy", "preempting"])
def test_closing_a_stream_aborts_its_requests_and_frees_every_block(
    make_llm, prompts, greedy, num_events, num_blocks
):
    llm = make_llm(num_blocks=num_blocks)
    events = llm.stream(prompts, params_of())
    for _ in range(num_events):
        next(events)
    assert llm.engine.has_unfinished or num_events == 0
    events.close()
    assert_nothing_is_held(llm)
    assert tokens_of(llm.generate(prompts, params_of())) == greedy


def test_a_stream_that_is_dropped_frees_every_block(make_llm, prompts):
    llm = make_llm()
    events = llm.stream(prompts, params_of())
    next(events)
    del events
    assert_nothing_is_held(llm)


def test_two_interleaved_streams_each_get_their_own_tokens(make_llm, prompts, greedy):
    llm = make_llm()
    first, second = llm.stream(prompts[1], params_of()), llm.stream(prompts[2], params_of())
    tokens: tuple[list[int], list[int]] = ([], [])
    for one, two in itertools.zip_longest(first, second):
        tokens[0].append(one.token_id)
        tokens[1].append(two.token_id)
    assert list(tokens) == greedy[1:3]


def test_a_stream_goes_on_when_another_is_closed_or_runs_ahead(make_llm, prompts, greedy):
    llm = make_llm(num_blocks=20)
    survivor = llm.stream(prompts[3], params_of())
    tokens = [next(survivor).token_id]
    closed = llm.stream(prompts[1:3], params_of())
    for _ in range(3):
        next(closed)
    closed.close()
    tokens += [next(survivor).token_id]
    ahead = list(llm.stream(prompts[1], params_of()))
    assert [event.token_id for event in ahead] == greedy[1]
    assert [*tokens, *(event.token_id for event in survivor)] == greedy[3]


def test_generate_while_a_stream_is_open_disturbs_neither(make_llm, prompts, greedy):
    llm = make_llm(num_blocks=16)
    events = llm.stream(prompts[3], params_of())
    tokens = [next(events).token_id for _ in range(4)]
    assert tokens_of(llm.generate(prompts[:3], params_of())) == greedy[:3]
    assert [*tokens, *(event.token_id for event in events)] == greedy[3]


def finishing_order(events: Iterator[StreamEvent]) -> list[int]:
    return [event.prompt_index for event in events if event.finish_reason]


def test_lower_priority_numbers_are_served_first(make_llm, prompts):
    llm = make_llm(max_num_seqs=1)
    four = prompts[:4]
    assert finishing_order(llm.stream(four, params_of(max_tokens=3))) == [0, 1, 2, 3]
    events = llm.stream(four, params_of(max_tokens=3), priorities=[2, -1, 2, 0])
    assert finishing_order(events) == [1, 3, 0, 2]


def test_priorities_do_not_change_what_is_generated(make_llm, prompts, greedy):
    outputs = make_llm(max_num_seqs=2).generate(prompts, params_of(), priorities=[5, 4, 3, 2, 1, 0])
    assert tokens_of(outputs) == greedy


# -- requests that fail alone -------------------------------------------------------------------

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

    def poisoned(self, token_ids, positions, logit_rows, cache, step):
        logits = forward(self, token_ids, positions, logit_rows, cache, step).clone()
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


# -- steps that fail ----------------------------------------------------------------------------


def raise_once(function: Callable[..., Any], call: int, error: BaseException) -> Callable[..., Any]:
    """The function, whose `call`-th call raises instead."""
    numbers = itertools.count(1)

    def wrapper(*args: Any, **options: Any) -> Any:
        if next(numbers) == call:
            raise error
        return function(*args, **options)

    return wrapper


@every_format
@pytest.mark.parametrize("call", [1, 2, 20])
@pytest.mark.parametrize("error", [RuntimeError("device lost"), KeyboardInterrupt()], ids=repr)
def test_an_error_of_the_model_frees_every_block_and_the_llm_goes_on(
    make_llm, model, monkeypatch, prompts, kv_format, call, error
):
    """It comes from the last layer, when the first has already stored and sealed."""
    llm = make_llm(kv_format=kv_format, token_budget=200, num_blocks=60)
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
    for _ in range(30):
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


# -- bad input ----------------------------------------------------------------------------------

BAD_SETTINGS = [
    ({"kv_format": "int3"}, ConfigError, ["'int3'", "int2"]),
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
        {"max_tokens": None},
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
        assert len(llm._mailboxes) == 1
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


# -- memory, and models on disk -----------------------------------------------------------------


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
