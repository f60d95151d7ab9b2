"""Every model of the zoo: the tokens of its own `generate`, or the refusal in docs/models.md.

Eight sequences at once, in chunks, preempted, and again on what the prefix cache kept."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import paged_kv.models.huggingface
from paged_kv import LLM
from paged_kv.errors import PagedKVError
from paged_kv.models.gathered_model import SequenceContext
from tests.support import paged_models, zoo, zoo_table
from tests.support.paged_models import POOL, greedy, open_llm

preempted = paged_models.preempted

ROOT = Path(__file__).parent.parent.parent
TOKEN_BUDGET = 40
SMALL_POOL = 20  # the prompts alone need 37 blocks of 16 tokens, the longest sequence 11


# -- the same tokens ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", zoo.each(zoo.ARCHITECTURES))
def test_expected_tokens_are_diverse(name: str) -> None:
    """A model that says the same whatever it sees would show nothing."""
    sequences = zoo.expected_tokens(name)
    assert all(len(tokens) == zoo.NUM_NEW_TOKENS for tokens in sequences)
    assert min(len(set(tokens)) for tokens in sequences) >= 2
    assert len({token for tokens in sequences for token in tokens}) >= 35
    assert len({tuple(tokens) for tokens in sequences}) == len(sequences)


@pytest.mark.parametrize("name", zoo.each(zoo.ARCHITECTURES))
def test_at_once(name: str) -> None:
    expected = zoo.expected_tokens(name)
    with open_llm(zoo.model(name), token_budget=1024) as llm:
        assert greedy(llm, zoo.prompts()) == expected
        assert llm.engine.num_steps == zoo.NUM_NEW_TOKENS  # one step for all prompts
        assert zoo.CONFIGURATIONS[name].outcome.route == zoo_table.route_of(llm)


@pytest.mark.parametrize("name", zoo.each(zoo.ARCHITECTURES))
def test_in_chunks_and_again_on_prefix_hits(name: str) -> None:
    expected = zoo.expected_tokens(name)
    with open_llm(zoo.model(name), token_budget=TOKEN_BUDGET) as llm:
        assert greedy(llm, zoo.prompts()) == expected
        assert llm.engine.num_steps > sum(zoo.PROMPT_LENGTHS) // TOKEN_BUDGET
        assert llm.statistics().num_hit_tokens == 0
        assert greedy(llm, zoo.prompts()) == expected
        whole_blocks = sum((length - 1) // 16 * 16 for length in zoo.PROMPT_LENGTHS)
        keeps_states = llm.engine.model.keeps_states  # then nothing is shared
        assert llm.statistics().num_hit_tokens == (0 if keeps_states else whole_blocks)


@pytest.mark.parametrize("name", zoo.each(zoo.ARCHITECTURES))
def test_preempted(name: str, preempted: list[Any]) -> None:
    expected = zoo.expected_tokens(name)
    with open_llm(zoo.model(name), token_budget=1024, num_blocks=SMALL_POOL) as llm:
        assert greedy(llm, zoo.prompts()) == expected
    assert preempted


@pytest.mark.parametrize("name", zoo.each(zoo.ARCHITECTURES))
def test_control_old_context_forgotten(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every architecture, tokens that do not see the past beyond 20 tokens are others."""
    attention, update = paged_kv.models.huggingface.paged_attention, SequenceContext.update

    def forgetful(*args: Any, **kwargs: Any) -> torch.Tensor:
        return attention(*args, **{**kwargs, "sliding_window": 20})

    def forgotten(*args: Any) -> tuple[torch.Tensor, ...]:
        key, value = (tokens.clone() for tokens in update(*args))
        key[:, :, :-20] = value[:, :, :-20] = 0
        return key, value

    monkeypatch.setattr(paged_kv.models.huggingface, "paged_attention", forgetful)
    monkeypatch.setattr(SequenceContext, "update", forgotten)
    expected = zoo.expected_tokens(name)[-2:]
    with open_llm(zoo.model(name)) as llm:
        tokens = greedy(llm, zoo.prompts()[-2:])
    assert all(a != b for a, b in zip(tokens, expected, strict=True))


# -- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", zoo.each(zoo.REFUSED))
def test_refused(name: str) -> None:
    """For the reason that stands in the table, and the model is as it was."""
    configuration = zoo.CONFIGURATIONS[name]
    model = zoo.build(configuration.class_name, **configuration.settings)
    implementation = model.config._attn_implementation
    with pytest.raises(PagedKVError, match=re.escape(configuration.outcome.refusal)):
        LLM(model, num_blocks=POOL)
    assert model.config._attn_implementation == implementation
    if not model.config.is_encoder_decoder:  # it still works by itself
        assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


# -- what is told of it ---------------------------------------------------------------------------


def test_the_table_of_models_is_true() -> None:
    written = (ROOT / "docs" / "models.md").read_text()
    assert written == zoo_table.table(), "`make models` writes it anew"


def test_the_zoo_is_large() -> None:
    families = {zoo.model_type(name) for name in zoo.ARCHITECTURES}
    assert len(zoo.ARCHITECTURES) >= 90
    assert len(families) >= 60


def test_the_readme_counts_right() -> None:
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert zoo_table.summary() in readme
