"""Whatever `generate()` would do to tokens is done, or refused by name: its own tokens are ours.

Where tokens are drawn, `generate()` is given our uniform numbers instead of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, LlamaForCausalLM, LogitsProcessorList

from paged_kv import BeamSearchParams, SamplingParams
from paged_kv.engine.sampler import pick, uniform_numbers
from paged_kv.engine.token_rules import TokenCounts
from paged_kv.errors import ConfigError, InvalidRequestError
from paged_kv.models.generation_config import (
    APPLIED,
    REFUSED,
    RENAMED,
    WITHOUT_EFFECT,
    options_of,
)
from tests.support.small_llm import NUM_NEW_TOKENS, assert_nothing_is_held, params_of, tokens_of

END = 65  # token that ends what these tests generate
SEED = 11
PROMPT = [*b"the cat sat on the mat, the cat sat"]
# Options of `generate()`; each is a field of `SamplingParams` too, see `fields_of`.
GREEDY = {
    "repetition": {"repetition_penalty": 1.3},
    "encouraged": {"repetition_penalty": 0.8},
    "ngrams": {"no_repeat_ngram_size": 1},
    "words": {"bad_words_ids": [[248], [165, 4], [206, 6, 28]]},
    "end word": {"bad_words_ids": [[END], [206]], "sequence_bias": {(END,): 50.0}},
    "suppressed": {"suppress_tokens": [10, 28, 101, 200]},
    "first": {"begin_suppress_tokens": list(range(0, 256, 2))},
    "forced end": {"forced_eos_token_id": [END, 7]},
    "decay": {"exponential_decay_length_penalty": (4, 1.6)},
    "fewest": {"min_new_tokens": 9, "sequence_bias": {(END,): 50.0}},
    "bias": {"sequence_bias": {(33,): 4.0, (44,): -6.5}},
    "several": {
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 3,
        "suppress_tokens": [32],
        "sequence_bias": {(99,): 3.0},
    },
}
LIMITS = {
    "top_k": {"top_k": 8},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.1},
    "top_h": {"top_h": 0.5},
    "typical": {"typical_p": 0.4},
    "typical of few": {"typical_p": 0.6, "top_k": 12, "temperature": 0.7},
    "epsilon": {"epsilon_cutoff": 0.02},
    "eta": {"eta_cutoff": 0.05, "top_p": 0.95},
    "penalized": {"typical_p": 0.5, "repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
}
OPTIONS = GREEDY | {
    name: {"do_sample": True, "temperature": 1.5, **options} for name, options in LIMITS.items()
}


def fields_of(options: dict[str, Any]) -> dict[str, Any]:
    """Options of `generate()` as fields of `SamplingParams`."""
    fields = dict(options)
    fields["min_tokens"] = fields.pop("min_new_tokens", None)
    bias = fields.pop("sequence_bias", {})
    fields["logit_bias"] = {ids[0]: value for ids, value in bias.items()}
    if fields.pop("do_sample", False):
        fields["seed"] = SEED
    return fields


def generated(
    model: LlamaForCausalLM, prompt: list[int], processors: Any = (), **options: Any
) -> list[int]:
    """Tokens of `generate()`, drawn by our uniform numbers."""
    places = iter(range(NUM_NEW_TOKENS))
    is_usual = options.keys() <= {"do_sample", "temperature", "top_k", "top_p", "min_p"}

    def multinomial(probabilities: Tensor, num_samples: int) -> Tensor:
        uniforms = torch.from_numpy(uniform_numbers([SEED], [0], [next(places)]))
        if not is_usual:
            return pick(probabilities.double(), uniforms)[:, None]
        ordered, ids = probabilities.double().sort(descending=True, stable=True)  # as we draw then
        return ids.gather(1, pick(ordered, uniforms)[:, None])

    ids = torch.tensor([prompt])
    usual = {"max_new_tokens": NUM_NEW_TOKENS, "eos_token_id": END}
    if options.get("do_sample"):
        usual["top_k"] = 0  # or it would be 50
    with patch.object(torch, "multinomial", multinomial):
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            logits_processor=LogitsProcessorList(processors),
            **usual | options,
        )
    return output[0, len(prompt) :].tolist()


@pytest.fixture
def ending_model(model):
    model.generation_config.eos_token_id = END
    return model


@pytest.fixture(scope="module")
def expected(pristine_model):
    return {name: generated(pristine_model, PROMPT, **each) for name, each in OPTIONS.items()}


# -- a request's own ----------------------------------------------------------------------------


def test_every_option_gives_the_tokens_of_generate_all_at_once_and_alone(
    make_llm, ending_model, pristine_model, expected
):
    """Twenty-one configurations in one batch, twice each: neighbours change nothing."""
    llm = make_llm(kv_format="native")
    params = {name: params_of(**fields_of(options)) for name, options in OPTIONS.items()}
    outputs = llm.generate([PROMPT] * len(params) * 2, [*params.values()] * 2)
    for name, output in zip([*params] * 2, outputs, strict=True):
        assert output.token_ids == expected[name], name
    for name in ("several", "typical", "penalized"):
        (output,) = llm.generate(PROMPT, params[name])
        assert output.token_ids == expected[name]
    plain = generated(pristine_model, PROMPT)
    same = [name for name in GREEDY if expected[name] == plain]
    assert not same, "options that change nothing test nothing"
    assert_nothing_is_held(llm)


def test_a_first_token_is_forced_behind_a_prompt_of_one(make_llm, ending_model, pristine_model):
    options = {"forced_bos_token_id": 77}
    llm = make_llm(kv_format="native")
    outputs = llm.generate([[50], [50, 51]], params_of(**options))
    expected = [generated(pristine_model, prompt, **options) for prompt in ([50], [50, 51])]
    assert [output.token_ids for output in outputs] == expected
    assert expected[0][0] == 77 != expected[1][0]


class CountedPenalties:
    """As OpenAI has it: by tokens that were generated."""

    def __init__(self, frequency: float, presence: float) -> None:
        self.frequency, self.presence = frequency, presence

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        counts = torch.bincount(ids[0, len(PROMPT) :], minlength=scores.shape[1])
        return scores - self.frequency * counts - self.presence * (counts > 0)


@pytest.mark.parametrize("penalties", [(0.7, 0.0), (0.0, 3.0), (-0.5, 1.0)], ids=str)
def test_frequency_and_presence_count_what_was_generated(
    make_llm, ending_model, pristine_model, penalties
):
    frequency, presence = penalties
    bias = {33: 7.0, 44: 6.5, 55: 6.0}  # so that tokens come again and again
    favoured = {"sequence_bias": {(token,): value for token, value in bias.items()}}
    expected = generated(pristine_model, PROMPT, [CountedPenalties(*penalties)], **favoured)
    params = params_of(frequency_penalty=frequency, presence_penalty=presence, logit_bias=bias)
    (output,) = make_llm(kv_format="native").generate(PROMPT, params)
    assert output.token_ids == expected != generated(pristine_model, PROMPT, **favoured)
    assert max(Counter(expected).values()) > 3


def test_samples_of_a_prompt_are_penalized_each_by_its_own_tokens(make_llm, ending_model):
    """And what is drawn for a sample does not depend on how many there are."""
    options = {"temperature": 1.5, "seed": 3, "repetition_penalty": 1.5, "typical_p": 0.6}
    llm = make_llm(kv_format="native")
    (several,) = llm.generate(PROMPT, params_of(n=3, **options))
    (one,) = llm.generate(PROMPT, params_of(**options))
    assert several.completions[0].token_ids == one.token_ids
    assert len({tuple(each.token_ids) for each in several.completions}) == 3


class CutOff(list[int]):
    """Tokens of which an interrupt strikes behind the second, once."""

    is_armed = True

    def __getitem__(self, places: Any) -> Any:
        tokens = super().__getitem__(places)
        if not self.is_armed:
            return tokens
        self.is_armed = False

        def strike() -> Iterator[int]:
            yield from tokens[:2]
            raise KeyboardInterrupt

        return strike()


def test_counting_that_is_cut_off_begins_anew():
    params = params_of(frequency_penalty=1.0)
    counts, output = TokenCounts(), CutOff([5, 6, 5, 7])
    with pytest.raises(KeyboardInterrupt):
        counts.catch_up([5, 9], output)
    counts.catch_up([5, 9], output)
    found = counts.penalties(params)
    assert dict(zip(found.token_ids.tolist(), found.numbers[1], strict=True)) == {
        5: 2.0,
        9: 0.0,
        6: 1.0,
        7: 1.0,
    }


def test_penalties_survive_preemption(make_llm, ending_model, expected):
    """Requests that start again know what they had."""
    names = ["repetition", "several", "ngrams", "penalized"]
    llm = make_llm(kv_format="native", num_blocks=9, prefix_caching=False)
    llm.engine.scheduler.steps_ahead = 0  # they outgrow the pool
    params = [params_of(**fields_of(OPTIONS[name])) for name in names]
    outputs = llm.generate([PROMPT] * len(names), params)
    assert [output.token_ids for output in outputs] == [expected[name] for name in names]
    assert llm.statistics().num_preemptions


# -- the model's --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in OPTIONS if "sequence_bias" not in OPTIONS[name]])
def test_what_the_models_configuration_asks_for_is_done_as_generate_does(
    make_llm, ending_model, expected, name
):
    for option, value in OPTIONS[name].items():
        setattr(ending_model.generation_config, option, value)
    llm = make_llm(kv_format="native")
    (output,) = llm.generate(PROMPT, params_of(seed=SEED))
    assert output.token_ids == expected[name]


def test_a_request_overrides_the_model_and_none_leaves_it_out(
    make_llm, ending_model, pristine_model, expected
):
    configuration = ending_model.generation_config
    configuration.repetition_penalty, configuration.do_sample = 1.3, True
    configuration.temperature, configuration.top_k = 1.5, 8
    plain = generated(pristine_model, PROMPT)
    llm = make_llm(kv_format="native")
    (output,) = llm.generate(PROMPT, params_of(temperature=0))
    assert output.token_ids == expected["repetition"]
    (output,) = llm.generate(PROMPT, params_of(temperature=0, repetition_penalty=1.0))
    assert output.token_ids == plain
    (output,) = llm.generate(PROMPT, params_of(seed=SEED, repetition_penalty=1.0))
    assert output.token_ids == expected["top_k"]
    (output,) = make_llm(kv_format="native", generation_config=None).generate(PROMPT, params_of())
    assert output.token_ids == plain


def test_the_models_stop_strings_end_requests(make_llm, model):
    text = make_llm(kv_format="native").generate(PROMPT, params_of())[0].text
    stop = text[5:8]
    model.generation_config.stop_strings = [stop]
    llm = make_llm(kv_format="native")
    assert llm.generate(PROMPT, params_of())[0].text == text[: text.index(stop)]
    assert llm.generate(PROMPT, params_of(stop=()))[0].text == text


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_applied_is_refused_by_name(make_llm, model, name):
    setattr(model.generation_config, name, 3)
    with pytest.raises(ConfigError, match=f"sets {name}=3, which is not applied"):
        make_llm()
    make_llm(generation_config=None).close()


def test_a_value_that_cannot_be_is_refused_with_the_model(make_llm, model):
    model.generation_config.repetition_penalty = -1.0
    with pytest.raises(ConfigError, match=r"config: repetition_penalty must be .* -1\.0"):
        make_llm()


def test_every_option_of_transformers_is_applied_refused_or_known_to_change_nothing():
    """What a newer transformers adds has to be looked at."""
    known = {*APPLIED, *RENAMED, *REFUSED} | WITHOUT_EFFECT
    assert set(vars(GenerationConfig())) == known
    assert options_of(GenerationConfig()) == {}
    assert options_of(GenerationConfig(do_sample=True)) == {"temperature": 1.0}


def test_a_beam_search_says_what_it_does_not_apply(make_llm, model):
    model.generation_config.repetition_penalty = 1.3
    model.generation_config.top_p = 0.8
    with pytest.raises(InvalidRequestError, match="sets repetition_penalty, which beam search"):
        make_llm().beam_search(PROMPT, BeamSearchParams(max_tokens=4))


# -- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("suppress_tokens", [5, 9999]),
        ("begin_suppress_tokens", [-1]),
        ("bad_words_ids", [[5], [6, 9999]]),
        ("logit_bias", {9999: 1.0}),
        ("forced_bos_token_id", 9999),
        ("forced_eos_token_id", [5, 9999]),
        ("stop_token_ids", [9999]),
        ("logprobs", 1000),
        ("prompt_logprobs", 1000),
    ],
)
def test_tokens_that_there_are_not_are_refused_before_anything_is_queued(make_llm, name, value):
    llm = make_llm()
    with pytest.raises(InvalidRequestError, match=f"{name}.*(9999|-1|1000)"):
        llm.generate([PROMPT, PROMPT], [params_of(), params_of(**{name: value})])
    assert_nothing_is_held(llm)


def test_rules_that_leave_nothing_end_one_request(make_llm, ending_model, expected):
    llm = make_llm(kv_format="native")
    params = [params_of(suppress_tokens=list(range(300))[: llm.engine.model.vocab_size])]
    params.append(params_of(repetition_penalty=1.3))
    events = list(llm.stream([PROMPT] * 2, params))
    (error,) = [event.error for event in events if event.error is not None]
    assert "options leave no token" in str(error)
    tokens = [event.token_id for event in events if event.prompt_index == 1]
    assert tokens == expected["repetition"]


# -- log-probabilities --------------------------------------------------------------------------


def plain_log_probabilities(model: LlamaForCausalLM, tokens: list[int]) -> Tensor:
    """Of each token after the prompt, over the vocabulary, by a plain forward pass."""
    ids = torch.tensor([PROMPT + tokens])
    with torch.no_grad():
        logits = model(ids).logits[0, len(PROMPT) - 1 : -1]
    return logits.double().log_softmax(-1)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 1.5, "top_k": 9},
        {"temperature": 0.8, "typical_p": 0.7},
        {"repetition_penalty": 1.4, "suppress_tokens": [101]},
    ],
    ids=str,
)
@pytest.mark.parametrize("count", [0, 1, 5])
def test_logprobs_are_those_of_a_plain_forward_pass(
    make_llm, ending_model, pristine_model, options, count
):
    params = params_of(logprobs=count, seed=SEED, n=2, **options)
    (output,) = make_llm(kv_format="native").generate(PROMPT, params)
    for completion in output.completions:
        expected = plain_log_probabilities(pristine_model, completion.token_ids)
        assert [each.token_id for each in completion.logprobs] == completion.token_ids
        for found, row in zip(completion.logprobs, expected, strict=True):
            assert found.logprob == pytest.approx(float(row[found.token_id]), abs=1e-4)
            likeliest = row.topk(count)
            assert [token for token, _ in found.likeliest] == likeliest.indices.tolist()
            values = [value for _, value in found.likeliest]
            assert values == pytest.approx(likeliest.values.tolist(), abs=1e-4)
        total = sum(each.logprob for each in completion.logprobs)
        assert completion.log_probability == pytest.approx(total)


def test_each_request_gets_as_many_as_it_asks_for(make_llm):
    """Beside requests that ask for none."""
    counts = [None, 3, 0, 7, None]
    outputs = make_llm().generate([PROMPT] * 5, [params_of(logprobs=c) for c in counts])
    assert len({tuple(output.token_ids) for output in outputs}) == 1
    for count, output in zip(counts, outputs, strict=True):
        logprobs = output.completions[0].logprobs
        if count is None:
            assert logprobs is None
            assert output.completions[0].log_probability is None
        else:
            assert [len(each.likeliest) for each in logprobs] == [count] * NUM_NEW_TOKENS


def test_streamed_tokens_come_with_their_logprobs(make_llm):
    llm = make_llm()
    (output,) = llm.generate(PROMPT, params_of(logprobs=2))
    events = [event for event in llm.stream(PROMPT, params_of(logprobs=2)) if event.token_id]
    for event, logprob in zip(events, output.completions[0].logprobs, strict=True):
        assert event.log_probability == pytest.approx(logprob.logprob, abs=1e-4)
        likeliest = [token_id for token_id, _ in logprob.likeliest]
        assert [token_id for token_id, _ in event.likeliest] == likeliest


@pytest.mark.parametrize("count", [0, 3])
@pytest.mark.parametrize("budget", [1024, 16, 7, 1])
def test_prompt_logprobs_are_those_of_a_plain_forward_pass(make_llm, pristine_model, budget, count):
    """In chunks, beside others, twice: what is cached tells nothing of its tokens."""
    prompts = [PROMPT, PROMPT, [*b"the cat"], PROMPT[:16], [5], PROMPT]
    params = [params_of(prompt_logprobs=count, max_tokens=2)] * 5 + [params_of(max_tokens=2)]
    params[1] = params_of(prompt_logprobs=count + 1, n=2, temperature=1.0, max_tokens=2)
    llm = make_llm(kv_format="native", token_budget=max(budget, 8), max_prefill_tokens=budget)
    plain = tokens_of(make_llm(kv_format="native").generate(prompts, params_of(max_tokens=2)))
    for _ in range(2):
        outputs = llm.generate(prompts, params)
        assert outputs[5].prompt_logprobs is None
        assert tokens_of(outputs)[2:] == plain[2:]
        for prompt, output, one in zip(prompts[:5], outputs, params, strict=False):
            with torch.no_grad():
                rows = pristine_model(torch.tensor([prompt])).logits[0].double().log_softmax(-1)
            first, *others = output.prompt_logprobs
            assert first is None
            assert [each.token_id for each in others] == prompt[1:]
            for found, row in zip(others, rows, strict=False):
                assert found.logprob == pytest.approx(float(row[found.token_id]), abs=1e-4)
                likeliest = row.topk(one.prompt_logprobs)
                assert [token for token, _ in found.likeliest] == likeliest.indices.tolist()
                values = [value for _, value in found.likeliest]
                assert values == pytest.approx(likeliest.values.tolist(), abs=1e-4)
    assert_nothing_is_held(llm)


def test_prompt_logprobs_survive_preemption(make_llm):
    params = params_of(prompt_logprobs=1)
    expected = make_llm(kv_format="native").generate([PROMPT] * 4, params)
    llm = make_llm(kv_format="native", num_blocks=9)
    llm.engine.scheduler.steps_ahead = 0
    outputs = llm.generate([PROMPT] * 4, params)
    assert llm.statistics().num_preemptions
    for output, other in zip(outputs, expected, strict=True):
        found = [each.logprob for each in output.prompt_logprobs[1:]]
        values = [each.logprob for each in other.prompt_logprobs[1:]]
        assert found == pytest.approx(values, abs=1e-4)


def test_options_that_are_none_are_the_models():
    params = SamplingParams(top_k=0, stop="x").completed(
        {"top_k": 5, "top_p": 0.5, "stop": ["y"], "temperature": 0.7}
    )
    assert (params.limits, params.stop_strings) == ((0, 0.5, 0.0), ("x",))
    assert params.temperature == 0.7
    assert SamplingParams(temperature=0).completed({"temperature": 0.7}).is_greedy
