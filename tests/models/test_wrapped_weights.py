"""Models whose weights are tensors of other classes, as quantizing libraries make them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from paged_kv import LLM, SamplingParams
from paged_kv.models import widening
from paged_kv.models.huggingface import PagedModel
from tests.support import zoo


class ScaledCodes(Tensor):
    """A weight of 8 bits: it has no memory of its own, and serves linear layers alone."""

    codes: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> ScaledCodes:
        made = Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)
        made.codes, made.scale = codes, scale
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        if function is linear:
            rows, weight, *bias = args
            return linear(rows, weight.codes * weight.scale, *bias, **(kwargs or {}))
        return super().__torch_function__(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale)
        raise NotImplementedError(function)


def quantized(model: nn.Module) -> nn.Module:
    """A copy whose layers, but for the last, have codes."""
    model = copy.deepcopy(model)
    for module in model.model.modules():
        if type(module) is nn.Linear:
            weight = module.weight.detach()
            scale = weight.abs().amax(1, keepdim=True) / 127
            codes = (weight / scale).round().to(torch.int8)
            module.weight = nn.Parameter(ScaledCodes(codes, scale), requires_grad=False)
    return model


@pytest.fixture
def model() -> nn.Module:
    return quantized(zoo.model("llama"))


def test_linear_layers_with_wrapped_weights_stay_their_own(model):
    paged = PagedModel(model)
    wrapped = [m for m in model.model.modules() if type(m) is nn.Linear]
    assert wrapped
    assert not any("forward" in module.__dict__ for module in wrapped)
    assert "forward" in model.lm_head.__dict__
    paged.close()


def test_a_model_with_wrapped_weights_generates_what_its_numbers_generate(model):
    expected = copy.deepcopy(zoo.model("llama"))
    for name, module in expected.model.named_modules():
        if type(module) is nn.Linear:
            weight = model.model.get_submodule(name).weight
            module.weight = nn.Parameter(weight.codes * weight.scale, requires_grad=False)
    prompts, params = [[3, 5, 7, 11], list(range(40))], SamplingParams(max_tokens=12)
    tokens = []
    for each in (model, expected):
        with LLM(each, kv_format="native") as llm:
            tokens.append([out.token_ids for out in llm.generate(prompts, params)])
    assert tokens[0] == tokens[1]


def test_a_fingerprint_looks_into_wrapped_weights(model):
    """Or blocks and calibrations of one would be taken for another's."""
    before = PagedModel(model).fingerprint()
    weight = model.model.layers[0].self_attn.q_proj.weight
    weight.codes[0, 0] += 1
    weight.scale[0] *= 2
    assert PagedModel(model).fingerprint() != before


def test_a_model_with_wrapped_weights_is_not_widened(monkeypatch):
    monkeypatch.setattr(widening, "has_bfloat16_unit", lambda: False)
    plain = copy.deepcopy(zoo.model("llama")).to(torch.bfloat16)
    assert widening.computes_wide(plain, None)
    assert not widening.computes_wide(quantized(plain), None)
