"""The CPU's kernels held to the oracle; what their tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from paged_kv.cache.formats import INT2, INT4, INT8, NATIVE, KVFormat
from paged_kv.kernels.cpu import attention as cpu_attention
from paged_kv.kernels.cpu import microkernels as cpu_microkernels
from paged_kv.kernels.cpu import plan as cpu_plan
from paged_kv.kernels.cpu import quantize as cpu_quantize
from paged_kv.kernels.cpu import store as cpu_store
from paged_kv.kernels.cpu.microkernels import TILE_TOKENS
from paged_kv.kernels.cpu.plan import WorkItems, plan_items
from tests.support import attention_oracle
from tests.support.attention_oracle import FLOAT32_TOLERANCE, tolerance
from tests.support.fleets import Fleet
from tests.support.kv_formats import FORMATS_BY_LABEL

ROOT = Path(__file__).parents[2]

ALL_FORMATS = pytest.mark.parametrize("kv_format", FORMATS_BY_LABEL.values(), ids=FORMATS_BY_LABEL)

BASE_FORMATS = pytest.mark.parametrize(
    "kv_format", [NATIVE, INT8, INT4, INT2], ids=lambda kv_format: kv_format.name
)

LOW_PRECISION = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])

SINKS = torch.tensor([-1.0, 0.5, 3.0, 20.0])


def limit_of(kv_format: KVFormat) -> float:
    """Relative error that the kernels' float32 may add."""
    is_exact = kv_format.is_native or kv_format.has_token_keys
    return FLOAT32_TOLERANCE if is_exact else 1e-4


def check_step(
    fleet: Fleet, counts: dict[int, int], *, dtype: torch.dtype = torch.float32, **options: object
) -> None:
    """Hold a step to the oracle; `dtype` is that of the output."""
    limit = max(limit_of(layer.kv_format) for layer in fleet.cache.layers)
    # Rotated values, and output that is rotated back, are rounded once more than others.
    roundings = 1 + any(layer.kv_format.rotates_values for layer in fleet.cache.layers)
    limit += roundings * (tolerance(dtype) - FLOAT32_TOLERANCE)
    attention_oracle.check_step(fleet, counts, limit=limit, **options)


@pytest.fixture(autouse=True)
def on_cpu_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGED_KV_BACKEND", "cpu")


# -- vector widths --------------------------------------------------------------------------------


@cache
def kernels_of_their_own(lanes: int) -> dict[tuple[Any, str], Callable[..., Any]]:
    """The makers of kernels, each with a cache that serves one width only."""
    return {
        (module, name): cache(function.__wrapped__)
        for module in (cpu_attention, cpu_store)
        for name, function in vars(module).items()
        if name.endswith("_kernel")
    }


@pytest.fixture(params=[16, 8, 4], ids=lambda lanes: f"{lanes}-lanes")
def lanes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Kernels are made for vectors of so many lanes, whatever this machine has.

    Some are kept without the width in their key. Caches are replaced, never cleared: layers of
    other tests may hold the addresses of what is in them.
    """
    for module in (cpu_attention, cpu_microkernels, cpu_quantize):
        monkeypatch.setattr(module, "host_width", lambda: request.param)
    for (module, name), function in kernels_of_their_own(request.param).items():
        monkeypatch.setattr(module, name, function)
    return request.param


# -- threads --------------------------------------------------------------------------------------


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[WorkItems]:
    """Short contexts are cut into parts too, and every plan made is kept for a look."""
    made: list[WorkItems] = []

    def plan(*args: Any, **options: Any) -> WorkItems:
        made.append(plan_items(*args, **options))
        return made[-1]

    monkeypatch.setattr(cpu_plan, "MIN_SPLIT_TOKENS", TILE_TOKENS)
    monkeypatch.setattr(cpu_plan, "MIN_THREAD_TOKENS", 1)
    monkeypatch.setattr(cpu_plan, "plan_items", plan)
    return made


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
