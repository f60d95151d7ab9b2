"""Decoder layers in one launch: when they are, and that nothing is passed over by it."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("numba")

from paged_kv import LLM, SamplingParams, SinkWindow
from paged_kv.kernels.cpu.backend import CpuBackend
from paged_kv.models import whole_layers
from tests.support import zoo

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


@pytest.fixture
def num_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each call of a whole layer had."""
    calls: list[int] = []
    run_layer = CpuBackend.run_layer

    def counted(
        self: Any, decoder: Any, rules: Any, hidden: Any, *rest: Any, **options: Any
    ) -> Any:
        calls.append(len(hidden))
        return run_layer(self, decoder, rules, hidden, *rest, **options)

    monkeypatch.setattr(CpuBackend, "run_layer", counted)
    return calls


def tokens_of(model: Any, params: SamplingParams = GREEDY, **options: Any) -> list[list[int]]:
    options = {"kv_format": "native", "kv_memory": "8MiB", "max_model_len": 512, **options}
    with LLM(model, **options) as llm:
        outputs = llm.generate(zoo.prompts(), params, show_progress=False)
    return [output.token_ids for output in outputs]


def by_parts(run: Callable[[], list[list[int]]]) -> list[list[int]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(whole_layers, "MAX_ROWS", 0)
        return run()


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral-window"])
@pytest.mark.parametrize("kv_format", ["native", "int8", "int4"])
def test_tokens_are_those_of_the_parts(name, kv_format, num_calls):
    model = zoo.model(name)
    tokens = tokens_of(model, kv_format=kv_format)
    assert num_calls.count(len(zoo.prompts())) == 3 * 11  # not the step that reads the prompts
    assert tokens == by_parts(lambda: tokens_of(model, kv_format=kv_format))


def test_windows_whose_queries_are_turned_once_more_are_for_the_parts(num_calls):
    tokens_of(zoo.model("llama"), SamplingParams(max_tokens=40, sink_window=SinkWindow(16, 32)))
    assert not num_calls


@pytest.mark.parametrize(
    "name", ["self_attn", "self_attn.q_proj", "mlp", "mlp.act_fn", "input_layernorm"]
)
def test_a_part_that_somebody_listens_to_is_called(name):
    model = copy.deepcopy(zoo.model("llama"))
    expected = tokens_of(model)
    heard: list[nn.Module] = []
    module = model.get_submodule(f"model.layers.1.{name}")
    handle = module.register_forward_hook(lambda module, *_: heard.append(module))
    assert tokens_of(model) == expected
    assert len(heard) >= 12
    handle.remove()


def test_a_layer_that_somebody_listens_to_is_whole_and_heard(num_calls):
    model = copy.deepcopy(zoo.model("llama"))
    expected = tokens_of(model)
    num_calls.clear()
    heard: list[nn.Module] = []
    model.model.layers[1].register_forward_hook(lambda module, *_: heard.append(module))
    assert tokens_of(model) == expected
    assert len(heard) >= 12
    assert len(num_calls) == 3 * 11


def test_a_part_that_is_wrapped_while_it_runs_is_the_one_that_computes(num_calls):
    model = copy.deepcopy(zoo.model("llama"))
    with LLM(model, kv_format="native", kv_memory="8MiB", max_model_len=512) as llm:
        llm.generate(zoo.prompts(), GREEDY, show_progress=False)
        gate = model.model.layers[0].mlp.gate_proj
        own, calls = gate.forward, []
        gate.forward = lambda x: calls.append(1) or own(x)
        num_calls.clear()
        llm.generate(zoo.prompts(), GREEDY, show_progress=False)
        assert len(calls) == 12
        assert len(num_calls) == 2 * 11  # the other two layers
        gate.forward = own


def test_weights_are_read_where_they_are():
    model = copy.deepcopy(zoo.model("qwen3"))
    with LLM(
        model, kv_format="native", kv_memory="8MiB", max_model_len=512, prefix_caching=False
    ) as llm:
        llm.generate(zoo.prompts(), GREEDY, show_progress=False)
        layer = model.model.layers[1]
        with torch.no_grad():
            layer.mlp.up_proj.weight.mul_(-2)
            layer.self_attn.q_norm.weight = nn.Parameter(layer.self_attn.q_norm.weight * 3)
            layer.input_layernorm.weight.data = layer.input_layernorm.weight.data * 2
        outputs = llm.generate(zoo.prompts(), GREEDY, show_progress=False)
    assert [output.token_ids for output in outputs] == by_parts(lambda: tokens_of(model))


def test_two_threads_may_run_one_model_at_once():
    model = zoo.model("llama")
    expected = tokens_of(model)
    params = SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True)
    alone = tokens_of(model, params)
    found: dict[int, list[list[list[int]]]] = {0: [], 1: []}

    def run(place: int) -> None:
        for _ in range(3):
            found[place].append(tokens_of(model, params))

    threads = [threading.Thread(target=run, args=(place,)) for place in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {0: [alone] * 3, 1: [alone] * 3}
    assert [tokens[:12] for tokens in alone] == expected
