"""Every model of the zoo: the tokens of its own `generate`, or the refusal in docs/models.md.

Eight sequences at once, in chunks, preempted, and again on what the prefix cache kept."""

from __future__ import annotations

import re
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import paged_kv.models.huggingface
from paged_kv import LLM
from paged_kv.errors import PagedKVError
from paged_kv.models.gathered_model import SequenceContext
from tests.support import paged_models, zoo, zoo_table
from tests.support.paged_models import POOL, greedy, open_llm, scarce_blocks

preempted = paged_models.preempted

ROOT = Path(__file__).parent.parent.parent
TOKEN_BUDGET = 40
TOKENS_ON_HITS = 4  # and a last one, which BART's generation config forces
GENERATED = slice(2, None, 4)  # of the prompts: a short one and a long one
EACH_ALONE = ["llama", "gemma2", "falcon", "bamba"]  # of each route; one with a window


# -- the same tokens ------------------------------------------------------------------------------


@cache
def served_at_once(name: str) -> list[list[int]]:
    """Tokens for all prompts in one step, held to the model; then on hits in the prefix cache.

    `generate` continues some of the prompts. The tokens of all are the model's first choices in a
    pass over prompt and output, which tells as much for an eighth of the time; where it says
    otherwise (RoBERTa's take a token 0 for padding), `generate` continues all.
    """
    model, prompts = zoo.model(name), zoo.prompts()
    with open_llm(model, token_budget=1024) as llm:
        served = greedy(llm, prompts)
        assert llm.engine.num_steps == zoo.NUM_NEW_TOKENS  # one step for all prompts
        assert zoo.CONFIGURATIONS[name].outcome.route == zoo_table.route_of(llm)
        assert llm.statistics().num_hit_tokens == 0
        again = greedy(llm, prompts, TOKENS_ON_HITS + 1)
        whole_blocks = sum((length - 1) // 16 * 16 for length in zoo.PROMPT_LENGTHS)
        keeps_states = llm.engine.model.keeps_states  # then nothing is shared
        assert llm.statistics().num_hit_tokens == (0 if keeps_states else whole_blocks)
    assert served[GENERATED] == zoo.generate_alone(model, prompts[GENERATED])
    pairs = zip(prompts, served, strict=True)
    if any(zoo.logits_alone(model, *pair).argmax(-1).tolist() != pair[1] for pair in pairs):
        assert served == zoo.expected_tokens(name)
    hits = [tokens[:TOKENS_ON_HITS] for tokens in again]
    assert hits == [output[:TOKENS_ON_HITS] for output in served]
    return served


@pytest.mark.parametrize("name", zoo.each(zoo.ARCHITECTURES), scope="module")
def test_at_once_and_again_on_prefix_hits(name: str) -> None:
    served = served_at_once(name)
    # A model that says the same whatever it sees would show nothing.
    assert min(len(set(tokens)) for tokens in served) >= 2
    assert len({token for tokens in served for token in tokens}) >= 35
    assert len({tuple(tokens) for tokens in served}) == len(served)


@pytest.mark.parametrize("name", zoo.each(zoo.ARCHITECTURES), scope="module")
def test_in_chunks_and_preempted(name: str, preempted: list[Any]) -> None:
    served = served_at_once(name)
    with open_llm(zoo.model(name), token_budget=TOKEN_BUDGET) as llm, scarce_blocks():
        assert greedy(llm, zoo.prompts()) == served
        assert llm.engine.num_steps > sum(zoo.PROMPT_LENGTHS) // TOKEN_BUDGET
    assert preempted


@pytest.mark.parametrize("name", zoo.each(EACH_ALONE), scope="module")
@pytest.mark.parametrize("is_scarce", [False, True])
@pytest.mark.parametrize("token_budget", [TOKEN_BUDGET, 1024])
def test_chunks_preemption_and_hits_each_alone(
    name: str, is_scarce: bool, token_budget: int, preempted: list[Any]
) -> None:
    """Chunks without preemption, whole prompts with it; twice, so that chunks leave hits."""
    expected = zoo.expected_tokens(name)
    scarcity = scarce_blocks() if is_scarce else nullcontext()
    with open_llm(zoo.model(name), token_budget=token_budget) as llm, scarcity:
        assert greedy(llm, zoo.prompts()) == expected
        assert greedy(llm, zoo.prompts()) == expected
    assert bool(preempted) == is_scarce


@pytest.mark.parametrize("name", zoo.each(zoo.ARCHITECTURES), scope="module")
def test_control_old_context_forgotten(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every architecture, tokens that do not see the past beyond 20 tokens are others."""
    served = served_at_once(name)
    attention, update = paged_kv.models.huggingface.paged_attention, SequenceContext.update

    def forgetful(*args: Any, **kwargs: Any) -> torch.Tensor:
        return attention(*args, **{**kwargs, "sliding_window": 20})

    def forgotten(*args: Any) -> tuple[torch.Tensor, ...]:
        key, value = (tokens.clone() for tokens in update(*args))
        key[:, :, :-20] = value[:, :, :-20] = 0
        return key, value

    monkeypatch.setattr(paged_kv.models.huggingface, "paged_attention", forgetful)
    monkeypatch.setattr(SequenceContext, "update", forgotten)
    with open_llm(zoo.model(name)) as llm:
        tokens = greedy(llm, zoo.prompts()[-2:])
    assert all(a != b for a, b in zip(tokens, served[-2:], strict=True))


# -- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", zoo.each(zoo.REFUSED))
def test_refused(name: str) -> None:
    """For the reason that stands in the table, and the model is as it was."""
    configuration = zoo.CONFIGURATIONS[name]
    model = zoo.build(configuration.class_name, **configuration.settings)
    implementation, settings = model.config._attn_implementation, model.config.to_dict()
    with pytest.raises(PagedKVError, match=re.escape(configuration.outcome.refusal)):
        LLM(model, num_blocks=POOL)
    assert model.config._attn_implementation == implementation
    assert model.config.to_dict() == settings
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


def test_documents_count_right() -> None:
    for page in ("README.md", "docs/limits.md"):
        assert zoo_table.summary() in " ".join((ROOT / page).read_text().split())
