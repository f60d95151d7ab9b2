"""Models that are given what blocks hold: the same tokens as their own `generate`, or a refusal.

Blocks are full of NaN at first, as in test_huggingface.py, and controls break one detail."""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import paged_kv.engine.build
import paged_kv.entrypoints.llm
from paged_kv import LLM, PagedKVError, SamplingParams, SinkWindow, UnsupportedModelError
from paged_kv.cache.formats import FORMATS
from paged_kv.cache.stored_context import StoredContext
from paged_kv.engine.build import find_calibration
from paged_kv.engine.config import EngineConfig
from paged_kv.engine.evaluate import compare_formats
from paged_kv.models.calibration import calibrate
from paged_kv.models.gathered_model import GatheredModel
from paged_kv.models.huggingface import PagedModel
from paged_kv.models.routes import choose_route
from paged_kv.scheduler.request import Request
from tests.support import beam_searches, paged_models, zoo
from tests.support.paged_models import POOL, open_llm

preempted = paged_models.preempted

SMALL_POOL = 20
NEW = SamplingParams(max_tokens=zoo.NUM_NEW_TOKENS)


def tokens_of(
    llm: LLM, prompts: Sequence[list[int]], params: SamplingParams = NEW
) -> list[list[list[int]]]:
    """Tokens of each sample of each prompt, all at once; afterwards every block is free again."""
    outputs = llm.generate(prompts, params, show_progress=False)
    llm.engine.scheduler.check_integrity()
    assert llm.engine.manager.num_free_blocks == llm.engine.manager.num_blocks
    return [[completion.token_ids for completion in output.completions] for output in outputs]


def greedy(llm: LLM, prompts: Sequence[list[int]]) -> list[list[int]]:
    return [tokens for (tokens,) in tokens_of(llm, prompts)]


@pytest.fixture
def gathers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model takes the route of those whose attention cannot read blocks."""
    monkeypatch.setattr(paged_kv.entrypoints.llm, "choose_route", GatheredModel)


# -- the same tokens ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["falcon", "bart", "phimoe-window"])
def test_masks_that_sdpa_leaves_out_are_made(name: str, preempted: list[Request]) -> None:
    """Models of the zoo attend eagerly; as they are built otherwise a causal mask may be none."""
    class_name, settings, *_ = zoo.CONFIGURATIONS[name]
    model = zoo.build(class_name, **settings)
    assert model.config._attn_implementation == "sdpa"
    with open_llm(model, token_budget=40, num_blocks=SMALL_POOL) as llm:
        assert llm.route == "gather"
        tokens = greedy(llm, zoo.prompts())
    assert tokens == zoo.generate_alone(model, zoo.prompts())
    assert preempted


@pytest.mark.usefixtures("gathers")
@pytest.mark.parametrize("name", ["qwen2-window", "gemma2", "deepseek-v3", "gpt-oss"])
def test_models_of_the_other_route_could_take_this_one(name: str) -> None:
    with open_llm(zoo.model(name), token_budget=40, num_blocks=SMALL_POOL) as llm:
        assert greedy(llm, zoo.prompts()) == zoo.expected_tokens(name)


def test_models_whose_attention_reads_blocks_take_the_other_route(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, "paged_kv"), open_llm(zoo.model("llama")) as llm:
        assert llm.route == "fused"
    assert not caplog.records
    with caplog.at_level(logging.WARNING, "paged_kv"):
        open_llm(zoo.model("falcon")).close()
    (record,) = caplog.records
    assert "FalconForCausalLM never calls transformers' attention interface; so" in record.message


def test_swapped_sequences_go_on(monkeypatch: pytest.MonkeyPatch, preempted: list[Request]) -> None:
    monkeypatch.setattr(paged_kv.engine.build, "swap_cost", lambda *_: 0.0)
    with open_llm(zoo.model("falcon"), num_blocks=SMALL_POOL, swap_space="1MiB") as llm:
        copied = []
        copy_swapped = llm.engine.runner.copy_swapped
        llm.engine.runner.copy_swapped = lambda outs, ins: (  # type: ignore[method-assign]
            copied.extend(ins),
            copy_swapped(outs, ins),
        )
        assert greedy(llm, zoo.prompts()) == zoo.expected_tokens("falcon")
    assert preempted
    assert copied


def test_prefixes_are_found() -> None:
    """Also those that end within another's blocks."""
    prompts = zoo.prompts((131, 150))
    prompts = [prompts[1], prompts[1][:97] + prompts[0]]
    model = zoo.model("bloom")
    with open_llm(model, max_model_len=zoo.MAX_MODEL_LEN) as llm:
        first = [greedy(llm, [prompt])[0] for prompt in prompts]
        assert llm.statistics().num_hit_tokens == 96
        again = greedy(llm, prompts)
        assert llm.statistics().num_hit_tokens > 96 + 128
    assert first == again == zoo.generate_alone(model, prompts)


