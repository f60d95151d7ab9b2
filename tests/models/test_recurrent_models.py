"""Models with recurrent layers: states beside blocks, and the tokens of their own `generate`."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from paged_kv import (
    BeamSearchParams,
    ConfigError,
    InvalidStepError,
    SamplingParams,
    UnsupportedModelError,
)
from paged_kv.models.gathered_model import GatheredModel
from paged_kv.models.recurrent_states import RecurrentState, RecurrentStates
from paged_kv.scheduler.request import Request
from tests.support import paged_models, zoo
from tests.support.paged_models import open_llm

preempted = paged_models.preempted

QWEN = {
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    **zoo.EXPERTS,
}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-next": ("Qwen3NextForCausalLM", QWEN),
    "lfm2": ("Lfm2ForCausalLM", {"layer_types": ["conv", "full_attention", "conv"]}),
    # Goes on from a state one token at a time.
    "jamba": (
        "JambaForCausalLM",
        {"num_hidden_layers": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2},
    ),
    "granite-hybrid": (
        "GraniteMoeHybridForCausalLM",
        {
            "num_hidden_layers": 2,
            "layer_types": ["mamba", "attention"],
            "mamba_n_heads": 8,
            "mamba_d_head": 16,
            "mamba_chunk_size": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 32,
        },
    ),
}
LENGTHS = (1, 3, 9, 17, 24, 33, 47, 52)
NEW = SamplingParams(max_tokens=12)
SMALL_POOL = 10  # blocks; the prompts alone need 17


@cache
def model_of(name: str) -> PreTrainedModel:
    class_name, settings = ARCHITECTURES[name]
    return zoo.build(class_name, **settings)


@cache
def expected_of(name: str) -> list[list[int]]:
    return zoo.generate_alone(model_of(name), zoo.prompts(LENGTHS), NEW.max_tokens or 0)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tokens_equal_those_of_the_model_alone(name: str, preempted: list[Request]) -> None:
    with open_llm(model_of(name), token_budget=20, num_blocks=SMALL_POOL) as llm:
        assert llm.route == "gather"
        outputs = llm.generate(zoo.prompts(LENGTHS), NEW)
        llm.engine.scheduler.check_integrity()
        assert llm.engine.manager.num_free_blocks == SMALL_POOL
        assert llm.memory_stats().recurrent_states > 0
    assert preempted
    assert [output.token_ids for output in outputs] == expected_of(name)
    assert len({token for tokens in expected_of(name) for token in tokens}) >= 30


def test_a_prefix_is_computed_again() -> None:
    """Its blocks would be found, its state would not."""
    prompt = zoo.prompts(LENGTHS)[-1]
    with open_llm(model_of("lfm2"), prefix_caching=True) as llm:
        for _ in range(2):
            (output,) = llm.generate(prompt, NEW)
            assert output.token_ids == expected_of("lfm2")[-1]
        assert llm.statistics().num_hit_tokens == 0


def test_samples_compute_their_prompt_each() -> None:
    prompts = zoo.prompts(LENGTHS)[2:5]
    params = SamplingParams(max_tokens=12, n=3, temperature=1.0, seed=3)
    with open_llm(model_of("lfm2"), max_num_seqs=4) as llm:
        together = llm.generate(prompts, params)
        alone = [llm.generate([prompt], params)[0] for prompt in prompts]
        llm.engine.scheduler.check_integrity()
    for one, other in zip(together, alone, strict=True):
        samples = [completion.token_ids for completion in one.completions]
        assert samples == [completion.token_ids for completion in other.completions]
        assert len({tuple(sample) for sample in samples}) == 3


def test_a_step_that_failed_is_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the states before it, whichever sequence it failed at."""
    number = 0
    advance = RecurrentStates.keep

    def fail(states: RecurrentStates, *args: Any) -> None:
        nonlocal number
        number += 1
        advance(states, *args)
        if number in (9, 21, 30):
            raise KeyboardInterrupt

    name, prompts = "lfm2", zoo.prompts(LENGTHS)
    with open_llm(model_of(name), token_budget=20) as llm:
        lives = [
            llm.engine.add_request(str(index), prompt, NEW)[0]
            for index, prompt in enumerate(prompts)
        ]
        monkeypatch.setattr(RecurrentStates, "keep", fail)
        num_interrupts = 0
        while llm.engine.has_unfinished:
            try:
                llm.engine.step()
            except KeyboardInterrupt:
                num_interrupts += 1
        assert num_interrupts == 3
    assert [list(live.token_ids) for live in lives] == expected_of(name)


def test_quantized_formats_run() -> None:
    with open_llm(model_of("lfm2"), kv_format="int8") as llm:
        outputs = llm.generate(zoo.prompts((120, 17)), NEW)
    assert [len(output.token_ids) for output in outputs] == [12, 12]


def test_a_state_of_other_tokens_is_never_taken() -> None:
    states = RecurrentStates()
    before, after = RecurrentState(4, {}), RecurrentState(7, {})
    states.keep(3, before, after)
    assert states.of(3, 4) is before
    assert states.of(3, 7) is after
    assert states.of(3, 0).num_tokens == 0
    for seq_id, num_tokens in ((3, 5), (2, 7)):
        with pytest.raises(InvalidStepError, match=rf"sequence {seq_id} after {num_tokens} tok"):
            states.of(seq_id, num_tokens)


def test_what_would_need_states_elsewhere_is_refused() -> None:
    model = model_of("lfm2")
    with pytest.raises(ConfigError, match="swap_space must be 0: states of recurrent layers"):
        open_llm(model, swap_space="1MiB")
    with open_llm(model) as llm, pytest.raises(UnsupportedModelError, match="beams fork, and"):
        llm.beam_search([1, 2, 3], BeamSearchParams(num_beams=2))


def test_layers_that_go_on_for_one_token_only_are_found() -> None:
    singly = {}
    for name in ("jamba", "lfm2"):
        paged = GatheredModel(model_of(name))
        singly[name] = paged._continues_singly
        paged.close()
    assert singly == {"jamba": True, "lfm2": False}


def test_states_stay_as_they_were_before_a_step() -> None:
    """Layers write to theirs in place."""
    model = model_of("lfm2")
    with open_llm(model) as llm:
        llm.generate([1, 2, 3, 4, 5], SamplingParams(max_tokens=3))
        (states,) = llm._model._states.values()  # type: ignore[attr-defined]
        ((before, after),) = states._kept.values()
    assert (before.num_tokens, after.num_tokens) == (6, 7)
    for number, attributes in before.attributes.items():
        for mine, other in zip(
            attributes["conv_states"].values(),
            after.attributes[number]["conv_states"].values(),
            strict=True,
        ):
            assert mine is not other
            assert not torch.equal(mine, other)
