"""Hugging Face models on paged blocks: the same tokens as their own `generate`, or a refusal.

Everything runs on tiny random models (see zoo.py). Controls break one detail of the attention at a
time and demand other tokens: they show that the equalities here would notice."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention

import paged_kv.engine.engine
import paged_kv.models.huggingface
from paged_kv import LLM, SamplingParams, SinkWindow
from paged_kv.blocks.geometry import BlockGeometry
from paged_kv.blocks.step_arrays import StepArrays
from paged_kv.blocks.step_plan import StepPlan
from paged_kv.engine.sampler import Draw, Sampling
from paged_kv.errors import ConfigError, PagedKVError, UnsupportedModelError
from paged_kv.models.huggingface import IMPLEMENTATION, PagedModel
from paged_kv.scheduler.request import Request
from tests.support import paged_models, zoo
from tests.support.paged_models import POOL, greedy, open_llm, scarce_blocks

preempted = paged_models.preempted

FORMATS = ("native", "int8", "int4", "int2")

QUANTIZED_FORMATS = FORMATS[1:]


def paged_tokens(name: str, **settings: Any) -> list[list[int]]:
    """What a model of the zoo generates on native paged blocks."""
    with open_llm(zoo.model(name), **settings) as llm:
        return greedy(llm, zoo.prompts())


# -- the same tokens ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma2", "gpt2", "gpt-oss"])
def test_every_step_sees_the_logits_of_a_full_forward_pass(
    name: str, monkeypatch: pytest.MonkeyPatch, preempted: list[Request]
) -> None:
    prompts = zoo.prompts()
    params = [SamplingParams(max_tokens=zoo.NUM_NEW_TOKENS) for _ in prompts]
    seen: list[list[Tensor]] = [[] for _ in prompts]
    prompt_of = {id(p): index for index, p in enumerate(params)}

    def record(logits: Tensor, inputs: Any, draws: Sequence[Draw], *rest: Any) -> Sampling:
        for draw in draws:
            seen[prompt_of[id(draw.params)]].append(logits[draw.row].clone())
        return Sampling(logits, inputs, draws, *rest)

    monkeypatch.setattr(paged_kv.engine.engine, "Sampling", record)
    model = zoo.model(name)
    with open_llm(model, token_budget=40) as llm, scarce_blocks():
        outputs = [output.token_ids for output in llm.generate(prompts, params)]
    assert preempted
    for prompt, output, rows in zip(prompts, outputs, seen, strict=True):
        expected = zoo.logits_alone(model, prompt, output)
        # Both are float32: of GPT-OSS, whose logits reach 6.5, transformers' own are up to 6e-5
        # from those in float64, and ours 7e-5.
        torch.testing.assert_close(torch.stack(rows), expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("num_kv_heads", [pytest.param(4, id="mha"), 2, pytest.param(1, id="mqa")])
@pytest.mark.parametrize("head_dim", [8, 40, 256])
def test_head_dims_and_groups(head_dim: int, num_kv_heads: int) -> None:
    model = zoo.build("LlamaForCausalLM", head_dim=head_dim, num_key_value_heads=num_kv_heads)
    with open_llm(model, token_budget=40) as llm, scarce_blocks():
        tokens = greedy(llm, zoo.prompts())
    assert tokens == zoo.generate_alone(model, zoo.prompts())


@pytest.mark.parametrize("kv_format", QUANTIZED_FORMATS)
@pytest.mark.parametrize("num_kv_heads", [pytest.param(4, id="mha"), 2, pytest.param(1, id="mqa")])
@pytest.mark.parametrize("head_dim", [8, 40, 256])
def test_quantized_formats_run(head_dim: int, num_kv_heads: int, kv_format: str) -> None:
    model = zoo.build("LlamaForCausalLM", head_dim=head_dim, num_key_value_heads=num_kv_heads)
    check_quantized(model, kv_format)


@pytest.mark.parametrize("kv_format", QUANTIZED_FORMATS)
@pytest.mark.parametrize("name", ["gemma2", "gpt2", "deepseek-v3", "llama4", "gpt-oss"])
def test_quantized_formats_run_on_other_architectures(name: str, kv_format: str) -> None:
    check_quantized(zoo.model(name), kv_format)


def check_quantized(model: PreTrainedModel, kv_format: str) -> None:
    """Sealed blocks are in use, no logits are NaN (`generate` would raise), and runs agree."""
    prompts = zoo.prompts((230, 3, 40))
    runs = []
    for _ in range(2):
        with open_llm(model, kv_format=kv_format, token_budget=64) as llm:
            tokens: list[list[int]] = [[] for _ in prompts]
            most_sealed = 0
            for event in llm.stream(prompts, SamplingParams(max_tokens=12)):
                assert event.error is None
                assert event.token_id is not None
                tokens[event.prompt_index].append(event.token_id)
                most_sealed = max(most_sealed, int(llm.engine.manager.num_sealed.sum()))
        assert most_sealed > 0
        runs.append(tokens)
    assert runs[0] == runs[1]
    assert [len(tokens) for tokens in runs[0]] == [12] * len(prompts)
    assert all(0 <= token < zoo.VOCAB_SIZE for tokens in runs[0] for token in tokens)


# -- controls: what is broken must show -----------------------------------------------------------


def alter(monkeypatch: pytest.MonkeyPatch, argument: str, change: Callable[[Any], Any]) -> None:
    """Change one keyword argument of every layer's attention."""
    attention = paged_kv.models.huggingface.paged_attention

    def altered(*args: Any, **kwargs: Any) -> Tensor:
        return attention(*args, **{**kwargs, argument: change(kwargs[argument])})

    monkeypatch.setattr(paged_kv.models.huggingface, "paged_attention", altered)


