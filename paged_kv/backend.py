"""Which kernels run: the one place where a backend is chosen. Knows devices, never blocks.

A backend is functions of the same signatures: `warm_up` for all layers of a cache, `plan` a step
once for all layers, `attend_and_store` for each layer, or one of `attend` and `store_tokens` where
the other is done elsewhere. PAGED_KV_BACKEND=torch or cpu overrides the choice.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor

from .errors import ConfigError
from .kernels.attention import AnyGroup, attend, plan_groups
from .kernels.records import LayerRecords, StepIndices
from .kernels.store import store_tokens

BACKEND_VARIABLE: Final = "PAGED_KV_BACKEND"


@dataclass(frozen=True)
class Backend:
    """The kernels of one kind of machine; see `kernels.attention` and `kernels.store`."""

    name: str
    warm_up: Callable[[Sequence[LayerRecords]], None]
    plan: Callable[[StepIndices], Any]
    attend: Callable[..., Tensor]
    store_tokens: Callable[[LayerRecords, Tensor, Tensor, StepIndices], None]
    attend_and_store: Callable[..., Tensor]


def nothing_to_warm_up(layers: Sequence[LayerRecords]) -> None:
    """Torch brings its operations compiled."""


def attend_and_store(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    records: LayerRecords,
    step: StepIndices,
    plan: list[AnyGroup],
    **rules: Any,
) -> Tensor:
    """One after the other."""
    output = attend(query, key, value, records, plan, **rules)
    store_tokens(records, key, value, step)
    return output


TORCH_BACKEND: Final = Backend(
    "torch", nothing_to_warm_up, plan_groups, attend, store_tokens, attend_and_store
)


def choose_backend(device: torch.device, name: str | None = None) -> Backend:
    """The backend of that name, or the one that PAGED_KV_BACKEND or else the device asks for."""
    wanted = name or os.environ.get(BACKEND_VARIABLE) or None
    if wanted not in (None, "torch", "cpu"):
        raise ConfigError(f"unknown backend {wanted!r}; expected torch or cpu")
    if wanted == "torch" or (wanted is None and device.type != "cpu"):
        return TORCH_BACKEND
    if device.type != "cpu":
        raise ConfigError(f"backend 'cpu' cannot run on device {device}")
    try:
        return cpu_backend()
    except ImportError as error:  # none, or one that does not fit the other packages
        if wanted == "cpu":
            raise ConfigError(f"backend 'cpu' needs numba: {error}") from error
        warn_of_torch(str(error))
        return TORCH_BACKEND


@cache
def cpu_backend() -> Backend:
    """The CPU's own kernels; raises `ImportError` where numba cannot be imported."""
    from .kernels.cpu_attention import attend, attend_and_store
    from .kernels.cpu_plan import CpuPlan
    from .kernels.cpu_store import store_tokens
    from .kernels.cpu_warm_up import warm_up

    return Backend("cpu", warm_up, CpuPlan, attend, store_tokens, attend_and_store)


@cache
def warn_of_torch(reason: str) -> None:
    """Once in a process."""
    warnings.warn(
        f"numba cannot be used ({reason}): attention runs on plain torch operations, several times "
        "slower; pip install numba",
        RuntimeWarning,
        stacklevel=3,
    )