def test_samples_share_a_prompt() -> None:
    """As on the other route, which test_samples.py looks at."""
    params = SamplingParams(max_tokens=12, n=3, temperature=1.0, seed=5)
    found = []
    for route in (PagedModel, GatheredModel):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(paged_kv.entrypoints.llm, "choose_route", route)
            with open_llm(zoo.model("llama")) as llm:
                found.append(tokens_of(llm, zoo.prompts((17, 40)), params))
    assert found[0] == found[1]
    assert len({tuple(sample) for sample in found[0][0]}) == 3


@pytest.mark.parametrize("name", ["falcon-alibi", "gpt-j"])
def test_beams_are_those_of_generate(name: str) -> None:
    model, prompts = zoo.model(name), zoo.prompts((17, 40))
    params = beam_searches.params_of(num_beams=4, num_return=4)
    expected = beam_searches.expected_of(model, prompts, params)
    with open_llm(model, max_model_len=zoo.MAX_MODEL_LEN) as llm:
        found = beam_searches.searched(beam_searches.search_beams(llm.engine, prompts, params))
        beam_searches.assert_nothing_is_held(llm)
    for (tokens, scores), (expected_tokens, expected_scores) in zip(found, expected, strict=True):
        assert tokens == expected_tokens
        assert np.allclose(scores, expected_scores, atol=1e-4)


def test_log_probabilities_of_prompts_are_those_of_the_other_route() -> None:
    """Logits that come in another order than sequences do."""
    params = [
        SamplingParams(max_tokens=2, prompt_logprobs=prompt_logprobs)
        for prompt_logprobs in (2, None, 0)
    ]
    found: list[list[float]] = []
    for route in (PagedModel, GatheredModel):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(paged_kv.entrypoints.llm, "choose_route", route)
            with open_llm(zoo.model("llama")) as llm:
                outputs = llm.generate(zoo.prompts((17, 5, 40)), params)
        told = [entry for output in outputs for entry in output.prompt_logprobs or () if entry]
        found.append([entry.logprob for entry in told])
    assert len(found[0]) == 16 + 39
    assert np.allclose(found[0], found[1], atol=1e-4)


def test_half_precision_may_compute_in_float32() -> None:
    model = copy.deepcopy(zoo.model("falcon")).to(torch.bfloat16)
    expected = zoo.generate_alone(copy.deepcopy(model).float(), zoo.prompts()[:4])
    wide = GatheredModel(model, widens=True)
    assert wide.dtype is torch.bfloat16
    with LLM(model, kv_format="native", kv_dtype=torch.float32) as llm:
        assert greedy(llm, zoo.prompts()[:4]) == expected
    wide.close()
    assert all(weight.dtype is torch.bfloat16 for weight in model.parameters())


@pytest.mark.parametrize("kv_format", ["int8", "int4", "int2", "k4v2", "int2,0=native"])
def test_quantized_blocks_are_read_as_on_the_other_route(kv_format: str) -> None:
    """What formats change in what a model says is the same, but for rounding."""
    model, formats = zoo.model("llama"), ["native", kv_format]
    windows = np.array(zoo.prompts((150, 150)))[:, :120]
    found = []
    for route in (PagedModel, GatheredModel):
        paged = route(model)
        found.append(compare_formats(paged, formats, windows, tokens_per_step=7)[1])
        paged.close()
    assert found[0].divergence > 1e-6
    assert np.allclose(found[0].losses, found[1].losses, atol=2e-2)
    assert np.allclose(found[0].divergence, found[1].divergence, rtol=0.05)


@pytest.mark.parametrize("kv_format", ["int8", "int2", "int2,-1=native"])
def test_quantized_formats_run(kv_format: str) -> None:
    with LLM(zoo.model("falcon"), kv_format=kv_format, num_blocks=POOL) as llm:
        outputs = llm.generate(zoo.prompts(), NEW)
        assert llm.engine.scheduler.statistics().num_steps >= zoo.NUM_NEW_TOKENS
    assert [len(output.token_ids) for output in outputs] == [zoo.NUM_NEW_TOKENS] * 8


