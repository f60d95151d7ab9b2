"""Fleets on Triton's kernels, interpreted where there is no GPU, held to the oracle."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import triton
from torch import Tensor

from paged_kv.cache.backend import choose_backend
from paged_kv.cache.formats import (
    INT2,
    INT3,
    INT4,
    INT8,
    INT8_TOKEN,
    K4V2,
    KIVI2,
    NATIVE,
    KVFormat,
)
from paged_kv.cache.kv_cache import PagedKVCache
from paged_kv.cache.layer_spec import LayerSpec
from paged_kv.kernels.triton import attention as triton_attention
from paged_kv.kernels.triton import plan as triton_plan
from paged_kv.kernels.triton.plan import TritonPlan
from tests.support import attention_oracle, fleets
from tests.support.attention_oracle import FLOAT32_TOLERANCE, expected_outputs, relative_error
from tests.support.calibrations import calibrated

pytestmark = [
    pytest.mark.skipif(
        not triton.knobs.runtime.interpret and not torch.cuda.is_available(),
        reason="needs TRITON_INTERPRET=1 or a GPU",
    ),
    # What NumPy says of the interpreter's own scalars and of infinities that kernels mean.
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

PRESETS = {
    preset.name: preset for preset in (NATIVE, INT8, INT8_TOKEN, INT4, K4V2, INT3, INT2, KIVI2)
}
MIXED = {
    "k8v2": KVFormat(name="k8v2", key_bits=8, value_bits=2, key_group_size=32, value_clip=0.8),
    "k2v8-half": INT2.with_options(value_bits=8, wide_key_share=0.5, wide_key_clip=0.9),
    "k2v4-g64-eighth": INT2.with_options(
        value_bits=4, key_group_size=64, wide_key_share=0.125, rotates_values=False
    ),
    "k4v3-half-g32-zeros": INT4.with_options(
        value_bits=3,
        wide_key_share=0.5,
        key_group_size=32,
        rotates_values=False,
        has_error_feedback=False,
    ),
    "k8v3": INT3.with_options(key_bits=8, wide_key_share=0.0, has_error_feedback=False),
    "int2-block64-g32": INT2.with_options(block_size=64, key_group_size=32, min_tail_tokens=5),
    "int2-no-head-no-tail": KVFormat(
        name="plain", key_bits=2, value_bits=2, num_sink_tokens=0, min_tail_tokens=0
    ),
}
TOKEN8_VALUES2 = INT8_TOKEN.with_options(value_bits=2)
BASES = [NATIVE, INT8, INT4, INT2]

BASE_FORMATS = pytest.mark.parametrize("kv_format", BASES, ids=lambda kv_format: kv_format.name)

HALVES = (torch.bfloat16, torch.float16)

ALL_FORMATS = pytest.mark.parametrize(
    ("kv_format", "dtype"),
    [
        *(pytest.param(f, torch.float32, id=name) for name, f in (PRESETS | MIXED).items()),
        pytest.param(TOKEN8_VALUES2, torch.float32, id="token8-v2"),
        *(pytest.param(f, half, id=f"{f.name}-{half}") for half in HALVES for f in BASES),
    ],
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

Cache = partial(PagedKVCache, device=DEVICE)

Fleet = partial(fleets.Fleet, device=DEVICE)

ragged_fleet = partial(attention_oracle.ragged_fleet, device=DEVICE)


def layer_of(kv_format: KVFormat, **sizes: int) -> LayerSpec:
    return calibrated(attention_oracle.layer_of(kv_format, **sizes))


SINKS = torch.tensor([-1.0, 0.5, 3.0, 20.0], device=DEVICE)


def limit_of(kv_format: KVFormat, dtype: torch.dtype) -> float:
    """Relative error: fp16 queries and weights of codes, and the output's own rounding."""
    codes = 2e-3
    if kv_format.is_native:
        codes = FLOAT32_TOLERANCE
    elif kv_format.key_bits == kv_format.value_bits == 8:
        codes = 5e-4 if kv_format.has_token_keys else 1e-3  # queries are scaled, then rounded
    rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    return codes + rounding


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Contexts are written by the torch reference, and nothing that is allocated is zero.

    The interpreter takes as long for a split without tokens as for one of them.
    """
    monkeypatch.setenv("PAGED_KV_BACKEND", "torch")
    if triton.knobs.runtime.interpret:
        monkeypatch.setattr(triton_plan, "num_processors", lambda device: 1)
    allocate = TritonPlan.partials

    def poisoned(plan: TritonPlan, *shape: int) -> tuple[Tensor, Tensor]:
        tensors = allocate(plan, *shape)
        for tensor in tensors:
            tensor.fill_(torch.nan)
        return tensors

    monkeypatch.setattr(TritonPlan, "partials", poisoned)


@pytest.fixture
def many_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """More splits than most contexts have blocks, of a block or a tile each."""
    monkeypatch.setattr(triton_plan, "num_processors", lambda device: 4)
    monkeypatch.setattr(triton_attention, "MIN_SPLIT_TOKENS", 1)


def on_triton(fleet: fleets.Fleet) -> fleets.Fleet:
    object.__setattr__(fleet.cache, "backend", choose_backend(fleet.cache.device, "triton"))
    return fleet


def check_step(fleet: fleets.Fleet, counts: dict[int, int], **options: Any) -> None:
    """Run one step on Triton's kernels over every sequence and layer, and hold it to the oracle."""
    layers = range(len(fleet.cache.layers))
    expected = [expected_outputs(fleet, counts, layer, **options) for layer in layers]
    outputs = on_triton(fleet).step(counts, **options)
    for layer, spec in enumerate(fleet.cache.layers):
        limit = limit_of(spec.kv_format, fleet.cache.dtype)
        for slot in counts:
            error = relative_error(outputs[slot][layer], expected[layer][slot])
            assert error <= limit, (layer, slot, error)
    fleet.manager.check_integrity()
