"""Half-precision models that compute in float32: nothing but the sums is more exact."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from paged_kv import LLM, SamplingParams
from paged_kv.models import huggingface, widening
from paged_kv.models.huggingface import PagedModel
from paged_kv.models.widening import WidenedModel, usual_dtype
from tests.support import zoo
from tests.support.paged_models import open_llm

NAMES = ["llama", "qwen2", "gemma2", "gpt2", "gpt-oss", "mixtral", "deepseek-v3", "opt", "cohere2"]
GREEDY = SamplingParams(max_tokens=12)


@pytest.fixture(params=[False, True], ids=["plain", "numba"])
def with_kernels(request, monkeypatch) -> bool:
    """Without our kernels widening has to do with torch's."""
    if not request.param:
        monkeypatch.setattr(huggingface, "fuse_once", lambda *_: None)
    return request.param


def half(name: str, dtype: torch.dtype) -> Any:
    return copy.deepcopy(zoo.model(name)).to(dtype)


def state_of(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("with_kernels")
def test_logits_are_those_of_the_same_weights_in_float32(name, dtype):
    model = half(name, dtype)
    before = state_of(model)
    expected = zoo.generate_alone(copy.deepcopy(model).float(), zoo.prompts()[:4], 12)
    paged = PagedModel(model, widens=True)
    assert paged.dtype is dtype
    with LLM(model, kv_format="native", kv_dtype=torch.float32) as llm:
        given = [output.token_ids for output in llm.generate(zoo.prompts()[:4], GREEDY)]
    assert given == expected
    paged.close()
    after = state_of(model)
    assert all(after[key].dtype is before[key].dtype for key in before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_large_weights_are_not_copied():
    model = half("llama", torch.bfloat16)
    weights = {name: p.data_ptr() for name, p in model.named_parameters() if p.ndim == 2}
    paged = PagedModel(model, widens=True)
    assert {name: p.data_ptr() for name, p in model.named_parameters() if p.ndim == 2} == weights
    assert model.model.norm.weight.dtype is torch.float32
    paged.close()


def test_a_model_is_known_by_its_weights_however_it_computes():
    model = half("llama", torch.bfloat16)
    plain = PagedModel(model)
    fingerprint = plain.fingerprint()
    plain.close()
    wide = PagedModel(model, widens=True)
    second = PagedModel(model)
    assert wide.fingerprint() == second.fingerprint() == fingerprint
    wide.close()
    assert second.fingerprint() == fingerprint
    second.close()
    again = PagedModel(model)
    assert again.fingerprint() == fingerprint
    again.close()


def test_widening_that_is_cut_off_leaves_the_model_as_it_was(monkeypatch):
    model = half("llama", torch.bfloat16)
    before = state_of(model)
    convert, calls = Tensor.to, []

    def fail(self: Tensor, *arguments: Any, **options: Any) -> Tensor:
        calls.append(arguments)
        if len(calls) == 3:
            raise MemoryError
        return convert(self, *arguments, **options)

    monkeypatch.setattr(Tensor, "to", fail)
    with pytest.raises(MemoryError):
        WidenedModel(model)
    monkeypatch.undo()
    assert all(tensor.dtype is torch.bfloat16 for tensor in model.parameters())
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("has_unit", [False, True])
def test_the_processor_decides_where_nobody_says(monkeypatch, caplog, has_unit):
    monkeypatch.setattr(widening, "has_bfloat16_unit", lambda: has_unit)
    assert usual_dtype(torch.bfloat16, "cpu") is (torch.bfloat16 if has_unit else torch.float32)
    assert usual_dtype(torch.float16, "cpu") is torch.float32
    assert usual_dtype(torch.float16, "cuda") is torch.float16
    assert usual_dtype(torch.float64, "cpu") is torch.float64
    for dtype, says in ((torch.bfloat16, not has_unit), (torch.float32, False)):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "paged_kv"):
            llm = open_llm(half("llama", dtype))
        assert llm.engine.cache.arenas
        assert ("computing in float32" in caplog.text) is says
        norm = llm.engine.runner.model.model.model.norm
        assert norm.weight.dtype is (torch.float32 if says else dtype)
        llm.close()
        assert norm.weight.dtype is dtype


def test_the_cache_keeps_the_precision_of_the_checkpoint(monkeypatch):
    monkeypatch.setattr(widening, "has_bfloat16_unit", lambda: False)
    for kv_format in ("native", "int8"):
        with LLM(half("llama", torch.bfloat16), kv_format=kv_format) as llm:
            assert llm.engine.cache.dtype is torch.bfloat16
            llm.generate(zoo.prompts()[:3], GREEDY)


def test_who_asks_for_half_precision_computes_in_it(monkeypatch):
    monkeypatch.setattr(widening, "has_bfloat16_unit", lambda: False)
    with LLM(half("llama", torch.bfloat16), dtype=torch.bfloat16) as llm:
        assert llm.engine.runner.model.model.model.norm.weight.dtype is torch.bfloat16
