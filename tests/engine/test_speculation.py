"""Guesses of next tokens: where they come from, how many are tried, and that outputs stay."""

from __future__ import annotations

import copy
from typing import Any
from unittest.mock import Mock, patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

from paged_kv import LLM, ConfigError, DraftModel, PromptLookup, SamplingParams, SinkWindow
from paged_kv.engine.draft_length import FIRST_PAUSE, LONGEST_PAUSE, DraftLength, DraftPauses
from paged_kv.engine.draft_model import DraftRunner
from paged_kv.entrypoints.demo import MODEL_FOLDER
from paged_kv.models.huggingface import IMPLEMENTATION
from tests.support import zoo
from tests.support.paged_models import open_llm

QUANTIZED = ("int8", "int2")


def nearly(model: PreTrainedModel, noise: float = 0.005) -> PreTrainedModel:
    """A model that mostly says the same."""
    other = copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.std() * noise)
    return other


def generate(model: PreTrainedModel, params: Any, prompts: Any, **settings: Any) -> Any:
    """Outputs and statistics of one LLM, which holds nothing afterwards."""
    with open_llm(model, **settings) as llm:
        outputs = llm.generate(prompts, params, show_progress=False)
        llm.engine.scheduler.check_integrity()
        assert llm.engine.manager.num_free_blocks == llm.engine.manager.num_blocks
        return outputs, llm.statistics()


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guesses are tried in every step, whatever they gain."""
    monkeypatch.setattr(DraftPauses, "begin_step", lambda _: True)


# -- outputs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt-oss", "deepseek-v3"])
@pytest.mark.parametrize("num_blocks", [80, 20])
def test_a_draft_model_changes_no_token(name: str, num_blocks: int) -> None:
    model = zoo.model(name)
    params = SamplingParams(max_tokens=zoo.NUM_NEW_TOKENS)
    outputs, statistics = generate(
        model,
        params,
        zoo.prompts(),
        num_blocks=num_blocks,
        token_budget=64,
        speculation=DraftModel(model=nearly(model)),
    )
    assert [output.token_ids for output in outputs] == zoo.expected_tokens(name)
    assert 5 < statistics.num_accepted_tokens < statistics.num_draft_tokens


@pytest.mark.parametrize("kv_format", QUANTIZED)
def test_quantized_tokens_stay_too(kv_format: str) -> None:
    """No draft goes beyond a seal: every token reads what it would read without drafts."""
    model = zoo.model("llama")
    prompts, params = zoo.prompts((100, 3, 40)), SamplingParams(max_tokens=160)
    # Open tokens as they are computed: a draft reads those before it from its own step.
    settings = {"kv_format": kv_format, "kv_dtype": "float32", "num_blocks": 100}
    expected, _ = generate(model, params, prompts, **settings)
    draft = DraftModel(model=nearly(model, 0.005), num_tokens=8)
    outputs, statistics = generate(model, params, prompts, speculation=draft, **settings)
    assert [o.token_ids for o in outputs] == [o.token_ids for o in expected]
    assert statistics.num_accepted_tokens > 100


MIXED: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 20},
    {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 1.0, "min_p": 0.05},
    {"temperature": 0.8, "typical_p": 0.9},
    {"repetition_penalty": 1.3},
    {"frequency_penalty": 0.5, "temperature": 0.9},
    {"no_repeat_ngram_size": 2},
    {"logit_bias": {7: 4.0, 9: -100.0}},
    {"min_tokens": 9, "stop_token_ids": list(range(0, 300, 9))},
    {"stop_token_ids": list(range(1, 300, 7)), "temperature": 1.2},
]


@pytest.mark.usefixtures("no_pauses")
def test_every_kind_of_request_gets_the_tokens_that_it_gets_without() -> None:
    """Drawn tokens too: each is drawn by its own number, whichever step it comes in."""
    model = zoo.model("llama")
    prompts = zoo.prompts((17,)) * len(MIXED)
    params = [
        SamplingParams(max_tokens=30, seed=index, logprobs=2, **options)
        for index, options in enumerate(MIXED)
    ]
    params[1] = SamplingParams(max_tokens=30, seed=1, temperature=1.0, n=3)
    params[2] = SamplingParams(max_tokens=30, seed=1, sink_window=SinkWindow(4, 24))
    settings = {"num_blocks": 200, "max_num_seqs": 16, "token_budget": 200}
    expected, _ = generate(model, params, prompts, **settings)
    draft = DraftModel(model=nearly(model, 0.005), max_step_tokens=200)
    outputs, statistics = generate(model, params, prompts, speculation=draft, **settings)
    assert statistics.num_accepted_tokens > 60
    for one, other in zip(outputs, expected, strict=True):
        for mine, plain in zip(one.completions, other.completions, strict=True):
            assert (mine.token_ids, mine.finish_reason) == (plain.token_ids, plain.finish_reason)
            for got, wanted in zip(mine.logprobs or [], plain.logprobs or [], strict=True):
                assert got.token_id == wanted.token_id
                assert got.logprob == pytest.approx(wanted.logprob, abs=1e-4)


@pytest.fixture(scope="module")
def demo_llms() -> Any:
    """In float32: in bfloat16 some processors attend to several tokens by other products."""
    options = {"kv_format": "native", "num_blocks": 200, "dtype": "float32"}
    with (
        LLM(MODEL_FOLDER, **options) as plain,
        LLM(MODEL_FOLDER, **options, speculation=PromptLookup()) as llm,
    ):
        yield plain, llm


@pytest.mark.usefixtures("no_pauses")
@pytest.mark.parametrize("options", [{}, {"stop": ["e"]}, {"stop": [". "]}, {"temperature": 0.5}])
def test_prompt_lookup_takes_fewer_steps(demo_llms: Any, options: dict[str, Any]) -> None:
    plain, llm = demo_llms
    text = "The old man went to the sea. The old man went to the sea. The old man went"
    params = SamplingParams(max_tokens=100, seed=3, ignore_eos=True, **options)
    before = plain.statistics().num_steps, llm.statistics().num_steps
    expected, found = (each.generate(text, params)[0].completions[0] for each in demo_llms)
    assert (found.text, found.token_ids) == (expected.text, expected.token_ids)
    assert found.finish_reason == expected.finish_reason
    if not options:
        num_plain, num_steps = plain.statistics().num_steps, llm.statistics().num_steps
        assert num_steps - before[1] < 0.9 * (num_plain - before[0])


def test_a_crowd_is_not_slowed_by_guesses() -> None:
    """Beyond `max_step_tokens` nobody tries any."""
    model = zoo.model("llama")
    draft = DraftModel(model=model, max_step_tokens=12)
    params = SamplingParams(max_tokens=10, ignore_eos=True)
    _, few = generate(model, params, zoo.prompts((5,)) * 2, speculation=draft)
    assert few.num_draft_tokens > 0
    _, many = generate(model, params, zoo.prompts((5,)) * 8, speculation=draft)
    assert many.num_draft_tokens == 0


# -- whoever guesses ------------------------------------------------------------------------------


def test_a_source_that_fails_is_asked_no_more() -> None:
    model = zoo.model("llama")
    params = SamplingParams(max_tokens=zoo.NUM_NEW_TOKENS)
    draft, guess = DraftModel(model=nearly(model)), Mock(side_effect=ValueError("lost its way"))
    expected = "speculation is off .* ValueError.*lost its"
    with patch.object(DraftRunner, "guess", guess), pytest.warns(UserWarning, match=expected):
        outputs, _ = generate(model, params, zoo.prompts(), speculation=draft)
    assert guess.call_count == 1
    assert [output.token_ids for output in outputs] == zoo.expected_tokens("llama")


def test_models_are_given_back() -> None:
    model = zoo.build("LlamaForCausalLM")
    other = nearly(model)
    with open_llm(model, speculation=DraftModel(model=other)):
        assert other.config._attn_implementation == IMPLEMENTATION
    assert other.config._attn_implementation != IMPLEMENTATION
    with pytest.raises(ConfigError, match="num_blocks"):
        open_llm(model, speculation=DraftModel(model=other), num_blocks=0)
    assert other.config._attn_implementation != IMPLEMENTATION


@pytest.fixture
def runner() -> Any:
    """A draft runner with few sequences and blocks."""
    speculation = DraftModel(model=copy.deepcopy(zoo.model("llama")))
    with open_llm(
        zoo.build("LlamaForCausalLM", hidden_size=32),
        speculation=speculation,
        num_blocks=16,
        max_num_seqs=3,
    ) as llm:
        yield llm.engine.speculation._source


def test_a_draft_model_says_what_it_says_alone(runner: DraftRunner) -> None:
    """Whatever it followed before: longer or shorter tokens, or others."""
    prompt, other = (np.array(p, dtype=np.int32) for p in zoo.prompts((17, 40)))
    for tokens in (prompt, prompt[:9], other, np.concatenate([other, prompt]), prompt):
        guess = runner.guess({"a": tokens}, {"a": 5})["a"]
        [expected] = zoo.generate_alone(zoo.model("llama"), [tokens.tolist()], 5)
        assert guess.tolist() == expected
        runner._manager.check_integrity()


def test_what_is_not_asked_for_makes_room(runner: DraftRunner) -> None:
    prompts = [np.array(p, dtype=np.int32) for p in zoo.prompts((17, 40, 64, 97, 131))]
    for index, prompt in enumerate(prompts):
        assert len(runner.guess({str(index): prompt}, {str(index): 3})[str(index)]) == 3
        assert runner._manager.num_free_seqs >= 0
    together = {str(index): prompt for index, prompt in enumerate(prompts)}
    guesses = runner.guess(together, dict.fromkeys(together, 2))
    assert 0 < len(guesses) < len(prompts)  # the others found no room, and none is wrong
    for name, guess in guesses.items():
        [expected] = zoo.generate_alone(zoo.model("llama"), [together[name].tolist()], 2)
        assert guess.tolist() == expected
    runner._manager.check_integrity()


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_a_guess_that_is_cut_off_leaves_a_runner_that_works(
    runner: DraftRunner, error: type[BaseException]
) -> None:
    prompt = np.array(zoo.prompts((40,))[0], dtype=np.int32)
    expected = runner.guess({"a": prompt}, {"a": 4})["a"].tolist()
    with (
        patch.object(type(runner._runner), "run", side_effect=error),
        pytest.raises(error),
    ):
        runner.guess({"a": prompt[:20]}, {"a": 4})
    assert runner.guess({"a": prompt}, {"a": 4})["a"].tolist() == expected


def test_tokens_that_a_draft_model_does_not_know(runner: DraftRunner) -> None:
    unknown = np.array([1, zoo.VOCAB_SIZE], dtype=np.int32)
    assert runner.guess({"a": unknown}, {"a": 2}) == {}
    too_long = np.ones(zoo.MAX_MODEL_LEN, dtype=np.int32)
    assert runner.guess({"a": too_long}, {"a": 2}) == {}


def followed_by(tokens: list[int], lookup: PromptLookup, count: int) -> list[int]:
    """What `look_up` should find, place by place."""
    for size in range(lookup.max_ngram, lookup.min_ngram - 1, -1):
        for start in range(len(tokens) - 1, size - 1, -1):
            if tokens[start - size : start] == tokens[-size:]:
                found = tokens[start:]
                return (found * count)[:count]
    return []


@given(
    tokens=st.lists(st.integers(0, 2), min_size=1, max_size=30),
    count=st.integers(1, 9),
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 4)),
)
def test_prompt_lookup_finds_what_followed_last(
    tokens: list[int], count: int, sizes: tuple[int, int]
) -> None:
    lookup = PromptLookup(min_ngram=min(sizes), max_ngram=max(sizes))
    found = lookup.look_up(np.array(tokens, dtype=np.int32), count).tolist()
    assert found == followed_by(tokens, lookup, count)


def test_lengths_follow_what_became_of_guesses() -> None:
    length = DraftLength()
    first = length.num_tokens
    for tried, right, expected in [(first, first, 2 * first), (2, 2, 2 * first), (8, 1, 2)]:
        length.learn(tried, right)
        assert length.num_tokens == expected
    length.learn(2, 0)
    length.learn(0, 0)
    assert length.num_tokens == 1


def test_steps_without_guesses_after_those_that_gained_too_little() -> None:
    pauses, found = DraftPauses(), []
    for _ in range(5):
        assert pauses.begin_step()
        pauses.learn(num_seqs=4, num_accepted=3)
        found.append(next(n for n in range(999) if pauses.begin_step()))
    assert found == [FIRST_PAUSE, 4 * FIRST_PAUSE, LONGEST_PAUSE, LONGEST_PAUSE, LONGEST_PAUSE]
    pauses.learn(num_seqs=4, num_accepted=4)
    assert pauses.begin_step()
    pauses.learn(num_seqs=4, num_accepted=0)
    assert next(n for n in range(999) if pauses.begin_step()) == FIRST_PAUSE


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: PromptLookup(num_tokens=0), "num_tokens must be at least 1, got 0"),
        (lambda: PromptLookup(num_tokens=65), "num_tokens must be at most 64, got 65"),
        (lambda: PromptLookup(max_ngram=1), "max_ngram must be at least 2, got 1"),
        (lambda: PromptLookup(max_step_tokens=1), "max_step_tokens must be at least 2, got 1"),
        (lambda: DraftModel(model=3), "model must be a folder"),
        (lambda: DraftModel(model="x", num_tokens=2.5), "num_tokens must be an integer, got 2.5"),
        (lambda: open_llm(zoo.model("llama"), speculation=4), "speculation must be a PromptLookup"),
    ],
)
def test_refused_by_name(make: Any, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        make()