def add(number: int) -> Callable[[int | None], int | None]:
    return lambda value: None if value is None else value + number


@pytest.mark.parametrize("name", ["mistral-window", "gemma2", "llama4", "gpt-oss"])
def test_control_unaltered_attention(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The controls below differ for their alteration, not for having been wrapped."""
    alter(monkeypatch, "sliding_window", lambda value: value)
    assert paged_tokens(name) == zoo.expected_tokens(name)


def dropped(value: Any) -> None:
    assert value is not None


CONTROLS = {
    **{
        f"{name}-window-{number:+}": (name, "sliding_window", add(number))
        for name in ("mistral-window", "gemma2", "gemma3", "gemma4", "gpt-oss",
                     "deepseek-v4-windows")
        for number in (1, -1)
    },
    "llama4-chunk+1": ("llama4", "attention_chunk", add(1)),
    "llama4-chunk-1": ("llama4", "attention_chunk", add(-1)),
    "gemma2-softcap": ("gemma2", "softcap", dropped),
    "vaultgemma-softcap": ("vaultgemma", "softcap", dropped),
    "gemma2-scale": ("gemma2", "scale", dropped),
    "gpt2-layer-scale": ("gpt2-layer-scale", "scale", dropped),
    "granite-scale": ("granite", "scale", dropped),
    "gpt-oss-sinks": ("gpt-oss", "sink_logits", dropped),
    "granite-swa-sinks": ("granite-swa", "sink_logits", dropped),
    "deepseek-v4-sinks": ("deepseek-v4-windows", "sink_logits", dropped),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "argument", "change"),
    [pytest.param(*each, id=id, marks=zoo.group(each[0])) for id, each in CONTROLS.items()],
)
def test_control_altered_attention(
    name: str, argument: str, change: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    alter(monkeypatch, argument, change)
    if change(1) == 2:  # more than the layer keeps
        with pytest.raises(ConfigError, match=f"{argument} must be at most"):
            paged_tokens(name)
        return
    assert paged_tokens(name) != zoo.expected_tokens(name)


@pytest.mark.parametrize("offset", [1, -1])
@pytest.mark.parametrize("name", zoo.each(["llama", "gemma3", "deepseek-v3", "bert-decoder"]))
def test_control_causal_offset(name: str, offset: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens of a prompt that see their successor, or not themselves, lead to others."""
    attention = paged_kv.models.huggingface.paged_attention

    def shifted(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if len(key) > 1:
            key, value = key.roll(offset, 0), value.roll(offset, 0)
        return attention(query, key, value, *args, **kwargs)

    monkeypatch.setattr(paged_kv.models.huggingface, "paged_attention", shifted)
    with open_llm(zoo.model(name)) as llm:
        tokens = greedy(llm, zoo.prompts()[-2:-1], zoo.NUM_NEW_TOKENS)
    assert tokens != zoo.expected_tokens(name)[-2:-1]


@pytest.mark.parametrize("name", zoo.each(["llama", "gpt2", "deepseek-v3", "bert-decoder"]))
def test_control_newest_stored_token_hidden(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from_plan = StepArrays.from_plan

    def from_plan_less(geometry: BlockGeometry, plan: StepPlan, *args: Any) -> StepArrays:
        arrays = from_plan(geometry, plan, *args)
        arrays.context_lens[arrays.context_lens > 1] -= 1
        return arrays

    monkeypatch.setattr(StepArrays, "from_plan", from_plan_less)
    with open_llm(zoo.model(name)) as llm:
        tokens = greedy(llm, zoo.prompts()[-2:-1], zoo.NUM_NEW_TOKENS)
    assert tokens != zoo.expected_tokens(name)[-2:-1]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_control_shared_block(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sequence that reads another's first block gets other tokens, and it alone."""
    victim, lender = 6, 7  # seq_ids are given out in the order of the prompts
    from_plan = StepArrays.from_plan

    def from_plan_shared(geometry: BlockGeometry, plan: StepPlan, *args: Any) -> StepArrays:
        arrays = from_plan(geometry, plan, *args)
        rows = {int(seq_id): row for row, seq_id in enumerate(plan.seq_ids)}
        if arrays.context_lens.any() and {victim, lender} <= rows.keys():
            arrays.block_table[rows[victim], 0] = arrays.block_table[rows[lender], 0]
        return arrays

    monkeypatch.setattr(StepArrays, "from_plan", from_plan_shared)
    tokens, expected = paged_tokens(name), zoo.expected_tokens(name)
    differ = [index for index in range(len(tokens)) if tokens[index] != expected[index]]
    assert differ == [victim]
    assert tokens[victim][0] == expected[victim][0]  # prefill in one go reads no block


# -- refusals -------------------------------------------------------------------------------------


def assert_refused(
    model: PreTrainedModel, match: str, attach: Callable[..., Any] = PagedModel
) -> None:
    implementation = model.config._attn_implementation
    with pytest.raises(UnsupportedModelError, match=match):
        attach(model)
    assert model.config._attn_implementation == implementation != IMPLEMENTATION


@pytest.mark.parametrize("name", ["mamba", "t5"])
def test_refused_before_a_missing_length_limit_is_reported(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody should be asked for `max_model_len` of a model that is then refused."""
    monkeypatch.delitem(zoo.SIZES, "max_position_embeddings")
    configuration = zoo.CONFIGURATIONS[name]
    model = zoo.build(configuration.class_name, **configuration.settings)
    assert_refused(model, re.escape(configuration.outcome.refusal), LLM)


def test_a_model_is_served_as_far_as_its_angles_do_not_depend_on_the_batch() -> None:
    """And beyond it refused, with the reason; windows go beyond it."""
    model = zoo.model("phi3-rope-longrope")
    with LLM(model, num_blocks=POOL) as llm:
        assert llm.max_model_len == 256
    expected = (
        r"from 1 to 256, got 257: beyond that Phi3ForCausalLM uses longrope RoPE, whose angles"
    )
    with pytest.raises(ConfigError, match=expected):
        LLM(model, num_blocks=POOL, max_model_len=257)
    for name, length in (("phi3-rope-longrope", 256), ("llama-rope-dynamic", zoo.MAX_MODEL_LEN)):
        with open_llm(zoo.model(name)) as llm:
            assert llm.max_model_len == length
            window = SamplingParams(sink_window=SinkWindow(4, 32))
            with pytest.raises(UnsupportedModelError, match=f"beyond {length} tokens, where a win"):
                llm.generate([1, 2, 3], window)


def test_queries_that_count_places_in_the_batch_limit_steps_too() -> None:
    settings = {**zoo.CHUNKED, "attn_temperature_tuning": True, "floor_scale": 65}
    model = zoo.build("Llama4ForCausalLM", **settings)
    with pytest.raises(ConfigError, match=r"token_budget must be at most 64, got 65: .*place in"):
        LLM(model, num_blocks=POOL, token_budget=65)
    with LLM(model, num_blocks=POOL, token_budget=64) as llm:
        assert llm.max_model_len == 64


def test_no_refusal_tells_of_our_own_code() -> None:
    """What fails inside a model is the cause of an error, not its text."""
    model = zoo.build("LlamaForCausalLM")
    with (
        patch.object(type(model.model), "forward", side_effect=TypeError("'NoneType' object")),
        pytest.raises(UnsupportedModelError, match="cannot compute tokens of several") as caught,
    ):
        LLM(model, num_blocks=POOL)
    assert "NoneType" not in str(caught.value)
    assert "NoneType" in str(caught.value.__cause__)


@pytest.mark.parametrize("argument", ["position_bias", "indices", "block_indices", "sinks"])
def test_refused_for_unknown_arguments(argument: str) -> None:
    class Attention(LlamaAttention):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs, **{argument: torch.zeros(1)})

    model = zoo.build("LlamaForCausalLM")
    model.model.layers[1].self_attn.__class__ = Attention
    assert_refused(model, rf"Attention passes arguments .*do.* not know: {argument}")


def test_unknown_arguments_that_are_none_are_harmless() -> None:
    class Attention(LlamaAttention):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs, position_bias=None)

    model = zoo.build("LlamaForCausalLM")
    model.model.layers[1].self_attn.__class__ = Attention
    with open_llm(model) as llm:
        tokens = greedy(llm, zoo.prompts((30,)), 4)
    assert tokens == zoo.generate_alone(model, zoo.prompts((30,)), 4)


def test_refused_when_a_layer_skips_attention() -> None:
    class Attention(LlamaAttention):
        def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Any:
            return hidden_states, None

    model = zoo.build("LlamaForCausalLM")
    model.model.layers[1].self_attn.__class__ = Attention
    assert_refused(model, r"in 2 of its 3 layers")


def test_refused_when_a_window_is_not_passed_on() -> None:
    model = zoo.build("LlamaForCausalLM")
    model.config.layer_types = ["sliding_attention"] * 3
    assert_refused(model, r"has a sliding window but does not pass it on")


# -- attached and given back ----------------------------------------------------------------------

TOKEN_IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_model_is_its_own_again_after_close(implementation: str) -> None:
    model = zoo.build("LlamaForCausalLM", attn_implementation=implementation)
    before = model(TOKEN_IDS).logits
    llm = open_llm(model)
    assert model.config._attn_implementation == IMPLEMENTATION
    with pytest.raises(PagedKVError, match=r"attached to a paged_kv LLM; close\(\)"):
        model(TOKEN_IDS)
    with pytest.raises(PagedKVError, match=r"close\(\)"):
        model.generate(TOKEN_IDS, max_new_tokens=2)
    llm.close()
    llm.close()  # harmless
    assert model.config._attn_implementation == implementation
    assert torch.equal(model(TOKEN_IDS).logits, before)


def test_model_is_given_back_when_a_block_is_left_by_an_exception() -> None:
    model = zoo.build("LlamaForCausalLM")
    implementation = model.config._attn_implementation
    with pytest.raises(KeyError), open_llm(model):
        raise KeyError
    assert model.config._attn_implementation == implementation


def test_model_is_given_back_when_a_setting_is_refused() -> None:
    model = zoo.build("LlamaForCausalLM")
    implementation = model.config._attn_implementation
    for settings in ({"token_budget": 0}, {"num_blocks": 0}, {"max_num_seqs": 0}):
        with pytest.raises(PagedKVError):
            open_llm(model, **settings)
        assert model.config._attn_implementation == implementation
    assert model(TOKEN_IDS).logits.isfinite().all()


@pytest.mark.parametrize("first", [0, 1])
def test_two_llms_share_a_model(first: int) -> None:
    model, prompts, expected = zoo.model("llama"), zoo.prompts(), zoo.expected_tokens("llama")
    llms = [open_llm(model), open_llm(model, token_budget=40)]
    assert [greedy(llm, prompts) for llm in llms] == [expected] * 2
    llms[first].close()
    llms[first].close()  # a second close gives nothing more back
    with pytest.raises(PagedKVError, match=r"close\(\)"):
        model(TOKEN_IDS)
    assert greedy(llms[1 - first], prompts) == expected
    llms[1 - first].close()
    assert model.config._attn_implementation == "eager"
    assert zoo.generate_alone(model, prompts[:2]) == expected[:2]


def test_a_refused_second_llm_leaves_the_first_working() -> None:
    model, expected = zoo.model("llama"), zoo.expected_tokens("llama")
    with open_llm(model) as llm:
        with pytest.raises(PagedKVError):
            open_llm(model, token_budget=0)
        assert greedy(llm, zoo.prompts()) == expected
    assert model.config._attn_implementation == "eager"


def test_a_closed_llm_generates_nothing() -> None:
    """The model's own attention would read a paged batch as one sequence."""
    model = zoo.build("LlamaForCausalLM")
    llm = open_llm(model)
    llm.close()
    with pytest.raises(PagedKVError, match="clos"):
        llm.generate([[5, 6, 7, 8]], SamplingParams(max_tokens=4))


def test_layers_are_probed() -> None:
    """Key and value widths may differ, within a layer (DeepSeek) as between layers (Gemma 4)."""
    paged = PagedModel(zoo.model("deepseek-v3"))
    shapes = list(paged.layer_shapes.values())
    paged.close()
    assert shapes == [(4, 24, 16)] * 3
    model = zoo.build(
        "Gemma4ForCausalLM",
        **zoo.ALTERNATING,
        head_dim=16,
        global_head_dim=32,
        vocab_size_per_layer_input=zoo.VOCAB_SIZE,
        hidden_size_per_layer_input=16,
        num_kv_shared_layers=0,
    )
    paged = PagedModel(model)
    shapes = list(paged.layer_shapes.values())
    paged.close()
    assert [key for _, key, _ in shapes] == [16, 32, 16, 32]
    assert all(a != b for a, b in pairwise(shapes))


def test_positions_reach_the_model_per_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step's positions restart at each sequence's own count."""
    seen: list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]] = []
    call = PagedModel._call

    def record(paged: PagedModel, token_ids: Tensor, positions: Tensor, *rest: Any) -> Tensor:
        seen.append((token_ids.numpy().copy(), positions.numpy().copy()))
        return call(paged, token_ids, positions, *rest)

    monkeypatch.setattr(PagedModel, "_call", record)
    prompts = zoo.prompts((3, 5))
    with open_llm(zoo.model("gpt2")) as llm:
        seen.clear()  # the probe
        first, second = greedy(llm, prompts, 3)
    steps = [(tokens.tolist(), positions.tolist()) for tokens, positions in seen]
    assert steps == [
        (prompts[0] + prompts[1], [0, 1, 2, 0, 1, 2, 3, 4]),
        ([first[0], second[0]], [3, 5]),
        ([first[1], second[1]], [4, 6]),
    ]
