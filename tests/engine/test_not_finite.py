"""What is not finite is never shared: neither what failed nor what came before or after it."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from paged_kv import LLM, SamplingParams
from paged_kv.engine.beam_search import BeamSearchParams
from paged_kv.errors import GenerationError, NonFiniteLogitsError
from tests.support.small_llm import assert_nothing_is_held, every_format, tokens_of

PROMPT = [token % 60 + 1 for token in range(0, 7 * 150, 7)]
OTHER = [50, 2, 40] * 30
PARAMS = SamplingParams(max_tokens=6)


@pytest.fixture(scope="module")
def pristine() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        initializer_range=0.3,
        eos_token_id=None,
    )
    torch.manual_seed(1)
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def model(pristine) -> LlamaForCausalLM:
    return copy.deepcopy(pristine)


@pytest.fixture
def make_llm(model) -> Iterator[object]:
    made: list[LLM] = []

    def make(**options: object) -> LLM:
        made.append(LLM(model, **{"kv_format": "native", **options}))
        return made[-1]

    yield make
    for llm in made:
        assert_nothing_is_held(llm)
        llm.close()


def poison_once(model: LlamaForCausalLM, token_id: int, call: int = 1) -> None:
    """In the `call`-th pass that computes this token the first layer's keys of it are NaN."""
    calls = 0
    embeddings: list[Tensor] = []

    def note(module: nn.Module, arguments: tuple[Tensor]) -> None:
        embeddings[:] = [arguments[0]]

    def poison(module: nn.Module, arguments: tuple[Tensor], output: Tensor) -> Tensor | None:
        nonlocal calls
        is_hit = embeddings[0] == token_id
        if not is_hit.any():
            return None
        calls += 1
        return output.masked_fill(is_hit[..., None], torch.nan) if calls == call else None

    model.get_input_embeddings().register_forward_pre_hook(note)
    model.model.layers[0].self_attn.k_proj.register_forward_hook(poison)


def outcomes(llm: LLM, prompts: list[list[int]]) -> list[str]:
    try:
        outputs = llm.generate(prompts, PARAMS)
    except GenerationError as failed:
        outputs = failed.outputs
    return [output.completions[0].finish_reason for output in outputs]


@every_format
@pytest.mark.parametrize("token_budget", [16, 50, 1024])
def test_a_transient_nan_ends_one_request_and_reaches_nobody_else(
    make_llm, model, kv_format, token_budget
):
    llm = make_llm(kv_format=kv_format, token_budget=token_budget)
    batch = [[*PROMPT, 1], [*PROMPT, 3], [*PROMPT, 4], OTHER]
    poison_once(model, PROMPT[20])
    assert outcomes(llm, batch) == ["error", "length", "length", "length"]
    llm.engine.scheduler.check_integrity()
    assert outcomes(llm, batch) == ["length"] * 4


@every_format
def test_what_follows_is_what_an_llm_that_never_failed_computes(make_llm, model, kv_format):
    batch = [[*PROMPT, 1], [*PROMPT, 3], OTHER]
    expected = tokens_of(make_llm(kv_format=kv_format, token_budget=64).generate(batch, PARAMS))
    llm = make_llm(kv_format=kv_format, token_budget=64)
    poison_once(model, PROMPT[70])
    with pytest.raises(GenerationError) as caught:
        llm.generate(batch, PARAMS)
    assert isinstance(caught.value.__cause__, NonFiniteLogitsError)
    assert tokens_of(caught.value.outputs[1:]) == expected[1:]
    assert tokens_of(llm.generate(batch, PARAMS)) == expected


def test_a_request_that_began_to_share_before_the_failure_was_known_starts_again(make_llm, model):
    """It shares the first chunks, NaN among them, and has sampled nothing since."""
    llm = make_llm(token_budget=40)
    long = [*PROMPT, *OTHER]
    shares = [*PROMPT[:64], *OTHER, *OTHER]
    (expected,) = tokens_of(llm.generate([shares], PARAMS))
    llm.reset_prefix_cache()
    poison_once(model, PROMPT[20])
    first, second = llm.stream([long], PARAMS), llm.stream([shares], PARAMS, priorities=[1])
    events = [next(first)]
    assert isinstance(events[0].error, NonFiniteLogitsError)
    assert [event.token_id for event in second] == expected


def test_a_prompt_that_decodes_into_nan_is_found_no_more(make_llm, model):
    """The NaN comes when the prompt and some output are already cached, and takes them along."""
    llm = make_llm()
    (tokens,) = tokens_of(llm.generate([PROMPT], SamplingParams(max_tokens=40)))
    llm.reset_prefix_cache()
    poison_once(model, tokens[35], call=1)
    with pytest.raises(GenerationError):
        llm.generate([PROMPT], SamplingParams(max_tokens=40))
    assert llm.engine.manager.num_cached_blocks == 0
    assert tokens_of(llm.generate([PROMPT], SamplingParams(max_tokens=40))) == [tokens]


def test_a_beam_search_that_fails_leaves_nothing_to_be_found(make_llm, model):
    llm = make_llm()
    poison_once(model, PROMPT[5])
    with pytest.raises(GenerationError):
        llm.beam_search([PROMPT], BeamSearchParams(num_beams=3, max_tokens=5))
    assert llm.engine.manager.num_cached_blocks == 0


def test_a_failing_logits_processor_costs_no_cached_block(make_llm):
    """Its error is not the model's: what was computed may be shared."""
    llm = make_llm()

    def nothing_left(ids: Tensor, scores: Tensor) -> Tensor:
        return torch.full_like(scores, -torch.inf)

    with pytest.raises(GenerationError):
        llm.generate([PROMPT], SamplingParams(logits_processors=[nothing_left]))
    assert llm.engine.manager.num_cached_blocks > 0
