"""Modules that compute faster: which, the same as before, and never one that means something else.

What whole models generate with them is for test_huggingface.py: the same tokens as `generate`."""

from __future__ import annotations

import copy
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaMLP

pytest.importorskip("numba")

from paged_kv.models import fusing
from paged_kv.models.active_step import running
from paged_kv.models.fused_modules import FastLinear
from paged_kv.models.huggingface import PagedModel
from tests.support import zoo

# Of three layers, or four: attention, gated MLPs, norms, whole layers.
WHOLE = {
    "llama": (3, 3, 7, 3),
    "llama-rope-yarn": (3, 3, 7, 3),
    "qwen2": (3, 3, 7, 3),
    "qwen2-window": (3, 3, 7, 3),
    "qwen3": (3, 3, 13, 3),
    "mistral-window": (3, 3, 7, 3),
    "gemma2": (4, 4, 17, 0),
    "gemma3": (4, 4, 25, 0),
    "mixtral": (3, 0, 7, 3),
}
PARTS = ("TurnedAttention", "GatedLinear", "FastNorm", "WholeLayer")


def replaced(model: nn.Module) -> dict[str, int]:
    kinds = [type(module.__dict__.get("forward")).__name__ for module in model.modules()]
    return {kind: kinds.count(kind) for kind in PARTS}


@pytest.mark.parametrize("name", WHOLE)
def test_what_is_known_is_replaced_and_given_back(name):
    model = zoo.model(name)
    paged = PagedModel(model)
    assert replaced(model) == dict(zip(PARTS, WHOLE[name], strict=True))
    linears = [module for module in model.modules() if type(module) is nn.Linear]
    assert all(isinstance(module.forward, FastLinear) for module in linears)
    paged.close()
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("name", ["gpt-oss", "cohere2", "llama4", "stablelm", "olmo2", "phi3"])
def test_attention_that_means_more_stays_as_it_is(name):
    """Sinks, turns of neighbours, attention in chunks, parts turned, norms over all heads."""
    model = zoo.model(name)
    paged = PagedModel(model)
    assert replaced(model)["TurnedAttention"] == 0
    paged.close()


def test_several_owners_of_a_model_replace_once_and_the_last_gives_back():
    model = zoo.model("llama")
    first, second = PagedModel(model), PagedModel(model)
    before = model.model.layers[0].mlp.forward
    second.close()
    assert model.model.layers[0].mlp.forward is before
    first.close()
    assert isinstance(model.model.layers[0].mlp.forward, types.MethodType)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [1, 33])