# -- controls: what is broken must show -----------------------------------------------------------


@pytest.mark.parametrize("name", ["falcon", "bloom", "gpt-neo", "bart"])
def test_control_one_token_less_is_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    joined = StoredContext.joined

    def forgetful(stored: StoredContext, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        keys, values = joined(stored, *args, **options)
        return keys, values.index_fill(2, torch.tensor([max(keys.shape[2] - 3, 0)]), 0.0)

    with open_llm(zoo.model(name), max_model_len=zoo.MAX_MODEL_LEN) as llm:
        monkeypatch.setattr(StoredContext, "joined", forgetful)
        assert greedy(llm, zoo.prompts()) != zoo.expected_tokens(name)


# -- refusals -------------------------------------------------------------------------------------


def test_a_mask_of_its_own_that_is_not_causal_is_refused() -> None:
    """Others that are refused are in the zoo, where this one attends eagerly."""
    model = zoo.build("DogeForCausalLM")
    implementation = model.config._attn_implementation
    assert implementation == "sdpa"
    with pytest.raises(UnsupportedModelError, match=r"its own attention mask; .* it sees later"):
        open_llm(model)
    assert model.config._attn_implementation == implementation


def test_attention_that_reads_blocks_gathers_nothing() -> None:
    model = zoo.build("LlamaForCausalLM", attn_implementation="paged_kv")
    with pytest.raises(UnsupportedModelError, match="give it another one"):
        GatheredModel(model)


def test_a_model_that_is_in_use_keeps_its_attention() -> None:
    """Whichever route it is on; two owners of a kind share it."""
    model = zoo.model("llama")
    gathered = GatheredModel(model)
    with pytest.raises(UnsupportedModelError, match="in use with attention of its own"):
        PagedModel(model)
    shared = choose_route(model)
    assert shared.route == "gather"
    gathered.close()
    shared.close()
    with closing(PagedModel(model)), pytest.raises(UnsupportedModelError, match="reads blocks"):
        GatheredModel(model)
    assert model.config._attn_implementation == "eager"


def test_windows_and_calibrations_need_attention_of_ours() -> None:
    model = zoo.model("falcon")
    with open_llm(model) as llm, pytest.raises(UnsupportedModelError, match="cannot be windowed"):
        llm.generate([1, 2, 3], SamplingParams(sink_window=SinkWindow(4, 32)))
    with pytest.raises(UnsupportedModelError, match="cannot be windowed"):
        open_llm(model, sink_window=SinkWindow(4, 32))
    gathered = GatheredModel(model)
    with pytest.raises(UnsupportedModelError, match="cannot be calibrated: its attention is its"):
        calibrate(gathered, list(range(1, 200)))
    config = EngineConfig(kv_format="int2")
    tokenizer: Any = object()  # which a usual calibration would be made with
    assert find_calibration(gathered, config, [FORMATS["int2"]], tokenizer) is None
    gathered.close()


def test_a_model_is_its_own_while_it_is_used_and_afterwards() -> None:
    model = zoo.build("FalconForCausalLM")
    model.train()
    ids = torch.tensor([[5, 6, 7, 8]])
    llm = open_llm(model)
    assert not model.training
    assert model(ids).logits.isfinite().all()
    llm.close()
    assert model.training
    with pytest.raises(PagedKVError, match=r"closed"):
        llm.generate([[5, 6, 7, 8]], SamplingParams(max_tokens=4))


def test_a_step_that_fails_has_stored_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The requests go on with the next step."""
    numbers = itertools.count()
    compute: Callable[..., Tensor] = GatheredModel._compute

    def fail(*args: Any) -> Tensor:
        logits = compute(*args)
        if next(numbers) == 30:
            raise RuntimeError("out of memory")
        return logits

    name = "gpt-neo"
    with open_llm(zoo.model(name)) as llm:
        monkeypatch.setattr(GatheredModel, "_compute", fail)
        events = llm.stream(zoo.prompts(), NEW, keep_going=True)
        tokens: dict[int, list[int]] = {}
        failed = set()
        for event in events:
            if event.error is not None:
                failed.add(event.prompt_index)
            elif event.token_id is not None:
                tokens.setdefault(event.prompt_index, []).append(event.token_id)
        assert failed
        assert greedy(llm, zoo.prompts()) == zoo.expected_tokens(name)
    for index, found in tokens.items():
        assert zoo.expected_tokens(name)[index][: len(found)] == found
