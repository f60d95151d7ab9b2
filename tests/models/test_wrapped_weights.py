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
from paged_kv.models.wrapped_weights import has_known_codes
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


class Int8Tensor(ScaledCodes):
    """As torchao's: what else it may have changes what is computed."""

    zero_point: Tensor | None = None
    act_quant_kwargs: object = None
    act_quant_scale: Tensor | None = None
    act_pre_scale: Tensor | None = None

    @property
    def qdata(self) -> Tensor:
        return self.codes


def quantized(model: nn.Module, kind: type[ScaledCodes] = ScaledCodes) -> nn.Module:
    """A copy whose layers, but for the last, have codes."""
    model = copy.deepcopy(model)
    for module in model.model.modules():
        if type(module) is nn.Linear:
            weight = module.weight.detach()
            scale = weight.float().abs().amax(1, keepdim=True) / 127
            codes = (weight / scale).round().to(torch.int8)
            module.weight = nn.Parameter(kind(codes, scale), requires_grad=False)
    return model


def with_its_numbers(model: nn.Module) -> nn.Module:
    """The model that the codes of a quantized one stand for."""
    expected = copy.deepcopy(zoo.model("llama"))
    for name, module in expected.model.named_modules():
        if type(module) is nn.Linear:
            weight = model.model.get_submodule(name).weight
            module.weight = nn.Parameter(weight.codes * weight.scale, requires_grad=False)
    return expected


def tokens_of(model: nn.Module) -> list[list[int]]:
    prompts, params = [[3, 5, 7, 11], list(range(40))], SamplingParams(max_tokens=12)
    with LLM(model, kv_format="native") as llm:
        return [output.token_ids for output in llm.generate(prompts, params)]


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


@pytest.mark.parametrize("kind", [ScaledCodes, Int8Tensor])
def test_a_model_with_wrapped_weights_generates_what_its_numbers_generate(kind):
    model = quantized(zoo.model("llama"), kind)
    assert tokens_of(model) == tokens_of(with_its_numbers(model))


def test_codes_of_eight_bits_are_multiplied_here():
    pytest.importorskip("numba")
    model = quantized(zoo.model("llama"), Int8Tensor)
    paged = PagedModel(model)
    kinds = [type(module.__dict__.get("forward")).__name__ for module in model.modules()]
    assert kinds.count("WholeLayer") == len(model.model.layers)
    assert kinds.count("FastLinear") == 7 * len(model.model.layers) + 1
    paged.close()


@pytest.mark.parametrize(
    "changes",
    [
        {"act_quant_kwargs": object()},
        {"act_quant_scale": torch.ones(1)},
        {"act_pre_scale": torch.ones(1)},
        {"zero_point": torch.ones(1, dtype=torch.int8)},
        {"scale": torch.ones(1, 1)},
        {"scale": torch.ones(1, 64)},
        {"scale": torch.ones(64, 1, dtype=torch.bfloat16)},
        {"codes": torch.ones(64, 64, dtype=torch.uint8)},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_codes_that_mean_more_are_not_known(changes):
    weight = Int8Tensor(torch.ones(64, 64, dtype=torch.int8), torch.ones(64, 1))
    assert has_known_codes(weight)
    for name, value in changes.items():
        setattr(weight, name, value)
    assert not has_known_codes(weight)


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