def test_whole_layers_compute_the_same(dtype, num_tokens):
    """Beside the same model in float64, and no farther from it than it was before."""
    model = copy.deepcopy(zoo.model("qwen3")).to(dtype)
    exact_model = copy.deepcopy(model).double()
    hidden = torch.randn(1, num_tokens, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    before = dense_parts(model, hidden)
    paged = PagedModel(model)
    after = dense_parts(model, hidden)
    paged.close()
    for given, old, exact in zip(
        after, before, dense_parts(exact_model, hidden.double()), strict=True
    ):
        error, usual = (float((x.double() - exact).norm() / exact.norm()) for x in (given, old))
        assert error < max(2 * usual, 1e-6)


@torch.inference_mode()
def dense_parts(model: Any, hidden: Tensor) -> list[Tensor]:
    layer = model.model.layers[0]
    return [layer.mlp(hidden), layer.input_layernorm(hidden), layer.self_attn.k_proj(hidden)]


def test_weights_are_read_where_they_are():
    """No copy is kept: what is written to a weight is what the next step computes with."""
    model = copy.deepcopy(zoo.model("llama"))
    paged = PagedModel(model)
    hidden = torch.ones(1, 2, 64)
    with torch.inference_mode():
        model.model.layers[0].mlp.down_proj.weight.zero_()
        assert not model.model.layers[0].mlp(hidden).any()
    paged.close()


def test_weights_that_cannot_be_served_any_more_are_the_modules_own_business():
    model = copy.deepcopy(zoo.model("llama"))
    paged = PagedModel(model)
    layer, hidden = model.model.layers[0], torch.randn(1, 2, 64)
    with torch.inference_mode():
        expected = layer.mlp(hidden)
        for linear in (layer.mlp.up_proj, layer.mlp.down_proj, layer.self_attn.k_proj):
            linear.weight.data = linear.weight.data.t().contiguous().t()
        torch.testing.assert_close(layer.mlp(hidden), expected, rtol=1e-4, atol=1e-4)
        with running(fusing.Rehearsal()):
            paged._rehearse()
        layer.mlp.up_proj.weight.data = layer.mlp.up_proj.weight.data.double()
        with pytest.raises(RuntimeError, match="dtype"):
            layer.mlp(hidden)
    paged.close()


def test_another_activation_is_the_one_that_computes():
    model = copy.deepcopy(zoo.model("llama"))
    paged = PagedModel(model)
    mlp, hidden = model.model.layers[0].mlp, torch.randn(1, 2, 64)
    mlp.act_fn = nn.Tanh()
    with torch.inference_mode():
        expected = mlp.down_proj(torch.tanh(mlp.gate_proj(hidden)) * mlp.up_proj(hidden))
        torch.testing.assert_close(mlp(hidden), expected, rtol=1e-4, atol=1e-4)
    paged.close()


def test_rows_of_other_channels_are_refused():
    model = zoo.model("llama")
    paged = PagedModel(model)
    with torch.inference_mode(), pytest.raises(ValueError, match="rows of 32 channels"):
        model.model.layers[0].mlp(torch.ones(1, 2, 32))
    paged.close()


def test_gradients_are_for_the_modules_own_code():
    model = zoo.model("llama")
    paged = PagedModel(model)
    hidden = torch.ones(1, 2, 64, requires_grad=True)
    mlp = model.model.layers[0].mlp
    torch.autograd.grad(mlp(hidden).sum(), hidden)
    paged.close()


@pytest.mark.parametrize("name", ["self_attn.k_proj", "mlp.up_proj", "mlp.act_fn", "self_attn"])
@pytest.mark.parametrize("listens", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_are_called(name, listens):
    model = copy.deepcopy(zoo.model("llama"))
    paged = PagedModel(model)
    heard: list[nn.Module] = []
    module = model.get_submodule(f"model.layers.1.{name}")
    getattr(module, listens)(lambda module, *_: heard.append(module))
    with running(fusing.Rehearsal()):
        paged._rehearse()
    assert heard == [module]
    paged.close()


def test_a_layer_that_is_wrapped_later_is_the_one_that_computes():
    model = copy.deepcopy(zoo.model("llama"))
    paged = PagedModel(model)
    projection = model.model.layers[0].mlp.up_proj
    wrapped = projection.forward = lambda x: torch.zeros(*x.shape[:-1], projection.out_features)
    with torch.inference_mode():
        assert not model.model.layers[0].mlp(torch.ones(1, 2, 64)).any()
    paged.close()
    assert projection.forward is wrapped


class ScaledMLP(LlamaMLP):
    """Its code knows more names than the replacement does."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)).clamp(-1e3, 1e3)


class SwappedMLP(LlamaMLP):
    """The same names mean something else."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


@pytest.mark.parametrize("kind", [ScaledMLP, SwappedMLP])
def test_code_that_says_something_else_is_not_replaced(kind):
    model = copy.deepcopy(zoo.model("llama"))
    for layer in model.model.layers:
        layer.mlp.__class__ = kind
    paged = PagedModel(model)
    assert replaced(model)["GatedLinear"] == 0
    assert replaced(model)["TurnedAttention"] == 3
    paged.close()


def test_turns_of_neighbouring_channels_are_not_replaced(monkeypatch):
    """The names are Llama's, the numbers are not."""

    def turn_neighbours(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        def across(x: Tensor) -> Tensor:
            return torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)

        return tuple(x * cos[:, None] + across(x) * sin[:, None] for x in (q, k))

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", turn_neighbours)
    model = zoo.model("llama")
    paged = PagedModel(model)
    assert replaced(model)["TurnedAttention"] == 0
    assert replaced(model)["GatedLinear"] == 3
    paged.close()


def test_a_forward_that_somebody_has_set_stays():
    model = copy.deepcopy(zoo.model("llama"))
    own = model.model.norm.forward
    model.model.norm.forward = own
    paged = PagedModel(model)
    assert model.model.norm.forward is own
    paged.close()
    assert model.model.norm.forward is own


@pytest.mark.parametrize("error", [RuntimeError("no room"), KeyboardInterrupt()])
def test_a_rehearsal_that_is_cut_off_leaves_the_model_as_it_was(monkeypatch, error):
    def fail(self: Any) -> None:
        raise error

    model = zoo.model("llama")
    implementation = model.config._attn_implementation
    monkeypatch.setattr(PagedModel, "_rehearse", fail)
    with pytest.raises(type(error)):
        PagedModel(model)
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert model.config._attn_implementation == implementation
